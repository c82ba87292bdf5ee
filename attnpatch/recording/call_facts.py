"""Determines, before an attention is summed, which tokens its queries and keys are, and which of them are padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from attnpatch.errors import AttnpatchError
from attnpatch.observing import CAPTURE_ALONE, INPUT, KEPT, SLOTS, Layout, Opened

NOT_SEEN = (
    "attnpatch did not see its probabilities: it uses a kernel outside torch, nested tensors, no softmax over keys, a "
    "single key, or scores that are not one product of a query and a key (pooled, symmetric, with keys of their own for "
    "each query); with such a kernel, choose torch's attention (attn_implementation='sdpa' in transformers)"
)

# Two tolerances for the sum of a map's rows, which should be 1. The second is for sums of the GPU kernel, which has a
# check of its own.
OFF, OFF_FUSED = 1e-4, 1e-2


# The reason for a missing map if attnpatch's own code failed in an observer.
FAILED = (
    "attnpatch failed while it observed this attention (a warning says where), so a map would lack some of it"
)


class Unknown(Exception):
    """A fact that a map depends on is not known; the message says which."""


def is_refusal(error: Exception) -> bool:
    """True if an error says why there is no map; False if attnpatch's own code is wrong."""
    return isinstance(error, (Unknown, AttnpatchError))


@dataclasses.dataclass
class AttentionCallInfo:
    """Facts about a site's call, from the arguments of the model and of the site.

    Attributes:
        query_mask, key_mask: Bool ``[batch, tokens]``: real tokens of queries and keys according to the model's
            arguments; ``None`` if they do not tell. Used to check what attention itself shows.
        past: Tokens in the cache when the model was called; ``None`` if the model was not given this cache.
        has_cache: True if the site is given a cache.
        cache: That cache.
        batches: Batch sizes that the model may have been called with; ``None``: not known.
        lengths: Numbers of tokens of the sequences that the model was called with; ``None``: there may be others.
        windows: Window lengths of the cache's sliding layers, in tokens.
        is_part: True if the site is called with some of the tokens of a longer tensor.
        is_alone: True if the user calls the site itself, so other layers may have added its tokens to the cache already.
        problem: Why the blocks of the capture do not fit this site, or ``None``.
        key_heads_of: Given the number of heads, returns the number of heads of keys; ``None``: not known.
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
    is_alone: bool = False
    problem: str | None = None
    key_heads_of: Callable[[int], int | None] = lambda _: None


@dataclasses.dataclass
class Relation:
    """Which tokens the keys of an attention are.

    Attributes:
        is_cross: True if they belong to another sequence (cross-attention).
        past: Number of tokens of the sequence before the first query.
        first: Position of the first key in its sequence; above 0 if a sliding cache has dropped earlier ones.
        own: Index among the keys of the first query's own key; ``None`` if there is none.
        tokens: Number of keys that are tokens; later keys are the module's own, or empty slots of a cache.
    """

    is_cross: bool
    past: int
    first: int
    own: int | None
    tokens: int


def relation_of(layout: Layout, facts: AttentionCallInfo, before: int | None) -> Relation:
    """Determine which tokens the keys are.

    Args:
        layout: The layout of the attention.
        facts: The facts of the call.
        before: Number of keys in the site's previous call, if those belonged to another sequence; otherwise ``None``.

    Raises:
        Unknown: It cannot be determined.
    """
    queries, keys = list(layout.queries), list(layout.keys)
    # Drop keys that the module itself appends after the tokens (a learned key, zeros).
    while len(keys) > 1 and keys[-1].kind == KEPT:
        keys.pop()
    tokens = sum(piece.length for piece in keys)
    if keys == queries:
        # This includes a layer that attends only to the new tokens although the model has a cache.
        past = facts.past or 0
        if facts.is_alone and past:
            raise Unknown(
                f"it is called alone, with a cache that counts {past} tokens, and none of them is among its keys, so it is not "
                "known which tokens it has; capture all layers, or call the whole model"
            )
        return Relation(False, past, past, 0, tokens)
    if all(piece.kind == KEPT for piece in keys):
        keys = [dataclasses.replace(keys[0], length=tokens)]
    count = len(queries)
    if keys[-count:] == queries and all(piece.kind == KEPT for piece in keys[:-count]):
        kept = sum(piece.length for piece in keys[:-count])
        if not facts.has_cache:
            raise Unknown(
                f"the module keeps its first {kept} keys itself (a cache of its own, or learned tokens)"
            )
        if facts.past is None and kept:
            raise Unknown(
                f"its first {kept} keys come from a cache that the model fills during its call, so it is not known which "
                "tokens they are"
            )
        past = facts.past or 0
        if kept > past:
            raise Unknown(
                f"its first {kept} keys are older tokens, but its cache held {past} before the call"
            )
        if kept < past and kept not in facts.windows:
            raise Unknown(evicted(kept, past))
        return Relation(False, past, past - kept, kept, tokens)
    if len(keys) == 1:
        return _of_one(layout, facts, before, queries, keys[0])
    kinds = (
        "tokens of several inputs"
        if KEPT not in {k.kind for k in keys}
        else "tokens and keys that the module keeps"
    )
    raise Unknown(f"its keys are {kinds}, but blocks describe one sequence")


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
            # The sliding window has moved: the cache holds the latest tokens.
            return Relation(
                False, past, past + layout.q_len - key.length, key.length - layout.q_len, key.length
            )
        if not facts.has_cache or past + layout.q_len > key.length:
            raise Unknown(
                "its keys lie in a buffer of fixed size that the module keeps, and it is not known which tokens they are"
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
        # There are as many keys as the cache counts, so they are its tokens, even if a kernel that cannot be followed
        # has made them.
        return Relation(False, facts.past, 0, facts.past, key.length)
    if facts.has_cache and before == key.length:
        return Relation(True, facts.past or 0, 0, None, key.length)
    raise Unknown(f"its {key.length} keys come from an operation that attnpatch cannot follow")


def evicted(kept: int, total: int) -> str:
    """The reason to leave a site out if it is not known which tokens its cache keeps."""
    return (
        f"its cache keeps {kept} of {total} tokens and is no sliding window, so it is not known which tokens were evicted, "
        "compressed or overwritten; capture with a cache that keeps all tokens"
    )


def check_sums(sums: torch.Tensor, expected: torch.Tensor, off: float, may_lack: bool) -> None:
    """Check that every row of a map sums to 1.

    Args:
        sums: ``[..., rows, keys]``, summed over the query tokens of a row.
        expected: ``[..., rows]``: the expected total of each row; 0 if the row is empty.
        off: The tolerance.
        may_lack: True if a row may sum to less: some tokens see no key, or keys are dropped.

    Raises:
        Unknown: Some row does not sum to 1.
    """
    totals = sums.sum(-1) / expected.clamp(min=1)
    totals = totals[(expected > 0).expand_as(totals)]
    lacks = not may_lack and bool((totals < 1 - off).any())
    if lacks or not bool((totals <= 1 + off).all()):
        raise Unknown(
            f"its rows sum to {float(totals.min()):.4g} to {float(totals.max()):.4g} instead of 1: they are no "
            "attention probabilities, or some rows attend to no key"
        )


def real_tokens(
    relation: Relation,
    layout: Layout,
    facts: AttentionCallInfo,
    opened: Opened,
    known: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens are real: bool ``[batch, tokens]`` for the queries' sequence and for the keys'.

    A token is padding if attention itself never sees it. The padding mask among the model's arguments is compared with
    that.

    Args:
        relation: Which tokens the keys are.
        layout: The layout of the attention.
        facts: The facts of the call.
        opened: Returns the keys that attention sees.
        known: Which of the earlier tokens are real; ``None``: not known.

    Raises:
        Unknown: The model's arguments and its attention contradict each other.
    """
    batch, total = layout.batch, relation.past + layout.q_len
    check_batch(batch, facts)
    check_length(layout.q_len, total, facts.lengths)
    seen = opened(relation.own)
    if seen is not None and not seen.numel():
        # The softmax is hand-written: only the model's arguments tell which tokens are real.
        seen = None
        said = facts.key_mask if relation.is_cross else said_of(facts.query_mask, batch, total)
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
        compare(keys, facts.key_mask, "keys")
        queries = said_of(facts.query_mask, batch, total)
        return torch.ones(batch, total, dtype=torch.bool) if queries is None else queries, keys
    assert relation.own is not None
    own = torch.ones(batch, layout.q_len, dtype=torch.bool)
    if seen is not None:
        own = seen[:, relation.own : relation.own + layout.q_len]
        if bool(seen[:, relation.tokens :].any()) and layout.keys[-1].kind == SLOTS:
            raise Unknown("its mask opens places of its cache that hold no token yet")
    said = said_of(facts.query_mask, batch, total)
    earlier = known if known is not None and known.shape == (batch, relation.past) else None
    if earlier is None:
        earlier = (
            torch.ones(batch, relation.past, dtype=torch.bool) if said is None else said[:, : relation.past]
        )
    found = torch.cat([earlier, own], 1)
    # Earlier tokens are not compared: a prepared mask does not tell which of them are real.
    compare(own, None if said is None else said[:, relation.past :], "tokens")
    return found, found


