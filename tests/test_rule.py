"""When attention goes by rows, how often memory is asked, and how policies are read."""

import dataclasses
import itertools

import pytest
import torch
import zoo
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import attnpatch
from attnpatch import Policy, errors
from attnpatch.memory import free
from attnpatch.rows.evaluate.row_granularity import RowGranularity
from attnpatch.rows.evaluate.tile_plan import StepWork, choose
from attnpatch.rows.graph.axes import LEAD, LEAST, ROW, Axis
from attnpatch.sizes import parse_size


class Eager(nn.Module):
    """Hand-written attention over ``[batch, tokens, 8]``."""

    def forward(self, x):
        return (x @ x.transpose(-1, -2)).softmax(-1) @ x


class Fused(nn.Module):
    def forward(self, x, mask=None):
        return nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], mask)[:, 0]


class Stack(nn.Module):
    def __init__(self, kind, count=3):
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(count))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


attnpatch.register(Eager)
attnpatch.register(Fused)


def totals(monkeypatch, tokens, free, kind=Eager, **policy):
    monkeypatch.setenv("ATTNPATCH_FREE_MEMORY", free)
    model = Stack(kind)
    with attnpatch.patched(model, **policy), torch.no_grad():
        model(zoo.floats(1, tokens, 8))
        return attnpatch.report(model).totals


@pytest.mark.parametrize(
    ("tokens", "free", "by_rows"),
    [(1024, "1.9GB", False), (1025, "1.9GB", True), (1025, "2.1GB", False), (1024, "1", False)],
)
def test_length_and_free_memory(monkeypatch, tokens, free, by_rows):
    found = totals(monkeypatch, tokens, free)
    assert (found["by_rows"], found["native"]) == ((3, 0) if by_rows else (0, 3))


def test_headroom(monkeypatch):
    """2048 tokens need about 50 MB of temporaries: over half of 90 MB free, under half of 110 MB."""
    wanted = 3 * 2048 * 2048 * 4
    small, large = str(int(wanted / 0.5) - 1000), str(int(wanted / 0.5) + 1000)
    assert totals(monkeypatch, 2048, small, min_free=0)["by_rows"] == 3
    assert totals(monkeypatch, 2048, large, min_free=0)["by_rows"] == 0
    assert totals(monkeypatch, 2048, large, min_free=0, headroom=0.4)["by_rows"] == 3


class Dense(nn.Module):
    """Fused attention that no kernel serves: it holds the scores."""

    def forward(self, x):
        with sdpa_kernel(SDPBackend.MATH):
            return nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


class FastPath(nn.Module):
    """torch's operator for attention in inference."""

    def __init__(self):
        super().__init__()
        self.attention = zoo.randomise(nn.MultiheadAttention(8, 2, batch_first=True)).eval()

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


attnpatch.register(Dense)
SCORES = 1100 * 1100 * 4


@pytest.mark.parametrize(("kind", "heads"), [(Eager, 1), (Dense, 1), (FastPath, 2)])
def test_scores_larger_than_one_allocation_may_be(monkeypatch, kind, heads):
    """Whatever is free; and a call of few rows stays native all the same."""
    for fields, by_rows in (
        ({"max_allocation": heads * SCORES - 1}, True),
        ({"max_allocation": heads * SCORES}, False),
        ({"max_allocation": "10kB", "min_tokens": 1100}, False),
        ({}, False),
    ):
        found = totals(monkeypatch, 1100, "900GB", kind, **fields)
        assert (found["by_rows"], found["native"]) == ((3, 0) if by_rows else (0, 3)), fields
    assert totals(monkeypatch, 1100, "900GB", Fused, max_allocation=1)["fused"] == 3


def test_the_limit_of_the_device_counts_where_none_is_given(monkeypatch):
    monkeypatch.setattr(free, "allocation_limit", lambda device: SCORES - 1)
    assert totals(monkeypatch, 1100, "900GB")["by_rows"] == 3
    assert totals(monkeypatch, 1100, "900GB", max_allocation="1TB")["native"] == 3
    x = zoo.floats(1, 1100, 8)
    (group,) = attnpatch.explain(Stack(Eager), inputs=x).groups
    assert group.reason == "scores of 4.84 MB exceed the device's limit of one allocation, 4.84 MB"


def test_no_step_makes_a_larger_tensor(monkeypatch):
    """Of 2048 x 2048 scores of 4 heads; a step of 16 rows and two heads takes 256 KiB."""
    heads, rows = Axis(4, LEAD), Axis(2048, ROW)
    work = StepWork([heads, rows], 2048, 4)
    for device in ("cpu", "xpu"):
        for most in (2**18, 2**20, 2**23):
            steps = choose(work, Policy(max_allocation=most), torch.device(device))
            low, high = steps.lead[0].get(heads, (0, 4))
            assert (high - low) * steps.largest()[0] * 2048 * 4 <= most
    case = zoo.BY_NAME["llama"]
    model, ids = case.build("eager"), zoo.tokens(1100)
    monkeypatch.setenv("ATTNPATCH_FREE_MEMORY", "900GB")
    with torch.no_grad():
        native = model(ids).logits
        with attnpatch.patched(model, max_allocation="500kB"):
            assert torch.equal(model(ids).logits, native)
            found = attnpatch.report(model)
    assert found.totals["by_rows"] == 2 and found.totals["largest"] <= 500_000
    assert "max_allocation='500kB'" in str(found)


