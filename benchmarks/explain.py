"""What explain predicts and what fresh processes take: ``python -m benchmarks explain``.

Twice: with glibc's allocator told to give freed blocks back, which is what tensors hold, and as it comes, which is that
and the holes it keeps for blocks below 32 MiB.
"""

from __future__ import annotations

import os
import time

import torch

import attnpatch
from benchmarks.models import llama, tokens
from benchmarks.runner import Found, measure

LENGTHS = (2048, 4096, 8192)
ALLOCATORS = ({"MALLOC_MMAP_THRESHOLD_": "65536"}, {})


def peak(by_rows: bool, implementation: str, length: str) -> Found:
    """Bytes of one forward pass by the kernel's own high-water mark."""
    model, ids = llama(implementation), tokens(int(length))
    if by_rows:
        attnpatch.apply(model, mode="always")
    with torch.no_grad():
        model(ids[:, :64])
        before = _memory("VmRSS")
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")
        result = model(ids)
    found = _memory("VmHWM") - before
    del result
    return {"peak": found}


VARIANTS = {
    "native": lambda implementation, length: peak(False, implementation, length),
    "by rows": lambda implementation, length: peak(True, implementation, length),
}


def _memory(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def explain(arguments: list[str]) -> int:
    """Print predicted and measured peaks; 1 where one is not within a quarter of what tensors hold."""
    print(
        f"{'attention':9} {'tokens':>6} {'':8} {'predicted':>10}  {'tensors':>10} {'ratio':>6} {'process':>10} {'ratio':>6}"
    )
    outside = 0
    for implementation in ("eager", "sdpa"):
        with torch.device("meta"):
            model = llama(implementation)
        for length in LENGTHS:
            said = attnpatch.explain(model, length, device="cpu", mode="always")
            for way, predicted in (("native", said.native_peak), ("by rows", said.peak)):
                found = [
                    measure("explain", way, implementation, length, env={**os.environ, **allocator})["peak"]
                    for allocator in ALLOCATORS
                ]
                cells = " ".join(f"{value / 1e6:7.0f} MB {predicted / value:6.2f}" for value in found)
                print(f"{implementation:9} {length:6} {way:8} {predicted / 1e6:7.0f} MB  {cells}", flush=True)
                outside += abs(predicted - found[0]) > 0.25 * found[0]
    for implementation in ("eager", "sdpa"):
        seconds = seventy_billion(implementation)
        print(
            f"explaining a 70B Llama on meta at 32768 tokens, {implementation}: {seconds:.1f} s", flush=True
        )
    return int(bool(outside))


def seventy_billion(implementation: str) -> float:
    """Seconds that explaining the shape of a 70B Llama takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=131072, attn_implementation=implementation,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    start = time.perf_counter()
    attnpatch.explain(model, 32768, device="cpu")
    return time.perf_counter() - start
