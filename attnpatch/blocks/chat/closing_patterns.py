"""How a template closes messages that others follow, where it closes the last one in another way.

Phi-3 and its successors write a token after the last message that is of no message; gpt-oss and OLMo 3 close an answer that
is the last thing said with another token than one that somebody answers. So the conversation cut off after a message does
not show how that message closes in the middle of a longer one. The opening of the assistant's next message follows it too,
and behind that opening nothing is last.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attnpatch.blocks.chat.prefix_boundaries import common_prefix

# What looks like a token of a template, whether or not the tokenizer has one: <|end|>, </s>, [/INST].
_TAG = r"<[^<>\s]{1,60}>|\[/?[A-Z][A-Z_]{0,30}\]"
# Put into a message to see what a template writes before its text.
_TEXT = "\ue000"


@dataclass(frozen=True)
class Special:
    """The special tokens of a tokenizer, as text.

    Attributes:
        texts: All of them.
        first: The one that begins a sequence, if there is one.
    """

    texts: tuple[str, ...] = ()
    first: str = ""

    @classmethod
    def of(cls, tokenizer: Any) -> Special:
        """Those of a tokenizer of transformers."""
        texts = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        known = (text for text in texts if isinstance(text, str) and text.strip())
        return cls(tuple(sorted(known, key=lambda text: (-len(text), text))), tokenizer.bos_token or "")

    def tags(self, text: str) -> list[tuple[int, int]]:
        """Where in a text such tokens are, and what looks like one."""
        return [match.span() for match in self._pattern.finditer(text)]

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join([*map(re.escape, self.texts), _TAG]))

    def common(self, one: str, other: str) -> int:
        """Length of the common prefix; a token is in it as a whole or not at all."""
        length = common_prefix(one, other)
        # Tokens are short beside a conversation.
        start = max(0, length - 200)
        for text in (one, other):
            for begin, end in self.tags(text[start : length + 200]):
                if start + begin < length < start + end:
                    length = start + begin
        return length

    def common_end(self, one: str, other: str) -> int:
        """Length of the common suffix; a token is in it as a whole or not at all."""
        length = common_prefix(one[::-1], other[::-1])
        for text in (one, other):
            for begin, end in self.tags(text[max(0, len(text) - length - 200) :]):
                begin, end = (place - min(len(text), length + 200) for place in (begin, end))
                if begin < -length < end:
                    length = -end
        return length


@dataclass
class Closings:
    """What templates write around messages, found by rendering some of them alone.

    Attributes:
        render: Text of a list of messages.
        messages: The conversation.
        special: Of the tokenizer.
    """

    render: Callable[..., str]
    messages: Sequence[Mapping]
    special: Special
    _openings: list[str] | None = None
    _headers: dict[Any, str] = field(default_factory=dict)

    def followed(self, plain: str, prompted: str) -> str:
        """How some messages, or one, are written when something follows.

        Args:
            plain: Their text, or the end of it.
            prompted: The same with the opening of the assistant's next message.
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
        """What opens the assistant's next message, where a template shows it by adding it alone."""
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
        """What of a conversation's text with the assistant's next opening is that opening.

        Returns:
            Empty where the template adds none; None where it changes more than that.
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
            # What closes the last message may be in it, before the opening.
            rest = next((rest[at:] for at in range(len(rest)) if rest[at:] in header), rest)
        return rest if rest.strip() else None

    def header(self, message: Mapping) -> str:
        """What a template writes before the text of a message of a role that begins a conversation; empty if unknown."""
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
        except Exception:  # templates stop with jinja errors
            return None
