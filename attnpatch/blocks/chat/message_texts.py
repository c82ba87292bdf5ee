"""The texts of messages, as results show them."""

import json
from collections.abc import Mapping, Sequence


def said(messages: Sequence[Mapping], who: Sequence[int], contents: Sequence[str | None]) -> str:
    """What some messages say: the rendered part of their content if it is known, and their tool calls.

    Args:
        messages: The conversation.
        who: Indices of the messages.
        contents: The rendered part of each message's content; None if that is not known.
    """
    found = []
    for index in who:
        content = contents[index]
        found.append(with_calls(messages[index], text_of(messages[index]) if content is None else content))
    return "\n".join(found)


def text_of(message: Mapping) -> str:
    """The text of a message's content; parts of other kinds (pictures) have none."""
    content = message.get("content")
    if isinstance(content, list | tuple):
        return "".join(
            str(part.get("text") or "") if isinstance(part, Mapping) else str(part) for part in content
        )
    return "" if content is None else str(content)


def with_calls(message: Mapping, content: str) -> str:
    """A message's text, followed by its tool calls on separate lines."""
    lines = [content] if content else []
    for call in message.get("tool_calls") or ():
        called = call.get("function", call) if isinstance(call, Mapping) else call
        lines.append(json.dumps(called, ensure_ascii=False, default=str))
    return "\n".join(lines)
