"""What people combine attnpatch with: one table of tools, every order of putting on and taking off.

Each case is forced by rows, equal to the same steps without attnpatch, and undone exactly.
"""

import dataclasses
import functools
import inspect
import pathlib
import shutil
from collections.abc import Callable

import pytest
import torch
import zoo
from torch import nn
from traces import described, first_difference

import attnpatch

NO_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
IDS = zoo.tokens(33, batch=2)
LAYERS = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}


def small_llama(implementation: str = "eager") -> nn.Module:
    return zoo.BY_NAME["llama"].build(implementation).requires_grad_(False)


def logits(model: nn.Module) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {"logits": model(IDS).logits}


@dataclasses.dataclass(frozen=True)
class Tool:
    """Something people use on a model.

    Attributes:
        name: What the test is called.
        put: ``put(model, folder)`` puts it on and gives the model to use from now on.
        take: ``take(model)`` takes it off again and gives the model to use; ``None``: it stays.
        build: The model, the same every time.
        run: ``run(model)`` gives tensors by name.
        by_rows: Whether attention goes by rows while the tool is on.
    """

    name: str
    put: Callable[[nn.Module, pathlib.Path], nn.Module]
    take: Callable[[nn.Module], nn.Module] | None = None
    build: Callable[[], nn.Module] = small_llama
    run: Callable[[nn.Module], dict[str, torch.Tensor]] = logits
    by_rows: bool = True


# --------------------------------------------------------------------------------------------------- accelerate


def attentions(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ == "LlamaAttention"]


def align(model: nn.Module, _: pathlib.Path, offload: bool, append: bool = False) -> nn.Module:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for module in attentions(model):
        for _ in range(1 + append):
            hook = AlignDevicesHook("cpu", offload=offload, place_submodules=offload, io_same_device=True)
            add_hook_to_module(module, hook, append=append)
    return model


def unhook(model: nn.Module) -> nn.Module:
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    return model


def cpu_offload(model: nn.Module, _: pathlib.Path) -> nn.Module:
    import accelerate

    return accelerate.cpu_offload(model, "cpu", offload_buffers=True)


def disk_offload(model: nn.Module, folder: pathlib.Path) -> nn.Module:
    import accelerate

    accelerate.disk_offload(model, folder / "offloaded", execution_device="cpu")
    return model


def dispatch(model: nn.Module, folder: pathlib.Path) -> nn.Module:
    import accelerate

    places = {**LAYERS, "model.rotary_emb": "cpu", "lm_head": "disk"}
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=folder / "offloaded", force_hooks=True
    )


ACCELERATE = [
    Tool("hook", functools.partial(align, offload=False), unhook),
    Tool("hook_offloading", functools.partial(align, offload=True), unhook),
    Tool("hooks_appended", functools.partial(align, offload=False, append=True), unhook),
    Tool("cpu_offload", cpu_offload, unhook),
    Tool("cpu_offload_sdpa", cpu_offload, unhook, functools.partial(small_llama, "sdpa")),
    Tool("disk_offload", disk_offload, unhook),
    Tool("dispatch_model", dispatch, unhook),
]

# --------------------------------------------------------------------------------------------------------- peft


def lora(model: nn.Module, _: pathlib.Path, merge: bool = False) -> nn.Module:
    import peft

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
        )
        model = peft.get_peft_model(model, config).eval()
    if merge:
        model.merge_adapter()
    return model


def unload(model: nn.Module, merged: bool = False) -> nn.Module:
    if merged:
        model.unmerge_adapter()
    return model.unload()


def adapter(model: nn.Module, _: pathlib.Path) -> nn.Module:
    import peft

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.add_adapter(peft.LoraConfig(r=4, target_modules=["k_proj"], init_lora_weights=False))
    return model.eval()


PEFT = [
    Tool("lora", lora, unload),
    Tool("lora_merged", functools.partial(lora, merge=True), functools.partial(unload, merged=True)),
    Tool("lora_merge_and_unload", lora, lambda model: model.merge_and_unload()),
    Tool("add_adapter", adapter),
]

# ------------------------------------------------------------------------------------------------- bitsandbytes


