"""Handlers of torch functions that need one element, one row or one whole dimension of the scores."""
