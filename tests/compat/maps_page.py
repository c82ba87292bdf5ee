"""The part of a coverage page that says which attention is mapped, and whether maps are right."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from . import sweep

TITLE = "## Block maps"
# What a site is whose map is given.
MAPPED = ("equal", "mixed", "no oracle", "WRONG")
# Numbers of a reason are those of one model.
_NUMBERS = re.compile(r"\d[\d.]*(, \d[\d.]*)*")


@dataclasses.dataclass(frozen=True)
class Words:
    """What a page calls its models, and the runs of each; ``exact``: of which runs outputs are compared."""

    model: str
    models: str
    run: str
    runs: str
    exact: str = ""


def kept(page: str) -> str:
    """The part of a page, if it has one: what writes the rest leaves it as it is."""
    _, title, part = page.partition(f"\n{TITLE}\n")
    return f"\n{TITLE}\n{part}" if title else ""


def with_part(page: str, part: str) -> str:
    """A page with the part at its end, in the place of an older one."""
    return page.partition(f"\n{TITLE}\n")[0] + part


def attending(run: Any) -> dict[str, Any]:
    """Sites of more than one query row, by name."""
    return {name: site for name, site in run.sites.items() if site.rows > 1}


def mapped(run: Any) -> int:
    return sum(site.status in MAPPED for site in attending(run).values())


def reasons(run: Any) -> Counter[str]:
    """Why attending sites are in no map."""
    found: Counter[str] = Counter()
    for site in attending(run).values():
        if site.status == "left out":
            found[_NUMBERS.sub("n", site.says)] += 1
        elif site.status == "silent":
            found["nothing is said of it" + (" (no site)" if site.says else "")] += 1
    return found


def _share(count: int, whole: int) -> str:
    return f"{count} of {whole} ({count / max(1, whole):.1%})"


def summary(outcomes: list[Any], words: Words) -> list[str]:
    """The figures in lines."""
    built = [each for each in outcomes if each.runs]
    attend = [each for each in built if any(attending(run) for run in each.runs.values())]
    runs = [run for each in attend for run in each.runs.values()]
    sites = [site for run in runs for site in attending(run).values()]
    count = Counter(site.status for site in sites)
    some = [each for each in attend if any(mapped(run) for run in each.runs.values())]
    whole = [each for each in some if all(mapped(r) == len(attending(r)) for r in each.runs.values())]
    return [
        f"{len(outcomes)} {words.models}, {len(built)} built and called; {len(attend)} of them have softmax attention of more "
        "than one query row",
        f"of which some attention is mapped: {_share(len(some), len(attend))}; all of it: {_share(len(whole), len(attend))}",
        f"sites, {words.runs}: {len(sites)}; mapped and equal to a softmax of their own: {count['equal']}; "
        f"wrong: {count['WRONG']}; mapped without an oracle: {count['no oracle']}; mixed after softmax, which the map "
        f"says: {count['mixed']}; left out with a reason: {count['left out']}; of which nothing is said: {count['silent']}",
        f"runs that raise only when captured: {sum(bool(run.raised) for e in built for run in e.runs.values())}; whose "
        f"outputs are other ones{words.exact}: {sum(run.is_changed for e in built for run in e.runs.values())}",
    ]


def _cells(run: Any) -> tuple[str, ...]:
    if run.raised:
        return "", "", "", f"raises {run.raised}"
    sites = attending(run)
    wrong = sum(site.status == "WRONG" for site in sites.values())
    notes = [f"{reason} x{count}" for reason, count in sorted(reasons(run).items())]
    notes += ["outputs are other ones"] if run.is_changed else []
    return str(len(sites)), str(mapped(run)), str(wrong), "; ".join(notes)


def _is_whole(outcome: Any) -> bool:
    return all(
        not run.raised
        and not run.is_changed
        and all(site.status == "equal" for site in attending(run).values())
        for run in outcome.runs.values()
    )


def _tables(outcomes: list[Any], words: Words) -> list[str]:
    """What is in no map, and why."""
    why: Counter[str] = Counter()
    rows = []
    for each in outcomes:
        for run in each.runs.values():
            why.update(reasons(run))
        if _is_whole(each):
            continue
        cells = {name: _cells(run) for name, run in each.runs.items()}
        if len(set(cells.values())) == 1:
            cells = {", ".join(cells): next(iter(cells.values()))}
        rows += [[f"`{each.name}`", name, *cell] for name, cell in cells.items()]
    header = [words.model, words.run, "sites", "mapped", "wrong", "reasons and notes"]
    counted = sorted(why.items(), key=lambda pair: (-pair[1], pair[0]))
    return [
        *sweep.table(["sites", "reason"], [[str(count), reason] for reason, count in counted]),
        "",
        *sweep.table(header, rows),
    ]


def part(outcomes: list[Any], words: Words, about: Sequence[str]) -> str:
    """The part of the page: no times, always in the same order.

    Args:
        outcomes: Of every model.
        words: What the page calls them.
        about: Lines that say how it was made; ``{state}`` is what of this package it is of.
    """
    attend = [e for e in outcomes if any(attending(run) or run.raised for run in e.runs.values())]
    whole = [
        f"`{e.name}` {max(len(attending(run)) for run in e.runs.values())}" for e in attend if _is_whole(e)
    ]
    states = len({each.state for each in outcomes})
    state = "one state" if states == 1 else f"{states} states, one after the other,"
    lines = [
        "",
        TITLE,
        "",
        *[line.format(state=state) for line in about],
        "",
        *[f"* {line}" for line in summary(outcomes, words)],
        "",
        "All attention mapped and equal, with the number of sites:",
        "",
        ", ".join(whole),
        "",
        "### Attention in no map",
        "",
        f"Why, counted over sites {words.runs} (n: numbers of the model), and where:",
        "",
        *_tables(attend, words),
        "",
    ]
    return "\n".join(lines)


def write(document: pathlib.Path, outcomes: Sequence[Any], words: Words, about: Sequence[str]) -> None:
    """Print the figures of a whole run, and write its part of a page."""
    print(*summary(outcomes, words), sep="\n")
    document.write_text(with_part(document.read_text(), part(outcomes, words, about)))
