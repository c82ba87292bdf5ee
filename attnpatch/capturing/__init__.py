"""``capture``, and the maps that it yields."""
