"""Block sums of a whole attention call at once, on the GPU: which calls are supported, and the sums.

The kernel is in ``kernel.py``, which is imported at the first such call. Tokens are cut into tiles of one block each
(``tiles.py``), so blocks may have any size. A pair of query tile and key tile gives one number; these numbers are added
up by block. If a block's tokens lie in many short runs (the tiles of an image), tokens are taken in the order of
blocks.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import warnings
from typing import Any

import torch

from attnpatch.oom import is_out_of_memory
from attnpatch.recording.gpu.tiles import Cut, tables
from attnpatch.sdpa_call import SdpaCall

LOG2_E = 1.0 / math.log(2.0)
SCRATCH_BYTES = 16 * 2**20
# With fewer query rows a GPU's matrix units have too little to do.
LEAST_ROWS = 16
MOST_WIDTH = 256
# Programs for each multiprocessor. It runs two at a time; with fewer programs in all, some multiprocessors would be
# idle at the end.
_PROGRAMS = 8
# Tolerance for the sum of probabilities, on average over the rows of a block.
_OFF = 1e-2
# A row with a logsumexp below this sees no key: an additive mask hides all with a very low number (finfo.min, -1e9). If
# such a number is added, the scores of the row and the logarithm of the number of keys are lost in rounding.
_CLOSED = -256.0

# Triton's failures in this process, by kind of call: compiling again for every layer would take time and fail again.
_broken: dict[tuple[Any, ...], str] = {}


@dataclasses.dataclass(frozen=True)
class Shape:
    """The launch parameters of the kernel.

    Attributes:
        rows, keys: The most tokens of a query tile and of a key tile.
        warps, stages: Triton's ``num_warps`` and ``num_stages``.
        key_tiles: The largest number of key tiles in a program.
        scratch: Bytes for results on the device, one number per query tile, key tile and head that is kept separate; more
            if that is too little for one query tile.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    key_tiles: int = 16
    scratch: int = SCRATCH_BYTES


def shape_for(dtype: torch.dtype, width: int, is_masked: bool = False) -> Shape:
    """Parameters with which two programs fit a multiprocessor of capability 9.0, with little spilling (not timed)."""
    if dtype == torch.float32:
        # Cards of capability 8.6 and 8.9 have 99 KB of shared memory.
        return Shape(64, 32, 4, 2) if width <= 128 else Shape(32, 16, 4, 2)
    if width > 128:
        return Shape(128, 32, 8, 2)
    return Shape(128, 64, 8 if is_masked else 4, 3)


def _shape_of(call: SdpaCall) -> Shape:
    return shape_for(call.dtype, call.query.shape[-1], call.attn_mask is not None)


