"""Padding that no argument names: hand-written attention says it, however it hides keys."""

import pytest
import torch
from test_known_facts import captured, cuts, reduced, same, tokens
from torch import nn

import attnpatch

REAL = torch.ones(2, 24, dtype=torch.long)
REAL[0, :6] = 0
PLACES = [range(6, 24), range(24)]

LATER = torch.ones(24, 24, dtype=torch.bool).triu(1)

# How the scores of heads 8 wide become weights.
WAYS = {
    "filled before softmax": lambda s, m: (s / 8**0.5).masked_fill(m == 0, -1e9).softmax(-1),
    "added before the scale": lambda s, m: ((s - 1e4 * (1 - m)) / 8**0.5).softmax(-1),
    "a number that is not so low": lambda s, m: (s / 8**0.5 - 1e3 * (1 - m)).softmax(-1),
    "softmax, then the mask": lambda s, m: nn.functional.normalize((s / 8**0.5).softmax(-1) * m, p=1, dim=-1),
    "the same, divided by the sum": lambda s, m: divided((s / 8**0.5).softmax(-1) * m),
    "a softmax of one's own": lambda s, m: divided((s / 8**0.5).exp() * m),
    "that, with a number": lambda s, m: divided((s / 8**0.5 - 1e4 * (1 - m)).exp()),
    "beside a bias that is low everywhere": lambda s, m: (
        (s / 8**0.5 - 2e3).masked_fill(m == 0, -1e9).softmax(-1)
    ),
    # ALiBi as MPT has it: 0 at the last key, and lower with each before it, for all rows.
    "beside a bias by distance": lambda s, m: (
        (s / 8**0.5 + 60.0 * torch.arange(-23, 1)).masked_fill((m == 0) | LATER, -1e9).softmax(-1)
    ),
}


def divided(weights):
    return weights / weights.sum(-1, keepdim=True)


class SelfAttention(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way, self.project, self.kept = way, nn.Linear(32, 96), None

    def weights(self, x, real):
        q, k, v = self.project(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return WAYS[self.way](q @ k.mT, real[:, None, None, :].float()), v

    def forward(self, x, real):
        weights, v = self.weights(x, real)
        return (weights @ v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer = nn.Embedding(97, 32), SelfAttention(way)

    def forward(self, ids, real):
        return self.layer(self.embed(ids), real)


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_padding_that_no_argument_names(way):
    model, ids = Model(way).eval(), tokens(24).repeat(2, 1)
    with attnpatch.patched(model, sites=["layer"], mode="never"):
        found = captured(model, lambda: model(ids, REAL)).block_map
    weights, _ = model.layer.weights(model.embed(ids), REAL)
    for b, real in enumerate(PLACES):
        own = weights[b][:, list(real)][:, :, list(real)]
        same(found.mass[b, 0], reduced(own, cuts(len(real)), cuts(len(real))))
    assert "notes" not in found.metadata
