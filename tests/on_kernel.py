"""The kernel of block mass against float64: run by ``test_fused_mass.py``, in Triton's interpreter or on a GPU."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnpatch
from attnpatch.blocks.spec import Blocks
from attnpatch.recording.gpu import fused_sums
from attnpatch.recording.gpu.fused_sums import Shape, block_sums
from attnpatch.recording.gpu.tiles import cut
from attnpatch.rows.sdpa import logsumexp as fused
from attnpatch.rows.sdpa.kernel_choice import fused_choice
from attnpatch.sdpa_call import SdpaCall

DEVICE = "cpu" if fused_sums.is_interpreted() else "cuda"
# Small tiles: many of them in few tokens.
SMALL = Shape(16, 16, 4, 2, key_tiles=4)
# Triton's interpreter multiplies the bits of bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


def a_call(
    q_len=50, kv_len=None, batch=1, heads=2, kv_heads=None, width=16, dtype=torch.float32, mask=None, **more
):
    """An SDPA call."""
    generator = torch.Generator().manual_seed(0)
    kv_len, kv_heads = kv_len or q_len, kv_heads or heads
    query = 1.5 * torch.randn(batch, heads, q_len, width, generator=generator)
    key = 1.5 * torch.randn(batch, kv_heads, kv_len, width, generator=generator)
    key, mask = key.to(DEVICE, dtype), None if mask is None else mask.to(DEVICE)
    return SdpaCall(query.to(DEVICE, dtype), key, key, mask, **{"enable_gqa": kv_heads != heads, **more})


def probabilities(call):
    """float64 ``[batch, heads, q_len, kv_len]`` and float32 logsumexp, the slow and obvious way."""
    query, key, mask = call.query.double().cpu(), call.key.double().cpu(), call.attn_mask
    if call.enable_gqa:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if call.given_scale is None else call.given_scale)
    if call.is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).tril() == 0, -math.inf)
    if mask is not None:
        mask = mask.cpu()
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    lse = scores.logsumexp(-1)
    return (scores - lse.unsqueeze(-1)).exp().nan_to_num(0.0), lse.float().to(DEVICE)


def check(call, query_blocks, key_blocks, counts, heads=None, shape=SMALL):
    """The kernel's sums are those of float64."""
    given, lse = probabilities(call)
    query = (query_blocks[:, None] == torch.arange(counts[0])[:, None]).double()
    key = (key_blocks[:, None] == torch.arange(counts[1])[:, None]).double()
    expected = torch.einsum("bqn,bhnm,bkm->bhqk", query, given, key)
    expected = expected.sum(1, keepdim=True) if heads is None else expected[:, heads]
    assert fused_sums.why_not(call) is None
    got = block_sums(call, lse, query_blocks, key_blocks, counts, heads, shape=shape)
    assert got.dtype == torch.float64 and got.device.type == "cpu"
    rows = query.sum(-1)[:, None, :, None].clamp(min=1) * (1 if heads is not None else given.shape[1])
    torch.testing.assert_close(got / rows, expected / rows, atol=2e-6, rtol=0)
    assert expected.abs().max() > 0.1  # or nothing was tested


def in_blocks(length, size, batch=1):
    return (torch.arange(length) // size).expand(batch, -1), -(-length // size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "kv_heads", [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(4, marks=pytest.mark.long)]
)
def test_shared_key_heads_and_dtypes(kv_heads, is_causal, dtype):
    call = a_call(heads=4, kv_heads=kv_heads, dtype=dtype, is_causal=is_causal)
    blocks, count = in_blocks(50, 16)
    check(call, blocks, blocks, (count, count))


@pytest.mark.parametrize(
    "lengths",
    [(20, 45), (45, 20), *(pytest.param(each, marks=pytest.mark.long) for each in ((33, 33), (16, 70)))],
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_other_lengths_of_queries_and_keys(lengths, is_causal):
    """With ``is_causal`` row i sees the keys up to i, whatever the lengths, as torch has it."""
    (queries, rows), (keys, columns) = in_blocks(lengths[0], 16), in_blocks(lengths[1], 16)
    check(a_call(*lengths, is_causal=is_causal), queries, keys, (rows, columns))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 50),
        (50, 3),
        *(pytest.param(each, marks=pytest.mark.long) for each in ((5, 7), (17, 16), (16, 40))),
    ],
)
def test_blocks_of_any_width(sizes, is_causal):
    (queries, rows), (keys, columns) = in_blocks(50, sizes[0]), in_blocks(50, sizes[1])
    check(a_call(is_causal=is_causal), queries, keys, (rows, columns))


