"""Divides the text of a rendered conversation among its messages.

**Method.** The whole conversation is rendered twice: as it is, and with sentinels, which are private-use characters at
the beginning and the end of every message's content, reasoning and tool arguments. If the second text without the
sentinels equals the first, character for character, then the positions of the sentinels are those of the messages.
Nothing is searched for, so a message may quote the template or another message. Some turns are written differently when
later ones follow (reasoning is kept only in the last turn); they are found where they are in the whole conversation. If
a template inspects some messages and renders them differently with sentinels, these messages are found by halving.
Their sentinels are placed elsewhere; in the end there is only one, in the middle.

The text between two contents, such as ``<|im_end|>\n<|im_start|>user\n``, is the closing of one message and the header
of the next. To find where the closing ends, the conversation is rendered up to that message: the text after the last
sentinel is the closing. The same text between messages of the same roles is divided the same way, so the number of
renderings is that of different texts, not that of messages. If the template closes the last message differently, three
other ways are tried: render the opening of the assistant's next message after it, use the closings and headers of other
messages, or render the next message alone (``attnpatch.blocks.chat.closing_patterns``). A message that is not closed at
all, because its text is inside the next message's, is joined with it.

If no placement of sentinels passes the check, the conversation is rendered up to each message (one rendering per
message), and a message whose text is outside its part is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

from attnpatch.blocks.chat.closing_patterns import Closings, Special
from attnpatch.blocks.chat.message_boundaries import Ends
from attnpatch.blocks.chat.prefix_boundaries import ends_of_prefixes
from attnpatch.blocks.chat.sentinel_search import locate
from attnpatch.blocks.chat.sentinels import CONTENT, Marker, came_out
from attnpatch.errors import BlockError

Render = Callable[..., str]

# At most this many messages without text are removed one by one, to see whether the template uses them.
_LEFT_OUT = 64
_UNTOLD = (
    "the end of the first one cannot be found, because the template closes it differently when it is the last"
)
_NO_OPENING = (
    "with this chat template, attnpatch cannot find where the last message ends and the assistant's next one opens; "
    "leave out add_generation_prompt, or use Blocks.spans."
)
_BY_PREFIXES = (
    "sentinels change what the template writes, so messages are found by rendering up to each of them"
)


@dataclass(frozen=True)
class Segment:
    """A part of the text, from the end of the previous segment to ``end``, in characters.

    Attributes:
        messages: The messages it belongs to; several if the template joins them.
        end: One past its last character.
    """

    messages: tuple[int, ...]
    end: int


@dataclass(frozen=True)
class Division:
    """A rendered conversation, divided among its messages.

    Attributes:
        text: The rendering.
        pieces: Segments that cover the text up to the opening of the assistant's next message, or to the end.
        contents: The rendered part of each message's content; None if that is not known.
        notes: What the template did to messages, in words.
        opening: The opening of the assistant's next message, at the end of the text; empty if it was not requested or
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
        render: Renders a list of messages as text.
        messages: The conversation, not empty.
        also: Other arguments of the template, by name; sentinels are characters that do not occur in them.
        strict: Refuse a message that has no text of its own, instead of joining it with the next or leaving it out.
        prompt: Add the opening of the assistant's next message at the end.
        special: The tokenizer's special tokens.

    Raises:
        BlockError: The template refuses the conversation, moves or repeats messages, or renders no text.
    """
    whole = partial(render, add_generation_prompt=True) if prompt else render
    if isinstance(also, Mapping) and also.get("continue_final_message"):
        # With this option only the conversation's last message is left open, not the last message of each rendering.
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
    stop = len(text) - len(opening)
    work = _Work(render, messages, text, stop, marked, places, strict, written, whole=whole)
    return replace(work.divided(), opening=opening)


@dataclass
class _Work(Ends):
    """Divides one conversation: finds where its messages end, and what the template did to them.

    Attributes:
        whole: Renders the conversation in the form in which it is divided, with the opening of the assistant's next
            message if that was requested.
        notes: What the template did to messages, in words.
    """

    whole: Render = field(kw_only=True)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.placed = self.marked.placed()

    def divided(self) -> Division:
        """The segments, with notes on messages that are joined, changed or left out."""
        if not self.places and any(kinds - {"blank"} for kinds in self.placed.values()):
            raise BlockError(
                "the chat template gives no text for any of these messages; use another template."
            )
        self._check_order()
        ends = self.found()
        absent = self._absent(ends)
        if self.strict:
            self._check_own_text(ends, absent)
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
        if members:  # all messages after them were left out
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
                why = _UNTOLD if self._is_untold(first) else "the template joins them"
                self.notes.append(f"{names} are one block: {why}")
        return Division(self.text, tuple(pieces), contents, tuple(self.notes))

    def _name(self, index: int) -> str:
        return f"message {index} ({self.messages[index].get('role', '?')})"

    def _refuse(self, index: int, does: str) -> None:
        raise BlockError(
            f"{self._name(index)} has no text of its own: the chat template {does} it; leave it out or join it with "
            "its neighbour, or use Blocks.spans."
        )

    def _check_order(self) -> None:
        for index, found in self.places.items():
            kinds = [kind for _, kind in found if kind in CONTENT]
            if len(kinds) != len(set(kinds)):
                self._refuse(index, "repeats")
        regions = [(index, *self._region(index)) for index in sorted(self.places)]
        for (one, _, last), (other, start, _) in pairwise(regions):
            if start < last:
                # The message out of place is the one whose removal leaves the rest in order.
                rest = [region for region in regions if region[0] != one]
                self._refuse(one if all(a[2] <= b[1] for a, b in pairwise(rest)) else other, "moves")

    def _is_untold(self, index: int) -> bool:
        """Whether a message without a known end is closed somewhere before the next one, rather than joined with it."""
        after = next((other for other in sorted(self.places) if other > index), None)
        if index not in self.otherwise or after is None:
            return False
        (_, base), (limit, last) = self._region(index), self._region(after)
        is_deferred = after < len(self.messages) - 1 and self.text.startswith(self.otherwise[index], last)
        return bool(self.written.special.tags(self.text[base:limit])) and not is_deferred

    def _check_own_text(self, ends: list[int | None], absent: set[int]) -> None:
        for index, end in enumerate(ends):
            lost = index not in self.places and self.placed.get(index, set()) - {"blank"}
            if index in absent or lost:
                self._refuse(index, "drops")
            if end is None and self._is_untold(index):
                raise BlockError(
                    f"the end of {self._name(index)} cannot be found: the chat template closes it differently when it "
                    "is the last; use Blocks.spans."
                )
            if end is None:
                self._refuse(index, "merges")

    def _absent(self, ends: list[int | None]) -> set[int]:
        """The messages that the template does not render: the text is the same without them."""
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
        except Exception:  # the template refuses the rest, so it does use them
            return False

    def _content(self, index: int, absent: set[int]) -> str:
        """The rendered part of a message's content; parts that are left out or changed are noted."""
        if index in absent:
            self.notes.append(f"{self._name(index)}: left out by the template, it has no block")
            return ""
        found = self.places.get(index, [])
        content, lost = came_out(self.messages[index], self.placed.get(index, set()), found, self.text)
        self.notes += [f"{self._name(index)}: {what} by the template" for what in lost]
        return content
