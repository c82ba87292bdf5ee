"""Which modules are attention, and the function that replaces their forward."""
