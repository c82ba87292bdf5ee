"""The interface between running by rows and recording: ``Observer``, and what it receives about each attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from attnpatch.sdpa_call import SdpaCall

# Functions whose names begin like this allocate a new tensor. The tensor may have the shape of a tensor of tokens, but
# it holds no tokens; code that follows tokens through torch functions relies on that.
MAKING = tuple("zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_".split())
# The way out if a module's tokens are not known to be those of the model.
CAPTURE_ALONE = (
    "; attnpatch.capture(this module) maps the tokens that it is given, in the order in which it gets them"
)
# A function that returns the keys an attention may reach; see ``Observer.begin``.
Opened = Callable[[int | None], torch.Tensor | None]


@dataclasses.dataclass(frozen=True)
class TileInfo:
    """Which rows and heads of a call a tile of probabilities holds.

    Attributes:
        leads: int64 ``[leads]``, the tile's indices into the flattened batch x heads.
        rows: The first of its query rows, and one past the last.
        lead_count: Number of leads of the call.
        q_len, kv_len: Number of query rows and of keys of the call.
        weights: Float ``[leads, rows]``, a factor that each row must still be multiplied by; ``None``: 1.
        positions: int64, the query rows of the tile if they are not contiguous; ``rows`` then counts the rows shown.
    """

    leads: torch.Tensor
    rows: tuple[int, int]
    lead_count: int
    q_len: int
    kv_len: int
    weights: torch.Tensor | None = None
    positions: torch.Tensor | None = None


class Observer:
    """Receives the attention probabilities of one site's call while they are computed.

    For each attention, ``begin`` is called first; then ``take`` if a fused kernel serves it, otherwise ``observe`` for
    every tile; then ``end``. ``restart`` means that the tiles begin again. A site's call may contain several
    attentions; ``finish`` is called after the last one.

    Attributes:
        is_of_gradient: True if the observer wants, in the backward pass, each probability times its gradient instead of
            the probability.
    """

    is_of_gradient: bool = False

    def observe(self, probabilities: torch.Tensor, passing: TileInfo) -> None:
        """Receive one tile, ``[leads, rows, kv_len]``, after softmax and before dropout.

        The last keys may be missing if no row of the tile may attend to them.
        """
        raise NotImplementedError

    def take(self, call: SdpaCall, lse: torch.Tensor, workspace: int | None) -> str | None:
        """Receive a whole SDPA call at once.

        Args:
            call: Its arguments.
            lse: ``[batch, heads, q_len]``, its logsumexp.
            workspace: Bytes that may be held meanwhile; ``None``: no limit.

        Returns:
            ``None`` if the observer is done with the call; otherwise a few words that say why it needs the tiles.
        """
        raise NotImplementedError

    def rows(self, lead_count: int, q_len: int, kv_len: int) -> torch.Tensor | None:
        """The query rows that the observer needs, int64, ascending; ``None``: all. It may be shown more."""
        return None

    def begin(self, layout: Layout, opened: Opened) -> bool:
        """Decide whether the next attention of the site is shown.

        Args:
            layout: What the dimensions of the attention are.
            opened: Returns the keys that attention may reach, bool ``[batch, kv_len]``; ``None`` if it may reach all;
                an empty tensor if that is not known. Its argument is the position of the first query among the keys, or
                ``None`` if queries and keys are different tokens.

        Returns:
            Whether to show it.
        """
        raise NotImplementedError

    def cannot_show(self, reason: str) -> None:
        """An attention of the site cannot be shown; ``reason`` says why."""

    def restart(self) -> None:
        """Discard the tiles of this attention: it ran out of memory and starts again."""

    def end(self) -> None:
        """All tiles of this attention were shown."""

    def finish(self) -> None:
        """The call has ended."""


class NullObserver(Observer):
    """Takes the place of an observer that has already seen this call; it needs nothing."""

    def observe(self, probabilities: torch.Tensor, passing: TileInfo) -> None:
        pass

    def take(self, call: SdpaCall, lse: torch.Tensor, workspace: int | None) -> str:
        return "seen before"

    def rows(self, lead_count: int, q_len: int, kv_len: int) -> torch.Tensor:
        return torch.zeros(0, dtype=torch.int64)

    def begin(self, layout: Layout, opened: Opened) -> bool:
        return False


INPUT, KEPT, SLOTS, PART = "input", "kept", "slots", "part"


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run of consecutive queries, or of consecutive keys, that come from one source.

    Attributes:
        kind: ``"input"``: all tokens of an input of the module, in order; ``"kept"``: tokens that the module had before
            the call (a cache, learned tokens); ``"slots"``: a buffer of fixed size that holds tokens of an input;
            ``"part"``: consecutive tokens of an input, which attend to each other and to no others.
        number: Index of the input.
        length: Number of tokens.
        start, of: For a part: the first token, and the number of tokens of the input.
    """

    kind: str
    number: int
    length: int
    start: int = 0
    of: int = 0


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the dimensions of one attention are.

    Attributes:
        batch, heads: Number of sequences, and of heads per sequence.
        q_len, kv_len: Query tokens and keys of a sequence.
        queries, keys: Where the query tokens and the keys come from, in order.
        numbers: int64, ``sequence * heads + head`` for each flattened leading index; ``None``: the index itself.
        head_rows: Which of the query dimensions are in fact heads; these follow the leading dimensions.
        why_not: A fact that a map would need and that is not known, in words; empty if all are known.
        drops_keys: Whether softmax ran over more keys than these, and the others have no value (a sink).
        is_mixed: Whether the weights were changed after softmax (mixed over heads, a difference of two softmaxes).
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