def quantised(model: nn.Module, _: pathlib.Path, bits: int) -> nn.Module:
    """As transformers replaces them, layer by layer, so that it can be done to a patched model too."""
    import bitsandbytes as bnb

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            # On CPU a row of 4-bit weights has to be made of whole blocks of 64.
            if not isinstance(layer, nn.Linear) or name == "lm_head" or layer.in_features % 64:
                continue
            shape = (layer.in_features, layer.out_features)
            if bits == 4:
                made = bnb.nn.Linear4bit(*shape, bias=False, quant_type="nf4", compute_dtype=torch.float32)
                made.weight = bnb.nn.Params4bit(layer.weight.clone(), requires_grad=False, quant_type="nf4")
            else:
                made = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=6.0)
                made.weight = bnb.nn.Int8Params(layer.weight.clone(), requires_grad=False)
            setattr(parent, name, made.to("cpu").eval())
            made.replaced = (layer,)  # in a tuple, where torch does not count it as a part of the model
    return model


def replaced(model: nn.Module) -> nn.Module:
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if hasattr(layer, "replaced"):
                setattr(parent, name, layer.replaced[0])
    return model


QUANTISED = [
    Tool("bitsandbytes_8bit", functools.partial(quantised, bits=8), replaced),
    Tool("bitsandbytes_4bit", functools.partial(quantised, bits=4), replaced),
]

# ------------------------------------------------------------------------------------------------------ compile


def compiled(model: nn.Module, _: pathlib.Path, **options) -> nn.Module:
    torch.compiler.reset()
    return torch.compile(model, **options)


def compiled_forward(model: nn.Module, _: pathlib.Path) -> nn.Module:
    """As transformers' guides do it: the compiled function stands in the instance."""
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    return model


def forward_of_class(model: nn.Module) -> nn.Module:
    del model.forward
    return model


def compiled_parts(model: nn.Module, _: pathlib.Path) -> nn.Module:
    """Only what is not attention, and a projection inside the attention, where attnpatch watches."""
    torch.compiler.reset()
    for layer in model.model.layers:
        layer.mlp.compile(backend="eager", fullgraph=True)
        layer.self_attn.q_proj.compile(backend="eager")
    return model


def uncompiled_parts(model: nn.Module) -> nn.Module:
    for module in model.modules():
        module._compiled_call_impl = None
    return model


def original(model: nn.Module) -> nn.Module:
    return model._orig_mod


