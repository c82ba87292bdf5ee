"""Where the messages of a conversation lie in what a chat template renders."""
