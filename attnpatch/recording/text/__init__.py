"""Attention of text models: calls of the model, the sequences they belong to, and who looks at each of their sites."""
