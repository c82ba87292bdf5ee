"""Attention a few query rows at a time, by the model's own code."""
