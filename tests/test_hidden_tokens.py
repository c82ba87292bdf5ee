"""A residual in which tokens cannot be seen says nothing of their order, whatever stands in their places since.

The oracle is autograd, on the change alone: whether each position of its result depends on its own token.
"""

import warnings

import pytest
import torch
from test_known_facts import captured, tokens
from test_moved_tokens import ORDER, SQUARE, Model, MovedInside, SelfAttention, is_mapped
from torch import nn
from torch.nn import functional as F

torch.manual_seed(3)
SCALAR, BY_CHANNEL = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(32))
PLACES, BIAS = nn.Parameter(torch.randn(24, 32)), nn.Parameter(torch.randn(32))
PROJECT, NORM = nn.Linear(32, 32), nn.LayerNorm(32)
nn.init.normal_(NORM.bias)
EVERY_OTHER = (torch.arange(24) % 2)[:, None].float()
SWAPPED = torch.eye(2)[[1, 0]]


def gate(x):
    return torch.zeros_like(x)


def all_of(x):
    return torch.ones_like(x, dtype=torch.bool)


def written(x, place, value):
    y = x.clone()
    y[place] = value
    return y


# Nothing is left of tokens, or of some of them; then come learned places, then tokens in another order.
GONE = {
    "a gate of zeros": lambda x: x * gate(x),
    "a learned number": lambda x: x * SCALAR,
    "a number by channel": lambda x: BY_CHANNEL * x,
    "minus itself": lambda x: x - x,
    "masked": lambda x: x.masked_fill(all_of(x), 0),
    "exchanged": lambda x: torch.where(all_of(x), 0.0, x),
    "exchanged for places": lambda x: torch.where(all_of(x), PLACES, x),
    "kept where nothing is": lambda x: x.where(~all_of(x), PLACES),
    "every other one": lambda x: x * EVERY_OTHER,
    "every other one, and a layer": lambda x: PROJECT(x * EVERY_OTHER),
    "every other one, in place": lambda x: x.clone().mul_(EVERY_OTHER),
    "a layer": lambda x: PROJECT(x * SCALAR),
    "a norm": lambda x: NORM(x * SCALAR),
    "a norm times places": lambda x: NORM(x * SCALAR) * PLACES,
    "rounded away": lambda x: x * 1e-20,
    "dropped": lambda x: F.dropout(x, 1.0, True),
    "clamped": lambda x: x.clamp(0, 0),
    "below zero": lambda x: (x - 1e4).relu(),
    "zeroed": lambda x: x.clone().zero_(),
    "filled": lambda x: x.clone().fill_(2),
    "to the power of 0": lambda x: x**0,
    "divided": lambda x: x / torch.full((32,), torch.inf),
    "weights of zeros": lambda x: F.linear(x, torch.zeros(32, 32)),
    "between two": lambda x: torch.lerp(PLACES.expand_as(x), x, 0.0),
    "a part, joined": lambda x: torch.cat([x[:, :12] * SCALAR, x[:, 12:]], 1),
    "a part, exchanged": lambda x: torch.where(EVERY_OTHER == 1, x, x * SCALAR),
    "written over": lambda x: written(x, EVERY_OTHER[:, 0].expand(2, 24) == 0, 0.0),
    "some written over": lambda x: written(x, (slice(None), slice(3, 9)), BIAS),
    "a view of it": lambda x: (y := x.clone(), y[:, :12].mul_(SCALAR))[0],
    "a view of it, zeroed": lambda x: (y := x.clone(), y[:, 3].zero_())[0],
    "filled at an index": lambda x: x.index_fill(1, torch.tensor([0, 4]), 0.0),
    "product and sum": lambda x: torch.addcmul(PLACES.expand_as(x), x, gate(x)),
    "some below zero, and a layer": lambda x: PROJECT((x - 1e4 * EVERY_OTHER).relu()),
    "some below zero, in place": lambda x: PROJECT((x - 1e4 * EVERY_OTHER).relu_()),
    "some clamped, and a layer": lambda x: PROJECT((x + 1e4 * EVERY_OTHER).clamp(max=9)),
    "some clamped in place": lambda x: PROJECT((x + 1e4 * EVERY_OTHER).clamp_max_(9)),
    "some below a threshold": lambda x: PROJECT(F.threshold(x - 1e4 * EVERY_OTHER, -1e3, 7.0)),
    "some below others": lambda x: PROJECT(torch.maximum(x - 1e4 * EVERY_OTHER, BIAS)),
    "by keyword, a gate": lambda x: torch.mul(x, other=gate(x)),
    "by keyword, both factors": lambda x: torch.mul(input=x, other=gate(x)),
    "by keyword, the number 0": lambda x: x.mul(other=0),
    "by keyword, divided": lambda x: torch.div(x, other=torch.full((32,), torch.inf)),
    "by keyword, masked": lambda x: x.masked_fill(mask=all_of(x), value=0),
    "by keyword, exchanged": lambda x: torch.where(all_of(x), input=PLACES.expand_as(x), other=x),
    "by keyword, all exchanged": lambda x: torch.where(
        condition=all_of(x), input=PLACES.expand_as(x), other=x
    ),
    "by keyword, the method": lambda x: x.where(condition=~all_of(x), other=torch.zeros(())),
    "by keyword, written over": lambda x: x.clone().index_put_(
        indices=(EVERY_OTHER[:, 0].expand(2, 24) == 0,), values=torch.zeros(())
    ),
    "by keyword, between two": lambda x: torch.lerp(PLACES.expand_as(x), end=x, weight=0.0),
    "by keyword, product and sum": lambda x: torch.addcmul(PLACES.expand_as(x), tensor1=x, tensor2=gate(x)),
    "by keyword, filled": lambda x: x.index_fill(dim=1, index=torch.tensor([0, 4]), value=0.0),
    "by keyword, dropped": lambda x: F.dropout(x, p=1.0, training=True),
    "by keyword, to the power of 0": lambda x: torch.pow(x, exponent=0),
}
HIDDEN = {name: (lambda x, make=make: make(x) + PLACES + x.flip(1)) for name, make in GONE.items()}
HIDDEN |= {
    "places first": lambda x: PLACES + x * gate(x) + x.flip(1),
    "the moved first": lambda x: x.flip(1) + (x * gate(x) + PLACES),
    "only a bias": lambda x: x * EVERY_OTHER + BIAS + x.flip(1),
    "sums by keyword": lambda x: torch.add(input=(x * gate(x)).add(other=PLACES), other=x.flip(1)),
    "in place": lambda x: (x * gate(x)).add_(PLACES).add_(x.flip(1)),
    "beside them": lambda x: torch.cat([x * gate(x) + PLACES, x.flip(1)], 2) @ torch.ones(64, 32),
    "picked": lambda x: x * SCALAR + PLACES + x[:, ORDER],
    "sequences": lambda x: x * SCALAR + PLACES + x.flip(0),
    "a product along tokens": lambda x: x * SCALAR + SQUARE @ x,
    "that, first": lambda x: SQUARE @ x + x * SCALAR,
    "that, and places": lambda x: x * SCALAR + PLACES + SQUARE @ x,
    "einsum along tokens": lambda x: x * SCALAR + torch.einsum("ij,bjc->bic", SQUARE, x),
    "a layer along tokens": lambda x: x * SCALAR + F.linear(x.mT, SQUARE).mT,
    "a filter along tokens": lambda x: x * SCALAR + F.conv1d(x, SQUARE[..., None]),
    "a product along sequences": lambda x: x * SCALAR + torch.einsum("ab,bnc->anc", SWAPPED, x),
    "times a product": lambda x: (x * SCALAR + 1) * (SQUARE @ x),
    "all tokens in a row": lambda x: torch.cat([x.flatten(0, 1)[1:], x.flatten(0, 1)[:1]]).view_as(x),
    "all in a row, beside nothing": lambda x: x * SCALAR + x.flatten(0, 1).roll(1, 0).view_as(x),
}
INSIDE = {
    "a gate that was moved": lambda x: x.flip(1) * x.mean(2, keepdim=True).relu().sign(),
    "joined with other sequences": lambda x: torch.cat([x[:, :12], x.flip(0)[:, 12:]], 1),
    "another sequence's": lambda x: written(x, 0, x[1]),
    "another token": lambda x: written(x, (slice(None), 3), x[:, 5]),
    "another token, as a slice": lambda x: written(x, (slice(None), slice(3, 4)), x[:, 5:6]),
}


