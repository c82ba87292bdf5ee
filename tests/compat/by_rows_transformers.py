"""Which attention of transformers goes by rows: a small one of every architecture, unpatched against forced by rows."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import traceback
from typing import Any

import torch

import attnpatch

from . import maps_page, models_transformers, sweep
from .inputs_transformers import LENGTH, MEDIA, TARGET_LENGTH, inputs_of, parameters_of
from .recipes_transformers import recipe_of
from .sweep import ROWS

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "coverage.md"
IMPLEMENTATIONS = ("eager", "sdpa")
# The least that a whole sweep passes with.
# Bits: heads of 256 and wider round otherwise in steps of fewer than 17 rows on processors with AMX (the sweep takes 7).
BUILT, SHARE_BY_ROWS, SHARE_BITS = 450, 0.98, 0.985


@dataclasses.dataclass
class Run:
    """One architecture with one attention implementation.

    Attributes:
        raised: What it raises when patched, and does not otherwise.
        sites: Attention modules that computed softmax attention of more than one query row.
        by_rows: Those of them in which all of it went by rows.
        equal: Of those: 2 to the last bit, 1 to rounding, 0 otherwise.
        difference: The largest relative difference of an output.
        materialised: Operations that needed a whole matrix.
        whole: What else made a tensor of tokens x tokens, where tokens are text.
        missed: Modules that computed attention not by rows, by class.
        one_row: Modules that only attend with one query row: there is nothing to cut.
        finite: Whether the outputs of the unpatched model are numbers.
        without: Images and sounds that its forward takes, and that it was not given.
    """

    raised: str = ""
    sites: int = 0
    by_rows: int = 0
    equal: int = 2
    difference: float = 0.0
    materialised: dict[str, int] = dataclasses.field(default_factory=dict)
    whole: dict[str, int] = dataclasses.field(default_factory=dict)
    missed: dict[str, int] = dataclasses.field(default_factory=dict)
    one_row: dict[str, int] = dataclasses.field(default_factory=dict)
    finite: bool = True
    without: tuple[str, ...] = ()


@dataclasses.dataclass
class Outcome:
    """What one architecture did.

    Attributes:
        problem: Why it could not be built or called.
        level: How far its config was shrunk.
        runs: By attention implementation.
    """

    name: str
    problem: str = ""
    level: int = 0
    runs: dict[str, Run] = dataclasses.field(default_factory=dict)

    @property
    def attends(self) -> bool:
        return any(run.sites or run.one_row for run in self.runs.values())


def examine(model_type: str) -> Outcome:
    """One architecture, in this process."""
    outcome = Outcome(model_type)
    recipe = recipe_of(model_type)

    def attempt(level: int) -> dict[str, Run]:
        outcome.level, runs = level, {}
        for implementation, model in models_transformers.built_with(model_type, level, IMPLEMENTATIONS):
            inputs, native = sweep.first_that_runs(model, inputs_of(model, recipe))
            runs[implementation] = compare(model, inputs, native)
        return runs

    runs, outcome.problem = sweep.at_first_level((0, 1), attempt)
    outcome.runs.update(runs or {})
    return outcome


def compare(model: torch.nn.Module, inputs: dict[str, Any], native: list[torch.Tensor]) -> Run:
    """The unpatched model against itself forced by rows."""
    left_out = [name for name in MEDIA if name in parameters_of(model.forward) and name not in inputs]
    result = Run(without=tuple(left_out), finite=all(bool(t.isfinite().all()) for t in native))
    with sweep.seen(inputs) as seen:
        sweep.run(model, inputs)
    names = {module: name or "(model)" for name, module in model.named_modules()}
    try:
        with attnpatch.patched(model, mode="always", rows=ROWS):
            got = sweep.run(model, inputs)
            report = attnpatch.report(model)
            if LENGTH in _sizes(inputs):
                # A second call: in the first, modules that may be attention are found out.
                with sweep.Whole({LENGTH, TARGET_LENGTH}) as whole:
                    sweep.run(model, inputs)
                result.whole = dict(whole.made)
    except attnpatch.errors.PatchError:
        # No site at all: whatever attends is missed.
        _judge(result, seen.rows, names, {})
        return result
    except Exception as error:
        if "-v" in sys.argv:
            traceback.print_exc()
        result.raised = sweep.reason(error)
        return result
    _judge(result, seen.rows, names, {site.name: site for site in report.sites})
    for site in report.sites:
        for said, count in site.materialised_by.items():
            operation = said.partition(" (")[0]  # without the line
            result.materialised[operation] = result.materialised.get(operation, 0) + count
    if not sweep.equal(got, native):
        result.difference = sweep.difference(got, native)
        result.equal = int(sweep.agrees_in_double(model, inputs))
    return result


def _sizes(inputs: dict[str, Any]) -> set[int]:
    return {size for value in inputs.values() if isinstance(value, torch.Tensor) for size in value.shape}


def _judge(result: Run, rows: Any, names: dict[Any, str], sites: dict[str, Any]) -> None:
    """Counts of the attention that was seen in the unpatched model, by what its sites did."""
    most: dict[str, int] = {}
    kinds: dict[str, str] = {}
    for stack, count in rows.items():
        owner = next((m for m in stack if names.get(m) in sites), stack[0] if stack else None)
        name = names.get(owner, "")
        most[name] = max(count, most.get(name, 0))
        kinds[name] = type(owner).__name__
    for name, count in most.items():
        if count < 2:
            result.one_row[kinds[name]] = result.one_row.get(kinds[name], 0) + 1
            continue
        result.sites += 1
        counts = sites[name].counts if name in sites else {}
        if counts.get("by_rows") and not (counts.get("native") or counts.get("fused")):
            result.by_rows += 1
        else:
            result.missed[kinds[name]] = result.missed.get(kinds[name], 0) + 1


def row(outcome: Outcome, implementation: str) -> list[str]:
    """The cells of one run in the table."""
    found = outcome.runs[implementation]
    if found.raised:
        verdict = f"raises {found.raised}"
    elif not found.sites:
        verdict = ""
    elif found.equal == 2:
        verdict = "to the last bit"
    else:
        verdict = f"{'to rounding' if found.equal else 'no'}, {found.difference:.0e}"
    notes = [f"not by rows: {sweep.listed(found.missed)}"] if found.missed else []
    notes += [f"one query row: {sweep.listed(found.one_row)}"] if found.one_row else []
    notes += [f"called without {', '.join(found.without)}"] if found.without else []
    notes += [] if found.finite else ["NaN also unpatched"]
    notes += [f"whole: {sweep.listed(found.whole)}"] if found.whole else []
    return [str(found.sites), str(found.by_rows), verdict, sweep.listed(found.materialised), "; ".join(notes)]


def summary(outcomes: list[Outcome]) -> list[str]:
    """The figures in lines."""
    built = [each for each in outcomes if each.runs]
    runs = [run for each in built for run in each.runs.values()]
    sites, by_rows = sum(run.sites for run in runs), sum(run.by_rows for run in runs)
    attended = [run for run in runs if run.by_rows]
    same = sum(run.equal == 2 for run in attended)
    close = sum(run.equal == 1 for run in attended)
    return [
        f"{len(outcomes)} architectures, {len(built)} built and called in {len(runs)} runs; "
        f"{sum(each.attends for each in built)} of them compute softmax attention",
        f"sites that compute softmax attention and went by rows: {by_rows} of {sites} "
        f"({by_rows / max(1, sites):.1%})",
        f"runs by rows that are equal to the last bit: {same} of {len(attended)} ({same / max(1, len(attended)):.1%}); "
        f"to rounding, and in float64 to 1e-12: {close}; otherwise: {len(attended) - same - close}",
        f"runs in which something was materialised: {sum(bool(run.materialised) for run in runs)}",
        "runs of a text in which something else made a tensor of tokens x tokens: "
        f"{sum(bool(run.whole) and not run.materialised for run in runs)}",
        f"raise only when patched: {sum(bool(run.raised) for run in runs)}",
        "architectures called without the images or sounds that they also take: "
        f"{sum(any(run.without for run in each.runs.values()) for each in built)}",
    ]


def reached(outcomes: list[Outcome]) -> bool:
    """Whether a sweep passes."""
    runs = [run for each in outcomes for run in each.runs.values()]
    attended = [run for run in runs if run.by_rows]
    return (
        sum(run.by_rows for run in runs) >= SHARE_BY_ROWS * sum(run.sites for run in runs)
        and all(run.equal for run in attended)
        and sum(run.equal == 2 for run in attended) >= SHARE_BITS * len(attended)
        and not any(run.raised for run in runs)
    )


def document(outcomes: list[Outcome]) -> str:
    """The page of the documentation: no times, always in the same order."""
    import transformers

    header = ["architecture", "attention", "sites", "by rows", "equal", "materialised by", "notes"]
    rows = []
    for outcome in outcomes:
        if outcome.attends or any(run.raised for run in outcome.runs.values()):
            cells = {name: row(outcome, name) for name in outcome.runs}
            if len({tuple(each) for each in cells.values()}) == 1:
                cells = {", ".join(cells): next(iter(cells.values()))}
            rows += [[f"`{outcome.name}`", name, *each] for name, each in cells.items()]
    nothing = [f"`{each.name}`" for each in outcomes if each.runs and not each.attends]
    lines = [
        "# transformers, architecture by architecture",
        "",
        "`python -m tests.compat --transformers` builds a small one of every architecture that an Auto class of",
        f"transformers {transformers.__version__} knows, with random weights, and runs it unpatched and with",
        f'`mode="always", rows={ROWS}`: on CPU in float32, eager and SDPA, with padding.',
        "",
        *[f"* {line}" for line in summary(outcomes)],
        "",
        "What attends is found in the unpatched model, by following its inputs to a product of two of them, its softmax, and a",
        "product with that. `sites` are modules in which that happens with more than one query row: a call with one row cannot",
        "be cut. Numbers above count both implementations.",
        "",
        "What is materialised is as a rule no attention: products that choose keys for a sparse attention (`matmul` of",
        "DeepSeek's indexer, `topk`, `scatter_`, `full_like`), chunks of linear attention (`__setitem__`, `zeros_like`,",
        "`linalg_solve_triangular`), hashes (`argsort`). Two terms of attention are computed whole: relative positions that are",
        "shifted by padding and reshaping (`pad`, `reshape`: each element goes to another row), and positions that a product",
        "makes and SDPA is handed as a mask (`scaled_dot_product_attention`). To rounding: calls with `is_causal` and no mask,",
        "and products of few columns (decomposed positions of SAM), whose rows round differently in a step.",
        "",
        "`whole` names what else made a tensor of tokens x tokens, as operation and function of the model. Beside what is",
        "materialised: pairs of boxes (`bros`), masks of floating-point numbers (`canine`, `openai-gpt`), and zeros of up to 512",
        "keys, which are too small to be put off (`t5` and its kind, `gpt_neox_japanese`).",
        "",
        *sweep.table(header, rows),
        "",
        "## Without softmax attention",
        "",
        "Convolutions, recurrences, linear attention, Fourier transforms, or parts that only decode:",
        "",
        ", ".join(nothing),
        "",
        "## Not built or not called",
        "",
        *sweep.table(["architecture", "why"], [[f"`{e.name}`", e.problem] for e in outcomes if e.problem]),
        "",
    ]
    return "\n".join(lines)


def main(names: list[str]) -> int:
    """Prints the table; writes the page where every architecture was asked for. The exit status."""
    torch.set_num_threads(1)
    import transformers.modeling_utils  # before processes are forked

    transformers.logging.set_verbosity_error()
    outcomes = []
    for name in names or models_transformers.model_classes():
        outcomes.append(sweep.apart(examine, name, Outcome))
        each = outcomes[-1]
        for kind in each.runs:
            print(f"{name:36} {kind:6} {each.level} {' | '.join(row(each, kind))}", flush=True)
        if each.problem:
            print(f"{name:36} {each.problem}", flush=True)
    print(*summary(outcomes), sep="\n")
    if not names:
        DOCUMENT.write_text(maps_page.with_part(document(outcomes), maps_page.kept(DOCUMENT.read_text())))
        built = sum(bool(each.runs) for each in outcomes)
        return int(not reached(outcomes) or built < BUILT)
    return int(not reached(outcomes))
