"""How the text of a rendered conversation is divided among its messages.

**Method.** The whole conversation is rendered twice: as it is, and with a private-use character of its own at
the beginning and the end of every message's content, reasoning and tool arguments. Without these marks the
second text must equal the first, character for character; only then is it believed, and the places of the marks
are places of the messages. So nothing is ever searched for: a message may quote the template or another message,
and turns that the template writes differently once later ones follow (thinking kept in the last turn only) are
found where they really are. Messages that a template looks into (and then renders differently) are found by
halving and marked elsewhere, at last in their middle only.

What stands between two contents, such as ``<|im_end|>\n<|im_start|>user\n``, is the closing of one message and
the header of the next. Where the closing ends is learnt from the conversation cut off after that message: what
comes there behind the mark. The same text between messages of the same roles is divided in the same way, so the
number of renderings is that of the different texts between messages, not that of the messages. A message that is
not closed so, because its text comes out inside the next message's, is one piece together with it.

Where no marking survives the check, each end is where the conversation cut off there ends (one rendering per
message), and a message whose text is elsewhere is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from attnpatch.capture.locating import Places, locate
from attnpatch.capture.marks import CONTENT, Marked, Marker, came_out
from attnpatch.capture.prefixes import ends_of_prefixes
from attnpatch.errors import BlockError

Render = Callable[..., str]

# Messages without text that are left out one by one to see whether the template ever looks at them.
_LEFT_OUT = 64
_BY_PREFIXES = "the template changes what it writes when messages are marked: each ends where the conversation cut off there does"


class _Refused(Exception):
    """The template refuses a conversation cut off after some message."""


@dataclass(frozen=True)
class Piece:
    """A part of the text: from the end of the piece before it to ``end``, in characters.

    Attributes:
        messages: Whose it is; several where the template joins them.
    """

    messages: tuple[int, ...]
    end: int


@dataclass(frozen=True)
class Division:
    """A rendered conversation and whose its parts are.

    Attributes:
        text: The rendering, without a generation prompt.
        pieces: Cover it from 0 to its end.
        contents: What came out of each message's content; None where that is not known.
        notes: What the template did to messages, for people.
    """

    text: str
    pieces: tuple[Piece, ...]
    contents: tuple[str | None, ...]
    notes: tuple[str, ...]


def divide(
    render: Render, messages: Sequence[Mapping], also: Any = None, *, strict: bool = False
) -> Division:
    """Divide a conversation's rendering among its messages.

    Args:
        render: Text of a list of messages.
        messages: The conversation, not empty.
        also: What else the template is given; marks are characters that do not occur in it.
        strict: Refuse a message without text of its own, rather than join it with the next or leave it out.

    Raises:
        BlockError: The template refuses the conversation, moves or repeats messages, or gives no text.
    """
    try:
        text = render(messages)
    except Exception as error:  # templates stop with jinja errors: "roles must alternate"
        raise BlockError(
            f"the chat template refuses this conversation ({error}); change it or the template."
        ) from error
    located = locate(render, messages, text, Marker(messages, text, also))
    if located is None:
        ends = ends_of_prefixes(render, messages, text)
        pieces = tuple(Piece((index,), end) for index, end in enumerate(ends))
        return Division(text, pieces, (None,) * len(messages), (_BY_PREFIXES,))
    marked, places = located
    work = _Work(render, messages, text, marked, places, strict)
    return work.divided()


@dataclass(frozen=True)
class _Run:
    """Messages from one with marks in the text up to the next one with marks, and the text between these marks."""

    members: range
    located: bool
    base: int
    limit: int
    key: tuple


@dataclass
class _Work:
    """The division of one conversation while it is made."""

    render: Render
    messages: Sequence[Mapping]
    text: str
    marked: Marked
    places: Places
    strict: bool
    notes: list[str] = field(default_factory=list)
    # Ends of a run's messages, counted from its base; by the text and the roles it has.
    learnt: dict[tuple, list[int | None]] = field(default_factory=dict)
    # How messages of a role close, for templates that refuse the conversation cut off after some message.
    closings: dict[Any, set[str]] = field(default_factory=dict)
    refused: dict[tuple, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.placed = self.marked.placed()

    def divided(self) -> Division:
        """The pieces, with notes about all that is not one message, one piece."""
        if not self.places and any(kinds - {"blank"} for kinds in self.placed.values()):
            raise BlockError(
                "the chat template gives no text for any of these messages; use another template."
            )
        self._check_order()
        ends = self._ends()
        absent = self._absent(ends)
        if self.strict:
            self._check_own_text(ends, absent)
        contents = tuple(self._content(index, absent) for index in range(len(self.messages)))
        pieces: list[Piece] = []
        members: list[int] = []
        for index, end in enumerate(ends):
            if index in absent:
                continue
            members.append(index)
            if end is not None:
                pieces.append(Piece(tuple(members), end))
                members = []
        if members:  # all that follows them was left out
            pieces.append(Piece(tuple(members), len(self.text)))
        if not pieces:
            raise BlockError(
                "the chat template gives no text for any of these messages; use another template."
            )
        pieces[-1] = Piece(pieces[-1].messages, len(self.text))
        for piece in pieces:
            if len(piece.messages) > 1:
                names = " and ".join(self._name(index) for index in piece.messages)
                self.notes.append(f"{names} are one block: the template joins them")
        return Division(self.text, tuple(pieces), contents, tuple(self.notes))

    def _name(self, index: int) -> str:
        return f"message {index} ({self.messages[index].get('role', '?')})"

    def _refuse(self, index: int, does: str) -> None:
        raise BlockError(
            f"{self._name(index)} has no text of its own: the chat template {does} it; leave it out or join it with "
            "its neighbour, or use Blocks.spans."
        )

    def _region(self, index: int) -> tuple[int, int]:
        """Characters between the first and the last mark of a message."""
        found = self.places[index]
        return found[0][0], found[-1][0]

    def _check_order(self) -> None:
        for index, found in self.places.items():
            kinds = [kind for _, kind in found if kind in CONTENT]
            if len(kinds) != len(set(kinds)):
                self._refuse(index, "repeats")
        regions = [(index, *self._region(index)) for index in sorted(self.places)]
        for (one, _, last), (other, start, _) in pairwise(regions):
            if start < last:
                # The one that is out of place is the one without which the rest is in order.
                rest = [region for region in regions if region[0] != one]
                self._refuse(one if all(a[2] <= b[1] for a, b in pairwise(rest)) else other, "moves")

    def _check_own_text(self, ends: list[int | None], absent: set[int]) -> None:
        for index, end in enumerate(ends):
            lost = index not in self.places and self.placed.get(index, set()) - {"blank"}
            if index in absent or lost:
                self._refuse(index, "drops")
            if end is None:
                self._refuse(index, "merges")

    def _runs(self) -> list[_Run]:
        count, known, runs = len(self.messages), sorted(self.places), []
        roles = [message.get("role") for message in self.messages]
        for one, other in pairwise([-1, *known, count]):
            located = one >= 0
            first, kind = (one, self.places[one][-1][1]) if located else (0, "")
            base = self._region(one)[1] if located else 0
            limit = self._region(other)[0] if other < count else len(self.text)
            key = (located, kind, tuple(roles[first : other + 1]), other == count, self.text[base:limit])
            runs.append(_Run(range(first, other), located, base, limit, key))
        return runs

    def _ends(self) -> list[int | None]:
        """Where each message ends; None where it runs on into the next one."""
        ends: list[int | None] = [None] * len(self.messages)
        runs = [run for run in self._runs() if run.members]
        if runs[-1].located and len(runs[-1].members) == 1:
            self._learn_closing(runs[-1].members[0], self.text[runs[-1].base :])
        for run in runs:
            if run.key not in self.learnt:
                self.learnt[run.key] = self._ends_in(run)
        for run in runs:
            offsets = self.learnt[run.key]
            if run.key in self.refused:
                offsets = [self._closed_as_others(run), *offsets[1:]]
            for index, offset in zip(run.members, offsets, strict=True):
                ends[index] = None if offset is None else run.base + offset
        ends[-1] = len(self.text)
        return ends

    def _ends_in(self, run: _Run) -> list[int | None]:
        """Ends of a run's messages, counted from its base."""
        ends: list[int | None] = []
        last: int | None = run.base
        for index in run.members:
            if run.located and index == run.members[0]:
                end = self._closed(index, run)
            elif index == len(self.messages) - 1:
                end = len(self.text)
            else:
                end = self._end_without_marks(index, last, run.limit)
            ends.append(end)
            last = end if end is not None else last
        return [None if end is None else end - run.base for end in ends]

    def _prefix(self, count: int, messages: Sequence[Mapping]) -> str:
        try:
            return self.render(messages[:count])
        except Exception as error:  # templates stop with jinja errors: "roles must alternate"
            raise _Refused(
                f"the chat template refuses the first {count} messages alone ({error}); use Blocks.spans."
            ) from error

    def _closed(self, index: int, run: _Run) -> int | None:
        """Where a message with marks closes: as it does where the conversation is cut off after it."""
        if index == len(self.messages) - 1:
            return len(self.text)
        try:
            only = [*self.messages[:index], self.marked.messages[index]]
            prefix, places = self.marked.read(self._prefix(index + 1, only))
        except _Refused as error:
            if self.strict:
                raise BlockError(str(error)) from error
            self.refused[run.key] = str(error)
            return None
        found = [place for place, kind in places.get(index, []) if kind == self.places[index][-1][1]]
        if not found:
            return None
        closing = prefix[found[-1] :]
        end = run.base + len(closing)
        if end > run.limit or not self.text.startswith(closing, run.base):
            return None
        self._learn_closing(index, closing)
        return end

    def _learn_closing(self, index: int, closing: str) -> None:
        if closing.strip():
            self.closings.setdefault(self.messages[index].get("role"), set()).add(closing)

    def _closed_as_others(self, run: _Run) -> int | None:
        """The end of a message whose prefix is refused, if it closes as messages of its role, or of any, do."""
        role = self.messages[run.members[0]].get("role")
        known = self.closings.get(role) or {text for texts in self.closings.values() for text in texts}
        gap = self.text[run.base : run.limit]
        return max((len(closing) for closing in known if gap.startswith(closing)), default=None)

    def _end_without_marks(self, index: int, last: int, limit: int) -> int | None:
        """Where a message ends that has no text, or none in the rendering: by the text its turn adds."""
        try:
            prefix = self._prefix(index + 1, self.messages)
            if self.text.startswith(prefix) and last <= len(prefix) <= limit:
                return len(prefix)
            before = self._prefix(index, self.messages) if index else ""
        except _Refused as error:
            if self.strict:
                raise BlockError(str(error)) from error
            return None
        added = prefix[len(before) :]
        end = last + len(added)
        fits = prefix.startswith(before) and end <= limit and self.text.startswith(added, last)
        return end if fits else None

    def _absent(self, ends: list[int | None]) -> set[int]:
        """Messages of which nothing is in the text: it is the same without them."""
        absent, suspects = set(), []
        last: int | None = 0
        for index, end in enumerate(ends):
            if index not in self.places:
                if end is not None and end == last:
                    absent.add(index)
                elif index in self.placed or index == 0:
                    suspects.append(index)
            last = end
        if suspects and self._same_without({*suspects}):
            absent |= set(suspects)
        elif len(suspects) > 1:
            absent |= {index for index in suspects[:_LEFT_OUT] if self._same_without({index})}
        return absent

    def _same_without(self, indexes: set[int]) -> bool:
        rest = [message for index, message in enumerate(self.messages) if index not in indexes]
        try:
            return self.render(rest) == self.text
        except Exception:  # the template refuses what is left: it does look at them
            return False

    def _content(self, index: int, absent: set[int]) -> str:
        """What came out of a message's content; what did not is noted."""
        if index in absent:
            self.notes.append(f"{self._name(index)}: left out by the template, it has no block")
            return ""
        found = self.places.get(index, [])
        content, lost = came_out(self.messages[index], self.placed.get(index, set()), found, self.text)
        self.notes += [f"{self._name(index)}: {what} by the template" for what in lost]
        return content
