"""Attention kernels that are no torch functions: maps and weights beside them, by rows in their place."""
