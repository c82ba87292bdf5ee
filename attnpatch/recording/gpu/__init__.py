"""Sums the probabilities of a whole attention call on the GPU, by a Triton kernel."""
