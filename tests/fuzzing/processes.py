"""Many cases on every core. A process runs a thousand; one that dies says in which case, and is followed by another."""

from __future__ import annotations

import collections
import concurrent.futures
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
import warnings
from typing import Any

import hypothesis
import torch

from .programs import Program, programs
from .running import check, shrunk

CHUNK = 1000
# Wrong programs of a process that are made smaller: a fault that is everywhere is said often enough.
SHOWN = 5


def chunk(seed: int, count: int, skip: int, present: pathlib.Path) -> dict[str, Any]:
    """Cases ``skip`` to ``count`` of a seed: how many were what, and those that were wrong, smaller.

    ``present``: a file that names the case at hand.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    counts: collections.Counter[str] = collections.Counter()
    wrong: dict[str, Program] = {}
    drawn = 0

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=count, database=None, deadline=None, phases=[hypothesis.Phase.generate],
                         suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
    @hypothesis.given(programs())
    def one(program: Program) -> None:
        nonlocal drawn
        drawn += 1
        if drawn <= skip or drawn > count:
            return
        present.write_text(json.dumps([drawn, dict(counts), str(program)]))
        verdict, what = check(program)
        counts[verdict] += 1
        if verdict == "wrong":
            wrong.setdefault(what[:60], program)

    one()
    found = []
    for what, program in list(wrong.items())[:SHOWN]:
        present.write_text(
            json.dumps([count, dict(counts), f"# while it was made smaller: {what}\n{program}"])
        )
        small = shrunk(program)
        found.append((check(small)[1], str(small)))
    return {"counts": counts, "found": found}


def survived(seed: int, count: int) -> tuple[collections.Counter[str], list[tuple[str, str]]]:
    """``chunk`` in processes of its own."""
    total: collections.Counter[str] = collections.Counter()
    found: list[tuple[str, str]] = []
    skip = 0
    with tempfile.TemporaryDirectory() as folder:
        present = pathlib.Path(folder, "present")
        while skip < count:
            present.write_text(json.dumps([count, {}, "none"]))
            command = [
                sys.executable,
                "-m",
                "tests.fuzzing",
                "chunk",
                *map(str, (seed, count, skip, present)),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                result = json.loads(done.stdout.splitlines()[-1])
                total.update(result["counts"])
                return total, found + [tuple(pair) for pair in result["found"]]
            drawn, counts, program = json.loads(present.read_text())
            total.update(counts)
            total["wrong"] += 1
            reason = (done.stderr.strip().splitlines() or [""])[-1] if done.returncode > 0 else "aborted"
            found.append((f"process ended with {done.returncode}: {reason[:200]}", program))
            skip = drawn
    return total, found


def main() -> int:
    """All of it; the exit status says whether something was wrong."""
    if sys.argv[1:2] == ["chunk"]:
        seed, count, skip = map(int, sys.argv[2:5])
        print(json.dumps(chunk(seed, count, skip, pathlib.Path(sys.argv[5]))))
        return 0
    seed = int(os.environ.get("ATTNPATCH_FUZZ_SEED") or random.SystemRandom().randrange(10**6))
    number = int(os.environ.get("ATTNPATCH_FUZZ_N") or 200_000)
    cores = int(os.environ.get("ATTNPATCH_FUZZ_PROCESSES") or os.cpu_count() or 1)
    print(f"seed {seed}: {number:,} cases, {cores} processes", flush=True)
    total: collections.Counter[str] = collections.Counter()
    shown: set[str] = set()
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        tasks = [
            pool.submit(survived, seed * 10_000 + i, min(CHUNK, number - i * CHUNK))
            for i in range(-(-number // CHUNK))
        ]
        for done in concurrent.futures.as_completed(tasks):
            counts, found = done.result()
            total += counts
            for what, program in found:
                if program not in shown:
                    shown.add(program)
                    print(f"\nWRONG {what}\n{program}\n", flush=True)
            seconds = time.monotonic() - began
            print(f"  {total.total():,} cases, {dict(total)}, {seconds:.0f} s", file=sys.stderr, flush=True)
    print(
        f"seed {seed}: {total.total():,} cases: {', '.join(f'{n:,} {name}' for name, n in total.most_common())}"
    )
    print(f"{total['wrong']} wrong")
    return int(bool(total["wrong"]))