def is_interpreted() -> bool:
    """True if Triton runs kernels in its interpreter, which needs no GPU (tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(call: SdpaCall) -> str | None:
    """Why the kernel does not support an attention call, in a few words; ``None`` if it does."""
    query, key, mask = call.query, call.key, call.attn_mask
    if query.device.type != "cuda" and not is_interpreted():
        return "no GPU"
    if _kind(query) in _broken:
        return _broken[_kind(query)]
    if importlib.util.find_spec("triton") is None:
        return "no Triton"
    if query.device.type == "cuda" and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "an old GPU"
    if query.dim() != 4 or query.shape[:2] != (key.shape[0], key.shape[1] * call.group):
        return "another layout"
    if query.dtype == torch.bfloat16 and is_interpreted():
        return "bfloat16 in Triton's interpreter"  # which multiplies the bits as integers
    if query.dtype not in (torch.bfloat16, torch.float16, torch.float32) or key.dtype != query.dtype:
        return f"{query.dtype}".removeprefix("torch.")
    if query.shape[-1] > MOST_WIDTH:
        return "wide heads"
    if query.shape[-2] < LEAST_ROWS:
        return "few rows"
    if mask is not None and (type(mask) is not torch.Tensor or mask.is_complex()):
        return "another mask"
    # Offsets within a head have 32 bits.
    if any(t.shape[-2] * abs(t.stride(-2)) + t.shape[-1] * abs(t.stride(-1)) >= 2**31 for t in (query, key)):
        return "a long sequence"
    return None


def _kind(query: torch.Tensor) -> tuple[Any, ...]:
    """The key by which kernels are compiled: a card may have room for one width and dtype and not for another."""
    return query.device, query.dtype, query.shape[-1]


def give_up(error: Exception, query: torch.Tensor) -> str:
    """Stop using a kernel that failed through no fault of the call (no compiler, no room on the device), and warn."""
    _broken[_kind(query)] = f"Triton: {type(error).__name__}"
    dtype = f"{query.dtype}".removeprefix("torch.")
    warnings.warn(
        f"block mass of {dtype} heads of {query.shape[-1]} is left to torch, since Triton failed: {error}",
        stacklevel=2,
    )
    return _broken[_kind(query)]


def block_sums(
    call: SdpaCall,
    lse: torch.Tensor,
    query_blocks: torch.Tensor,
    key_blocks: torch.Tensor,
    counts: tuple[int, int],
    heads: list[int] | None = None,
    shape: Shape | None = None,
) -> torch.Tensor:
    """Attention probability summed over the tokens of each pair of blocks.

    Args:
        call: A call for which ``why_not`` is ``None``; with ``is_causal`` row i sees the keys up to i.
        lse: float32 ``[batch, heads, q_len]``, natural logarithm; not finite for rows that see no key.
        query_blocks, key_blocks: int64 ``[batch, q_len]`` and ``[batch, kv_len]`` on the CPU, -1 for none.
        counts: Numbers of query blocks and of key blocks.
        heads: Query heads to keep separate; ``None``: all are summed.
        shape: Launch parameters; ``None``: ``shape_for`` chooses.

    Returns:
        float64 ``[batch, 1 or heads, query_blocks, key_blocks]`` on the CPU. Within a tile the kernel sums in float32.
    """
    shape = shape or _shape_of(call)
    device = call.device
    queries, keys = tables(query_blocks, shape.rows, device), tables(key_blocks, shape.keys, device)
    batch, tiles = queries.blocks.shape
    places = 1 if heads is None else len(heads)
    result = torch.zeros(batch, places, *counts, dtype=torch.float64)
    step = max(1, shape.scratch // (4 * batch * places * keys.blocks.shape[1]))
    for low in range(0, tiles, step):
        some = dataclasses.replace(
            queries, table=queries.table[:, low : low + step], blocks=queries.blocks[:, low : low + step]
        )
        found = _launch(call, lse, some, keys, heads, shape)
        for b in range(batch):
            columns = key_sums(found[b].flatten(0, 1), keys.blocks[b], counts[1]).cpu()
            result[b].index_add_(1, some.blocks[b], columns.unflatten(0, (places, -1)))
    return result


def key_sums(found: torch.Tensor, blocks: torch.Tensor, count: int) -> torch.Tensor:
    """Sums of tiles by their key block: float64 on the device of ``found``, in the same order every time.

    So there is less to bring to the host, and its processor need not add what a GPU adds in no time.

    Args:
        found: ``[any, key tiles]``.
        blocks: int64 ``[key tiles]`` on the CPU, the block of each tile.
        count: Number of blocks.
    """
    values = found.T.double()
    order = blocks.argsort(stable=True)
    if not torch.equal(blocks[order], blocks):
        values = values[order.to(found.device)]
    lengths = blocks.bincount(minlength=count).to(found.device)
    return torch.segment_reduce(values.contiguous(), "sum", lengths=lengths, axis=0, unsafe=True, initial=0).T


def checked_sums(
    call: SdpaCall,
    lse: torch.Tensor,
    query_blocks: torch.Tensor,
    key_blocks: torch.Tensor,
    counts: tuple[int, int],
    heads: list[int] | None,
    workspace: int | None,
) -> tuple[torch.Tensor, torch.Tensor] | str:
    """``block_sums`` with a check, and the number of rows; or, in a few words, why the sums cannot be used.

    Args:
        call, lse, query_blocks, counts, heads: As in ``block_sums``.
        key_blocks: As in ``block_sums``, but every key is in a block.
        workspace: Bytes that may be held on the device; ``None``: ``SCRATCH_BYTES``.

    Returns:
        The sums, and the number of summed rows, float64 ``[batch, query_blocks]``; or the reason.
    """
    if _has_closed_rows(call, lse, query_blocks):
        return "closed rows"
    shape = _shape_of(call)
    if workspace is not None:
        shape = dataclasses.replace(shape, scratch=min(workspace, SCRATCH_BYTES))
    try:
        sums = block_sums(call, lse, query_blocks, key_blocks, counts, heads, shape)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return give_up(error, call.query)
    rows = sums.new_zeros(len(query_blocks), counts[0])
    rows.scatter_add_(1, query_blocks.clamp(min=0), (query_blocks >= 0).double())
    of_heads = rows[:, None] * (call.query.shape[1] if heads is None else 1)
    if not is_plausible(sums, of_heads, call.attn_mask is not None):
        return "a wrong logsumexp"
    return sums, rows


def _has_closed_rows(call: SdpaCall, lse: torch.Tensor, query_blocks: torch.Tensor) -> bool:
    """True if some row's logsumexp is too inexact (see ``_CLOSED``), so that the row must be normalised by its sum."""
    if not call.adds_mask:
        return False
    is_counted = (query_blocks >= 0).to(lse.device)[:, None]
    return bool(((lse < _CLOSED) & lse.isfinite() & is_counted).any())


