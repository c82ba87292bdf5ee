"""torch's dense SDPA by rows: steps that share scaled keys and one buffer of scores give the bits of the native call."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnpatch
from attnpatch.rows.sdpa import as_graph, dense


class Attention(nn.Module):
    def forward(self, query, key, value, mask=None, **options):
        return F.scaled_dot_product_attention(query, key, value, mask, **options)


attnpatch.register(Attention)


def by_rows(tensors, options, policy, monkeypatch, grad=False):
    """Native result, the result by rows, and how many steps ``Dense`` computed."""
    steps = []
    compute = dense.Dense.compute

    def counted(self, tile, run):
        steps.append(tile)
        return compute(self, tile, run)

    monkeypatch.setattr(dense.Dense, "compute", counted)
    model = nn.Sequential(Attention())
    with sdpa_kernel(SDPBackend.MATH), contextlib.nullcontext() if grad else torch.inference_mode():
        native = model[0](*tensors, **options)
        with attnpatch.patched(model, mode="always", **policy):
            got = model[0](*tensors, **options)
            assert attnpatch.report(model).totals["by_rows"] == 1
    return native, got, len(steps)


def floats(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(lead, q_len, kv_len, width, value_width=None, dtype=torch.float32):
    sizes = (q_len, width), (kv_len, width), (kv_len, value_width or width)
    return [floats(*lead, *size, dtype=dtype, seed=seed) for seed, size in enumerate(sizes)]


def options_of(name, lead, q_len, kv_len, dtype):
    seen = floats(q_len, kv_len) > 0
    seen[1] = False
    return {
        "none": {},
        "scale": {"scale": 0.7},
        "negative scale": {"scale": -0.3},
        "bool mask": {"mask": seen},
        "float mask": {"mask": floats(*lead, q_len, kv_len, dtype=dtype).masked_fill(~seen, -math.inf)},
        "row mask": {"mask": floats(1, kv_len) > -1},
    }[name]


@pytest.mark.parametrize("name", ["none", "scale", "negative scale", "bool mask", "float mask", "row mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("lead", "q_len", "kv_len", "width", "value_width", "policy"),
    [
        ((1, 1), 300, 300, 512, 512, {"rows": 128}),
        ((1,), 301, 77, 512, 512, {"rows": 64}),
        ((2, 3), 257, 129, 40, 24, {"rows": 32, "heads": 2}),
        ((2, 1), 130, 64, 64, 64, {"rows": 33}),
        ((1, 4), 100, 100, 8, 8, {}),
    ],
)
def test_bits(monkeypatch, name, dtype, lead, q_len, kv_len, width, value_width, policy):
    tensors = qkv(lead, q_len, kv_len, width, value_width, dtype)
    options = options_of(name, lead, q_len, kv_len, dtype)
    native, got, steps = by_rows(tensors, options, policy, monkeypatch)
    assert steps > 1 or not policy
    assert got.stride() == native.stride()
    if dtype == torch.float32:
        assert torch.equal(got, native)
    else:
        # A float64 product of fewer rows rounds differently in MKL, whoever asks for it: see the next comparison.
        torch.testing.assert_close(got, native, rtol=1e-13, atol=1e-13)
    monkeypatch.setattr(as_graph, "is_simple", lambda call: False)
    _, by_torch, steps = by_rows(tensors, options, policy, monkeypatch)
    assert steps == 0
    assert torch.equal(got, by_torch)


def test_a_wide_head_as_chosen(monkeypatch):
    """Long enough that the rule cuts it by itself."""
    native, got, steps = by_rows(qkv((1, 1), 4096, 4096, 256), {}, {}, monkeypatch)
    assert steps > 1
    assert torch.equal(got, native)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite(monkeypatch, value):
    query, key, tensor = qkv((1, 1), 64, 64, 16)
    query[..., 3, :] = value
    native, got, steps = by_rows((query, -key.abs(), tensor), {}, {"rows": 16}, monkeypatch)
    assert steps == 4
    assert zoo.equal_with_nan(got, native)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"dropout_p": 0.1}, {"enable_gqa": True}])
def test_what_is_left_to_torch(monkeypatch, options):
    torch.manual_seed(0)
    *_, steps = by_rows(qkv((1, 2), 64, 64, 16), options, {"rows": 16}, monkeypatch)
    assert steps == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_left_to_torch(monkeypatch, dtype):
    native, got, steps = by_rows(qkv((1, 2), 64, 64, 16, dtype=dtype), {}, {"rows": 16}, monkeypatch)
    assert steps == 0
    assert torch.equal(got, native)


def test_gradients_are_left_to_torch(monkeypatch):
    tensors = [tensor.requires_grad_() for tensor in qkv((1, 2), 64, 64, 16, dtype=torch.float64)]
    native, got, steps = by_rows(tensors, {}, {"rows": 16}, monkeypatch, grad=True)
    assert steps == 0
    wanted = torch.autograd.grad(native.sum(), tensors)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), tensors), wanted)
