"""Kernels outside torch: maps beside them, and torch's functions in their place, against float64 by plain loops."""

from __future__ import annotations

import pytest
import torch

import attnpatch
from tests.kernel_cases import BLOCK, Case, blocks_of, expected, installed, model_of
from tests.kernel_table import TABLE

BLOCKS = attnpatch.Blocks.fixed(BLOCK)


@pytest.fixture(autouse=True, scope="module")
def _installed():
    with installed():
        yield


@pytest.mark.parametrize("name", TABLE)
def test_a_map_beside_a_kernel_is_that_of_its_arguments(name):
    case = TABLE[name]
    model, x = model_of(case)
    with torch.no_grad():
        p, out = expected(case, model, x)
        native = model(x)
        with attnpatch.capture(model, blocks=BLOCKS) as maps:
            captured = model(x)
    assert torch.equal(captured, native)
    assert (native - out).abs().max() <= case.tolerance * out.abs().max()
    assert not maps.left_out
    found = maps["attn"].mass.squeeze(1).double()
    assert (found - blocks_of(p)).abs().max() < 1e-6


@pytest.mark.parametrize("mode", ["auto", "always"])
@pytest.mark.parametrize("name", TABLE)
def test_torch_computes_what_a_kernel_computes(name, mode):
    from dense_attention import calls

    case = TABLE[name]
    model, x = model_of(case)
    x = x.requires_grad_()
    p, out = expected(case, model, x)
    weights = torch.randn_like(out)
    wanted = torch.autograd.grad((out * weights).sum(), [x, *model.parameters()])
    attnpatch.apply(model, replace_kernels=True, mode=mode, rows=None)
    calls.clear()
    with attnpatch.capture(model, blocks=BLOCKS) as maps:
        found = model(x)
    got = torch.autograd.grad((found * weights).sum(), [x, *model.parameters()])
    attnpatch.remove(model)
    assert not calls
    assert (found - out).abs().max() < 1e-6
    for one, other in zip(got, wanted, strict=True):
        assert (one - other).abs().max() < 1e-6 * max(1.0, float(other.abs().max()))
    assert not maps.left_out
    assert (maps["attn"].mass.squeeze(1).double() - blocks_of(p.detach())).abs().max() < 1e-6


def test_the_table_has_every_case():
    assert all(isinstance(case, Case) for case in TABLE.values())
