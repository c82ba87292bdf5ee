"""Selective activation checkpoints: they keep the results of operators that a policy names, and count all operators."""

import functools

import pytest
import torch
import torch.nn.functional as F
from test_edges import Softmax
from torch import nn
from torch.utils import _python_dispatch as modes
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import attnpatch
from attnpatch.rows.autograd import selective_checkpoints

LENGTH, WIDTH = 24, 16


CORES = {
    "by_hand": lambda q, k, v: (q @ k.mT * 0.3).softmax(-1) @ v,
    "sdpa": F.scaled_dot_product_attention,
    "computed": lambda q, k, v: Softmax.apply(q @ k.mT * 0.3) @ v,
}


class MyAttention(nn.Module):
    def __init__(self, core):
        super().__init__()
        self.projection, self.core = nn.Linear(WIDTH, 3 * WIDTH), core

    def forward(self, x):
        return self.core(*self.projection(x).chunk(3, -1))


class Block(nn.Module):
    """Attention and layers after it, whose gradients need what attention gives when it runs again."""

    def __init__(self, core):
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.after = MyAttention(core), nn.Linear(WIDTH, WIDTH)
        self.kept = []

    def forward(self, x):
        return x + self.after(self.attention(x).tanh())


def gradients(core, mode, named):
    """A training step of two blocks; ``named`` operators are kept."""
    blocks = nn.Sequential(Block(CORES[core]), Block(CORES[core]))
    asked = []

    def policy(ctx, operator, *args, **kwargs):
        asked.append(str(operator))
        is_kept = any(name in str(operator) for name in named)
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    x = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    with attnpatch.patched(blocks, mode=mode, min_tokens=4, rows=5):
        result = x
        for block in blocks:
            result = checkpoint(block, result, use_reentrant=False, context_fn=contexts)
        result.square().sum().backward()
        totals = attnpatch.report(blocks).totals
    assert not modes._get_current_dispatch_mode_stack()
    return [result.detach(), x.grad, *(p.grad for p in blocks.parameters())], totals, asked


@pytest.mark.parametrize("named", [("",), ("mm",), ("softmax",), ("mul", "empty"), ("addmm",), ()], ids=str)
@pytest.mark.parametrize("core", CORES)
def test_gradients_are_native(core, named):
    native, _, _ = gradients(core, "never", named)
    got, totals, asked = gradients(core, "always", named)
    assert totals["by_rows"] + totals["materialised"] > 0 and not totals["failed"]
    for want, mine in zip(native, got, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5 * max(1.0, float(want.abs().max())))
    # The layers of the module are the host's, and its policy is asked about them.
    assert sum("addmm" in operator for operator in asked) == 4


def test_other_modes_stay():
    class Counting(modes.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    first, _ = create_selective_checkpoint_contexts([torch.ops.aten.mul.Tensor])
    x = torch.ones(2)
    with Counting() as outer, first, Counting() as inner:
        before = modes._get_current_dispatch_mode_stack()
        with selective_checkpoints.hidden():
            assert not selective_checkpoints.is_active()
            x * 2
            with selective_checkpoints.shown():
                assert selective_checkpoints.is_active()
                x * 2
        assert modes._get_current_dispatch_mode_stack() == before
    assert outer.count == inner.count >= 2
    assert sum(len(found) for found in first.storage.values()) == 1
