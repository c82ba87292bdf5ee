"""Torch functions that move, cut, join or overwrite elements of scores."""
