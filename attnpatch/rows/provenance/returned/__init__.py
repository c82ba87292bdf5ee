"""The order of what an attention module returns: from the result of its attention to the model's own tokens."""
