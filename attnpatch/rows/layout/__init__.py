"""Handlers of torch functions that move, slice, join or overwrite elements of scores."""