def hides(change):
    """True if some position of the result does not depend on its own token."""
    x = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with torch.enable_grad():
        y = change(x) * torch.linspace(1, 2, 32)
        if not y.requires_grad:
            return True
        for place in [(b, n) for b in range(2) for n in (0, 3, 4, 8, 23)]:
            (found,) = torch.autograd.grad(y[place].sum(), x, retain_graph=True)
            if not found[place].any():
                return True
    return False


def left_out(change, is_inside):
    model, ids = Model(lambda x: x if is_inside else change(x)).eval(), torch.cat([tokens(24), tokens(24, 2)])
    if is_inside:
        model.layers[1] = MovedInside(change)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        maps = captured(model, lambda: model(ids))
    assert not any("no softmax" in why for why in maps.left_out.values()), maps.left_out
    return sorted(maps.left_out)


@pytest.mark.parametrize("name", HIDDEN)
def test_tokens_that_are_hidden_between_modules(name):
    assert hides(HIDDEN[name]) or "rounded" in name
    assert left_out(HIDDEN[name], False) == ["layers.0", "layers.1"]


@pytest.mark.parametrize("name", HIDDEN | INSIDE)
def test_tokens_that_are_hidden_inside_a_module(name):
    change = (HIDDEN | INSIDE)[name]
    assert hides(change) or "rounded" in name
    assert left_out(change, True) == ["layers.1"]


