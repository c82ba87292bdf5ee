"""Runs a forward pass on shapes, to predict kernels and memory before the model runs."""
