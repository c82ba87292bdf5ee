"""Collects block sums while a model runs, and makes block maps of them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attnpatch.capture.block_map import BlockMap
from attnpatch.capture.blocks import Blocks
from attnpatch.capture.measures import Measures, checked_measures
from attnpatch.capture.observer import HostCall, Record, SiteFacts, SiteObserver
from attnpatch.errors import CaptureError

Heads = str | Sequence[int]


def pattern_of(names: Sequence[str]) -> dict[str, tuple[str, int]]:
    """The group of each site and its place in it.

    Sites of one kind differ in their layer number only: ``model.layers.3.self_attn`` is number 3 of
    ``model.layers.*.self_attn``. The first number of a path is taken for the layer's; others only where they vary.
    """
    loose: dict[str, list[str]] = {}
    for name in names:
        loose.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    found: dict[str, tuple[str, int]] = {}
    for members in loose.values():
        numbers = [re.findall(r"\d+", name) for name in members]
        varies = [i == 0 or len(set(column)) > 1 for i, column in enumerate(zip(*numbers, strict=True))]
        for place, name in enumerate(members):
            parts = re.split(r"(\d+)", name)
            parts[1::2] = ["*" if star else number for star, number in zip(varies, parts[1::2], strict=True)]
            found[name] = ("".join(parts), place)
    return found


class Recorder:
    """Holds what a capture asked for and what it has seen.

    Args:
        blocks: Blocks of queries and keys, or a pair of them.
        heads: ``"mean"``, ``"all"`` or head numbers.
        layers: Positions within a group of like sites, negative from the end; ``None``: all.
        sites: Pattern (``fnmatch``) of site names to capture; ``None``: all.
        names: The attention sites, in order.
        read_call: Makes a ``HostCall`` of arguments, of the whole model or of a part of it.
        site_call: Says what is known of a call of a site.
        model_name: For the metadata.
        measures: What else to measure, of ``MEASURES``.
        sample_rows: Look at so many query rows of each block; ``None``: at all of them.
        seed: Of the sample.

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
        self.sample_rows, self.seed = sample_rows, seed
        self.places = pattern_of(names)
        self.wanted = self._chosen(names, layers, sites)
        self.read_call, self.site_call, self.model_name = read_call, site_call, model_name
        self.call: HostCall | None = None
        self.last: HostCall | None = None
        self.sequences: list[dict[str, Record]] = []
        # Whether the last sequence has only been seen by a part of the model, as generate() runs an encoder first.
        self.is_partial = False

    def _chosen(self, names: Sequence[str], layers: Sequence[int] | None, sites: str | None) -> set[str]:
        matching = [name for name in names if sites is None or fnmatch.fnmatchcase(name, sites)]
        if not matching:
            groups = sorted({group for group, _ in self.places.values()})
            raise CaptureError(f"no attention site matches {sites!r}; there are: {', '.join(groups)}")
        if layers is None:
            return set(matching)
        if isinstance(layers, int) or not all(isinstance(layer, int) for layer in layers):
            raise CaptureError(
                f"layers={layers!r} is not accepted; give a list of numbers such as [0, -1], or None"
            )
        sizes: dict[str, int] = {}
        for name in matching:
            sizes[self.places[name][0]] = sizes.get(self.places[name][0], 0) + 1
        most = max(sizes.values())
        outside = [layer for layer in layers if not -most <= layer < most]
        if outside or not layers:
            raise CaptureError(
                f"layers={list(layers)!r}: there are {most} layers; give numbers from {-most} to {most - 1}"
            )
        return {
            name
            for name in matching
            for group, place in [self.places[name]]
            if any(layer % sizes[group] == place for layer in layers if -sizes[group] <= layer < sizes[group])
        }

    def begin_call(self, args: Any, kwargs: Any) -> None:
        """A model is about to run: what follows belongs to a new sequence unless it continues a cache."""
        before, self.call = self.last, self.read_call(args, kwargs, True)
        goes_on = self.goes_on(self.call)
        self.last = self.call
        if not self.sequences or not (goes_on or self.is_partial):
            self.sequences.append({})
        elif goes_on:
            self.call.go_on(before)
        self.is_partial = False

    def goes_on(self, call: HostCall) -> bool:
        """Whether a call of the model continues the last sequence."""
        return self.last is not None and call.continues(self.last)

    def end_call(self) -> None:
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
                self.sequences.append({})
        facts = self.site_call(call, site.name, args, kwargs)
        return SiteObserver(self, site.name, call, facts, self.sequences[-1])

    def maps(self, sequence: int = -1) -> dict[str, BlockMap]:
        """Block maps of one captured sequence, by group of like sites.

        Raises:
            CaptureError: Nothing was captured.
        """
        kept = [records for records in self.sequences if records]
        if not kept:
            raise CaptureError(
                "nothing was captured: call the model inside the with block, and see attnpatch.report(model) for "
                "what its attention sites did"
            )
        groups: dict[str, list[str]] = {}
        for name in kept[sequence]:
            groups.setdefault(self.places[name][0], []).append(name)
        return {
            group: self._map(group, [kept[sequence][n] for n in names], names)
            for group, names in groups.items()
        }

    def _map(self, group: str, records: list[Record], names: list[str]) -> BlockMap:
        first = records[0]
        if any(record.sums.shape != first.sums.shape for record in records):
            raise CaptureError(
                f"layers of {group} differ in heads or blocks and do not fit one map; capture them one by one with "
                "layers=[...]"
            )
        shares = [
            (1 if self.heads != "mean" else record.num_heads) * record.counts.clamp(min=1)[:, None, :, None]
            for record in records
        ]
        mass = [record.sums[..., :-1] / share for record, share in zip(records, shares, strict=True)]
        error = None
        if self.sample_rows is not None:
            both = zip(records, shares, strict=True)
            error = self._stacked([record.variance[..., :-1].sqrt() / share for record, share in both])
        mass = self._stacked(mass)
        one = mass.shape[0] == 1
        # Asked for and not seen: attention that no door serves (nested tensors, a kernel of its own).
        missing = sorted(n for n in self.wanted if self.places[n][0] == group and n not in names)
        return BlockMap(
            mass=mass[0] if one else mass,
            layers=[self.places[name][1] for name in names],
            query_labels=first.query.labels[0] if one else first.query.labels,
            key_labels=first.key.labels[0] if one else first.key.labels,
            query_sizes=first.counts[0].long() if one else first.counts.long(),
            key_sizes=first.key.sizes[0] if one else first.key.sizes,
            heads="mean" if self.heads == "mean" else self.head_numbers(first.num_heads),
            error=error[0] if one and error is not None else error,
            metadata={
                "model": self.model_name,
                "sites": group,
                **({} if self.sample_rows is None else {"sample_rows": self.sample_rows, "seed": self.seed}),
                "tokens": int(first.key.assignment.shape[1]),
                **({"not_captured": missing} if missing else {}),
            },
        )

    def _stacked(self, layers: list[torch.Tensor]) -> torch.Tensor:
        values = torch.stack(layers, 1).float()
        return values.squeeze(2) if self.heads == "mean" else values

    def measured(self, sequence: int = -1) -> dict[str, dict[str, torch.Tensor]]:
        """What else was measured of one captured sequence, by group of like sites and by name; see ``Maps.measured``."""
        kept = [records for records in self.sequences if records]
        groups: dict[str, list[Measures]] = {}
        heads: dict[str, int] = {}
        for name, record in kept[sequence].items() if kept else ():
            if record.measures is not None:
                groups.setdefault(self.places[name][0], []).append(record.measures)
                heads[self.places[name][0]] = record.num_heads
        found: dict[str, dict[str, torch.Tensor]] = {}
        for group, each in groups.items():
            rows = torch.stack([one.rows for one in each], 1).clamp(min=1)[..., None]
            values = {
                "received": torch.stack([one.received for one in each], 1) / heads[group],
                "entropy": torch.stack([one.entropy for one in each], 1) / rows,
                "sink": torch.stack([one.sink for one in each], 1) / rows,
            }
            one = rows.shape[0] == 1
            found[group] = {n: (values[n][0] if one else values[n]).float() for n in self.measures}
        return found

    def head_numbers(self, num_heads: int) -> list[int]:
        """The heads that are kept apart.

        Raises:
            CaptureError: One was asked for that there is not.
        """
        return chosen_heads(self.heads, num_heads)


def chosen_heads(heads: Heads, num_heads: int) -> list[int]:
    """The heads that are kept apart.

    Raises:
        CaptureError: One was asked for that there is not.
    """
    if heads == "all":
        return list(range(num_heads))
    assert not isinstance(heads, str)
    outside = [head for head in heads if not -num_heads <= head < num_heads]
    if outside:
        raise CaptureError(
            f"heads={list(heads)!r}: there are {num_heads} heads; give numbers below {num_heads}"
        )
    return [head % num_heads for head in heads]


def checked_heads(heads: Any) -> Heads:
    """``"mean"``, ``"all"`` or a list of numbers.

    Raises:
        CaptureError: It is something else.
    """
    if isinstance(heads, str) and heads in ("mean", "all"):
        return heads
    numbers = isinstance(heads, (list, tuple)) and heads and all(type(head) is int for head in heads)
    if not numbers:
        raise CaptureError(
            f"heads={heads!r} is not accepted; give 'mean', 'all' or a list of numbers such as [0, 3]"
        )
    return list(heads)
