"""The ten runs to make first on a GPU, in order, one process each: ``python -m benchmarks.gpu_first 3``.

Each is meant to take less than a minute on a card such as an H100. Results are compared before anything is timed: what is wrong is
printed, is not timed, and makes the exit status 1. ``--cpu`` executes the same code on tiny shapes, with the kernel in
Triton's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib.metadata
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import attnpatch
from attnpatch.recording.gpu import fused_sums
from attnpatch.recording.gpu.fused_sums import Shape
from attnpatch.rows.sdpa import logsumexp
from attnpatch.rows.sdpa.kernel_choice import fused_choice
from attnpatch.sdpa_call import SdpaCall, additive
from benchmarks import gpu
from benchmarks.kernels import Attention

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WAITS = "aten::_local_scalar_dense aten::nonzero cudaStreamSynchronize cudaDeviceSynchronize".split()
Calls = dict[str, Callable[[], Any]]
# What the kernel's tiles might be instead.
SHAPES = [Shape(*sizes, 3) for sizes in itertools.product((64, 128), (64, 128), (4, 8))]


class Bench:
    """Where a run takes place, what it prints, and what was wrong."""

    def __init__(self, on_cpu: bool) -> None:
        self.on_cpu, self.wrong = on_cpu, 0
        self.sizes = dataclasses.replace(gpu.REHEARSAL if on_cpu else gpu.GPU, rounds=1 if on_cpu else 5)
        self.device = self.sizes.device
        self.name = "cpu (rehearsal)" if on_cpu else torch.cuda.get_device_name()

    def pick(self, on_gpu: Any, on_cpu: Any) -> Any:
        return on_cpu if self.on_cpu else on_gpu

    def say(self, text: str) -> None:
        print(f"{self.name}: {text}", flush=True)

    def is_right(self, what: str, error: float, limit: float) -> bool:
        """Print an error with its limit; NaN is wrong."""
        right = error <= limit
        self.wrong += not right
        self.say(f"{what}: {'right' if right else 'WRONG, not timed'}, error {error:.1e}, limit {limit:.1e}")
        return right

    def time(self, what: str, calls: Calls, *errors: tuple[str, float, float]) -> None:
        """Medians of alternated calls, and multiples of the first; nothing if one of the named errors is too large."""
        right = [self.is_right(what + name, error, limit) for name, error, limit in errors]
        if all(right):
            found = gpu.by_turns(calls, self.sizes)
            first = next(iter(found.values()))
            shown = (f"{name} {s * 1e3:.3f} ms ({s / first:.2f}x)" for name, s in found.items())
            self.say(f"{what}: " + ", ".join(shown))

    def call(self, tokens: int, shared: bool, dtype: Any = None, mask: Any = None, **sizes: int) -> SdpaCall:
        """A call, causal without a mask; ``shared``: query heads share key heads."""
        sizes = sizes if shared else {"kv_heads": self.sizes.heads}
        more = {"enable_gqa": shared, "attn_mask": mask, "is_causal": mask is None}
        return gpu.a_call(dataclasses.replace(self.sizes, **sizes), tokens, dtype, **more)

    def kernels(self, call: SdpaCall) -> Iterator[tuple[str, Calls]]:
        """Torch's own choice, then each fused kernel alone: SDPA with it, and its operator with the logsumexp."""
        arounds = {one.name: sdpa_kernel(one) for one in self.pick(gpu.BACKENDS, gpu.BACKENDS[:1])}
        for name, around in {"default": contextlib.nullcontext(), **arounds}.items():
            with around:
                if reason := logsumexp.why_not(call, fused_choice(call)):
                    self.say(f"{name}: left to torch ({reason})")
                    continue
                with_lse = partial(logsumexp.with_lse, call, fused_choice(call))
                yield name, {"SDPA": partial(gpu.attend, call), "with lse": with_lse}