def core(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return (query @ key.transpose(-1, -2) / 4).softmax(-1) @ value


class CoreAttention(nn.Module):
    """Its attention proper is a function, which people compile on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.core = core

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.core(x, x, x)


def two_cores() -> nn.Module:
    return nn.Sequential(CoreAttention(), CoreAttention())


def on_floats(model: nn.Module) -> dict[str, torch.Tensor]:
    return {"output": model(zoo.floats(2, 4, 33, 16))}


def compiled_core(model: nn.Module, _: pathlib.Path, backend: str) -> nn.Module:
    torch.compiler.reset()
    for module in model:
        module.core = torch.compile(core, backend=backend, fullgraph=True)
    return model


def plain_core(model: nn.Module) -> nn.Module:
    for module in model:
        module.core = core
    return model


COMPILED = [
    # A compiled graph has no seam to cut at: it is the host's own, and rows begin again where it ends.
    Tool("compile", functools.partial(compiled, backend="eager"), original, by_rows=False),
    Tool("compile_fullgraph", functools.partial(compiled, backend="eager", fullgraph=True), original, by_rows=False),
    Tool("compiled_forward", compiled_forward, forward_of_class, by_rows=False),
    Tool("compiled_parts", compiled_parts, uncompiled_parts),
    # That backend runs torch's own functions, which are seen.
    Tool("compiled_core", functools.partial(compiled_core, backend="eager"), plain_core, two_cores, on_floats),
    Tool("inductor_core", functools.partial(compiled_core, backend="inductor"), plain_core, two_cores, on_floats, False),
    Tool("inductor", functools.partial(compiled, backend="inductor"), original, two_cores, on_floats, False),
]  # fmt: skip

TOOLS = [*ACCELERATE, *PEFT, *QUANTISED, *COMPILED]


def orders() -> list:
    found = []
    for tool in TOOLS:
        for first in ("patch", "tool"):
            for last in ("patch", "tool") if tool.take else ("tool",):
                marks = [NO_COMPILER] if "inductor" in tool.name else []
                # Each order with "compile", "compiled_forward" and "compiled_parts"; of these, those where one thing
                # is taken off after the other was put on.
                if tool.name in ("compile_fullgraph", "inductor_core", "inductor") and first == last:
                    marks.append(pytest.mark.long)
                name = f"{tool.name}-{first}_first-{last}_stays"
                found.append(pytest.param(tool, first, last, id=name, marks=marks))
    return found


class Sequence:
    """One model through the steps, with attnpatch or without."""

    def __init__(self, tool: Tool, folder: pathlib.Path, patches: bool) -> None:
        self.tool, self.folder, self.patches = tool, folder, patches
        self.model = tool.build()
        folder.mkdir()
        # transformers puts hooks of its own in at the first call, patched or not.
        self.results = [tool.run(self.model)]

    def put(self, what: str) -> None:
        if what == "tool":
            self.model = self.tool.put(self.model, self.folder)
        elif self.patches:
            self.patched = attnpatch.apply(self.model, mode="always", rows=7)

    def take(self, what: str) -> None:
        if what == "tool":
            self.model = self.tool.take(self.model)
        elif self.patches:
            attnpatch.remove(self.patched)

    def run(self) -> int:
        """Attention calls that went by rows."""
        before = self.by_rows()
        self.results.append(self.tool.run(self.model))
        # Hosts read it: generate decides by it what to pass.
        self.signatures = [str(inspect.signature(module.forward)) for module in self.model.modules()]
        return self.by_rows() - before

    def by_rows(self) -> int:
        from attnpatch.patching.patch import patch_of

        patched = getattr(self, "patched", None)
        if patched is None or patch_of(patched) is None:
            return 0
        return attnpatch.report(patched).totals["by_rows"]


@pytest.mark.parametrize(("tool", "first", "stays"), orders())
def test_tool(tool, first, stays, tmp_path):
    """Put on in this order, and taken off in that: by rows, the same bits, and no trace."""
    other = {"patch": "tool", "tool": "patch"}
    plain = Sequence(tool, tmp_path / "plain", patches=False)
    mine = Sequence(tool, tmp_path / "patched", patches=True)

    def both(step: str, *args: str) -> int:
        getattr(plain, step)(*args)
        return getattr(mine, step)(*args)

    def compare() -> None:
        assert plain.signatures == mine.signatures
        for step, (got, expected) in enumerate(zip(mine.results, plain.results, strict=True)):
            for name, tensor in expected.items():
                assert torch.equal(got[name], tensor), f"{name} differs in run {step}"

    both("put", first)
    both("put", other[first])
    assert (both("run") == 2) == tool.by_rows
    both("take", other[stays])
    assert (both("run") == 2) == (stays == "patch")
    compare()
    # What torch compiled from a patched forward goes on naming it; called through it or not is the same.
    if stays == "tool" and tool not in COMPILED:
        assert not first_difference(described(mine.model), described(plain.model))
    if stays == "patch" or tool.take:
        both("take", stays)
        both("run")
        compare()
        assert not first_difference(described(mine.model), described(plain.model))


@pytest.mark.parametrize("tool", [*ACCELERATE, *PEFT], ids=[tool.name for tool in [*ACCELERATE, *PEFT]])
def test_captured(tool, tmp_path):
    """A capture of a model with a tool on: the map of the same model without attnpatch's patch around it, no trace."""
    plain = tool.put(tool.build(), tmp_path / "plain")
    model = tool.put(tool.build(), tmp_path / "captured")
    native = tool.run(plain)["logits"]
    tool.run(model)
    with attnpatch.capture(model, attnpatch.Blocks.fixed(8)) as maps:
        assert torch.equal(tool.run(model)["logits"], native)
    assert not first_difference(described(model), described(plain))
    weights = plain(IDS, output_attentions=True).attentions if tool.build is small_llama else None
    if weights is not None:
        layer = weights[1].double().mean(1)  # over heads
        first = layer[:, :8, :8].sum(-1).mean(-1)
        got = torch.as_tensor(maps.block_map.to_numpy()[:, 1, 0, 0], dtype=torch.float64)
        torch.testing.assert_close(got, first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("put", [compiled, compiled_forward], ids=["module", "forward"])
def test_a_compiled_model_is_left_alone_and_named(put, tmp_path):
    """No call of it is counted, it is compiled anew once at most, and the report says why."""
    model = small_llama()
    logits(model)
    put(model, tmp_path) if put is compiled_forward else model.compile(backend="eager")
    native = logits(model)["logits"]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    patched = attnpatch.apply(model, mode="always", rows=7)
    for _ in range(3):
        assert torch.equal(logits(model)["logits"], native)
    report = attnpatch.report(patched)
    assert not any(report.totals.values())
    assert report.compiled == ("",)
    assert "not counted: the model" in str(report)
    # Once where the compiler has looked at the forward of the class, which is another now.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + (put is compiled)
    attnpatch.remove(patched)
