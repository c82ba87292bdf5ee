"""Imports every file that registers handlers in the op table: add new ones here. The fused kernel's is lazy."""

from typing import Any

from attnpatch.rows.creation import constants, gumbel
from attnpatch.rows.layout import diagonals, joining, pieces, shaping, writes
from attnpatch.rows.matmul import products
from attnpatch.rows.ops import lookups, metadata, norms_and_reductions, per_head, pointwise

__all__ = [
    "constants",
    "diagonals",
    "gumbel",
    "joining",
    "lookups",
    "metadata",
    "norms_and_reductions",
    "per_head",
    "pieces",
    "pointwise",
    "products",
    "shaping",
    "writes",
]  # fmt: skip


@products.fuses
def _attend(*asked: Any) -> Any:
    from attnpatch.rows.fusion import run

    return run.attend(*asked)
