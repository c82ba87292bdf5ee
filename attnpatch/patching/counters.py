"""Counts what happened at one attention site: calls, why they stayed native, what was materialised by which line."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from attnpatch.sizes import size_text

TOTALS = ("native", "by_rows", "fused", "retried", "materialised", "captured", "failed", "largest")
# Reasons why a call stayed native, in words; ``left_native`` gets the numbers for the placeholders.
REASONS = {
    "memory": "enough memory: {0} free, {1} needed",
    "short": "short call: {1} row{2}, by rows only above {0}",
    "never": "mode is 'never'",
    "fused": "fused kernel: nothing to save",
    "unread": "a kernel called with arguments that attnpatch cannot express, so it is not replaced",
    "one row": "one query row",
    "nested": "nested tensors",
    "transform": "inside vmap or torch.func.grad",
    "kind": "tensors of another kind (quantised, distributed)",
    "passed": "attnpatch's own code failed",
    "unseen": "a kernel outside torch, or a product that attnpatch does not follow",
}
# Reasons why a call was not watched at all.
_OF_CALLS = ("never", "nested", "transform", "passed")
_NAMES = ("counts", "operations", "obstacles", "sums", "kernels", "short", "reasons")


class SiteCounters:
    """Counts of one site.

    Attributes:
        counts: Number of events by name, see ``TOTALS``.
        operations: Materialisations, by operation and by the line of code that caused them.
        obstacles: Calls that could not use the fused kernel (``Policy.fuse``), by the function that prevented it.
        sums: Fused calls that a capture saw, by the method that summed their probabilities.
        kernels: Calls of kernels outside torch, by name; a name with ``(replaced)`` counts those that torch computed.
        short: Calls that were too short to be watched, by an upper bound on their rows.
        reasons: Calls that stayed native, by reason (keys of ``REASONS``).
        numbers: For each reason, the numbers of the largest such call.
        largest: Bytes of the largest query x key tensor that was allocated.
        need: The most bytes that a call which stayed native was expected to take.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Set all counts to zero."""
        self.counts: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.obstacles: Counter[str] = Counter()
        self.sums: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.short: Counter[int] = Counter()
        self.reasons: Counter[str] = Counter()
        self.numbers: dict[str, tuple[int, ...]] = {}
        self.largest = self.need = 0

    # The methods of rows.attention_call.Counters:

    def count(self, what: str) -> None:
        self.counts[what] += 1

    def materialised(self, operation: str) -> None:
        self.counts["materialised"] += 1
        try:
            place = users_line()
        except Exception:
            place = ""  # sys.path may hold an entry that is no path; then only the operation is reported
        self.operations[f"{operation} ({place})" if place else operation] += 1

    def not_fused(self, step: str) -> None:
        self.obstacles[step] += 1

    def summed(self, by: str) -> None:
        self.sums[by] += 1

    def kernel(self, name: str, is_replaced: bool = False) -> None:
        self.kernels[f"{name} (replaced)" if is_replaced else name] += 1

    def left_native(self, reason: str, *numbers: int) -> None:
        self.reasons[reason] += 1
        if reason in ("memory", "fused") and numbers:
            self.need = max(self.need, numbers[-1])
        if numbers and numbers[-1] >= self.numbers.get(reason, numbers)[-1]:
            self.numbers[reason] = numbers

    def made(self, size: int) -> None:
        if size > self.largest:
            self.largest = size

    # ------------------------------------------------------------------------------------------------- for reports

    @property
    def is_used(self) -> bool:
        """True if anything was counted."""
        return bool(self.counts or self.short or self.reasons)

    @property
    def passed(self) -> int:
        """Number of native calls in which no attention was counted: too short to be watched, or only products seen."""
        return self.counts["passed"] + self.short.total() + sum(self.reasons[rule] for rule in _OF_CALLS)

    def add(self, other: SiteCounters) -> None:
        """Add the counts of ``other`` to these."""
        for name in _NAMES:
            getattr(self, name).update(getattr(other, name))
        for reason, numbers in other.numbers.items():
            if numbers[-1] >= self.numbers.get(reason, numbers)[-1]:
                self.numbers[reason] = numbers
        self.made(other.largest)

    def why_native(self, min_tokens: int) -> dict[str, int]:
        """Why calls stayed native, in words, with the number of calls; the most frequent first."""
        found = Counter(self.reasons)
        numbers = dict(self.numbers)
        if self.short:
            found["short"] += self.short.total()
            numbers["short"] = max(
                numbers.get("short", (0, 0)), (min_tokens, max(self.short)), key=lambda n: n[-1]
            )
        return {_said(reason, numbers.get(reason, ())): count for reason, count in found.most_common()}


def _said(reason: str, numbers: tuple[int, ...]) -> str:
    if reason == "memory":
        return REASONS[reason].format(*map(size_text, numbers))
    if reason == "short":
        return REASONS[reason].format(*numbers, "s" * (numbers[-1] != 1))
    return REASONS[reason]


@contextlib.contextmanager
def counted_apart(all_of: Iterable[SiteCounters]) -> Iterator[None]:
    """Inside the block counts start at zero; afterwards they are added to the former ones."""
    kept = []
    for counters in all_of:
        earlier = SiteCounters()
        earlier.add(counters)
        kept.append((counters, earlier))
        counters.forget()
    try:
        yield
    finally:
        for counters, earlier in kept:
            counters.add(earlier)


# ----------------------------------------------------------------------------------------------- the line of a user

_TORCH, _OWN = (
    str(pathlib.Path(path).parent) + os.sep
    for path in (torch.__file__, __file__.rpartition("patching")[0] + "x")
)
# Packages and files between a user's line and torch that only pass tensors on.
_PACKAGES, _FILES = frozenset(["einops", "opt_einsum", "numpy"]), frozenset(["contextlib.py", "functools.py"])


def users_line() -> str:
    """``"file.py:12"``: the innermost running line that is neither attnpatch's nor torch's; ``""`` if there is none."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = _place(frame.f_code.co_filename)
        if name:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


@functools.lru_cache(maxsize=4096)
def _place(filename: str) -> str:
    """A file's path relative to its ``sys.path`` folder; ``""`` for attnpatch, torch and ``_PACKAGES``."""
    if filename.startswith((_OWN, _TORCH, "<frozen")):
        return ""
    path = pathlib.Path(filename)
    if path.parent.name in _PACKAGES or path.name in _FILES:
        return ""
    folders = [folder for folder in sys.path if folder and path.is_relative_to(folder)]
    return path.relative_to(max(folders, key=len)).as_posix() if folders else path.name
