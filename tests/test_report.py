"""What ``report`` says: each call once, why it stayed native, whose line made a matrix whole, and how large it got."""

import pathlib

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

import attnpatch

HERE = pathlib.Path(__file__).name
TOKENS = 300


class Attention(nn.Module):
    def forward(self, x, read=None):
        scores = x @ x.transpose(-1, -2)
        if read is not None:
            read(scores)
        return scores.softmax(-1) @ x


class FusedAttention(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x[None], x[None], x[None])[0]


class OutsideAttention(nn.Module):
    """No function of torch that anybody can see."""

    def forward(self, x):
        return torch.from_numpy(x.numpy() * 2.0)


class WrappedAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.second = Attention(), FusedAttention()

    def forward(self, x):
        return self.second(self.inner(x))


def x(tokens: int = TOKENS, batch: int = 1) -> torch.Tensor:
    return zoo.floats(batch, tokens, 16)


def report(model, *args, free=None, monkeypatch=None, calls=1, **policy):
    if free is not None:
        monkeypatch.setenv("ATTNPATCH_FREE_MEMORY", free)
    with torch.no_grad(), attnpatch.patched(model, **policy):
        for _ in range(calls):
            model(*args)
        return attnpatch.report(model)


SCORES = TOKENS * TOKENS * 4


@pytest.mark.parametrize(
    ("model", "policy", "reason"),
    [
        (Attention, {}, "short call: 300 rows, by rows only above 1024"),
        (Attention, {"mode": "never"}, "mode is 'never'"),
        (Attention, {"min_tokens": 16}, "enough memory: 14 GB free, 1.08 MB needed"),
        (FusedAttention, {"min_tokens": 16}, "fused kernel: nothing to save"),
        (OutsideAttention, {"min_tokens": 16}, "a kernel outside torch"),
        (OutsideAttention, {"mode": "always"}, "a kernel outside torch"),
        (Attention, {"mode": "always"}, None),
    ],
)
def test_why_native(model, policy, reason, monkeypatch):
    """The rule and its numbers; nothing where nothing stayed native."""
    said = report(model(), x(), free="14GB", monkeypatch=monkeypatch, calls=3, **policy)
    (site,) = said.sites
    if reason is None:
        assert site.native_because == {} and "native because" not in str(said)
        return
    ((words, count),) = site.native_because.items()
    assert reason in words and count == 3, said
    assert reason in str(said)
    assert sum(said.totals[name] for name in ("native", "fused")) == 3


def test_a_batch_of_short_sequences_is_short():
    """Its 1,200 rows in all do not make one of its calls longer."""
    (site,) = report(Attention(), torch.cat([x()] * 4)).sites
    assert site.native_because == {"short call: 300 rows, by rows only above 1024": 1}


def test_the_largest_call_and_the_most_frequent_rule_are_shown(monkeypatch):
    """A prompt for which there was memory, and the steps of a generation after it."""
    monkeypatch.setenv("ATTNPATCH_FREE_MEMORY", "14GB")
    model = Attention()
    with attnpatch.patched(model, min_tokens=16):
        for tokens in (100, 300, 200, 1, 2, 1, 1):
            model(x(tokens))
        (site,) = attnpatch.report(model).sites
    assert site.native_because == {
        "short call: 2 rows, by rows only above 16": 4,
        "enough memory: 14 GB free, 1.08 MB needed": 3,
    }
    assert site.counts["native"] == 7


@pytest.mark.parametrize("policy", [{}, {"min_tokens": 16}, {"mode": "never"}, {"mode": "always"}])
def test_calls_count_once(policy):
    """However many attention modules are around the one that computes."""
    model = nn.Sequential(WrappedAttention(), WrappedAttention())
    said = report(model, x(), calls=2, **policy)
    assert {site.name for site in said.sites} == {f"{i}.{name}" for i in "01" for name in ("inner", "second")}
    assert sum(said.totals[name] for name in ("native", "by_rows", "fused")) == 8, said


def test_blocks_of_diffusers_count_once():
    """UNets name their blocks after the attention inside."""
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=8, attention_head_dim=8,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32,
    )  # fmt: skip
    inputs = torch.randn(1, 4, 8, 8), 1, torch.randn(1, 7, 32)
    # One in the block on the way down, two on the way up, one in the middle; each attends to itself and to the text.
    for policy in ({}, {"min_tokens": 2}, {"mode": "always"}, {"mode": "never"}):
        said = report(unet, *inputs, **policy)
        assert sum(said.totals[name] for name in ("native", "by_rows", "fused")) == 8, said
        assert not any(site.name in ("mid_block", "down_blocks.0", "up_blocks.1") for site in said.sites)


