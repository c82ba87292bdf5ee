"""What the start-up file costs an interpreter that was not asked to activate: ``python -m benchmarks startup``.

Two fresh virtual environments with the built wheel, one of them without the file; ``python -c pass`` in either, by
turns. Interpreters on a shared machine differ by more than what is measured,
so that many pairs are needed; what counts is the difference of the medians, and the median of the pairs' differences
beside it. The import of the boot module is timed as well: what an interpreter pays that reads ``attnpatch.start``.
"""

from __future__ import annotations

import os
import pathlib
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv

ROOT = pathlib.Path(__file__).parents[1]
# Milliseconds.
ASKED = 0.3
PAIRS = 600


def startup() -> None:
    """Measure and print; exit code 1 if it is more than was asked."""
    with tempfile.TemporaryDirectory(prefix="attnpatch_startup_") as temporary:
        folder = pathlib.Path(temporary)
        wheel = _wheel(folder)
        python, site = _environment(folder / "with", wheel)
        bare, bare_site = _environment(folder / "without", wheel)
        (bare_site / "attnpatch.pth").unlink()
        with_file, without = _by_turns(python, bare)
        module = _import_time(python, site)
    differences = [a - b for a, b in zip(with_file, without, strict=True)]
    cost = statistics.median(with_file) - statistics.median(without)
    print(
        f"python -c pass, medians of {PAIRS}: {statistics.median(without):.2f} ms without the start-up file,"
    )
    print(
        f"{statistics.median(with_file):.2f} ms with it: {cost:.3f} ms (median of pairs {statistics.median(differences):.3f})"
    )
    print(f"import of the boot module alone, where attnpatch.start is read: {module:.3f} ms")
    print(f"asked: under {ASKED} ms; {'reached' if cost < ASKED else 'missed'}")
    raise SystemExit(cost >= ASKED)


PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]


def _wheel(folder: pathlib.Path) -> pathlib.Path:
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def _environment(folder: pathlib.Path, wheel: pathlib.Path) -> tuple[str, pathlib.Path]:
    """The interpreter of a fresh environment with attnpatch in it, and its folder of packages."""
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    paths = sysconfig.get_paths("venv", {"base": str(folder), "platbase": str(folder)})
    python = str(pathlib.Path(paths["scripts"]) / "python")
    subprocess.run([*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    return python, pathlib.Path(paths["purelib"])


def _by_turns(python: str, bare: str) -> tuple[list[float], list[float]]:
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(2 * PAIRS + 20):
        milliseconds = _run((python, bare)[i % 2])
        # The first ones fill the caches.
        if i >= 20:
            times[i % 2].append(milliseconds)
    return times


def _run(python: str) -> float:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ATTNPATCH")}
    start = time.perf_counter()
    subprocess.run([python, "-c", "pass"], env=clean, check=True)
    return (time.perf_counter() - start) * 1e3


def _import_time(python: str, site: pathlib.Path) -> float:
    """Milliseconds of the import as ``-X importtime`` gives them, compiled before."""
    subprocess.run([python, "-m", "compileall", "-q", site / "attnpatch_boot.py"], check=True)
    command = [python, "-X", "importtime", "-c", "import attnpatch_boot; attnpatch_boot.start()"]
    found = []
    for _ in range(50):
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        (line,) = (line for line in said.splitlines() if line.endswith("| attnpatch_boot"))
        found.append(int(line.split("|")[1]) / 1e3)
    return statistics.median(found)
