"""One line for every feature, with the releases of torch and its hosts that are installed: ``ok``, or what failed.

    python -m tests.versions.smoke [--expect FEATURE ...]

Models are built from configs whose names every supported release knows. A warning of attnpatch counts as a failure: it
says that a feature is off. Exit code 1 if other features fail than those given by ``--expect``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # what tests share

import torch
from live import Live
from torch import nn
from torch.utils.checkpoint import checkpoint

import attnpatch
from attnpatch.errors import AttnpatchWarning

PACKAGES = (
    "torch",
    "transformers",
    "diffusers",
    "numpy",
    "wrapt",
    "safetensors",
    "accelerate",
    "bitsandbytes",
)
TOKENS = 320
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0, "max_position_embeddings": 1024,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama": {**SIZES, "num_key_value_heads": 2},
    "Mistral": {**SIZES, "num_key_value_heads": 2, "sliding_window": 100},
    "Bert": SIZES,
    "T5": {
        "vocab_size": 97, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
        "decoder_start_token_id": 0,
    },
}  # fmt: skip

FEATURES: dict[str, Callable[[], None]] = {}


class Absent(Exception):
    """A package that the feature needs is not installed."""


def feature(name: str, *arguments: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def add(check: Callable[..., None]) -> Callable[..., None]:
        FEATURES[name] = lambda: check(*arguments)
        return check

    return add


def check(condition: Any, what: str) -> None:
    if not condition:
        raise AssertionError(what)


# ------------------------------------------------------------------------------------------------------------- models


def model_of(kind: str, attention: str, head: str = "Model") -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**CONFIGS[kind], attn_implementation=attention)
    # Some releases read the implementation from a config only through this argument of their own.
    model = getattr(transformers, f"{kind}{head}")._from_config(config, attn_implementation=attention)
    return model.eval()


def inputs_of(kind: str, tokens: int = TOKENS, padding: bool = True) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 97, (2, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[1, :9] = 0 if padding else 1
    return {"input_ids": ids, "attention_mask": mask, **({"decoder_input_ids": ids} if kind == "T5" else {})}


@torch.no_grad()
def same_bits(model: nn.Module, run: Callable[[], torch.Tensor]) -> None:
    """The same bits by rows, and every attention went by rows."""
    native = run()
    with attnpatch.patched(model, mode="always"):
        got = run()
        report = attnpatch.report(model)
    check(report.totals["by_rows"] > 0, f"nothing ran by rows:\n{report}")
    sites = [site.counts for site in report.sites if site.why != "masks"]  # masks have lines of their own
    check(not any(site["native"] or site["materialised"] for site in sites), f"not all by rows:\n{report}")
    check(torch.equal(got, native), f"differs by {(got - native).abs().max().item():.2e}")
    check(torch.equal(run(), native), "differs after the patch was removed")


# ----------------------------------------------------------------------------------------------------------- features


@feature("by rows: Llama, eager", "Llama", "eager")
@feature("by rows: Llama, sdpa", "Llama", "sdpa")
@feature("by rows: Mistral, sliding window, sdpa", "Mistral", "sdpa")
@feature("by rows: Bert, eager", "Bert", "eager")
@feature("by rows: Bert, sdpa", "Bert", "sdpa")
@feature("by rows: T5", "T5", "eager")
def by_rows(kind: str, attention: str) -> None:
    for padding in (False, True):
        model, inputs = model_of(kind, attention), inputs_of(kind, padding=padding)
        same_bits(model, lambda model=model, inputs=inputs: model(**inputs)[0])


class Plain(nn.Module):
    """Attention as a paper writes it; no host's model."""

    class Attention(nn.Module):
        def __init__(self, is_fused: bool) -> None:
            super().__init__()
            self.qkv, self.is_fused = nn.Linear(64, 192), is_fused

        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            query, key, value = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
            if self.is_fused:
                return nn.functional.scaled_dot_product_attention(query, key, value, mask).flatten(2)
            scores = torch.einsum("bhid,bhjd->bhij", query, key) * 0.25
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            return torch.einsum("bhij,bhjd->bihd", weights, value).flatten(2)

    def __init__(self, is_fused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = self.Attention(is_fused)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.attention(x, mask)


@feature("by rows: a module of torch, einsum", False)
@feature("by rows: a module of torch, sdpa", True)
def a_module(is_fused: bool) -> None:
    model, x = Plain(is_fused).eval(), torch.randn(2, TOKENS, 64)
    # A bias whose rows lie a column apart, as biases by position do.
    bias = torch.randn(1, TOKENS, TOKENS, 4).permute(0, 3, 1, 2)
    for mask in (None, torch.randn(TOKENS, TOKENS), bias):
        same_bits(model, lambda mask=mask: model(x, mask))


@feature("by rows: nn.TransformerEncoder")
def an_encoder() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 64, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, TOKENS, 64)
    same_bits(model, lambda: model(x))


