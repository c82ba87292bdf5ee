"""``attnpatch demo``: a small trained model, a conversation, and what attnpatch does with them."""
