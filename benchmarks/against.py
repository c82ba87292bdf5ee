"""This checkout beside another one of the project: ``python -m benchmarks.against FOLDER [CASE...]``.

Each measurement is a process of its own that runs the benchmarks of its checkout, the two by turns, in the environment
of this one. Printed are ratios of medians, this one over the other, with the lowest and the highest ratio of neighbours.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent.parent
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
]


def measured(checkout: pathlib.Path, case: str, variant: str) -> dict[str, float]:
    """One measurement of a checkout."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.case", case, variant]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{checkout}: {case} {variant} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=pathlib.Path, help="a checkout of an earlier commit")
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(case for case, *_ in CASES)}; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    unknown = set(options.cases) - {case for case, *_ in CASES}
    if unknown or not (options.other / "benchmarks" / "case.py").is_file():
        parser.error(
            f"no such case: {', '.join(sorted(unknown))}"
            if unknown
            else f"{options.other} is no checkout of this project"
        )
    print(f"{'case':22} {'other':>9} {'this':>9} {'ratio':>6}  {'of neighbours':15} {'peak':>6}")
    for case, variant, what in CASES:
        if options.cases and case not in options.cases:
            continue
        pairs = [
            [measured(checkout, case, variant) for checkout in (options.other.resolve(), HERE)]
            for _ in range(options.rounds)
        ]
        first, second = (statistics.median(pair[i][what] for pair in pairs) for i in (0, 1))
        ratios = [b[what] / a[what] for a, b in pairs]
        peaks = [statistics.median(pair[i].get("peak", 0) for pair in pairs) for i in (0, 1)]
        peak = f"{peaks[1] / peaks[0]:.2f}" if peaks[0] else ""
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(
            f"{f'{case}, {variant}':22} {first:9.4g} {second:9.4g} {second / first:6.3f}  {spread:15} {peak:>6}",
            flush=True,
        )


if __name__ == "__main__":
    main()
