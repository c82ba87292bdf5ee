"""Tokens that a model reorders between its attention modules."""
