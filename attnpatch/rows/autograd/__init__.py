"""Gradients of what is computed by rows: edges in autograd's graph, checkpoints, saved tensors."""
