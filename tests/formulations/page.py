"""The table of ``docs/formulations.md``: made by ``make formulations``, read by people."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import pathlib
import sys

import torch

from .table import Formulation, all_of_them
from .trying import Tried, try_out

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "formulations.md"
_HEADER = """# Attention that others formulate

`make formulations` writes this page: {count} formulations of attention, natively and by rows (`tests/formulations`). Each is
written again in a small form, from its paper or from descriptions of it.

{counts}

* **float32**, **bf16**, **autocast** (to bfloat16): results without gradients. `bits`: the native ones to the last bit;
  `rounding`: at most {factor:g} times as far from float64 as the native pass.
* **gradients**: results and all gradients in float32, in three ways: without a checkpoint, and with a checkpoint
  around the module, non-reentrant and reentrant. Gradients of keys and values are summed over steps, so their last bits
  differ. If all three agree, one word is shown.
* **report**: what `attnpatch.report` counts for a forward pass.
* **map**: what the block map is.
    * `as dense`: equal to a map that is made from the unpatched module's probabilities.
    * `captured`: its rows sum to 1, or to the same as the formulation's own rows.
    * `mixed`: the weights are no longer rows of one softmax, and the map says so.
    * `refused`: there is no map, and the error says why.
    * `wrong`: anything else.
* **largest**: the largest tensor that an operator returned, by rows and natively, in MB at {longer} tokens (unless a
  formulation needs another number) with 32 rows a step. **Bold** if that tensor still has rows x keys elements.

| formulation | source | float32 | bf16 | autocast | gradients | report | map | largest |
|---|---|---|---|---|---|---|---|---|
"""


def _number(name: str) -> Tried:
    torch.set_num_threads(1)
    (one,) = (f for f in all_of_them() if f.name == name)
    return try_out(one)


def _cell(text: str) -> str:
    text = text.replace("|", "/").replace("\n", " ")
    return text if len(text) <= 90 else text[:87] + "..."


def _agreed(tried: Tried) -> str:
    cells = [tried.gradients, tried.checkpoint, tried.reentrant]
    return cells[0] if len(set(cells)) == 1 else "; ".join(cells)


def row(formulation: Formulation, tried: Tried) -> str:
    """One line of the table."""
    by_rows, native = (f"{size / 1e6:.2f}" for size in tried.largest)
    largest = f"**{by_rows}** of {native}" if tried.is_held else f"{by_rows} of {native}"
    if tried.is_held and formulation.whole:
        largest += f" ({formulation.whole})"
    if not tried.float32:
        return f"| {formulation.name} | {formulation.source} | - | - | - | - | {tried.report} | - | - |"
    cells = [
        tried.float32,
        tried.bfloat16,
        tried.autocast,
        _agreed(tried),
        tried.report,
        tried.captured,
        largest,
    ]
    return (
        f"| {formulation.name} | {formulation.source} | " + " | ".join(_cell(cell) for cell in cells) + " |"
    )


def counts(found: list[tuple[Formulation, Tried]]) -> str:
    """How many did what, as a list."""
    tried = [one for _, one in found]
    served = [one for one in tried if one.float32]
    wrong = [one for one in tried if one.wrong]
    equal = sum(one.float32 == one.bfloat16 == one.autocast == "bits" for one in served)
    right = sum({one.gradients, one.checkpoint, one.reentrant} <= {"bits", "rounding"} for one in served)
    by_rows = sum("by rows" in one.report for one in served)
    dense = sum(one.captured == "as dense" for one in served)
    captured = sum(one.captured.startswith("captured") for one in served)
    refused = sum(one.captured.startswith("refused") for one in served)
    small = sum(not one.is_held for one in served)
    lines = [
        f"{len(tried)} formulations: {by_rows} run by rows; in {len(tried) - len(served)} no attention is recognised.",
        f"Results: {equal} of {len(served)} with the native bits in float32, bfloat16 and under autocast.",
        f"Gradients: {right} of {len(served)} right, plain and under both kinds of checkpoints.",
        f"Maps: {dense} as dense, {captured} captured, {refused} refused.",
        f"Largest tensor: {small} of {len(served)} allocate no tensor of rows x keys elements.",
        f"Wrong or raising: {len(wrong)}"
        + (": " + "; ".join(one.name for one in wrong) if wrong else "")
        + ".",
    ]
    return "\n".join(f"* {line}" for line in lines)


def main() -> int:
    """Tries all of them, each in a process of its own kind, and writes the page; 1 if something is wrong."""
    formulations = all_of_them()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        found = []
        for formulation, tried in zip(
            formulations, pool.map(_number, [f.name for f in formulations]), strict=True
        ):
            found.append((formulation, tried))
            for line in tried.wrong:
                print(f"{formulation.name}: {line}", file=sys.stderr, flush=True)
    said = counts(found)
    header = _HEADER.format(count=len(found), counts=said, factor=4, longer=768)
    PAGE.write_text(header + "\n".join(row(*pair) for pair in found) + "\n")
    print(said)
    return int(any(tried.wrong for _, tried in found))
