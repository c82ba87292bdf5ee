"""Sums of attention by block while a model runs."""
