"""The command line: small subcommands are in ``app.py``, larger ones have a file each; the rest is shared helpers."""
