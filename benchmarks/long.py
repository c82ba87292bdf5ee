"""32,768 tokens with block maps of every layer, layer by layer: ``python -m benchmarks.long [--tokens 32768]``.

The model has random weights in the shape of Llama-3.2-1B (16 layers, 32 heads) in bfloat16 on the CPU. One layer at a
time runs, natively and with maps, by turns, each in a process of its own; what goes into the next layer is kept in a
folder, so that a run that was stopped goes on where it was. Layer by layer is also how a model runs: no layer knows of
another but by its input.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from attnpatch import capture
from attnpatch.memory import PeakMeter
from benchmarks.conversation import GUIDE, SHAPES, blocks_of, model_of

HERE = pathlib.Path(__file__).parent
# What is measured of each layer. The first is compared to, and its result is the next layer's input.
VARIANTS: dict[str, dict[str, Any]] = {
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


def measure(folder: pathlib.Path, number: int, variant: str, shape: str, tokens: int) -> dict[str, Any]:
    """One layer, once: seconds, bytes beyond weights and input, and what tells that results are the same."""
    kept = folder / f"into_{number}.pt"
    hidden = torch.load(kept) if number else first_input(tokens, shape)
    model = layer_of(number, shape, variant == "4-bit")
    found: dict[str, Any] = {}
    with PeakMeter() as meter, torch.inference_mode(), contextlib.ExitStack() as stack:
        start = time.perf_counter()
        maps = None
        if VARIANTS[variant]:
            maps = stack.enter_context(capture(model, blocks_of(tokens), **VARIANTS[variant]))
        result = model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        found["seconds"] = time.perf_counter() - start
    found["peak"] = meter.peak
    found["bits"] = int(
        result.flatten()[:: max(1, result.numel() // COMPARED)].view(torch.int16).long().sum()
    )
    if maps is not None:
        found["rows_sum"] = maps.block_map.mass.sum(-1).mean().item()
        maps.block_map.save(folder / f"map_{number}_{variant.replace(' ', '_')}.safetensors")
    else:
        whole = folder / "whole.pt"
        torch.save(result, whole)
        whole.replace(folder / f"into_{number + 1}.pt")
    return found


def run(folder: pathlib.Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Whatever is not in the folder yet; returns what is known of each layer, by variant."""
    done = folder / "done.json"
    known: list[dict[str, Any]] = json.loads(done.read_text()) if done.exists() else []
    for number in range(len(known), options.layers):
        layer = {}
        # By turns: the order changes from layer to layer.
        for variant in options.variants[:: 1 if number % 2 else -1]:
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.long", "--folder", str(folder)]
            command += [
                "--one",
                str(number),
                variant,
                "--shape",
                options.shape,
                "--tokens",
                str(options.tokens),
            ]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=HERE.parent)
            layer[variant] = json.loads(printed.stdout.splitlines()[-1])
            print(
                f"layer {number} {variant:9} {layer[variant]['seconds']:8.1f} s", file=sys.stderr, flush=True
            )
        known.append(layer)
        whole = done.with_suffix(".new")
        whole.write_text(json.dumps(known))
        whole.replace(done)
        (folder / f"into_{number}.pt").unlink(missing_ok=True)
    return known


def table(known: list[dict[str, Any]], options: argparse.Namespace) -> None:
    first = options.variants[0]
    print(f"\n{options.tokens} tokens, {len(known)} layers of the {options.shape} shape, bfloat16, CPU")
    print(f"{'':9} {'beyond weights':>15} {'time':>9} {'median of layers':>17}  same bits")
    for variant in options.variants:
        ratios = [layer[variant]["seconds"] / layer[first]["seconds"] for layer in known]
        peak = max(layer[variant]["peak"] for layer in known)
        seconds = sum(layer[variant]["seconds"] for layer in known)
        same = sum(layer[variant]["bits"] == layer[first]["bits"] for layer in known)
        guide = " | guide at 32k: " + " ".join(GUIDE[variant]) if any(GUIDE[variant]) else ""
        print(
            f"{variant:9} {peak / 1e9:12.2f} GB {seconds:7.0f} s {statistics.median(ratios):16.2f}x"
            f"  {same} of {len(known)}{guide}"
        )
    need = SHAPES[options.shape]["num_attention_heads"] * options.tokens**2 * 10
    print(
        f"original  needs {need / 1e9:.0f} GB for the attention of one layer | guide at 32k: {GUIDE['original'][0]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long", description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=["no maps", "by rows"])
    parser.add_argument("--folder", type=pathlib.Path, help="where a run is kept; runs/long_TOKENS_SHAPE")
    parser.add_argument("--one", nargs=2, metavar=("LAYER", "VARIANT"), help="only this, as one line of JSON")
    options = parser.parse_args()
    torch.set_num_threads(2)
    folder = options.folder or HERE.parent / "runs" / f"long_{options.tokens}_{options.shape}"
    folder.mkdir(parents=True, exist_ok=True)
    if options.one:
        number, variant = int(options.one[0]), options.one[1]
        print(json.dumps(measure(folder, number, variant, options.shape, options.tokens)))
        return
    table(run(folder, options), options)


if __name__ == "__main__":
    main()
