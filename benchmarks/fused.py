"""Attention written by hand on the fused kernel: ``python -m benchmarks fuse [--only NAME ...]``."""

from __future__ import annotations

import json
import pathlib
import statistics
import sys
from collections.abc import Callable

from benchmarks.case import FUSED

RESULTS = pathlib.Path(__file__).parent / "fuse.json"
VARIANTS = ("native", "by rows", "fused")
# How much faster than native eager is asked; of the others nothing is.
ASKED = {"llama": 4.0, "gptj": 2.0, "bloom": 2.0, "t5": 2.0, "deberta": 2.0}


def main(measure: Callable[[str, str], dict[str, float]], names: list[str], rounds: int = 3) -> int:
    """Measure by turns, keep what was measured of models that are not named, print; 1 if something asked was missed."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names or FUSED:
        runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
        for _ in range(rounds):
            for variant in VARIANTS:
                runs[variant].append(measure(f"fuse {name}", variant))
                print(f"  {name} {variant} {runs[variant][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
        error = measure(f"fuse {name}", "error")
        results[name] = {"tokens": FUSED[name], "runs": runs, "error": error["fused"] / error["native"]}
        RESULTS.write_text(json.dumps(results, indent=1))
    missed = []
    print(
        "| model | tokens | native | by rows | fused | asked | error, times native's |\n|---|---|---|---|---|---|---|"
    )
    for name, found in results.items():
        seconds, peaks = (
            {v: statistics.median(run[key] for run in runs) for v, runs in found["runs"].items()}
            for key in ("seconds", "peak")
        )
        cells = []
        for variant in VARIANTS:
            times = seconds["native"] / seconds[variant]
            faster = "" if variant == "native" else f" ({times:.1f}x)"
            cells.append(f"{seconds[variant]:.2f} s{faster}, {peaks[variant] / 1e9:.2f} GB")
        asked = ASKED.get(name)
        print(
            f"| {name} | {found['tokens']:,} | {' | '.join(cells)} | {f'{asked:g}x' if asked else ''} | {found['error']:.3f} |"
        )
        if asked and seconds["native"] / seconds["fused"] < asked:
            missed.append(name)
    print(f"missed: {', '.join(missed)}" if missed else "all that was asked is reached")
    return bool(missed)
