"""Mean maps of many conversations, and the spread of the conversations."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from attnpatch.conversations.results_folder import SUFFIX
from attnpatch.errors import AnalysisError, AttnpatchError, in_one_line
from attnpatch.maps import io
from attnpatch.maps.block_map import BlockMap
from attnpatch.maps.fields import over_rows

By = Literal["labels", "role"]
# The label of a message's block, as ``render`` makes it.
_MESSAGE = re.compile(r"\d+ ([a-z]+)|([a-z]+) \(next\)")
_USUAL = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, eq=False)
class Merged:
    """The mean of many maps.

    Attributes:
        block_map: Mean mass. ``spread`` is the standard deviation over conversations (divided by N - 1; NaN for a
            single one). There is no standard error, even if rows were sampled in each conversation.
        merged: Number of conversations in the mean.
        left_out: Names of the conversations whose blocks, layers or heads differ from those of the largest set.
        damaged: One line ``"file: reason"`` per unreadable file.
    """

    block_map: BlockMap
    merged: int
    left_out: tuple[str, ...]
    damaged: tuple[str, ...]


def merge_folder(folder: str | Path, by: By = "labels") -> Merged:
    """The mean map of the results in a folder. Every conversation has the same weight.

    ``"labels"`` averages cell by cell, over the largest set of conversations with the same blocks; the others are left
    out. ``"role"`` averages all conversations: first the blocks of a role are pooled in each conversation, so that a
    cell is the mass that a query token of one role puts on all tokens of another role, averaged over the query tokens.
    A role's row is averaged over the conversations that have the role. If a conversation lacks a key role, its mass
    there is 0, so rows still sum to 1.

    Args:
        folder: A folder that ``analyze_all`` wrote, or any folder of block maps.
        by: ``"labels"`` or ``"role"``.

    Raises:
        AnalysisError: There is nothing to merge; or, by role, a block is not a message.
    """
    folder = Path(folder)
    if by not in ("labels", "role"):
        raise AnalysisError(f"by={by!r} is not accepted; give 'labels' or 'role'")
    if not folder.is_dir():
        raise AnalysisError(f"{folder} is not a folder; give the one that attnpatch analyze wrote")
    facts, damaged = _headers(folder)
    if not facts:
        why = f" ({damaged[0]})" if damaged else ""
        raise AnalysisError(
            f"{folder} holds no results of conversations{why}; give the folder of an analysis"
        )
    kinds = Counter(_kind(one, by) for one in facts.values())
    wanted, _ = kinds.most_common(1)[0]
    chosen = [path for path, one in facts.items() if _kind(one, by) == wanted]
    left_out = [path.stem for path, one in facts.items() if _kind(one, by) != wanted]
    if by == "role":
        block_map, read = _by_role(chosen, facts, damaged)
    else:
        block_map, read = _by_labels(chosen, damaged)
    return Merged(block_map, read, tuple(left_out), tuple(damaged))


class RunningMoments:
    """Running mean and standard deviation in float64 (Welford 1962)."""

    def __init__(self) -> None:
        self.count: Any = 0
        self.mean: Any = 0.0
        self._squares: Any = 0.0

    def add(self, value: Tensor, counts: Tensor | None = None) -> None:
        """Add one value; elements where ``counts`` is False are ignored."""
        value = value.double()
        counts = torch.ones_like(value, dtype=torch.bool) if counts is None else counts
        self.count = self.count + counts.double()
        away = torch.where(counts, value - self.mean, 0.0)
        self.mean = self.mean + away / self.count.clamp(min=1)
        self._squares = self._squares + away * torch.where(counts, value - self.mean, 0.0)

    @property
    def deviation(self) -> Tensor:
        """The standard deviation, divided by N - 1; NaN where there was only one value."""
        return torch.where(self.count > 1, self._squares / (self.count - 1), torch.nan).sqrt()


def _headers(folder: Path) -> tuple[dict[Path, Mapping[str, Any]], list[str]]:
    found: dict[Path, Mapping[str, Any]] = {}
    damaged = []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        facts = io.facts(path)
        if facts is None or "layers" not in facts:
            damaged.append(f"{path.name}: it is damaged, or not a block map")
        elif "spread" not in facts.get("metadata", {}):  # skips the result of an earlier merge
            found[path] = facts
    return found, damaged


def _kind(facts: Mapping[str, Any], by: By) -> tuple:
    """What maps must have in common to be merged."""
    same = (tuple(facts["layers"]), str(facts["heads"]), tuple(facts.get("steps", ())), _weighting(facts))
    if by == "role":
        return same
    return (*same, str(facts["query_labels"]), str(facts["key_labels"]))


def _weighting(facts: Mapping[str, Any]) -> tuple[str, str]:
    """What the numbers are: maps of different numbers, such as attention and differences, have no mean."""
    found = facts.get("metadata", {})
    return str(found.get("weighting", "probability")), str(found.get("numbers", ""))


def _loaded(paths: Iterable[Path], damaged: list[str]) -> Iterable[BlockMap]:
    for path in paths:
        try:
            yield BlockMap.load(path)
        except AttnpatchError as error:
            damaged.append(f"{path.name}: {in_one_line(error)}")


def _by_labels(paths: list[Path], damaged: list[str]) -> tuple[BlockMap, int]:
    spread, queries, keys, read = RunningMoments(), 0.0, 0.0, 0
    first = None
    for one in _loaded(paths, damaged):
        first = one if first is None else first
        # A block may have no tokens in some conversations: its row there is empty, not a row of zeros.
        spread.add(
            one.mass, over_rows(one.query_sizes > 0, one.mass[..., 0])[..., None].expand(one.mass.shape)
        )
        queries, keys, read = queries + one.query_sizes.double(), keys + one.key_sizes.double(), read + 1
    if first is None:
        raise AnalysisError(f"none of the results can be read: {damaged[0]}")
    sizes = {
        name: torch.maximum((total / read).round(), (total > 0).double()).long()
        for name, total in (("query_sizes", queries), ("key_sizes", keys))
    }
    return _made(first, spread, {"by": "labels", "sizes": "mean over conversations"}, read, **sizes), read


def _by_role(
    paths: list[Path], facts: Mapping[Path, Mapping[str, Any]], damaged: list[str]
) -> tuple[BlockMap, int]:
    roles = _roles(paths, facts)
    spread, sizes, read, having = RunningMoments(), torch.zeros(len(roles), dtype=torch.float64), 0, Counter()
    first = None
    for one in _loaded(paths, damaged):
        first = one if first is None else first
        mass, tokens = pooled(one, roles)
        has = tokens > 0
        spread.add(mass, has[:, None].expand(mass.shape))
        sizes, read = sizes + tokens, read + 1
        having.update(role for role, there in zip(roles, has.tolist(), strict=True) if there)
    if first is None:
        raise AnalysisError(f"none of the results can be read: {damaged[0]}")
    mean = (sizes / read).ceil().long()
    more = {"by": "role", "sizes": "mean over conversations", "conversations with the role": dict(having)}
    made = _made(
        first, spread, more, read, query_labels=roles, key_labels=roles, query_sizes=mean, key_sizes=mean
    )
    return made, read


def pooled(one: BlockMap, roles: list[str]) -> tuple[Tensor, Tensor]:
    """Pool the blocks of each role into one.

    Args:
        one: A map of messages.
        roles: All possible roles.

    Returns:
        ``[..., roles, roles]`` float64, the mass summed over the key blocks of a role and averaged over the query
        tokens of a role; and ``[roles]``, the tokens of each role.
    """

    def members(labels: Any) -> Tensor:
        return torch.tensor(
            [[role_of(label) == role for label in labels] for role in roles], dtype=torch.float64
        )

    queries, keys = members(one.query_labels), members(one.key_labels)
    weights = queries * one.query_sizes.double()
    tokens = weights.sum(-1)
    shares = weights / tokens.clamp(min=1)[:, None]
    return shares @ one.mass.double() @ keys.T, tokens


def role_of(label: str) -> str | None:
    """The role of a block, such as ``"system + user"`` for joined messages; None if the block is not a message."""
    found = []
    for part in label.split(" + "):
        match = _MESSAGE.fullmatch(part)
        if match is None:
            return None
        role = match[1] or match[2]
        if role not in found:
            found.append(role)
    return " + ".join(found)


def _roles(paths: list[Path], facts: Mapping[Path, Mapping[str, Any]]) -> list[str]:
    roles: set[str] = set()
    for path in paths:
        for label in (*facts[path]["query_labels"], *facts[path]["key_labels"]):
            role = role_of(label) if isinstance(label, str) else None
            if role is None:
                raise AnalysisError(
                    f"{path.name} has the block {str(label)[:40]!r}, which is not a message; merge by labels, or "
                    "analyze with --blocks messages"
                )
            roles.add(role)
    usual = {role: place for place, role in enumerate(_USUAL)}
    return sorted(roles, key=lambda role: (usual.get(role.split(" + ")[0], len(usual)), role))


def _made(
    first: BlockMap, spread: RunningMoments, more: Mapping[str, Any], read: int, **fields: Any
) -> BlockMap:
    plural = "s" * (read != 1)
    metadata = {
        "model": first.metadata.get("model"),
        "conversations": read,
        "spread": f"standard deviation over {read} conversation{plural}",
        **more,
    }
    metadata |= {name: first.metadata[name] for name in ("weighting", "numbers") if name in first.metadata}
    # The mass without normalisation, even if the first map has one, because the spread is that of the mass.
    return dataclasses.replace(
        first,
        mass=spread.mean.float(),
        spread=spread.deviation.float(),
        error=None,
        normalization="none",
        metadata=metadata,
        **fields,
    )
