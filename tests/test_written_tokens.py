"""Tokens that a model writes over others, between its attention modules, and tokens that it writes back where they were.

The oracle is autograd, on the change alone: whether each position of its result depends on its own token, and if not,
on which others.
"""

import warnings

import pytest
import torch
from test_known_facts import captured, tokens
from test_moved_tokens import InARow, Model, MovedInside, SelfAttention, is_mapped
from torch import nn
from torch.nn import functional as F

torch.manual_seed(4)
PROJECT = nn.Linear(32, 32)
HERE, THERE = torch.tensor([3, 4, 9]), torch.tensor([10, 2, 20])
SOME = torch.zeros(24, dtype=torch.bool).index_fill(0, HERE, True)
OTHERS = torch.zeros(24, dtype=torch.bool).index_fill(0, torch.tensor([5, 11, 21]), True)
BOTH = SOME.expand(2, 24)
BIAS = nn.Parameter(torch.randn(32))


def index(places):
    return places[None, :, None].expand(2, 3, 32)


def written(x, place, value):
    y = x.clone()
    y[place] = value
    return y


def added(x, place, value):
    y = x.clone()
    y[place] += value
    return y


def through_a_view(x, change):
    y = x.clone()
    change(y.view(48, 32))
    return y


ALL = slice(None)
ELSEWHERE = {
    "at an index": lambda x: written(x, (ALL, HERE), x[:, THERE]),
    "at an index, a list": lambda x: written(x, (ALL, [3, 4]), x[:, [4, 3]]),
    "at an index, changed": lambda x: written(x, (ALL, HERE), PROJECT(x[:, THERE]).relu()),
    "at an index, selected": lambda x: written(x, (ALL, HERE), x.index_select(1, THERE)),
    "at an index, gathered": lambda x: written(x, (ALL, HERE), x.gather(1, index(THERE))),
    "at an index, a slice": lambda x: written(x, (ALL, HERE), x[:, 5:8]),
    "at an index, one": lambda x: written(x, (ALL, HERE), x[:, 5:6]),
    "at an index, their mean": lambda x: written(x, (ALL, HERE), x.mean(1, keepdim=True)),
    "at an index, of the text before": lambda x: written(PROJECT(x), (ALL, HERE), x[:, THERE]),
    "at an index of sequences": lambda x: written(x, ([0, 1, 1], HERE), x[[1, 0, 0], HERE]),
    "at a mask": lambda x: written(x, BOTH, x[OTHERS.expand(2, 24)]),
    "at a mask, changed": lambda x: written(x, BOTH, PROJECT(x[OTHERS.expand(2, 24)])),
    "a slice, changed": lambda x: written(x, (ALL, slice(3, 6)), PROJECT(x[:, 10:13])),
    "a slice, split": lambda x: written(x, (ALL, slice(0, 8)), PROJECT(x.split(8, 1)[1])),
    "a slice, narrowed": lambda x: written(x, (ALL, slice(0, 8)), PROJECT(x.narrow(1, 8, 8))),
    "one, changed": lambda x: written(x, (ALL, 3), PROJECT(x[:, 5])),
    "one of a sequence, changed": lambda x: written(x, (0, 3), PROJECT(x[1, 3])),
    "into a part of a part": lambda x: (y := x.clone(), y[:, 4:9].copy_(PROJECT(x[:, 5:10])))[0],
    "at an index of a part": lambda x: (y := x.clone(), y[:, 4:14].index_copy_(1, HERE - 2, x[:, HERE]))[0],
    "index_copy": lambda x: x.index_copy(1, HERE, x[:, THERE]),
    "index_copy_": lambda x: x.clone().index_copy_(1, HERE, x[:, THERE]),
    "index_put": lambda x: x.index_put((torch.tensor([[0], [1]]), HERE[None]), x[:, THERE]),
    "scatter": lambda x: x.scatter(1, index(HERE), x[:, THERE]),
    "scatter_": lambda x: x.clone().scatter_(1, index(HERE), x[:, THERE]),
    "masked_scatter": lambda x: x.masked_scatter(BOTH[..., None], x[OTHERS.expand(2, 24)]),
    "masked_scatter, whole": lambda x: x.masked_scatter(BOTH[..., None].expand_as(x), PROJECT(x)),
    "masked_scatter, by keyword": lambda x: x.masked_scatter(mask=BOTH[..., None], source=x[:, THERE]),
    "by keyword": lambda x: torch.index_copy(input=x, dim=1, index=HERE, source=x[:, THERE]),
    "slice_scatter": lambda x: torch.slice_scatter(x, PROJECT(x[:, 5:8]), 1, 0, 3),
    "select_scatter": lambda x: torch.select_scatter(x, PROJECT(x[:, 5]), 1, 3),
    "where, one": lambda x: torch.where(SOME[:, None], x[:, 5:6], x),
    "where, one changed": lambda x: torch.where(~SOME[:, None], x, PROJECT(x[:, 5:6])),
    "where, another sequence": lambda x: torch.where(SOME[:, None], x[1:], x),
    "where, moved": lambda x: torch.where(SOME[:, None], x.roll(1, 1), x),
    "where, those before": lambda x: torch.where(SOME[:, None], F.pad(x, (0, 0, 1, 0))[:, :24], x),
    "lerp, one": lambda x: torch.lerp(x, x[:, 5:6], SOME[:, None].float()),
    "in numbers": lambda x: x * ~SOME[:, None] + x[:, 5:6] * SOME[:, None],
    "in numbers, a mean": lambda x: x * ~SOME[:, None] + SOME[:, None] * x[:, 5:9].mean(1, keepdim=True),
    "added where nothing is": lambda x: (x * ~SOME[:, None]).index_add(1, HERE, x[:, THERE]),
    "scattered where nothing is": lambda x: (x * ~SOME[:, None]).scatter_add(1, index(HERE), x[:, THERE]),
    "put where nothing is": lambda x: (x * ~SOME[:, None]).index_put(
        (torch.tensor([[0], [1]]), HERE[None]), x[:, THERE], accumulate=True
    ),
    "of a flipped text": lambda x: written(x, (ALL, HERE), x.flip(1)[:, HERE]),
    "of a text by columns": lambda x: written(
        x, (ALL, HERE), x.unflatten(1, (4, 6)).transpose(1, 2).flatten(1, 2)[:, HERE]
    ),
    "hidden, and others": lambda x: written(x, (ALL, HERE), x[:, HERE] * 0.0 * BIAS + x[:, THERE]),
    "a running sum of some": lambda x: (x * SOME[:, None]).cumsum(1),
    "a running maximum": lambda x: x.cummax(1).values,
    "joined, changed": lambda x: torch.cat([x[:, :3], PROJECT(x[:, 2:5]), x[:, 6:]], 1),
    "joined, one changed": lambda x: torch.cat([PROJECT(x[:, 5:6]), x[:, 1:]], 1),
    "joined, one by its number": lambda x: torch.cat([x[:, 5].unsqueeze(1), x[:, 1:]], 1),
    "joined, without two": lambda x: torch.cat([x[:, :3], x[:, 5:], BIAS.expand(2, 2, 32)], 1),
    "joined, without two, changed": lambda x: torch.cat(
        [PROJECT(x[:, :3]), PROJECT(x[:, 5:]), BIAS.expand(2, 2, 32)], 1
    ),
    "joined, picked": lambda x: torch.cat([x[:, THERE], x[:, 3:]], 1),
    "through a view": lambda x: through_a_view(x, lambda y: y.__setitem__(HERE, y[THERE])),
}
BACK = {
    "at an index": lambda x: written(x, (ALL, HERE), x[:, HERE]),
    "at an index, changed": lambda x: written(x, (ALL, HERE), PROJECT(x[:, HERE]).relu()),
    "at an index, added": lambda x: added(x, (ALL, HERE), BIAS),
    "at an index, other tokens added": lambda x: added(x, (ALL, HERE), x[:, THERE]),
    "at an index, selected": lambda x: written(x, (ALL, HERE), x.index_select(1, HERE) * 2),
    "at an index, gathered": lambda x: written(x, (ALL, HERE), x.gather(1, index(HERE)) * 2),
    "at a mask, changed": lambda x: written(x, BOTH, PROJECT(x[BOTH])),
    "at a mask of flat tokens": lambda x: through_a_view(
        x, lambda y: y.__setitem__(BOTH.flatten(), PROJECT(y[BOTH.flatten()]))
    ),
    "a slice, changed": lambda x: written(x, (ALL, slice(3, 6)), PROJECT(x[:, 3:6])),
    "a slice, split": lambda x: written(x, (ALL, slice(8, 16)), PROJECT(x.split(8, 1)[1])),
    "one, changed": lambda x: written(x, (ALL, 3), PROJECT(x[:, 3])),
    "into a part of a part": lambda x: (y := x.clone(), y[:, 4:9].copy_(PROJECT(x[:, 4:9])))[0],
    "channels, changed": lambda x: written(x, (..., slice(0, 16)), x[..., 16:] * 2),
    "sorted and back": lambda x: written(
        x, (ALL, THERE), x[:, THERE.sort().values][:, THERE.sort().indices.argsort()]
    ),
    "index_copy": lambda x: x.index_copy(1, HERE, PROJECT(x[:, HERE])),
    "index_put": lambda x: x.index_put((torch.tensor([[0], [1]]), HERE[None]), x[:, HERE] * 2),
    "scatter": lambda x: x.scatter(1, index(HERE), PROJECT(x[:, HERE])),
    "masked_scatter": lambda x: x.masked_scatter(BOTH[..., None], PROJECT(x[BOTH])),
    "index_add": lambda x: x.index_add(1, HERE, x[:, THERE]),
    "where": lambda x: torch.where(SOME[:, None], PROJECT(x), x),
    "where, a learned one": lambda x: torch.where(SOME[:, None], BIAS, x),
    "in numbers": lambda x: x * ~SOME[:, None] + PROJECT(x) * SOME[:, None],
    "joined, changed": lambda x: torch.cat([x[:, :3], PROJECT(x[:, 3:6]), x[:, 6:]], 1),
    "joined, a learned one": lambda x: torch.cat([BIAS.expand(2, 1, 32), x[:, 1:]], 1),
    "a mean added": lambda x: x + x.mean(1, keepdim=True) * SOME[:, None],
}


