"""Block maps of conversations: the analyzer, for one conversation or many."""
