"""Every GPU figure: ``python -m benchmarks gpu``.

Times and memory only: ``make bench-gpu`` tests first that the kernels are right (``tests/on_kernel.py``), and makes the
runs of ``benchmarks.gpu_first``, which compare every result. ``--device cpu`` runs every line on tiny shapes in Triton's
interpreter: no figures, but no surprises either.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

import attnpatch
from attnpatch.memory.peak import PeakMeter
from attnpatch.recording.gpu import fused_sums
from attnpatch.rows.sdpa import logsumexp as fused
from attnpatch.rows.sdpa.kernel_choice import fused_choice
from attnpatch.sdpa_call import SdpaCall

BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)
# The largest ratios that pass, and bytes.
ATTENTION, FORWARD, BYTES = 1.6, 1.25, 64 * 10**6


@dataclasses.dataclass
class Sizes:
    """What is measured, and how often; heads, key heads and width of Llama-3.1-8B unless it is a rehearsal."""

    device: torch.device
    dtype: torch.dtype
    tokens: tuple[int, ...]
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    hidden: int = 4096
    inner: int = 14336
    layers: int = 4
    block: int = 128
    rounds: int = 7


GPU = Sizes(torch.device("cuda"), torch.bfloat16, (32768, 131072))
REHEARSAL = Sizes(
    torch.device("cpu"), torch.float32, (64, 96), heads=2, kv_heads=1, width=16, hidden=32, inner=48, layers=1,
    block=32, rounds=1,
)  # fmt: skip


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds, with everything on the device done."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def by_turns(calls: dict[str, Callable[[], object]], sizes: Sizes) -> dict[str, float]:
    """Median seconds of each, one after the other, after a warm round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(sizes.rounds + 1):
        for name, call in calls.items():
            taken = timed(call, sizes.device)
            if number:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak(call: Callable[[], object], device: torch.device) -> int:
    """Bytes taken beyond what is held, warm."""
    call()
    with PeakMeter(device) as meter:
        call()
    return meter.peak


def a_call(sizes: Sizes, tokens: int, dtype: torch.dtype | None = None, **more: Any) -> SdpaCall:
    """A causal SDPA call with shared key heads."""
    generator = torch.Generator(sizes.device).manual_seed(0)

    def normal(heads: int) -> torch.Tensor:
        shape = 1, tokens, heads, sizes.width
        values = torch.randn(shape, generator=generator, device=sizes.device, dtype=dtype or sizes.dtype)
        return values.transpose(1, 2)  # as projections leave them

    query, key, value = normal(sizes.heads), normal(sizes.kv_heads), normal(sizes.kv_heads)
    return SdpaCall(query, key, value, **{"is_causal": True, "enable_gqa": True, **more})


