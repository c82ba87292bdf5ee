"""A stand-in for xFormers: the same function and bias classes, computed densely in float64."""

__version__ = "0.0.32"
