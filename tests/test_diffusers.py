"""diffusers: its attention processors and some of its models, forced by rows, to the last bit and undone exactly.

All of its model classes: ``python -m tests.compat --diffusers``.
"""

import pytest
import torch
from compat import by_rows_diffusers, models_diffusers, recipe, sweep
from test_exact import snapshot
from torch import nn

import attnpatch

diffusers = pytest.importorskip("diffusers")

MODELS = [
    "UNet2DConditionModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "PixArtTransformer2DModel",
    "WanTransformer3DModel",
    "LTXVideoTransformer3DModel",
    "CogVideoXTransformer3DModel",
    "SanaTransformer2DModel",
    "QwenImageTransformer2DModel",
    "ZImageTransformer2DModel",
    "HunyuanVideoTransformer3DModel",
    "AutoencoderKL",
]
ROWS = [7, None]


def agree(got: torch.Tensor, native: torch.Tensor, rows: int | None) -> bool:
    """The same bits, or the same to rounding where the test says how many rows.

    The CPU's matrix library takes another kernel for few rows of small heads: with AVX-512, ``torch.baddbmm`` itself, of 7
    of 77 rows with 8 channels, rounds differently. What attnpatch chooses is larger.
    """
    return torch.equal(got, native) if rows is None else torch.allclose(got, native, rtol=1e-5, atol=5e-6)


def assert_by_rows(model: nn.Module, run, native_calls: int = 0, few_round: bool = False) -> None:
    """The same bits by rows, in every call of every site that ran; nothing left behind.

    Args:
        few_round: Whether few rows may round differently.
    """
    native, before = run(), snapshot(model)
    for rows in ROWS:
        with attnpatch.patched(model, mode="always", rows=rows):
            got = run()
            report = attnpatch.report(model)
        assert len(got) == len(native)
        loose = rows if few_round else None
        assert all(agree(*pair, loose) for pair in zip(got, native, strict=True)), f"rows={rows}\n{report}"
        assert report.totals["by_rows"] > 0 and report.totals["native"] == native_calls, report
        assert report.totals["materialised"] == 0, report
    assert snapshot(model) == before


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    model = models_diffusers.build(name)
    inputs, _ = by_rows_diffusers.first_that_runs(model, name)
    assert_by_rows(model, lambda: sweep.run(model, inputs))


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "AutoencoderKL"])
@pytest.mark.parametrize("processor", ["AttnProcessor", "AttnProcessor2_0", "sliced"])
def test_processors_of_models(name, processor):
    """``baddbmm``, SDPA and attention slicing; the mid block of the autoencoder has 4-D inputs and one head."""
    from diffusers.models import attention_processor

    model = models_diffusers.build(name)
    if processor == "sliced":
        for module in model.modules():
            if isinstance(module, attention_processor.Attention):
                module.set_attention_slice(1)
    else:
        model.set_attn_processor(getattr(attention_processor, processor)())
    inputs, _ = by_rows_diffusers.first_that_runs(model, name)
    assert_by_rows(model, lambda: sweep.run(model, inputs))


def test_middle_of_autoencoder_has_one_head():
    """512 channels in one head over a 4-D input, as the autoencoders of released pipelines."""
    from diffusers.models.attention_processor import Attention

    attention = Attention(
        512,
        heads=1,
        dim_head=512,
        norm_num_groups=32,
        residual_connection=True,
        bias=True,
        _from_deprecated_attn_block=True,
    )
    model = nn.Sequential(recipe.randomise(attention).eval())
    hidden_states = recipe.floats(1, 512, 12, 13)
    with torch.no_grad():
        assert_by_rows(model, lambda: [model(hidden_states)])


# --------------------------------------------------------------------------------------------- every processor

_PLAIN = {"query_dim": 32, "heads": 4, "dim_head": 8, "bias": True}
_CROSS = {**_PLAIN, "cross_attention_dim": 24}
_ADDED = {**_PLAIN, "added_kv_proj_dim": 24, "norm_num_groups": 8}
_JOINT = {**_PLAIN, "added_kv_proj_dim": 32, "context_pre_only": False, "qk_norm": "rms_norm"}
_CUSTOM = {"hidden_size": 32, "cross_attention_dim": 24}
_ADAPTER = {**_CUSTOM, "num_tokens": (4,), "scale": 0.7}
TEXT = recipe.floats(2, 19, 24, seed=3)
SAME_WIDTH = recipe.floats(2, 19, 32, seed=3)
IMAGES = [recipe.floats(2, 1, 4, 24, seed=4)]

