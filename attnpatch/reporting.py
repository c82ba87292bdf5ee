"""What each attention site did: a table for people, counts for programs."""

from __future__ import annotations

import dataclasses
from collections import Counter

from attnpatch.patching.counters import TOTALS
from attnpatch.patching.patch import Patch
from attnpatch.patching.selection import RECOGNISED
from attnpatch.patching.site import Site
from attnpatch.plotting.text_table import aligned
from attnpatch.policy import Policy
from attnpatch.recording.layers import is_inside
from attnpatch.sizes import size_text


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """One attention module.

    Attributes:
        name, kind, why: Its path, its class, and the reason that it is a site.
        counts: As ``Report.totals``.
        materialised_by: How often a score matrix was materialised, by the operation and the line of code that called
            it: ``"diagonal (model.py:31)"``. The line is the innermost one outside attnpatch and torch.
        native_because: The rules that left calls native, with the numbers of the largest such call, and how often each
            rule decided; the most frequent first.
        unseen: Native calls that attnpatch was ready to serve, but in which it saw no attention.
        not_fused: How many calls ``fuse=True`` could not run with the fused kernel, by the step that prevented it.
        summed_by: How many fused calls were summed for a capture by the ``kernel``, and how many by ``torch (...)``,
            with the reason why the kernel was not used.
        kernels: How many calls a kernel outside torch computed (they count as ``fused``), by its name, and how many of
            its calls torch's functions computed instead: ``"flash_attn_func (replaced)"``.
    """

    name: str
    kind: str
    why: str
    counts: dict[str, int]
    materialised_by: dict[str, int]
    native_because: dict[str, int] = dataclasses.field(default_factory=dict)
    unseen: int = 0
    not_fused: dict[str, int] = dataclasses.field(default_factory=dict)
    summed_by: dict[str, int] = dataclasses.field(default_factory=dict)
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a patched model did since it was patched.

    Attributes:
        model: Class of the model.
        policy: The current policy; ``None`` for a pipeline whose components have different policies.
        sites: Every attention module that did something, or that contains no other attention module.
        totals: Sums over sites of ``native``, ``by_rows``, ``fused``, ``retried``, ``materialised``, ``captured``,
            ``failed``. One attention call counts once. ``materialised`` counts operations that needed a whole matrix;
            ``failed`` counts steps where attnpatch's own code raised an error and the model's code was used instead.
            ``largest`` is a maximum: the bytes of the largest tensor of query x key elements that a site made (scores,
            probabilities or a mask, whole or the rows of one step). By rows it is the size of one step. Memory inside a
            fused kernel is not included.
        left_alone: Modules whose code could be attention but whose first call was not.
        compiled: Paths of compiled modules. They run their own attention, which is not counted.
    """

    model: str
    policy: Policy | None
    sites: tuple[SiteReport, ...]
    totals: dict[str, int]
    left_alone: tuple[str, ...] = ()
    compiled: tuple[str, ...] = ()

    def __str__(self) -> str:
        # "failed" should be 0 everywhere, so its column is shown only if it is not.
        shown = [name for name in TOTALS if name != "failed" or self.totals[name]]
        header = ["site", "why", *shown, "native because", "materialised by"]
        body = [
            [
                site.name, site.why, *_numbers(site.counts, shown), _first(site.native_because),
                _listed(site.materialised_by),
            ]
            for site in self.sites
        ]  # fmt: skip
        total: Counter[str] = Counter()
        for site in self.sites:
            total.update(site.materialised_by)
        body.append(["total", "", *_numbers(self.totals, shown), "", _listed(total)])
        for empty in ("native because", "materialised by"):
            at = header.index(empty)
            if not any(row[at] for row in body):
                for row in [header, *body]:
                    del row[at]
        lines = [f"{self.model}: {self.policy or 'its components have different policies'}"]
        lines += aligned([header, *body], range(2, 2 + len(shown)))
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
        kernels: Counter[str] = Counter()
        for site in self.sites:
            kernels.update(site.kernels)
        if kernels:
            lines.append(f"kernels outside torch: {_listed(kernels)}")
        if self.left_alone:
            lines.append(f"no attention in their first call, so left alone: {', '.join(self.left_alone)}")
        if self.compiled:
            names = ", ".join(name or "the model" for name in self.compiled[:4])
            names += f", ... {len(self.compiled)} in all" if len(self.compiled) > 4 else ""
            lines.append(f"compiled, so its attention is not patched and not counted: {names}")
        return "\n".join(lines)

    __repr__ = __str__


def _numbers(counts: dict[str, int], shown: list[str]) -> list[str]:
    return [size_text(counts[name]) if name == "largest" else str(counts[name]) for name in shown]


def _first(reasons: dict[str, int]) -> str:
    """The two most frequent reasons."""
    return "; ".join(list(reasons)[:2])


def _listed(operations: dict[str, int]) -> str:
    return ", ".join(f"{name} x{count}" for name, count in operations.items())


def report_of(patch: Patch) -> Report:
    """The report of a patch."""
    known = [site for site in patch.sites if site.is_attention and not site.is_candidate]
    masks, sites = [], []
    for site in patch.sites:
        inner = [other for other in known if is_inside(other.name, site.name)]
        found = _site_report(site, any(other.is_used for other in inner))
        did = any(found.counts.values())
        if found.counts["failed"] or (site in known and (did or not inner)):
            sites.append(found)
        elif site.is_entry and site not in known and did:
            masks.append(found)
    most = max((site.counts["largest"] for site in sites), default=0)
    # Masks that were made whole because memory was enough get a row only if they are larger than every tensor of the
    # sites.
    sites = [site for site in masks if _went_otherwise(site) or site.counts["largest"] > most] + sites
    left_alone = tuple(patch.left_alone)
    return Report(
        patch.model_kind, patch.policy, tuple(sites), _totals([s.counts for s in sites]), left_alone
    )


def _went_otherwise(site: SiteReport) -> bool:
    return any(count for name, count in site.counts.items() if name != "largest")


def _site_report(site: Site, is_around: bool) -> SiteReport:
    """The report of one site; ``is_around``: whether attention modules inside it were called.

    A wrapper's calls count for the modules inside it, unless the wrapper was recognised to compute attention itself.
    """
    counts = {name: site.counts[name] for name in TOTALS} | {"largest": site.largest}
    is_own = site.is_attention and (site.why == RECOGNISED or not is_around)
    if is_own:
        counts["native"] += site.passed
    is_left = counts["native"] or counts["fused"]
    reasons = site.why_native(site.patch.policy.min_tokens) if is_left else {}
    why = site.why or ("masks" if site.is_entry and any(counts.values()) else "")
    return SiteReport(
        site.name or "(model)", site.kind, why, counts, dict(site.operations), reasons, is_own * site.reasons["unseen"],
        dict(site.obstacles), dict(site.sums), dict(site.kernels),
    )  # fmt: skip


def _totals(counts: list[dict[str, int]]) -> dict[str, int]:
    largest = max((each["largest"] for each in counts), default=0)
    return {name: sum(each[name] for each in counts) for name in TOTALS} | {"largest": largest}


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
    totals = _totals([report.totals for report in reports.values()])
    left_alone = tuple(f"{name}.{path}" for name, report in reports.items() for path in report.left_alone)
    return Report(model, policies.pop() if len(policies) == 1 else None, sites, totals, left_alone)