@pytest.mark.parametrize("how", ["plain", "causal", "masked", "scattered rows"])
def test_full_tiles_come_before_the_others(how):
    """Of blocks of 40 in tiles of 16: the last tile of each is not full, and lies between others that are."""
    blocks, count = in_blocks(110, 40)
    keys = cut(blocks, 16)
    assert keys.is_full_first and not keys.is_even
    assert keys.table[0, :, 1].tolist() == [16, 16, 16, 16, 16, 8, 8, 14]
    queries = blocks if how != "scattered rows" else (torch.arange(110) // 4 % 3)[None]
    more = {"mask": sliding(110, 30)} if how == "masked" else {"is_causal": how != "plain"}
    check(a_call(110, **more), queries, blocks, (count, count))


def test_uneven_spans_with_gaps_and_no_block():
    spans = Blocks.spans([(0, 3), (3, 4), (9, 30), (31, 50)])
    blocks = spans.resolve(torch.ones(1, 50, dtype=torch.bool)).assignment
    check(a_call(is_causal=True), blocks, blocks, (4, 4))
    # As the recorder calls it: keys of no block have a bin of their own.
    check(a_call(is_causal=True), blocks, torch.where(blocks < 0, 4, blocks), (4, 5))


@pytest.mark.parametrize("is_causal", [False, True])
def test_blocks_in_many_runs_are_taken_in_their_order(is_causal):
    """Tiles of an image: each lies in several short runs of tokens."""
    tiles = Blocks.tiles(8, 8, 4).resolve(torch.ones(1, 64, dtype=torch.bool)).assignment
    assert cut(tiles, 16).order is not None
    assert cut(in_blocks(64, 16)[0], 16).order is None
    check(a_call(64, is_causal=is_causal), tiles, tiles, (4, 4))
    check(a_call(64, is_causal=is_causal), tiles, in_blocks(64, 16)[0], (4, 4))
    check(a_call(64, is_causal=is_causal), in_blocks(64, 16)[0], tiles, (4, 4))


def test_blocks_in_many_runs_of_sequences_with_other_padding():
    valid = torch.ones(2, 70, dtype=torch.bool)
    valid[0, :6], valid[1, 64:] = False, False
    tiles = Blocks.tiles(8, 8, 4).resolve(valid).assignment
    check(a_call(70, batch=2, mask=valid[:, None, None]), tiles, tiles, (4, 4))


def test_sequences_with_other_padding_have_other_tiles():
    valid = torch.ones(3, 50, dtype=torch.bool)
    valid[1, :30], valid[2, 45:] = False, False
    blocks = Blocks.fixed(16).resolve(valid).assignment
    check(a_call(batch=3, is_causal=True), blocks, blocks, (4, 4))
    mask = valid[:, None, None, :] & torch.ones(50, 50, dtype=torch.bool).tril()
    check(a_call(batch=3, mask=mask), blocks, blocks, (4, 4))


def sliding(length, window):
    places = torch.arange(length)
    distance = places[:, None] - places
    return (distance >= 0) & (distance < window)


MASKS = {
    "sliding window": lambda: sliding(50, 11)[None, None],
    "rows and keys only": lambda: sliding(50, 20),
    "keys of each sequence": lambda: torch.rand(2, 1, 1, 50) < 0.6,
    "each head its own": lambda: torch.rand(2, 2, 50, 50) < 0.5,
    "a window in one head": lambda: torch.stack([sliding(50, 11), torch.ones(50, 50, dtype=torch.bool)])[
        None
    ],
    "heads and batch shared": lambda: torch.rand(1, 1, 50, 50) < 0.3,
    "bottom right": lambda: torch.ones(50, 50, dtype=torch.bool).tril(-10),
    "added": lambda: 2 * torch.randn(2, 1, 50, 50),
    "added, each head its own": lambda: -torch.rand(1, 2, 1, 1) * (50 - torch.arange(50.0)),
    "added, with infinity": lambda: torch.where(sliding(50, 9), torch.randn(50, 50), -math.inf),
    "added, half precision": lambda: torch.where(sliding(50, 40), 0.0, -1e4).half(),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    """Some of them leave rows that see nothing, and those put no mass anywhere."""
    torch.manual_seed(3)
    blocks, count = in_blocks(50, 15, 2)
    check(a_call(batch=2, mask=MASKS[name]()), blocks, blocks, (count, count))


@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, -1e30, -1e9, -1e4])
def test_a_row_that_is_closed_by_a_number_is_left_to_torch(low):
    mask = torch.zeros(50, 50)
    mask[:, 40:] = low  # padding: no matter
    blocks, count = in_blocks(50, 15)
    call = a_call(mask=mask)
    found, rows = fused_sums.checked_sums(
        call, probabilities(call)[1], blocks, blocks, (count, count), None, None
    )
    torch.testing.assert_close(found.sum((1, -1)), 2 * rows, atol=1e-4, rtol=0)
    mask[7] = low
    call = a_call(mask=mask)
    lse = probabilities(call)[1]
    asked = (call, lse, blocks, blocks, (count, count), None, None)
    assert fused_sums.checked_sums(*asked) == "closed rows"
    in_no_block = blocks.clone()
    in_no_block[:, 7] = -1
    found, rows = fused_sums.checked_sums(call, lse, in_no_block, blocks, (count, count), None, None)
    torch.testing.assert_close(found.sum((1, -1)), 2 * rows, atol=1e-4, rtol=0)
    assert rows.sum() == 49