def is_plausible(sums: torch.Tensor, rows: torch.Tensor, is_masked: bool) -> bool:
    """True if the probabilities of rows sum to 1 (under a mask to at most 1); otherwise the logsumexp was wrong.

    Args:
        sums: The result of ``block_sums`` with every key in a block.
        rows: float64 ``[batch, 1, query_blocks]``, number of summed rows.
        is_masked: True if some rows may see no key.
    """
    found = sums.sum(-1)
    return bool((found <= (1 + _OFF) * rows).all() and (is_masked or (found >= (1 - _OFF) * rows).all()))


def _launch(
    call: SdpaCall, lse: torch.Tensor, queries: Cut, keys: Cut, heads: list[int] | None, shape: Shape
) -> torch.Tensor:
    """float32 ``[batch, 1 or heads, query tiles, key tiles]`` on the device of the query."""
    from attnpatch.recording.gpu.kernel import sum_tiles

    query, key, mask = call.query, call.key, call.attn_mask
    device, (batch, num_heads, q_len, width) = query.device, query.shape
    kv_len = key.shape[-2]
    places = 1 if heads is None else len(heads)
    rows, columns = queries.table.shape[1], keys.table.shape[1]
    out = torch.empty(batch, places, rows, columns, device=device)
    kind, mask_strides = 0, (0, 0, 0, 0)
    if mask is not None:
        mask = mask.expand(batch, num_heads, q_len, kv_len)
        kind, mask_strides = (1 if mask.dtype == torch.bool else 2), mask.stride()
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    per_program, enough = shape.key_tiles, 1
    if device.type == "cuda":
        enough = _PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
    while per_program > 1 and batch * places * rows * -(-columns // per_program) < enough:
        per_program //= 2
    tables = [
        queries.table,
        keys.table,
        queries.order,
        keys.order,
        torch.tensor(heads or [0], dtype=torch.int32),
    ]
    tables = [out if table is None else table.to(device).contiguous() for table in tables]
    with torch.cuda.device_of(query):
        sum_tiles[rows, -(-columns // per_program), batch * places](
            query, key, lse, query if mask is None else mask, out, *tables,
            q_len, kv_len, rows, columns, places, num_heads if heads is None else 1,
            num_heads // key.shape[1], call.scale * LOG2_E, *query.stride(), *key.stride(), *lse.stride(), *mask_strides,
            HEAD_DIM=width, WIDTH=max(16, 2 ** (width - 1).bit_length()), ROWS=queries.size, KEYS=keys.size,
            KEY_TILES=per_program, QUERY_ORDERED=queries.order is not None, KEY_ORDERED=keys.order is not None,
            FULL_FIRST=keys.is_full_first, EVEN=keys.is_even, IS_CAUSAL=bool(call.is_causal), MASK=kind,
            MASK_OF_HEADS=mask_strides[1] != 0,
            # Three TF32 products are as accurate as one in float32, and run on the matrix units.
            PRECISION="tf32x3" if query.dtype == torch.float32 else "ieee",
            num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
    return out
