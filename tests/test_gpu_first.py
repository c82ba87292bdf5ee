"""The first runs on a GPU (``benchmarks/gpu_first.py``), executed on a CPU: the same code on tiny shapes.

One process executes all of them, since a process takes seconds to import torch and transformers. On a GPU each has its
own.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NUMBERS = range(1, 11)
ALL = """
import contextlib, sys
from benchmarks import gpu_first

def run(name, *arguments):
    print("begin", name)
    with contextlib.redirect_stderr(sys.stdout):
        try:
            status = gpu_first.main(arguments)
        except SystemExit as end:
            status = end.code
    print("end", status)

for number in ("0", "11", "three"):
    run(number, number)
run("no GPU", "3")
for number in range(1, 11):
    run(number, str(number), "--cpu")
right = gpu_first.exact
gpu_first.exact = lambda *given: tuple(2 * each for each in right(*given))
run("wrong", "2", "--cpu")
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """The lines of each run and its exit status, by its name; ``"wrong"``: run 2 with another expected result."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    variables = {
        "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-W", "ignore", "-c", ALL]
    done = subprocess.run(
        command, env={**os.environ, **variables}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = {}
    for text in done.stdout.split("begin ")[1:]:
        name, *lines, end = text.splitlines()
        found[name] = lines, int(end.removeprefix("end "))
    return found


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
@pytest.mark.xdist_group("gpu_first")
class TestOnCpu:
    @pytest.mark.parametrize("number", NUMBERS)
    def test_run(self, number, printed):
        lines, status = printed[str(number)]
        assert status == 0, "\n".join(lines)
        assert all(line.startswith("cpu (rehearsal): ") for line in lines)
        assert lines[0].startswith(f"cpu (rehearsal): run {number}: ")
        assert any(": right, error " in line for line in lines)
        assert any(" ms (" in line for line in lines) or number == 6  # which measures bytes
        first = next(i for i, line in enumerate(lines) if ": right, error " in line)
        assert not any(" ms (" in line for line in lines[:first])

    @pytest.mark.parametrize("number", ["0", "11", "three"])
    def test_no_such_run(self, number, printed):
        assert printed[number] == ([f"there is no run {number}: give a number from 1 to 10"], 2)

    def test_what_is_wrong_is_not_timed(self, printed):
        lines, status = printed["wrong"]
        assert status == 1
        assert (
            sum("WRONG, not timed" in line for line in lines) == 2
        )  # torch's choice, and its only fused kernel
        assert not any(" ms (" in line for line in lines)

    def test_no_gpu(self, printed):
        said = "there is no CUDA device; --cpu executes the same code on tiny shapes"
        assert printed["no GPU"] == ([said], 2)
