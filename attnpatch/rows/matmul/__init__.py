"""Matrix products, in every spelling."""
