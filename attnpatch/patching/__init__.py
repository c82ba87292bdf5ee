"""Which modules are attention, and what stands in the place of their forward."""
