"""Which attention of diffusers goes by rows: a small one of every model class, unpatched against forced by rows."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import sys
import traceback
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import attnpatch
from attnpatch.patching.calls import calls_here
from attnpatch.patching.registry import is_attention

from . import maps_page, models_diffusers, sweep
from .recipes_diffusers import recipe_of
from .sweep import ROWS, listed

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "coverage_diffusers.md"
SHARE = 0.95


@dataclasses.dataclass
class Outcome:
    """What one class did.

    Attributes:
        problem: Why it could not be built or called.
        sites: Attention modules.
        equal: Whether every output has the bits of the unpatched model.
        is_causal: Not equal, but only because calls with ``is_causal`` round otherwise by rows.
        finite: Whether the outputs of the unpatched model are numbers.
        totals: Of the report.
        materialised: Operations that needed a whole matrix.
        outside: Attention calls outside any site, by function.
        native: Calls of sites in which nothing went by rows, by class of the site.
    """

    name: str
    problem: str = ""
    sites: int = 0
    equal: bool = False
    is_causal: bool = False
    finite: bool = True
    totals: dict[str, int] = dataclasses.field(default_factory=dict)
    materialised: dict[str, int] = dataclasses.field(default_factory=dict)
    outside: dict[str, int] = dataclasses.field(default_factory=dict)
    native: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def built(self) -> bool:
        return not self.problem and bool(self.sites or self.outside)

    @property
    def by_rows(self) -> bool:
        return self.totals.get("by_rows", 0) > 0 and not self.outside


class _Outside(TorchFunctionMode):
    """Counts attention that runs while no site does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.is_causal = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        self.is_causal |= bool(kwargs.get("is_causal"))
        if name in ("scaled_dot_product_attention", "softmax") and calls_here.mode is None:
            first = args[0] if args else kwargs.get("query", kwargs.get("input"))
            self.calls[name] += first.dim() > 2
        return func(*args, **kwargs)


def first_that_runs(model: nn.Module, name: str) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Inputs that a class takes, and what it makes of them."""
    return sweep.first_that_runs(model, models_diffusers.inputs_of(model, recipe_of(name)))


def examine(name: str) -> Outcome:
    """One class, in this process."""
    outcome = Outcome(name)
    try:
        model = models_diffusers.build(name)
        outcome.sites = sum(is_attention(module) for module in model.modules())
        inputs, native = first_that_runs(model, name)
    except Exception as error:
        outcome.problem = sweep.reason(error)
        if "-v" in sys.argv:
            traceback.print_exc()
        return outcome
    if not native:
        outcome.problem = "its forward computes nothing: it is a part of another model"
        return outcome
    outcome.finite = all(bool(tensor.isfinite().all()) for tensor in native)
    outcome.outside = _outside(model, inputs)
    if not outcome.sites:
        return outcome
    with attnpatch.patched(model, mode="always", rows=ROWS):
        got = sweep.run(model, inputs)
        report = attnpatch.report(model)
    outcome.equal = sweep.equal(got, native)
    outcome.is_causal = not outcome.equal and _causal_agrees(model, inputs)
    outcome.totals = report.totals
    for site in report.sites:
        for said, count in site.materialised_by.items():
            operation = said.partition(" (")[0]  # without the line
            outcome.materialised[operation] = outcome.materialised.get(operation, 0) + count
        if site.counts["native"]:
            outcome.native[site.kind] = outcome.native.get(site.kind, 0) + site.counts["native"]
    return outcome


def _outside(model: nn.Module, inputs: dict[str, Any]) -> dict[str, int]:
    """Attention calls of a patched model outside any site; a run of its own, because a mode disturbs compilation."""
    with contextlib.suppress(Exception), _Outside() as outside:
        if any(map(is_attention, model.modules())):
            with attnpatch.patched(model, mode="always", rows=ROWS):
                sweep.run(model, inputs)
        else:
            sweep.run(model, inputs)
        return {name: count for name, count in outside.calls.items() if count}
    return {}


def _says_causal(model: nn.Module, inputs: dict[str, Any]) -> bool:
    with _Outside() as seen:
        sweep.run(model, inputs)
    return seen.is_causal


def _causal_agrees(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether all that differs is the rounding of calls with ``is_causal``."""
    return _says_causal(model, inputs) and sweep.agrees_in_double(model, inputs)


