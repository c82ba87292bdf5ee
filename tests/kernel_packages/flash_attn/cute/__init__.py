"""A stand-in for flash-attn 4: the same functions, signatures, layouts and results, computed densely in float64."""

from .interface import flash_attn_func, flash_attn_varlen_func

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]
