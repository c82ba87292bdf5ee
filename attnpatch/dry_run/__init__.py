"""A forward pass on shapes, and what it says of memory before a model runs."""
