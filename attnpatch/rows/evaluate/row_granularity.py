"""Where query rows may be cut so that every row keeps the bits of the whole call.

torch's fused CPU kernel processes 256 query rows at a time if the call has at least 768, 64 if it has at least 192, and
32 otherwise; a block of few rows rounds differently. On processors with tile registers (AMX) the kernel packs keys and
values of narrow dtypes if there is enough work to pay for it, and products of packed keys round differently, too. So a
step is cut where the kernel would cut, and has enough rows to be packed if the whole call is (aten
FlashAttentionKernel.cpp, torch 2.13). It also has more than one block if the whole call has: with one block of one head,
the products themselves use all threads.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import torch

from attnpatch import compat
from attnpatch.policy import LEAST_ROWS
from attnpatch.rows.graph.axes import FEWEST_ROWS, LEAST, ROW
from attnpatch.sdpa_call import SdpaCall

# For each dtype: the fewest query rows and keys for packing, and how often a packed key must be used.
_PACKED = {torch.bfloat16: (64, 4), torch.float16: (16, 1)}
_BLOCKS = ((768, 256), (192, 64), (0, 32))


@dataclasses.dataclass(frozen=True)
class RowGranularity:
    """The sizes and positions of row steps that keep the bits of the whole call.

    Attributes:
        least: The fewest rows of a step.
        multiple: Steps begin at multiples of this, the number of rows that torch's fused kernel processes at a time; 1
            if there is no such kernel.
        unit: If ``multiple`` is 1, steps begin at multiples of this, and the last step has the remainder.
        fewest: The fewest rows of a step if memory has no room for ``least``.
        holds: Tells if rows ``low:high`` have the bits of the whole call.
    """

    least: int = dataclasses.field(default_factory=lambda: LEAST[ROW])
    multiple: int = 1
    unit: int = dataclasses.field(default_factory=lambda: LEAST[ROW])
    fewest: int = dataclasses.field(default_factory=lambda: LEAST[ROW])
    holds: Callable[[int, int], bool] = lambda low, high: True

    def cut(self, size: int, step: int) -> list[tuple[int, int]]:
        if self.multiple == 1:
            return _at_multiples(size, step, self.least, self.unit)
        step = max(self.least, -(-step // self.multiple) * self.multiple)
        while True:
            starts = [step * i for i in range(max(1, size // step))]
            spans = list(itertools.pairwise([*starts, size]))
            if len(spans) == 1 or all(self.holds(low, high) for low, high in spans):
                return spans
            step += self.multiple

    def tight(self, size: int, most: int) -> list[tuple[int, int]]:
        """Steps of about ``most`` rows, which may be smaller than the kernel's blocks. Every row keeps its bits.

        The kernel processes 32 or more rows at a time. A remainder of fewer than 32 rows at the end of the call keeps
        its bits only if it stays in one step with the kernel's last full block; otherwise its rounding depends on the
        processor.
        """
        block = 32
        step = max(most // block * block, self.fewest)
        if step < block:
            step = max(self.fewest, most // self.fewest * self.fewest)
        taken = _block(size)
        last = size if size % block == 0 else max(0, size // taken - 1) * taken
        while True:
            spans = _pieces(0, last, step, self.fewest) + ([(last, size)] if last < size else [])
            if step >= size or all(self.holds(low, high) for low, high in spans):
                return spans
            step += block


def to_rounding() -> RowGranularity:
    """Granularity for steps that keep results only up to rounding, used if memory has no room for larger steps."""
    fewest = min(FEWEST_ROWS, LEAST[ROW])
    return RowGranularity(fewest, unit=fewest, fewest=fewest)


def _at_multiples(size: int, step: int, least: int, unit: int) -> list[tuple[int, int]]:
    """``0:size`` in pieces of about ``step`` that begin at multiples of ``unit``; the last one has the remainder."""
    units, fewest = size // unit, -(-least // unit)
    step = max(step // unit, fewest) * unit
    count = max(1, min(-(-size // step), units // fewest))
    bounds = [unit * low for low, _ in _parts(units, count)]
    return list(itertools.pairwise([*bounds, size]))


def _pieces(low: int, high: int, step: int, least: int) -> list[tuple[int, int]]:
    """``low:high`` in pieces of ``step`` rows, without a remainder that would round differently."""
    block = 32
    starts = list(range(low, high, step))
    if not starts:
        return []
    rest = high - starts[-1]
    if rest < least and len(starts) > 1 and (step < block or least > block):
        starts.pop()
    elif 0 < rest % block < least <= block < high - low:
        # The kernel would process the remainder alone, after full blocks: let it begin earlier.
        last = high - rest % block - (block - least)
        starts = [start for start in starts if start < last] + [last]
    return list(itertools.pairwise([*starts, high]))


def balanced(size: int, step: int, least: int) -> list[tuple[int, int]]:
    """``0:size`` in pieces of about ``step``, none smaller than ``least`` unless ``size`` is.

    So there is no small remainder that would round differently (see ``LEAST``).
    """
    return _parts(size, max(1, min(-(-size // max(step, least)), size // least)))


def _parts(size: int, count: int) -> list[tuple[int, int]]:
    """``0:size`` in ``count`` pieces whose lengths differ by at most one, the longer ones first."""
    base, longer = divmod(size, count)
    bounds = list(itertools.accumulate([base + (i < longer) for i in range(count)], initial=0))
    return list(itertools.pairwise(bounds))


def of_fused(call: SdpaCall, dtype: torch.dtype) -> RowGranularity:
    """The granularity for an SDPA call to a fused kernel; exact for torch's CPU kernel, elsewhere only for speed.

    Args:
        call: The call.
        dtype: The dtype in which the kernel computes.
    """
    query, key, q_len, kv_len, is_causal = call.query, call.key, call.q_len, call.kv_len, call.is_causal
    least = next(least for least, _ in _BLOCKS if q_len >= least)
    multiple = _block(q_len)
    if query.device.type != "cpu":
        return RowGranularity(max(least, multiple), multiple, fewest=LEAST_ROWS)

    threads = torch.get_num_threads()
    heads, key_heads = query.shape[:-2].numel(), key.shape[:-2].numel()

    def is_parallel(rows: int) -> bool:
        # A call of one block of one head is no parallel region: its products get all threads, and may round differently.
        return threads > 1 and heads * -(-rows // _block(rows)) > 1

    is_whole_parallel = is_parallel(q_len)
    if not _may_pack(dtype):
        return RowGranularity(
            max(least, multiple), multiple, fewest=LEAST_ROWS,
            holds=lambda low, high: is_parallel(high - low) == is_whole_parallel,
        )  # fmt: skip
    from_rows, uses = _PACKED[dtype]

    def packs(rows: int, keys: int, causal: bool) -> bool:
        if rows < from_rows or keys < from_rows:
            return False
        block = min(_block(rows), rows)
        blocks = -(-heads * -(-rows // block) // threads)
        seen = min(rows, keys) / keys if causal else 1
        return blocks * block * seen / key_heads >= uses

    packed = packs(q_len, kv_len, is_causal)

    def holds(low: int, high: int) -> bool:
        if is_parallel(high - low) != is_whole_parallel:
            return False
        if not is_causal:
            return packs(high - low, kv_len, False) == packed
        return packs(high - low, min(high, kv_len), low == 0) == packed

    return RowGranularity(
        max(least, multiple), multiple, fewest=from_rows if packed else LEAST_ROWS, holds=holds
    )


def _block(rows: int) -> int:
    return next(block for least, block in _BLOCKS if rows >= least)


def _may_pack(dtype: torch.dtype) -> bool:
    """True if this processor has tile registers for a dtype (AMX)."""
    if dtype not in _PACKED:
        return False
    return compat.has_tile_registers(dtype)
