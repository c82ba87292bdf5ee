"""Finds where messages end in a rendered conversation, given the positions of the sentinels in it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from attnpatch.blocks.chat.closing_patterns import Closings
from attnpatch.blocks.chat.prefix_boundaries import common_prefix
from attnpatch.blocks.chat.sentinel_search import Places
from attnpatch.blocks.chat.sentinels import Marked
from attnpatch.errors import BlockError

# How many texts between messages must be divided by rendering before the rest are divided by their pattern.
_HABIT = 8


class _Refused(Exception):
    """The template refuses to render the conversation up to some message."""


@dataclass(frozen=True)
class _Run:
    """A message with sentinels, the messages without sentinels after it, and the text up to the next sentinel."""

    members: range
    located: bool
    base: int
    limit: int
    key: tuple


@dataclass
class _ClosingPattern:
    """How the texts between messages of the same roles were divided so far.

    Tool calls with a number or an id make every such text different. If enough of them have the same closing before the
    same header, the rest that match are divided the same way, without rendering.
    """

    seen: int = 0
    closing: str = ""
    header: str = ""
    odd: bool = False

    def add(self, gap: str, end: int | None) -> None:
        """Add a text that was divided by rendering."""
        if end is None or (self.seen and gap[end:] != self.header):
            self.odd = True
            return
        common = _common_suffix(self.closing, gap[:end])
        self.closing, self.header = common if self.seen else gap[:end], gap[end:]
        self.seen += 1

    def end_of(self, gap: str) -> int | None:
        """The position in ``gap`` where the message before it ends, if the gap matches the pattern; otherwise None."""
        usual = not self.odd and self.seen >= _HABIT and self.closing.strip() and self.header.strip()
        return len(gap) - len(self.header) if usual and gap.endswith(self.closing + self.header) else None


def _common_suffix(one: str, other: str) -> str:
    length = common_prefix(one[::-1], other[::-1])
    return one[len(one) - length :]


@dataclass
class Ends:
    """Finds where each message of a conversation ends.

    Attributes:
        render: Renders a list of messages as text.
        messages: The conversation.
        text: Its rendering.
        stop: Where the last message ends in the text; the opening of the next one may follow.
        marked: The messages with sentinels that do not change the rendering.
        places: Where the sentinels are in the rendering, in order of the messages.
        strict: Raise a ``BlockError`` if the template refuses to render the conversation up to some message.
        written: How the template closes messages that are followed by others.
    """

    render: Callable[..., str]
    messages: Sequence[Mapping]
    text: str
    stop: int
    marked: Marked
    places: Places
    strict: bool
    written: Closings
    # For each run's text and roles: where its messages end, relative to the run's base.
    learnt: dict[tuple, list[int | None]] = field(default_factory=dict)
    # Closings of messages by role, for templates that refuse to render the conversation up to some message.
    closings: dict[Any, set[str]] = field(default_factory=dict)
    # Headers of messages by role, taken after messages whose end is known.
    headers: dict[Any, set[str]] = field(default_factory=dict)
    # Texts between messages that cannot be divided by rendering the conversation up to there, because the template
    # refuses that or closes the message in another way.
    open: set[tuple] = field(default_factory=set)
    # Messages that close differently when they are last, each with the closing it then has.
    otherwise: dict[int, str] = field(default_factory=dict)
    # The same, for each text between messages of the same roles.
    closed_when_last: dict[tuple, str] = field(default_factory=dict)

    def found(self) -> list[int | None]:
        """Where each message ends; None if it is joined with the next one."""
        ends: list[int | None] = [None] * len(self.messages)
        runs = [run for run in self._runs() if run.members]
        if runs[-1].located and len(runs[-1].members) == 1:
            self._learn_closing(runs[-1].members[0], self.text[runs[-1].base : self.stop])
        self._learn(runs)
        for run in runs:
            if run.key not in self.open:
                self._learn_header(run)
        for run in runs:
            offsets = self.learnt[run.key]
            if run.key in self.open:
                offsets = [self._closed_as_others(run), *offsets[1:]]
            elif run.located and len(run.members) == 1 and offsets[0] is not None:
                offsets = [self._with_white_space(run, offsets[0])]
            for index, offset in zip(run.members, offsets, strict=True):
                ends[index] = None if offset is None else run.base + offset
        ends[-1] = self.stop
        return ends

    def _learn(self, runs: list[_Run]) -> None:
        """Divide each new text between messages: by the pattern of earlier ones if it matches, else by rendering."""
        habits: dict[tuple, _ClosingPattern] = {}
        supposed: list[_Run] = []
        for run in runs:
            if run.key in self.learnt:
                continue
            habit = habits.setdefault(run.key[:-1], _ClosingPattern())
            gap = self.text[run.base : run.limit]
            single = run.located and len(run.members) == 1
            end = habit.end_of(gap) if single else None
            if end is not None:
                self.learnt[run.key] = [end]
                supposed.append(run)
                continue
            self.learnt[run.key] = self._ends_in(run)
            if single:
                habit.add(gap, self.learnt[run.key][0])
        if supposed and self.learnt[supposed[-1].key] != self._ends_in(supposed[-1]):
            for run in supposed:
                self.learnt[run.key] = self._ends_in(run)

    def _ends_in(self, run: _Run) -> list[int | None]:
        """Where a run's messages end, relative to the run's base."""
        ends: list[int | None] = []
        last = run.base
        for index in run.members:
            if run.located and index == run.members[0]:
                end = self._closed(index, run)
            elif index == len(self.messages) - 1:
                end = self.stop
            else:
                end = self._end_without_marks(index, last, run.limit)
            ends.append(end)
            last = end if end is not None else last
        return [None if end is None else end - run.base for end in ends]

    def _prefix(self, count: int, messages: Sequence[Mapping], **options: Any) -> str:
        try:
            return self.render(messages[:count], **options)
        except Exception as error:  # templates raise jinja errors such as "roles must alternate"
            raise _Refused(
                f"the chat template refuses the first {count} messages alone ({error}); use Blocks.spans."
            ) from error

    def _closed(self, index: int, run: _Run) -> int | None:
        """Where a message with sentinels ends, found by rendering the conversation up to it."""
        if index == len(self.messages) - 1:
            return self.stop
        only = [*self.messages[:index], self.marked.messages[index]]
        try:
            closing = self._behind_marks(index, self._prefix(index + 1, only))
        except _Refused as error:
            if self.strict:
                raise BlockError(str(error)) from error
            self.open.add(run.key)
            return None
        if closing is None:
            return None
        if not self._fits(closing, run):
            self.otherwise[index] = self.closed_when_last[run.key] = closing
            prompted = self._prompted(index + 1, only)
            behind = None if prompted is None else self._behind_marks(index, prompted)
            followed = self.written.followed(closing, behind or closing)
            if not followed.strip() or not self._fits(followed, run):
                self.open.add(run.key)
                return None
            closing = followed
        elif not closing.strip() and self.text[run.base : run.limit].strip():
            # If the message is last, nothing closes it. If it is closed in the middle, the next header shows where it
            # ends.
            header = self._header_at_end(run)
            closing = self.text[run.base : run.limit - len(header)] if header else closing
        self._learn_closing(index, closing)
        return run.base + len(closing)

    def _behind_marks(self, index: int, rendered: str) -> str | None:
        """The text after a message's last sentinel; None if the sentinel is not in ``rendered``."""
        prefix, places = self.marked.read(rendered)
        found = [place for place, kind in places.get(index, []) if kind == self.places[index][-1][1]]
        return prefix[found[-1] :] if found else None

    def _fits(self, closing: str, run: _Run) -> bool:
        return run.base + len(closing) <= run.limit and self.text.startswith(closing, run.base)

    def _learn_closing(self, index: int, closing: str) -> None:
        if closing.strip():
            bare = closing.removeprefix(self._white_space(index)[1])
            self.closings.setdefault(self.messages[index].get("role"), set()).add(bare)

    def _white_space(self, index: int) -> tuple[str, str]:
        """The white space at the beginning and the end of a message's content, which is outside its sentinels."""
        content = self.messages[index].get("content") if index < len(self.messages) else None
        if not isinstance(content, str):
            return "", ""
        if not content.strip():  # its sentinel is at its end
            return content, ""
        return content[: len(content) - len(content.lstrip())], content[len(content.rstrip()) :]

    def _learn_header(self, run: _Run) -> None:
        """Learn the header of the message after a run, if the end of the run's last message is known."""
        end, after = self.learnt[run.key][-1], run.members[-1] + 1
        if end is not None and after < len(self.messages) and self.text[run.base + end : run.limit].strip():
            header = self.text[run.base + end : run.limit].removesuffix(self._white_space(after)[0])
            self.headers.setdefault(self.messages[after].get("role"), set()).add(header)

    def _closed_as_others(self, run: _Run) -> int | None:
        """The end of a message, if rendering the conversation up to that message does not show it.

        It is found by a known closing (of its role, or of any role), or by a known header of the next message's role.
        """
        role = self.messages[run.members[0]].get("role")
        gap = self.text[run.base : run.limit]
        for known in (
            self.closings.get(role, ()),
            [text for texts in self.closings.values() for text in texts],
        ):
            own = self._white_space(run.members[0])[1]
            # A template may trim the content, so the closing is tried with and without white space.
            both = [lead + closing for closing in known for lead in {own, ""}]
            found = [len(closing) for closing in both if gap.startswith(closing)]
            if found:
                return max(found)
        if len(run.members) > 1:
            return None
        header = self._header_at_end(run)
        return len(gap) - len(header) if header else self._seam(run)

    def _seam(self, run: _Run) -> int | None:
        """The end of a message that the template writes into one turn with the next message.

        Qwen3 writes the results of several tools into one turn. The text between two results begins like the closing of
        a last message, and ends like the header of a first message. Only white space is between these parts.
        """
        gap, closing = self.text[run.base : run.limit], self.closed_when_last.get(run.key, "")
        after = run.members[0] + 1
        if after >= len(self.messages):
            return None
        special, header = self.written.special, self.written.header(self.messages[after])
        end = special.common(gap, closing)
        for own in {self._white_space(after)[0], ""}:
            start = len(gap) - special.common_end(gap, header + own)
            are_whole = bool(special.tags(gap[:end]) and special.tags(gap[start:]))
            if are_whole and end <= start and not gap[end:start].strip():
                return start
        return None

    def _header_at_end(self, run: _Run) -> str:
        """The header of the next message, if the run's text ends with a known header of its role; otherwise empty."""
        after = run.members[-1] + 1
        if after >= len(self.messages):
            return ""
        gap, message = self.text[run.base : run.limit], self.messages[after]
        known = {*self.headers.get(message.get("role"), ()), self.written.header(message)}
        white = {self._white_space(after)[0], ""}
        both = [header + own for header in known if header.strip() for own in white]
        return max((header for header in both if gap.endswith(header)), key=len, default="")

    def _with_white_space(self, run: _Run, end: int) -> int:
        """The end of a message; white space after it is included if a known header of the next role begins after that
        white space.
        """
        after = run.members[0] + 1
        header = self.text[run.base + end : run.limit]
        white = len(header) - len(header.lstrip())
        if not white or not header.strip() or after >= len(self.messages):
            return end
        message = self.messages[after]
        bare = header[white:].removesuffix(self._white_space(after)[0])
        known = {*self.headers.get(message.get("role"), ())}
        if bare not in known and self.text[run.base : run.base + end].strip():
            known.add(self.written.header(message))
        return end + white if bare in known else end

    def _end_without_marks(self, index: int, last: int, limit: int) -> int | None:
        """Where a message without rendered text ends, found by how much text it adds to the rendering."""
        try:
            prefix = self._followed_prefix(index + 1)
            if self.text.startswith(prefix) and last <= len(prefix) <= limit:
                return len(prefix)
            before = self._followed_prefix(index) if index else ""
        except _Refused as error:
            if self.strict:
                raise BlockError(str(error)) from error
            return None
        added = prefix[len(before) :]
        end = last + len(added)
        fits = prefix.startswith(before) and end <= limit and self.text.startswith(added, last)
        return end if fits else None

    def _followed_prefix(self, count: int) -> str:
        """The text of the first ``count`` messages, as the template writes it when others follow."""
        plain = self._prefix(count, self.messages)
        if self.text.startswith(plain):
            return plain
        return self.written.followed(plain, self._prompted(count, self.messages) or plain)

    def _prompted(self, count: int, messages: Sequence[Mapping]) -> str | None:
        """Some messages with the opening of the assistant's next one; None if the template refuses."""
        try:
            return self._prefix(count, messages, add_generation_prompt=True)
        except _Refused:
            return None

    def _runs(self) -> list[_Run]:
        count, known, runs = len(self.messages), sorted(self.places), []
        roles = [message.get("role") for message in self.messages]
        for one, other in pairwise([-1, *known, count]):
            located = one >= 0
            first, kind = (one, self.places[one][-1][1]) if located else (0, "")
            base = self._region(one)[1] if located else 0
            limit = self._region(other)[0] if other < count else self.stop
            key = (located, kind, tuple(roles[first : other + 1]), other == count, self.text[base:limit])
            runs.append(_Run(range(first, other), located, base, limit, key))
        return runs

    def _region(self, index: int) -> tuple[int, int]:
        """The span of characters between the first and the last sentinel of a message."""
        found = self.places[index]
        return found[0][0], found[-1][0]
