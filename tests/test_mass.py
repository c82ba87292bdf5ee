"""Block sums of attention probabilities against a float64 dense reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpatch.blocks.spec import Blocks
from attnpatch.recording.block_sums import Runs, add_tile


def reference(probabilities, query_assignment, key_assignment, query_blocks, key_blocks, weights=None):
    """``[B, H, query_blocks, key_blocks]`` float64 sums, the slow and obvious way."""
    probabilities = probabilities.double()
    query = (query_assignment[:, None, :] == torch.arange(query_blocks)[None, :, None]).double()
    key = (key_assignment[:, None, :] == torch.arange(key_blocks)[None, :, None]).double()
    if weights is not None:
        query = query * weights[:, None, :].double()
    return torch.einsum("bqn,bhnm,bkm->bhqk", query, probabilities, key)


def add(sums, tile, query, key, weights=None):
    """Add ``[B, H, rows, kv_len]`` to ``[B, 1 or H, query_blocks, key_blocks]``, one sequence after the other."""
    for b, one in enumerate(tile):
        bins = torch.nn.functional.pad(sums[b], (0, 1))
        columns = torch.where(key[b] < 0, sums.shape[3], key[b])
        add_tile(bins, one, query[b], columns, None if weights is None else weights[b].expand(len(one), -1))
        sums[b] = bins[..., :-1]


def make_tile(batch, heads, rows, kv_len, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return (3 * torch.randn(batch, heads, rows, kv_len)).softmax(-1).to(dtype)


def close(sums, expected, rows):
    """Compare as means, as block maps are: divided by the number of rows that went in."""
    torch.testing.assert_close(sums / rows, expected / rows, atol=1e-6, rtol=0)


@given(
    blocks=st.lists(st.integers(-1, 3), min_size=1, max_size=40),
    first=st.integers(0, 50),
    span=st.tuples(st.integers(0, 39), st.integers(0, 39)),
)
def test_runs_of_a_part(blocks, first, span):
    low, high = min(*span, len(blocks) - 1), min(max(span) + 1, len(blocks))
    found = Runs(torch.tensor(blocks), first).within(first + low, first + high)
    stops = [0, *(stop for _, stop in found)]
    spelled = [block for (block, stop), start in zip(found, stops, strict=False) for _ in range(stop - start)]
    assert spelled == blocks[low:high]


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 5),
    rows=st.integers(1, 40),
    kv_len=st.integers(1, 50),
    blocks=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    split=st.booleans(),
    run=st.integers(1, 12),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_against_dense_float64(batch, heads, rows, kv_len, blocks, dtype, split, run, weighted, seed):
    tile = make_tile(batch, heads, rows, kv_len, dtype, seed)
    query = torch.randint(-1, blocks[0], (batch, rows)).repeat_interleave(run, 1)[:, :rows]
    key = torch.randint(-1, blocks[1], (batch, kv_len)).repeat_interleave(3 * run, 1)[:, :kv_len]
    weights = torch.rand(batch, rows) if weighted else None
    sums = torch.zeros(batch, heads if split else 1, *blocks, dtype=torch.float64)
    add(sums, tile, query, key, weights)
    expected = reference(tile, query, key, *blocks, weights)
    close(sums, expected if split else expected.sum(1, keepdim=True), rows)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_add_up(split, dtype):
    batch, heads, length = 2, 4, 300
    probabilities = make_tile(batch, heads, length, length, dtype)
    partition = Blocks.fixed(37).resolve(torch.ones(batch, length, dtype=torch.bool))
    assignment, blocks = partition.assignment, partition.num_blocks
    sums = torch.zeros(batch, heads if split else 1, blocks, blocks, dtype=torch.float64)
    for head in range(0, heads, 2):
        for row in range(0, length, 64):
            tile = probabilities[:, head : head + 2, row : row + 64]
            target = sums[:, head : head + 2] if split else sums
            add(target, tile, assignment[:, row : row + 64], assignment)
    expected = reference(probabilities, assignment, assignment, blocks, blocks)
    close(sums, expected if split else expected.sum(1, keepdim=True), 37)


def test_float32_sums_and_long_blocks_stay_exact():
    tile = make_tile(1, 2, 2048, 2048)
    assignment = torch.zeros(1, 2048, dtype=torch.int64)
    for dtype in (torch.float64, torch.float32):
        sums = torch.zeros(1, 2, 1, 1, dtype=dtype)
        add(sums, tile, assignment, assignment)
        close(sums.double(), reference(tile, assignment, assignment, 1, 1), 2048)


@pytest.mark.parametrize("layout", ["transposed", "expanded heads", "keys strided", "rows strided"])
def test_any_memory_layout(layout):
    tile = make_tile(2, 3, 8, 20)
    if layout == "transposed":
        tile = tile.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "expanded heads":
        tile = tile[:, :1].expand(2, 3, 8, 20)
    elif layout == "keys strided":
        tile = tile.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        tile = tile[:, :, ::2]
    query = torch.arange(tile.shape[2])[None].expand(2, -1) // 3
    key = torch.arange(20)[None].expand(2, -1) // 6
    sums = torch.zeros(2, 3, 3, 4, dtype=torch.float64)
    add(sums, tile, query, key)
    close(sums, reference(tile, query, key, 3, 4), 1)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("run", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_padding_rows_spoils_nothing(split, run, dtype):
    query = torch.tensor([[-1, -1, 0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 1, 1, 1, 2, 2, -1, -1, -1]])
    query = query.repeat_interleave(run, 1)
    rows = 10 * run
    tile = make_tile(2, 3, rows, 12, dtype)
    key = torch.arange(12)[None].expand(2, -1) // 5
    weights = torch.rand(2, rows)
    expected = reference(tile, query, key, 3, 3, weights)
    tile[query[:, None, :].expand(2, 3, rows) < 0] = float("nan")
    sums = torch.zeros(2, 3 if split else 1, 3, 3, dtype=torch.float64)
    add(sums, tile, query, key, weights)
    close(sums, expected if split else expected.sum(1, keepdim=True), 3)


@pytest.mark.parametrize("run", [2, 8])
def test_nan_in_a_real_row_stays_in_its_block(run):
    tile = make_tile(1, 1, 3 * run, 3 * run)
    tile[0, 0, run, 0] = float("nan")
    assignment = torch.arange(3 * run)[None] // run
    sums = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    add(sums, tile, assignment, assignment)
    assert torch.isnan(sums[0, 0, 1, 0])
    assert torch.isfinite(sums[0, 0, [0, 2]]).all()


def test_causal_tile_with_fewer_keys_than_the_sequence():
    tile = make_tile(1, 2, 4, 6)
    assignment = torch.arange(10)[None] // 3
    sums = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    add(sums, tile, assignment[:, 2:6], assignment[:, :6])
    expected = reference(tile, assignment[:, 2:6], assignment[:, :6], 4, 4)
    close(sums, expected.sum(1, keepdim=True), 4)
    assert sums[0, 0, :, 2:].sum() == 0


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest new storage any operation made, in bytes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 16, 64])
@pytest.mark.parametrize("size", [1, 16, 4096])
def test_scratch_is_at_most_the_tile_in_float64(split, dtype, rows, size):
    tile = make_tile(1, 16, rows, 6000, dtype)
    tile[:, :, 0] = float("nan")
    query = torch.arange(rows)[None] // size
    query[0, 0] = -1
    key = torch.arange(6000)[None] // 100
    sums = torch.zeros(1, 16 if split else 1, 64, 60, dtype=torch.float64)
    with _Largest() as largest:
        add(sums, tile, query, key)
    assert largest.bytes <= tile.numel() * 8
