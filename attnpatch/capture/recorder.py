"""Collects block sums while a model runs, and makes block maps of them."""

from __future__ import annotations

import bisect
import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from attnpatch.capture.block_map import BlockMap
from attnpatch.capture.blocks import Blocks, Partition
from attnpatch.capture.mass import accumulate_block_mass, add_run
from attnpatch.errors import CaptureError

Heads = str | Sequence[int]
# Blocks of fewer rows than this in a tile are summed together by one product.
_SHORT_RUN = 8


class Passing(Protocol):
    """Where a tile of probabilities belongs (``attnpatch.rows`` makes them)."""

    leads: torch.Tensor
    rows: tuple[int, int]
    lead_count: int
    q_len: int
    kv_len: int
    weights: torch.Tensor | None


class HostCall(Protocol):
    """What is known of a call of the model (``attnpatch.hosts`` reads it)."""

    batch: int
    past: int

    def go_on(self, before: Any) -> None:
        """Take over what the call before knew of the tokens in the cache."""


@dataclasses.dataclass
class SiteFacts:
    """What is known of a call of one site.

    Attributes:
        query_mask, key_mask: Bool ``[batch, tokens]``, real tokens on either side; ``None``: all.
        cross: Whether it looks at another sequence.
        tokens: Query tokens it is called with, or ``None``.
    """

    query_mask: torch.Tensor | None
    key_mask: torch.Tensor | None
    cross: bool
    tokens: int | None


