"""Work that would slow an accelerator down, counted without one: waits for the device, copies, launches, kernels compiled."""

import importlib.util
import json
import pathlib
import subprocess
import sys
import types

import pytest
import torch
import zoo
from test_devices import CudnnAllowed
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaModel

import attnpatch
from attnpatch.memory import free
from attnpatch.policy import Policy
from attnpatch.recording import block_sums
from attnpatch.recording.gpu import fused_sums, tiles
from attnpatch.rows.attention_call import AttentionCall
from attnpatch.rows.evaluate.tile_plan import StepWork, choose
from attnpatch.rows.graph.axes import LEAD, ROW, Axis

HERE = pathlib.Path(__file__).parent


def counted(call):
    """How often a call runs each of torch's operators."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    return {event.key.removeprefix("aten::"): event.count for event in profiler.key_averages()}


# ------------------------------------------------------------------------------------------------------ steps by rows


@pytest.mark.parametrize(("tokens", "most"), [(32768, 256), (131072, 1024)])
def test_steps_of_a_gpu_read_keys_seldom(tokens, most):
    """Every step reads all keys of its heads, so a step of few rows of many heads reads them too often."""
    heads, rows = Axis(32, LEAD), Axis(tokens, ROW)
    plan = choose(StepWork([heads, rows], tokens, 4), Policy(), torch.device("cuda"))
    assert len(plan.lead) * plan.largest()[1] == 32
    assert len(plan.rows) <= most  # how often all keys are read
    assert plan.largest()[0] >= 128


# ------------------------------------------------------------------------------------------- attention written by hand


def llama(implementation, layers=1, key_heads=2):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=90, hidden_size=64, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=key_heads, attn_implementation=implementation,
    )  # fmt: skip
    return LlamaModel(config).eval()


def eager(layers, **policy):
    """A patched model with attention written by hand, and a call of it."""
    model = llama("eager", layers)
    attnpatch.apply(model, mode="always", **policy)
    ids = torch.randint(0, 90, (1, 700), generator=torch.Generator().manual_seed(0))
    return model, lambda: model(ids, use_cache=False)


@torch.no_grad()
def test_the_pattern_of_a_mask_is_looked_for_once():
    found = []
    for layers in (1, 3):
        model, call = eager(layers, fuse=True)
        call()
        found.append(counted(call))
        assert attnpatch.report(model).totals["by_rows"] == 0
        assert attnpatch.report(model).totals["fused"] == 2 * layers
    assert found[0]["triu_"] > 0 and found[0]["triu_"] == found[1]["triu_"]
    assert found[0]["_local_scalar_dense"] == found[1]["_local_scalar_dense"]


@torch.no_grad()
def test_the_pattern_of_a_mask_takes_two_waits(monkeypatch):
    """Of a mask that says it is on a GPU; its elements stay where they are."""
    from attnpatch.rows.fusion import additive, run

    waits = []
    real = additive.Added._scanned
    monkeypatch.setattr(additive, "DEVICE_STEP_BYTES", 4 * 700 * 64)

    def scanned(self, masks, node, tileable):
        monkeypatch.setattr(node, "device", torch.device("cuda"))
        try:
            found = []
            waits.append(counted(lambda: found.append(real(self, masks, node, tileable))))
        finally:
            monkeypatch.setattr(node, "device", torch.device("cpu"))
        assert found == ["causal"]
        return found[0]

    monkeypatch.setattr(run.Added, "_scanned", scanned)
    _, call = eager(1, fuse=True)
    call()
    (found,) = waits
    assert found["triu_"] > 8  # that many pieces
    # Whether the first piece has a pattern. Which of two patterns all pieces have is copied to the host at the end.
    assert found["_local_scalar_dense"] == 1


@torch.no_grad()
def test_tiles_on_the_kernel_leave_out_cudnn(monkeypatch):
    """Each step of a window has another number of keys, for each of which cuDNN would build a plan."""
    allowed = CudnnAllowed()
    real = AttentionCall.replay

    def replay(self, node, watched=None):
        node.device = torch.device("cuda")  # its tensors stay where they are
        with allowed:
            return real(self, node, watched)

    monkeypatch.setenv("ATTNPATCH_FREE_MEMORY", "9GB")
    case = zoo.BY_NAME["mistral"]
    model, inputs = case.build("eager"), case.inputs("none")
    native = case.run(model, inputs)
    monkeypatch.setattr(AttentionCall, "replay", replay)
    with attnpatch.patched(model, mode="always", fuse=True):
        got = case.run(model, inputs)
        assert attnpatch.report(model).totals["fused"] > 0
    assert allowed.seen and not any(allowed.seen)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    for name in native:
        torch.testing.assert_close(got[name], native[name], atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------- block maps


@pytest.mark.parametrize("key_heads", [1, 8])
def test_a_decoded_token_is_summed_at_once_for_all_key_heads(key_heads):
    """The number of operators does not grow with the heads."""
    model = llama("sdpa", key_heads=key_heads)
    ids = torch.randint(0, 90, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), attnpatch.capture(model, attnpatch.Blocks.fixed(16)):
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=cache)
        found = counted(lambda: model(ids[:, :1], past_key_values=cache))
    assert found["exp2_"] == 1
    assert found["scatter_add_"] <= 2


def test_key_tiles_are_summed_where_they_are():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(6, 40, generator=generator)
    for blocks in (
        torch.arange(40) // 3,
        torch.randint(0, 7, (40,), generator=generator),
        torch.zeros(40).long(),
    ):
        expected = torch.zeros(6, 20, dtype=torch.float64).index_add_(1, blocks, values.double())
        found = fused_sums.key_sums(values, blocks, 20)
        assert found.dtype == torch.float64 and torch.equal(found, expected)


def test_tokens_are_cut_once_for_all_layers():
    tiles._latest.clear()
    cpu, blocks = torch.device("cpu"), (torch.arange(300) // 7)[None]
    first = tiles.tables(blocks, 64, cpu)
    again = counted(lambda: tiles.tables(blocks.clone(), 64, cpu))
    assert "unique_consecutive" not in again and tiles.tables(blocks, 64, cpu) is first
    assert tiles.tables(blocks, 32, cpu) is not first
    blocks[0, -1] = 0  # the tensor that the tables were made of was written to
    other = tiles.tables(blocks, 64, cpu)
    assert other is not first and other.blocks[0, -1] == 0
    for made in (first, other):
        expected = tiles.cut(blocks if made is other else (torch.arange(300) // 7)[None], 64)
        assert torch.equal(made.table, expected.table) and torch.equal(made.blocks, expected.blocks)


COMPILED = """
import json
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from attnpatch.recording.gpu.kernel import sum_tiles

