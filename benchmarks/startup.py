"""What the start-up file costs an interpreter that was not asked to activate: ``python -m benchmarks startup``.

Two fresh virtual environments with the built wheel, one of them without the file; ``python -c pass`` in either, by
turns. What counts is the difference of the medians of processor time, which the kernel counts for each process: on a
shared machine elapsed time differs by more than what is measured (it is printed too). The import of the boot module is
timed as well: what an interpreter pays that reads ``attnpatch.start``; and so is ``import attnpatch`` where torch is
imported already, and the first use of one of its names, which imports the rest. POSIX only.
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

from benchmarks.runner import ROOT

# Milliseconds.
LIMIT, LIMIT_OF_IMPORT = 0.3, 20
PAIRS = 600


def startup(arguments: list[str]) -> None:
    """Measure and print; exit code 1 beyond a limit."""
    with tempfile.TemporaryDirectory(prefix="attnpatch_startup_") as temporary:
        folder = pathlib.Path(temporary)
        wheel = _wheel(folder)
        python, site = _environment(folder / "with", wheel)
        bare, bare_site = _environment(folder / "without", wheel)
        (bare_site / "attnpatch.pth").unlink()
        with_file, without = _by_turns(python, bare)
        module = _import_time(python, site)
    package, first_use = _beyond_torch()
    for name, i in (("processor time", 0), ("elapsed time", 1)):
        a, b = (statistics.median(run[i] for run in runs) for runs in (without, with_file))
        between = statistics.median(y[i] - x[i] for x, y in zip(without, with_file, strict=True))
        print(f"{name:15} {a:6.2f} -> {b:6.2f} ms: {b - a:.3f} ms; median of pairs {between:.3f} ms")
    cost = statistics.median(run[0] for run in with_file) - statistics.median(run[0] for run in without)
    print(f"import of the boot module, where attnpatch.start is read: {module:.3f} ms")
    print(f"limit: under {LIMIT} ms; {'kept' if cost < LIMIT else 'missed'}")
    print(
        f"import attnpatch, beyond import torch: {package:.2f} ms; the first attnpatch.apply: {first_use:.0f} ms more"
    )
    print(f"limit: {LIMIT_OF_IMPORT} ms; {'kept' if package <= LIMIT_OF_IMPORT else 'missed'}")
    raise SystemExit(cost >= LIMIT or package > LIMIT_OF_IMPORT)


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


def _by_turns(python: str, bare: str) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    times: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    for i in range(2 * PAIRS + 20):
        milliseconds = _run((python, bare)[i % 2])
        # The first ones fill the caches.
        if i >= 20:
            times[i % 2].append(milliseconds)
    return times


def _run(python: str) -> tuple[float, float]:
    """Milliseconds of processor time and elapsed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ATTNPATCH")}
    start = time.perf_counter()
    _, status, used = os.wait4(os.posix_spawn(python, [python, "-c", "pass"], clean), 0)
    elapsed = time.perf_counter() - start
    assert status == 0
    return (used.ru_utime + used.ru_stime) * 1e3, elapsed * 1e3


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


def _beyond_torch() -> tuple[float, float]:
    """Milliseconds of processor time, medians over fresh processes, of the import and of the first use of a name."""
    code = """if True:
        import time, torch
        at = time.process_time
        times = [at()]
        import attnpatch
        times.append(at())
        attnpatch.apply
        print(times[1] - times[0], at() - times[1])
    """
    found = []
    for _ in range(11):
        said = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
        )
        found.append([float(each) * 1e3 for each in said.stdout.split()])
    return statistics.median(one for one, _ in found), statistics.median(other for _, other in found)
