"""Sentinels: characters inserted into messages before rendering, to find the messages in the rendered text."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

# Each sentinel is one private-use character: templates do not treat it specially, and trimming does not remove it.
_RANGES = ((0xE000, 0xF900), (0xF0000, 0xFFFFE), (0x100000, 0x10FFFE))
_PRIVATE = re.compile("[\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd]")
# Tags that models write around reasoning inside the content; templates remove it from earlier turns.
_THINKING = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"))
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
# Kinds of sentinels inside the content; the others are in the reasoning and in the arguments of tool calls.
CONTENT = ("start", "thought", "answer", "inner", "end", "blank", "empty")

Messages = Sequence[Mapping]
Owner = tuple[int, str]
Layout = Literal["beside", "outside", "inside"]
# Makes a new sentinel of a kind for the current message.
New = Callable[[str], str]


@dataclass(frozen=True)
class Marked:
    """Messages with sentinels.

    Attributes:
        messages: Copies of the messages with sentinels in their strings; messages without sentinels are the caller's
            objects.
        owners: For each sentinel, its message and its kind. ``"start"`` and ``"end"``: of the content. ``"thought"``
            and ``"answer"``: the beginnings of reasoning and answer inside the content; if the reasoning is empty, and
            so cannot be lost, the start is ``"empty"``. ``"inner"``: the middle. ``"blank"``: a content without text.
            ``"reasoning"`` and ``"call"``: in the other fields.
    """

    messages: list[Mapping]
    owners: dict[str, Owner]

    def read(self, rendered: str) -> tuple[str, dict[int, list[tuple[int, str]]]]:
        """The text without the sentinels, and for each message the positions in that text where its sentinels were."""
        pieces: list[str] = []
        found: dict[int, list[tuple[int, str]]] = {}
        begin = length = 0
        for match in _PRIVATE.finditer(rendered):
            owner = self.owners.get(match.group())
            if owner is not None:
                pieces.append(rendered[begin : match.start()])
                length += match.start() - begin
                begin = match.end()
                found.setdefault(owner[0], []).append((length, owner[1]))
        pieces.append(rendered[begin:])
        return "".join(pieces), found

    def placed(self) -> dict[int, set[str]]:
        """The kinds of sentinels of each message."""
        kinds: dict[int, set[str]] = {}
        for index, kind in self.owners.values():
            kinds.setdefault(index, set()).add(kind)
        return kinds


class Marker:
    """Inserts sentinels, using characters that do not occur in the input or the output.

    Args:
        messages: The conversation.
        also: Other inputs and outputs of the template.
    """

    def __init__(self, messages: Messages, *also: Any) -> None:
        self.messages = messages
        self._taken = {char for text in _strings([list(messages), also]) for char in _PRIVATE.findall(text)}

    def blank(self) -> list[int]:
        """The messages whose content is empty or only white space."""
        contents = [message.get("content") for message in self.messages]
        return [index for index, text in enumerate(contents) if isinstance(text, str) and not _has_text(text)]

    def mark(self, layouts: Mapping[int, Layout]) -> Marked | None:
        """Insert sentinels into some messages.

        Args:
            layouts: Where each message gets its sentinels. ``"beside"``: directly around its text, inside the white
                space that templates trim, and around reasoning. ``"outside"``: outside the white space, even if
                there is no text. ``"inside"``: a single one in its middle.

        Returns:
            The messages; None if more sentinels are needed than there are private-use characters (137,468).
        """
        free = (
            chr(code) for low, high in _RANGES for code in range(low, high) if chr(code) not in self._taken
        )
        owners: dict[str, Owner] = {}

        def new(index: int, kind: str) -> str:
            char = next(free)
            owners[char] = (index, kind)
            return char

        marked = list(self.messages)
        try:
            for index, layout in layouts.items():
                marked[index] = _in_message(marked[index], layout, partial(new, index))
        except StopIteration:
            return None
        return Marked(marked, owners)


def came_out(
    message: Mapping, placed: set[str], found: Sequence[tuple[int, str]], text: str
) -> tuple[str, list[str]]:
    """The rendered part of a message's content, and what the template left out or changed, in words.

    Args:
        message: The original message.
        placed: The kinds of its sentinels.
        found: The sentinels in the rendering: position in ``text`` and kind.
        text: The rendering without sentinels.
    """
    content = message.get("content")
    kinds, lost = {kind for _, kind in found}, []
    inside = [place for place, kind in found if kind in CONTENT]
    wanted = placed & {*CONTENT}
    missing = wanted - kinds - {"empty"}
    if "call" in placed - kinds:
        lost.append("its tool calls are left out")
    if "reasoning" in placed - kinds:
        lost.append("its thinking is left out")
    if "inner" in kinds or not wanted:
        return content if isinstance(content, str) else "", lost
    if "blank" in wanted:
        return "", lost
    if not inside:
        return "", ["its text is left out", *lost]
    # A template may extract the reasoning and write it elsewhere; it is lost only if its own sentinel is missing.
    if "thought" in missing or ("thought" not in placed and "answer" in kinds and "start" in missing):
        lost.append("its thinking is left out")
    elif missing - {"start"} or ("start" in missing and "thought" not in placed):
        lost.append("part of its text is left out")
    said = text[inside[0] : inside[-1]]
    if not missing and isinstance(content, str) and content.strip() != said and "thought" not in placed:
        lost.append("its text is changed")
    return said, lost


def _strings(value: Any) -> Iterator[str]:
    """Yields every string in nested dicts and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _in_message(message: Mapping, layout: Layout, new: New) -> Mapping:
    changed = dict(message)
    content = message.get("content")
    if isinstance(content, str):
        kinds = _kinds(content, layout)
        changed["content"] = _insert(content, {place: new(kinds[place]) for place in sorted(kinds)})
    if layout == "inside":
        return changed
    if isinstance(content, list | tuple):
        changed["content"] = _in_parts(content, new)
    reasoning = {key: message[key] for key in _REASONING_FIELDS if _has_text(message.get(key))}
    if reasoning:
        char = new("reasoning")
        changed |= {key: _insert(text, {_begin(text): char}) for key, text in reasoning.items()}
    calls = message.get("tool_calls")
    if isinstance(calls, list | tuple) and any(_has_text(text) for text in _arguments(calls)):
        char = new("call")
        changed["tool_calls"] = [_in_call(call, char) for call in calls]
    return changed