def test_modes(monkeypatch):
    assert totals(monkeypatch, 16, "100GB", mode="always")["by_rows"] == 3
    assert totals(monkeypatch, 2048, "1", mode="never")["native"] == 3
    assert totals(monkeypatch, 17, "1", min_tokens=16)["by_rows"] == 3


def test_a_fused_kernel_stays_native(monkeypatch):
    """It holds no scores, so scarce memory changes nothing."""
    assert totals(monkeypatch, 2048, "1GB", Fused)["fused"] == 3
    assert totals(monkeypatch, 2048, "1GB", Fused, mode="always")["by_rows"] == 3


def test_free_memory_is_asked_once_per_model_call(monkeypatch):
    asked = []
    real = free.free_bytes
    monkeypatch.setattr(free, "free_bytes", lambda device: asked.append(device) or real(device))
    monkeypatch.setenv("ATTNPATCH_FREE_MEMORY", "1GB")
    model = Stack(Eager)
    with attnpatch.patched(model), torch.no_grad():
        model(zoo.floats(1, 1100, 8))
        assert len(asked) == 1
        model(zoo.floats(1, 1100, 8))
        assert len(asked) == 2
        model(zoo.floats(1, 1000, 8))
    assert len(asked) == 2, "a short call has nothing to ask"


def test_a_checkpointed_layer_goes_the_way_it_went(monkeypatch):
    """Memory is short in the forward pass and plentiful in the backward pass, which runs the layer again."""
    from torch.utils.checkpoint import checkpoint

    model, x = Stack(Eager, 1), zoo.floats(1, 1100, 8).double().requires_grad_()
    expected = torch.autograd.grad(model(x).sum(), x)[0]
    with attnpatch.patched(model):
        monkeypatch.setenv("ATTNPATCH_FREE_MEMORY", "1GB")
        out = checkpoint(model, x, use_reentrant=False).sum()
        monkeypatch.setenv("ATTNPATCH_FREE_MEMORY", "100GB")
        got = torch.autograd.grad(out, x)[0]
        assert attnpatch.report(model).totals["by_rows"] == 2
    torch.testing.assert_close(got, expected)


