"""Every file that registers functions in the op table; a new one is added here. The fused kernel's comes at its first use."""

from typing import Any

from attnpatch.rows.creation import constants, gumbel
from attnpatch.rows.layout import diagonals, joining, pieces, shaping, writes
from attnpatch.rows.matmul import products
from attnpatch.rows.ops import lookups, metadata, per_head, pointwise, reductions

__all__ = [
    "constants", "diagonals", "gumbel", "joining", "lookups", "metadata", "per_head", "pieces", "pointwise", "products",
    "reductions", "shaping", "writes",
]  # fmt: skip


@products.fuses
def _attend(*asked: Any) -> Any:
    from attnpatch.rows.fusion import run

    return run.attend(*asked)
