"""Captures attention while a sampler runs: steps, guidance, words."""