def check_batch(batch: int, facts: AttentionCallInfo) -> None:
    """Raise ``Unknown`` unless a site is called with as many sequences as the model may have."""
    if facts.batches is not None and batch not in facts.batches:
        raise Unknown(
            f"it is called with {batch} sequences and the model with {', '.join(map(str, sorted(facts.batches)))}, so they "
            f"may be windows, or rows of an image{CAPTURE_ALONE}"
        )


def check_length(q_len: int, total: int, lengths: frozenset[int] | None) -> None:
    """Check that the queries are as many as the model's tokens, or as those of two of its inputs joined.

    Raises:
        Unknown: They are not.
    """
    if lengths is None or q_len in lengths or total in lengths:
        return
    if any(a + b in (q_len, total) for a in lengths for b in lengths if a != b):
        return
    given = ", ".join(map(str, sorted(lengths)))
    raise Unknown(
        f"its sequence has {total} tokens and the model was given {given}: the model pools tokens, or adds "
        f"some{CAPTURE_ALONE}"
    )


def said_of(mask: torch.Tensor | None, batch: int, total: int) -> torch.Tensor | None:
    """A padding mask among the model's arguments, if it is one of these sequences."""
    return mask if mask is not None and mask.shape == (batch, total) else None


def compare(found: torch.Tensor, said: torch.Tensor | None, what: str) -> None:
    """Raise ``Unknown`` if attention itself and the model's arguments disagree on which tokens are padding."""
    if said is None or said.shape != found.shape or torch.equal(found, said):
        return
    count = int((found != said).sum())
    raise Unknown(
        f"its mask and the model's padding mask contradict each other on {count} of {found.numel()} {what}, so it is not "
        "known which are padding"
    )
