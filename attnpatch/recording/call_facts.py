"""What is known of one attention before it is summed: whose tokens its queries and keys are, and which are padding."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from attnpatch.observing import INPUT, KEPT, SLOTS, Layout, Opened

NOT_SEEN = "its probabilities were not seen: a kernel of its own, nested tensors, no softmax over keys, or one key beside a learned sink"

# What the rows of a map may be off by, which should sum to 1; where a kernel of its own has summed them, which has a check
# of its own.
OFF, OFF_FUSED = 1e-4, 1e-2


class Unknown(Exception):
    """A fact that a map rests on is not known."""


@dataclasses.dataclass
class AttentionCallInfo:
    """What is known of a call of one site.

    Attributes:
        query_mask, key_mask: Bool ``[batch, tokens]``, real tokens on either side as the model's arguments name them;
            ``None``: they name none. A second opinion.
        past: Tokens that were in the cache it is handed; ``None``: it is handed none that was there before.
        has_cache: Whether it is handed one.
        cache: The one.
        batches: How many sequences the model may have been called with; ``None``: that is not known.
        lengths: Tokens of the sequences that the model was called with; ``None``: there may be others.
        windows: How many of the latest tokens the sliding layers of its cache keep.
        is_part: Whether it is called with some of the tokens of a longer tensor.
    """

    query_mask: torch.Tensor | None = None
    key_mask: torch.Tensor | None = None
    past: int | None = None
    has_cache: bool = False
    cache: Any = None
    batches: frozenset[int] | None = None
    lengths: frozenset[int] | None = None
    windows: frozenset[int] = frozenset()
    is_part: bool = False


@dataclasses.dataclass
class Relation:
    """Whose tokens the keys of an attention are.

    Attributes:
        is_cross: Whether they are another sequence's.
        past: Tokens of the sequence before the first query.
        first: Place of the first key in its sequence, which a sliding cache moves on.
        own: Place of the first query among the keys; ``None``: there is none.
        tokens: Keys that are tokens; those after them are the module's own or empty places.
    """

    is_cross: bool
    past: int
    first: int
    own: int | None
    tokens: int


def relation_of(layout: Layout, facts: AttentionCallInfo, before: int | None) -> Relation:
    """Whose tokens the keys are.

    Args:
        layout: Of the attention.
        facts: Of the call.
        before: Keys that the site had in the call before, if those were another sequence's; ``None``: it had none.

    Raises:
        Unknown: It cannot be told.
    """
    queries, keys = list(layout.queries), list(layout.keys)
    # What a module adds of its own after the tokens (a learned key, zeros).
    while len(keys) > 1 and keys[-1].kind == KEPT:
        keys.pop()
    tokens = sum(piece.length for piece in keys)
    if keys == queries:
        # Also where a layer of a model with a cache looks at the new tokens alone.
        past = facts.past or 0
        return Relation(False, past, past, 0, tokens)
    if all(piece.kind == KEPT for piece in keys):
        keys = [dataclasses.replace(keys[0], length=tokens)]
    count = len(queries)
    if keys[-count:] == queries and all(piece.kind == KEPT for piece in keys[:-count]):
        kept = sum(piece.length for piece in keys[:-count])
        if not facts.has_cache:
            raise Unknown(
                f"its keys begin with {kept} that it keeps itself (a cache of its own, learned tokens)"
            )
        if facts.past is None and kept:
            raise Unknown(
                f"its keys begin with {kept} tokens of a cache that the model fills inside its call: which tokens they are "
                "is not known"
            )
        past = facts.past or 0
        if kept > past:
            raise Unknown(f"its keys begin with {kept} tokens, its cache held {past}")
        if kept < past and kept not in facts.windows:
            raise Unknown(evicted(kept, past))
        return Relation(False, past, past - kept, kept, tokens)
    if len(keys) == 1:
        return _of_one(layout, facts, before, queries, keys[0])
    kinds = (
        "tokens of several of its inputs"
        if KEPT not in {k.kind for k in keys}
        else "joined with what it keeps"
    )
    raise Unknown(f"its keys are {kinds}, which no blocks of one sequence can name")


def _of_one(
    layout: Layout, facts: AttentionCallInfo, before: int | None, queries: list[Any], key: Any
) -> Relation:
    if key.kind == SLOTS:
        if len(queries) != 1 or key.number != queries[0].number:
            return Relation(True, facts.past or 0, 0, None, key.length)
        past = 0 if facts.past is None else facts.past
        if facts.has_cache and past + layout.q_len > key.length >= layout.q_len:
            if key.length not in facts.windows:
                raise Unknown(evicted(key.length, past + layout.q_len))
            # Its window has moved on: it holds the latest tokens.
            return Relation(
                False, past, past + layout.q_len - key.length, key.length - layout.q_len, key.length
            )
        if not facts.has_cache or past + layout.q_len > key.length:
            raise Unknown(
                "its keys lie in a memory of fixed size of its own; which tokens it holds is not known"
            )
        return Relation(False, past, 0, past, past + layout.q_len)
    if key.kind == INPUT:
        return Relation(True, facts.past or 0, 0, None, key.length)
    if (
        facts.has_cache
        and before is None
        and facts.past is not None
        and key.length == facts.past + layout.q_len
    ):
        # As many as the cache counts, made by a kernel that cannot be followed.
        return Relation(False, facts.past, 0, facts.past, key.length)
    if facts.has_cache and before == key.length:
        return Relation(True, facts.past or 0, 0, None, key.length)
    raise Unknown(f"its {key.length} keys come from where they cannot be followed")


def evicted(kept: int, total: int) -> str:
    """Why the tokens of a cache are not known."""
    return (
        f"its cache keeps {kept} of {total} tokens and is no sliding window: which tokens it keeps (evicted, compressed, "
        "written over) is not known; capture without that"
    )


def check_sums(sums: torch.Tensor, expected: torch.Tensor, off: float, may_lack: bool) -> None:
    """Every row of a map sums to 1.

    Args:
        sums: ``[..., rows, keys]``, of all query tokens of a row.
        expected: ``[..., rows]``, what they should sum to; 0: nothing was asked for.
        off: What a row may be off by.
        may_lack: Whether some of it may be missing: tokens that look at nothing, keys that are dropped.

    Raises:
        Unknown: Some row does not.
    """
    totals = sums.sum(-1) / expected.clamp(min=1)
    totals = totals[(expected > 0).expand_as(totals)]
    lacks = not may_lack and bool((totals < 1 - off).any())
    if lacks or not bool((totals <= 1 + off).all()):
        raise Unknown(
            f"its rows sum to {float(totals.min()):.4g} to {float(totals.max()):.4g}, not to 1: these are no attention "
            "probabilities, or some rows look at nothing"
        )


def real_tokens(
    relation: Relation,
    layout: Layout,
    facts: AttentionCallInfo,
    opened: Opened,
    known: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens are real: bool ``[batch, tokens]`` of the queries' sequence and of the keys'.

    Padding is what attention itself is closed to. What the model's arguments say is compared with it.

    Args:
        relation: Whose tokens the keys are.
        layout: Of the attention.
        facts: Of the call.
        opened: The keys that attention is open to.
        known: What is known of the tokens before these; ``None``: nothing.

    Raises:
        Unknown: The model's arguments and its attention contradict each other.
    """
    batch, total = layout.batch, relation.past + layout.q_len
    if facts.batches is not None and batch not in facts.batches:
        raise Unknown(
            f"it is called with {batch} sequences, the model with {', '.join(map(str, sorted(facts.batches)))}: windows, "
            "or rows of an image"
        )
    _check_length(layout.q_len, total, facts.lengths)
    seen = opened(relation.own)
    if seen is not None and not seen.numel():
        # A softmax of the host's own: what the arguments say is all there is.
        seen = None
        said = facts.key_mask if relation.is_cross else _said(facts.query_mask, batch, total)
        if said is not None and said.shape == (batch, relation.tokens if relation.is_cross else total):
            first = 0 if relation.is_cross else relation.first
            seen = torch.nn.functional.pad(
                said[:, first:], (0, layout.kv_len - said.shape[1] + first), value=False
            )
    if relation.is_cross:
        keys = (
            torch.ones(batch, relation.tokens, dtype=torch.bool)
            if seen is None
            else seen[:, : relation.tokens]
        )
        _compare(keys, facts.key_mask, "keys")
        queries = _said(facts.query_mask, batch, total)
        return torch.ones(batch, total, dtype=torch.bool) if queries is None else queries, keys
    assert relation.own is not None
    own = torch.ones(batch, layout.q_len, dtype=torch.bool)
    if seen is not None:
        own = seen[:, relation.own : relation.own + layout.q_len]
        if bool(seen[:, relation.tokens :].any()) and layout.keys[-1].kind == SLOTS:
            raise Unknown("attention is open to places of its cache that hold no token yet")
    said = _said(facts.query_mask, batch, total)
    earlier = known if known is not None and known.shape == (batch, relation.past) else None
    if earlier is None:
        earlier = (
            torch.ones(batch, relation.past, dtype=torch.bool) if said is None else said[:, : relation.past]
        )
    found = torch.cat([earlier, own], 1)
    # What a prepared mask says of earlier tokens is nothing.
    _compare(own, None if said is None else said[:, relation.past :], "tokens")
    return found, found


def _check_length(q_len: int, total: int, lengths: frozenset[int] | None) -> None:
    """Whether queries are the model's own tokens, or those of two of its inputs together."""
    if lengths is None or q_len in lengths or total in lengths:
        return
    if any(a + b in (q_len, total) for a in lengths for b in lengths if a != b):
        return
    given = ", ".join(map(str, sorted(lengths)))
    raise Unknown(
        f"its sequence has {total} tokens, the model was given {given}: pooled tokens, or some that the model adds"
    )


def _said(mask: torch.Tensor | None, batch: int, total: int) -> torch.Tensor | None:
    return mask if mask is not None and mask.shape == (batch, total) else None


def _compare(found: torch.Tensor, said: torch.Tensor | None, what: str) -> None:
    if said is None or said.shape != found.shape or torch.equal(found, said):
        return
    count = int((found != said).sum())
    raise Unknown(
        f"its mask and the model's padding mask contradict each other on {count} of {found.numel()} {what}: which are "
        "padding is not known"
    )
