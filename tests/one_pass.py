"""Attention and block mass in one pass on a GPU: tried against two passes (``attnpatch.recording.gpu.fused_sums``), not used.

FlashAttention's forward pass (Dao et al. 2022) that also keeps, for every row and block of keys, the logarithm of what
the row's weights in that block sum to, and takes off the row's logsumexp when that is known. It has to beat torch's fused
kernel and a second product by so much that results which are no longer that kernel's are worth it: ``benchmarks.gpu``
compares. Blocks of one width, no masks but the causal one. Imported where Triton is used only.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import triton
import triton.language as tl

from attnpatch.sdpa_call import SdpaCall

LOG2_E = 1.0 / math.log(2.0)
# Bytes of the sums of tiles that are kept apart before heads are summed.
HELD = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Shape:
    """How much a program takes at once: query rows, keys, and as Triton has them."""

    rows: int
    keys: int
    warps: int
    stages: int


# None spills much when it is compiled for compute capability 9.0 (`python tests/compile_kernel.py`).
SHAPES = (Shape(128, 64, 8, 3), Shape(128, 64, 8, 2), Shape(128, 128, 8, 2), Shape(64, 64, 4, 2))


@triton.jit
def attend_and_sum(
    query, key, value, out, sums, kept, length, blocks, first_head, heads, group, scale,
    q_head, q_row, k_head, k_row, v_head, v_row, o_head, o_row,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Query tiles one after the other, the longest first; ``kept``: ``[programs, blocks, ROWS]``, a program's own."""
    places, dims = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    tiles = tl.cdiv(length, ROWS)
    mine = kept + tl.program_id(0).to(tl.int64) * blocks * ROWS
    for work in range(tl.program_id(0), tiles * heads, tl.num_programs(0)):
        tile, place = tiles - 1 - work // heads, work % heads
        head = (first_head + place).to(tl.int64)
        rows = tile * ROWS + places
        is_row = rows < length
        queries = tl.load(
            query + head * q_head + rows[:, None] * q_row + dims[None, :], mask=is_row[:, None], other=0.0
        )
        key_at, value_at = key + head // group * k_head, value + head // group * v_head
        most = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        found = tl.zeros([ROWS, WIDTH], tl.float32)
        seen = blocks
        if IS_CAUSAL:
            seen = tl.cdiv(tl.minimum((tile + 1) * ROWS, length), BLOCK)
        for block in range(seen):
            part = tl.zeros([ROWS], tl.float32)
            for start in range(block * BLOCK, (block + 1) * BLOCK, KEYS):
                keys = start + tl.arange(0, KEYS)
                is_key = keys < length
                columns = tl.load(
                    key_at + keys[None, :] * k_row + dims[:, None], mask=is_key[None, :], other=0.0
                )
                scores = tl.dot(queries, columns, input_precision=PRECISION) * scale
                is_seen = is_key[None, :]
                if IS_CAUSAL:
                    is_seen = is_seen & (keys[None, :] <= rows[:, None])
                scores = tl.where(is_seen, scores, float("-inf"))
                # Key 0 comes first and every row sees it, so this is a number from the first tile on.
                larger = tl.maximum(most, tl.max(scores, 1))
                weights = tl.exp2(scores - larger[:, None])
                shrink = tl.exp2(most - larger)
                new = tl.sum(weights, 1)
                part, total, most = part * shrink + new, total * shrink + new, larger
                values = tl.load(
                    value_at + keys[:, None] * v_row + dims[None, :], mask=is_key[:, None], other=0.0
                )
                found = tl.dot(
                    weights.to(values.dtype), values, found * shrink[:, None], input_precision=PRECISION
                )
            tl.store(mine + block * ROWS + places, tl.log2(part) + most)
        logsumexp = most + tl.log2(total)
        tl.store(
            out + head * o_head + rows[:, None] * o_row + dims[None, :],
            (found / total[:, None]).to(out.dtype.element_ty),
            mask=is_row[:, None],
        )
        # What a thread stored another one reads.
        tl.debug_barrier()
        sums_at = sums + (place * tiles + tile).to(tl.int64) * blocks
        for block in range(seen):
            shares = tl.exp2(tl.load(mine + block * ROWS + places) - logsumexp)
            tl.store(sums_at + block, tl.sum(tl.where(is_row, shares, 0.0)))
        tl.debug_barrier()


def attend(call: SdpaCall, block: int, shape: Shape = SHAPES[0]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence, and its block mass.

    Args:
        call: Query ``[1, heads, tokens, width]``, as many keys and values with heads
            that may be shared, no mask, default scale.
        block: Tokens of a block, a multiple of the tiles'.

    Returns:
        The attention output, and float64 ``[blocks, blocks]`` on the CPU: probability, summed over heads and tokens.
    """
    query, key, value = call.query[0], call.key[0], call.value[0]
    device, (heads, length, width) = query.device, query.shape
    blocks, tiles = -(-length // block), -(-length // shape.rows)
    programs = tiles * heads
    if device.type == "cuda":
        # As many as run at once; each has its own rows' sums in memory.
        at_once = 8 // shape.warps * torch.cuda.get_device_properties(device).multi_processor_count
        programs = min(programs, at_once)
    out = torch.empty_like(query)
    kept = torch.empty(programs, blocks, shape.rows, device=device)
    step = max(1, min(heads, HELD // (4 * tiles * blocks)))
    of_tiles = torch.zeros(tiles, blocks, dtype=torch.float64, device=device)
    for first in range(0, heads, step):
        some = min(step, heads - first)
        sums = torch.zeros(some, tiles, blocks, device=device)
        with torch.cuda.device_of(query):
            attend_and_sum[(min(programs, tiles * some),)](
                query, key, value, out, sums, kept, length, blocks, first, some, heads // key.shape[0],
                LOG2_E / math.sqrt(width), *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
                *out.stride()[:2], WIDTH=width, ROWS=shape.rows, KEYS=shape.keys, BLOCK=block,
                IS_CAUSAL=bool(call.is_causal),
                PRECISION="tf32x3" if query.dtype == torch.float32 else "ieee",
                num_warps=shape.warps, num_stages=shape.stages,
            )  # fmt: skip
        of_tiles += sums.sum(0, dtype=torch.float64)
    mass = of_tiles.new_zeros(blocks, blocks)
    mass.index_add_(0, torch.arange(tiles, device=device) * shape.rows // block, of_tiles)
    return out[None], mass.cpu()
