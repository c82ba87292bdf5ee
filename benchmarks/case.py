"""The table of cases; ``python -m benchmarks.case NAME VARIANT [PARAMETER...]`` measures one and prints a line of JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import attnpatch
from benchmarks import conversation, explain, long, peers
from benchmarks.models import eager, llama, tokens
from benchmarks.runner import Found, once

LONG = 8192
BY_ROWS = {"mode": "always"}


def around(model: torch.nn.Module, policy: dict[str, Any]) -> Any:
    """A patch with this policy; none without one."""
    return attnpatch.patched(model, **policy) if policy else contextlib.nullcontext()


def capturing(model: torch.nn.Module, on: bool) -> Any:
    """A capture in blocks of 128 tokens, or none."""
    return attnpatch.capture(model, attnpatch.Blocks.fixed(128)) if on else contextlib.nullcontext()


def forward(implementation: str, **policy: Any) -> Found:
    """A forward pass over 8,192 tokens, native without a policy."""
    model, ids, short = llama(implementation), tokens(LONG), tokens(256)
    with torch.inference_mode(), around(model, policy):
        return once(lambda: model(ids, use_cache=False), lambda: model(short, use_cache=False))[0]


def fuse(name: str, length: int, **policy: Any) -> Found:
    """A forward pass of a model with attention written by hand, native without a policy."""
    model, ids, short = eager(name), tokens(length), tokens(256)
    with torch.inference_mode(), around(model, policy):
        found, _ = once(lambda: model(ids), lambda: model(short))
        if policy.get("fuse") and attnpatch.report(model).totals["by_rows"]:
            print(attnpatch.report(model), file=sys.stderr)
    return found


def fuse_error(name: str, length: int = 2048) -> Found:
    """Distance from the same model in float64, root of the mean square: of the native pass and of the fused one."""
    model, ids = eager(name), tokens(length)
    with torch.inference_mode():
        native = model(ids)[0]
        with attnpatch.patched(model, fuse=True):
            fused = model(ids)[0]
        exact = model.double()(ids)[0]
    native_error, fused_error = ((each - exact).square().mean().sqrt().item() for each in (native, fused))
    return {"native": native_error, "fused": fused_error, "ratio": fused_error / native_error}


def capture(on: bool) -> Found:
    """A fused forward pass over 8,192 tokens, with block maps of 128 tokens or without."""
    model, ids, short = llama("sdpa"), tokens(LONG), tokens(256)
    with torch.inference_mode(), capturing(model, on):
        return once(lambda: model(ids, use_cache=False), lambda: model(short, use_cache=False))[0]


def capture_decode(steps: int = 40, layers: int = 4) -> Found:
    """Tokens decoded one by one after a prompt of 512, with block maps of 128 tokens and without.

    Returns:
        Median seconds of a step, without a capture and within one, and what the capture adds for each layer.
    """
    from transformers import DynamicCache

    model, prompt, found = llama("sdpa", layers), tokens(512), {}
    for name in ("off", "on", "off", "on"):  # The first of each warms up.
        with torch.inference_mode(), capturing(model, name == "on"):
            cache, seconds = DynamicCache(), []
            model(prompt, past_key_values=cache)
            for _ in range(steps):
                start = time.perf_counter()
                model(prompt[:, :1], past_key_values=cache)
                seconds.append(time.perf_counter() - start)
            found[name] = statistics.median(seconds)
    return {**found, "seconds": (found["on"] - found["off"]) / layers}


def training(**policy: Any) -> Found:
    """Forward and backward of eager attention over 4,096 tokens, native without a policy."""
    model = llama("eager", layers=1)

    def step(ids: torch.Tensor) -> None:
        model(ids, use_cache=False).logits.mean().backward()

    with around(model, policy):
        return once(lambda: step(tokens(4096)), lambda: step(tokens(64)))[0]


def vae(**policy: Any) -> Found:
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
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), around(model, policy):
        return once(lambda: model(latents), lambda: model(latents[..., :16, :16].contiguous()))[0]


def overhead(kind: str, pairs: int = 200, is_patched: bool = True) -> Found:
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


def staying(implementation: str, pairs: int = 60, layers: int = 8) -> Found:
    """Calls of 1,500 tokens that stay native, patched and unpatched by turns; what a patch adds on the host.

    The layers are narrow, and the process's own time counts, so that a busy machine matters less.

    Returns:
        Median seconds of both, and what a patch adds for each layer, in seconds.
    """
    model, ids = llama(implementation, layers, hidden=64), tokens(1500)
    first, second = [], []
    with torch.inference_mode():
        for number in range(pairs + 5):
            seconds = {}
            for patched in (False, True) if number % 2 else (True, False):
                if patched:
                    attnpatch.apply(model)
                for _ in range(3):
                    start = time.process_time()
                    model(ids, use_cache=False)
                    seconds[patched] = time.process_time() - start
                if patched:
                    attnpatch.remove(model)
            if number >= 5:
                first.append(seconds[False])
                second.append(seconds[True])
    native, patched = statistics.median(first), statistics.median(second)
    added = statistics.median(b - a for a, b in zip(first, second, strict=True))
    return {"native": native, "patched": patched, "seconds": added / layers}


def activation(pairs: int = 200, width: int = 64, is_active: bool = True) -> Found:
    """Calls of an MLP of 100 layers by turns: while ``ATTNPATCH=1`` looks at first calls, and while it does not.

    The layers are small, so that what a call of a module costs counts. The first calls are over when anything is timed.

    Args:
        pairs: How many, of 20 calls each.
        width: Of the layers.
        is_active: Otherwise nothing ever looks: what differs then is the machine.

    Returns:
        Median seconds of both, and the ratio of the medians.
    """
    from attnpatch.activation import first_calls
    from attnpatch.activation.plain_models import PlainModels
    from attnpatch.activation.session import Session
    from attnpatch.activation.settings import Settings
    from attnpatch.compat import COMPILED_CALL

    torch.manual_seed(0)
    layers = (each for _ in range(100) for each in (torch.nn.Linear(width, width), torch.nn.ReLU()))
    model, x = torch.nn.Sequential(*layers).eval(), torch.randn(32, width)
    told = PlainModels(Session(Settings(quiet=True))).told
    times: dict[bool, list[float]] = {False: [], True: []}
    with torch.inference_mode():
        for number in range(pairs + 5):
            for active in (False, True) if number % 2 else (True, False):
                if active and is_active:
                    first_calls.install(told)
                for _ in range(3):
                    model(x)
                assert all(
                    (COMPILED_CALL in vars(each)) is (active and is_active) for each in model.modules()
                )
                start = time.perf_counter()
                for _ in range(20):
                    model(x)
                if number >= 5:
                    times[active].append((time.perf_counter() - start) / 20)
                first_calls.uninstall()
                for module in model.modules():
                    vars(module).pop(COMPILED_CALL, None)
    native, patched = (statistics.median(times[active]) for active in (False, True))
    return {"native": native, "patched": patched, "ratio": patched / native}


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


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured, in a process for each variant.

    Attributes:
        variants: By name. In a table the first is what the others are compared to.
        title: In the picture; cases without one are not drawn.
        rounds: How often the runner measures each; 0: it is a part of a command of its own.
        time, peak: The largest ratio of the last variant to the first, of seconds and of peak bytes, that passes.
        more: The most bytes that the last variant may take beyond the first.
        alone: Variants that are no time and memory of a call: measured once, and not compared.
    """

    variants: dict[str, Callable[..., Found]]
    title: str = ""
    rounds: int = 0
    time: float | None = None
    peak: float | None = None
    more: float | None = None
    alone: tuple[str, ...] = ()