@feature("by rows: UNet, cross-attention")
def a_unet() -> None:
    diffusers = _diffusers()
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=32, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=32,
    ).eval()  # fmt: skip
    sample, text = torch.randn(1, 4, 32, 32), torch.randn(1, 72, 32)
    same_bits(model, lambda: model(sample, 1, encoder_hidden_states=text).sample)


@feature("by rows: 4-bit layers of bitsandbytes")
def a_quantised_model() -> None:
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise Absent("bitsandbytes") from None
    model, inputs = model_of("Llama", "sdpa"), inputs_of("Llama")
    for layer in model.layers:
        for parent, name in (
            (layer.self_attn, "q_proj"),
            (layer.self_attn, "v_proj"),
            (layer.mlp, "up_proj"),
        ):
            old = getattr(parent, name)
            new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(old.weight.clone(), requires_grad=False, quant_type="nf4")
            setattr(parent, name, new.to("cpu"))
    same_bits(model.eval(), lambda: model(**inputs)[0])


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError:
        raise Absent("diffusers") from None
    return diffusers


@feature("gradients with checkpointing: Llama, eager", "eager")
@feature("gradients with checkpointing: Llama, sdpa", "sdpa")
def gradients(attention: str) -> None:
    model, inputs = model_of("Llama", attention), inputs_of("Llama")

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        checkpoint(
            lambda ids: model(ids)[0], inputs["input_ids"], use_reentrant=False
        ).square().sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    native = run()
    with attnpatch.patched(model, mode="always"):
        got = run()
    check(len(got) == len(native) > 10, "gradients are missing")
    for mine, theirs in zip(got, native, strict=True):
        check(
            torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max())), "gradients differ"
        )


@feature("masks by rows: Llama, sdpa", "Llama", "sdpa")
@feature("masks by rows: Mistral, eager", "Mistral", "eager")
@feature("masks by rows: Bert, sdpa", "Bert", "sdpa")
def masks(kind: str, attention: str) -> None:
    """No tensor has as many elements as there are pairs of a query and a key."""
    tokens = 1024
    model, inputs = model_of(kind, attention), inputs_of(kind, tokens)
    with torch.no_grad():
        native = model(**inputs)[0]
        with Live() as whole:
            model(**inputs)
        with attnpatch.patched(model, mode="always", workspace=2**20), Live() as live:
            got = model(**inputs)[0]
    check(whole.largest >= tokens**2, "the host makes no mask: nothing is shown")
    check(torch.equal(got, native), f"differs by {(got - native).abs().max().item():.2e}")
    check(live.largest < tokens**2, f"whole: {live.what}")


