"""The contract between running by rows and recording: what an observer of attention is shown, and what it is told of a call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from attnpatch.sdpa_call import SdpaCall

# Who follows tokens on either side knows that functions whose names begin so make memory for something: of whatever tensor
# it has the shape, it holds none of its tokens.
MAKING = tuple("zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_".split())
# The keys that an attention is open to; see ``Observer.begin``.
Opened = Callable[[int | None], torch.Tensor | None]


@dataclasses.dataclass(frozen=True)
class TileInfo:
    """Where a tile of probabilities belongs.

    Attributes:
        leads: int64 ``[leads]``, which of the flattened batch x heads the tile holds.
        rows: First and one past the last of its query rows.
        lead_count: How many leads the call has in all.
        q_len, kv_len: Query rows and keys of the call.
        weights: Float ``[leads, rows]``, a factor that each row still has to be multiplied by; ``None``: 1.
        positions: int64, the query rows of the tile where they are no neighbours; ``rows`` counts among those shown.
    """

    leads: torch.Tensor
    rows: tuple[int, int]
    lead_count: int
    q_len: int
    kv_len: int
    weights: torch.Tensor | None = None
    positions: torch.Tensor | None = None


class Observer:
    """Who looks at attention probabilities while they pass by.

    Of one attention ``begin`` comes first; then ``take``, where a fused kernel serves it, or ``observe`` for every tile;
    then ``end``. ``restart`` begins the tiles again. A call of a site may hold several; ``finish`` comes after the last.

    Attributes:
        is_of_gradient: Whether to show each probability times its gradient instead, in the backward pass.
    """

    is_of_gradient: bool = False

    def observe(self, probabilities: torch.Tensor, passing: TileInfo) -> None:
        """One tile: ``[leads, rows, kv_len]``, after softmax, before dropout.

        Keys that no row of the tile may look at can be left out at the end.
        """
        raise NotImplementedError

    def take(self, call: SdpaCall, lse: torch.Tensor, workspace: int | None) -> str | None:
        """See a whole SDPA call at once, given it and its ``[batch, heads, q_len]`` logsumexp.

        ``workspace``: bytes that may be held meanwhile; ``None``: as many as it takes.

        Returns:
            ``None`` if nothing of it needs to be shown any more; otherwise why, in a few words.
        """
        raise NotImplementedError

    def rows(self, lead_count: int, q_len: int, kv_len: int) -> torch.Tensor | None:
        """Query rows that need to be shown, int64, ascending; ``None``: all. More may be."""
        return None

    def begin(self, layout: Layout, opened: Opened) -> bool:
        """An attention of the site is about to be shown, or would be; whether it is to be.

        Args:
            layout: What its dimensions are.
            opened: From the place of the first query among the keys (``None``: they are others' tokens) to bool
                ``[batch, kv_len]``, the keys that attention is open to; ``None``: to all; empty: that is not known.
        """
        raise NotImplementedError

    def restart(self) -> None:
        """Forget the tiles of this attention: it ran out of memory and begins again."""

    def end(self) -> None:
        """All tiles of this attention were shown."""

    def finish(self) -> None:
        """The call has ended."""


class NullObserver(Observer):
    """Stands for an observer that has seen this call already."""

    def observe(self, probabilities: torch.Tensor, passing: TileInfo) -> None:
        pass

    def take(self, call: SdpaCall, lse: torch.Tensor, workspace: int | None) -> str:
        return "seen before"

    def rows(self, lead_count: int, q_len: int, kv_len: int) -> torch.Tensor:
        return torch.zeros(0, dtype=torch.int64)

    def begin(self, layout: Layout, opened: Opened) -> bool:
        return False


INPUT, KEPT, SLOTS = "input", "kept", "slots"


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens that lie together on one side.

    Attributes:
        kind: ``"input"``: all tokens of an input of the module, in their order; ``"kept"``: what the module had before
            (a cache, learned tokens); ``"slots"``: a memory of fixed size that holds tokens of an input.
        number: Of the input.
        length: How many.
    """

    kind: str
    number: int
    length: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """What one attention looks like.

    Attributes:
        batch, heads: Sequences, and heads of each.
        q_len, kv_len: Query tokens and keys of a sequence.
        queries, keys: What they are, in order.
        numbers: int64, for each of the flattened leading indices ``sequence * heads + head``; ``None``: it is that.
        head_rows: Which of the dimensions of queries are heads in fact: they come after the leading ones.
        why_not: What is not known, in words; empty: all that a map rests on is.
        drops_keys: Whether softmax ran over more than these keys, and the rest has no value (a sink).
        is_mixed: Whether the weights are no longer what softmax gave (mixed over heads, differences of two).
    """

    batch: int
    heads: int
    q_len: int
    kv_len: int
    queries: tuple[Piece, ...] = ()
    keys: tuple[Piece, ...] = ()
    numbers: torch.Tensor | None = None
    head_rows: tuple[int, ...] = ()
    why_not: str = ""
    drops_keys: bool = False
    is_mixed: bool = False