def norm(scores):
    return torch.linalg.matrix_norm(scores)


def through_numpy(scores):
    return scores.numpy()


@pytest.mark.parametrize("read", [norm, through_numpy])
def test_whose_line_made_it_whole(read):
    """The line in this file, however deep in torch the request came from; counted once, as it is kept."""
    said = report(Attention(), x(), lambda scores: [read(scores), read(scores)], mode="always")
    (site,) = said.sites
    ((name, count),) = site.materialised_by.items()
    line = read.__code__.co_firstlineno + 1
    assert name.endswith(f"({HERE}:{line})") and count == 1, name
    assert f"{HERE}:{line}" in str(said)
    assert said.totals["largest"] == SCORES


def test_a_line_outside_the_module():
    """Weights that a module hands out are computed where somebody reads them."""

    class Giving(nn.Module):
        def forward(self, x):
            weights = (x @ x.transpose(-1, -2)).softmax(-1)
            return weights @ x, weights

    model = Giving()
    with torch.no_grad(), attnpatch.patched(model, mode="always"):
        _, weights = model(x())
        assert attnpatch.report(model).totals["largest"] < SCORES
        weights.tolist()
        line = test_a_line_outside_the_module.__code__.co_firstlineno + 12
        ((name, _),) = attnpatch.report(model).sites[0].materialised_by.items()
        assert name.endswith(f"({HERE}:{line})"), name


@pytest.mark.parametrize(("rows", "batch"), [(8, 1), (60, 3), (300, 1)])
def test_largest_is_a_step(rows, batch):
    """By rows: as many rows of as many heads as a step has. Natively: all of them."""
    said = report(Attention(), x(batch=batch), mode="always", rows=rows, heads=1)
    heads = min(batch, 2)  # no step has fewer unless there are no more
    assert said.totals["largest"] in {rows * TOKENS * 4 * n for n in (1, heads, heads + 1)}
    assert report(Attention(), x(batch=batch), min_tokens=16).totals["largest"] == batch * SCORES
    assert report(Attention(), x(batch=batch)).totals["largest"] == 0, "nobody watched"


def test_largest_is_no_sum():
    model = nn.Sequential(Attention(), Attention(), Attention())
    said = report(model, x(), mode="always", rows=8)
    assert said.totals["largest"] == max(site.counts["largest"] for site in said.sites) == 8 * TOKENS * 4
    assert "9.6 kB" in str(said).splitlines()[-1]


def test_largest_with_gradients_and_dtypes():
    """A backward pass has steps too; elements have the bytes of their dtype."""
    model = Attention()
    with attnpatch.patched(model, mode="always", rows=16):
        model(x().bfloat16().requires_grad_()).sum().backward()
        assert attnpatch.report(model).totals["largest"] == 16 * TOKENS * 2


def test_dense_attention_of_torch_has_steps_too():
    """Without four dimensions there is no fused kernel; its scores are no step of a recipe."""

    class DenseAttention(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    assert report(DenseAttention(), x(), mode="always", rows=32).totals["largest"] == 32 * TOKENS * 4
    assert report(DenseAttention(), x(), min_tokens=16).totals["largest"] == SCORES


def test_a_fused_kernel_makes_no_scores():
    assert report(FusedAttention(), x(), min_tokens=16).totals["largest"] == 0


def test_an_analysis_counts_for_itself():
    """Also that of a model that was patched before, whose own counts go on."""
    from attnpatch.patching.counters import counted_apart
    from attnpatch.patching.patch import patch_of

    model = attnpatch.apply(Attention(), mode="always", rows=8)
    model(x())
    for _ in range(2):
        with counted_apart(patch_of(model).sites):
            model(x(100))
            totals = attnpatch.report(model).totals
            assert totals["by_rows"] == 1 and totals["largest"] == 8 * 100 * 4
    totals = attnpatch.report(model).totals
    assert totals["by_rows"] == 3 and totals["largest"] == 8 * TOKENS * 4
    attnpatch.remove(model)
