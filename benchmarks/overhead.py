"""Where the time of a patch that stays native goes: ``python -m benchmarks overhead``.

How much it is, over 200 pairs, is measured by ``python -m benchmarks "prefill 512" decode``. A profiler makes
small functions look dearer than they are, so what counts here is their order.
"""

from __future__ import annotations

import cProfile
import pathlib
import pstats

import torch

import attnpatch
from benchmarks.models import llama, tokens

PACKAGE = str(pathlib.Path(attnpatch.__file__).parent)
STEPS = 100


def overhead(arguments: list[str]) -> None:
    """Print, for a prompt of 512 tokens and for one token after it, what each function of attnpatch takes itself."""
    from transformers import DynamicCache

    model, prompt = llama("sdpa"), tokens(512)
    sites = len(model.model.layers)
    attnpatch.apply(model)
    with torch.inference_mode():
        cache = DynamicCache()
        model(prompt, past_key_values=cache)
        for what, call, times in (
            ("prompt of 512 tokens", lambda: model(prompt, use_cache=False), STEPS // 10),
            ("one token", lambda: model(prompt[:, :1], past_key_values=cache), STEPS),
        ):
            call()
            profile = cProfile.Profile()
            profile.enable()
            for _ in range(times):
                call()
            profile.disable()
            _print(what, pstats.Stats(profile), times, sites)


def _print(what: str, stats: pstats.Stats, times: int, sites: int) -> None:
    total = stats.total_tt / times
    rows = [
        (own / times, calls / times, f"{pathlib.Path(file).stem}.{name}")
        for (file, _, name), (_, calls, own, _, _) in stats.stats.items()
        if file.startswith(PACKAGE)
    ]
    ours = sum(row[0] for row in rows)
    print(
        f"\n{what}: {total * 1e3:.2f} ms under the profiler, {ours * 1e6:.0f} us of it in attnpatch, {sites} sites"
    )
    for own, calls, name in sorted(rows, reverse=True)[:12]:
        print(f"  {own * 1e6:7.1f} us  {calls:5.1f} calls  {name}")
