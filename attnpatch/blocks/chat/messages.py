"""Finds where the messages of a conversation begin and end in tokens, by the tokenizer's chat template."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnpatch.errors import BlockError

Span = tuple[int, int]
# The label of the answer that the model will write.
NEXT = "assistant (next)"


@dataclass(frozen=True)
class MessageSpans:
    """Where the messages of a conversation are in its tokens.

    Attributes:
        spans: Token spans of the messages, and of the generation prompt if there is one.
        end: The token at which the last message ends if the assistant's next message follows.
        texts: The text of each message.
    """

    spans: list[Span]
    end: int
    texts: tuple[str, ...]


def message_spans(tokenizer: Any, messages: list[Mapping], prompt: bool, options: dict) -> MessageSpans:
    """Find the messages of one conversation in its tokens.

    Raises:
        BlockError: A message has no text or no token of its own. (``attnpatch.conversations.tokenized_chat`` joins such
            messages or notes them instead.)
    """
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        raise BlockError(
            "a conversation is empty, or an element is no {'role', 'content'}; give a list of such messages."
        )
    if not getattr(tokenizer, "chat_template", None) and not options.get("chat_template"):
        raise BlockError(
            "the tokenizer has no chat template; set tokenizer.chat_template, or use Blocks.spans."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise BlockError(
            "the tokenizer has no character offsets; load a fast tokenizer, or use Blocks.spans."
        )
    from attnpatch.blocks.chat.closing_patterns import Special  # imported on first use
    from attnpatch.blocks.chat.message_texts import said
    from attnpatch.blocks.chat.segmentation import divide

    render = template_of(tokenizer, options)
    division = divide(render, messages, options, strict=True, prompt=prompt, special=Special.of(tokenizer))
    text, ends = division.text, [piece.end for piece in division.pieces]
    if prompt:
        if not division.opening:
            raise BlockError("add_generation_prompt=True adds no text with this chat template; leave it out.")
        ends.append(len(text))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    counts = token_counts(encoded["offset_mapping"], ends)
    if 0 in counts:
        raise BlockError(
            f"message {counts.index(0)} has no token of its own; use Blocks.spans with this tokenizer."
        )
    stops = torch.tensor(counts).cumsum(0).tolist()
    spans = list(zip([0, *stops[:-1]], stops, strict=True))
    end = spans[-1][0] if prompt else _end_when_followed(tokenizer, messages, options, text, stops[-1])
    texts = tuple(said(messages, (index,), division.contents) for index in range(len(messages)))
    return MessageSpans(spans, end, texts)


def _end_when_followed(tokenizer: Any, messages: list[Mapping], options: dict, text: str, end: int) -> int:
    """The token at which the last message ends if the assistant's next message follows; ``end`` if that makes no
    difference.
    """
    try:
        prompted = template_of(tokenizer, options)(messages, add_generation_prompt=True)
        return end if prompted.startswith(text) else message_spans(tokenizer, messages, True, options).end
    except Exception:  # the template cannot add the opening of an answer here, for any reason
        return end


def template_of(tokenizer: Any, options: dict) -> Callable[..., str]:
    """A function that renders messages as text with the tokenizer's chat template."""

    def render(some: Sequence[Mapping], **more: Any) -> str:
        return tokenizer.apply_chat_template(list(some), tokenize=False, **{**options, **more})

    return render


def token_counts(offsets: Sequence[Span], ends: Sequence[int]) -> list[int]:
    """Tokens of each piece of text; pieces end at ``ends``, and a token belongs to the piece in which it begins."""
    edges = torch.tensor(ends)
    # Byte-level tokenizers trim white space off offsets. If a token is white space only, its span is empty and lies at
    # its own end, where the next piece begins; so it is moved back by one.
    begins = torch.tensor([start if start < end else max(end - 1, 0) for start, end in offsets])
    piece = torch.searchsorted(edges, begins, right=True).cummax(0).values if len(offsets) else begins
    return torch.bincount(piece.clamp(max=len(ends) - 1), minlength=len(ends)).tolist()
