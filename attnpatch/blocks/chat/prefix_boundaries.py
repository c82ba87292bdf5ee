"""Ends of messages from the conversation cut off after each: for templates in which marks change too much."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from attnpatch.errors import BlockError

Span = tuple[int, int]

# Put into one message to see where its text lands in the rendered conversation; a private-use character that no
# template treats specially and no whitespace trimming removes.
_MARK = "\ue000"


def ends_of_prefixes(
    render: Any, messages: Sequence[Mapping], text: str, stop: int, written: Any
) -> list[int]:
    """Character of ``text`` at which each message ends; every message must own the text it brought in.

    Args:
        render: Text of a list of messages.
        messages: The conversation.
        text: Its rendering, to ``stop``; the opening of the assistant's next message may follow.
        stop: Where the last message ends.
        written: ``closings.Closings`` of the template.

    Raises:
        BlockError: A message does not own the text it brought in, or where one ends cannot be told.
    """
    whole = partial(render, add_generation_prompt=True) if stop < len(text) else render
    ends: list[int] = []
    for count in range(1, len(messages) + 1):
        end = stop if count == len(messages) else _prefix_end(render, messages, count, text, written)
        start = ends[-1] if ends else 0
        changed = _changed_region(whole, messages, count - 1, text)
        if end is None or end <= start or (changed and (changed[0] < start or changed[1] > end)):
            role = messages[count - 1].get("role", "?")
            raise BlockError(
                f"message {count - 1} ({role}) has no text of its own: the chat template drops, merges, "
                "moves or repeats it; leave it out or join it with its neighbour, or use Blocks.spans."
            )
        ends.append(end)
    return ends


def _prefix_end(render: Any, messages: Sequence[Mapping], count: int, text: str, written: Any) -> int | None:
    """Where the first ``count`` messages end in ``text``, or None if that cannot be told."""
    try:
        prefix = render(messages[:count])
        if not text.startswith(prefix):
            # As it is written when something follows, where a template closes the last message otherwise.
            followed = written.followed(prefix, render(messages[:count], add_generation_prompt=True))
            prefix = followed if text.startswith(followed) and followed.strip() else prefix
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
    render: Any, messages: Sequence[Mapping], index: int, text: str, at_end: bool = False
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
    first = common_prefix(text, other)
    shortest = min(len(text), len(other)) - first
    same = common_prefix(text[::-1][:shortest], other[::-1][:shortest])
    return first, len(text) - same


def common_prefix(one: str, other: str) -> int:
    """Length of the common prefix, by bisection: conversations run to a million characters."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
