"""Attention modules that use ``torch.func`` inside: what is transformed is the host's own, the rest goes by rows."""

import pytest
import torch
from torch import nn

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