def keeps(change):
    """True if each position of the result depends on its own token."""
    x = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with torch.enable_grad():
        y = change(x) * torch.linspace(1, 2, 32)
        for place in [(b, n) for b in range(2) for n in range(24)]:
            (found,) = torch.autograd.grad(y[place].sum(), x, retain_graph=True)
            if not found[place].any() and found.any():
                return False
    return True


@pytest.mark.parametrize("name", ELSEWHERE)
def test_tokens_that_are_written_over_others(name):
    change = ELSEWHERE[name]
    assert not keeps(change) or "mean" in name or name == "at an index, one"
    model, ids = Model(change).eval(), torch.cat([tokens(24), tokens(24, 2)])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        maps = captured(model, lambda: model(ids))
    assert sorted(maps.left_out) == ["layers.0", "layers.1"], maps.left_out
    assert not any("failed" in why or "no softmax" in why for why in maps.left_out.values()), maps.left_out


class Pooled(Model):
    """A model whose own code names a softmax and a product, so that its first call is that of a candidate."""

    def forward(self, ids):
        hidden = super().forward(ids)
        return (hidden @ hidden.mT).softmax(-1) @ hidden if self.training else hidden


@pytest.mark.parametrize("name", ELSEWHERE)
@torch.no_grad()
def test_the_first_call_of_a_model_that_may_be_attention_itself(name):
    model = Pooled(ELSEWHERE[name]).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maps = captured(model, lambda: model(torch.cat([tokens(24), tokens(24, 2)])))
    assert {"layers.0", "layers.1"} <= maps.left_out.keys(), maps.left_out


