"""What a model makes of positions outside its attention (a mean over the past) is what it is without a patch."""

import pytest
import torch
from live import Live
from torch import nn
from torch.nn import functional as F

import attnpatch

TOKENS = 640


class SelfAttention(nn.Module):
    def forward(self, x):
        x = x[:, None]
        return F.scaled_dot_product_attention(x, x, x)[:, 0]


def positions(x):
    return torch.arange(x.shape[1])


def past(x):
    return positions(x)[None] <= positions(x)[:, None]


def distance(x):
    return (positions(x)[None] - positions(x)[:, None]).abs().float()


STEPS = {
    "sum, then its count": lambda x: (past(x).float() @ x) / past(x).sum(-1, keepdim=True),
    "mean": lambda x: (lambda m: (m / m.sum(-1, keepdim=True)) @ x)(past(x).float()),
    "einsum": lambda x: torch.einsum("ij,bjd->bid", past(x).to(x.dtype), x) / 100,
    "bmm": lambda x: torch.bmm(past(x).float().expand(2, -1, -1), x) / 100,
    "linear": lambda x: F.linear(past(x).float(), x[0].T)[None] / 100,
    "decay": lambda x: torch.exp(-distance(x)) @ x,
    "softmax": lambda x: distance(x).neg().softmax(-1) @ x,
    "softmax of a mask": lambda x: torch.where(past(x), 0.0, -1e9).softmax(-1) @ x,
    "twice": lambda x: past(x).float() @ (past(x).float() @ x) / 1e4,
    "count": lambda x: x + past(x).sum(-1)[:, None] / 100,
}


class Model(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.attention, self.step = SelfAttention(), step

    def forward(self, x):
        return self.attention(self.step(x))


@pytest.mark.parametrize(
    "policy", [{"fuse": True}, {"mode": "always"}, {"mode": "always", "fuse": True}], ids=str
)
@pytest.mark.parametrize("name", STEPS)
def test_positions_outside_attention(name, policy):
    model = Model(STEPS[name])
    x = torch.randn(2, TOKENS, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    native = model(x)
    (native_grad,) = torch.autograd.grad(native.square().sum(), x)
    with attnpatch.patched(model, min_tokens=500, **policy), Live() as live:
        got = model(x)
        report = attnpatch.report(model)
        (grad,) = torch.autograd.grad(got.square().sum(), x)
    assert torch.equal(got, native)
    # Gradients of keys and values are sums over steps, in another order than natively.
    torch.testing.assert_close(grad, native_grad, rtol=1e-4, atol=1e-5 * native_grad.abs().max().item())
    assert live.largest < TOKENS**2 * 4, live.what
    assert report.totals["materialised"] == 0, report