@feature("weights under sdpa: Llama", "Llama")
@feature("weights under sdpa: Bert", "Bert")
@feature("weights under sdpa: T5", "T5")
def weights(kind: str) -> None:
    import transformers

    if not getattr(transformers, f"{kind}Model")._supports_sdpa:
        raise Absent(f"SDPA in {kind}")
    eager, sdpa = model_of(kind, "eager"), model_of(kind, "sdpa")
    sdpa.load_state_dict(eager.state_dict())
    inputs = inputs_of(kind, padding=False)
    with torch.no_grad():
        native = eager(**inputs, output_attentions=True)
        with attnpatch.patched(sdpa, mode="always"):
            got = sdpa(**inputs, output_attentions=True)
            names = [name for name in native if "attentions" in name and native[name]]
            check(names, "eager attention returns no weights")
            for name in names:
                layers = got.get(name)
                check(layers and all(layer is not None for layer in layers), f"{name} is {layers!r:.40}")
                for mine, theirs in zip(layers, native[name], strict=True):
                    check(
                        torch.allclose(mine[:, :, -20:] + 0, theirs[:, :, -20:], atol=1e-5), f"{name} differ"
                    )


@feature("capture with generate, eager", "eager")
@feature("capture with generate, sdpa", "sdpa")
def capture(attention: str) -> None:
    """The map of a whole generation against native eager probabilities of all its tokens in one pass."""
    model, eager = model_of("Llama", attention, "ForCausalLM"), model_of("Llama", "eager", "ForCausalLM")
    eager.load_state_dict(model.state_dict())
    prompt = inputs_of("Llama", 45)["input_ids"][:1]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        plain = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        with attnpatch.capture(model, blocks=attnpatch.Blocks.fixed(16), heads="all") as maps:
            tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        check(torch.equal(plain, tokens), "other tokens are generated")
        native = torch.stack(eager(tokens[:, :-1], output_attentions=True).attentions)[:, 0]
    found = maps.block_map
    size = native.shape[-1]
    member = torch.stack([torch.arange(size) // 16 == i for i in range(-(-size // 16))]).float()
    expected = (member @ native @ member.T) / member.sum(1)[:, None]
    check(found.mass.shape == expected.shape, f"{tuple(found.mass.shape)} instead of {tuple(expected.shape)}")
    check(torch.allclose(found.mass, expected, atol=1e-5), "the map differs from native probabilities")
    with tempfile.TemporaryDirectory() as folder:
        found.save(f"{folder}/map.safetensors")
        check(
            torch.equal(attnpatch.BlockMap.load(f"{folder}/map.safetensors").mass, found.mass), "file differs"
        )


MESSAGES = [
    {"role": "system", "content": "You answer questions about what was said."},
    {"role": "user", "content": "The code of the blue box is 4711."},
    {"role": "assistant", "content": "Noted."},
    {"role": "user", "content": "What is the code of the blue box?"},
]


@feature("analyzer: the demo's model")
def analyzer() -> None:
    folder = pathlib.Path(attnpatch.__file__).parent / "demo" / "model"
    tool = attnpatch.BlockAttentionAnalyzer(str(folder), torch_dtype="float32")
    found = tool.analyze_conversation_sequential(MESSAGES)
    check(found.block_map.mass.shape[-1] >= 4, "messages are missing")
    mass = found.block_map.mass
    check(bool((mass.sum(-1) > 0.5).all()), "rows of the map are empty")
    check(not found.notes, f"notes: {found.notes}")


@feature("explain: Llama on meta, eager", "eager", "dense math")
@feature("explain: Llama on meta, sdpa", "sdpa", "flash")
def explain(attention: str, _: str) -> None:
    with torch.device("meta"):
        model = model_of("Llama", attention)
    found = attnpatch.explain(model, seq_len=1024, device="cpu", mode="always")
    check(found.peak > 0 and "self_attn" in str(found), f"nothing is predicted: {found}")
    attnpatch.explain(model, seq_len=1024)  # the device is chosen by torch


SCRIPT = """
import torch
from transformers import LlamaConfig, LlamaModel
model = LlamaModel(LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4)).eval()
with torch.no_grad():
    print(tuple(model(torch.ones(1, 64, dtype=torch.long))[0].shape))
"""


@feature("activation: ATTNPATCH=1", True)
@feature("activation: attnpatch run", False)
def activation(by_variable: bool) -> None:
    from attnpatch.activation.launcher import startup_folder

    if by_variable and startup_folder() is None:
        raise Absent("attnpatch's start-up file")
    with tempfile.TemporaryDirectory() as folder:
        script, maps = pathlib.Path(folder, "script.py"), pathlib.Path(folder, "maps")
        script.write_text(SCRIPT)
        values = {
            "ATTNPATCH_MODE": "always", "ATTNPATCH_REPORT": "1", "ATTNPATCH_CAPTURE": str(maps),
            "ATTNPATCH_BLOCKS": "16",
        }  # fmt: skip
        command = (
            [sys.executable, str(script)]
            if by_variable
            else [sys.executable, "-m", "attnpatch", "run", str(script)]
        )
        values.update({"ATTNPATCH": "1"} if by_variable else {})
        done = subprocess.run(
            command, env={**os.environ, **values}, capture_output=True, text=True, check=False
        )
        check(done.returncode == 0 and "(1, 64, 64)" in done.stdout, done.stderr[-500:])
        said = done.stdout + done.stderr
        check("layers.0.self_attn" in said and "1 sequence captured" in said, said[-800:])
        check(len(list(maps.glob("*.safetensors"))) == 1, "no map was written")


@feature("pipeline of diffusers: the same image, and heat maps")
def pipeline() -> None:
    _diffusers()
    import pipelines

    pipe = pipelines.build("sd15")
    native = pipelines.run(pipe, "sd15")
    with attnpatch.patched(pipe, mode="always"):
        got = pipelines.run(pipe, "sd15")
    check((native == got).all(), f"differs by {abs(native - got).max():.2e}")
    with attnpatch.capture(pipe) as maps:
        pipelines.run(pipe, "sd15")
    check(tuple(maps.heat_map("cube").shape)[-2:] != (), "no heat map")


@feature("fused: attention written by hand")
def fuse() -> None:
    model, x = Plain().eval(), torch.randn(2, TOKENS, 64)
    with torch.no_grad():
        native = model(x)
        with attnpatch.patched(model, fuse=True, min_tokens=1):
            got = model(x)
            totals = attnpatch.report(model).totals
    check(totals["fused"] == 1, f"not fused: {totals}")
    check(torch.allclose(got, native, atol=1e-5), "differs")


@feature("doctor")
def doctor() -> None:
    from attnpatch.activation.examination import examination

    found = examination()
    bad = [
        words
        for words, _ in found.wrong
        if "older than" in words or "not a tested" in words or "off" in words
    ]
    check(not bad, "; ".join(bad))


# ---------------------------------------------------------------------------------------------------------------------


def outcome_of(name: str) -> str:
    try:
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", AttnpatchWarning)
            FEATURES[name]()
        check(not record, " ".join(str(each.message) for each in record))
    except Absent as missing:
        return f"skipped, without {missing}"
    except Exception as error:
        if os.environ.get("SMOKE_TRACEBACK"):
            traceback.print_exc()
        return f"FAILED: {type(error).__name__}: {error}"
    return "ok"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--expect", nargs="*", default=[], help="features that are off with these releases")
    parser.add_argument("--only", nargs="*", default=[""], help="features whose name has one of these in it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: importlib.metadata.version(name) for name in PACKAGES if _is_installed(name)}
    print(
        f"python {platform.python_version()}",
        *(f"{name} {version}" for name, version in found.items()),
        sep=", ",
    )
    failed = set()
    for name in FEATURES:
        if any(words in name for words in options.only):
            outcome = outcome_of(name)
            print(f"{name}: {outcome}", flush=True)
            failed.update([name] if outcome.startswith("FAILED") else [])
    for name in failed.symmetric_difference(options.expect):
        print(f"unexpected: {name} {'failed' if name in failed else 'works'}")
    return int(failed != set(options.expect))


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
