"""Captures attention of text models: the model's calls, the sequences they belong to, and an observer for each site."""
