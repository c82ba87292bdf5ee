"""Finds the ends of messages by rendering the conversation up to each: for templates whose output sentinels change."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from attnpatch.errors import BlockError

Span = tuple[int, int]

# Inserted into one message to see where its text is in the rendering: a private-use character, which templates do not
# treat specially and trimming of white space does not remove.
_MARK = "\ue000"


def ends_of_prefixes(
    render: Any, messages: Sequence[Mapping], text: str, stop: int, written: Any
) -> list[int]:
    """The character of ``text`` at which each message ends. A message's content must be inside its own span.

    Args:
        render: Renders a list of messages as text.
        messages: The conversation.
        text: Its rendering up to ``stop``; the opening of the assistant's next message may follow.
        stop: Where the last message ends.
        written: ``closing_patterns.Closings`` of the template.

    Raises:
        BlockError: A message's content is rendered outside its span, or the end of a message cannot be found.
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
    """Where the first ``count`` messages end in ``text``; None if that cannot be found."""
    try:
        prefix = render(messages[:count])
        if not text.startswith(prefix):
            # The template may close a last message differently: try the text as written when another message follows.
            followed = written.followed(prefix, render(messages[:count], add_generation_prompt=True))
            prefix = followed if text.startswith(followed) and followed.strip() else prefix
    except Exception as error:  # templates stop with jinja errors: "roles must alternate"
        raise BlockError(
            f"the chat template refuses the first {count} messages alone ({error}); use Blocks.spans."
        ) from error
    if text.startswith(prefix):
        return len(prefix)
    # Templates such as Qwen3's drop the reasoning of all turns but the last, so this rendering is no prefix of the
    # text. The text after the message's content still shows how the message closes.
    in_text = _changed_region(render, messages, count - 1, text, at_end=True)
    in_prefix = _changed_region(render, messages[:count], count - 1, prefix, at_end=True)
    if in_text is None or in_prefix is None or not text.startswith(prefix[in_prefix[1] :], in_text[1]):
        return None
    return in_text[1] + len(prefix) - in_prefix[1]


def _changed_region(
    render: Any, messages: Sequence[Mapping], index: int, text: str, at_end: bool = False
) -> Span | None:
    """The span of ``text`` that changes if a sentinel is inserted into one message.

    None if the message has no plain text. A message that is not rendered changes nothing; its span is then (-1, -1),
    outside every message.
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
    """Length of the common prefix, by bisection, because conversations may have a million characters."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
