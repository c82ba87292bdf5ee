"""The deferred tensor, which stands for scores that are not computed, and deferred tensors that share memory."""
