"""Block mass by a kernel: run in Triton's interpreter, on a GPU if there is one, and compiled for GPUs that are not there."""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st

import attnpatch
from attnpatch.recording.gpu.tiles import cut
from attnpatch.rows.sdpa import logsumexp as fused
from attnpatch.rows.sdpa.kernel_choice import fused_choice
from attnpatch.sdpa_call import SdpaCall

HERE = pathlib.Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")


def run(*command, tmp_path, **variables):
    """A Python process of its own: Triton reads once, when it is imported, whether it is to interpret."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", **variables}
    environment.pop("PYTEST_XDIST_WORKER", None)
    paths = [str(HERE.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    done = subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("which", ["not long", pytest.param("long", marks=pytest.mark.long)])
def test_kernel_in_the_interpreter(which, tmp_path):
    out = run(
        "-m", "pytest", "-q", "-m", which, str(HERE / "on_kernel.py"), tmp_path=tmp_path, TRITON_INTERPRET="1"
    )
    assert "skipped" not in out


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernel_on_a_gpu(tmp_path):
    run("-m", "pytest", "-q", str(HERE / "on_kernel.py"), tmp_path=tmp_path, TRITON_INTERPRET="0")


@needs_triton
@pytest.mark.long
def test_kernel_compiles(tmp_path):
    """For Hopper and Ampere, on the matrix units; where it counts, two programs share a multiprocessor of Hopper."""
    out = run(str(HERE / "compile_kernel.py"), tmp_path=tmp_path, TRITON_INTERPRET="0")
    found = {line.pop("case"): line for line in map(json.loads, out.splitlines())}
    # Triton 3.7 spills 8 bytes of a thread, 3.6 spills 96.
    version = tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
    most_spilled = 64 if version >= (3, 7) else 128
    assert all(one["matrix units"] and one["shared"] <= 227 * 1024 for one in found.values())
    for name in ("causal", "one of everything"):
        one = found[name]
        assert 2 * one["shared"] <= 227 * 1024
        assert 2 * one["threads"] * one["registers"] <= 65536
        assert one["spilled"] <= most_spilled
    # What cards of capability 8.6 and 8.9 have.
    assert all(one["shared"] <= 99 * 1024 for name, one in found.items() if "capability" in name)
    assert all(one["spilled"] <= 64 for name, one in found.items() if name.startswith("one pass"))


@needs_triton
@pytest.mark.long
def test_gpu_benchmark_rehearsed(tmp_path):
    """Every line of it but what only a GPU has, so that it does not fail on first contact with one."""
    report = tmp_path / "report.json"
    out = run("-m", "benchmarks", "gpu", "--device", "cpu", "--out", str(report), tmp_path=tmp_path)
    assert "every limit is kept" in out
    found = json.loads(report.read_text())
    (forward,) = (found[title] for title in found if title.startswith("a forward") and "64 tokens" in title)
    assert forward["summed by"] == ["kernel"]
    assert len(found) == 10  # device, torch, dtype, seconds, and every section


@given(
    st.lists(st.tuples(st.integers(-1, 6), st.integers(1, 40)), min_size=1, max_size=12),
    st.lists(st.integers(-1, 3), min_size=1, max_size=80),
    st.sampled_from([16, 32, 64, 128]),
)
def test_tiles_hold_every_token_of_a_block_once(runs, scattered, most):
    """Whatever the blocks; no tile holds tokens of two blocks, and none is larger than was asked."""
    rows = [[block for block, length in runs for _ in range(length)], scattered]
    length = max(map(len, rows))
    assignment = torch.tensor([row + [-1] * (length - len(row)) for row in rows])
    tiles = cut(assignment, most)
    for b in range(2):
        seen = torch.full((length,), -1)
        for (start, count), block in zip(tiles.table[b].tolist(), tiles.blocks[b].tolist(), strict=True):
            assert count <= tiles.size <= most
            places = torch.arange(start, start + count)
            tokens = places if tiles.order is None else tiles.order[b, places].long()
            assert (seen[tokens] == -1).all()
            seen[tokens] = block
        assert torch.equal(seen, assignment[b])


def test_tiles_of_even_blocks_follow_each_other():
    even = cut((torch.arange(300) // 64)[None], 64)
    assert even.is_even and even.order is None and even.size == 64
    assert not cut((torch.arange(300) // 70)[None], 64).is_even
    assert cut(torch.full((2, 40), -1), 64).table.sum() == 0


def test_cpu_says_that_there_is_no_gpu():
    model = zoo.BY_NAME["llama"].build("sdpa")
    attnpatch.apply(model)
    with attnpatch.capture(model, blocks=attnpatch.Blocks.fixed(8)), torch.no_grad():
        model(**zoo.BY_NAME["llama"].inputs("none"))
    report = attnpatch.report(model)
    assert [site.summed_by for site in report.sites] == [{"torch (no GPU)": 1}] * 2
    assert "block mass beside fused attention: torch (no GPU) x2" in str(report)


def test_a_fused_call_that_runs_out_of_memory_is_answered(monkeypatch):
    """The operator that keeps the logsumexp is as any native call."""

    def fails(call):
        raise torch.OutOfMemoryError("no room")

    model, inputs = zoo.BY_NAME["llama"].build("sdpa"), zoo.BY_NAME["llama"].inputs("left")
    native = zoo.BY_NAME["llama"].run(model, inputs)
    attnpatch.apply(model)
    with monkeypatch.context() as patched:
        patched.setattr(fused, "OPERATORS", dict.fromkeys(fused.OPERATORS, fails))
        with attnpatch.capture(model, blocks=attnpatch.Blocks.fixed(8)) as maps:
            got = zoo.BY_NAME["llama"].run(model, inputs)
    assert all(zoo.equal_with_nan(got[name], native[name]) for name in native)
    assert attnpatch.report(model).sites[0].summed_by == {"torch (no memory)": 1}
    with attnpatch.capture(model, blocks=attnpatch.Blocks.fixed(8)) as expected:
        zoo.BY_NAME["llama"].run(model, inputs)
    assert abs(maps.block_map.to_numpy() - expected.block_map.to_numpy()).max() < 1e-6
    attnpatch.remove(model)


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "boolean": {"attn_mask": torch.ones(1, 1, 70, 70, dtype=torch.bool).tril(-1)},
    "added": {"attn_mask": torch.randn(2, 1, 70, 70, generator=torch.Generator().manual_seed(0))},
}


@pytest.mark.parametrize("width", [36, 128])
@pytest.mark.parametrize(
    ("kernel", "mask"),
    [(1, None), *((kernel, mask) for kernel in (2, 3) for mask in (None, torch.bool, torch.bfloat16))],
)
def test_operators_for_cuda_take_what_they_are_given(kernel, mask, width, monkeypatch):
    """On shapes: torch has no kernels for CUDA here, but it knows what their operators take and return."""
    monkeypatch.setitem(fused.OPERATORS, ("meta", kernel), fused.OPERATORS["cuda", kernel])
    shared = 4 if kernel == 2 else 2
    query, key = (
        torch.empty(2, length, heads, width, device="meta", dtype=torch.bfloat16).transpose(1, 2)
        for heads, length in ((4, 70), (shared, 71))
    )
    mask = None if mask is None else torch.empty(1, 1, 70, 71, dtype=mask, device="meta")
    call = SdpaCall(query, key, key, mask, enable_gqa=shared == 2)
    result, lse = fused.with_lse(call, kernel)
    assert result.shape == query.shape and result.dtype == query.dtype
    assert lse.shape == (2, 4, 70) and lse.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("what", MASKS)
def test_logsumexp_is_checked_at_first_use(what, is_shared, dtype, monkeypatch):
    monkeypatch.setattr(fused, "_is_right", {})
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 70, 16, generator=generator).to(dtype) for heads in (4, 2))
    key = key if is_shared else key.repeat_interleave(2, 1)
    more = {
        name: value.to(dtype) if value is MASKS["added"].get(name) else value
        for name, value in MASKS[what].items()
    }
    call = SdpaCall(query, key, key, enable_gqa=is_shared, **more)
    choice = fused_choice(call)
    assert fused.why_not(call, choice) is None
    result, lse = fused.with_lse(call, choice)
    native = torch.nn.functional.scaled_dot_product_attention(**call.arguments())
    assert torch.equal(result.nan_to_num(0.0), native.nan_to_num(0.0))
    for wrong in (lse * 0.7, lse + 0.1, lse.flip(-1)):
        fused._is_right.clear()
        assert not fused.is_right(call, choice, wrong)
        assert fused.why_not(call, choice) == "a wrong logsumexp"
    fused._is_right.clear()
    assert fused.is_right(call, choice, lse)
    assert fused.why_not(call, choice) is None
