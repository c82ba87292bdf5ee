"""Attention a few query rows at a time, exactly, and block maps of where it goes."""

from attnpatch import errors
from attnpatch.api import apply, capture, explain, patched, register, remove, report
from attnpatch.capture.block_map import BlockMap
from attnpatch.capture.blocks import Blocks
from attnpatch.policy import Policy

__version__ = "0.1.0"
__all__ = [
    "BlockMap",
    "Blocks",
    "Policy",
    "apply",
    "capture",
    "errors",
    "explain",
    "patched",
    "register",
    "remove",
    "report",
]