def some_rows(call: SdpaCall) -> torch.Tensor:
    return torch.linspace(0, call.q_len - 1, min(64, call.q_len), device=call.device).long()


def exact(call: SdpaCall, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities, result and logsumexp of some rows in float64; rows that see no key are zero, as torch has it."""
    key, value = (t.double().repeat_interleave(call.group, 1) for t in (call.key, call.value))
    scores = call.query[:, :, rows].double() @ key.mT * call.scale
    if call.is_causal:
        scores.masked_fill_(torch.arange(call.kv_len, device=call.device) > rows[:, None], -torch.inf)
    if call.attn_mask is not None:
        scores += additive(call.attn_mask[rows], torch.float64)
    probabilities = scores.softmax(-1).nan_to_num(0.0)
    return probabilities, probabilities @ value, scores.logsumexp(-1)


def distance(one: torch.Tensor, two: torch.Tensor) -> float:
    """The largest difference as a share of the largest value of the second; infinite where only one is a number."""
    if not torch.equal(one.isfinite(), two.isfinite()):
        return torch.inf
    one, two = (t.double().nan_to_num(0.0, 0.0, 0.0) for t in (one, two))
    return float((one - two).abs().max() / two.abs().max())


def rounding(dtype: torch.dtype) -> float:
    """A few roundings of a result, or of sums in float32."""
    return max(4 * torch.finfo(dtype).eps, 1e-5)


def native_error(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The result of a model in a wider dtype, and how far the model is from it."""
    wide = torch.float64 if next(model.parameters()).dtype == FP32 else FP32
    expected = copy.deepcopy(model).to(wide)(ids, use_cache=False)[0]
    return expected, distance(model(ids, use_cache=False)[0], expected)


def waits(run: Callable[[], object], device: torch.device) -> dict[str, int]:
    """What makes the host wait for the device in a call, as torch's profiler counts it."""
    with profile(
        activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]
    ) as profiler:
        run()
    return {event.key: event.count for event in profiler.key_averages() if event.key in WAITS}