# Processor, its arguments, those of the attention, what attends to what, and whether scores are asked for whole.
PROCESSORS = [
    ("AttnProcessor", {}, _CROSS, TEXT),
    ("AttnProcessor2_0", {}, _CROSS, TEXT),
    ("AttnProcessor", {}, {**_PLAIN, "upcast_attention": True, "upcast_softmax": True}, None),
    ("SlicedAttnProcessor", {"slice_size": 2}, _CROSS, TEXT),
    ("AttnAddedKVProcessor", {}, _ADDED, TEXT),
    ("AttnAddedKVProcessor2_0", {}, _ADDED, TEXT),
    ("SlicedAttnAddedKVProcessor", {"slice_size": 2}, _ADDED, TEXT),
    ("JointAttnProcessor2_0", {}, _JOINT, SAME_WIDTH),
    ("PAGJointAttnProcessor2_0", {}, _JOINT, SAME_WIDTH),
    ("FusedAttnProcessor2_0", {}, _PLAIN, None),
    ("CustomDiffusionAttnProcessor", _CUSTOM, _CROSS, TEXT),
    ("CustomDiffusionAttnProcessor2_0", _CUSTOM, _CROSS, TEXT),
    ("IPAdapterAttnProcessor", _ADAPTER, _CROSS, (TEXT, IMAGES)),
    ("IPAdapterAttnProcessor2_0", _ADAPTER, _CROSS, (TEXT, IMAGES)),
    ("PAGIdentitySelfAttnProcessor2_0", {}, _PLAIN, None),
    ("HunyuanAttnProcessor2_0", {}, {**_PLAIN, "qk_norm": "layer_norm"}, None),
]


@pytest.mark.parametrize(("name", "fields", "attention", "context"), PROCESSORS)
def test_processors(name, fields, attention, context):
    from diffusers.models import attention_processor

    torch.manual_seed(0)
    module = attention_processor.Attention(**attention)
    processor = getattr(attention_processor, name)(**fields)
    if name.startswith("Fused"):
        module.fuse_projections()
    module.set_processor(processor)
    model = nn.Sequential(recipe.randomise(module).eval())
    # Added keys come with images, 4-D.
    shape = (2, 32, 7, 11) if "AddedKV" in name else (2, 77, 32)
    hidden_states = recipe.floats(*shape)

    def run():
        with torch.no_grad():
            return sweep.tensors(module(hidden_states, encoder_hidden_states=context))

    # These multiply by ``torch.baddbmm``.
    assert_by_rows(model, run, few_round=not name.endswith("2_0"))


def test_scaled_adapters():
    """A LoRA adapter at some scale, through the processor's keyword arguments."""
    pytest.importorskip("peft")
    from peft import LoraConfig

    model = models_diffusers.build("UNet2DConditionModel")
    model.add_adapter(
        LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    )
    inputs, _ = by_rows_diffusers.first_that_runs(model, "UNet2DConditionModel")
    inputs["cross_attention_kwargs"] = {"scale": 0.5}
    native = sweep.run(model, inputs)
    with attnpatch.patched(model, mode="always", rows=7):
        got = sweep.run(model, inputs)
        totals = attnpatch.report(model).totals
    assert all(map(torch.equal, got, native))
    assert totals["by_rows"] > 0 and totals["native"] == totals["materialised"] == 0


def test_backends_that_are_no_torch_functions(monkeypatch):
    """An attention back end of another library stays as it is, and the report shows a native call."""
    from diffusers.models import attention_dispatch

    name = attention_dispatch.AttentionBackendName.NATIVE
    backends = attention_dispatch._AttentionBackendRegistry._backends
    native = backends[name]

    def foreign(query, key, value, *args, **kwargs):
        # As a kernel that is not torch's: torch sees no function of its own.
        with torch._C.DisableTorchFunction():
            return native(query, key, value, *args, **kwargs)

    monkeypatch.setitem(backends, name, foreign)
    model = models_diffusers.build("FluxTransformer2DModel")
    inputs, expected = by_rows_diffusers.first_that_runs(model, "FluxTransformer2DModel")
    with attnpatch.patched(model, mode="always", rows=7):
        got = sweep.run(model, inputs)
        totals = attnpatch.report(model).totals
    assert all(map(torch.equal, got, expected))
    assert totals["native"] == 2 and totals["by_rows"] == 0
