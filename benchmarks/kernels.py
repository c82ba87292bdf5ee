"""What the choice of steps rests on: speed of tiles, and where matrix products round differently."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter

import torch
import torch.nn.functional as F

import attnpatch


class Attention(torch.nn.Module):
    """Eager causal attention over given query, key and value, as transformers writes it."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        scores = torch.matmul(query, key.transpose(2, 3)) / math.sqrt(query.shape[-1]) + mask
        return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), value)


def tiles(arguments: list[str]) -> None:
    """Seconds of one attention call by heads and rows per step, beside the fused kernel; best of some rounds."""
    length, heads, head_dim, rounds = 4096, 16, 64, 3
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, heads, length, head_dim).unbind()
    mask = torch.full((1, 1, length, length), -1e30).triu_(1)
    model = torch.nn.Sequential(Attention())
    print(f"N={length}, {heads} heads of {head_dim}, float32, {torch.get_num_threads()} threads; seconds")
    with torch.inference_mode():
        print(
            f"fused kernel        {_best(lambda: F.scaled_dot_product_attention(query, key, value, mask), rounds):7.3f}"
        )
        print(f"native eager        {_best(lambda: model[0](query, key, value, mask), 1):7.3f}")
        for tile_heads in (2, 4, heads):
            for rows in (16, 64, 128, 256, 512):
                with attnpatch.patched(model, mode="always", heads=tile_heads, rows=rows):
                    seconds = _best(lambda: model[0](query, key, value, mask), rounds)
                live = tile_heads * rows * length * 4 / 2**20
                print(
                    f"{tile_heads:2} heads x {rows:3} rows {seconds:7.3f}  ({live:5.1f} MiB of scores)",
                    flush=True,
                )
        with attnpatch.patched(model, mode="always"):
            print(f"chosen              {_best(lambda: model[0](query, key, value, mask), rounds):7.3f}")


def sweep(arguments: list[str], rounds: int = 2) -> None:
    """By rows against the fused kernel with the same mask, over lengths, widths, dtypes, heads and threads.

    In one thread CPU time counts, because other processes disturb it less than the clock. No more than 2,048 query rows of
    4 heads, which are as good as any others.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    tiles = [(2, 32), (2, 64), (2, 128), (2, 256), (2, 512)]
    print(f"one thread, 4 heads | {_names(tiles)}")
    for dtype in (torch.float32, torch.bfloat16):
        for head_dim in (64, 128):
            for length in (2048, 4096, 8192, 12345, 16384, 32768):
                found = _against_fused(length, head_dim, dtype, tiles, rounds)
                print(f"{str(dtype)[6:]}, heads of {head_dim}, {length} keys | {found}", flush=True)
    tiles = [(1, 128), (2, 64), (2, 128), (2, 256), (4, 128)]
    print(f"float32, heads of 64 | {_names(tiles)}")
    for threads in range(1, before + 1):
        torch.set_num_threads(threads)
        for heads in (2, 8, 32):
            for length in (4096, 12345, 32768):
                found = _against_fused(length, 64, torch.float32, tiles, rounds, heads)
                print(f"{threads} threads, {heads} heads, {length} keys | {found}", flush=True)
    torch.set_num_threads(before)


def _names(tiles: list[tuple[int, int]]) -> str:
    return " | ".join(["native", *(f"{heads} x {rows}" for heads, rows in tiles), "chosen"])


def _against_fused(
    length: int, head_dim: int, dtype: torch.dtype, tiles: list[tuple[int, int]], rounds: int, heads: int = 4
) -> str:
    """Native eager, each tile and the chosen one as multiples of the fused kernel, by turns, the best of some rounds."""
    torch.manual_seed(0)
    rows = min(length, 2048 * 4 // max(4, heads))
    key, value = torch.randn(2, 1, heads, length, head_dim).to(dtype).unbind()
    query = torch.randn(1, heads, rows, head_dim).to(dtype)
    mask = torch.zeros(1, 1, rows, length, dtype=dtype)
    mask[..., length // 2 :] = torch.finfo(dtype).min
    model = torch.nn.Sequential(Attention())
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    policies = [{"heads": h, "rows": r} for h, r in tiles]
    best = [math.inf] * (len(tiles) + 3)
    with torch.inference_mode():
        for _ in range(rounds):
            calls = [lambda: F.scaled_dot_product_attention(query, key, value, mask)]
            calls += [lambda: model[0](query, key, value, mask)] * (len(best) - 1)
            for place, (call, policy) in enumerate(zip(calls, [None, None, *policies, {}], strict=True)):
                around = (
                    contextlib.nullcontext()
                    if policy is None
                    else attnpatch.patched(model, mode="always", **policy)
                )
                with around:
                    start = clock()
                    call()
                    best[place] = min(best[place], clock() - start)
    return " | ".join(f"{seconds / best[0]:.2f}" for seconds in best[1:])


def _best(call: object, rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def rounding(arguments: list[str]) -> None:
    """How often a product of some rows differs in a bit from the same rows of the whole product."""
    different: Counter[tuple[int, str]] = Counter()
    tried = 0
    for dtype in (torch.float32, torch.bfloat16):
        for heads, length in ((2, 33), (2, 77), (4, 256), (12, 77), (12, 1000)):
            for width in (4, 8, 16, 32, 64, 80, 128):
                generator = torch.Generator().manual_seed(0)
                query, key = torch.randn(2, heads, length, width, generator=generator).to(dtype).unbind()
                weights = torch.rand(heads, length, length, generator=generator).softmax(-1).to(dtype)
                scores, output = query @ key.transpose(1, 2), weights @ key
                tried += 1
                for rows in (*range(1, 18), 24, 31, 32):
                    low = (length - rows) // 2
                    part = slice(low, low + rows)
                    if not torch.equal(query[:2, part] @ key[:2].transpose(1, 2), scores[:2, part]):
                        different[rows, "query x key"] += 1
                    if not torch.equal(weights[:2, part] @ key[:2], output[:2, part]):
                        different[rows, "weights x value"] += 1
    print(f"{tried} shapes and dtypes; number in which some rows differ from the same rows of the whole:")
    for (rows, what), count in sorted(different.items()):
        print(f"  {rows:2} rows, {what}: {count}")
    if not different:
        print("  none")


attnpatch.register(Attention)
