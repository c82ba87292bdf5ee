"""A generated answer, and the texts of the blocks that include it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attnpatch.blocks.chat.messages import NEXT
from attnpatch.conversations.passes import in_pieces
from attnpatch.conversations.tokenized_chat import TokenizedChat

# The character that decoding inserts for bytes that are not a whole character.
_NO_CHARACTER = "\ufffd"


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
        text: The text without special tokens.
        tokens: The text of each token, special tokens included. If a character has several tokens, the last one has it.
        notes: One line if the answer ends inside a character.
    """

    text: str
    tokens: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def texts_of_blocks(self, kind: str | int, texts: Sequence[str], rendered: TokenizedChat) -> list[str]:
        """The text of each block of conversation and answer; the answer's last token has no row and is left out.

        Args:
            kind: The kind of blocks, as ``Options.blocks``.
            texts: The texts of the conversation's blocks.
            rendered: The conversation.
        """
        rows = self.tokens[:-1]
        if isinstance(kind, int):
            return ["".join(piece) for piece in in_pieces([*rendered.tokens, *rows], kind)]
        if kind == "messages" and rendered.labels[-1] == NEXT:
            return [*texts[:-1], self.text]
        return [*texts, self.text] if rows else list(texts)


def answer_of(tokenizer: Any, ids: Sequence[int]) -> Answer:
    """The answer that generated tokens spell.

    Args:
        tokenizer: A tokenizer of transformers.
        ids: Ids of the generated tokens.
    """
    text = tokenizer.decode(ids, skip_special_tokens=True)
    notes: tuple[str, ...] = ()
    if text.endswith(_NO_CHARACTER):
        text = text.rstrip(_NO_CHARACTER)
        notes = ("the answer ends inside a character, which its text leaves out",)
    tokens, before = [], ""
    for count in range(1, len(ids) + 1):
        now = tokenizer.decode(ids[:count])
        tokens.append("" if now.endswith(_NO_CHARACTER) else now[len(before) :])
        before = before if now.endswith(_NO_CHARACTER) else now
    return Answer(text, tuple(tokens), notes)
