"""``attnpatch demo``: shows attention by rows and a block map with a small trained model and a conversation."""
