"""What goes from one attention module to another, out of one, or on and on inside one."""

import collections
import dataclasses

import pytest
import torch
import zoo
from torch import nn
from transformers.utils import ModelOutput

import attnpatch

X = zoo.floats(2, 24, 16)


class GivesItsBiasOn(nn.Module):
    """As WavLM does it: the first layer makes a bias of scores, and each hands it on."""

    def __init__(self, join):
        super().__init__()
        self.join = join

    def forward(self, x, bias):
        if bias is None:
            bias = torch.exp(-(x @ x.mT).square())
        return self.join(bias, x).softmax(-1) @ x, bias


class Layers(nn.Module):
    def __init__(self, join):
        super().__init__()
        self.attention = nn.ModuleList(GivesItsBiasOn(join) for _ in range(3))

    def forward(self, x):
        bias = None
        for layer in self.attention:
            x, bias = layer(x, bias)
        return x


JOINS = {
    "baddbmm": lambda bias, x: torch.baddbmm(bias, x, x.mT),
    "bias first": lambda bias, x: bias + x @ x.mT,
    "scores first": lambda bias, x: x @ x.mT + bias,
    "in place": lambda bias, x: (x @ x.mT).add_(bias),
    "scaled": lambda bias, x: bias * (x @ x.mT),
}


@pytest.mark.parametrize("join", JOINS.values(), ids=JOINS)
def test_attention_is_counted_and_mapped_where_it_is(join):
    """Not at the layer that the bias came from."""
    model = Layers(join)
    native = model(X)
    with attnpatch.patched(model, mode="always", rows=7):
        assert torch.equal(model(X), native)
        assert [site.counts["by_rows"] for site in attnpatch.report(model).sites] == [1, 1, 1]
    with attnpatch.capture(model, blocks=attnpatch.Blocks.fixed(8)) as maps:
        model(X)
    bias, x = None, X
    for layer, attention in enumerate(model.attention):
        if bias is None:
            bias = torch.exp(-(x @ x.mT).square())
        weights = join(bias.clone(), x).softmax(-1).double()
        expected = weights.view(2, 3, 8, 3, 8).sum(-1).mean(2)
        got = torch.as_tensor(maps.block_map.to_numpy()[:, layer]).double()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        x, bias = attention(x, bias)


@dataclasses.dataclass
class Output(ModelOutput):
    places: torch.Tensor | None = None
    other: str | None = None


Pair = collections.namedtuple("Pair", "places other")
KINDS = {
    "ModelOutput": lambda places: Output(places=places, other="kept"),
    "OrderedDict": lambda places: collections.OrderedDict(places=places, other="kept"),
    "dict": lambda places: {"places": places, "other": "kept"},
    "namedtuple": lambda places: Pair(places, "kept"),
    "tuple": lambda places: (places, "kept"),
}


@pytest.mark.parametrize("is_deferred", [True, False])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_outputs_keep_their_class(kind, is_deferred):
    """Also where something in them is computed: a soft argmax has no keys."""

    class Attention(nn.Module):
        def forward(self, x):
            weights = (x @ x.mT).softmax(-1)
            if not is_deferred:
                return kind(x.sum(-1))
            return kind((weights * torch.arange(24.0)).sum(-1))

    model = Attention()
    native = model(X)
    attnpatch.apply(model, mode="always", rows=7)
    got = model(X)
    assert type(got) is type(native)
    for name in ("places", "other"):
        if hasattr(native, name):
            assert (
                torch.equal(getattr(got, name) * 1, native.places)
                if name == "places"
                else got.other == "kept"
            )
    first = next(iter(got.values())) if isinstance(got, dict) else got[0]
    assert torch.equal(first * 1, next(iter(native.values())) if isinstance(native, dict) else native[0])


@dataclasses.dataclass(frozen=True)
class Frozen:
    places: torch.Tensor
    other: str


