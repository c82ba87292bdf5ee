"""Kernels outside torch: maps beside them, and torch's functions in their place, against float64 by plain loops."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import subprocess
import sys
import threading

import pytest
import torch

import attnpatch
from attnpatch.hosts.kernels.wrapping import READERS
from tests.kernel_cases import (
    BLOCK,
    FOLDER,
    PACKAGES,
    Case,
    blocks_of,
    expected,
    function,
    installed,
    model_of,
    plain,
)
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


CHOSEN = [
    "flash-attn 2: causal",
    "flash-attn 2: alibi",
    "flash-attn 2: shared keys",
    "flash-attn 2: varlen",
    "flash-attn 2: varlen of a batch",
    "flash-attn 3: window",
    "flash-attn 4: plain",
    "xFormers: bias",
    "xFormers: one head",
    "xFormers: groups",
    "xFormers: BlockDiagonalCausalMask",
]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("name", CHOSEN)
def test_maps_of_probability_times_gradient(name, replace):
    case = TABLE[name]
    model, x = model_of(case)
    p, out = expected(case, model, x)
    p.retain_grad()
    score = (out * torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)).sum()
    (grad,) = torch.autograd.grad(score, p)
    patched = attnpatch.patched(model, replace_kernels=replace)
    with patched, attnpatch.capture(model, blocks=BLOCKS, weighting="gradient") as maps:
        found = model(x)
        (found * torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)).sum().backward()
    assert not maps.left_out
    wanted = blocks_of((p * grad).detach())
    assert (maps["attn"].mass.squeeze(1).double() - wanted).abs().max() < 1e-6 * max(
        1.0, float(wanted.abs().max())
    )


@pytest.mark.parametrize("name", ["flash-attn 2: softcap", "flash-attn 4: sinks"])
def test_gradient_maps_of_other_scores_are_refused(name):
    model, x = model_of(TABLE[name])
    with attnpatch.capture(model, blocks=BLOCKS, weighting="gradient") as maps:
        model(x).sum().backward()
    assert "probability times gradient is computed for plain softmax only" in maps.left_out["attn"]


@pytest.mark.parametrize("name", ["flash-attn 2: causal", "flash-attn 2: varlen", "flash-attn 4: sinks"])
def test_a_kernel_that_computes_something_else_is_in_no_map(name):
    from dense_attention import broken

    model, x = model_of(TABLE[name])
    broken["factor"] = 1.05
    try:
        with attnpatch.capture(model, blocks=BLOCKS) as maps, torch.no_grad():
            captured = model(x)
        assert torch.equal(captured, model(x))
    finally:
        broken["factor"] = 1.0
    assert "differs by" in maps.left_out["attn"] and "as its arguments describe them" in maps.left_out["attn"]


def test_dropout_is_in_no_map():
    case = Case("flash_attn.flash_attn_func", plain(dropout_p=0.5))
    model, x = model_of(case)
    with attnpatch.capture(model, blocks=BLOCKS) as maps, torch.no_grad():
        model(x)
    assert "called with dropout" in maps.left_out["attn"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["flash-attn 2: causal", "flash-attn 2: alibi", "flash-attn 4: sinks", "xFormers: bias"]
)
def test_narrow_dtypes(name, dtype):
    """Maps are those of the narrow query and key; replaced results are as near to float64 as the kernel's own."""
    case = TABLE[name]
    if case.bias is not None:
        narrow = case.bias.to(dtype)
        case = dataclasses.replace(case, call=plain(attn_bias=narrow), bias=narrow)
    model, x = model_of(case, dtype)
    with torch.no_grad():
        p, _ = expected(case, model, x)
        native = model(x)
        with attnpatch.capture(model, blocks=BLOCKS) as maps:
            assert torch.equal(model(x), native)
        with attnpatch.patched(model, replace_kernels=True):
            replaced = model(x)
    assert not maps.left_out
    assert (maps["attn"].mass.squeeze(1).double() - blocks_of(p)).abs().max() < 1e-5
    off = (replaced.double() - native.double()).abs().max() / native.double().abs().max()
    assert off < {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]


def test_autocast_does_not_narrow_a_replaced_kernel():
    """A kernel gets the tensors as they are, also under autocast."""
    model, x = model_of(TABLE["xFormers: plain"], torch.float32)
    q, k, v = model.attn.parts(x)

    class Alone(torch.nn.Module):
        def forward(self, q, k, v):
            return function("xformers.ops.memory_efficient_attention")(q, k, v)

    alone = Alone()
    native = alone(q, k, v)
    with attnpatch.patched(alone, sites=[""], replace_kernels=True), torch.autocast("cpu", torch.bfloat16):
        found = alone(q, k, v)
    assert found.dtype == torch.float32
    assert (found - native).abs().max() < 1e-5


def test_a_kernel_that_runs_out_of_memory_is_computed_by_torch():
    case = TABLE["flash-attn 2: varlen causal"]
    model, x = model_of(case)
    with torch.no_grad():
        _, out = expected(case, model, x)
    import flash_attn.flash_attn_interface as package

    attnpatch.apply(model, min_tokens=1)

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 32.00 GiB")

    kept, package.of_packed = package.of_packed, full
    try:
        found = model(x)
        with pytest.raises(torch.OutOfMemoryError), attnpatch.patched(model, retry_on_oom=False):
            model(x)
    finally:
        package.of_packed = kept
    assert (found - out).abs().max() < 1e-6
    assert "retried" in str(attnpatch.report(model)) and attnpatch.report(model).totals["retried"] == 1
    attnpatch.remove(model)