# Models with attention written by hand: how many tokens they are given, and the largest share of native time that passes.
FUSED = {
    "llama": (LONG, 1 / 4),
    "gptj": (LONG, 1 / 2),
    "bloom": (LONG, 1 / 2),
    "t5": (4096, 1 / 2),
    "deberta": (4096, 1 / 2),
    "gpt_oss": (4096, None),
    "gemma2": (4096, None),
}
CASES: dict[str, Case] = {
    "eager": Case(
        {"native": lambda: forward("eager"), "by rows": lambda: forward("eager", **BY_ROWS)},
        "eager\n8,192 tokens", 3, 0.4, 1 / 8,
    ),
    "sdpa": Case(
        {"native": lambda: forward("sdpa"), "by rows": lambda: forward("sdpa", **BY_ROWS)},
        "fused\n8,192 tokens", 5, 1.1,
    ),
    "capture": Case(
        {"off": lambda: capture(False), "on": lambda: capture(True)},
        "fused with\nblock maps", 5, 1.5, more=100e6,
    ),
    "training": Case(
        {"native": training, "by rows": lambda: training(**BY_ROWS)},
        "training\n4,096 tokens", 3, peak=1 / 4,
    ),
    "prefill 512": Case({"pairs": lambda: overhead("prefill")}, rounds=1, time=1.01),
    "decode": Case(
        {"pairs": lambda: overhead("decode"), "unpatched": lambda: overhead("decode", is_patched=False)},
        rounds=1, time=1.01,
    ),
    "staying": Case({each: functools.partial(staying, each) for each in ("sdpa", "eager")}),
    "activation": Case(
        {"pairs": activation, "unpatched": lambda: activation(is_active=False)}, rounds=1, time=1.002,
    ),
    "capture decode": Case({"pairs": capture_decode}),
    "vae": Case({"native": vae, "by rows": lambda: vae(**BY_ROWS)}, "", 3, 1.0, 1 / 8),
    **{
        f"fuse {name}": Case(
            {
                "native": functools.partial(fuse, name, length),
                "by rows": functools.partial(fuse, name, length, **BY_ROWS),
                "fused": functools.partial(fuse, name, length, fuse=True),
                "error": functools.partial(fuse_error, name),
            },
            rounds=3, time=limit, alone=("error",),
        )
        for name, (length, limit) in FUSED.items()
    },
    **{f"peers {kind}": Case(peers.variants(kind)) for kind in peers.KINDS},
    "conversation": Case(conversation.VARIANTS),
    "layer": Case(long.VARIANTS),
    "explain": Case(explain.VARIANTS),
}  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(2)
    name, variant, *parameters = sys.argv[1:]
    print(json.dumps(CASES[name].variants[variant](*parameters)))
