"""Matrix products, with every torch function that computes one."""
