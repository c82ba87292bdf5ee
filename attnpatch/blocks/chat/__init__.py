"""Finds the messages of a conversation in the text that a chat template renders."""
