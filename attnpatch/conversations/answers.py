"""What a model has written, as the texts of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attnpatch.blocks.chat.messages import NEXT
from attnpatch.conversations.passes import in_pieces
from attnpatch.conversations.tokenized_chat import TokenizedChat

# What decoding puts in the place of bytes that are no character.
_NO_CHARACTER = "\ufffd"


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        text: Without special tokens.
        tokens: What each token brings of it, special tokens too; a character that takes several is the last one's.
        notes: One line where the last character is not whole.
    """

    text: str
    tokens: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def texts_of_blocks(self, kind: str | int, texts: Sequence[str], rendered: TokenizedChat) -> list[str]:
        """What each block says with the answer, of which the last token has been no row yet.

        Args:
            kind: Of the blocks, as ``Options.blocks``.
            texts: Of those of the conversation.
            rendered: The conversation.
        """
        rows = self.tokens[:-1]
        if isinstance(kind, int):
            return ["".join(piece) for piece in in_pieces([*rendered.tokens, *rows], kind)]
        if kind == "messages" and rendered.labels[-1] == NEXT:
            return [*texts[:-1], self.text]
        return [*texts, self.text] if rows else list(texts)


def answer_of(tokenizer: Any, ids: Sequence[int]) -> Answer:
    """The answer that tokens are.

    Args:
        tokenizer: A tokenizer of transformers.
        ids: Of the tokens that were written.
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
