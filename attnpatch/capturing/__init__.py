"""``capture``, and what it hands out."""
