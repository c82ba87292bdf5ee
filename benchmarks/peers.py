"""Side by side with what a user would pick instead: ``make bench-peers`` or ``python -m benchmarks peers``.

Plain attention of 8 heads of 64 in float32 over one sequence, forward and with the backward pass, and block maps of a
small Llama. Every case is a fresh process under a limit of memory and time, by turns with the others; results are
compared to float64. Where a peer stops it is told why.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import math
import pathlib
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnpatch
from benchmarks.models import llama, tokens
from benchmarks.runner import ROOT, Found, StoppedError, keep, kept, measure, once

RESULTS, PICTURE = ROOT / "benchmarks" / "peers.json", ROOT / "docs" / "peers.png"
HEADS, WIDTH, SEED = 8, 64, 0
SIZES = [1024, 2048, 4096, 8192, 16384, 32768]
# What a case may take: address space, and seconds, of which the inputs and imports are the smaller part.
BYTES, SECONDS = 20 * 2**30, 240
# Rows whose result is compared to float64, and how far an exact method may be from it.
SAMPLE, EXACT = 64, 1e-5
BLOCK = 128
# How many times less memory than the best other way to block maps.
LESS_MEMORY = 20
NO_MAPS = "no maps"

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Eager(nn.Module):
    """Attention as it is written by hand."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.shape[-1])
        return torch.matmul(scores.softmax(-1), value)


class _Given(nn.Module):
    """Stands for a projection: gives a tensor that is there already."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor

    def forward(self, hidden: Tensor) -> Tensor:
        return self.tensor


def sliced(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What ``enable_attention_slicing("max")`` puts into a pipeline: one head at a time."""
    from diffusers.models.attention_processor import Attention, SlicedAttnProcessor

    attention = Attention(
        HEADS * WIDTH, heads=HEADS, dim_head=WIDTH, bias=False, processor=SlicedAttnProcessor(1)
    )
    flat = [each.transpose(1, 2).flatten(2) for each in (query, key, value)]
    attention.to_q, attention.to_k, attention.to_v = map(_Given, flat)
    attention.to_out[0] = nn.Identity()
    return attention(flat[0]).unflatten(2, (HEADS, WIDTH)).transpose(1, 2)


def memory_efficient_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The package of that name; its first line imports jax, so only its file for torch is loaded."""
    if "memory_efficient_attention" not in sys.modules:
        found = importlib.util.find_spec("memory_efficient_attention")
        sys.modules[found.name] = importlib.util.module_from_spec(found)
    from memory_efficient_attention.attention_torch import efficient_dot_product_attention

    turned = [each.transpose(1, 2) for each in (query, key, value)]
    return efficient_dot_product_attention(*turned).transpose(1, 2)


def memory_efficient_attention_pytorch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from memory_efficient_attention_pytorch.memory_efficient_attention import memory_efficient_attention

    return memory_efficient_attention(query, key, value)


def math_kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query, key, value)


def flex() -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def patched(**policy: Any) -> Attend:
    model = nn.Sequential(Eager())
    attnpatch.apply(model, mode="always", sites=["0"], **policy)
    return model[0]


# How each is made, once, before anything is measured.
PEERS: dict[str, Callable[[], Attend]] = {
    "native eager": Eager,
    "SDPA, fused": lambda: F.scaled_dot_product_attention,
    "SDPA, math": lambda: math_kernel,
    "diffusers slicing": lambda: sliced,
    "memory-efficient-attention": lambda: memory_efficient_attention,
    "memory-efficient-attention-pytorch": lambda: memory_efficient_attention_pytorch,
    "FlexAttention, compiled": flex,
    "attnpatch by rows": patched,
    "attnpatch fused": lambda: patched(fuse=True),
}


def inputs(length: int) -> list[Tensor]:
    """Query, key, value, and what the backward pass begins with: ``[1, heads, length, width]`` float32."""
    numbers = torch.Generator().manual_seed(SEED)
    return [torch.randn(1, HEADS, length, WIDTH, generator=numbers) for _ in range(4)]


def reference(given: list[Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, of some rows: the result, and the gradient of the query."""
    query, key, value, grad = (each.double() for each in given)
    query, grad = query[:, :, rows], grad[:, :, rows]
    weights = (query @ key.mT / math.sqrt(WIDTH)).softmax(-1)
    slopes = grad @ value.mT
    slopes = weights * (slopes - (weights * slopes).sum(-1, keepdim=True))
    return weights @ value, slopes @ key / math.sqrt(WIDTH)


