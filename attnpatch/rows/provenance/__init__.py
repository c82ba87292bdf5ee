"""Which input each dimension of a tensor comes from, and which keys are open."""
