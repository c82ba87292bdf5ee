"""Scores and outputs that a host writes to in place, in training: einsum's are views of its product, and may be written to."""

import pytest
import torch
import zoo
from torch import nn

import attnpatch

LENGTH = 12


def _scores(x, where):
    query, key, value = x.unflatten(-1, (3, 4, 4)).unbind(2)
    scores = torch.einsum("blhd,bkhd->blhk", query, key)
    where(scores)
    return torch.einsum("blhk,bkhd->blhd", scores.softmax(-1), value)


def _one_column(scores):
    scores[..., 3] = -1e4


def _diagonal(scores):
    at = torch.arange(LENGTH)
    scores[:, at, :, at] = -1e4


def _output(x):
    query, key, value = x.chunk(3, -1)
    weights = torch.einsum("bid,bjd->bij", query, key).softmax(-1)
    out = torch.einsum("bij,bjd->bid", weights, value)
    out += value
    return out


def _output_transposed(x):
    query, key, value = x.unflatten(-1, (3, 4, 4)).unbind(2)
    weights = torch.einsum("blhd,bkhd->bhlk", query, key).softmax(-1)
    out = torch.einsum("bhlk,bkhd->blhd", weights, value)
    out.mul_(value)
    out[:, 2] = 0.0
    return out


def _first_rows(x):
    """As Longformer writes the rows of global attention over its output."""
    query, key, value = x.unflatten(-1, (3, 4, 4)).unbind(2)
    out = torch.einsum("blhk,bkhd->blhd", torch.einsum("blhd,bkhd->blhk", query, key).softmax(-1), value)
    seen = torch.einsum(
        "blhk,bkhd->blhd", torch.einsum("blhd,bkhd->blhk", query[:, :2], key).softmax(-1), value
    )
    seen.mul_(2.0)
    out[:, :2] = seen
    return out


WRITES = {
    "a column": lambda x: _scores(x, _one_column),
    "the diagonal": lambda x: _scores(x, _diagonal),
    "the output": _output,
    "an output of heads": _output_transposed,
    "rows of an output": _first_rows,
}


class Attention(nn.Module):
    def __init__(self, body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projection, self.body = nn.Linear(16, 48), body

    def forward(self, x):
        return self.body(self.projection(x))


CASE = zoo.Case("written", lambda implementation: nn.Identity(), register=(Attention,))


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("name", WRITES)
def test_written_in_place_in_training(name, rows):
    """Values and gradients of the model alone, in one step and in several."""
    module, x = Attention(WRITES[name]), torch.randn(2, LENGTH, 16)

    def run():
        module.zero_grad()
        out = module(x)
        out.square().sum().backward()
        return out.detach(), module.projection.weight.grad.clone()

    native = run()
    with zoo.by_rows(module, CASE, min_tokens=1, rows=rows):
        mine = run()
        totals = attnpatch.report(module).totals
        assert totals["by_rows"] or totals["materialised"]
    for got, want in zip(mine, native, strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