def test_a_mask_over_blocks_in_many_runs():
    tiles = Blocks.tiles(8, 8, 4).resolve(torch.ones(1, 64, dtype=torch.bool)).assignment
    check(a_call(64, mask=sliding(64, 13)), tiles, tiles, (4, 4))


@pytest.mark.parametrize("heads", [[0, 1, 2, 3], [3, 0]])
def test_heads_kept_apart(heads):
    blocks, count = in_blocks(50, 20, 2)
    check(a_call(batch=2, heads=4, kv_heads=2, is_causal=True), blocks, blocks, (count, count), heads)


@pytest.mark.parametrize("width", [8, 24, 80])
def test_widths_that_are_no_power_of_two(width):
    blocks, count = in_blocks(40, 16)
    check(a_call(40, width=width, is_causal=True), blocks, blocks, (count, count))


def test_scale_and_layout():
    """Tokens before heads, as hosts' projections leave them, and keys that are expanded, are read where they lie."""
    blocks, count = in_blocks(50, 16, 2)
    call = a_call(batch=2, heads=4, given_scale=0.11, is_causal=True)
    query, key = (
        call.query.transpose(1, 2).contiguous().transpose(1, 2),
        call.key[:, :1].expand(-1, 4, -1, -1),
    )
    call = dataclasses.replace(call, query=query, key=key)
    check(call, blocks, blocks, (count, count))
    call = dataclasses.replace(call, key=key[..., ::2].repeat_interleave(2, -1).mT.contiguous().mT)
    check(call, blocks, blocks, (count, count))


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_tiles_that_are_chosen(is_causal):
    """Of full size, half precision, with tiles that nothing is masked in."""
    blocks, count = in_blocks(260, 128)
    check(
        a_call(260, heads=1, dtype=torch.float16, is_causal=is_causal),
        blocks,
        blocks,
        (count, count),
        None,
        None,
    )


def test_scratch_is_taken_in_parts():
    blocks, count = in_blocks(50, 16, 2)
    shape = dataclasses.replace(SMALL, scratch=100)
    check(a_call(batch=2, is_causal=True), blocks, blocks, (count, count), [0, 1], shape)


def test_sums_are_the_same_every_time():
    blocks, count = in_blocks(50, 16)
    call = a_call(is_causal=True)
    lse = probabilities(call)[1]
    first, second = (block_sums(call, lse, blocks, blocks, (count, count), shape=SMALL) for _ in range(2))
    assert torch.equal(first, second)


def test_what_it_cannot_serve_it_says(monkeypatch):
    plain = a_call()
    assert fused_sums.why_not(plain) is None
    for wanted, call in {
        "float64": a_call(dtype=torch.float64),
        "wide heads": a_call(width=257),
        "few rows": a_call(15),
        "another layout": dataclasses.replace(plain, query=plain.query[0], key=plain.key[0]),
        "another mask": dataclasses.replace(
            plain, attn_mask=torch.nn.Parameter(torch.zeros(50, 50, device=DEVICE))
        ),
        "a long sequence": dataclasses.replace(
            plain, key=torch.empty_strided((1, 2, 50, 16), (0, 0, 2**26, 1), device="meta")
        ),
    }.items():
        assert fused_sums.why_not(call) == wanted
    other_heads = a_call(heads=4, kv_heads=2, enable_gqa=False)
    assert fused_sums.why_not(other_heads) == "another layout"
    monkeypatch.setattr(fused_sums.importlib.util, "find_spec", lambda name: None)
    assert fused_sums.why_not(plain) == "no Triton"
    monkeypatch.setattr(fused_sums, "is_interpreted", lambda: False)
    assert fused_sums.why_not(plain) == ("no GPU" if DEVICE == "cpu" else "no Triton")


