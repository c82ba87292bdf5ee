"""One measurement after the other, each in a process of its own: what every table of figures is made of."""

from __future__ import annotations

import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from attnpatch.memory.peak import PeakMeter

ROOT = pathlib.Path(__file__).resolve().parents[1]

Found = dict[str, Any]


class StoppedError(Exception):
    """A measurement gave no number; the message is the end of what its process said."""


def measure(
    case: str, variant: str, *parameters: object, checkout: pathlib.Path = ROOT, **options: Any
) -> Found:
    """``python -m benchmarks.case`` in a fresh process of this environment.

    Args:
        case, variant: Keys of ``benchmarks.case.CASES``.
        parameters: What the variant is called with.
        checkout: Whose code is measured.
        options: For ``subprocess.run``.

    Raises:
        StoppedError: The process ended with an error; ``returncode`` is in its arguments.
    """
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.case", case, variant, *map(str, parameters)]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise StoppedError(f"{case}, {variant}: {done.stderr[-2000:].strip()}", done.returncode)
    found = json.loads(done.stdout.splitlines()[-1])
    shown = f"{found['seconds']:.2f} s" if "seconds" in found else done.stdout.splitlines()[-1]
    print(f"  {case} {' '.join([variant, *map(str, parameters)])}: {shown}", file=sys.stderr, flush=True)
    return found


def by_turns(case: str, variants: Sequence[str], rounds: int) -> dict[str, list[Found]]:
    """Every variant once, then every variant again: the machines these run on are shared and noisy."""
    runs: dict[str, list[Found]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant in variants:
            runs[variant].append(measure(case, variant))
    return runs


def median(runs: list[Found], key: str) -> float:
    """Of one figure over the runs of a variant."""
    return statistics.median(run[key] for run in runs)


def once(call: Callable[[], Any], warm: Callable[[], object] | None = None) -> tuple[Found, Any]:
    """Seconds and peak bytes of one call, and its result; ``warm`` is called before."""
    if warm is not None:
        warm()
    with PeakMeter() as meter:
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": meter.peak}, result


def kept(path: pathlib.Path) -> dict[str, Any]:
    """Results that were written before."""
    return json.loads(path.read_text()) if path.exists() else {}


def keep(path: pathlib.Path, results: dict[str, Any]) -> None:
    """Write results; whole, or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)
