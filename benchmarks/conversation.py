"""The guide's table, measured: ``python -m benchmarks.conversation [--tokens 8192] [--layers 16] [--shape 1b]``.

Each row is one pass over a conversation of 16 messages with block maps of every layer, in a process of its own. The
model has random weights in the shape of Llama-3.2-1B (or of Llama-3.1-8B with ``--shape 8b``), in bfloat16 on the CPU.
What sampling costs in accuracy is measured on the trained model of the demo: attention of random weights is too even to
be hard to sample.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from attnpatch import Blocks, capture
from attnpatch.memory import PeakMeter, free_bytes

HERE = pathlib.Path(__file__).parent
SHAPES = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
MESSAGES = 16
# What the guide estimates at 32k tokens: memory, speed, accuracy.
GUIDE = {
    "no maps": ("", "", ""),
    "original": ("~80 GB+ (out of memory)", "baseline", "100 %"),
    "by rows": ("~40 GB (chunks of heads)", "baseline", "100 %"),
    "sequential": ("", "", ""),
    "chunked": ("", "", ""),
    "gradient": ("", "", ""),
    "gradient, checkpointing": ("~25 GB", "-20 %", "100 %"),
    "4-bit": ("~15 GB", "-10 %", "~99 %"),
    "sampling": ("~10 GB", "+50 %", "~95 %"),
}


def model_of(
    shape: str, layers: int, attention: str, quantised: bool = False, seed: int = 0, vocabulary: int = 32000
) -> torch.nn.Module:
    """Random weights; the vocabulary is small, since nobody looks at the logits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        **SHAPES[shape], num_hidden_layers=layers, vocab_size=vocabulary, max_position_embeddings=131072,
        attn_implementation=attention,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    return in_4_bits(model) if quantised else model


def in_4_bits(model: torch.nn.Module) -> torch.nn.Module:
    """Every linear layer of the decoder in bitsandbytes' 4 bits."""
    import bitsandbytes as bnb

    for module in list(model.model.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.Linear):
                weights = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                small = bnb.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=False,
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                )
                small.weight = weights
                setattr(module, name, small.to("cpu"))
    return model


