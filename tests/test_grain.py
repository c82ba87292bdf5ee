"""Where rows of torch's fused CPU kernel may be cut: every row has the bits of the whole call."""

import contextlib
import itertools

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

from attnpatch.policy import LEAST_ROWS
from attnpatch.rows.evaluate import row_granularity
from attnpatch.rows.graph import axes
from attnpatch.sdpa_call import SdpaCall

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", autouse=True)
def shipped_rows():
    before, axes.LEAST[axes.ROW] = axes.LEAST[axes.ROW], LEAST_ROWS
    yield
    axes.LEAST[axes.ROW] = before


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@st.composite
def calls(draw):
    return {
        "dtype": draw(st.sampled_from(DTYPES)),
        "threads": draw(st.sampled_from([1, 2, 2, 16, 64])),
        "batch": draw(st.integers(1, 2)),
        "heads": draw(st.sampled_from([1, 2, 4, 8])),
        "group": draw(st.sampled_from([1, 1, 2, 4])),
        "width": draw(st.sampled_from([8, 16, 17, 64, 80, 128])),
        "q_len": draw(st.sampled_from([9, 40, 63, 64, 101, 130, 191, 192, 200, 300, 770, 801, 1030])),
        "kv_len": draw(st.sampled_from([7, 40, 63, 64, 101, 200, 513])),
        "masked": draw(st.booleans()),
        "step": draw(st.integers(1, 400)),
        "seed": draw(st.integers(0, 99)),
    }


def arguments(batch, heads, group, width, q_len, kv_len, masked, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads * group, q_len, width, generator=generator).to(dtype)
    key, value = (torch.randn(batch, heads, kv_len, width, generator=generator).to(dtype) for _ in "kv")
    mask = torch.rand(batch, 1, q_len, kv_len, generator=generator) > 0.3 if masked else None
    return SdpaCall(query, key, value, mask, enable_gqa=group > 1)


@given(call=calls())
def test_steps_have_the_bits_of_the_whole(call):
    """With one thread, two or more than heads; where narrow dtypes are packed for a product in tiles, and where not.

    With the floor that is shipped: what fewer rows round to depends on the processor.
    """
    call = dict(call)
    step, dtype = call.pop("step"), call["dtype"]
    with threads(call.pop("threads")):
        named = arguments(**call)
        whole = F.scaled_dot_product_attention(**named.arguments())
        found = row_granularity.of_fused(named, dtype)
        for spans in (found.cut(call["q_len"], step), found.tight(call["q_len"], step)):
            assert_cover(spans, call["q_len"])
            for low, high in spans:
                part = F.scaled_dot_product_attention(**rows_of(named, low, high))
                assert torch.equal(part, whole[:, :, low:high]), (low, high, spans)


def rows_of(call, low, high):
    mask = None if call.attn_mask is None else call.attn_mask[:, :, low:high]
    return {**call.arguments(), "query": call.query[:, :, low:high], "attn_mask": mask}


def assert_cover(spans, size):
    assert spans[0][0] == 0 and spans[-1][1] == size
    assert all(before == after for (_, before), (after, _) in itertools.pairwise(spans))
    assert all(low < high for low, high in spans)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 128])
@pytest.mark.parametrize("length", [200, 770, 801, 1030])
@pytest.mark.parametrize("most", [4, 11, 32, 100, 250])
def test_tight_steps_are_small(length, most, width, dtype):
    """Where memory leaves less than the kernel takes at a time, steps are as small as the bits allow.

    A call that ends with fewer than 32 rows has a last step with what the kernel takes before: 64 rows, 256 of long calls.
    """
    call = arguments(1, 2, 1, width, length, length, False, dtype, 0)
    spans = row_granularity.of_fused(call, dtype).tight(length, most)
    assert_cover(spans, length)
    narrow = dtype != torch.float32 and row_granularity._may_pack(dtype)
    fewest = 64 if narrow else 16
    # A remainder too small to stand alone makes one step longer.
    whole = spans[:-1] if length % 32 else spans
    assert max(high - low for low, high in whole) < max(most, fewest) + (64 if narrow else 16)
    assert spans[-1][1] - spans[-1][0] < 2 * (256 if length >= 768 else 64)


@pytest.mark.parametrize(("rows", "keys"), [(63, 64), (64, 63)])
def test_steps_of_what_is_not_packed_stay_small(rows, keys):
    """Fewer than 64 rows or keys of bfloat16 are packed by no processor, so their steps are what they were."""
    call = arguments(1, 2, 1, 16, rows, keys, False, torch.bfloat16, 0)
    assert row_granularity.of_fused(call, torch.bfloat16).cut(rows, 32)[-1] == (32 * (rows // 64), rows)
    assert row_granularity.of_fused(call, torch.bfloat16).tight(rows, 8)[0] == (
        (0, 16) if rows == 64 else (0, 63)
    )


@pytest.mark.parametrize(
    ("rows", "count", "spans"),
    [(64, 1, 2), (64, 16, 1), (101, 16, 1), (128, 16, 2), (2048, 16, 2), (2048, 1, 2)],
)
def test_a_step_of_one_head_has_more_than_one_block(rows, count, spans):
    """One block alone gets all threads for its products; whether they then round differently depends on the processor."""
    with threads(count):
        found = row_granularity.of_fused(
            arguments(1, 1, 1, 16, rows, 64, False, torch.float32, 0), torch.float32
        )
        assert len(found.cut(rows, 1)) == spans
        assert_cover(found.cut(rows, 1), rows)
