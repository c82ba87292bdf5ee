"""Graphs that begin with something else than a product: masks, positions, constants, noise."""
