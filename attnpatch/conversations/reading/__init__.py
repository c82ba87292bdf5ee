"""Conversations from files, whatever usual shape they have."""
