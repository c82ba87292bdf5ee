"""Blocks: how tokens are grouped, and which block each token of a call belongs to."""
