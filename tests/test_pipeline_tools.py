"""Pipelines with what diffusers offers beside attnpatch: switched on before the patch and after it, and off again."""

import accelerate
import numpy as np
import pytest
import torch
from pipelines import build, modules, run
from test_pipelines import ROWS, by_rows

import attnpatch


def denoiser(pipe):
    return "unet" if hasattr(pipe, "unet") else "transformer"


def sequential_offload(pipe):
    """As ``enable_sequential_cpu_offload`` does it, whose "cpu:0" accelerate cannot move parameters to."""
    for name, part in modules(pipe).items():
        if name not in pipe._exclude_from_cpu_offload:
            accelerate.cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)


def load_lora(pipe):
    pytest.importorskip("peft")
    name = denoiser(pipe)
    weights = {}
    for path, module in getattr(pipe, name).named_modules():
        if path.endswith(("to_q", "to_v")):
            generator = torch.Generator().manual_seed(len(weights))
            weights[f"{name}.{path}.lora_A.weight"] = torch.randn(4, module.in_features, generator=generator)
            weights[f"{name}.{path}.lora_B.weight"] = torch.randn(module.out_features, 4, generator=generator)
    pipe.load_lora_weights(weights)


def compiled(pipe):
    setattr(pipe, denoiser(pipe), torch.compile(getattr(pipe, denoiser(pipe)), backend="aot_eager"))


def of_denoiser(method, *args, **kwargs):
    return lambda pipe: getattr(getattr(pipe, denoiser(pipe)), method)(*args, **kwargs)


def of_pipe(method, **kwargs):
    return lambda pipe: getattr(pipe, method)(**kwargs)


# On, and off again where there is a way.
TOOLS = {
    "model_cpu_offload": (of_pipe("enable_model_cpu_offload", device="cpu"), of_pipe("remove_all_hooks")),
    "sequential_cpu_offload": (sequential_offload, of_pipe("remove_all_hooks")),
    "attention_slicing": (of_pipe("enable_attention_slicing"), of_pipe("disable_attention_slicing")),
    "fused_projections": (of_denoiser("fuse_qkv_projections"), of_denoiser("unfuse_qkv_projections")),
    "backend": (of_denoiser("set_attention_backend", "native"), of_denoiser("reset_attention_backend")),
    "lora": (load_lora, of_pipe("unload_lora_weights")),
    "compile": (compiled, None),
    "compile_in_place": (of_denoiser("compile", backend="aot_eager"), None),
    "compile_blocks": (of_denoiser("compile_repeated_blocks", backend="aot_eager"), None),
}
CASES = [
    pytest.param(
        name, tool, marks=[pytest.mark.long] if tool in ("compile_in_place", "compile_blocks") else []
    )
    for name in ("sd15", "flux")
    for tool in TOOLS
    if not (name == "sd15" and tool.startswith("compile"))
]


def structure(pipe):
    """Classes and attributes of every module; offloading makes parameters anew, so their identity says nothing."""
    return {
        name: [
            (path, type(module), sorted(vars(module)), type(vars(module).get("forward")))
            for path, module in part.named_modules()
        ]
        for name, part in modules(pipe).items()
    }


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch._dynamo.reset()


def agree(got, expected, tool):
    """The same bits. Slicing goes by few heads at a time through ``torch.baddbmm``, and with AVX-512 that rounds few rows of
    small heads differently from all of them (see ``test_diffusers.agree``): the same to rounding.
    """
    if tool == "attention_slicing":
        return np.allclose(got, expected, rtol=0, atol=5e-6)
    return np.array_equal(got, expected)


@pytest.mark.parametrize(("name", "tool"), CASES)
def test_with(name, tool):
    on, off = TOOLS[tool]
    plain = build(name)
    native = run(plain, name)
    on(plain)
    expected = run(plain, name)
    assert tool != "lora" or not np.array_equal(expected, native)
    with_tool = structure(plain)

    first = build(name)
    on(first)
    attnpatch.apply(first, **ROWS)
    assert agree(run(first, name), expected, tool)
    # What is compiled keeps its own attention.
    parts = set(modules(first)) - ({denoiser(first)} if tool.startswith("compile") else set())
    assert by_rows(first) == parts
    report = attnpatch.report(first)
    assert {path.partition(".")[0] for path in report.compiled} == set(modules(first)) - parts
    assert ("compiled, so its attention is not patched and not counted: transformer" in str(report)) == (
        tool.startswith("compile")
    )
    attnpatch.remove(first)
    assert structure(first) == with_tool
    assert agree(run(first, name), expected, tool)

    second = attnpatch.apply(build(name), **ROWS)
    on(second)
    assert agree(run(second, name), expected, tool)
    assert by_rows(second) == parts
    if off is not None:
        off(second)
        off(plain)
        expected = run(plain, name)
        assert agree(run(second, name), expected, tool)
    attnpatch.remove(second)
    assert structure(second) == structure(plain)
    assert agree(run(second, name), expected, tool)


def test_flex_of_a_pipeline():
    """FlexAttention is an operator of its own, whose calls are seen; uncompiled it holds all scores, so it goes by rows."""
    pipe = build("flux")
    pipe.transformer.set_attention_backend("flex")  # for all models of the process
    try:
        native = run(pipe, "flux")
        with attnpatch.patched(pipe.transformer):
            assert np.array_equal(run(pipe, "flux"), native)
        with attnpatch.patched(pipe.transformer, mode="always"):
            np.testing.assert_allclose(run(pipe, "flux"), native, atol=1e-4)
            report = attnpatch.report(pipe.transformer)
    finally:
        pipe.transformer.set_attention_backend("native")
    assert report.totals["by_rows"] > 0 and report.totals["fused"] == 0
    assert not any(site.unseen for site in report.sites)
