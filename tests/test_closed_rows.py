"""Rows that a mask closes: a map has what the kernel computed, which values of ones on the diagonal let through."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnpatch
from attnpatch import Blocks

TOKENS, HEADS = 12, 2


class Attention(nn.Module):
    """Its output is its probabilities: the value of key i is the i-th unit vector. Heads are as wide, as fused kernels want."""

    def __init__(self, has_heads):
        super().__init__()
        torch.manual_seed(3)
        self.to_qk = nn.Linear(16, 2 * HEADS * TOKENS)
        self.has_heads = has_heads

    def forward(self, x, mask):
        query, key = self.to_qk(x).unflatten(-1, (2, HEADS, TOKENS)).movedim(-2, 1).unbind(-2)
        value = torch.eye(TOKENS, dtype=x.dtype).expand(*key.shape[:-1], TOKENS)
        if not self.has_heads:
            query, key, value, mask = (
                query[:, 0],
                key[:, 0],
                value[:, 0],
                None if mask is None else mask[:, 0],
            )
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def closed(low, dtype, over):
    """Rows 2 and 7 look at nothing, rows 4 and 5 at one key."""
    shut = torch.zeros(1, 1, TOKENS, TOKENS, dtype=torch.bool)
    shut[:, :, [2, 7]] = True
    shut[:, :, [4, 5]] = True
    shut[:, :, [4, 5], 1] = False
    if over == "causal":
        shut |= torch.ones_like(shut).triu(1)
    if over == "window":
        shut |= torch.ones_like(shut).tril(-4) | torch.ones_like(shut).triu(4)
    if low is False:
        return shut.logical_not()
    low = torch.finfo(dtype).min if low == "lowest" else low
    mask = torch.zeros(shut.shape, dtype=dtype).masked_fill(shut, low)
    if over == "bias":
        mask += torch.arange(TOKENS, dtype=dtype) * 0.125
    return mask


class Model(nn.Module):
    def __init__(self, has_heads):
        super().__init__()
        self.attention = Attention(has_heads)

    def forward(self, x, mask):
        return self.attention(x, mask)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OVER = ("alone", "causal", "window", "bias")
# How the map comes about: probabilities computed again, with the kernel's logsumexp or without, or seen by rows.
WAYS = {"logsumexp": "torch (no GPU)", "none": "torch (another layout)", "by rows": "torch (by rows)"}


def check(low, dtype, over, way):
    model = Model(has_heads=way != "none").to(dtype)
    x, mask = torch.randn(1, TOKENS, 16, dtype=dtype), closed(low, dtype, over)
    with (
        torch.no_grad(),
        attnpatch.patched(model, mode="always" if way == "by rows" else "never"),
        attnpatch.capture(model, blocks=Blocks.fixed(1), heads="all") as maps,
    ):
        expected = model(x, mask).float()
        summed = attnpatch.report(model).sites[0].summed_by
    assert summed == {WAYS[way]: 1}
    found = maps.block_map.mass[0]
    # Kernels round probabilities to the dtype before values are multiplied with them.
    atol = 1e-6 if dtype in (torch.float32, torch.float64) else torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected.reshape(found.shape), atol=atol, rtol=0)
    assert expected[..., 0, :].sum() > 0.9  # or nothing was tested
    return found[0, 2]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("low", ["lowest", -1e30, -1e9, -1e4])
def test_a_row_closed_by_a_number_is_what_the_output_has(low, dtype, over, way):
    if dtype == torch.float16 and low in (-1e30, -1e9):
        low = -6e4  # there are no lower ones but the lowest
    row = check(low, dtype, over, way)
    if low in ("lowest", -1e30) and dtype != torch.float16:
        torch.testing.assert_close(row, torch.full_like(row, 1 / TOKENS), atol=1e-6, rtol=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("low", "over"), [(low, over) for low in (-math.inf, False) for over in OVER if low or over != "bias"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_sees_nothing_puts_no_mass_anywhere(low, dtype, over, way):
    assert (check(low, dtype, over, way) == 0).all()