class Limited(TorchDispatchMode):
    """A device of ``limit`` elements: a larger result raises what a full one raises."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate too much.")
        return result


def test_out_of_memory_halves_the_step():
    model, x = Stack(Eager, 1), zoo.floats(2, 64, 8)
    with torch.no_grad():
        native = model(x)
        with Limited(2 * 64 * 20):
            with pytest.raises(torch.OutOfMemoryError):
                model(x)
            with attnpatch.patched(model, mode="always"):
                assert torch.equal(model(x), native)
                assert attnpatch.report(model).totals["retried"] > 0
            with (
                attnpatch.patched(model, mode="always", retry_on_oom=False),
                pytest.raises(torch.OutOfMemoryError),
            ):
                model(x)
        with Limited(64 * 3), attnpatch.patched(model, mode="always"), pytest.raises(torch.OutOfMemoryError):
            model(x)


def test_sizes():
    assert parse_size("2GB") == 2 * 10**9
    assert parse_size("1.5 GiB") == 3 * 2**29
    assert parse_size(" 512mb ") == 512 * 10**6
    assert parse_size(7) == 7
    for wrong in ("2 gigs", "", "GB", "-1GB", -1, True, None, float("nan"), "1e9GB"):
        with pytest.raises(errors.PolicyError, match="2GB"):
            parse_size(wrong, "min_free")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"min_fre": "2GB"}, "min_fre.*did you mean 'min_free'"),
        ({"colour": 1}, "colour.*min_tokens"),
        ({"min_free": "2 gigs"}, "min_free='2 gigs'"),
        ({"min_free": None}, "min_free=None"),
        ({"rows": -1}, "rows=-1"),
        ({"rows": 0}, "rows=0"),
        ({"rows": 2.5}, "rows=2.5"),
        ({"heads": True}, "heads=True"),
        ({"mode": "fast"}, "mode='fast'.*'always'"),
        ({"headroom": 0}, "headroom=0"),
        ({"headroom": "a"}, "headroom='a'"),
        ({"min_tokens": -5}, "min_tokens=-5"),
        ({"workspace": "0MB"}, "workspace"),
        ({"max_allocation": "0"}, "max_allocation=0.*None"),
        ({"max_allocation": 0}, "max_allocation=0.*None"),
        ({"max_allocation": "4 gigs"}, "max_allocation='4 gigs'"),
        ({"max_allocation": -1}, "max_allocation=-1"),
        ({"max_allocation": True}, "max_allocation=True"),
        ({"retry_on_oom": 1}, "retry_on_oom=1"),
        ({"fuse": "yes"}, "fuse='yes'"),
    ],
)
def test_bad_policy_leaves_the_model_alone(fields, words):
    model = Stack(Eager)
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(errors.PolicyError, match=words):
        attnpatch.apply(model, **fields)
    assert [dict(vars(module)) for module in model.modules()] == before
    attnpatch.apply(model, min_tokens=3)
    with pytest.raises(errors.PolicyError, match=words):
        attnpatch.apply(model, **fields)
    assert attnpatch.report(model).policy == Policy(min_tokens=3)


def test_policy_is_frozen_and_printable():
    policy = Policy(min_free="8GB")
    assert "min_free='8GB'" in repr(policy)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.rows = 3


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 61, 1025])
@pytest.mark.parametrize("step", [1, 3, 4, 7, 16, 5000])
@pytest.mark.parametrize("grain", [RowGranularity(), RowGranularity(32, 32), RowGranularity(192, 64)])
def test_no_remainder_is_left_alone(size, step, grain):
    pieces = grain.cut(size, step)
    assert pieces[0][0] == 0
    assert pieces[-1][1] == size
    assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
    assert all(high - low >= min(grain.least, size) for low, high in pieces)
    assert all(low % grain.multiple == 0 for low, _ in pieces)


@pytest.mark.parametrize("workspace", ["1MB", "64MB"])
def test_workspace_bounds_the_step(workspace):
    heads, rows = Axis(16, LEAD), Axis(8192, ROW)
    work = StepWork([heads, rows], 8192, 4)
    steps = choose(work, Policy(workspace=workspace), torch.device("cpu"))
    taken = max(high - low for low, high in steps.rows) * (steps.lead[0][heads][1] - steps.lead[0][heads][0])
    least = LEAST[ROW] * LEAST[LEAD] * 8192 * 4 * 3
    assert taken * 8192 * 4 * 3 <= max(parse_size(workspace), least)


def largest(heads, q_len, reads, **options):
    axes = [Axis(heads, LEAD), Axis(q_len, ROW)] if heads > 1 else [Axis(q_len, ROW)]
    policy = Policy(workspace=options.pop("workspace", None))
    work = StepWork(axes, q_len, 4, reads=reads)
    return choose(work, policy, torch.device("cpu"), **options).largest()


def test_no_more_heads_than_there_are():
    """8 MiB of scores are 128 rows of the one head, not 64 of two."""
    assert largest(1, 16384, 0) == (128, 1)
    assert largest(4, 16384, 0) == (64, 2)


def test_a_step_is_as_long_as_what_it_reads_beside_its_rows():
    """Keys and values of 512: 1024 elements for every column of the scores."""
    assert largest(1, 16384, 2 * 512 * 16384) == (1024, 1)
    assert largest(1, 16384, 2 * 512 * 16384, shrink=4) == (256, 1)
    assert largest(16, 8192, 2 * 64 * 8192) == (128, 2)


def test_a_step_of_long_rows_is_worth_packing_their_keys():
    narrow = 2 * 16384 * 64, 2 * 32768 * 64  # keys and values of heads of 64
    assert largest(8, 16384, narrow[0]) == (128, 2)
    assert largest(8, 32768, narrow[1]) == (256, 2)
    assert largest(8, 32768, narrow[1], free=2**26)[0] < 256


def test_a_long_step_is_a_small_part_of_all_scores():
    assert largest(1, 8192, 2 * 512 * 8192) == (512, 1)


def test_a_long_step_respects_the_workspace_and_free_memory():
    limit = 48 * 2**20
    for options in ({"workspace": limit}, {"free": 2 * limit}):
        rows, heads = largest(1, 16384, 2 * 512 * 16384, **options)
        assert rows * heads > 128
        assert rows * heads * 16384 * 4 * 3 <= limit


class Longer(nn.Module):
    """A model whose attention has more tokens than its call."""

    def __init__(self):
        super().__init__()
        self.layer = Eager()

    def forward(self, ids):
        numbers = torch.Generator().manual_seed(0)
        return self.layer(torch.randn(2, 2000, 8, generator=numbers) + ids.sum())


def test_long_attention_in_a_short_call(monkeypatch):
    """How long attention is says what it is given itself, not the call of its model."""
    monkeypatch.setenv("ATTNPATCH_FREE_MEMORY", "1MB")
    attnpatch.register(Eager)
    model, ids = Longer(), torch.ones(1, 1)
    native = model(ids)
    with attnpatch.patched(model):
        assert torch.equal(model(ids), native)
        assert attnpatch.report(model).totals["by_rows"] == 1


@pytest.mark.parametrize("field", ["min_free", "workspace", "max_allocation"])
@pytest.mark.parametrize("text", ["2", "1KB", "9.9 kB", "9999"])
def test_sizes_that_nobody_can_mean(field, text):
    with pytest.raises(
        errors.PolicyError, match=f"{field}={text!r} is only .*, too little to be meant; give a size with"
    ):
        Policy(**{field: text})
    assert Policy(**{field: 2**12}) and Policy(**{field: "10kB"})
