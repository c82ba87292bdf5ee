"""``scaled_dot_product_attention``: which kernel, by rows, its logsumexp and its probabilities."""
