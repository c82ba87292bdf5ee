"""Block maps to look at: one HTML page that needs no network."""
