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
number of renderings is that of the different texts between messages, not that of the messages. Where a template closes
the last message in another way, the opening of the assistant's next message is put behind it, other messages show how
they close and begin, or it begins a conversation alone (``attnpatch.blocks.chat.closing_patterns``). A message that is not closed
at all, because its text comes out inside the next message's, is one piece together with it.

Where no marking survives the check, each end is where the conversation cut off there ends (one rendering per
message), and a message whose text is elsewhere is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

from attnpatch.blocks.chat.closing_patterns import Closings, Special
from attnpatch.blocks.chat.message_boundaries import Ends
from attnpatch.blocks.chat.prefix_boundaries import ends_of_prefixes
from attnpatch.blocks.chat.sentinel_search import Places, locate
from attnpatch.blocks.chat.sentinels import CONTENT, Marked, Marker, came_out
from attnpatch.errors import BlockError

Render = Callable[..., str]

# Messages without text that are left out one by one to see whether the template ever looks at them.
_LEFT_OUT = 64
_UNTOLD = (
    "where the first one ends cannot be told, since the template closes it otherwise while it is the last"
)
_NO_OPENING = (
    "where the last message ends and the assistant's next one opens cannot be told with this chat template; leave "
    "add_generation_prompt out, or use Blocks.spans."
)
_BY_PREFIXES = "the template changes what it writes when messages are marked: each ends where the conversation cut off there does"


@dataclass(frozen=True)
class Segment:
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
        text: The rendering.
        pieces: Cover it from 0 to its end, or to where the opening of the assistant's next message begins.
        contents: What came out of each message's content; None where that is not known.
        notes: What the template did to messages, for people.
        opening: The opening of the assistant's next message, with which the text ends; empty where it was not asked for or
            the template has none.
    """

    text: str
    pieces: tuple[Segment, ...]
    contents: tuple[str | None, ...]
    notes: tuple[str, ...]
    opening: str = ""


def divide(
    render: Render,
    messages: Sequence[Mapping],
    also: Any = None,
    *,
    strict: bool = False,
    prompt: bool = False,
    special: Special | None = None,
) -> Division:
    """Divide a conversation's rendering among its messages.

    Args:
        render: Text of a list of messages.
        messages: The conversation, not empty.
        also: What else the template is given, by name; marks are characters that do not occur in it.
        strict: Refuse a message without text of its own, rather than join it with the next or leave it out.
        prompt: With the opening of the assistant's next message at the end.
        special: Special tokens of the tokenizer.

    Raises:
        BlockError: The template refuses the conversation, moves or repeats messages, or gives no text.
    """
    whole = partial(render, add_generation_prompt=True) if prompt else render
    if isinstance(also, Mapping) and also.get("continue_final_message"):
        # Only the last message is left open.
        render = partial(render, continue_final_message=False)
    written = Closings(render, messages, special or Special())
    try:
        text = whole(messages)
        opening = written.opening(render(messages), text) if prompt else ""
    except Exception as error:  # templates stop with jinja errors: "roles must alternate"
        raise BlockError(
            f"the chat template refuses this conversation ({error}); change it or the template."
        ) from error
    if opening is None:
        raise BlockError(_NO_OPENING)
    located = locate(whole, messages, text, Marker(messages, text, also))
    if located is None:
        ends = ends_of_prefixes(render, messages, text, len(text) - len(opening), written)
        pieces = tuple(Segment((index,), end) for index, end in enumerate(ends))
        return Division(text, pieces, (None,) * len(messages), (_BY_PREFIXES,), opening)
    marked, places = located
    if opening and any(found[-1][0] > len(text) - len(opening) for found in places.values()):
        raise BlockError(_NO_OPENING)
    work = _Work(render, whole, messages, text, len(text) - len(opening), marked, places, strict, written)
    return replace(work.divided(), opening=opening)


@dataclass
class _Work:
    """The division of one conversation while it is made."""

    render: Render
    whole: Render
    messages: Sequence[Mapping]
    text: str
    stop: int
    marked: Marked
    places: Places
    strict: bool
    written: Closings
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.placed = self.marked.placed()

    def divided(self) -> Division:
        """The pieces, with notes about all that is not one message, one piece."""
        if not self.places and any(kinds - {"blank"} for kinds in self.placed.values()):
            raise BlockError(
                "the chat template gives no text for any of these messages; use another template."
            )
        self._check_order()
        work = Ends(
            self.render, self.messages, self.text, self.stop, self.marked, self.places, self.strict, self.written
        )  # fmt: skip
        ends = work.found()
        absent = self._absent(ends)
        if self.strict:
            self._check_own_text(ends, absent, work.otherwise)
        contents = tuple(self._content(index, absent) for index in range(len(self.messages)))
        pieces: list[Segment] = []
        members: list[int] = []
        for index, end in enumerate(ends):
            if index in absent:
                continue
            members.append(index)
            if end is not None:
                pieces.append(Segment(tuple(members), end))
                members = []
        if members:  # all that follows them was left out
            pieces.append(Segment(tuple(members), self.stop))
        if not pieces:
            raise BlockError(
                "the chat template gives no text for any of these messages; use another template."
            )
        pieces[-1] = Segment(pieces[-1].messages, self.stop)
        for piece in pieces:
            if len(piece.messages) > 1:
                names = " and ".join(self._name(index) for index in piece.messages)
                first = piece.messages[0]
                why = _UNTOLD if self._is_untold(first, work.otherwise) else "the template joins them"
                self.notes.append(f"{names} are one block: {why}")
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

    def _is_untold(self, index: int, otherwise: Mapping[int, str]) -> bool:
        """Whether a message that runs on into the next one is closed somewhere between, rather than joined with it."""
        after = next((other for other in sorted(self.places) if other > index), None)
        if index not in otherwise or after is None:
            return False
        (_, base), (limit, last) = self._region(index), self._region(after)
        is_deferred = after < len(self.messages) - 1 and self.text.startswith(otherwise[index], last)
        return bool(self.written.special.tags(self.text[base:limit])) and not is_deferred

    def _check_own_text(self, ends: list[int | None], absent: set[int], otherwise: Mapping[int, str]) -> None:
        for index, end in enumerate(ends):
            lost = index not in self.places and self.placed.get(index, set()) - {"blank"}
            if index in absent or lost:
                self._refuse(index, "drops")
            if end is None and self._is_untold(index, otherwise):
                raise BlockError(
                    f"where {self._name(index)} ends cannot be told: the chat template closes it otherwise while it is the "
                    "last; use Blocks.spans."
                )
            if end is None:
                self._refuse(index, "merges")

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
            return self.whole(rest) == self.text
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
