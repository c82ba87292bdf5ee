"""Gradients of tensors computed by rows: edges in autograd's graph, checkpoints, saved tensors."""