class ManyRounds(nn.Module):
    """As Reformer does it: what is attended to is weighted by a figure of each row, the logsumexp of its scores."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x, is_hashed):
        scores = x @ x.mT
        figures, values = scores.logsumexp(-1), scores.softmax(-1) @ x
        if is_hashed:
            order = torch.arange(24).flip(0).expand(2, 24)
            figures, values = figures.gather(1, order), values.flip(1)
        return self.kind(values * figures.unsqueeze(-1))


class AroundAttention(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.attention = ManyRounds(kind)

    def forward(self, x, is_hashed):
        return self.attention(x, is_hashed)


@pytest.mark.parametrize("is_hashed", [False, True], ids=["", "hashed"])
@pytest.mark.parametrize("around", [ManyRounds, AroundAttention])
@pytest.mark.parametrize(
    "kind", [*KINDS.values(), lambda places: Frozen(places, "kept")], ids=[*KINDS, "dataclass"]
)
def test_what_is_no_matrix_is_computed_in_any_container(kind, around, is_hashed):
    """Also where the call has attended by rows before; deferred it would make the rest of the model deferred."""
    model = around(kind)
    sites = [module for module in ("", "attention") if module == "" or around is AroundAttention]
    x = X.clone()
    native = model(x, is_hashed)
    with attnpatch.patched(model, mode="always", rows=7, sites=sites):
        got = model(x, is_hashed)
        assert attnpatch.report(model).totals["by_rows"] == 1
    x.zero_()
    assert type(got) is type(native)
    places, expected = (
        each[0] if isinstance(each, tuple) else getattr(each, "places", None) for each in (got, native)
    )
    if isinstance(got, dict):
        places, expected = got["places"], native["places"]
    assert type(places) is torch.Tensor
    assert torch.equal(places, expected)


def test_what_each_key_receives_is_not_computed_unasked():
    """It needs all rows at once."""

    class Attention(nn.Module):
        def forward(self, x):
            weights = (x @ x.mT).softmax(-1)
            return weights @ x, weights.sum(-2)

    model = Attention()
    native = model(X)
    attnpatch.apply(model, mode="always", rows=7)
    got = model(X)
    assert attnpatch.report(model).totals["largest"] < 24 * 24 * 4
    assert all(torch.equal(one * 1, other) for one, other in zip(got, native, strict=True))


REPEATS = {
    "repeat": lambda t: t.permute(2, 0, 1).unsqueeze(0).repeat(2, 1, 1, 1).view(-1, 2, 24),
    "repeat of a transposed": lambda t: t.mT.repeat(2, 1, 1).view(96, 24),
    "tile": lambda t: t.mT.tile(2, 1, 1).view(96, 24),
    "repeat_interleave": lambda t: t.mT.repeat_interleave(2, 0).view(4, -1),
    "repeat by one": lambda t: t.mT.repeat(1, 1, 1).view(48, 24),
}


@pytest.mark.parametrize("way", REPEATS.values(), ids=REPEATS)
def test_what_is_repeated_lies_as_a_copy(way):
    class Attention(nn.Module):
        def forward(self, x):
            scores = x @ x.mT
            found = way(scores)
            self.seen = found.stride(), found * 2, found.sum(-1)
            return scores.softmax(-1) @ x

    model = Attention()
    model(X)
    stride, doubled, sums = model.seen
    attnpatch.apply(model, mode="always", rows=7)
    model(X)
    assert model.seen[0] == stride and torch.equal(model.seen[1] * 1, doubled)
    # Sums over queries are added step by step: another order than the native one.
    assert torch.allclose(model.seen[2] * 1, sums, rtol=1e-5, atol=1e-5)
    assert not attnpatch.report(model).totals["failed"]


@pytest.mark.parametrize("is_training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("steps", [20, 300])
def test_an_iteration_on_scores(steps, is_training):
    """Sinkhorn's normalisation of rows and columns by turns, longer than Python's stack is deep."""

    class Attention(nn.Module):
        def forward(self, x):
            scores = x @ x.mT
            for _ in range(steps):
                scores = scores - scores.logsumexp(-1, keepdim=True)
                scores = scores * 0.999
            return scores.exp() @ x

    model, found = Attention(), []
    for mode in ("never", "always"):
        x = X.clone().requires_grad_(is_training)
        with attnpatch.patched(model, mode=mode, rows=7):
            result = model(x)
            if is_training:
                result.square().sum().backward()
            found.append((result.detach(), x.grad))
            totals = attnpatch.report(model).totals
    assert torch.equal(found[0][0], found[1][0]) and not totals["failed"]
    assert bool(totals["materialised"]) == (steps > 100)
    if is_training:
        torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-5)
