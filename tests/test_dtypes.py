"""What dtype scores claim to have, and what comes of them, under autocast: the native one, whoever makes the product."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnpatch

HEADS, TOKENS, WIDTH = 4, 24, 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NARROW = [torch.bfloat16, torch.float16]


def folded(tensor):
    return tensor.flatten(0, 1)


PRODUCTS = {
    "matmul": lambda q, k: torch.matmul(q, k.transpose(-1, -2)),
    "@": lambda q, k: q @ k.transpose(-1, -2),
    "Tensor.matmul": lambda q, k: q.matmul(k.transpose(-1, -2)),
    "bmm": lambda q, k: torch.bmm(folded(q), folded(k).transpose(1, 2)),
    "Tensor.bmm": lambda q, k: folded(q).bmm(folded(k).transpose(1, 2)),
    "baddbmm": lambda q, k: torch.baddbmm(
        torch.zeros(len(folded(q)), TOKENS, TOKENS, dtype=q.dtype), folded(q), folded(k).transpose(1, 2)
    ),
    "einsum": lambda q, k: torch.einsum("bhid,bhjd->bhij", q, k),
    "einsum of one channel": lambda q, k: torch.einsum("bhid,bhjd->bhij", q[..., :1], k[..., :1]),
    "einsum with dots": lambda q, k: torch.einsum("...id,...jd->...ij", q, k),
    # Heads mixed by a layer: one more product that scores go through before softmax.
    "linear": lambda q, k: F.linear(
        (q @ k.transpose(-1, -2)).permute(0, 2, 3, 1), torch.eye(HEADS, dtype=q.dtype)
    ).permute(0, 3, 1, 2),
}
WITH_VALUES = {
    "matmul": lambda p, v: p @ v.reshape(*p.shape[:-2], TOKENS, WIDTH),
    "einsum": lambda p, v: torch.einsum("...ij,...jd->...id", p, v.reshape(*p.shape[:-2], TOKENS, WIDTH)),
}


class ByHand(nn.Module):
    """Attention that looks at the dtype of its scores, as those do that fill them with its lowest number."""

    def __init__(self, product, with_values):
        super().__init__()
        self.product, self.with_values, self.said = product, with_values, None

    def forward(self, query, key, value):
        scores = self.product(query, key)
        self.said = scores.dtype
        mask = torch.ones(TOKENS, TOKENS).triu(1).bool()
        scores = scores.masked_fill(mask, torch.finfo(scores.dtype).min)
        probabilities = scores.softmax(-1)
        self.said = self.said, probabilities.dtype
        return self.with_values(probabilities.to(value.dtype), value)


class Fused(nn.Module):
    def __init__(self, mask=None, is_causal=False):
        super().__init__()
        self.mask, self.is_causal, self.said = mask, is_causal, None

    def forward(self, query, key, value):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=self.mask, is_causal=self.is_causal
        )


def outcome(model, inputs, dtype):
    """Its result and what it said of its scores, or the kind of error it raised."""
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            return model(*inputs), model.said
    except RuntimeError as error:
        return type(error), str(error).split(",")[0]


def assert_as_native(model, inputs, dtype, exact=True, deferred=True, **policy):
    native = outcome(model, inputs, dtype)
    with attnpatch.patched(model, sites=[""], mode="always", min_tokens=4, **policy):
        got = outcome(model, inputs, dtype)
        totals = attnpatch.report(model).totals
    assert got[1] == native[1]
    if isinstance(native[0], type):
        assert got[0] is native[0]
        return
    assert totals["materialised"] == 0
    assert totals["by_rows"] > 0 or not deferred
    assert got[0].dtype == native[0].dtype
    if exact:
        assert torch.equal(got[0], native[0])
    else:
        torch.testing.assert_close(got[0], native[0])


def tensors(*dtypes):
    torch.manual_seed(0)
    return [torch.randn(2, HEADS, TOKENS, WIDTH).to(dtype) for dtype in dtypes]


@pytest.mark.parametrize("autocast", [None, *NARROW], ids=str)
@pytest.mark.parametrize(("of_query", "of_key"), list(itertools.product(DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name, of_query, of_key, autocast):
    """Operands of any two dtypes; without autocast the native call refuses two, and so does ours in its words."""
    for with_values in WITH_VALUES.values():
        model = ByHand(PRODUCTS[name], with_values)
        # A product that sums over one channel is not taken for scores: it stays native.
        deferred = "channel" not in name
        assert_as_native(model, tensors(of_query, of_key, of_query), autocast, deferred=deferred, rows=8)


@pytest.mark.parametrize("autocast", [None, *NARROW], ids=str)
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=3)), ids=str)
def test_fused(dtypes, autocast):
    """The kernel is chosen by what the call computes in, not by what it was given."""
    additive = torch.zeros(TOKENS, TOKENS).masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -1e4)
    masks = [None, additive.isinf() | (additive == 0)] + ([additive] if autocast else [])
    for mask in masks:
        assert_as_native(Fused(mask), tensors(*dtypes), autocast)
    assert_as_native(Fused(is_causal=True), tensors(*dtypes), autocast, exact=False)


@pytest.mark.parametrize("autocast", NARROW, ids=str)
def test_mixed_dtypes_stay_with_the_fused_kernel(autocast, monkeypatch):
    """A kernel that holds no scores serves the call: nothing is gained by rows, however little memory there is."""
    monkeypatch.setenv("ATTNPATCH_FREE_MEMORY", "1KB")
    model = Fused()
    query, key, value = tensors(torch.float32, torch.float32, autocast)
    with (
        attnpatch.patched(model, sites=[""], min_tokens=4),
        torch.autocast("cpu", autocast),
    ):
        model(query, key, value)
        totals = attnpatch.report(model).totals
    assert totals["fused"] == 1 and totals["by_rows"] == 0


@pytest.mark.parametrize("autocast", [None, *NARROW], ids=str)
@pytest.mark.parametrize("kind", ["multihead", "encoder", "encoder_norm_first"])
@pytest.mark.parametrize("masked", [False, True])
def test_fast_paths(kind, masked, autocast):
    """torch's two C++ fast paths in evaluation, whose biases are not zero."""
    torch.manual_seed(0)
    if kind == "multihead":
        model = nn.MultiheadAttention(64, HEADS, batch_first=True)
    else:
        model = nn.TransformerEncoderLayer(64, HEADS, 96, batch_first=True, norm_first="norm" in kind)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    model = model.eval()
    x = torch.randn(2, TOKENS, 64)
    padding = torch.zeros(2, TOKENS, dtype=torch.bool) if masked else None
    if masked:
        padding[1, -5:] = True

    def run():
        with torch.no_grad(), torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            if kind == "multihead":
                return model(x, x, x, need_weights=False, key_padding_mask=padding)[0]
            return model(x, src_key_padding_mask=padding)

    native = run()
    assert not native.isnan().any()
    with attnpatch.patched(model, mode="always", min_tokens=4):
        got = run()
        assert attnpatch.report(model).totals["by_rows"] > 0
    assert got.dtype == native.dtype and torch.equal(got, native)
