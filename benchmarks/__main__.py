"""Every figure of the README and the docs: ``python -m benchmarks [NAME...]``.

A name is one of a case (or what several begin with: ``fuse``), or of a command, whose options follow. Cases run in fresh
processes, by turns with what they are compared to, and count as ratios of medians. Without a name: the cases of the README.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from benchmarks.case import CASES, Case
from benchmarks.runner import ROOT, by_turns, keep, kept, measure, median

RESULTS, PICTURE = ROOT / "benchmarks" / "results.json", ROOT / "docs" / "benchmarks.png"
MAIN = ("eager", "sdpa", "capture", "training", "prefill 512", "decode")
# The module of each command, whose function of that name is called with the arguments after it.
COMMANDS = {
    **dict.fromkeys(("tiles", "sweep", "rounding"), "kernels"),
    **dict.fromkeys(("conversation", "sampling"), "conversation"),
    **{name: name for name in "against explain gpu long overhead page peers pictures startup".split()},
}


def run(names: list[str], rounds: int | None) -> dict[str, Any]:
    """Measure some cases; what is known of others is kept."""
    results = kept(RESULTS)
    for name in names:
        case = CASES[name]
        variants = [variant for variant in case.variants if variant not in case.alone]
        if "pairs" in variants:  # both by turns in one process
            variants = ["pairs"]
        results[name] = {"runs": by_turns(name, variants, rounds or case.rounds)}
        results[name] |= {variant: measure(name, variant) for variant in case.alone}
        results["machine"] = {
            "cores": torch.get_num_threads(),
            "processor": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        keep(RESULTS, results)
    return results


def table(names: list[str], results: dict[str, Any]) -> Iterator[str]:
    """A line for each variant of each case: times its first variant, and the limits of its last one."""
    yield f"{'case':14} {'variant':8} {'time':>10} {'ratio':>6} {'limit':>6} {'peak MB':>8} {'ratio':>6} {'limit':>6}"
    for name in names:
        case, found = CASES[name], results.get(name, {"runs": {}})
        runs = found["runs"]
        for variant in runs:
            is_last = variant == list(runs)[-1]
            limits = [f"{limit:.3g}" if is_last and limit else "" for limit in (case.time, case.peak)]
            time, peak = ratios(runs, variant)
            if "pairs" in runs:
                native, patched = (1e3 * median(runs[variant], key) for key in ("native", "patched"))
                yield f"{name:14} {'patched':8} {patched:7.1f} ms {time:6.3f} {limits[0]:>6}  native {native:.1f} ms"
                continue
            seconds, held = (median(runs[variant], key) for key in ("seconds", "peak"))
            yield (
                f"{name:14} {variant:8} {seconds:8.2f} s {time:6.2f} {limits[0]:>6} {held / 1e6:8.0f} {peak:6.3f} "
                f"{limits[1]:>6}"
            )
        for variant in case.alone:
            if variant in found:
                yield f"{name:14} {variant:8} {found[variant]['ratio']:.3f} times the native pass's"


def ratios(runs: dict[str, list[dict[str, float]]], variant: str) -> tuple[float, float]:
    """Of a variant to the first one: seconds, and peak bytes."""
    if "pairs" in runs:
        return median(runs["pairs"], "ratio"), 0.0
    first = next(iter(runs.values()))
    time, peak = (median(runs[variant], key) / max(1e-9, median(first, key)) for key in ("seconds", "peak"))
    return time, peak


def missed(names: list[str], results: dict[str, Any]) -> Iterator[str]:
    """Cases beyond their limits."""
    for name in names:
        case, runs = CASES[name], results.get(name, {"runs": {}})["runs"]
        if not runs:
            continue
        last = list(runs)[-1]
        for what, ratio, limit in zip(
            ("time", "peak"), ratios(runs, last), (case.time, case.peak), strict=True
        ):
            if limit is not None and ratio > limit:
                yield f"{name}: {what} {ratio:.3f}x, the limit is {limit:.3g}x"
        if case.more is not None:
            more = median(runs[last], "peak") - median(next(iter(runs.values())), "peak")
            if more >= case.more:
                yield f"{name}: {more / 1e6:.0f} MB more, the limit is {case.more / 1e6:.0f}"


def draw(results: dict[str, Any]) -> None:
    """Time and peak memory of the cases that have a title, as one picture."""
    from matplotlib.figure import Figure

    cases: list[tuple[Case, dict[str, Any]]] = [
        (case, results[name]["runs"]) for name, case in CASES.items() if case.title and name in results
    ]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, key, label, scale in zip(
        figure.subplots(1, 2),
        ("seconds", "peak"),
        ("seconds", "GB beyond the model"),
        (1.0, 1e-9),
        strict=True,
    ):
        for place, (_, runs) in enumerate(cases):
            for shift, variant, colour in zip((-0.2, 0.2), runs, ("#8a8f98", "#0b6fa4"), strict=True):
                value = median(runs[variant], key) * scale
                axes.bar(place + shift, value, 0.36, color=colour)
                said = f"{variant}\n{value:.3g}"
                axes.text(place + shift, value, said, ha="center", va="bottom", fontsize=7)
        axes.set_xticks(range(len(cases)), [case.title for case, _ in cases], fontsize=8)
        axes.set_ylabel(label)
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    title = "Llama shape, 2 layers, hidden 1024, float32, 2 CPU cores: native (grey), attnpatch (blue)"
    figure.suptitle(title, fontsize=10)
    figure.savefig(PICTURE, dpi=150)


def main(arguments: list[str]) -> int:
    """The exit status: 1 where a limit was missed."""
    if arguments and arguments[0] in COMMANDS:
        module = importlib.import_module(f"benchmarks.{COMMANDS[arguments[0]]}")
        return getattr(module, arguments[0])(arguments[1:]) or 0
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"cases: {', '.join(n for n, c in CASES.items() if c.rounds)}\ncommands: {', '.join(COMMANDS)}",
    )  # fmt: skip
    parser.add_argument("names", nargs="*", metavar="NAME", help="case or command")
    parser.add_argument("--rounds", type=int, help="how often each variant runs; the case says")
    parser.add_argument("--show", action="store_true", help="only print and draw what was measured before")
    options = parser.parse_args(arguments)
    names = [
        name
        for name, case in CASES.items()
        if case.rounds and any(f"{name} ".startswith(f"{asked} ") for asked in options.names or MAIN)
    ]
    if unknown := [asked for asked in options.names if not any(n.startswith(asked) for n in names)]:
        parser.error(f"there is no {unknown[0]!r}")
    results = kept(RESULTS) if options.show else run(names, options.rounds)
    draw(results)
    wrong = [f"missed: {line}" for line in missed(names, results)]
    print(*table(names, results), *(wrong or ["every limit is kept"]), sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