MOVES_INSIDE = {
    "backwards": lambda x: x + x.flip(1),
    "in place": lambda x: x.flip(1).add_(x),
    "beside them": lambda x: torch.cat([x, x.flip(1)], 2) @ torch.ones(64, 32),
    "along tokens": lambda x: SQUARE @ x + x,
}


@pytest.mark.parametrize("move", MOVES_INSIDE.values(), ids=MOVES_INSIDE)
@pytest.mark.parametrize("name", GONE)
def test_tokens_that_are_hidden_before_a_module_and_moved_inside(name, move):
    """The second layer moves tokens; the first one reads them where they are."""
    hide = GONE[name]
    assert (
        hides(lambda x: move(hide(x) + PLACES)) or "rounded" in name or move is not MOVES_INSIDE["backwards"]
    )
    model, ids = Model(lambda x: hide(x) + PLACES).eval(), torch.cat([tokens(24), tokens(24, 2)])
    model.layers[1] = MovedInside(move)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        maps = captured(model, lambda: model(ids))
    assert sorted(maps.left_out) == ["layers.1"], maps.left_out


class TwoInputs(SelfAttention):
    """A module that adds two tensors that it is given."""

    def forward(self, x, other):
        return super().forward(x + other)


class GivesTwo(Model):
    def __init__(self, give):
        super().__init__()
        self.give, self.layers = give, nn.ModuleList([TwoInputs()])

    def forward(self, ids):
        return self.layers[0](*self.give(self.norm(self.embed(ids))))


@pytest.mark.parametrize("is_first", [True, False], ids=["hidden first", "moved first"])
@pytest.mark.parametrize("name", ["a gate of zeros", "every other one", "a layer", "dropped"])
def test_hidden_and_moved_tokens_that_a_module_adds(name, is_first):
    model = GivesTwo(lambda x: (GONE[name](x) + PLACES, x.flip(1))[:: 1 if is_first else -1]).eval()
    ids = torch.cat([tokens(24), tokens(24, 2)])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        assert sorted(captured(model, lambda: model(ids)).left_out) == ["layers.0"]


@pytest.mark.parametrize("is_first", [True, False], ids=["in order first", "moved first"])
def test_moved_tokens_that_a_module_adds_to_tokens_in_order(is_first):
    model = GivesTwo(lambda x: (x + PLACES, x.flip(1))[:: 1 if is_first else -1]).eval()
    ids = torch.cat([tokens(24), tokens(24, 2)])
    with torch.no_grad():
        assert not captured(model, lambda: model(ids)).left_out


VISIBLE = {
    "a branch of zeros": lambda x: x + BY_CHANNEL * PROJECT(x.flip(1)),
    "places": lambda x: x + PLACES + x.flip(1),
    "scaled": lambda x: F.rms_norm(x, (32,)) * BIAS + PLACES + x.flip(1),
    "hidden, and there again": lambda x: x * EVERY_OTHER + x + x.flip(1),
    "the residual last": lambda x: SQUARE @ x + x,
    "a product beside it": lambda x: x + SQUARE @ x,
    "hidden, nothing moved": lambda x: x * EVERY_OTHER + PLACES,
    "a token of its own": lambda x: written(x, (slice(None), 0), BIAS),
    "its own token": lambda x: written(x, (slice(None), 3), x[:, 3]),
}


@pytest.mark.parametrize("is_inside", [False, True], ids=["between", "inside"])
@pytest.mark.parametrize("name", VISIBLE)
@torch.no_grad()
def test_tokens_that_can_be_seen_are_mapped(name, is_inside):
    change = VISIBLE[name]
    model = Model((lambda x: x) if is_inside else change).eval()
    if is_inside:
        for i in range(2):
            model.layers[i] = MovedInside(change)
    is_mapped(model, torch.cat([tokens(24), tokens(24, 2)]))


class Placed(Model):
    """Padding is a vector of zeros, or all tokens are equal, before places are added, as in many models."""

    def forward(self, ids):
        x = self.embed(ids) + PLACES
        for layer in self.layers:
            x = x + SQUARE @ x
            x = x + layer(self.norm(x))
        return x


@pytest.mark.parametrize(
    "ids", [torch.ones(2, 24, dtype=torch.long), tokens(24).repeat(2, 1)], ids=["equal", "padded"]
)
@torch.no_grad()
def test_embeddings_that_are_zero_or_equal_are_tokens(ids):
    model = Placed().eval()
    model.embed.weight[ids[0, 3]] *= 1.0 if ids[0].eq(1).all() else 0.0
    assert not captured(model, lambda: model(ids)).left_out
