"""Collects block sums while a model runs, and makes block maps of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from attnpatch.capture.block_map import BlockMap
from attnpatch.capture.blocks import Blocks
from attnpatch.capture.collected import block_map, measured, together
from attnpatch.capture.heads import Heads, checked_heads, chosen_heads
from attnpatch.capture.measures import checked_measures
from attnpatch.capture.observer import HostCall, Record, SiteFacts, SiteObserver
from attnpatch.capture.places import chosen_sites, pattern_of
from attnpatch.errors import CaptureError


class Calls(dict[str, Record]):
    """The records of one sequence by site; where calls are kept apart, those of each call instead."""

    def __init__(self) -> None:
        super().__init__()
        self.apart: list[dict[str, Record]] = []


class Recorder:
    """Holds what a capture asked for and what it has seen.

    Args:
        blocks: Blocks of queries and keys, or a pair of them.
        heads: ``"mean"``, ``"all"`` or head numbers.
        layers: Numbers of layers, as ``pattern_of`` gives them, negative from the last with attention; ``None``: all.
        sites: Pattern (``fnmatch``) of site names to capture; ``None``: all.
        names: The attention sites, in order.
        read_call: Makes a ``HostCall`` of arguments, of the whole model or of a part of it.
        site_call: Says what is known of a call of a site.
        model_name: For the metadata.
        measures: What else to measure, of ``MEASURES``.
        sample_rows: Look at so many query rows of each block; ``None``: at all of them.
        seed: Of the sample.
        weighting: ``"gradient"``: each probability times its gradient, which the backward pass shows.
        is_kept_apart: Whether the calls of a sequence are, as steps.

    Raises:
        CaptureError: No such layer, head or site, or one of the others cannot be used.
    """

    # Whether a capture that somebody asks for takes its place.
    gives_way = False

    def __init__(
        self,
        blocks: Blocks | tuple[Blocks, Blocks],
        heads: Heads,
        layers: Sequence[int] | None,
        sites: str | None,
        names: Sequence[str],
        read_call: Callable[[Any, Any, bool], HostCall],
        site_call: Callable[[HostCall, str, Any, Any], SiteFacts],
        model_name: str,
        measures: Sequence[str] = (),
        sample_rows: int | None = None,
        seed: int = 0,
        weighting: str = "probability",
        is_kept_apart: bool = False,
    ) -> None:
        pair = blocks if isinstance(blocks, tuple) else (blocks, blocks)
        if len(pair) != 2 or not all(isinstance(item, Blocks) for item in pair):
            raise CaptureError(
                f"blocks={blocks!r} is not accepted; give Blocks.fixed(128), Blocks.spans(...), "
                "Blocks.messages(...), or a pair of them for queries and keys"
            )
        self.query_blocks, self.key_blocks = pair
        self.heads, self.measures = checked_heads(heads), checked_measures(measures)
        if sample_rows is not None and (type(sample_rows) is not int or sample_rows < 1):
            raise CaptureError(
                f"sample_rows={sample_rows!r} is not accepted; give 1 or more rows per block, or None for all of them"
            )
        if weighting not in ("probability", "gradient"):
            raise CaptureError(f"weighting={weighting!r} is not accepted; give 'probability' or 'gradient'")
        self.is_kept_apart = is_kept_apart
        self.sample_rows, self.seed, self.is_of_gradient = sample_rows, seed, weighting == "gradient"
        if self.is_of_gradient and (self.measures or sample_rows is not None):
            raise CaptureError(
                "measures and sample_rows are of probabilities; leave them out with weighting='gradient'"
            )
        self.places = pattern_of(names)
        self.wanted = chosen_sites(self.places, names, layers, sites)
        self.read_call, self.site_call, self.model_name = read_call, site_call, model_name
        self.call: HostCall | None = None
        self.last: HostCall | None = None
        self.sequences: list[Calls] = []
        # Whether the last sequence has only been seen by a part of the model, as generate() runs an encoder first.
        self.is_partial = False

    def begin_call(self, args: Any, kwargs: Any) -> None:
        """A model is about to run: what follows belongs to a new sequence unless it continues a cache."""
        before, self.call = self.last, self.read_call(args, kwargs, True)
        goes_on = self.goes_on(self.call)
        self.last = self.call
        if not self.sequences or not (goes_on or self.is_partial):
            self.sequences.append(Calls())
        elif goes_on:
            self.call.go_on(before)
        if self.is_kept_apart:
            self.sequences[-1].apart.append({})
        self.is_partial = False

    def goes_on(self, call: HostCall) -> bool:
        """Whether a call of the model continues the last sequence."""
        return self.last is not None and call.continues(self.last)

    def end_call(self) -> None:
        # The backward pass may run parts of the call again (gradient checkpointing).
        if not self.is_of_gradient:
            self.call = None

    def wants(self, name: str) -> bool:
        """Whether a site was asked for."""
        return name in self.wanted

    def observer(self, site: Any, args: Any, kwargs: Any) -> SiteObserver:
        """Who looks at the call of a site that is about to be made."""
        call = self.call
        if call is None:
            self.is_partial = True
            call = self.read_call(args, kwargs, False)
            if not self.sequences or site.name in self.sequences[-1]:
                self.sequences.append(Calls())
        facts = self.site_call(call, site.name, args, kwargs)
        calls = self.sequences[-1]
        return SiteObserver(self, site.name, call, facts, calls.apart[-1] if calls.apart else calls)

    def maps(self, sequence: int = -1) -> dict[str, BlockMap]:
        """Block maps of one captured sequence, by group of like sites.

        Raises:
            CaptureError: Nothing was captured, or the sites of a group do not fit one map.
        """
        found = self._records(sequence)
        if found is None:
            raise CaptureError(
                "nothing was captured: call the model inside the with block, not compiled (a graph of torch.compile "
                "shows nothing), and see attnpatch.report(model) for what its attention sites did"
            )
        records, apart = found
        facts: dict[str, Any] = {"model": self.model_name}
        if self.is_of_gradient:
            facts["weighting"] = "gradient"
        if self.sample_rows is not None:
            facts |= {"sample_rows": self.sample_rows, "seed": self.seed}
        maps = {}
        for group, names in self._groups(records).items():
            # Asked for and not seen: attention that no door serves (nested tensors, a kernel of its own).
            missing = sorted(n for n in self.wanted if self.places[n][0] == group and n not in names)
            more = {"not_captured": missing} if missing else {}
            maps[group] = block_map(
                [records[name] for name in names],
                [[call.get(name) for name in names] for call in apart],
                layers=[self.places[name][1] for name in names],
                heads=self.heads,
                metadata={**facts, "sites": group, **more},
            )
        return maps

    def measured(self, sequence: int = -1) -> dict[str, dict[str, torch.Tensor]]:
        """What else was measured of one captured sequence, by group of like sites and by name; see ``Maps.measured``."""
        found = self._records(sequence) if self.measures else None
        if found is None:
            return {}
        groups = self._groups(found[0])
        return {
            group: measured([found[0][name] for name in names], self.measures)
            for group, names in groups.items()
        }

    @property
    def num_sequences(self) -> int:
        """How many were captured."""
        return sum(bool(calls) or any(calls.apart) for calls in self.sequences)

    def _records(self, sequence: int) -> tuple[dict[str, Record], list[dict[str, Record]]] | None:
        """The records of a captured sequence, and those of each of its calls where they were kept apart."""
        kept = [calls for calls in self.sequences if calls or any(calls.apart)]
        if not kept:
            return None
        calls = kept[sequence]
        apart = [call for call in calls.apart if call]
        return (together(apart) if apart else dict(calls)), apart

    def _groups(self, records: dict[str, Record]) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        # In the model's order: a backward pass shows the last layer first.
        order = {name: place for place, name in enumerate(self.places)}
        for name in sorted(records, key=order.__getitem__):
            groups.setdefault(self.places[name][0], []).append(name)
        return groups

    def head_numbers(self, num_heads: int) -> list[int]:
        """The heads that are kept apart.

        Raises:
            CaptureError: One was asked for that there is not.
        """
        return chosen_heads(self.heads, num_heads)
