"""``scaled_dot_product_attention``: the kernel choice, computation by rows, logsumexp, probabilities."""
