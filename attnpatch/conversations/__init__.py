"""Conversations in, block maps of them out: the analyzer, one conversation or many."""
