"""One measurement in a process of its own: ``python -m benchmarks.case NAME VARIANT`` prints one line of JSON."""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

import attnpatch
from attnpatch.memory import PeakMeter
from benchmarks.models import eager, llama, tokens

LONG = 8192
# Models with attention written by hand, and how many tokens they are given.
FUSED = {
    "llama": LONG,
    "gptj": LONG,
    "bloom": LONG,
    "t5": 4096,
    "deberta": 4096,
    "gpt_oss": 4096,
    "gemma2": 4096,
}


def once(call: Callable[[], object], warm: Callable[[], object]) -> dict[str, float]:
    """Seconds and peak bytes of one call in a warm process."""
    warm()
    with PeakMeter() as meter:
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": meter.peak}


def forward(implementation: str, **policy: object) -> dict[str, float]:
    """A forward pass over 8,192 tokens, native without a policy."""
    model, ids, short = llama(implementation), tokens(LONG), tokens(256)
    around = attnpatch.patched(model, **policy) if policy else contextlib.nullcontext()
    with torch.inference_mode(), around:
        return once(lambda: model(ids, use_cache=False), lambda: model(short, use_cache=False))


def fuse(name: str, length: int, **policy: object) -> dict[str, float]:
    """A forward pass of a model with attention written by hand, native without a policy."""
    model = eager(name)
    around = attnpatch.patched(model, **policy) if policy else contextlib.nullcontext()
    ids, short = tokens(length), tokens(256)
    with torch.inference_mode(), around:
        found = once(lambda: model(ids), lambda: model(short))
        if policy.get("fuse") and attnpatch.report(model).totals["by_rows"]:
            print(attnpatch.report(model), file=sys.stderr)
    return found


def fuse_error(name: str, length: int = 2048) -> dict[str, float]:
    """Distance from the same model in float64, root of the mean square: of the native pass and of the fused one."""
    model, ids = eager(name), tokens(length)
    with torch.inference_mode():
        native = model(ids)[0]
        with attnpatch.patched(model, fuse=True):
            fused = model(ids)[0]
        exact = model.double()(ids)[0]
    native_error, fused_error = ((each - exact).square().mean().sqrt().item() for each in (native, fused))
    return {"native": native_error, "fused": fused_error}


def capture(on: bool) -> dict[str, float]:
    """A fused forward pass over 8,192 tokens, with block maps of 128 tokens or without."""
    model, ids, short = llama("sdpa"), tokens(LONG), tokens(256)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if on:
            stack.enter_context(attnpatch.capture(model, blocks=attnpatch.Blocks.fixed(128)))
        return once(lambda: model(ids, use_cache=False), lambda: model(short, use_cache=False))


def capture_decode(steps: int = 40, layers: int = 4) -> dict[str, float]:
    """Tokens decoded one by one after a prompt of 512, with block maps of 128 tokens and without.

    Returns:
        Median seconds of a step, without a capture and within one, and what the capture adds for each layer.
    """
    from transformers import DynamicCache

    model, prompt = llama("sdpa", layers), tokens(512)
    found = {}
    for name in ("off", "on", "off", "on"):  # The first of each warms up.
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            if name == "on":
                stack.enter_context(attnpatch.capture(model, blocks=attnpatch.Blocks.fixed(128)))
            cache, seconds = DynamicCache(), []
            model(prompt, past_key_values=cache)
            for _ in range(steps):
                start = time.perf_counter()
                model(prompt[:, :1], past_key_values=cache)
                seconds.append(time.perf_counter() - start)
            found[name] = statistics.median(seconds)
    return {**found, "seconds": (found["on"] - found["off"]) / layers}


def training(implementation: str, **policy: object) -> dict[str, float]:
    """Forward and backward over 4,096 tokens."""
    model, ids = llama(implementation, layers=1), tokens(4096)
    around = attnpatch.patched(model, **policy) if policy else contextlib.nullcontext()

    def step(ids: torch.Tensor) -> None:
        model(ids, use_cache=False).logits.mean().backward()

    with around:
        return once(lambda: step(ids), lambda: step(tokens(64)))


