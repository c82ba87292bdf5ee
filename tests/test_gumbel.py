"""``gumbel_softmax`` by rows: another sample of the same distribution, the same one every time."""

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

import attnpatch

TAU = 0.7


class Sampled(nn.Module):
    """Attention that draws what it looks at; an identity as values hands its weights out."""

    def __init__(self, hard: bool = False):
        super().__init__()
        self.options = {"tau": TAU, "hard": hard}

    def forward(self, q, k, v):
        return F.gumbel_softmax(q @ k.transpose(-1, -2), **self.options) @ v


def weights(q, k, hard=False, seed=0, **policy):
    """What attention by rows weighs the values by."""
    model = Sampled(hard)
    torch.manual_seed(seed)
    with attnpatch.patched(model, mode="always", **policy):
        found = model(q, k, torch.eye(k.shape[-2], dtype=q.dtype).expand(*k.shape[:-2], -1, -1))
        totals = attnpatch.report(model).totals
    assert totals["by_rows"] == 1 and totals["materialised"] == 0
    return found


def inputs(rows=300, keys=40, dtype=torch.float32):
    return zoo.floats(2, rows, 16).to(dtype) * 0.5, zoo.floats(2, keys, 16, seed=1).to(dtype) * 0.5


@pytest.mark.parametrize("hard", [False, True])
def test_a_seed_says_which_sample(hard):
    """Whatever the steps; another seed, other weights."""
    q, k = inputs()
    first = weights(q, k, hard)
    assert torch.allclose(first.sum(-1), torch.ones(2, 300), atol=1e-5)
    for policy in ({}, {"rows": 5}, {"rows": 64, "heads": 1}):
        assert torch.allclose(weights(q, k, hard, **policy), first, atol=1e-6)
    assert not torch.allclose(weights(q, k, hard, seed=1), first, atol=0.1)
    if hard:
        assert set(first.round(decimals=5).unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_distribution(dtype):
    """The largest of scores plus Gumbel noise is drawn with the probabilities of their softmax."""
    count = 20000
    _, k = inputs(keys=11)
    q = zoo.floats(2, 1, 16)
    expected = (q.double() @ k.double().transpose(-1, -2) * 0.5).softmax(-1)
    drawn = weights((q * 0.5).expand(-1, count, -1).to(dtype), k.to(dtype), hard=True, seed=3)
    found = drawn.double().mean(1, keepdim=True)
    # Five standard errors; bfloat16 also rounds the scores.
    spread = 5 * (expected * (1 - expected) / count).sqrt() + (0.01 if dtype is torch.bfloat16 else 0)
    assert ((found - expected).abs() <= spread).all(), (found, expected)
    # Rows are drawn apart from one another.
    picked = drawn[0].argmax(-1).double()
    assert torch.corrcoef(torch.stack([picked[:-1], picked[1:]]))[0, 1].abs() < 5 / count**0.5


@pytest.mark.parametrize("hard", [False, True])
def test_gradients(hard):
    """Those of a softmax at the weights that were drawn, also where only the largest is used ("straight through")."""
    q, k = inputs(rows=50, dtype=torch.float64)
    soft = weights(q, k, rows=7)
    upstream = zoo.floats(2, 50, 16, seed=5).double()
    values = zoo.floats(2, 40, 16, seed=6).double()
    q.requires_grad_()
    torch.manual_seed(0)
    model = Sampled(hard)
    with attnpatch.patched(model, mode="always", rows=7):
        (model(q, k, values) * upstream).sum().backward()
    toward = upstream @ values.transpose(-1, -2)
    of_scores = soft * (toward - (soft * toward).sum(-1, keepdim=True)) / TAU
    assert torch.allclose(q.grad, of_scores @ k, atol=1e-6)


def test_autocast_and_fuse():
    """In the dtype that torch would give; no kernel draws, and the report says so."""
    q, k = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        native = Sampled()(q, k, k)
        assert weights(q, k).dtype == native.dtype
    model = Sampled()
    with attnpatch.patched(model, fuse=True, min_tokens=16):
        model(q, k, k)
        report = attnpatch.report(model)
    assert report.totals["by_rows"] == 1 and report.totals["fused"] == 0
    assert "because of: GumbelSoftmax" in str(report)


def test_native_where_there_is_memory():
    """What is not put off is torch's own, to the last bit."""
    q, k = inputs()
    model = Sampled()
    torch.manual_seed(0)
    native = model(q, k, k)
    torch.manual_seed(0)
    with attnpatch.patched(model):
        assert torch.equal(model(q, k, k), native)
