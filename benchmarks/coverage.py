"""Which attention of diffusers goes by rows: a small one of every model class, unpatched against forced by rows.

Each class runs in a process of its own, forked when everything is imported, so that a crash costs one line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import pathlib
import resource
import sys
import traceback
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

import attnpatch
from attnpatch.patching import patch
from attnpatch.patching.registry import is_attention
from benchmarks import small_models

DOCUMENT = pathlib.Path(__file__).parents[1] / "docs" / "coverage_diffusers.md"
SECONDS, BYTES = 60, 12 * 2**30
ROWS, SHARE = 7, 0.95


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
        if name in ("scaled_dot_product_attention", "softmax") and patch._thread.mode is None:
            first = args[0] if args else kwargs.get("query", kwargs.get("input"))
            self.calls[name] += first.dim() > 2
        return func(*args, **kwargs)


def tensors(output: Any) -> list[torch.Tensor]:
    """Every tensor of an output, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    elif dataclasses.is_dataclass(output):
        output = [getattr(output, field.name) for field in dataclasses.fields(output)]
    elif not isinstance(output, (list, tuple, zip)):
        # A distribution of an autoencoder.
        output = list(vars(output).values()) if hasattr(output, "__dict__") else []
    return [tensor for each in output for tensor in tensors(each)]


def run(model: nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        return [tensor.clone() for tensor in tensors(model(**inputs))]


def first_that_runs(model: nn.Module, name: str) -> tuple[dict[str, Any], list[torch.Tensor]]:
    problems = []
    for inputs in small_models.inputs_of(model, small_models.special_of(name)):
        try:
            return inputs, run(model, inputs)
        except Exception as error:
            problems.append(error)
    # The layout that came furthest says what is missing.
    raise max(problems, key=lambda error: len(traceback.extract_tb(error.__traceback__)))


def examine(name: str) -> Outcome:
    """One class, in this process."""
    outcome = Outcome(name)
    try:
        model = small_models.build(name)
        outcome.sites = sum(is_attention(module) for module in model.modules())
        inputs, native = first_that_runs(model, name)
    except Exception as error:
        outcome.problem = f"{type(error).__name__}: {error}".splitlines()[0][:160]
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
        got = run(model, inputs)
        report = attnpatch.report(model)
    outcome.equal = _equal(got, native)
    outcome.is_causal = not outcome.equal and _causal_agrees(model, inputs)
    outcome.totals = report.totals
    for site in report.sites:
        for operation, count in site.materialised_by.items():
            outcome.materialised[operation] = outcome.materialised.get(operation, 0) + count
        if site.counts["native"]:
            outcome.native[site.kind] = outcome.native.get(site.kind, 0) + site.counts["native"]
    return outcome


def _outside(model: nn.Module, inputs: dict[str, Any]) -> dict[str, int]:
    """Attention calls of a patched model outside any site; a run of its own, because a mode disturbs compilation."""
    with contextlib.suppress(Exception), _Outside() as outside:
        if any(map(is_attention, model.modules())):
            with attnpatch.patched(model, mode="always", rows=ROWS):
                run(model, inputs)
        else:
            run(model, inputs)
        return {name: count for name, count in outside.calls.items() if count}
    return {}


def _says_causal(model: nn.Module, inputs: dict[str, Any]) -> bool:
    with _Outside() as seen:
        run(model, inputs)
    return seen.is_causal


def _equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(map(_same, left, right))


def _causal_agrees(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether all that differs is the rounding of calls with ``is_causal``: in float64 the outputs agree."""
    if not _says_causal(model, inputs):
        return False
    inputs = tree_map(
        lambda v: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v, inputs
    )
    model.double()
    native = run(model, inputs)
    with attnpatch.patched(model, mode="always", rows=ROWS):
        got = run(model, inputs)
    pairs = zip(got, native, strict=True)
    return all(bool((one - other).abs().max() <= 1e-12 * other.abs().max()) for one, other in pairs)


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(left.nan_to_num(), right.nan_to_num())


def _child(name: str, pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    pipe.send(examine(name))


def apart(name: str) -> Outcome:
    """One class in a forked process."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    child = fork.Process(target=_child, args=(name, theirs))
    child.start()
    theirs.close()
    try:
        if not ours.poll(SECONDS):
            return Outcome(name, f"took more than {SECONDS} s")
        return ours.recv()
    except EOFError:
        return Outcome(name, "the process died")
    finally:
        child.kill()
        child.join()


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


def _row(outcome: Outcome) -> str:
    totals = outcome.totals
    cells = [
        f"`{outcome.name}`",
        str(outcome.sites),
        _status(outcome),
        "yes" if outcome.equal else "to rounding" if outcome.is_causal else "no",
        str(totals.get("by_rows", 0)),
        _listed(outcome.native),
        _listed(outcome.materialised),
        _listed(outcome.outside),
    ]
    return "| " + " | ".join(cells) + " |"


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} x{count}" for name, count in sorted(counts.items()))


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
        f"`python -m benchmarks coverage` builds a small one of every model class of diffusers {diffusers.__version__} "
        "that has attention, with random weights, and runs it",
        f'unpatched and with `mode="always", rows={ROWS}`, on CPU in float32.',
        "",
        *[f"* {line}" for line in summary(outcomes)],
        "",
        "A call that says `is_causal` and has no mask is a fused kernel's: by rows it is the same to rounding, and left to "
        "that kernel unless forced.",
        "",
        "`native` counts calls of a site in which neither door was reached, or one row of queries, by class of the site.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *[_row(outcome) for outcome in outcomes if outcome.built],
        "",
    ]
    failed = [outcome for outcome in outcomes if outcome.problem]
    if failed:
        lines += ["## Not built or not called", "", "| class | why |", "|---|---|"]
        lines += [f"| `{each.name}` | {each.problem.replace('|', '/')} |" for each in failed] + [""]
    lines += ["## Without softmax attention", "", ", ".join(f"`{name}`" for name in none), ""]
    return "\n".join(lines)


def main(names: list[str]) -> int:
    """Prints the table; writes the page where every class was asked for. The exit status."""
    torch.set_num_threads(1)
    seen = []
    for name in names or small_models.classes():
        seen.append(apart(name))
        each = seen[-1]
        print(f"{name:42} {each.problem or _row(each)[len(name) + 6 :]}", flush=True)
    outcomes = [each for each in seen if each.built or each.problem]
    print(*summary(outcomes), sep="\n")
    if not names:
        none = [each.name for each in seen if not each.built and not each.problem]
        DOCUMENT.write_text(document(outcomes, none))
    built = [each for each in outcomes if each.built]
    good = all(each.equal or each.is_causal for each in built) and sum(
        each.by_rows for each in built
    ) >= SHARE * len(built)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main([name for name in sys.argv[1:] if not name.startswith("-")]))
