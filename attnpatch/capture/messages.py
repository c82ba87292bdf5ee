"""Where the messages of a conversation begin and end in tokens, found from the tokenizer's chat template."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from attnpatch.capture.closings import Special
from attnpatch.capture.division import divide
from attnpatch.errors import BlockError

Span = tuple[int, int]


def message_spans(tokenizer: Any, messages: list[Mapping], prompt: bool, options: dict) -> list[Span]:
    """Token spans of the messages of one conversation, and of the generation prompt if there is one.

    Raises:
        BlockError: A message has no text or no token of its own. ``attnpatch.analysis.rendering`` joins or notes
            these instead.
    """
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        raise BlockError("a conversation is empty or holds something else than {'role', 'content'} mappings.")
    if not getattr(tokenizer, "chat_template", None) and not options.get("chat_template"):
        raise BlockError(
            "the tokenizer has no chat template; set tokenizer.chat_template, or use Blocks.spans."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise BlockError("the tokenizer gives no character offsets; load a fast one, or use Blocks.spans.")
    render = template_of(tokenizer, options)
    division = divide(render, messages, options, strict=True, prompt=prompt, special=Special.of(tokenizer))
    text, ends = division.text, [piece.end for piece in division.pieces]
    if prompt:
        if not division.opening:
            raise BlockError(
                "add_generation_prompt=True adds nothing at the end with this chat template; leave it out."
            )
        ends.append(len(text))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    counts = token_counts(encoded["offset_mapping"], ends)
    if 0 in counts:
        raise BlockError(
            f"message {counts.index(0)} got no token of its own; use Blocks.spans for this tokenizer."
        )
    stops = torch.tensor(counts).cumsum(0).tolist()
    return list(zip([0, *stops[:-1]], stops, strict=True))


def template_of(tokenizer: Any, options: dict) -> Callable[..., str]:
    """The text of some messages, as the tokenizer's chat template renders them."""

    def render(some: Sequence[Mapping], **more: Any) -> str:
        return tokenizer.apply_chat_template(list(some), tokenize=False, **{**options, **more})

    return render


def token_counts(offsets: Sequence[Span], ends: Sequence[int]) -> list[int]:
    """How many tokens each piece of text that ends at ``ends`` has; a token belongs where it begins."""
    edges = torch.tensor(ends)
    # Byte-level tokenizers trim whitespace off offsets: a token that is only whitespace comes out empty, at
    # its own end, which is the first character of the next piece.
    begins = torch.tensor([start if start < end else max(end - 1, 0) for start, end in offsets])
    piece = torch.searchsorted(edges, begins, right=True).cummax(0).values if len(offsets) else begins
    return torch.bincount(piece.clamp(max=len(ends) - 1), minlength=len(ends)).tolist()