def attend(name: str, backward: bool, length: str) -> Found:
    """One case: seconds, peak bytes, and the largest distance from float64."""
    call, given = PEERS[name](), inputs(int(length))

    def run(given: list[Tensor]) -> Tensor:
        if not backward:
            with torch.inference_mode():
                return call(*given[:3])
        leaves = [each.clone().requires_grad_() for each in given[:3]]
        call(*leaves).backward(given[3])
        return leaves[0].grad

    # A compiler compiles for a length.
    found, result = once(lambda: run(given), lambda: run(given if "compiled" in name else inputs(256)))
    rows = torch.linspace(0, int(length) - 1, SAMPLE).long()
    error = (result[:, :, rows].double() - reference(given, rows)[backward]).abs().max().item()
    return {**found, "error": error}


def reduced(weights: Tensor) -> Tensor:
    """``[1, heads, N, N]`` attention as blocks."""
    blocks = weights.shape[-1] // BLOCK
    mean = weights[0].float().mean(0)
    return mean.unflatten(0, (blocks, BLOCK)).mean(1).unflatten(-1, (blocks, BLOCK)).sum(-1)


def all_weights(model: nn.Module, ids: Tensor) -> Tensor:
    found = model(ids, output_attentions=True, use_cache=False, logits_to_keep=1).attentions
    return torch.stack([reduced(each) for each in found])


def bertviz(model: nn.Module, ids: Tensor) -> Tensor:
    """All weights, stacked layer on layer as its views take them."""
    found = model(ids, output_attentions=True, use_cache=False, logits_to_keep=1).attentions
    stacked = torch.stack([each.squeeze(0) for each in found])
    return torch.stack([reduced(each[None]) for each in stacked])


def inseq(model: nn.Module, ids: Tensor) -> Tensor:
    """All weights, brought to the CPU and stacked beside the batch, as its attributions take them."""
    found = model(ids, output_attentions=True, use_cache=False, logits_to_keep=1).attentions
    stacked = torch.stack(tuple(each.to("cpu") for each in found), dim=1)
    return torch.stack([reduced(each[None]) for each in stacked[0]])


