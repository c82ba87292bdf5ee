"""The hosts' common tests on small models, unpatched and with every attention by rows: which of them end otherwise.

    python tests/hosts/run.py [-k EXPRESSION] [-n PROCESSES] [--tests FOLDER --files FILE...]

Exits with 1 if a test ends otherwise, or if what a test of generation wrote down differs.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
from importlib.util import find_spec
from typing import Any

import torch

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KEPT = ROOT / ".venv" / "hosts"
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
# What the hosts' tests import beside the hosts: all of them, and the files of single models.
COMMON = ("parameterized",)
FILES = (*COMMON, "datasets", "dill", "multiprocess", "pandas", "pyarrow", "timeout_decorator", "xxhash")
PATCHED = {"ATTNPATCH": "1", "ATTNPATCH_MODE": "always", "ATTNPATCH_MIN_TOKENS": "4"}
# Values of two runs may differ as two orders of adding differ: attention by rows has the same bits, but the hosts ask for
# weights where sdpa has none, and those of a fused kernel round otherwise.
TOLERANCE = 1e-5


def unpacked() -> pathlib.Path:
    """The tests of the installed version's source distribution, fetched once by pip."""
    import transformers

    version = transformers.__version__
    folder = KEPT / f"transformers-{version}" / "tests"
    if folder.is_dir():
        return folder
    KEPT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        wanted = ["download", "--no-binary", ":all:", "--no-deps", "--no-build-isolation", "--dest", scratch]
        subprocess.run([*PIP, *wanted, f"transformers=={version}"], check=True)
        (archive,) = pathlib.Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as opened:
            members = [m for m in opened.getmembers() if m.name.split("/")[1:2] == ["tests"]]
            opened.extractall(KEPT, members, filter="data")
    return folder


def packages(names: tuple[str, ...]) -> None:
    """What the tests import and is not installed, fetched once by pip into a folder of its own."""
    missing = [
        name for name in names if not (find_spec(name) is not None or (KEPT / "packages" / name).is_dir())
    ]
    if missing:
        subprocess.run(
            [*PIP, "install", "--no-deps", "--target", str(KEPT / "packages"), *missing], check=True
        )


def run(tests: pathlib.Path, files: list[str], more: list[str], env: dict[str, str]) -> dict[str, Any]:
    """Outcomes by test, and what tests wrote down."""
    with tempfile.TemporaryDirectory() as scratch:
        lines, found = pathlib.Path(scratch, "outcomes"), pathlib.Path(scratch, "found")
        found.mkdir()
        paths = [ROOT, HERE, KEPT / "packages", *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("ATTNPATCH")},
            "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "HOST_TESTS_FOLDER": str(tests), "HOST_TESTS_OUTCOMES": str(lines),
            "HOST_TESTS_FOUND": str(found), **env,
        }  # fmt: skip
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-c",
            str(HERE / "pytest.ini"),
            "--noconftest",
            "-p",
            "outcomes",
        ]
        ended = subprocess.run([*command, *files, *more], env=environment, capture_output=True, text=True)
        if not lines.exists():
            raise SystemExit(ended.stdout[-3000:] + ended.stderr[-3000:])
        outcomes = by_test(lines.read_text().splitlines())
        written = {path.stem: torch.load(path) for path in sorted(found.iterdir())}
    return {"outcomes": outcomes, "written": written}


def by_test(lines: list[str]) -> dict[str, Any]:
    """The plugin's lines by test. One that has parts is reported for each of them: it has failed if a part has."""
    outcomes: dict[str, Any] = {}
    for line in map(json.loads, lines):
        if line["test"] not in outcomes or outcomes[line["test"]]["outcome"] != "failed":
            outcomes[line["test"]] = line
    return outcomes


