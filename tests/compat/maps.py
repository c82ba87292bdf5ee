"""Whether block maps are right: what the sweeps over transformers and over diffusers share.

A model is run without attnpatch, where its softmax results are kept, and captured; each map is compared with them. Results
are kept in a folder, one file for each model, so that a run of all of them goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import pathlib
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from unittest import mock

import torch

import attnpatch

from . import softmax_oracle, sweep

WIDTH = 8
TOLERANCE = {"eager": 1e-6, "sdpa": 1e-5}
SECONDS = 150
# The worst last: a site with several maps is what the worst of them is.
_ORDER = ("equal", "mixed", "no oracle", "left out", "silent", "WRONG")


@dataclasses.dataclass
class Site:
    """One attention site.

    Attributes:
        status: ``equal``, ``WRONG``, ``left out``; ``no oracle``: mapped, and no softmax was seen; ``mixed``: mapped as a
            mixture of softmax results, and says so; ``silent``: it attends, and is neither mapped nor left out.
        says: The reason, or what the oracle says.
        kind: Class of the module.
        rows: The most query rows of its attention as the unpatched model computes it; 0: it computes none.
        maps: How many maps were compared.
        difference: Of them the largest.
    """

    status: str
    says: str = ""
    kind: str = ""
    rows: int = 0
    maps: int = 0
    difference: float = 0.0


@dataclasses.dataclass
class Run:
    """One architecture with one implementation: its sites by name, what raised, whether outputs were other ones."""

    sites: dict[str, Site] = dataclasses.field(default_factory=dict)
    raised: str = ""
    is_changed: bool = False

    def has_wrong(self) -> bool:
        return any(site.status == "WRONG" for site in self.sites.values())


@dataclasses.dataclass
class Outcome:
    """What one architecture did; ``problem``: why it could not be built or called; ``state``: of the package's files."""

    name: str
    problem: str = ""
    runs: dict[str, Run] = dataclasses.field(default_factory=dict)
    state: str = ""


# --------------------------------------------------------------------------------------------------------- one model


class Native:
    """What the unpatched model computes: outputs, softmax results by module, and which modules attend."""

    def __init__(self, model: Any, candidates: Iterable[dict[str, Any]]) -> None:
        """``candidates``: inputs to try, the first that the model takes are it."""
        self.inputs, self.output = sweep.first_that_runs(model, candidates)
        with softmax_oracle.softmaxes(model) as watch, sweep.seen(self.inputs) as seen:
            sweep.run(model, self.inputs)
        self.found = watch.found
        names = {module: name for name, module in model.named_modules()}
        self.stacks = [
            ([(names[m], type(m).__name__) for m in stack if m in names], n) for stack, n in seen.rows.items()
        ]

    def attending(self, sites: Any) -> dict[str, tuple[str, int]]:
        """By site, or by innermost module where none is a site: its class, and its query rows."""
        result: dict[str, tuple[str, int]] = {}
        for stack, rows in self.stacks:
            if stack:
                name, kind = next((each for each in stack if each[0] in sites), stack[0])
                result[name] = kind, max(rows, result.get(name, ("", 0))[1])
        return result


def captured(model: Any, native: Native, tolerance: float) -> Run:
    """A model's maps beside what it computed natively."""
    result = Run()
    try:
        with attnpatch.capture(model, attnpatch.Blocks.fixed(WIDTH)) as maps:
            output = sweep.run(model, native.inputs)
        names = set(maps._recorder.places)
        _judge(result, maps, native, tolerance)
        result.is_changed = tolerance == TOLERANCE["eager"] and not sweep.equal(output, native.output)
    except attnpatch.errors.PatchError:
        names = set()  # nothing in it is attention
    except Exception as error:
        if "-v" in sys.argv:
            traceback.print_exc()
        result.raised = sweep.reason(error)
        return result
    differ = [name for name, site in result.sites.items() if "capture them one by one" in site.says]
    for name in differ:
        del result.sites[name]
        with attnpatch.capture(model, attnpatch.Blocks.fixed(WIDTH), sites=name) as maps:
            sweep.run(model, native.inputs)
        _judge(result, maps, native, tolerance, only=name)
    for name, (kind, rows) in native.attending(names).items():
        parts = [site for own, site in result.sites.items() if own.partition(":")[0] == name]
        if not parts:
            why = "" if name in names else "no site"
            result.sites[name] = Site("silent", why, kind, rows)
        for site in parts:
            site.kind, site.rows = kind, rows
    return result


