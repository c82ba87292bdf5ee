"""How a template closes a message in the middle of a conversation, if it closes the last message differently.

Phi-3 and its successors write a token after the last message that belongs to no message. gpt-oss and OLMo 3 close the
last answer with another token than an answer that a message follows. So rendering the conversation up to a message does
not show how that message closes in the middle. Rendering it with the opening of the assistant's next message does,
because then the message is not the last text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attnpatch.blocks.chat.prefix_boundaries import common_prefix

# Text that looks like a template's token, even if the tokenizer has no such token: <|end|>, </s>, [/INST].
_TAG = r"<[^<>\s]{1,60}>|\[/?[A-Z][A-Z_]{0,30}\]"
# The content of a test message, to see what a template writes before a message's text.
_TEXT = "\ue000"


@dataclass(frozen=True)
class Special:
    """The special tokens of a tokenizer, as text.

    Attributes:
        texts: All special tokens.
        first: The token that begins a sequence; empty if there is none.
    """

    texts: tuple[str, ...] = ()
    first: str = ""

    @classmethod
    def of(cls, tokenizer: Any) -> Special:
        """The special tokens of a tokenizer of transformers."""
        texts = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        known = (text for text in texts if isinstance(text, str) and text.strip())
        return cls(tuple(sorted(known, key=lambda text: (-len(text), text))), tokenizer.bos_token or "")

    def tags(self, text: str) -> list[tuple[int, int]]:
        """The spans of special tokens in a text, and of text that looks like such a token."""
        return [match.span() for match in self._pattern.finditer(text)]

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join([*map(re.escape, self.texts), _TAG]))

    def common(self, one: str, other: str) -> int:
        """Length of the common prefix; it never ends inside a special token."""
        length = common_prefix(one, other)
        # Special tokens are short, so only the text near the end of the prefix is searched.
        start = max(0, length - 200)
        for text in (one, other):
            for begin, end in self.tags(text[start : length + 200]):
                if start + begin < length < start + end:
                    length = start + begin
        return length

    def common_end(self, one: str, other: str) -> int:
        """Length of the common suffix; it never begins inside a special token."""
        length = common_prefix(one[::-1], other[::-1])
        for text in (one, other):
            for begin, end in self.tags(text[max(0, len(text) - length - 200) :]):
                begin, end = (place - min(len(text), length + 200) for place in (begin, end))
                if begin < -length < end:
                    length = -end
        return length


@dataclass
class Closings:
    """What a template writes around messages, found by rendering parts of the conversation.

    Attributes:
        render: Renders a list of messages as text.
        messages: The conversation.
        special: The tokenizer's special tokens.
    """

    render: Callable[..., str]
    messages: Sequence[Mapping]
    special: Special
    _openings: list[str] | None = None
    _headers: dict[Any, str] = field(default_factory=dict)

    def followed(self, plain: str, prompted: str) -> str:
        """The text of some messages as the template writes it when another message follows.

        Args:
            plain: Their text when nothing follows, or the end of that text.
            prompted: The same text with the opening of the assistant's next message.
        """
        if prompted.startswith(plain):
            return plain
        opening = next((one for one in self.openings() if prompted.endswith(one)), "")
        return (
            prompted[: len(prompted) - len(opening)]
            if opening
            else plain[: self.special.common(plain, prompted)]
        )

    def openings(self) -> list[str]:
        """Texts that open the assistant's next message, from renderings where the template only appends the opening."""
        if self._openings is None:
            found = []
            asked = [
                index + 1 for index, message in enumerate(self.messages) if message.get("role") != "assistant"
            ]
            for some in (
                *(self.messages[:count] for count in asked[-2:]),
                [{"role": "user", "content": "x"}],
            ):
                plain, prompted = self._rendered(some), self._rendered(some, add_generation_prompt=True)
                if plain and prompted and prompted.startswith(plain) and prompted[len(plain) :].strip():
                    found.append(prompted[len(plain) :])
            self._openings = list(dict.fromkeys(found))
        return self._openings

    def opening(self, plain: str, prompted: str) -> str | None:
        """The opening of the assistant's next message, at the end of ``prompted``.

        Returns:
            Empty if the template adds no opening; None if the opening cannot be told from other changes.
        """
        if plain == prompted:
            return ""
        if prompted.startswith(plain):
            return prompted[len(plain) :]
        known = next((one for one in self.openings() if prompted.endswith(one)), None)
        if known is not None:
            return known
        rest = prompted[self.special.common(plain, prompted) :]
        header = self.header({"role": "assistant", "content": _TEXT})
        if header:
            # ``rest`` may begin with the closing of the last message, before the opening.
            rest = next((rest[at:] for at in range(len(rest)) if rest[at:] in header), rest)
        return rest if rest.strip() else None

    def header(self, message: Mapping) -> str:
        """What a template writes before the text of a message that begins a conversation, by role; empty if unknown."""
        role = message.get("role")
        if role not in self._headers:
            text = self._rendered([{"role": role, "content": _TEXT}]) or ""
            before = text.partition(_TEXT)[0] if text.count(_TEXT) == 1 else ""
            first = self.special.first
            self._headers[role] = before.removeprefix(first) if first else before
        return self._headers[role]

    def _rendered(self, some: Sequence[Mapping], **options: Any) -> str | None:
        try:
            return self.render(some, **options)
        except Exception:  # templates raise jinja errors
            return None
