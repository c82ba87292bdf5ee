"""Calls, caches, masks, attention weights and loading of transformers."""
