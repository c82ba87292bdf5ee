"""``python -m tests.versions [WORD ...]``: the rows whose name has a word in it, one environment after the other.

Each environment is made (with uv if it is on the path, which keeps downloads for the next time; otherwise with pip),
used and deleted; ``--keep FOLDER`` leaves it there, and another run uses it again. ``--smoke``
runs the smoke test alone. Exit code 1 if a row did otherwise than it says.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator

from .rows import ROWS, Row

ROOT = pathlib.Path(__file__).parents[2]
ALWAYS = (
    "accelerate", "safetensors", "wrapt", "psutil", "matplotlib", "pandas", "typer", "rich", "einops", "pytest",
    "pytest-timeout", "pytest-xdist", "hypothesis",
)  # fmt: skip


def interpreter(version: str) -> str | None:
    """An interpreter of this release: on the path, or one of pyenv's; ``None`` if there is none."""
    folders = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv"), "versions")
    found = [str(path) for path in sorted(folders.glob(f"{version}.*/bin/python"), reverse=True)]
    found += [path for path in (shutil.which(f"python{version}"),) if path]
    code = f"import sys; sys.exit(sys.version_info[:2] != {tuple(map(int, version.split('.')))})"
    for path in found:
        if subprocess.run([path, "-c", code], capture_output=True, check=False).returncode == 0:
            return path
    return None


@contextlib.contextmanager
def folder_of(row: Row, keep: str | None) -> Iterator[pathlib.Path]:
    """Where a row's environment is made: a new folder, deleted afterwards, or the row's own in ``keep``."""
    if keep is not None:
        yield pathlib.Path(keep).absolute() / re.sub(r"\W+", "_", row.name)
        return
    with tempfile.TemporaryDirectory(prefix="attnpatch_row_") as folder:
        yield pathlib.Path(folder)


def installed(row: Row, folder: pathlib.Path) -> str:
    """The interpreter of a row's environment, which is made unless it is complete already."""
    python, complete = str(folder / "bin" / "python"), folder / "complete"
    wanted = [*row.packages, *(name for name in ALWAYS if name not in _names(row.packages))]
    if not complete.is_file() or complete.read_text() != repr(wanted):
        install(row, folder, wanted)
        complete.write_text(repr(wanted))
    return python


def _names(requirements: Iterable[str]) -> set[str]:
    return {re.split(r"[=<>]", requirement)[0] for requirement in requirements}


# pip's settings, and the variables in which uv takes them: it reads none of pip's.
UV = {
    "index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_EXTRA_INDEX_URL", "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT", "cert": "SSL_CERT_FILE", "default-timeout": "UV_HTTP_TIMEOUT",
}  # fmt: skip


def settings_for_uv() -> dict[str, str]:
    """The environment in which uv installs what pip would install here."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    found = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # an index is no better than the one after it
    for line in lines:
        name, _, value = line.partition("=")
        variable = UV.get(name.rpartition(".")[2])
        if variable:
            found[variable] = ast.literal_eval(value)
    return {**found, **os.environ}


def install(row: Row, folder: pathlib.Path, wanted: list[str]) -> None:
    """Make a new environment with these packages and attnpatch."""
    base = interpreter(row.python)
    if base is None:
        raise SystemExit(f"{row.name}: there is no Python {row.python} here")
    subprocess.run([base, "-m", "venv", "--clear", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    uv = shutil.which("uv")
    command = (
        [uv, "pip", "install", "--python", python]
        if uv
        else [python, "-m", "pip", "install", "--no-cache-dir"]
    )
    quiet = ["--quiet"] if uv else ["-qq", "--no-compile", "--disable-pip-version-check"]
    environment = settings_for_uv() if uv else None
    subprocess.run([*command, *quiet, *wanted], check=True, env=environment)
    # Without what it asks for: a row has what it says, and nothing else. With its start-up file.
    subprocess.run([*command, *quiet, "--no-deps", "-e", str(ROOT)], check=True, env=environment)


class Clock:
    """Minutes since it was made or last read, and of these the minutes of all processors, as words."""

    def __init__(self) -> None:
        self._began = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.monotonic(), used.ru_utime + used.ru_stime

    def __str__(self) -> str:
        began, self._began = self._began, self._now()
        wall, used = ((now - then) / 60 for now, then in zip(self._began, began, strict=True))
        return f"{wall:.1f} min ({used:.1f} of processors)"


def run(row: Row, keep: str | None, tests: tuple[str, ...]) -> bool:
    """Whether a row did what it says."""
    whole, clock = Clock(), Clock()
    print(f"== {row.name}: Python {row.python}, {', '.join(row.packages)}", flush=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.setdefault("PYTEST_ADDOPTS", "-n 2 --dist loadgroup")
    with folder_of(row, keep) as folder:
        python = installed(row, folder)
        print(f"installed in {clock}", flush=True)
        smoke = [python, "-W", "ignore", "-m", "tests.versions.smoke", "--expect", *row.off]
        files = [python, "-m", "pytest", "-q", "-m", "not long", *(f"tests/{name}" for name in tests)]
        commands = {"smoke": smoke, **({"tests": files} if tests else {})}
        failed = []
        for name, command in commands.items():
            if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
                failed.append(name)
            print(f"{name}: {clock}", flush=True)
    for reason in dict.fromkeys(row.off.values()):
        print(f"off: {', '.join(name for name, why in row.off.items() if why == reason)}: {reason}")
    outcome = f"{' and '.join(failed)} failed" if failed else "ok"
    print(f"== {row.name}: {outcome}, {whole}", flush=True)
    return not failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="rows whose name has one of these in it")
    parser.add_argument("--keep", help="a folder in which environments stay for the next run")
    parser.add_argument("--smoke", action="store_true", help="run no other tests")
    options = parser.parse_args()
    chosen = [row for row in ROWS if not options.words or any(word in row.name for word in options.words)]
    if not chosen:
        raise SystemExit(f"no such row; there are: {', '.join(row.name for row in ROWS)}")
    found = [run(row, options.keep, () if options.smoke else row.tests) for row in chosen]
    return int(not all(found))


if __name__ == "__main__":
    sys.exit(main())
