"""Attention modules that use ``torch.func`` or a compiled function inside: those are the host's own."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import attnpatch


class VmapAttention(nn.Module):
    """Scores that are pending while a mask is written under ``vmap``, as torch makes block masks."""

    def forward(self, query, key, value):
        scores = query @ key.transpose(-2, -1)
        positions = torch.arange(query.shape[-2] * key.shape[-2]).view(query.shape[-2], -1)

        def mask(numbers):
            seen = torch.zeros_like(numbers, dtype=query.dtype)
            seen.add_(-(numbers.remainder(3)).to(query.dtype))
            return seen

        return (scores + torch.func.vmap(mask)(positions)).softmax(-1) @ value


class OverwritingAttention(nn.Module):
    """A key that is overwritten through ``vmap`` after the scores were asked for."""

    def forward(self, query, key, value):
        key = key.clone()
        scores = query @ key.transpose(-2, -1)
        torch.func.vmap(lambda part: part.mul_(2))(key)
        return scores.softmax(-1) @ value + key.mean(-2, keepdim=True)


class InnerAttention(nn.Module):
    """The attention itself under ``vmap``: left alone."""

    def forward(self, query, key, value):
        attend = torch.func.vmap(lambda q, k, v: (q @ k.transpose(-2, -1)).softmax(-1) @ v)
        return attend(query, key, value)


class ClosureAttention(nn.Module):
    """Pending scores that a transformed function reads."""

    def forward(self, query, key, value):
        scores = query @ key.transpose(-2, -1)
        return torch.func.vmap(lambda part: part + scores.mean(-1, keepdim=True)[0])(value)


class JvpAttention(nn.Module):
    """Scores made outside that a transform differentiates."""

    def forward(self, query, key, value):
        scores = query @ key.transpose(-2, -1)
        out, tangent = torch.func.jvp(lambda s: s.softmax(-1) @ value, (scores,), (torch.ones_like(scores),))
        return out + tangent + torch.func.jacrev(lambda t: (scores * t).sum())(torch.tensor(0.5))


class TangentAttention(nn.Module):
    """Forward mode: tangents of scores, of values, and of the query before there are scores. (Of softmax torch has no gradient there.)"""

    def forward(self, query, key, value):
        scores = query @ key.transpose(-2, -1)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(scores, torch.ones_like(scores))
            found = [dual.tanh() @ value]
            found.append(scores.tanh() @ forward_ad.make_dual(value, torch.ones_like(value)))
            dual = forward_ad.make_dual(query, torch.ones_like(query))
            found.append((dual @ key.transpose(-2, -1)).tanh() @ value)
            return sum(sum(forward_ad.unpack_dual(each)) for each in found)


@pytest.mark.parametrize("attention", [JvpAttention, TangentAttention])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_scores_in_a_transform(attention, needs_grad):
    """Scores from before a transform keep their history; forward mode is the host's own."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 2, 4, 24, 16, generator=generator).requires_grad_(needs_grad)
    module, found = attention(), []
    for mode in ("never", "always"):
        with attnpatch.patched(module, mode=mode, rows=7, min_tokens=4):
            out = module(*inputs.unbind())
            grads = torch.autograd.grad(out.square().sum(), inputs) if needs_grad else ()
            found.append([out, *grads])
            assert not attnpatch.report(module).totals["failed"]
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("attention", "goes_by_rows"),
    [(VmapAttention, True), (OverwritingAttention, True), (InnerAttention, False), (ClosureAttention, False)],
)
def test_transforms_inside(attention, goes_by_rows):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 2, 4, 67, 16, generator=generator).unbind()
    model = nn.Sequential(attention())
    native = model[0](*inputs)
    with attnpatch.patched(model, mode="always", rows=7):
        got = model[0](*inputs)
        totals = attnpatch.report(model).totals
    assert torch.equal(got, native)
    assert bool(totals["by_rows"]) == goes_by_rows


class SparseAttention(nn.Module):
    """Blocks to attend to, chosen from pooled scores and handed to a compiled FlexAttention."""

    def forward(self, query, key, value):
        pooled = query.unflatten(-2, (-1, 16)).mean(-2) @ key.unflatten(-2, (-1, 16)).mean(-2).transpose(
            -2, -1
        )
        chosen = pooled.softmax(-1).sort(-1)
        seen = (chosen[0].cumsum(-1) >= 0.1).int().gather(-1, chosen[1].argsort(-1))
        counts, order = seen.sum(-1).to(torch.int32), seen.argsort(-1, descending=True).to(torch.int32)
        mask = BlockMask.from_kv_blocks(torch.zeros_like(counts), order, counts, order, BLOCK_SIZE=16)
        return flex_attention(query, key, value, block_mask=mask)


@pytest.mark.parametrize("mode, count", [("auto", 0), ("always", 1)])
def test_flex_attention_inside(mode, count):
    """Its kernel runs as it is; by rows torch computes what it means, which agrees to rounding."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 1, 2, 64, 16, generator=generator).unbind()
    model = nn.Sequential(SparseAttention())
    with torch.no_grad():
        native = model[0](*inputs)
        with attnpatch.patched(model, mode=mode, min_tokens=0, min_free=0):
            got = model[0](*inputs)
            totals = attnpatch.report(model).totals
    torch.testing.assert_close(got, native, rtol=0, atol=0 if mode == "auto" else 1e-6)
    assert totals["by_rows"] == count


class NarrowAttention(nn.Module):
    """Values of one channel."""

    def forward(self, query, key, value):
        return (query @ key.transpose(-2, -1)).softmax(-1) @ value


def test_values_of_one_channel():
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 67, 16, generator=generator).unbind()
    model = nn.Sequential(NarrowAttention())
    native = model[0](query, key, value[..., :1])
    with attnpatch.patched(model, mode="always", rows=7):
        got = model[0](query, key, value[..., :1])
        totals = attnpatch.report(model).totals
    # A product with one column is a product of a matrix and a vector, whose kernel depends on the shape.
    torch.testing.assert_close(got, native, rtol=0, atol=4 * torch.finfo(torch.float32).eps)
    assert totals["by_rows"] == 1


@pytest.mark.parametrize(("kv_len", "width"), [(4, 8), (2, 16), (2, 8), (5, 4)])
def test_tiny_products(kv_len, width):
    """Few keys (the image tokens of an IP-Adapter): no step's product is so small that it takes another kernel."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 77, width, generator=generator)
    key, value = torch.randn(2, 2, 4, kv_len, width, generator=generator).unbind()
    model = nn.Sequential(NarrowAttention())
    native = model[0](query, key, value)
    for rows in (4, 7, 33):
        with attnpatch.patched(model, mode="always", rows=rows):
            got = model[0](query, key, value)
            assert attnpatch.report(model).totals["by_rows"] == 1
        assert torch.equal(got, native), rows