@pytest.mark.parametrize("name", ELSEWHERE)
@torch.no_grad()
def test_tokens_that_a_module_writes_over_others(name):
    model = Model().eval()
    model.layers[1] = MovedInside(ELSEWHERE[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maps = captured(model, lambda: model(torch.cat([tokens(24), tokens(24, 2)])))
    assert list(maps.left_out) == ["layers.1"]


@pytest.mark.parametrize("name", BACK)
@torch.no_grad()
def test_tokens_that_are_written_where_they_were(name):
    assert keeps(BACK[name])
    is_mapped(Model(BACK[name]).eval(), torch.cat([tokens(24), tokens(24, 2)]))


class WithPicture(Model):
    """Features of a picture are written over their placeholders, as vision-language models do."""

    def __init__(self, write):
        super().__init__()
        self.write, self.patches = write, nn.Linear(12, 32)

    def forward(self, ids, pixels):
        x = self.write(self.embed(ids), self.patches(pixels))
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return x


OVER_PLACEHOLDERS = {
    "masked_scatter": lambda x, p: x.masked_scatter(BOTH[..., None].expand_as(x), p),
    "at a mask": lambda x, p: written(x, BOTH, p.flatten(0, 1)),
    "at an index": lambda x, p: written(x, (ALL, HERE), p),
    "at an index, backwards": lambda x, p: written(x, (ALL, HERE), p.flip(1)),
    "a slice": lambda x, p: written(x, (ALL, slice(2, 5)), p),
    "where": lambda x, p: torch.where(BOTH[..., None], p[:, :1], x),
    "added to": lambda x, p: written(x, BOTH, x[BOTH] + p.flatten(0, 1)),
}


class Resampler(nn.Module):
    """Learned queries look at patches."""

    def __init__(self):
        super().__init__()
        self.queries, self.attention = nn.Parameter(torch.randn(3, 32)), Looks()

    def forward(self, patches):
        return self.attention(self.queries.expand(2, 3, 32), patches)


class Looks(nn.Module):
    def forward(self, x, others):
        return F.scaled_dot_product_attention(x, others, others)


@torch.no_grad()
def test_features_of_learned_queries_that_are_written_over_placeholders():
    model = WithPicture(lambda x, p: x.masked_scatter(BOTH[..., None], p)).eval()
    model.patches = nn.Sequential(model.patches, Resampler())
    maps = captured(model, lambda: model(torch.cat([tokens(24), tokens(24, 2)]), torch.randn(2, 5, 12)))
    assert not maps.left_out and maps["layers.*"].layers == (0, 1)


@pytest.mark.parametrize("write", OVER_PLACEHOLDERS.values(), ids=OVER_PLACEHOLDERS)
@torch.no_grad()
def test_features_that_are_written_over_their_placeholders(write):
    model, ids, pixels = (
        WithPicture(write).eval(),
        torch.cat([tokens(24), tokens(24, 2)]),
        torch.randn(2, 3, 12),
    )
    assert not captured(model, lambda: model(ids, pixels)).left_out


class MovesAfter(SelfAttention):
    """A module with its own residual, which returns its tokens in another order."""

    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, x):
        return self.out(x, super().forward(x))


RETURNED = {
    "backwards": lambda x, a: (x + a).flip(1),
    "shifted": lambda x, a: (x + a).roll(3, 1),
    "picked": lambda x, a: (x + a)[:, torch.arange(23, -1, -1)],
    "attention alone, backwards": lambda x, a: a.flip(1),
    "the batch in another order": lambda x, a: (x + a).flip(0),
}


@pytest.mark.parametrize("name", [*RETURNED, "in order"])
@torch.no_grad()
def test_tokens_that_a_module_returns_in_another_order(name):
    model = InARow().eval()
    model.layers[0] = MovesAfter(RETURNED.get(name, lambda x, a: x + a))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maps = captured(model, lambda: model(torch.cat([tokens(24), tokens(24, 2)])))
    assert list(maps.left_out) == (["layers.1"] if name in RETURNED else [])