# ---------------------------------------------------------------------------------------- through the whole package


def a_model():
    """Of heads that share no keys: torch serves those in float32 in dense math on CUDA, where there is no logsumexp."""
    model = zoo.BY_NAME["llama"].build("sdpa")
    config = copy.deepcopy(model.config)
    config.num_key_value_heads = config.num_attention_heads
    torch.manual_seed(0)
    return type(model)(config).eval().to(DEVICE)


def captured(model, inputs, **asked):
    """Maps, and what summed them; the reference is the same with the kernel left out."""
    maps = {}
    for way in ("kernel", "torch"):
        given = {name: value.to(DEVICE) for name, value in inputs.items()}
        with pytest.MonkeyPatch.context() as patched, torch.no_grad():
            if way == "torch":
                patched.setattr(fused_sums, "why_not", lambda call: "left out")
            attnpatch.apply(model, mode="never")
            with attnpatch.capture(model, layers=[0], **asked) as found:
                model(**given)
            summed = attnpatch.report(model).sites[0].summed_by
            attnpatch.remove(model)
        assert summed == {"kernel" if way == "kernel" else "torch (left out)": 1}
        maps[way] = found.block_map
    return maps["kernel"], maps["torch"]


@pytest.mark.parametrize(("padding", "heads"), [("none", "mean"), ("left", [2, 0])])
def test_a_model_and_its_maps(padding, heads):
    model = a_model()
    kernel, torch_map = captured(
        model, zoo.BY_NAME["llama"].inputs(padding), blocks=Blocks.fixed(40), heads=heads
    )
    torch.testing.assert_close(
        torch.from_numpy(kernel.to_numpy()), torch.from_numpy(torch_map.to_numpy()), atol=2e-6, rtol=0
    )
    torch.testing.assert_close(
        torch.as_tensor(kernel.unassigned_mass), torch.as_tensor(torch_map.unassigned_mass), atol=5e-6, rtol=0
    )
    assert kernel.to_numpy().max() > 0.2


def test_what_the_kernel_cannot_serve_is_counted_with_its_reason():
    model = a_model()
    inputs = {name: value.to(DEVICE) for name, value in zoo.BY_NAME["llama"].inputs("none").items()}

    def summed(**asked):
        attnpatch.apply(model, mode="never")
        with attnpatch.capture(model, blocks=Blocks.fixed(40), layers=[0], **asked):
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        report = attnpatch.report(model)
        attnpatch.remove(model)
        assert "block mass beside fused attention: " in str(report)
        return report.sites[0].summed_by

    assert summed() == {"kernel": 1, "torch (few rows)": 1}
    assert summed(sample_rows=2)["torch (some rows)"] == 1
    assert summed(measures=["entropy"]) == {"torch (measures)": 1, "torch (few rows)": 1}


@pytest.mark.parametrize("when", ["at its first use", "later"])
def test_a_wrong_logsumexp_is_found(when, monkeypatch):
    """In another base, as it has been; the map is right all the same."""
    inputs = zoo.BY_NAME["llama"].inputs("left")
    model = a_model()
    with attnpatch.capture(model, blocks=Blocks.fixed(40), measures=["sink"]) as maps, torch.no_grad():
        model(**{name: value.to(DEVICE) for name, value in inputs.items()})
    expected = maps.block_map.to_numpy()  # by torch
    right = dict(fused.OPERATORS)

    def wrong(operator):
        def run(call):
            result, lse = operator(call)
            return result, lse * math.log(2)

        return run

    monkeypatch.setattr(fused, "_is_right", {})
    if when == "later":
        monkeypatch.setattr(fused, "is_right", lambda *_: True)
    monkeypatch.setattr(fused, "OPERATORS", {kind: wrong(operator) for kind, operator in right.items()})
    attnpatch.apply(model, mode="never")
    with attnpatch.capture(model, blocks=Blocks.fixed(40)) as maps, torch.no_grad():
        model(**{name: value.to(DEVICE) for name, value in inputs.items()})
    assert {name for site in attnpatch.report(model).sites for name in site.summed_by} == {
        "torch (a wrong logsumexp)"
    }
    attnpatch.remove(model)
    torch.testing.assert_close(maps.block_map.to_numpy(), expected, atol=2e-6, rtol=0)