def blocks_of(tokens: int) -> Blocks:
    edges = [tokens * i // MESSAGES for i in range(MESSAGES + 1)]
    return Blocks.spans(list(itertools.pairwise(edges)), ahead=True)


def original(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """The guide's: eager weights of a layer, taken by a hook, averaged over chunks of 8 heads, summed block by block."""
    edges = [ids.shape[1] * i // MESSAGES for i in range(MESSAGES + 1)]
    found = []

    def hook(module: Any, args: Any, output: Any) -> Any:
        weights = output[1][0]
        total = torch.zeros(MESSAGES, MESSAGES)
        for first in range(0, len(weights), 8):
            mean = weights[first : first + 8].float().mean(0)
            for i in range(MESSAGES):
                for j in range(MESSAGES):
                    part = mean[edges[i] : edges[i + 1], edges[j] : edges[j + 1]]
                    total[i, j] += part.sum(-1).mean() * 8 / len(weights)
        found.append(total)
        return (output[0], None)

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(hook)
    with torch.inference_mode():
        model(ids, use_cache=False, logits_to_keep=1)


def passes(model: torch.nn.Module, ids: torch.Tensor, size: int | None, **options: Any) -> None:
    from transformers import DynamicCache

    tokens = ids.shape[1]
    with torch.inference_mode(), capture(model, blocks_of(tokens), **options):
        if size is None:
            model(ids, use_cache=False, logits_to_keep=1)
            return
        cache = DynamicCache(config=model.config)
        for start in range(0, tokens, size):
            model(ids[:, start : start + size], past_key_values=cache, use_cache=True, logits_to_keep=1)


def gradient(model: torch.nn.Module, ids: torch.Tensor, checkpointing: bool) -> None:
    from attnpatch.conversations.gradient import attributed

    tokens = ids.shape[1]
    with capture(model, blocks_of(tokens), weighting="gradient"):
        attributed(model, ids, list(range(tokens - tokens // MESSAGES, tokens)), checkpointing)


def no_maps(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """The same pass without a map: what is left of a row beyond this is what maps cost."""
    with torch.inference_mode():
        model(ids, use_cache=False, logits_to_keep=1)


CASES: dict[str, tuple[str, Callable[[Any, Any], None]]] = {
    "no maps": ("sdpa", no_maps),
    "original": ("eager", original),
    "by rows": ("sdpa", lambda model, ids: passes(model, ids, None)),
    "sequential": ("sdpa", lambda model, ids: passes(model, ids, ids.shape[1] // MESSAGES)),
    "chunked": ("sdpa", lambda model, ids: passes(model, ids, 1024)),
    "gradient": ("sdpa", lambda model, ids: gradient(model, ids, False)),
    "gradient, checkpointing": ("sdpa", lambda model, ids: gradient(model, ids, True)),
    "4-bit": ("sdpa", lambda model, ids: passes(model, ids, None)),
    "sampling": ("sdpa", lambda model, ids: passes(model, ids, None, sample_rows=16)),
}


def measure(case: str, shape: str, layers: int, tokens: int) -> dict[str, float]:
    attention, run = CASES[case]
    model = model_of(shape, layers, attention, case == "4-bit")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    ids = torch.randint(0, 32000, (1, tokens), generator=torch.Generator().manual_seed(0))
    need = SHAPES[shape]["num_attention_heads"] * tokens**2 * 10
    if case == "original" and need > free_bytes(torch.device("cpu")):
        return {"seconds": float("nan"), "peak": float("nan"), "weights": weights, "needs": need}
    with PeakMeter() as meter:
        start = time.perf_counter()
        run(model, ids)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": meter.peak, "weights": weights}


def sampling_error() -> list[tuple[str, float, float, float]]:
    """Rows per block, what maps cost beside the pass, and the largest and mean error of a cell, over 8 seeds.

    The cost is the time of a pass with maps less that of one without, as a share of the latter; medians, by turns.
    """
    from attnpatch.demo.conversation import Conversation
    from attnpatch.demo.run import FOLDER
    from attnpatch.demo.worker import load

    model, tokenizer = load(FOLDER / "model", "sdpa")
    conversation = Conversation.load(FOLDER / "conversation.json")
    rendered = tokenizer.apply_chat_template(conversation.messages, tokenize=False)
    ids = torch.tensor([tokenizer(rendered, add_special_tokens=False)["input_ids"][:4096]])

    def once(**options: Any) -> tuple[float, torch.Tensor | None]:
        with torch.inference_mode(), contextlib.ExitStack() as stack:
            maps = stack.enter_context(capture(model, Blocks.fixed(128), **options)) if options else None
            start = time.perf_counter()
            model(ids, use_cache=False, logits_to_keep=1)
            seconds = time.perf_counter() - start
            return seconds, None if maps is None else maps.block_map.mass.double()

    kinds: dict[str, dict[str, Any]] = {"no maps": {}, "all": {"sample_rows": None}}
    kinds |= {str(count): {"sample_rows": count} for count in (64, 16, 4, 1)}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    found: dict[str, list[Any]] = {kind: [] for kind in kinds}
    for seed in range(9):
        for kind, options in kinds.items():
            spent, mass = once(**options, **({"seed": seed} if options else {}))
            if seed:  # the first round warms up
                seconds[kind].append(spent)
                found[kind].append(mass)
    exact, base = found["all"][0], statistics.median(seconds["no maps"])
    rows = []
    for kind in list(kinds)[1:]:
        errors = torch.stack([(mass - exact).abs() for mass in found[kind]])
        most, mean = errors.max().item(), errors[:, exact > 0].mean().item()
        rows.append((kind, statistics.median(seconds[kind]) / base - 1, most, mean))
    return rows


def table(shape: str, layers: int, tokens: int, cases: list[str]) -> list[dict[str, Any]]:
    found = []
    for case in cases:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.conversation", "--case", case]
        command += ["--shape", shape, "--layers", str(layers), "--tokens", str(tokens)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, check=False)
        one: dict[str, Any] = {"case": case, "failed": done.returncode}
        with contextlib.suppress(IndexError, json.JSONDecodeError):
            one |= json.loads(done.stdout.splitlines()[-1])
        found.append(one)
        print(_line(one), flush=True)
    return found


def _line(one: dict[str, Any]) -> str:
    memory, speed, accuracy = GUIDE[one["case"]]
    if one["failed"]:
        measured = f"{'killed: out of memory' if one['failed'] < 0 else 'failed':>29}"
    elif one["seconds"] != one["seconds"]:
        measured = f"{'needs ' + format(one['needs'] / 1e9, '.0f') + ' GB, not run':>29}"
    else:
        measured = f"{one['peak'] / 1e9:8.2f} GB  {one['weights'] / 1e9:5.2f} GB {one['seconds']:8.1f} s"
    return f"{one['case']:24} {measured}   | guide at 32k: {memory:26} {speed:9} {accuracy}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conversation", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--case", choices=CASES, help="only this, as one line of JSON")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--sampling", action="store_true", help="only what sampling costs in accuracy")
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.case:
        print(json.dumps(measure(options.case, options.shape, options.layers, options.tokens)))
        return
    if not options.sampling:
        print(f"{options.tokens} tokens, {options.layers} layers of the {options.shape} shape, bfloat16, CPU")
        print(f"{'':24} {'beyond weights':>11}  {'weights':>8} {'time':>8}")
        table(options.shape, options.layers, options.tokens, options.cases)
    print("\nrows per block of 128 tokens, of the demo's model at 4,096 tokens; mass is 0 to 1")
    print(f"{'rows':>5} {'cost of maps':>13} {'largest error':>14} {'mean error':>11}")
    for kind, cost, most, mean in sampling_error():
        print(f"{kind:>5} {cost:>12.0%} {most:>14.4f} {mean:>11.5f}")


if __name__ == "__main__":
    main()
