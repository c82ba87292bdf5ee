"""Every feature with each of the releases of torch and its hosts that are supported: ``python -m tests.versions``."""