def test_a_logsumexp_gone_wrong_later_is_found_by_its_sums(monkeypatch):
    blocks, count = in_blocks(50, 16)
    call = a_call(is_causal=True)
    lse = probabilities(call)[1]
    rows = torch.bincount(blocks[0]).double()[None, None] * 2  # of two heads
    sums = [
        block_sums(call, lse + off, blocks, blocks, (count, count), shape=SMALL) for off in (0, 0.05, -0.05)
    ]
    assert [fused_sums.is_plausible(some, rows, False) for some in sums] == [True, False, False]
    assert [fused_sums.is_plausible(some, rows, True) for some in sums] == [True, True, False]


def test_a_kernel_that_fails_is_given_up_with_a_warning(monkeypatch):
    monkeypatch.setattr(fused_sums, "_broken", {})
    monkeypatch.setattr(fused_sums, "_launch", lambda *_: dataclasses.fields(None))
    model = a_model()
    attnpatch.apply(model, mode="never")
    inputs = {name: value.to(DEVICE) for name, value in zoo.BY_NAME["llama"].inputs("none").items()}
    with (
        pytest.warns(UserWarning, match="Triton failed: must be called with a dataclass"),
        attnpatch.capture(model, blocks=Blocks.fixed(40)) as maps,
        torch.no_grad(),
    ):
        model(**inputs)
    torch.testing.assert_close(maps.block_map.to_numpy().sum(-1), torch.ones(2, 3).numpy(), check_dtype=False)
    assert [site.summed_by for site in attnpatch.report(model).sites] == [
        {"torch (Triton: TypeError)": 1}
    ] * 2
    attnpatch.remove(model)


def test_a_kernel_that_fails_for_one_kind_of_call_serves_the_others(monkeypatch):
    """A card may have too little shared memory for wide heads in float32, and enough for all else."""
    monkeypatch.setattr(fused_sums, "_broken", {})
    wide, others = a_call(width=64), [a_call(), a_call(width=64, dtype=torch.float16)]
    with pytest.warns(
        UserWarning, match="float32 heads of 64 is left to torch, since Triton failed: no room"
    ):
        assert fused_sums.give_up(ValueError("no room"), wide.query) == "Triton: ValueError"
    assert fused_sums.why_not(wide) == "Triton: ValueError"
    assert [fused_sums.why_not(call) for call in others] == [None, None]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room"), RuntimeError("Triton Error [CUDA]: out of memory")], ids=repr
)
def test_a_kernel_that_runs_out_of_memory_leaves_the_call_to_torch(error, monkeypatch):
    """That call alone: it is not given up for the process."""

    def fails(*_):
        raise error

    monkeypatch.setattr(fused_sums, "_launch", fails)
    model = a_model()
    attnpatch.apply(model)
    inputs = {name: value.to(DEVICE) for name, value in zoo.BY_NAME["llama"].inputs("none").items()}
    with attnpatch.capture(model, blocks=Blocks.fixed(40)) as maps, torch.no_grad():
        model(**inputs)
    assert abs(maps.block_map.to_numpy().sum(-1) - 1).max() < 1e-5
    assert [site.summed_by for site in attnpatch.report(model).sites] == [{"torch (no memory)": 1}] * 2
    attnpatch.remove(model)


# ------------------------------------------------------------------------------------ as large as models in use, on a GPU
# Of Llama-3.1-8B's shape in the tiles that are chosen; a little of it in the interpreter.

LARGE = (
    {"q_len": 1000, "heads": 32, "kv_heads": 8, "width": 128, "dtype": torch.bfloat16}
    if DEVICE == "cuda"
    else {"q_len": 50, "heads": 2, "kv_heads": 1, "width": 16}
)
LENGTH, SIZE = LARGE["q_len"], 128 if DEVICE == "cuda" else 32


def large(**more):
    """A causal SDPA call whose tokens lie before its heads, as projections leave them."""
    call = a_call(**{**LARGE, "is_causal": more.get("mask") is None, **more})
    value = torch.randn(call.key.shape, generator=torch.Generator().manual_seed(1)).to(call.key)
    query, key, value = (
        each.transpose(1, 2).contiguous().transpose(1, 2) for each in (call.query, call.key, value)
    )
    return dataclasses.replace(call, query=query, key=key, value=value)


def scattered(length):
    return torch.randint(-1, 9, (1, length), generator=torch.Generator().manual_seed(0)), 9


