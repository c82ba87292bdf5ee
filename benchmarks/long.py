"""32,768 tokens with block maps of every layer, layer by layer: ``python -m benchmarks long [--tokens 32768]``.

The model has random weights in the shape of Llama-3.2-1B (16 layers, 32 heads) in bfloat16 on the CPU. One layer at a
time runs, natively and with maps, by turns, each in a process of its own; what goes into the next layer is kept in a
folder, so that a run that was stopped goes on where it was. Layer by layer is also how a model runs: no layer knows of
another but by its input.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import pathlib
import statistics
from typing import Any

import torch

from attnpatch import capture
from benchmarks.conversation import SHAPES, blocks_of, eager_bytes, model_of
from benchmarks.runner import ROOT, Found, keep, kept, measure, once

# What is measured of each layer. The first is compared to, and its result is the next layer's input.
WAYS: dict[str, dict[str, Any]] = {
    "no maps": {},
    "by rows": {"sample_rows": None},
    "sampling": {"sample_rows": 16},
    "4-bit": {"sample_rows": None},
}
# Of how many numbers of a layer's result are compared between variants.
COMPARED = 1 << 16


def layer_of(number: int, shape: str, quantised: bool) -> torch.nn.Module:
    """A model of one layer, whose weights depend on its number; without the norm that ends a model."""
    model = model_of(shape, 1, "sdpa", quantised, seed=number, vocabulary=32).model
    model.norm = torch.nn.Identity()
    return model


def first_input(tokens: int, shape: str) -> torch.Tensor:
    """``[1, tokens, hidden]``, as an embedding of 32,000 random tokens would give it."""
    numbers = torch.Generator().manual_seed(0)
    table = torch.randn(32000, SHAPES[shape]["hidden_size"], generator=numbers).mul_(0.02).bfloat16()
    return table[torch.randint(0, 32000, (1, tokens), generator=numbers)]


def one_layer(way: str, folder: str, layer: str, shape: str, tokens: str) -> Found:
    """One layer, once: seconds, bytes beyond weights and input, and what tells that results are the same."""
    place, number = pathlib.Path(folder), int(layer)
    hidden = torch.load(place / f"into_{number}.pt") if number else first_input(int(tokens), shape)
    model = layer_of(number, shape, way == "4-bit")
    with torch.inference_mode(), contextlib.ExitStack() as stack:
        maps = None
        if WAYS[way]:
            maps = stack.enter_context(capture(model, blocks_of(int(tokens)), **WAYS[way]))
        found, output = once(lambda: model(inputs_embeds=hidden, use_cache=False))
    result = output.last_hidden_state
    some = result.flatten()[:: max(1, result.numel() // COMPARED)]
    found["bits"] = int(some.view(torch.int16).long().sum())
    if maps is not None:
        found["rows_sum"] = maps.block_map.mass.sum(-1).mean().item()
        maps.block_map.save(place / f"map_{number}_{way.replace(' ', '_')}.safetensors")
    else:
        torch.save(result, place / "whole.pt")
        (place / "whole.pt").replace(place / f"into_{number + 1}.pt")
    return found


VARIANTS = {way: functools.partial(one_layer, way) for way in WAYS}


def run(folder: pathlib.Path, options: argparse.Namespace) -> list[Found]:
    """Whatever is not in the folder yet; returns what is known of each layer, by way."""
    known: list[Found] = kept(folder / "done.json").get("layers", [])
    for number in range(len(known), options.layers):
        # By turns: the order changes from layer to layer.
        known.append(
            {
                way: measure("layer", way, folder, number, options.shape, options.tokens)
                for way in options.ways[:: 1 if number % 2 else -1]
            }
        )
        keep(folder / "done.json", {"layers": known})
        (folder / f"into_{number}.pt").unlink(missing_ok=True)
    return known


def table(known: list[Found], options: argparse.Namespace) -> None:
    first = options.ways[0]
    print(f"\n{options.tokens} tokens, {len(known)} layers of the {options.shape} shape, bfloat16, CPU")
    print(f"{'':9} {'beyond weights':>15} {'time':>9} {'median of layers':>17}  same bits")
    for way in options.ways:
        ratios = [layer[way]["seconds"] / layer[first]["seconds"] for layer in known]
        peak = max(layer[way]["peak"] for layer in known)
        seconds = sum(layer[way]["seconds"] for layer in known)
        same = sum(layer[way]["bits"] == layer[first]["bits"] for layer in known)
        print(
            f"{way:9} {peak / 1e9:12.2f} GB {seconds:7.0f} s {statistics.median(ratios):16.2f}x"
            f"  {same} of {len(known)}"
        )
    need = eager_bytes(options.shape, options.tokens)
    print(f"a hook on eager weights needs {need / 1e9:.0f} GB for the attention of one layer")


def long(arguments: list[str]) -> None:
    """Measure what is not known yet, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks long", description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=["no maps", "by rows"])
    parser.add_argument("--folder", type=pathlib.Path, help="where a run is kept; runs/long_TOKENS_SHAPE")
    options = parser.parse_args(arguments)
    folder = options.folder or ROOT / "runs" / f"long_{options.tokens}_{options.shape}"
    folder.mkdir(parents=True, exist_ok=True)
    table(run(folder.resolve(), options), options)
