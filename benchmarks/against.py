"""This checkout beside another one of the project: ``python -m benchmarks.against FOLDER [CASE...]``.

Each measurement is a process of its own that runs the benchmarks of its checkout, the two by turns, in the environment
of this one. Printed are ratios of medians, this one over the other, with the lowest and the highest ratio of neighbours.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from benchmarks.runner import ROOT, measure, median

# Case, variant, and what is compared.
CASES = [
    ("eager", "by rows", "seconds"),
    ("sdpa", "by rows", "seconds"),
    ("capture", "on", "seconds"),
    ("capture decode", "pairs", "seconds"),
    ("training", "by rows", "seconds"),
    ("vae", "by rows", "seconds"),
    ("fuse t5", "by rows", "seconds"),
    ("fuse deberta", "by rows", "seconds"),
    ("fuse gptj", "fused", "seconds"),
    ("prefill 512", "pairs", "ratio"),
    ("decode", "pairs", "ratio"),
    ("staying", "sdpa", "seconds"),
    ("staying", "eager", "seconds"),
]


def against(arguments: list[str]) -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against", description=__doc__.splitlines()[0])
    parser.add_argument("other", type=pathlib.Path, help="a checkout of an earlier commit")
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(case for case, *_ in CASES)}; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    if unknown := set(options.cases) - {case for case, *_ in CASES}:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    if not (options.other / "benchmarks" / "case.py").is_file():
        parser.error(f"{options.other} is no checkout of this project")
    print(f"{'case':22} {'other':>9} {'this':>9} {'ratio':>6}  {'of neighbours':15} {'peak':>6}")
    for case, variant, what in CASES:
        if options.cases and case not in options.cases:
            continue
        runs = [
            [measure(case, variant, checkout=checkout) for checkout in (options.other.resolve(), ROOT)]
            for _ in range(options.rounds)
        ]
        other, this = zip(*runs, strict=True)
        first, second = median(other, what), median(this, what)
        ratios = [b[what] / a[what] for a, b in runs]
        peak = f"{median(this, 'peak') / median(other, 'peak'):.2f}" if "peak" in this[0] else ""
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(
            f"{f'{case}, {variant}':22} {first:9.4g} {second:9.4g} {second / first:6.3f}  {spread:15} {peak:>6}",
            flush=True,
        )


if __name__ == "__main__":
    against(sys.argv[1:])
