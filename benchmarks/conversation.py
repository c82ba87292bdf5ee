"""What maps of a conversation cost, by the way that the model runs: ``python -m benchmarks conversation [--tokens 8192]``.

Each row is one pass over a conversation of 16 messages with block maps of every layer, in a process of its own, beside
the same pass without maps and beside maps made of eager weights in a hook. The model has random weights in the shape of
Llama-3.2-1B (or of Llama-3.1-8B with ``--shape 8b``), in bfloat16 on the CPU. What a sample of rows costs in accuracy
(``python -m benchmarks sampling``) is measured on the trained model of the demo: attention of random weights is too even
to be hard to sample.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import statistics
from typing import Any

import torch

from attnpatch import Blocks, capture
from attnpatch.memory.free import free_bytes
from benchmarks.runner import Found, StoppedError, measure, once

SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
}  # fmt: skip
MESSAGES = 16


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
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )  # fmt: skip
                small.weight = weights
                setattr(module, name, small.to("cpu"))
    return model


def edges_of(tokens: int) -> list[int]:
    return [tokens * i // MESSAGES for i in range(MESSAGES + 1)]


def blocks_of(tokens: int) -> Blocks:
    return Blocks.spans(list(itertools.pairwise(edges_of(tokens))), ahead=True)


def hook_on_eager_weights(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """Eager weights of a layer, averaged over chunks of 8 heads, summed block by block, and thrown away."""
    edges = edges_of(ids.shape[1])
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


# By way of running: the attention implementation, and the pass.
WAYS: dict[str, tuple[str, Any]] = {
    "no maps": ("sdpa", no_maps),
    "hook on eager weights": ("eager", hook_on_eager_weights),
    "by rows": ("sdpa", lambda model, ids: passes(model, ids, None)),
    "sequential": ("sdpa", lambda model, ids: passes(model, ids, ids.shape[1] // MESSAGES)),
    "chunked": ("sdpa", lambda model, ids: passes(model, ids, 1024)),
    "gradient": ("sdpa", lambda model, ids: gradient(model, ids, False)),
    "gradient, checkpointing": ("sdpa", lambda model, ids: gradient(model, ids, True)),
    "4-bit": ("sdpa", lambda model, ids: passes(model, ids, None)),
    "sampling": ("sdpa", lambda model, ids: passes(model, ids, None, sample_rows=16)),
}


def eager_bytes(shape: str, tokens: int) -> int:
    """Scores of one layer in bfloat16, their softmax in float32, and copies of both."""
    return SHAPES[shape]["num_attention_heads"] * tokens**2 * 10


def one_way(name: str, shape: str, layers: str, tokens: str) -> Found:
    """One pass: seconds, bytes beyond the weights, bytes of these; ``needs`` where it does not fit."""
    attention, run = WAYS[name]
    need = eager_bytes(shape, int(tokens))
    if attention == "eager" and need > free_bytes(torch.device("cpu")):
        return {"needs": need}
    model = model_of(shape, int(layers), attention, name == "4-bit")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    ids = torch.randint(0, 32000, (1, int(tokens)), generator=torch.Generator().manual_seed(0))
    return {**once(lambda: run(model, ids))[0], "weights": weights}


VARIANTS = {name: functools.partial(one_way, name) for name in WAYS}


def sampling_error() -> list[tuple[str, float, float, float]]:
    """Rows per block, what maps cost beside the pass, and the largest and mean error of a cell, over 8 seeds.

    The cost is the time of a pass with maps less that of one without, as a share of the latter; medians, by turns.
    """
    from attnpatch.demo.conversation import DemoConversation
    from attnpatch.demo.run import FOLDER
    from attnpatch.demo.worker import load

    model, tokenizer = load(FOLDER / "model", "sdpa")
    conversation = DemoConversation.load(FOLDER / "conversation.json")
    rendered = tokenizer.apply_chat_template(conversation.messages, tokenize=False)
    ids = torch.tensor([tokenizer(rendered, add_special_tokens=False)["input_ids"][:4096]])

    def run(**options: Any) -> tuple[float, torch.Tensor | None]:
        with torch.inference_mode(), contextlib.ExitStack() as stack:
            maps = stack.enter_context(capture(model, Blocks.fixed(128), **options)) if options else None
            spent, _ = once(lambda: model(ids, use_cache=False, logits_to_keep=1))
            return spent["seconds"], None if maps is None else maps.block_map.mass.double()

    kinds: dict[str, dict[str, Any]] = {"no maps": {}, "all": {"sample_rows": None}}
    kinds |= {str(count): {"sample_rows": count} for count in (64, 16, 4, 1)}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    found: dict[str, list[Any]] = {kind: [] for kind in kinds}
    for seed in range(9):
        for kind, options in kinds.items():
            spent, mass = run(**options, **({"seed": seed} if options else {}))
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


def conversation(arguments: list[str]) -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks conversation", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    options = parser.parse_args(arguments)
    print(f"{options.tokens} tokens, {options.layers} layers of the {options.shape} shape, bfloat16, CPU")
    print(f"{'':24} {'beyond weights':>14}  {'weights':>7} {'time':>10}")
    for name in options.ways:
        try:
            found = measure("conversation", name, options.shape, options.layers, options.tokens)
        except StoppedError as error:
            print(f"{name:24} {'killed: out of memory' if error.args[1] < 0 else error.args[0]}", flush=True)
            continue
        if "needs" in found:
            said = f"needs {found['needs'] / 1e9:.0f} GB for the attention of a layer, not run"
        else:
            said = (
                f"{found['peak'] / 1e9:11.2f} GB  {found['weights'] / 1e9:4.2f} GB {found['seconds']:8.1f} s"
            )
        print(f"{name:24} {said}", flush=True)


def sampling(arguments: list[str]) -> None:
    """Print what a sample of rows costs and gives."""
    torch.set_num_threads(2)
    print("rows per block of 128 tokens, of the demo's model at 4,096 tokens; mass is 0 to 1")
    print(f"{'rows':>5} {'cost of maps':>13} {'largest error':>14} {'mean error':>11}")
    for kind, cost, most, mean in sampling_error():
        print(f"{kind:>5} {cost:>12.0%} {most:>14.4f} {mean:>11.5f}")