def blocks_of(tokens: int, size: int) -> tuple[torch.Tensor, int]:
    return (torch.arange(tokens) // size)[None], -(-tokens // size)


def attend(call: SdpaCall) -> torch.Tensor:
    return F.scaled_dot_product_attention(**call.arguments())


def llama(sizes: Sizes, layers: int, how: str = "sdpa", name: str = "Llama", **more: Any) -> torch.nn.Module:
    """Layers of Llama-3.1-8B's shape with random weights, without its vocabulary; or of a model with the same fields."""
    import transformers

    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}Model")
    config = kind.config_class(
        vocab_size=1024, hidden_size=sizes.hidden, intermediate_size=sizes.inner, num_hidden_layers=layers,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads, head_dim=sizes.width,
        max_position_embeddings=2**18, attn_implementation=how, **more,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(sizes.dtype)
    try:
        with sizes.device:
            return kind(config).eval()
    finally:
        torch.set_default_dtype(before)


def tokens_of(sizes: Sizes, length: int) -> torch.Tensor:
    return torch.randint(0, 1024, (1, length), generator=torch.Generator().manual_seed(0)).to(sizes.device)


@contextlib.contextmanager
def captured(model: torch.nn.Module, sizes: Sizes):
    """A capture under a patch, so that the report outlives it."""
    with (
        attnpatch.patched(model, mode="never"),
        attnpatch.capture(model, blocks=attnpatch.Blocks.fixed(sizes.block)) as maps,
    ):
        yield maps


def attention(sizes: Sizes, tokens: int) -> dict[str, Any]:
    """One attention call, with capture and without."""
    call = a_call(sizes, tokens)
    choice = fused_choice(call)
    blocks, count = blocks_of(tokens, sizes.block)
    lse = fused.with_lse(call, choice)[1]

    def capture() -> None:
        _, lse = fused.with_lse(call, choice)
        fused_sums.block_sums(call, lse, blocks, blocks, (count, count))

    seconds = by_turns(
        {
            "without": lambda: attend(call),
            "with": capture,
            "mass alone": lambda: fused_sums.block_sums(call, lse, blocks, blocks, (count, count)),
        },
        sizes,
    )
    more = peak(capture, sizes.device) - peak(lambda: attend(call), sizes.device)
    return {
        "kernel": SDPBackend(choice).name if choice else "MATH",
        "seconds": seconds,
        "ratio": seconds["with"] / seconds["without"],
        "more bytes": more,
    }


def forward(sizes: Sizes, tokens: int, layers: int) -> dict[str, Any]:
    """A forward pass, with capture and without."""
    model, ids = llama(sizes, layers), tokens_of(sizes, tokens)

    def capture() -> None:
        with captured(model, sizes):
            model(ids, use_cache=False)

    def plain() -> None:
        model(ids, use_cache=False)

    seconds = by_turns({"without": plain, "with": capture}, sizes)
    with captured(model, sizes) as maps:
        model(ids, use_cache=False)
        summed = {name for site in attnpatch.report(model).sites for name in site.summed_by}
    sums = maps.block_map.to_numpy().sum(-1)
    return {
        "layers": layers,
        "seconds": seconds,
        "ratio": seconds["with"] / seconds["without"],
        "more bytes": peak(capture, sizes.device) - peak(plain, sizes.device),
        "summed by": sorted(summed),
        "rows sum to": [float(sums.min()), float(sums.max())],
    }


def in_one_pass(sizes: Sizes, tokens: int) -> dict[str, Any]:
    """Attention and block mass in one pass, beside a fused kernel and a second pass."""
    # Triton is there by now, and reads when it is imported whether it is to interpret.
    from tests import one_pass

    tried = one_pass.SHAPES if sizes.device.type == "cuda" else (one_pass.Shape(16, 16, 4, 2),)
    call, (blocks, count) = a_call(sizes, tokens), blocks_of(tokens, sizes.block)
    choice = fused_choice(call)

    def two_passes() -> None:
        _, lse = fused.with_lse(call, choice)
        fused_sums.block_sums(call, lse, blocks, blocks, (count, count))

    calls: dict[str, Callable[[], object]] = {"attention": lambda: attend(call), "two passes": two_passes}
    for shape in tried:
        name = "one pass, " + " ".join(f"{key} {number}" for key, number in dataclasses.asdict(shape).items())
        calls[name] = functools.partial(one_pass.attend, call, sizes.block, shape)
    seconds = by_turns(calls, sizes)
    for name, taken in seconds.items():
        print(f"  {name:45} {taken * 1e3:9.2f} ms, {taken / seconds['attention']:.3f}x", flush=True)
    best = min((name for name in seconds if name.startswith("one pass")), key=lambda name: seconds[name])
    more = peak(calls[best], sizes.device) - peak(calls["attention"], sizes.device)
    verdict = "beats" if seconds[best] < seconds["two passes"] else "does not beat"
    print(f"  {best} {verdict} two passes; {more / 1e6:+.1f} MB beside attention", flush=True)
    return {"seconds": seconds, "more bytes": more, "verdict": verdict}


def shown(name: str, found: dict[str, Any], limit: float) -> list[str]:
    """Print a pair; what was missed."""
    seconds = found["seconds"]
    print(
        f"  {seconds['without'] * 1e3:.2f} -> {seconds['with'] * 1e3:.2f} ms, {found['ratio']:.3f}x (limit {limit}), "
        f"{found['more bytes'] / 1e6:+.1f} MB (limit {BYTES / 1e6:.0f})"
    )
    if "mass alone" in seconds:
        print(f"    mass alone: {seconds['mass alone'] * 1e3:.2f} ms")
    for key in ("kernel", "layers", "summed by", "rows sum to"):
        if key in found:
            print(f"    {key}: {found[key]}", flush=True)
    missed = [f"{name}: {found['ratio']:.3f}x, the limit is {limit}"] if found["ratio"] > limit else []
    return missed + ([f"{name}: {found['more bytes'] / 1e6:.1f} MB"] if found["more bytes"] >= BYTES else [])


@torch.inference_mode()
def measure(sizes: Sizes) -> tuple[dict[str, Any], list[str]]:
    """Everything; what was found, and what failed or was missed.

    What fails is said, and the rest goes on: a GPU may be there only once.
    """
    device, start = sizes.device, time.perf_counter()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a rehearsal on a CPU"
    results: dict[str, Any] = {"device": name, "torch": torch.__version__, "dtype": str(sizes.dtype)}
    missed: list[str] = []

    def section(title: str, call: Callable[[], Any]) -> Any:
        print(title, flush=True)
        try:
            results[title] = call()
        except Exception as error:
            traceback.print_exc()
            missed.append(f"failed: {title}: {type(error).__name__}")
        return results.get(title)

    print(f"{name}, torch {torch.__version__}")
    for tokens in sizes.tokens:
        title = f"attention with capture over attention without, {tokens} tokens"
        found = section(title, lambda: attention(sizes, tokens))  # noqa: B023
        missed += shown(title, found, ATTENTION) if found else []
    for tokens, layers in zip(sizes.tokens, (sizes.layers, max(1, sizes.layers // 4)), strict=True):
        title = f"a forward pass with capture over one without, {tokens} tokens"
        found = section(title, lambda: forward(sizes, tokens, layers))  # noqa: B023
        missed += shown(title, found, FORWARD) if found else []
    for tokens in sizes.tokens:
        section(f"one pass against two, {tokens} tokens", lambda: in_one_pass(sizes, tokens))  # noqa: B023
    results["seconds"] = time.perf_counter() - start
    return results, missed


def gpu(arguments: list[str]) -> int:
    """Measure and print; 1 where something failed or is beyond its limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=pathlib.Path, help="write what was found as JSON")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        # Before Triton is imported.
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print("there is no GPU; --device cpu rehearses on tiny shapes", file=sys.stderr)
        return 2
    results, missed = measure(GPU if options.device == "cuda" else REHEARSAL)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1, default=str))
    if options.device == "cpu":
        missed = [line for line in missed if line.startswith("failed")]  # times of a rehearsal say nothing
    print("\n".join(f"missed: {line}" for line in missed) or "every limit is kept")
    return 1 if missed else 0