@pytest.mark.parametrize(
    "name", ["flash-attn 2: causal", "flash-attn 2: softcap", "flash-attn 4: sinks", "xFormers: bias"]
)
def test_scores_of_tokens(name):
    case = TABLE[name]
    model, x = model_of(case)
    with torch.no_grad():
        p, _ = expected(case, model, x)
        with attnpatch.token_scores(model, window=8, per="head") as scores:
            model(x)
    assert (scores[0].double() - p[:, :, -8:].sum(2)).abs().max() < 1e-5


def test_a_call_outside_a_patched_model_goes_straight_through():
    from dense_attention import calls

    model, x = model_of(TABLE["flash-attn 2: plain"])
    with attnpatch.patched(model, replace_kernels=True):
        q, k, v = model.attn.parts(x)
        calls.clear()
        function("flash_attn.flash_attn_func")(q, k, v)
        assert calls == ["flash_attn_func"]
        model(x)
        assert calls == ["flash_attn_func"]


def test_a_compiled_module_calls_the_kernel():
    from dense_attention import calls

    model, x = model_of(TABLE["flash-attn 2: causal"], torch.float32)
    native = model(x)
    with attnpatch.patched(model, replace_kernels=True):
        calls.clear()
        compiled = torch.compile(model, backend="eager")
        assert (compiled(x) - native).abs().max() < 1e-6


def test_threads_have_their_own_maps():
    case = TABLE["flash-attn 2: causal"]
    models = [model_of(case)[0] for _ in range(4)]
    inputs = [torch.randn(2, 24, 32, dtype=torch.float64) for _ in models]
    found = {}

    def run(number):
        with attnpatch.capture(models[number], blocks=BLOCKS) as maps, torch.no_grad():
            models[number](inputs[number])
        found[number] = maps["attn"].mass.squeeze(1).double()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(models))]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    for number, model in enumerate(models):
        with torch.no_grad():
            wanted = blocks_of(expected(case, model, inputs[number])[0])
        assert (found[number] - wanted).abs().max() < 1e-6


EARLY = """
import sys
sys.path.insert(0, {folder!r})
from flash_attn import flash_attn_func
import flash_attn.flash_attn_interface as interface
import torch, attnpatch

class Attention(torch.nn.Module):
    def forward(self, x):
        q = x.unflatten(-1, (2, 8))
        return flash_attn_func(q, q, q, causal=True).flatten(-2)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()
    def forward(self, x):
        return self.attn(x)

native, model, x = [flash_attn_func], Model(), torch.randn(1, 12, 16)
before = model(x)
attnpatch.apply(model)
assert flash_attn_func is interface.flash_attn_func is not native[0]
import inspect
assert inspect.signature(flash_attn_func) == inspect.signature(native[0])
with attnpatch.capture(model, blocks=attnpatch.Blocks.fixed(4)) as maps:
    assert torch.equal(model(x), before)
print(maps.left_out, maps["attn"].mass.shape)
# A package that is imported after the first patch.
import xformers.ops
from attnpatch.rows.kernels.table import kernel_of
assert kernel_of(xformers.ops.memory_efficient_attention) is not None
assert kernel_of(flash_attn_func) is not None
"""


def test_a_function_that_was_imported_before_is_seen():
    script = EARLY.format(folder=str(FOLDER))
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "{}" in found.stdout


def test_readers_have_the_signatures_of_the_packages():
    for name, readers in READERS.items():
        if name.partition(".")[0] not in PACKAGES:
            continue
        module = importlib.import_module(name)
        for function_name, reader in readers.items():
            given = inspect.signature(getattr(module, function_name)).parameters.values()
            read = inspect.signature(reader).parameters.values()
            assert [(one.name, one.kind, one.default) for one in read] == [
                (one.name, one.kind, one.default) for one in given
            ], function_name


class Mixer(torch.nn.Module):
    """Attention that no name tells."""

    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)

    def forward(self, x):
        from flash_attn import flash_attn_qkvpacked_func

        return flash_attn_qkvpacked_func(self.qkv(x).unflatten(-1, (3, 4, 8)), causal=True).flatten(-2)


def test_a_module_that_calls_a_kernel_is_recognised():
    from dense_attention import probabilities

    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(32, 32), Mixer()).double(), torch.randn(2, 24, 32).double()
    with attnpatch.capture(model, blocks=BLOCKS) as maps, torch.no_grad():
        model(x)
    with torch.no_grad():
        q, k, _ = model[1].qkv(model[0](x)).unflatten(-1, (3, 4, 8)).unbind(2)
        p = [probabilities(q[b], k[b], True, -1, -1, True, 0.0, 8**-0.5)[0] for b in range(2)]
    assert not maps.left_out
    assert (maps["*"].mass.squeeze(1).double() - blocks_of(torch.stack(p))).abs().max() < 1e-6


def test_a_short_call_of_a_missing_or_unwanted_kernel_is_replaced_too():
    """``min_tokens`` is about memory, and says nothing about kernels."""
    from dense_attention import calls

    model, x = model_of(TABLE["flash-attn 2: causal"])
    native = model(x)
    calls.clear()
    with attnpatch.patched(model, replace_kernels=True, min_tokens=10_000):
        assert (model(x) - native).abs().max() < 1e-6
    assert not calls
