"""Shows block maps in one HTML page that needs no network."""