def hooks(model: nn.Module, ids: Tensor) -> Tensor:
    """Eager weights, reduced when a layer is done and thrown away."""
    found = []

    def hook(module: Any, args: Any, output: Any) -> Any:
        found.append(reduced(output[1]))
        return (output[0], None)

    handles = [layer.self_attn.register_forward_hook(hook) for layer in model.model.layers]
    model(ids, use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return torch.stack(found)


def no_maps(model: nn.Module, ids: Tensor) -> None:
    """The pass alone: what any map costs is beside this."""
    model(ids, use_cache=False, logits_to_keep=1)


def ours(model: nn.Module, ids: Tensor) -> Tensor:
    with attnpatch.capture(model, attnpatch.Blocks.fixed(BLOCK)) as maps:
        model(ids, use_cache=False, logits_to_keep=1)
    return maps.block_map.mass


WAYS: dict[str, tuple[str, Callable[[nn.Module, Tensor], Tensor | None]]] = {
    NO_MAPS: ("sdpa", no_maps),
    "output_attentions=True": ("eager", all_weights),
    "BertViz's way": ("eager", bertviz),
    "Inseq's way": ("eager", inseq),
    "hooks on eager weights": ("eager", hooks),
    "attnpatch.capture": ("sdpa", ours),
}


def capture(name: str, length: str) -> Found:
    """Block maps of one pass; the first rows see nothing of what follows, so a short pass in float64 checks them."""
    attention, way = WAYS[name]
    model, ids = llama(attention), tokens(int(length))
    with torch.inference_mode():
        found, maps = once(lambda: way(model, ids), lambda: way(model, ids[:, :256]))
        if maps is None:
            return {**found, "error": 0.0}
        blocks = 512 // BLOCK
        exact = all_weights(llama("eager").double(), ids[:, :512])
    return {**found, "error": (maps[:, :blocks, :blocks].double() - exact).abs().max().item()}


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is compared: a case of the table, whose variants are called with a name and with more."""

    title: str
    run: Callable[..., Found]
    names: list[str]
    more: tuple[Any, ...] = ()


KINDS = {
    "forward": Kind("attention, forward", attend, list(PEERS), (False,)),
    "training": Kind("attention, forward and backward", attend, list(PEERS), (True,)),
    "capture": Kind("block maps of a Llama of 2 layers", capture, list(WAYS)),
}


def variants(kind: str) -> dict[str, Callable[[str], Found]]:
    """For the table of cases; each takes a number of tokens."""
    own = KINDS[kind]
    return {name: functools.partial(own.run, name, *own.more) for name in own.names}


def one(kind: str, name: str, length: int) -> Found:
    """One case in a process of its own; ``stopped`` says why there is no number."""
    try:
        return measure(
            f"peers {kind}", name, length, timeout=SECONDS,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES)),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"stopped": f"over {SECONDS} s"}
    except StoppedError as error:
        text, status = error.args
    said = text.splitlines()
    end = " ".join(said[-3:])
    if status < 0 or "allocate memory" in end or "MemoryError" in end:
        return {"stopped": "out of memory"}
    return {"stopped": ([line for line in said if "Error" in line] or said)[-1][:160]}


def compare(
    kinds: list[str], sizes: list[int], rounds: int, results: dict[str, Any], only: list[str]
) -> dict[str, Any]:
    """By turns: every peer once, then every peer again. A peer that stopped is not tried at greater lengths."""
    for kind in kinds:
        found: dict[str, dict[str, Any]] = {n: {} for n in KINDS[kind].names if not only or n in only}
        stopped: set[str] = set()
        for length in sizes:
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in found}
            # Long cases last long enough to be measured once.
            for _ in range(rounds if length <= 8192 else 1):
                for name in found:
                    if name in stopped:
                        continue
                    runs[name].append(one(kind, name, length))
                    if "stopped" in runs[name][-1]:
                        stopped.add(name)
            for name, all_runs in runs.items():
                found[name][str(length)] = summary(all_runs) if all_runs else {"stopped": "not tried"}
        # In the order of the table; what was not measured now is kept.
        before = results.get(kind, {})
        results[kind] = {
            name: dict(
                sorted({**before.get(name, {}), **found.get(name, {})}.items(), key=lambda item: int(item[0]))
            )
            for name in KINDS[kind].names
            if name in before or name in found
        }
    return results


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    if "stopped" in runs[-1]:
        return runs[-1]
    seconds = [run["seconds"] for run in runs]
    return {
        "seconds": statistics.median(seconds),
        "spread": (max(seconds) - min(seconds)) / statistics.median(seconds),
        "peak": statistics.median(run["peak"] for run in runs),
        "error": max(run["error"] for run in runs),
        "runs": len(runs),
    }


def exponent(points: list[tuple[int, float]]) -> float:
    """Slope of a straight line through the points, both axes logarithmic."""
    x = torch.tensor([[math.log(n), 1.0] for n, _ in points], dtype=torch.float64)
    y = torch.tensor([math.log(max(value, 1e-9)) for _, value in points], dtype=torch.float64)
    return torch.linalg.lstsq(x, y[:, None]).solution[0].item()


def table(results: dict[str, Any]) -> str:
    lines = []
    for kind, found in results.items():
        lines += [
            "",
            f"### {KINDS[kind].title}",
            "",
            "| | N | time | spread | peak | from float64 |",
            "|---|---|---|---|---|---|",
        ]
        for name, by_length in found.items():
            for length, entry in by_length.items():
                if "stopped" not in entry:
                    lines.append(
                        f"| {name} | {int(length):,} | {entry['seconds']:.3g} s | {entry['spread']:.0%} | "
                        f"{entry['peak'] / 1e6:,.0f} MB | {entry['error']:.1e} |"
                    )
                elif entry["stopped"] != "not tried":
                    lines.append(f"| {name} | {int(length):,} | {entry['stopped']} | | | |")
    return "\n".join(lines)


def verdict(results: dict[str, Any]) -> list[str]:
    """Where another is better: an exact peer that is faster with no more memory, or maps that need more than they may."""
    wrong = []
    for kind in ("forward", "training"):
        found = results.get(kind, {})
        mine = [name for name in found if name.startswith("attnpatch")]
        for name, by_length in found.items():
            for length, entry in by_length.items():
                if name in mine or "stopped" in entry or entry["error"] > EXACT:
                    continue
                tried = [found[each][length] for each in mine if length in found[each]]
                own = [e for e in tried if "stopped" not in e]
                # Within a twentieth, and 20 MB, two measurements are the same.
                beaten = [
                    e["seconds"] > 1.05 * entry["seconds"] for e in own if e["peak"] + 2e7 >= entry["peak"]
                ]
                if tried and (not own or (len(beaten) == len(own) and all(beaten))):
                    wrong.append(f"{kind}, N={length}: {name} is faster with no more memory")
    found = results.get("capture", {})
    at = {name: by_length.get("8192", {}) for name, by_length in found.items()}
    own, without = at.pop("attnpatch.capture", {}), at.pop(NO_MAPS, {})
    peaks = {name: entry["peak"] for name, entry in at.items() if "peak" in entry}
    if peaks and "peak" in own:
        best = min(peaks, key=lambda name: peaks[name])
        ratio = peaks[best] / own["peak"]
        if ratio < LESS_MEMORY:
            more = f"; the pass without maps takes {without['peak'] / 1e6:.0f} MB" if without else ""
            wrong.append(
                f"capture, N=8192: {ratio:.1f}x less memory than {best}, the limit is {LESS_MEMORY}x, "
                f"{own['peak'] / 1e6:.0f} MB{more}"
            )
    return wrong


_OWN = ["black", "crimson"]
_OTHERS = ["tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:olive", "tab:cyan"]


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
    """Time and peak memory over N, with the exponent of each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6 * len(results)), layout="constrained")
    grid = figure.subplots(len(results), 2, squeeze=False)
    for row, (kind, found) in zip(grid, results.items(), strict=True):
        own = [name for name in found if name.startswith("attnpatch")]
        colours = dict(zip([name for name in found if name not in own], _OTHERS, strict=False))
        colours |= dict(zip(own, _OWN, strict=False))
        for axes, key, scale, label in zip(
            row, ("seconds", "peak"), (1, 1e-6), ("seconds", "MB"), strict=True
        ):
            for name, by_length in found.items():
                points = [(int(n), e[key] * scale) for n, e in by_length.items() if "stopped" not in e]
                if not points:
                    continue
                tail = [point for point in points if point[0] >= 2048]
                power = f"  N^{exponent(tail):.1f}" if len(tail) > 1 else ""
                mine = name.startswith("attnpatch")
                # The kernel that ours ends in runs along the same line: dashed, above it.
                style = {"linestyle": "--", "zorder": 4} if name == "SDPA, fused" else {}
                axes.loglog(
                    *zip(*points, strict=True), marker="o", markersize=5 if mine else 3, color=colours[name],
                    linewidth=2.4 if mine else 1.1, label=name + power, **style,
                )  # fmt: skip
            axes.set_xscale("log", base=2)
            lengths = sorted({int(n) for by_length in found.values() for n in by_length})
            axes.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
            axes.set_xlabel("tokens")
            axes.set_ylabel(label)
            axes.set_title(
                f"{KINDS[kind].title}: {'time' if key == 'seconds' else 'peak memory'}", fontsize=11
            )
            axes.legend(fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def peers(arguments: list[str]) -> int:
    """Measure, draw and print; 1 where a peer is better."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks peers", description=__doc__)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--sizes", nargs="*", type=int, default=SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="names of peers; all")
    parser.add_argument("--show", action="store_true", help="only print and draw what was measured before")
    options = parser.parse_args(arguments)
    known = {name for kind in options.kinds for name in KINDS[kind].names}
    if unknown := [name for name in options.only if name not in known]:
        parser.error(f"there is no {unknown[0]!r}; known are {', '.join(sorted(known))}")
    results = kept(RESULTS)
    if not options.show:
        keep(RESULTS, compare(options.kinds, options.sizes, options.rounds, results, options.only))
    draw(results, PICTURE)
    wrong = [f"missed: {line}" for line in verdict(results)]
    print(table(results), "", *(wrong or ["no peer is better"]), sep="\n")
    return int(bool(wrong))
