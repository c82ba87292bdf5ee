"""Stand-ins for kernel packages that are not installed: their attention functions, computed by torch's functions."""