def _kinds(text: str, layout: Layout) -> dict[int, str]:
    """The kind of sentinel for each position of a content that gets one."""
    if not _has_text(text):
        return {len(text): "blank"} if layout == "outside" else {}
    first, last = _begin(text), len(text.rstrip())
    if layout == "inside":
        return {(first + last) // 2: "inner"}
    if layout == "outside":
        return {0: "start", len(text): "end"}
    kinds = {first: "start", last: "end"}
    tags = next((tags for tags in _THINKING if tags[1] in text), None)
    if tags is None:
        return kinds
    opening, closing = tags
    close = text.rfind(closing)
    open_ = text.find(opening, 0, close)
    if open_ >= 0:
        thought = _begin(text, open_ + len(opening))
        if thought < close:
            kinds[thought] = "thought"
    if (answer := _begin(text, close + len(closing))) < len(text):
        kinds[answer] = "answer"
        if open_ >= 0 and "thought" not in kinds.values():
            kinds[first] = "empty"
    return kinds


def _in_parts(parts: Sequence[Any], new: New) -> list[Any]:
    """Insert a start into the first part with text, and an end into the last one."""
    parts = list(parts)
    places = [
        at for at, part in enumerate(parts) if isinstance(part, Mapping) and _has_text(part.get("text"))
    ]
    if places:
        for at, kind in ((places[0], "start"), (places[-1], "end")):
            text = parts[at]["text"]
            place = _begin(text) if kind == "start" else len(text.rstrip())
            parts[at] = {**parts[at], "text": _insert(text, {place: new(kind)})}
    return parts


def _in_call(call: Any, char: str) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _in_call(call["function"], char)}
    return {**call, "arguments": _at_ends(call["arguments"], char)} if "arguments" in call else call


def _at_ends(value: Any, char: str) -> Any:
    """Insert the sentinel after every string of a tool call's arguments, because they may be rendered in any order."""
    if isinstance(value, str):
        return _insert(value, {len(value.rstrip()): char}) if _has_text(value) else value
    if isinstance(value, Mapping):
        return {key: _at_ends(item, char) for key, item in value.items()}
    return [_at_ends(item, char) for item in value] if isinstance(value, list | tuple) else value


def _arguments(calls: Sequence[Any]) -> Iterator[str]:
    for call in calls:
        inner = call.get("function", call) if isinstance(call, Mapping) else {}
        yield from _strings(inner.get("arguments") if isinstance(inner, Mapping) else None)


def _has_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and not value.isspace()


def _begin(text: str, start: int = 0) -> int:
    """The position of the first character at or after ``start`` that is not white space."""
    return len(text) - len(text[start:].lstrip())


def _insert(text: str, chars: Mapping[int, str]) -> str:
    pieces, begin = [], 0
    for edge in sorted(chars):
        pieces += [text[begin:edge], chars[edge]]
        begin = edge
    return "".join([*pieces, text[begin:]])