@dataclasses.dataclass
class Record:
    """Sums of one site over one sequence and its continuations.

    Attributes:
        query, key: Blocks on either side.
        sums: float64 ``[batch, heads or 1, query_blocks, key_blocks + 1]``; the last column is of keys in no block.
        counts: float64 ``[batch, query_blocks]``, query tokens summed.
        num_heads: Heads that were summed into one, or kept apart.
    """

    query: Partition
    key: Partition
    sums: torch.Tensor
    counts: torch.Tensor
    num_heads: int


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

    Raises:
        CaptureError: No such layer, head or site.
    """

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
    ) -> None:
        pair = blocks if isinstance(blocks, tuple) else (blocks, blocks)
        if len(pair) != 2 or not all(isinstance(item, Blocks) for item in pair):
            raise CaptureError(
                f"blocks={blocks!r} is not accepted; give Blocks.fixed(128), Blocks.spans(...), "
                "Blocks.messages(...), or a pair of them for queries and keys"
            )
        self.query_blocks, self.key_blocks = pair
        self.heads = _checked_heads(heads)
        self.places = pattern_of(names)
        self.wanted = self._chosen(names, layers, sites)
        self.read_call, self.site_call, self.model_name = read_call, site_call, model_name
        self.call: HostCall | None = None
        self.last: HostCall | None = None
        self.sequences: list[dict[str, Record]] = []

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
        self.last = self.call
        if self.call.past == 0 or not self.sequences:
            self.sequences.append({})
        elif before is not None:
            self.call.go_on(before)

    def end_call(self) -> None:
        self.call = None

    def wants(self, name: str) -> bool:
        """Whether a site was asked for."""
        return name in self.wanted

    def observer(self, site: Any, args: Any, kwargs: Any) -> SiteObserver:
        """Who looks at the call of a site that is about to be made."""
        call = self.call
        if call is None:
            # A part of the model was called by itself (generate() calls an encoder so).
            call = self.read_call(args, kwargs, False)
            if not self.sequences or site.name in self.sequences[-1]:
                self.sequences.append({})
        return SiteObserver(self, site.name, call, self.site_call(call, site.name, args, kwargs))

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
        means = [
            record.sums[..., :-1]
            / (1 if self.heads != "mean" else record.num_heads)
            / record.counts.clamp(min=1)[:, None, :, None]
            for record in records
        ]
        mass = torch.stack(means, 1).float()
        if self.heads == "mean":
            mass = mass.squeeze(2)
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
            metadata={
                "model": self.model_name,
                "sites": group,
                "tokens": int(first.key.assignment.shape[1]),
                **({"not_captured": missing} if missing else {}),
            },
        )

    def head_numbers(self, num_heads: int) -> list[int]:
        """The heads that are kept apart.

        Raises:
            CaptureError: One was asked for that there is not.
        """
        if self.heads == "all":
            return list(range(num_heads))
        assert not isinstance(self.heads, str)
        outside = [head for head in self.heads if not -num_heads <= head < num_heads]
        if outside:
            raise CaptureError(
                f"heads={list(self.heads)!r}: there are {num_heads} heads; give numbers below {num_heads}"
            )
        return [head % num_heads for head in self.heads]


def _checked_heads(heads: Any) -> Heads:
    if isinstance(heads, str) and heads in ("mean", "all"):
        return heads
    numbers = isinstance(heads, (list, tuple)) and heads and all(type(head) is int for head in heads)
    if not numbers:
        raise CaptureError(
            f"heads={heads!r} is not accepted; give 'mean', 'all' or a list of numbers such as [0, 3]"
        )
    return list(heads)


class SiteObserver:
    """Adds the tiles of one call of one site to its record."""

    def __init__(self, recorder: Recorder, name: str, call: HostCall, facts: SiteFacts) -> None:
        self.recorder, self.name, self.call, self.facts = recorder, name, call, facts
        self.record: Record | None = None
        self.before: Record | None = None

    def observe(self, probabilities: torch.Tensor, passing: Passing) -> None:
        """Add ``[leads, rows, kv_len]`` probabilities."""
        if self.facts.tokens == 1 and passing.q_len > 1:
            probabilities, passing = _heads_as_leads(probabilities, passing)
        batch = self.call.batch
        if passing.lead_count % batch:
            raise CaptureError(
                f"{self.name} attends in {passing.lead_count} pieces, which is no multiple of the batch of {batch}: "
                "its sequence is cut into windows, which block maps over the sequence cannot show"
            )
        num_heads = passing.lead_count // batch
        if self.record is None:
            self.record = self._open(passing, num_heads)
        low, high = self.call.past + passing.rows[0], self.call.past + passing.rows[1]
        sequences, heads = passing.leads // num_heads, passing.leads % num_heads
        for b in sequences.unique().tolist():
            mine = sequences == b
            numbers = heads[mine].tolist()
            tile, weights = probabilities, passing.weights
            if len(numbers) < len(mine):
                mine = mine.to(probabilities.device)
                tile, weights = tile[mine], None if weights is None else weights[mine]
            if 0 in numbers:
                block = self.record.query.assignment[b, low:high]
                self.record.counts[b].index_add_(0, block.clamp(min=0), (block >= 0).double())
            for place, chosen in self._places(numbers, num_heads):
                some = None if weights is None else weights[chosen]
                self._add(b, place, tile[chosen], some, low, high)

    def _places(self, numbers: list[int], num_heads: int) -> Iterator[tuple[slice, slice]]:
        """Where which heads of a tile are summed: all into one, each into its own, or only those asked for."""
        if self.recorder.heads == "mean":
            yield slice(0, 1), slice(None)
        elif self.recorder.heads == "all":
            yield slice(numbers[0], numbers[-1] + 1), slice(None)
        else:
            for place, head in enumerate(self.recorder.head_numbers(num_heads)):
                if head in numbers:
                    i = numbers.index(head)
                    yield slice(place, place + 1), slice(i, i + 1)

    def _add(
        self, b: int, place: slice, tile: torch.Tensor, weights: torch.Tensor | None, low: int, high: int
    ) -> None:
        """Add ``[heads, rows, kv_len]``, the query tokens ``low:high`` of sequence ``b``."""
        assert self.record is not None
        sums, columns = self.record.sums[b, place], self._columns[b, : tile.shape[-1]]
        runs = self._runs[b]
        first = bisect.bisect_right(runs, low, key=lambda run: run[1])
        last = bisect.bisect_left(runs, high, key=lambda run: run[0])
        if (last - first) * _SHORT_RUN <= high - low:
            for start, stop, block in runs[first:last]:
                rows = slice(max(start, low) - low, min(stop, high) - low)
                add_run(sums[:, block], tile[:, rows], columns, None if weights is None else weights[:, rows])
            return
        if weights is not None:
            tile = tile * weights.unsqueeze(-1)
        query = self.record.query.assignment[b : b + 1, low:high]
        accumulate_block_mass(sums[None], tile[None], query, columns[None])

    def _open(self, passing: Passing, num_heads: int) -> Record:
        """The record of this site, grown to the length the sequence has now."""
        recorder, batch = self.recorder, self.call.batch
        total = self.call.past + passing.q_len
        query_valid = self._valid(self.facts.query_mask, total)
        query = recorder.query_blocks.resolve(query_valid)
        if self.facts.cross:
            key = recorder.key_blocks.resolve(self._valid(self.facts.key_mask, passing.kv_len))
        elif recorder.query_blocks == recorder.key_blocks:
            key = query
        else:
            key = recorder.key_blocks.resolve(query_valid)
        # A sliding cache has forgotten the first tokens, a static one has room for tokens that are not there yet.
        assignment = key.assignment[:, max(0, key.assignment.shape[1] - passing.kv_len) :]
        room = passing.kv_len - assignment.shape[1]
        # The last bin takes the keys of no block, so that none has to be left out of a sum.
        columns = torch.nn.functional.pad(assignment, (0, room), value=-1)
        self._columns = torch.where(columns < 0, key.num_blocks, columns)
        self._runs = [_runs_of(row) for row in query.assignment]
        width = 1 if recorder.heads == "mean" else len(recorder.head_numbers(num_heads))
        sums = torch.zeros(batch, width, query.num_blocks, key.num_blocks + 1, dtype=torch.float64)
        counts = torch.zeros(batch, query.num_blocks, dtype=torch.float64)
        records = recorder.sequences[-1]
        self.before = old = records.get(self.name)
        if old is not None:
            if old.sums.shape[:2] != sums.shape[:2]:
                raise CaptureError(
                    f"{self.name} went on with {batch} sequences of {width} heads after {old.sums.shape[0]} of "
                    f"{old.sums.shape[1]}; capture calls of one batch size at a time"
                )
            sums[:, :, : old.sums.shape[2], : old.sums.shape[3] - 1] = old.sums[..., :-1]
            counts[:, : old.counts.shape[1]] = old.counts
        records[self.name] = Record(query, key, sums, counts, num_heads)
        return records[self.name]

    def restart(self) -> None:
        """Forget the tiles of this call."""
        if self.record is None:
            return
        records = self.recorder.sequences[-1]
        if self.before is None:
            del records[self.name]
        else:
            records[self.name] = self.before
        self.record = None

    def _valid(self, mask: torch.Tensor | None, total: int) -> torch.Tensor:
        """Which of ``total`` positions are real tokens; all, unless a mask of that length says otherwise."""
        if mask is not None and mask.shape == (self.call.batch, total):
            return mask
        return torch.ones(self.call.batch, total, dtype=torch.bool)


def _runs_of(assignment: torch.Tensor) -> list[tuple[int, int, int]]:
    """First token, one past the last, and block of every run of neighbours in one block."""
    changes = (assignment[1:] != assignment[:-1]).nonzero().flatten() + 1
    bounds = [0, *changes.tolist(), len(assignment)]
    blocks = assignment[bounds[:-1]].tolist() if len(assignment) else []
    runs = zip(bounds[:-1], bounds[1:], blocks, strict=False)
    return [(start, stop, block) for start, stop, block in runs if block >= 0]


def _heads_as_leads(probabilities: torch.Tensor, passing: Passing) -> tuple[torch.Tensor, Passing]:
    """Undo a host's trick for decoding: with one query token it gives the query heads of a group as its rows."""
    low, high = passing.rows
    leads = (passing.leads[:, None] * passing.q_len + torch.arange(low, high)).reshape(-1)
    count = passing.lead_count * passing.q_len
    weights = None if passing.weights is None else passing.weights.reshape(-1, 1)
    changed = dataclasses.replace(
        passing, leads=leads, rows=(0, 1), lead_count=count, q_len=1, weights=weights
    )  # type: ignore[type-var]
    return probabilities.reshape(len(leads), 1, -1), changed


