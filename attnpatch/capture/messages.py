"""Where the messages of a conversation begin and end in tokens, found from the tokenizer's chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from attnpatch.errors import BlockError

Span = tuple[int, int]

# Put into a message to see where its text lands in the rendered conversation; a private-use character that no
# template treats specially and no whitespace trimming removes.
_MARK = "\ue000"


def message_spans(tokenizer: Any, messages: list[Mapping], prompt: bool, options: dict) -> list[Span]:
    """Token spans of the messages of one conversation, and of the generation prompt if there is one."""
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        raise BlockError("a conversation is empty or holds something else than {'role', 'content'} mappings.")
    if not getattr(tokenizer, "chat_template", None) and not options.get("chat_template"):
        raise BlockError(
            "the tokenizer has no chat template; set tokenizer.chat_template, or use Blocks.spans."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise BlockError("the tokenizer gives no character offsets; load a fast one, or use Blocks.spans.")

    def render(some: list[Mapping], **more: Any) -> str:
        return tokenizer.apply_chat_template(some, tokenize=False, **{**options, **more})

    text = render(messages)
    ends = _message_ends(render, messages, text)
    if prompt:
        longer = render(messages, add_generation_prompt=True)
        if not longer.startswith(text) or longer == text:
            raise BlockError(
                "add_generation_prompt=True adds nothing at the end with this chat template; leave it out."
            )
        text, ends = longer, [*ends, len(longer)]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return _token_spans(encoded["offset_mapping"], ends)


def _message_ends(render: Any, messages: list[Mapping], text: str) -> list[int]:
    """Character of ``text`` at which each message ends; every message must own the text it brought in."""
    ends: list[int] = []
    for count in range(1, len(messages) + 1):
        end = len(text) if count == len(messages) else _prefix_end(render, messages, count, text)
        start = ends[-1] if ends else 0
        first, last = _changed_region(render, messages, count - 1, text) or (start, end)
        if end is None or end <= start or first < start or last > end:
            role = messages[count - 1].get("role", "?")
            raise BlockError(
                f"message {count - 1} ({role}) has no text of its own: the chat template drops, merges, "
                "moves or repeats it; leave it out or join it with its neighbour, or use Blocks.spans."
            )
        ends.append(end)
    return ends


def _prefix_end(render: Any, messages: list[Mapping], count: int, text: str) -> int | None:
    """Where the first ``count`` messages end in ``text``, or None if that cannot be told."""
    try:
        prefix = render(messages[:count])
    except Exception as error:  # templates stop with jinja errors: "roles must alternate"
        raise BlockError(
            f"the chat template refuses the first {count} messages alone ({error}); use Blocks.spans."
        ) from error
    if text.startswith(prefix):
        return len(prefix)
    # Templates such as Qwen3's drop the reasoning of all turns but the last, so a prefix renders differently.
    # The text after the message's content still tells how a message closes.
    in_text = _changed_region(render, messages, count - 1, text, at_end=True)
    in_prefix = _changed_region(render, messages[:count], count - 1, prefix, at_end=True)
    if in_text is None or in_prefix is None or not text.startswith(prefix[in_prefix[1] :], in_text[1]):
        return None
    return in_text[1] + len(prefix) - in_prefix[1]


def _changed_region(
    render: Any, messages: list[Mapping], index: int, text: str, at_end: bool = False
) -> Span | None:
    """Characters of ``text`` around which its rendering changes when a mark is put into one message.

    None where there is no plain text to mark. A message that is not rendered changes nothing: the region is
    then outside every message.
    """
    content = messages[index].get("content")
    if not isinstance(content, str) or not content:
        return None
    middle = len(content) if at_end else len(content) // 2
    marked = {**messages[index], "content": content[:middle] + _MARK + content[middle:]}
    other = render([*messages[:index], marked, *messages[index + 1 :]])
    if other == text:
        return (-1, -1)
    first = _common_prefix(text, other)
    shortest = min(len(text), len(other)) - first
    same = _common_prefix(text[::-1][:shortest], other[::-1][:shortest])
    return first, len(text) - same


def _common_prefix(one: str, other: str) -> int:
    """Length of the common prefix, by bisection: conversations run to a million characters."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _token_spans(offsets: Sequence[Span], ends: Sequence[int]) -> list[Span]:
    """Tokens of each piece of text that ends at ``ends``; a token belongs where it begins."""
    edges = torch.tensor(ends)
    # Byte-level tokenizers trim whitespace off offsets: a token that is only whitespace comes out empty, at
    # its own end, which is the first character of the next piece.
    begins = torch.tensor([start if start < end else max(end - 1, 0) for start, end in offsets])
    piece = torch.searchsorted(edges, begins, right=True).cummax(0).values if len(offsets) else begins
    counts = torch.bincount(piece.clamp(max=len(ends) - 1), minlength=len(ends))
    if (counts == 0).any():
        empty = int((counts == 0).nonzero()[0])
        raise BlockError(f"message {empty} got no token of its own; use Blocks.spans for this tokenizer.")
    stops = counts.cumsum(0).tolist()
    return list(zip([0, *stops[:-1]], stops, strict=True))