def run_1(bench: Bench) -> None:
    """Versions, and the kernel that torch chooses for each kind of call."""
    packages = "torch triton transformers diffusers".split()
    bench.say(", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages))
    tokens, kinds = bench.pick(2048, 32), ("causal", "bool", "float", "no mask")
    low = torch.ones(tokens, tokens, dtype=torch.bool, device=bench.device).tril()
    for dtype, shared, kind in itertools.product((BF16, FP16, FP32), (True, False), kinds):
        added = torch.zeros(low.shape, dtype=dtype, device=bench.device).masked_fill(~low, -torch.inf)
        mask = {"causal": None, "bool": low, "float": added, "no mask": None}[kind]
        call = dataclasses.replace(bench.call(tokens, shared, dtype, mask), is_causal=kind == "causal")
        what = f"{dtype}, {'shared key heads' if shared else 'equal heads'}, {kind}"
        what += f": {SDPBackend(fused_choice(call)).name}"
        rows, run = some_rows(call), partial(gpu.attend, call)
        error = distance(run()[:, :, rows], exact(call, rows)[1])
        bench.time(what, {"SDPA": run}, ("", error, rounding(dtype)))


def run_2(bench: Bench) -> None:
    """Each kernel with its logsumexp beside SDPA, on a left-padded bool mask with rows that see no key."""
    tokens = bench.pick(4096, 48)
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=bench.device).tril()
    mask[:, : tokens // 8] = False
    for dtype in bench.pick((BF16, FP32), (FP32,)):
        call = bench.call(tokens, False, dtype, mask)
        seen = some_rows(call)[tokens // 8 <= some_rows(call)]
        for name, calls in bench.kernels(call):
            mine, lse = calls["with lse"]()
            error = distance(lse[..., seen], exact(call, seen)[2])
            beside = ": result beside SDPA", distance(mine, calls["SDPA"]()), 0.0
            bench.time(f"{name}, {dtype}", calls, beside, (": logsumexp", error, rounding(FP32)))


def run_3(bench: Bench) -> None:
    """The kernel of block sums beside float64, over widths, dtypes and lengths."""
    widths, lengths = bench.pick((64, 80, 96, 128, 256), (16, 24)), bench.pick((1000, 8192), (40,))
    dtypes = bench.pick((BF16, FP16, FP32), (FP16, FP32))
    for dtype, width, tokens in itertools.product(dtypes, widths, lengths):
        call = bench.call(tokens, True, dtype, heads=4, kv_heads=2, width=width)
        blocks, count = gpu.blocks_of(tokens, bench.pick(128, 16))
        what, reason = f"{dtype}, heads of {width}, {tokens} tokens", fused_sums.why_not(call)
        if reason is not None:
            bench.say(f"{what}: left to torch ({reason})")
            continue
        probabilities, _, lse = exact(call, torch.arange(tokens, device=bench.device))
        expected = by_blocks(probabilities.sum(1), blocks[0])
        of_any_size = (dtype, width, tokens) == (BF16, 128, 8192)
        for shape in SHAPES if of_any_size else (fused_sums.shape_for(dtype, width),):
            run = partial(
                fused_sums.block_sums, call, lse.float(), blocks, blocks, (count, count), None, shape
            )
            sizes = " ".join(f"{field} {size}" for field, size in dataclasses.asdict(shape).items())
            bench.time(f"{what}, {sizes}", {"block sums": run}, ("", distance(run()[:, 0], expected), 1e-5))


def by_blocks(probabilities: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Sums over the tokens of each pair of blocks, float64 on the CPU."""
    member = torch.nn.functional.one_hot(blocks.to(probabilities.device)).double()
    return (member.T @ probabilities @ member).cpu()


def run_4(bench: Bench) -> None:
    """Block maps and entropy of an eager Llama in blocks of 6 tokens, beside its own attention weights."""
    tokens = bench.pick(768, 48)
    for dtype in bench.pick((FP32, BF16), (FP32,)):
        sizes = dataclasses.replace(bench.sizes, dtype=dtype)
        run = partial(gpu.llama(sizes, 2, "eager"), gpu.tokens_of(sizes, tokens), use_cache=False)

        def capture(run: partial[Any] = run) -> Any:
            with attnpatch.capture(run.func, attnpatch.Blocks.fixed(6), measures=("entropy",)) as maps:
                run()
            return maps

        weights = torch.stack(run(output_attentions=True).attentions)[:, 0].double()
        expected = by_blocks(weights.mean(1), gpu.blocks_of(tokens, 6)[0][0]) / 6
        maps, limit = capture(), rounding(dtype)
        found, entropy = torch.from_numpy(maps.block_map.to_numpy()), maps.measured()["entropy"]
        errors = (
            (", blocks of 6", distance(found.view_as(expected), expected), limit),
            (", entropy", distance(entropy, torch.special.entr(weights).sum(-1).mean(-1).cpu()), limit),
        )
        bench.time(f"{dtype}", {"native": run, "capture": capture}, *errors)


def run_5(bench: Bench) -> None:
    """A sliding window on the fused kernel: Mistral, written by hand, with the efficient kernel and torch's choice."""
    kernels = {"default": [*gpu.BACKENDS, SDPBackend.MATH], "efficient": SDPBackend.EFFICIENT_ATTENTION}
    for dtype, name in itertools.product((BF16, FP32), bench.pick(kernels, ("default",))):
        sizes = dataclasses.replace(bench.sizes, dtype=dtype)
        model = gpu.llama(sizes, 1, "eager", "Mistral", sliding_window=bench.pick(512, 16))
        run = partial(model, gpu.tokens_of(sizes, bench.pick(4096, 64)), use_cache=False)
        expected, allowed = native_error(model, *run.args)
        native = gpu.by_turns({"native": run}, sizes)["native"]
        with sdpa_kernel(kernels[name]), attnpatch.patched(model, mode="always", fuse=True):
            error = distance(run()[0], expected)
            what = f"{dtype}, {name}, native {native * 1e3:.3f} ms, {attnpatch.report(model).totals['fused']} fused"
            bench.time(what, {"fused": run}, ("", error, 2 * allowed))


def run_6(bench: Bench) -> None:
    """Bytes that each kernel takes more if it returns its logsumexp."""
    for name, calls in bench.kernels(bench.call(bench.pick(32768, 64), False)):
        if bench.is_right(name, distance(calls["with lse"]()[0], calls["SDPA"]()), 0.0):
            plain, own = (gpu.peak(run, bench.device) for run in calls.values())
            bench.say(f"{name}: SDPA {plain / 1e6:.1f} MB, with lse {(own - plain) / 1e6:+.1f} MB")


def run_7(bench: Bench) -> None:
    """Hand-written attention on the fused kernel at growing lengths: time, and what makes the host wait."""
    eager, sdpa = (gpu.llama(bench.sizes, 1, kind) for kind in ("eager", "sdpa"))
    allowed = native_error(eager, gpu.tokens_of(bench.sizes, bench.pick(2048, 32)))[1]
    for tokens in bench.pick((8192, 16384, 32768), (48, 96)):
        ids = gpu.tokens_of(bench.sizes, tokens)
        calls = {"SDPA": partial(sdpa, ids, use_cache=False), "fused": partial(eager, ids, use_cache=False)}
        with attnpatch.patched(eager, mode="always", fuse=True):
            error = distance(calls["fused"]()[0], calls["SDPA"]()[0])
            bench.time(f"{tokens} tokens", calls, ("", error, 4 * allowed))
            for name, run in calls.items():
                bench.say(f"{tokens} tokens, {name}: waits {waits(run, bench.device)}")


def run_8(bench: Bench) -> None:
    """Hand-written attention by rows over the size of a step."""
    model = torch.nn.Sequential(Attention())
    for tokens in bench.pick((8192, 32768), (64,)):
        call = bench.call(tokens, False)
        lowest, rows = torch.finfo(call.dtype).min, some_rows(call)
        mask = torch.full((tokens, tokens), lowest, dtype=call.dtype, device=bench.device).triu_(1)
        expected = exact(call, rows)[1]
        allowed = distance(model[0](call.query[:, :, rows], call.key, call.value, mask[rows]), expected)
        run = partial(model[0], call.query, call.key, call.value, mask)
        for heads, number in ((None, None), *itertools.product((2, 8, 32), (64, 128, 512))):
            with attnpatch.patched(model, mode="always", heads=heads, rows=number):
                what = f"{tokens} tokens, {heads or 'chosen'} heads x {number or 'chosen'} rows"
                calls = {"SDPA": partial(gpu.attend, call), "by rows": run}
                bench.time(what, calls, ("", distance(run()[:, :, rows], expected), 2 * allowed))


@torch.inference_mode(False)
def gradient(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Of the query's weights of the first layer, after a step of training."""
    model.zero_grad()
    with torch.enable_grad():
        model(ids.clone(), use_cache=False)[0].float().square().mean().backward()
    return model.layers[0].self_attn.q_proj.weight.grad.clone()


def run_9(bench: Bench) -> None:
    """Running out of memory in training with a seventh of the card; autocast."""
    with torch.inference_mode(False):
        eager, sdpa = (gpu.llama(bench.sizes, 1, kind) for kind in ("eager", "sdpa"))
    short, ids = (gpu.tokens_of(bench.sizes, n) for n in bench.pick((1024, 16384), (32, 64)))
    allowed, expected = distance(gradient(eager, short), gradient(sdpa, short)), gradient(sdpa, ids)
    os.environ["ATTNPATCH_FREE_MEMORY"] = "9TB"  # so that attention is tried natively, and runs out
    share = bench.pick(torch.cuda.set_per_process_memory_fraction, lambda share: None)
    torch.cuda.empty_cache()
    share(0.15)
    with attnpatch.patched(eager, mode=bench.pick("auto", "always")):
        bench.is_right("gradient", distance(gradient(eager, ids), expected), 4 * allowed)
        short_of = bench.pick(0, 1) + attnpatch.report(eager).totals["retried"]
        bench.is_right("calls that did not run out of memory and should have", float(not short_of), 0.0)
        bench.say(f"gradient: {attnpatch.report(eager).totals}")
    share(1.0)
    del os.environ["ATTNPATCH_FREE_MEMORY"]
    run = partial(sdpa.float(), ids, use_cache=False)
    with torch.autocast(bench.device.type, BF16):
        native = run()[0]
        with attnpatch.patched(sdpa):
            error = distance(run()[0], native)
            bench.say(f"autocast: {attnpatch.report(sdpa).totals}")
            bench.time("autocast", {"patched": run}, ("", error, rounding(BF16)))


def run_10(bench: Bench) -> None:
    """Prefill and decoding: native, patched, captured; and a patched model in a CUDA graph."""
    from transformers import DynamicCache

    model = gpu.llama(bench.sizes, bench.sizes.layers)

    def decode(ids: torch.Tensor, steps: int = 16) -> torch.Tensor:
        cache = DynamicCache()
        model(ids[:, : bench.pick(1024, 32)], past_key_values=cache)
        return [model(ids[:, :1], past_key_values=cache)[0] for _ in range(steps)][-1]

    def prefill(ids: torch.Tensor) -> torch.Tensor:
        return model(ids, use_cache=False)[0]

    def within(around: Callable[..., Any], work: Callable[[], torch.Tensor], *given: Any) -> torch.Tensor:
        with around(model, *given):
            return work()

    lengths = bench.pick((1200, 2048, 4096), (40,))
    for work, tokens in ((decode, 1024), *((prefill, tokens) for tokens in lengths)):
        run, blocks = partial(work, gpu.tokens_of(bench.sizes, tokens)), attnpatch.Blocks.fixed(128)
        calls = {"native": run, "patched": partial(within, attnpatch.patched, run)}
        calls["captured"] = partial(within, attnpatch.capture, run, blocks)
        native = run()
        errors = [
            (f", {name}", distance(call(), native), rounding(native.dtype)) for name, call in calls.items()
        ]
        bench.time(f"{work.__name__}, {tokens} tokens", calls, *errors)
    if bench.on_cpu:
        return
    with attnpatch.patched(model):
        expected, graph = prefill(ids := gpu.tokens_of(bench.sizes, 1200)).clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = prefill(ids)
        graph.replay()
        calls = {"called": partial(prefill, ids), "replayed": graph.replay}
        bench.time("CUDA graph", calls, ("", distance(result, expected), rounding(expected.dtype)))


RUNS = {name.removeprefix("run_"): run for name, run in globals().items() if name.startswith("run_")}


def main(arguments: list[str]) -> int:
    """The exit status: 1 if a result was wrong, 2 if nothing could be run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_first", description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="execute the same code on tiny shapes")
    parser.add_argument("number", metavar="N", help=f"1 to {len(RUNS)}")
    options = parser.parse_args(arguments)
    run = RUNS.get(options.number)
    if run is None:
        parser.exit(2, f"there is no run {options.number}: give a number from 1 to {len(RUNS)}\n")
    if not options.cpu and not torch.cuda.is_available():
        parser.exit(2, "there is no CUDA device; --cpu executes the same code on tiny shapes\n")
    if options.cpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    bench = Bench(options.cpu)
    bench.say(f"run {options.number}: {run.__doc__}")
    with torch.inference_mode():
        run(bench)
    return int(bool(bench.wrong))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