class Maps:
    """Block maps of a capture: filled while the model runs, read afterwards."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    @property
    def block_map(self) -> BlockMap:
        """The block map of the last sequence, where all captured sites are of one kind.

        Raises:
            CaptureError: Nothing was captured, or there are several kinds (``maps["decoder.*"]`` names one).
        """
        found = self._recorder.maps()
        if len(found) > 1:
            raise CaptureError(
                f"several kinds of attention were captured; choose one: maps[{'] or maps['.join(map(repr, found))}]"
            )
        return next(iter(found.values()))

    def __getitem__(self, sites: str) -> BlockMap:
        """The block map of one kind of site, by its pattern as ``maps.keys()`` gives it."""
        found = self._recorder.maps()
        if sites not in found:
            raise CaptureError(f"nothing was captured at {sites!r}; there are: {', '.join(map(repr, found))}")
        return found[sites]

    def keys(self) -> list[str]:
        """Patterns of the captured sites."""
        return list(self._recorder.maps())

    @property
    def sequences(self) -> list[dict[str, BlockMap]]:
        """Block maps of every sequence that was run, by pattern, in order."""
        count = sum(bool(records) for records in self._recorder.sequences)
        return [self._recorder.maps(i) for i in range(count)]

    def __repr__(self) -> str:
        count = sum(bool(records) for records in self._recorder.sequences)
        return f"Maps({count} sequences{', ' + ', '.join(self.keys()) if count else ''})"
