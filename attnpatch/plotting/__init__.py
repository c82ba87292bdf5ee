"""Pictures: the folder that knows matplotlib, imported late."""