def uneven(length):
    edges = [0, length // 11, length // 11 + 1, length // 3, length - 7]
    spans = Blocks.spans(list(itertools.pairwise(edges)))
    return spans.resolve(torch.ones(1, length, dtype=torch.bool)).assignment, len(edges) - 1


LARGE_CASES = {
    **{f"causal, {dtype}": ({"dtype": dtype}, None, None) for dtype in DTYPES},
    "not causal": ({"is_causal": False}, None, None),
    "heads apart": ({}, None, [1, 0]),
    "uneven blocks": ({}, uneven, None),
    "blocks in many runs": ({}, scattered, None),
    "sliding window": ({"mask": sliding(LENGTH, LENGTH // 5)}, None, None),
    "added mask": (
        {"mask": 9 * torch.rand(1, LARGE["heads"], 1, 1) * (torch.arange(LENGTH) / LENGTH - 1)}, None, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE_CASES)
def test_large_calls(name):
    more, cut_in, heads = LARGE_CASES[name]
    blocks, count = cut_in(LENGTH) if cut_in else in_blocks(LENGTH, SIZE)
    call = large(**more)
    given, lse = probabilities(call)
    member = (blocks == torch.arange(count)[:, None]).double()
    expected = member @ given[0] @ member.T
    expected = expected.sum(0, keepdim=True) if heads is None else expected[heads]
    got = block_sums(call, lse, blocks, blocks, (count, count), heads)[0]
    rows = member.sum(-1).clamp(min=1)[:, None] * (LARGE["heads"] if heads is None else 1)
    torch.testing.assert_close(got / rows, expected / rows, atol=1e-5, rtol=0)
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("what", ["causal", "mask", "padding"])
@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
def test_every_operator_that_gives_a_logsumexp_gives_sdpas_own_result(backend, what):
    """Rows that see nothing, and rows of a longer buffer, too. What torch does not offer here is not asked for."""
    seen = torch.rand(LENGTH, LENGTH) < 0.5
    if what == "padding":
        seen = torch.ones(LENGTH, LENGTH + 3, dtype=torch.bool).tril()
        seen[:, :7] = False
    more = {} if what == "causal" else {"mask": seen.to(DEVICE)[:, :LENGTH]}
    # One of the kernels knows no shared heads.
    call = large(**more, kv_heads=LARGE["heads"] if backend == "EFFICIENT_ATTENTION" else LARGE["kv_heads"])
    with sdpa_kernel([getattr(SDPBackend, backend), SDPBackend.MATH]):
        choice = fused_choice(call)
        if (DEVICE, choice) not in fused.OPERATORS:
            return
        result, lse = fused.with_lse(call, choice)
        own = F.scaled_dot_product_attention(**call.arguments())
    # A kernel may round otherwise when it keeps the logsumexp.
    result, own = result.nan_to_num(9.0), own.nan_to_num(9.0)
    assert ((result - own).abs() <= torch.finfo(own.dtype).eps * (1 + own.abs())).all()
    expected = probabilities(call)[1]
    finite = expected.isfinite()
    torch.testing.assert_close(lse[finite], expected[finite], atol=1e-2, rtol=0)
    assert fused.is_right(call, choice, lse)


@pytest.mark.parametrize("shape", range(4))
def test_attention_and_mass_in_one_pass(shape):
    """The kernel that was tried: as far from float64 as torch's own, and rows of mass as exact as those of two passes."""
    import one_pass  # Triton reads, when it is imported, whether it is to interpret

    shapes = one_pass.SHAPES if DEVICE == "cuda" else (one_pass.Shape(16, 16, 4, 2),)
    if shape >= len(shapes):
        return
    call, (blocks, count) = large(), in_blocks(LENGTH, SIZE)
    given, _ = probabilities(call)
    value = call.value.double().cpu().repeat_interleave(LARGE["heads"] // LARGE["kv_heads"], 1)
    expected, member = given @ value, (blocks == torch.arange(count)[:, None]).double()
    out, mass = one_pass.attend(call, SIZE, shapes[shape])
    own = (F.scaled_dot_product_attention(**call.arguments()).cpu() - expected).abs().max()
    assert (out.cpu() - expected).abs().max() <= max(2 * own, 1e-5)
    rows = SIZE * LARGE["heads"]
    wanted = (member @ given[0] @ member.T).sum(0)
    torch.testing.assert_close(mass / rows, wanted / rows, atol=1e-5, rtol=0)