def vae(**policy: object) -> dict[str, float]:
    """Attention in the middle of an autoencoder: one head of 512 over 128 x 128 latents, in torch's dense math."""
    from diffusers.models.attention_processor import Attention
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.manual_seed(0)
    attention = Attention(
        512, heads=1, dim_head=512, bias=True, norm_num_groups=32, eps=1e-6, rescale_output_factor=1,
        residual_connection=True, upcast_softmax=True, _from_deprecated_attn_block=True,
    )  # fmt: skip
    model = torch.nn.Sequential(attention).eval()
    latents = torch.randn(1, 512, 128, 128, generator=torch.Generator().manual_seed(0))
    around = attnpatch.patched(model, **policy) if policy else contextlib.nullcontext()
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), around:
        return once(lambda: model(latents), lambda: model(latents[..., :16, :16].contiguous()))


def overhead(kind: str, pairs: int = 200, is_patched: bool = True) -> dict[str, float]:
    """Patched and unpatched calls of one model by turns; the patch stays native.

    Args:
        kind: ``"prefill"`` or ``"decode"``.
        pairs: How many.
        is_patched: Otherwise the patch is taken out before anything is timed: what differs then is the machine.

    Returns:
        Median seconds of both, and the median of the ratios of neighbouring calls.
    """
    from transformers import DynamicCache

    model, prompt = llama("sdpa"), tokens(512)
    first, second = [], []
    with torch.inference_mode():
        for number in range(pairs + 5):
            seconds = {}
            for patched in (False, True) if number % 2 else (True, False):
                if patched:
                    attnpatch.apply(model)
                    if not is_patched:
                        attnpatch.remove(model)
                seconds[patched] = _timed(model, prompt, kind, DynamicCache())
                if patched and is_patched:
                    attnpatch.remove(model)
            if number >= 5:
                first.append(seconds[False])
                second.append(seconds[True])
    ratio = statistics.median(b / a for a, b in zip(first, second, strict=True))
    return {"native": statistics.median(first), "patched": statistics.median(second), "ratio": ratio}


def _timed(model: torch.nn.Module, prompt: torch.Tensor, kind: str, cache: object) -> float:
    if kind == "decode":
        model(prompt, past_key_values=cache)
        start = time.perf_counter()
        for _ in range(20):
            model(prompt[:, :1], past_key_values=cache)
        return (time.perf_counter() - start) / 20
    start = time.perf_counter()
    model(prompt, use_cache=False)
    return time.perf_counter() - start


CASES: dict[str, dict[str, Callable[[], dict[str, float]]]] = {
    "eager": {"native": lambda: forward("eager"), "by rows": lambda: forward("eager", mode="always")},
    "sdpa": {"native": lambda: forward("sdpa"), "by rows": lambda: forward("sdpa", mode="always")},
    "capture": {"off": lambda: capture(False), "on": lambda: capture(True)},
    "capture decode": {"pairs": capture_decode},
    "training": {"native": lambda: training("eager"), "by rows": lambda: training("eager", mode="always")},
    "vae": {"native": vae, "by rows": lambda: vae(mode="always")},
    **{
        f"fuse {name}": {
            "native": functools.partial(fuse, name, length),
            "fused": functools.partial(fuse, name, length, fuse=True),
            "by rows": functools.partial(fuse, name, length, mode="always"),
            "error": functools.partial(fuse_error, name),
        }
        for name, length in FUSED.items()
    },
    "prefill 512": {"pairs": lambda: overhead("prefill")},
    "decode": {
        "pairs": lambda: overhead("decode"),
        "unpatched": lambda: overhead("decode", is_patched=False),
    },
}

if __name__ == "__main__":
    torch.set_num_threads(2)
    print(json.dumps(CASES[sys.argv[1]][sys.argv[2]]()))
