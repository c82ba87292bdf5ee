"""Graphs of a patched model: recorded as if it were not patched, with no row step and no deferred tensor in them."""

import io

import pytest
import torch
import zoo
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import attnpatch

IDS = zoo.tokens(33, batch=2)


def small(name: str, implementation: str) -> nn.Module:
    for kind in zoo.BY_NAME[name].register:
        attnpatch.register(kind)
    return zoo.BY_NAME[name].build(implementation).requires_grad_(False)


def operations(graph) -> list[str]:
    return [str(node.target) for node in graph.nodes]


EXPORTS = [
    pytest.param(
        implementation,
        strict,
        order,
        # Strictly is by tracing the code: the same whatever follows, several seconds each.
        marks=[pytest.mark.long] if strict and (implementation, order) != ("eager", "loaded") else [],
        id=f"{implementation}-{'strict' if strict else 'not_strict'}-{order}",
    )
    for implementation in ("eager", "sdpa")
    for strict in (False, True)
    for order in ("exported_patched", "exported_before", "loaded")
]


@pytest.mark.parametrize(("implementation", "strict", "order"), EXPORTS)
def test_export(implementation, strict, order):
    """The same program as of the unpatched model, also saved and loaded, and the model goes by rows as before."""

    def export() -> torch.export.ExportedProgram:
        return torch.export.export(model, (IDS,), {"use_cache": False}, strict=strict)

    model = small("llama", implementation)
    native = model(IDS, use_cache=False).logits
    plain = export()
    attnpatch.apply(model, mode="always", rows=7)
    program = plain if order == "exported_before" else export()
    assert operations(program.graph) == operations(plain.graph)
    assert attnpatch.report(model).totals["by_rows"] == 0
    if order == "loaded":
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        program = torch.export.load(buffer)
    assert torch.equal(program.module()(IDS, use_cache=False).logits, native)
    # Causal by flag, the fused kernel rounds otherwise than on some of the rows.
    tolerance = {} if implementation == "sdpa" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(model(IDS, use_cache=False).logits, native, **tolerance)
    assert attnpatch.report(model).totals["by_rows"] == 2
    attnpatch.remove(model)


def test_export_with_dynamic_length():
    model = small("llama", "eager")
    shapes = {"input_ids": {1: torch.export.Dim("length", min=4, max=64)}, "use_cache": None}
    attnpatch.apply(model, mode="always", rows=7)
    program = torch.export.export(model, (IDS,), {"use_cache": False}, dynamic_shapes=shapes)
    attnpatch.remove(model)
    other = zoo.tokens(51, batch=2)
    torch.testing.assert_close(
        program.module()(other, use_cache=False).logits, model(other, use_cache=False).logits
    )


RECORDERS = {
    # Its check would run the function once more, not recorded.
    "jit.trace": lambda function, x: torch.jit.trace(function, (x,), check_trace=False),
    "make_fx": lambda function, x: make_fx(function)(x),
}


@pytest.mark.parametrize("recorder", RECORDERS.values(), ids=RECORDERS)
def test_recorded(recorder):
    """Older ways to a graph, which ``torch.onnx`` and accelerators still take."""
    model = small("einsum", "torch")
    x = zoo.floats(2, 33, 64)
    native = model(x)
    plain = recorder(lambda x: model(x), x)
    attnpatch.apply(model, mode="always", rows=7)
    graph = recorder(lambda x: model(x), x)
    assert attnpatch.report(model).totals["by_rows"] == 0
    assert len(str(graph.graph)) == len(str(plain.graph))
    assert torch.equal(graph(x), native)
    assert torch.equal(model(x), native)
    assert attnpatch.report(model).totals["by_rows"] > 0
    attnpatch.remove(model)
