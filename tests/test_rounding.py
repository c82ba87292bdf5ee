"""A step has rows enough, and begins where it must, for every row to have the bits of the whole product."""

import random
import warnings

import pytest
import torch
from torch import nn

import attnpatch
from attnpatch.policy import LEAST_ROWS, Policy
from attnpatch.rows.graph import axes

LAYOUTS = {
    "rows first": lambda h, n, d: torch.randn(h, n, d),
    "channels first": lambda h, n, d: torch.randn(h, d, n).transpose(1, 2),
    "heads in the middle": lambda h, n, d: torch.randn(n, h, d).transpose(0, 1),
    "heads last": lambda h, n, d: torch.randn(n, d, h).permute(2, 0, 1),
    "heads of channels": lambda h, n, d: torch.randn(h * d, n).view(h, d, n).transpose(1, 2),
    "channels, then heads": lambda h, n, d: torch.randn(d, h, n).permute(1, 2, 0),
    "one of three": lambda h, n, d: torch.randn(n, 3, h, d)[:, 1].transpose(0, 1),
    "every other channel": lambda h, n, d: torch.randn(h, n, 2 * d)[..., ::2],
}
SPELLINGS = {
    "matmul": lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    "bmm": lambda q, k, v: torch.bmm(torch.bmm(q, k.mT).softmax(-1), v),
    "einsum": lambda q, k, v: torch.einsum("hij,hjd->ihd", torch.einsum("hjd,hid->hij", k, q).softmax(-1), v),
    "channels of results first": lambda q, k, v: torch.bmm(v.mT, torch.bmm(q, k.mT).softmax(-1).mT),
    "keys by queries": lambda q, k, v: torch.einsum(
        "hji,hjd->hid", torch.einsum("hjd,hid->hji", k, q).softmax(1), v
    ),
}

# Results of fewer channels that lie first round differently on some processors (docs/limits.md).
NARROW = 10


class Attention(nn.Module):
    def __init__(self, spelling):
        super().__init__()
        self.spelling = SPELLINGS[spelling]

    def forward(self, q, k, v):
        return self.spelling(q, k, v)


@pytest.fixture
def shipped_rows(monkeypatch):
    monkeypatch.setitem(axes.LEAST, axes.ROW, LEAST_ROWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_layout_has_the_bits_of_the_whole(spelling, dtype, shipped_rows):
    """Drawn: layouts of query, key and value, sizes with and without a remainder, rows down to one."""
    drawn = random.Random(f"{spelling} {dtype}")
    torch.manual_seed(0)
    for _ in range(40):
        heads, n, d = (
            drawn.choice([1, 2, 3]),
            drawn.choice([33, 64, 77, 130, 255]),
            drawn.choice([4, 8, 40, 64]),
        )
        keys = drawn.choice([n, n, 77, 96, 16])
        names = drawn.choices(list(LAYOUTS), k=3)
        if spelling == "channels of results first" and d < NARROW:
            continue
        q, k, v = (
            LAYOUTS[name](heads, m, d).to(dtype) for name, m in zip(names, (n, keys, keys), strict=True)
        )
        module, rows = Attention(spelling), drawn.choice([1, 4, 5, 7, 8, 11, 16, 20, 32])
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            native = module(q, k, v)
            with attnpatch.patched(module, mode="always", min_tokens=0, rows=rows):
                got = module(q, k, v)
                assert attnpatch.report(module).totals["by_rows"] == 1
        assert torch.equal(got, native), (names, heads, n, keys, d, rows)


def test_fewer_rows_than_keep_the_bits_are_not_taken(shipped_rows):
    """Said once, and true: what a step holds is what sixteen rows hold."""
    module, (q, k, v) = Attention("matmul"), torch.randn(3, 1, 256, 16)
    held = {}
    for rows in (4, 16, 64):
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            with attnpatch.patched(module, mode="always", min_tokens=0, rows=rows):
                module(q, k, v)
                held[rows] = attnpatch.report(module).totals["largest"]
        said = [str(each.message) for each in caught if "round differently" in str(each.message)]
        assert len(said) == (rows < LEAST_ROWS), said
    assert held == {4: 16 * 256 * 4, 16: 16 * 256 * 4, 64: 64 * 256 * 4}
    assert Policy(rows=4).rows == 4