def _status(outcome: Outcome) -> str:
    if outcome.problem:
        return "not built"
    return "yes" if outcome.by_rows else "no"


def summary(outcomes: list[Outcome]) -> list[str]:
    """The figures in lines."""
    built = [each for each in outcomes if each.built]
    return [
        f"{len(outcomes)} classes with attention, {len(built)} built and called",
        f"by rows: {sum(each.by_rows for each in built)} of {len(built)}",
        f"equal to the last bit: {sum(each.equal for each in built)} of {len(built)}; "
        f"to rounding, and in float64 to 1e-12: {sum(each.is_causal for each in built)}",
        f"nothing materialised: {sum(not each.materialised for each in built)} of {len(built)}",
    ]


def row(outcome: Outcome) -> list[str]:
    """Its cells in the table, without its name."""
    return [
        str(outcome.sites),
        _status(outcome),
        "yes" if outcome.equal else "to rounding" if outcome.is_causal else "no",
        str(outcome.totals.get("by_rows", 0)),
        listed(outcome.native),
        listed(outcome.materialised),
        listed(outcome.outside),
    ]


def document(outcomes: list[Outcome], none: list[str]) -> str:
    """The page of the documentation: no times, always in the same order."""
    import diffusers

    header = [
        "class",
        "sites",
        "by rows",
        "equal",
        "calls by rows",
        "native",
        "materialised by",
        "outside a site",
    ]
    lines = [
        "# diffusers, class by class",
        "",
        f"`python -m tests.compat --diffusers` builds a small one of every model class of diffusers {diffusers.__version__} "
        "that has attention, with random weights, and runs it",
        f'unpatched and with `mode="always", rows={ROWS}`, on CPU in float32.',
        "",
        *[f"* {line}" for line in summary(outcomes)],
        "",
        "A call that says `is_causal` and has no mask is a fused kernel's: by rows it is the same to rounding, and left to "
        "that kernel unless forced.",
        "",
        "`native` counts calls of a site in which neither SDPA nor a product was reached, or one row of queries, by class of the site.",
        "",
        *sweep.table(header, [[f"`{each.name}`", *row(each)] for each in outcomes if each.built]),
        "",
    ]
    failed = [outcome for outcome in outcomes if outcome.problem]
    if failed:
        why = sweep.table(["class", "why"], [[f"`{each.name}`", each.problem] for each in failed])
        lines += ["## Not built or not called", "", *why, ""]
    lines += ["## Without softmax attention", "", ", ".join(f"`{name}`" for name in none), ""]
    return "\n".join(lines)


def main(names: list[str]) -> int:
    """Prints the table; writes the page where every class was asked for. The exit status."""
    torch.set_num_threads(1)
    seen = []
    for name in names or models_diffusers.classes():
        seen.append(sweep.apart(examine, name, Outcome))
        each = seen[-1]
        print(f"{name:42} {each.problem or ' | '.join(row(each))}", flush=True)
    outcomes = [each for each in seen if each.built or each.problem]
    print(*summary(outcomes), sep="\n")
    if not names:
        none = [each.name for each in seen if not each.built and not each.problem]
        part = maps_page.kept(DOCUMENT.read_text())
        DOCUMENT.write_text(maps_page.with_part(document(outcomes, none), part))
    built = [each for each in outcomes if each.built]
    good = all(each.equal or each.is_causal for each in built) and sum(
        each.by_rows for each in built
    ) >= SHARE * len(built)
    return 0 if good else 1