def _judge(result: Run, maps: Any, native: Native, tolerance: float, only: str = "") -> None:
    """Sites of one capture: what each map is, and why there is none."""
    by_place = {place: name for name, place in maps._recorder.places.items()}
    for sequence in maps.sequences:
        for pattern, one in sequence.items():
            kind, colon, number = pattern.partition(":")
            for at, layer in enumerate(one.layers):
                name = by_place[kind, layer]
                verdict = softmax_oracle.judged(one, at, native.found[name], WIDTH, tolerance)
                if verdict.status == "WRONG" and one.metadata.get("notes"):
                    verdict.status = "mixed"
                site = Site(verdict.status, verdict.says, maps=1, difference=verdict.difference)
                put(result.sites, f"{name}{colon}{number}", site)
    for name, reason in maps.left_out.items():
        bare, colon, number = name.partition(":")
        owners = [own for own, place in maps._recorder.places.items() if place[0] == bare]
        for own in [bare] if bare in maps._recorder.places else owners:
            if not only or own == only:
                put(result.sites, f"{own}{colon}{number}", Site("left out", reason))


def put(sites: dict[str, Site], name: str, site: Site) -> None:
    old = sites.get(name)
    if old is not None:
        worst = max(old, site, key=lambda each: _ORDER.index(each.status))
        difference = max(old.difference, site.difference)
        site = dataclasses.replace(worst, maps=old.maps + site.maps, difference=difference)
    sites[name] = site


# --------------------------------------------------------------------------------------------------------- all of them


def line(outcome: Outcome) -> str:
    """An architecture in one line, and one more for each site that is wrong or of which nothing is said."""
    if outcome.problem:
        return f"{outcome.name:28} {outcome.problem}"
    lines = []
    for implementation, run in outcome.runs.items():
        counts = dict.fromkeys(_ORDER, 0)
        for site in run.sites.values():
            if site.rows > 1 or site.maps:
                counts[site.status] += 1
        said = ", ".join(f"{count} {status}" for status, count in counts.items() if count) or "no attention"
        said += f"; RAISED {run.raised}" if run.raised else ""
        said += "; OUTPUT CHANGED" if run.is_changed else ""
        lines.append(f"{outcome.name:28} {implementation:6} {said}")
        for name, site in run.sites.items():
            if site.status in ("WRONG", "silent", "mixed"):
                lines.append(f"    {site.status} {name} ({site.kind}, {site.rows} rows): {site.says}")
        reasons: dict[str, list[str]] = {}
        for name, site in run.sites.items():
            if site.status == "left out" and site.rows > 1:
                reasons.setdefault(site.says, []).append(name)
        lines += [
            f"    left out x{len(names)} {names[0]}: {reason}"[:300] for reason, names in reasons.items()
        ]
    return "\n".join(lines)


def read(path: pathlib.Path) -> Outcome:
    """An outcome as ``write`` left it."""
    data = json.loads(path.read_text())
    runs = {
        name: Run(**{**run, "sites": {own: Site(**site) for own, site in run["sites"].items()}})
        for name, run in data["runs"].items()
    }
    return Outcome(data["name"], data["problem"], runs, data.get("state", ""))


def state_of_package() -> str:
    """What tells one state of attnpatch from another: results of several are no one run."""
    folder = pathlib.Path(attnpatch.__file__).parent
    content = b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))
    return hashlib.sha256(content).hexdigest()[:12]


def write(outcome: Outcome, folder: pathlib.Path) -> None:
    # Under its own name once it is whole.
    part = folder / f"{outcome.name}.part"
    part.write_text(json.dumps(dataclasses.asdict(outcome), indent=1))
    part.rename(folder / f"{outcome.name}.json")


def run_all(
    name: str, document: str, known: Sequence[str], examine: Callable[[str], Outcome], default: pathlib.Path
) -> list[Outcome] | None:
    """Examine models that have no result yet, and print a line for each.

    Args:
        name: Of the program, for its help.
        document: What it does, for its help.
        known: All models.
        examine: What is done with one, in a process of its own.
        default: Folder for results.

    Returns:
        The outcome of every model; ``None`` where some were named.
    """
    parser = argparse.ArgumentParser(prog=name, description=document)
    parser.add_argument("names", nargs="*", help="models; all of them where none is named")
    parser.add_argument("--results", type=pathlib.Path, default=default, help="folder for results")
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument(
        "--backwards", action="store_true", help="from the last one, for a second process beside the first"
    )
    parser.add_argument("-v", action="store_true", help="tracebacks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options.results.mkdir(parents=True, exist_ok=True)
    state = state_of_package()
    with mock.patch.object(sweep, "SECONDS", SECONDS):
        for each in (options.names or known)[:: -1 if options.backwards else 1]:
            path = options.results / f"{each}.json"
            if path.exists() and not (options.again or options.names):
                continue
            outcome = sweep.apart(examine, each, Outcome)
            outcome.state = state
            write(outcome, options.results)
            print(line(outcome), flush=True)
    return None if options.names else [read(options.results / f"{each}.json") for each in known]


def status_of(outcomes: list[Outcome]) -> int:
    """The exit status of a sweep."""
    return int(any(run.has_wrong() or run.raised for each in outcomes for run in each.runs.values()))