bind = create_function_from_signature(sum_tiles.signature, sum_tiles.params, make_backend(GPUTarget("cuda", 90, 32)))
some = torch.zeros(64)
kinds = set()
for n in (1, 16, 100, 128, 1000, 1024, 4096, 5001):
    given = dict.fromkeys(sum_tiles.arg_names, 16) | {name: some for name in sum_tiles.arg_names[:10]}
    lengths = {"q_len": n, "kv_len": n, "num_query_tiles": -(-n // 128), "num_key_tiles": -(-n // 64)}
    _, kind, *_ = bind(**{**given, "scale": 0.5, **lengths, "l_head": n, "l_batch": 32 * n, "num_places": 1})
    kinds.add(str(kind))
print(json.dumps(len(kinds)))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_one_kernel_serves_all_lengths():
    """Triton compiles a kernel for each kind of arguments; eight lengths are of one kind."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], cwd=HERE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == 1


# ------------------------------------------------------------------------------------------------------------- memory


def test_free_memory_is_asked_again_for_a_large_call(monkeypatch):
    answers = iter([1000, 400, 300])
    monkeypatch.setattr(free, "free_bytes", lambda device: next(answers))
    room, device = free.FreeMemoryCache(), torch.device("cpu")
    assert [room.free(device, need) for need in (0, 10, 125, 126, 10, 60)] == [
        1000,
        1000,
        1000,
        400,
        400,
        300,
    ]


def test_runs_of_a_tile_are_moved_at_once(monkeypatch):
    """Every copy to the host waits for the device, however little is copied."""
    from test_devices import Mps, OnMps

    copies = []

    class Counted(Mps):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if (
                func is torch.ops.aten._to_copy.default
                and isinstance(args[0], OnMps)
                and "device" in (kwargs or {})
            ):
                copies.append(args[0].shape)
            return super().__torch_dispatch__(func, types, args, kwargs)

    tile, sums = torch.rand(2, 40, 8), torch.zeros(1, 5, 3, dtype=torch.float64)
    expected = sums.clone()
    rows, keys = torch.arange(40) // 8, torch.arange(8) // 4
    with Counted():
        block_sums.add_tile(sums, OnMps(tile), rows, keys)
    block_sums.add_tile(expected, tile, rows, keys)
    assert torch.equal(sums, expected)
    assert copies == [torch.Size([5, 1, 8])]


@torch.no_grad()
@pytest.mark.parametrize("key_heads", [2, 8])
def test_a_cache_stays_on_a_gpu_that_has_room_for_it(key_heads, monkeypatch):
    """Its bytes are counted beforehand: those that a pass really keeps."""
    from attnpatch.conversations.passes import is_offloaded
    from attnpatch.hosts.transformers import caches

    model = llama("sdpa", layers=3, key_heads=key_heads).half()
    found = model(torch.zeros(1, 20, dtype=torch.long), use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in found.layers)
    assert caches.bytes_of(model, 20) == kept
    for free_now, expected in ((2 * kept, False), (2 * kept - 1, True)):
        monkeypatch.setenv("ATTNPATCH_FREE_MEMORY", str(free_now))
        assert is_offloaded(model, 20, torch.device("cuda")) is expected
        assert not is_offloaded(model, 20, torch.device("cpu"))
    model.config = types.SimpleNamespace(hidden_size=64)  # of a model that keeps something else
    assert caches.bytes_of(model, 20) is None and is_offloaded(model, 20, torch.device("cuda"))
