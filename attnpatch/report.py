"""What each attention site did: a table for people, counts for programs."""

from __future__ import annotations

import dataclasses
from collections import Counter

from attnpatch.patching.patch import TOTALS, Patch
from attnpatch.policy import Policy


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """One attention module: path, class, why it is one, counts, and what was materialised by which operation.

    ``unseen``: native calls in which attention would have been served and none was seen. ``not_fused``: calls that
    ``fuse=True`` could not hand to the fused kernel, by the step that stood in the way. ``summed_by``: what summed the
    probabilities of fused calls for a capture: the ``kernel``, or ``torch (...)`` and why not the kernel.
    """

    name: str
    kind: str
    why: str
    counts: dict[str, int]
    materialised_by: dict[str, int]
    unseen: int = 0
    not_fused: dict[str, int] = dataclasses.field(default_factory=dict)
    summed_by: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a patched model did since it was patched.

    Attributes:
        model: Class of the model.
        policy: The rule in force; ``None`` for a pipeline whose components have different ones.
        sites: Every attention module that did something, or is innermost.
        totals: Sum over sites of ``native``, ``by_rows``, ``fused``, ``retried``, ``materialised``, ``captured``,
            ``failed``. One attention call counts once; ``materialised`` counts operations that needed a whole matrix,
            ``failed`` steps where code of attnpatch raised an error and the model's own code was used instead.
        left_alone: Modules whose code could have been attention and whose first call was none.
        compiled: Paths of compiled modules: they run their own attention, which is not counted.
    """

    model: str
    policy: Policy | None
    sites: tuple[SiteReport, ...]
    totals: dict[str, int]
    left_alone: tuple[str, ...] = ()
    compiled: tuple[str, ...] = ()

    def __str__(self) -> str:
        # A column that is to stay empty is shown where it does not.
        shown = [name for name in TOTALS if name != "failed" or self.totals[name]]
        header = ["site", "why", *shown, "materialised by"]
        body = [
            [site.name, site.why, *(str(site.counts[name]) for name in shown), _listed(site.materialised_by)]
            for site in self.sites
        ]
        total: Counter[str] = Counter()
        for site in self.sites:
            total.update(site.materialised_by)
        body.append(["total", "", *(str(self.totals[name]) for name in shown), _listed(total)])
        widths = [max(len(row[i]) for row in [header, *body]) for i in range(len(header))]
        lines = [f"{self.model}: {self.policy or 'its components have different policies'}"]
        for row in [header, *body]:
            cells = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
            cells += [cell.rjust(width) for cell, width in zip(row[2:-1], widths[2:-1], strict=True)]
            lines.append("  ".join([*cells, row[-1]]).rstrip())
        obstacles: Counter[str] = Counter()
        for site in self.sites:
            obstacles.update(site.not_fused)
        if obstacles:
            lines.append(f"by rows, not fused, because of: {_listed(obstacles)}")
        summed: Counter[str] = Counter()
        for site in self.sites:
            summed.update(site.summed_by)
        if summed:
            lines.append(f"block mass beside fused attention: {_listed(summed)}")
        unseen = [site.name for site in self.sites if site.unseen]
        if unseen:
            names = ", ".join(unseen[:4]) + (f", ... {len(unseen)} in all" if len(unseen) > 4 else "")
            lines.append(
                "left as it is, since its attention is no function of torch (a kernel of flash-attn, sage or xformers, "
                f"FlexAttention) or it had none: {names}"
            )
        if self.left_alone:
            lines.append(f"looked at, no attention, left alone: {', '.join(self.left_alone)}")
        if self.compiled:
            names = ", ".join(name or "the model" for name in self.compiled[:4])
            names += f", ... {len(self.compiled)} in all" if len(self.compiled) > 4 else ""
            lines.append(f"compiled, so that its attention is its own and not counted: {names}")
        return "\n".join(lines)

    __repr__ = __str__


def _is_inside(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(outer + "."))


def _listed(operations: dict[str, int]) -> str:
    return ", ".join(f"{name} x{count}" for name, count in operations.items())


def report_of(patch: Patch) -> Report:
    """The report of a patch."""
    sites = []
    names = [site.name for site in patch.sites if site.is_attention and not site.is_candidate]
    for site in patch.sites:
        inner = [other for other in patch.sites if other.name in names and _is_inside(other.name, site.name)]
        did = any(site.counts[name] for name in TOTALS if name != "native")
        # A wrapper's native call is its inner site's, unless nothing reached that one (torch's nested tensors).
        alone = site.counts["native"] and not any(other.counts.total() for other in inner)
        # Masks are the model's.
        masks = (
            site.is_entry
            and not site.is_attention
            and (site.counts["materialised"] or site.counts["retried"])
        )
        if (
            site.counts["failed"]
            or masks
            or (site.is_attention and not site.is_candidate and (did or not inner or alone))
        ):
            counts = {name: site.counts[name] for name in TOTALS}
            why = site.why or ("masks" if site.is_entry else "")
            sites.append(
                SiteReport(
                    site.name or "(model)", site.kind, why, counts, dict(site.operations), site.unseen,
                    dict(site.obstacles), dict(site.sums),
                )
            )  # fmt: skip
    totals = {name: sum(site.counts[name] for site in sites) for name in TOTALS}
    left_alone = tuple(patch.left_alone)
    return Report(patch.model_kind, patch.policy, tuple(sites), totals, left_alone)


def joined(model: str, reports: dict[str, Report]) -> Report:
    """The reports of a pipeline's components as one.

    Args:
        model: Class of the pipeline.
        reports: By name of the component.
    """
    sites = tuple(
        dataclasses.replace(site, name=name if site.name == "(model)" else f"{name}.{site.name}")
        for name, report in reports.items()
        for site in report.sites
    )
    policies = {report.policy for report in reports.values()}
    totals = {name: sum(report.totals[name] for report in reports.values()) for name in TOTALS}
    left_alone = tuple(f"{name}.{path}" for name, report in reports.items() for path in report.left_alone)
    return Report(model, policies.pop() if len(policies) == 1 else None, sites, totals, left_alone)
