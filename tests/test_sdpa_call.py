"""The call of SDPA as attnpatch reads it: torch's names, defaults and scale."""

import dataclasses
import inspect
import math
import pathlib

import pytest
import torch
import torch.nn.functional as F

import attnpatch
from attnpatch.sdpa_call import SdpaCall, additive

ROOT = pathlib.Path(attnpatch.__file__).parent


def tensors(heads=4, kv_heads=4, width=20):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads, 9, width, generator=generator)
    key, value = (torch.randn(2, kv_heads, 7, width, generator=generator) for _ in "kv")
    return query, key, value


@pytest.mark.parametrize("width", [1, 3, 20, 64, 80, 127])
@pytest.mark.parametrize("given", [None, 0.3, -0.3, 0.0])
def test_the_scale_is_the_one_that_torch_takes(given, width):
    """To the last bit: by name, by default, and as the number that it comes to."""
    operands = tensors(width=width)
    call = SdpaCall.of(operands, {"scale": given})
    native = F.scaled_dot_product_attention(*operands, scale=given)
    assert torch.equal(F.scaled_dot_product_attention(**call.arguments()), native)
    assert torch.equal(F.scaled_dot_product_attention(*operands, scale=call.scale), native)


def test_arguments_are_read_as_torch_reads_them():
    query, key, value = tensors()
    mask = torch.zeros(9, 7)
    by_place = SdpaCall.of((query, key, value, mask, 0.5, False), {"enable_gqa": True})
    by_name = SdpaCall.of(
        (query,), {"value": value, "key": key, "attn_mask": mask, "dropout_p": 0.5, "enable_gqa": True}
    )
    assert vars(by_place) == vars(by_name)
    words = inspect.getdoc(F.scaled_dot_product_attention)
    assert "dropout_p=0.0" in words and "is_causal=False" in words and "enable_gqa=False" in words
    assert SdpaCall(query, key, value).arguments() == {
        "query": query, "key": key, "value": value, "attn_mask": None, "dropout_p": 0.0, "is_causal": False,
        "scale": None, "enable_gqa": False,
    }  # fmt: skip


def test_heads_that_share_keys():
    query, key, value = tensors(heads=6, kv_heads=2)
    shared = SdpaCall(query, key, value, enable_gqa=True)
    assert (shared.group, shared.lead) == (3, (2, 6))
    broadcast = dataclasses.replace(shared, key=key[:, :1], value=value[:, :1], enable_gqa=False)
    assert (broadcast.group, broadcast.lead) == (1, (2, 6))
    assert F.scaled_dot_product_attention(**shared.arguments()).shape[:2] == shared.lead


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_boolean_mask_and_what_it_adds_are_one(dtype):
    query, key, value = (tensor.to(dtype) for tensor in tensors())
    mask = torch.rand(9, 7, generator=torch.Generator().manual_seed(1)) > 0.4
    call = SdpaCall(query, key, value, mask)
    added = call.additive_mask()
    assert added.dtype == dtype and torch.equal(added == 0, mask) and torch.equal(added == -math.inf, ~mask)
    assert torch.equal(call.additive_mask(-65504.0)[~mask], torch.full_like(added[~mask], -65504.0))
    assert not call.adds_mask and dataclasses.replace(call, attn_mask=added).adds_mask
    assert additive(added, torch.float64) is added
    one, other = (F.scaled_dot_product_attention(query, key, value, each) for each in (mask, added))
    assert torch.equal(one, other)


def test_the_default_scale_is_written_once():
    """By the root of the head's width, in whatever spelling."""
    found = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        for line in path.read_text().splitlines()
        if ("sqrt" in line and "shape[-1]" in line) or "** -0.5" in line
    }
    assert found == {"sdpa_call.py"}