def differences(plain: dict[str, Any], patched: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Tests that end otherwise, and how they end in both runs."""
    found = []
    before, after = plain["outcomes"], patched["outcomes"]
    for test in sorted(before.keys() | after.keys()):
        one, other = (each.get(test, {"outcome": "was not run", "reason": ""}) for each in (before, after))
        if one["outcome"] != other["outcome"]:
            found.append((test, f"{one['outcome']} {one['reason']}", f"{other['outcome']} {other['reason']}"))
    for test in sorted(plain["written"].keys() | patched["written"].keys()):
        # A list for each model; none where a run wrote nothing, which its outcome need not show.
        what = unlike(plain["written"].get(test, []), patched["written"].get(test, []))
        if what:
            found.append((test, "passed", f"passed with other values: {what}"))
    return found


def unlike(one: Any, other: Any, where: str = "") -> str:
    """Where two structures of tensors differ first, and by how much; empty if they do not."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"{where}: {tuple(other.shape)} {other.dtype} instead of {tuple(one.shape)} {one.dtype}"
        exact = not one.is_floating_point()
        if (
            torch.equal(one, other)
            if exact
            else torch.allclose(one, other, TOLERANCE, TOLERANCE, equal_nan=True)
        ):
            return ""
        return f"{where}: by {(one.double() - other.double()).abs().max():.2g}"
    if type(one) is not type(other):
        return f"{where}: {type(other).__name__} instead of {type(one).__name__}"
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return f"{where}: {sorted(other)} instead of {sorted(one)}"
        return next(filter(None, (unlike(one[key], other[key], f"{where}.{key}") for key in one)), "")
    if isinstance(one, list):
        if len(one) != len(other):
            return f"{where}: {len(other)} items instead of {len(one)}"
        pairs = enumerate(zip(one, other, strict=True))
        return next(filter(None, (unlike(*pair, f"{where}[{place}]") for place, pair in pairs)), "")
    return "" if one == other else f"{where}: {other} instead of {one}"


def show(plain: dict[str, Any], patched: dict[str, Any]) -> int:
    """Print the table, and what was left out and why; how many differ."""
    unlike_ones = differences(plain, patched)
    named = {test for test, _, _ in unlike_ones}
    rows = collections.defaultdict(collections.Counter)
    for test, line in plain["outcomes"].items():
        group = test.partition("::")[0]
        for row in (rows[group], rows["all"]):
            row["run"] += line["outcome"] != "skipped"
            row["skipped"] += line["outcome"] == "skipped"
            row["failed"] += line["outcome"] == "failed"
            row["differ"] += test in named or test.replace("::", ".") in named
    columns = ("run", "skipped", "failed", "differ")
    print(f"{'':28}{'run':>8}{'skipped':>9}{'failed*':>9}{'differ':>8}")
    for group in [*sorted(rows.keys() - {"all"}), "all"]:
        print(
            f"{group:28}" + "".join(f"{rows[group][name]:>{8 + (name in columns[1:3])}}" for name in columns)
        )
    print("* without attnpatch already, and with it in the same way")
    for test, one, other in unlike_ones:
        print(f"\nDIFFERS {test}\n  plain:   {one}\n  by rows: {other}")
    reasons = collections.Counter(
        line["reason"] for line in plain["outcomes"].values() if line["outcome"] == "skipped"
    )
    print("\nskipped by the hosts' tests themselves:")
    for reason, count in reasons.most_common():
        print(f"{count:6}  {reason[:130]}")
    return len(unlike_ones)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-k", help="as pytest takes it")
    parser.add_argument("-n", default="2", help="processes")
    parser.add_argument("--tests", type=pathlib.Path, help="the tests folder of a checkout of transformers")
    parser.add_argument(
        "--files", nargs="*", help="test files of that checkout; without: small models of our own"
    )
    asked = parser.parse_args()
    if asked.files and asked.tests is None:
        parser.error("--files needs --tests: no distribution ships the files of single models")
    packages(FILES if asked.files else COMMON)
    if asked.files:
        tests = asked.tests.resolve()
        files = [str(tests / name) for name in asked.files]
    else:
        tests = unpacked()
        files = [str(HERE / "models.py")]
    more = ["-n", asked.n, *(["-k", asked.k] if asked.k else [])]
    plain, patched = run(tests, files, more, {}), run(tests, files, more, PATCHED)
    sys.exit(1 if show(plain, patched) else 0)


if __name__ == "__main__":
    main()
