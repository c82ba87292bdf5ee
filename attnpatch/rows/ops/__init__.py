"""Torch functions of scores that need no more than a row, or a whole dimension."""
