"""Converts a record of a file, in any of the usual formats, to a list of chat messages."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from attnpatch.conversations.reading import transcripts
from attnpatch.errors import AnalysisError

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = ("human", "gpt", "system", "tool", "function_call", "observation")
_SAME_ROLE = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
}
_LISTS = ("messages", "conversations", "conversation")
_KEPT = ("name", "tool_call_id", "reasoning_content", "thinking", "reasoning")
ACCEPTED = 'accepted are a list of {"role", "content"}, {"messages": [...]} and {"conversations": [{"from", "value"}]}'


class BadRecord(AnalysisError):
    """A record is not a conversation; the message has only the reason."""


def is_message(value: Any) -> bool:
    """Whether a value looks like a message (perhaps an invalid one), and not like a conversation."""
    named = isinstance(value, Mapping) and any(_is_given(value.get(key)) for key in ("role", "from"))
    return named and not is_record(value)


def is_record(value: Any) -> bool:
    """Whether a value looks like a conversation: a list of messages, or an object with one."""
    return isinstance(value, list) or (
        isinstance(value, Mapping)
        and (any(_is_given(value.get(key)) for key in _LISTS) or transcripts.is_transcript(value))
    )


def _is_given(value: Any) -> bool:
    """Whether a value is present. Merged tables have null where a row lacks a value, and pandas writes NaN."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _first(value: Mapping, keys: tuple[str, ...]) -> str | None:
    """The key to read, of several keys for the same thing: the first one with a value. A key whose value is empty is
    used only if no other has one.
    """
    there = [key for key in keys if _is_given(value.get(key))]
    full = [key for key in there if not isinstance(value[key], str | list) or value[key]]
    return next(iter(full or there), None)


def messages_of(record: Any) -> tuple[tuple[dict, ...], tuple[dict, ...]]:
    """The messages of a record in one format, and the tools that it offers.

    Returns:
        Messages ``{"role": str, "content": str}``, with ``"tool_calls"``, ``"name"``, ``"tool_call_id"`` and
        reasoning if they have them; and the tools as in the record.

    Raises:
        BadRecord: The record is not a conversation, or has content other than text.
    """
    try:
        record = transcripts.with_answer(record)
    except transcripts.NoTranscript as error:
        raise BadRecord(str(error)) from None
    found, tools = record, ()
    if isinstance(record, Mapping):
        key = _first(record, _LISTS) or next((key for key in _LISTS if key in record), None)
        if key is None:
            keys = ", ".join(shown(name) for name in list(record)[:6]) or "none"
            raise BadRecord(f"no messages in it (its keys: {keys}); {ACCEPTED}")
        found, tools = record[key], _tools(record.get("tools"))
    if not isinstance(found, list):
        raise BadRecord(f"its messages are {_kind(found)}; {ACCEPTED}")
    if not found:
        raise BadRecord("it is empty: no messages")
    messages = [_message(index, message) for index, message in enumerate(found)]
    system = record.get("system") if isinstance(record, Mapping) else None
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if not any(message["content"].strip() or "tool_calls" in message for message in messages):
        raise BadRecord("it is empty: no message has text")
    for index, message in enumerate(messages):
        _check_text(f"message {index} ({message['role']})", message)
    _check_text("its tools", list(tools))
    return tuple(messages), tools


def _message(index: int, message: Any) -> dict:
    where = f"message {index}"
    if not isinstance(message, Mapping):
        raise BadRecord(f"{where} is {_kind(message)}; {ACCEPTED}")
    key = _first(message, ("role", "from"))
    if key is None:
        raise BadRecord(f"{where} has neither a role nor a 'from'; {ACCEPTED}")
    given = message[key]
    role = _SAME_ROLE.get(given, given) if isinstance(given, str) else given
    if not isinstance(role, str) or role not in ROLES:
        raise BadRecord(
            f"{where} has the role {shown(given)}; accepted are {', '.join(ROLES)}, and of ShareGPT "
            f"{', '.join(name for name in SHAREGPT_ROLES if name not in ROLES)}"
        )
    where = f"{where} ({role})"
    content = message.get(_first(message, ("content", "value")) or "content")
    content = content if _is_given(content) else None
    calls = message.get("tool_calls") if _is_given(message.get("tool_calls")) else None
    called = message.get("function_call")
    if given == "function_call":
        content, calls = "", _parsed(where, content)
    elif isinstance(called, Mapping) and any(
        map(_is_given, called.values())
    ):  # the older format, with a single call
        calls = [called]
    if content is None and not calls and not any(message.get(key) for key in _KEPT[2:]):
        raise BadRecord(f"{where} has no content")
    normal: dict[str, Any] = {"role": role, "content": _text(where, content)}
    if calls:
        normal["tool_calls"] = _calls(where, calls)
    for key in _KEPT:
        if isinstance(message.get(key), str):
            normal[key] = message[key]
    return normal


def _text(where: str, content: Any) -> str:
    """The text of a message's content; text parts are joined without a separator, as chat templates do."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        raise BadRecord(f"{where} has {_kind(content)} as content; accepted is text or a list of text parts")
    texts = []
    for number, part in enumerate(content):
        if isinstance(part, Mapping):
            kind = part["type"] if _is_given(part.get("type")) else "text"
            text = part.get("text")
            if kind not in ("text", "input_text", "output_text"):
                raise BadRecord(f"{where}: its part {number} is of type {shown(kind)}; only text is analysed")
        else:
            text = part
        if not isinstance(text, str):
            raise BadRecord(f"{where}: its part {number} has no text; only text is analysed")
        texts.append(text)
    return "".join(texts)


def _parsed(where: str, value: Any) -> list[Any]:
    """The tool calls of a ShareGPT ``function_call`` turn, which has them as JSON text."""
    calls = _from_json(value)
    if not isinstance(calls, Mapping | list) or not calls:
        raise BadRecord(f'{where}: its function_call is not JSON of {{"name", "arguments"}}')
    return calls if isinstance(calls, list) else [calls]


def _calls(where: str, calls: Any) -> list[dict]:
    """Tool calls as chat templates expect them: arguments are a dict if they can be parsed as one."""
    if not isinstance(calls, list):
        raise BadRecord(f"{where}: its tool_calls are {_kind(calls)}; accepted is a list")
    normal = []
    for number, call in enumerate(calls):
        function = call
        if isinstance(call, Mapping) and _is_given(call.get("function")):
            function = call["function"]
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRecord(f"{where}: its tool call {number} has no function name")
        arguments = function.get("arguments")
        arguments = arguments if _is_given(arguments) else {}
        parsed = _from_json(arguments)
        arguments = parsed if isinstance(parsed, Mapping) else arguments
        kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        normal.append(
            {**kept, "type": "function", "function": {"name": function["name"], "arguments": arguments}}
        )
    return normal


def _tools(tools: Any) -> tuple[dict, ...]:
    tools = _from_json(tools) if isinstance(tools, str) and tools.strip() else tools
    if not tools or not _is_given(tools):
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRecord("its tools are not a list of tool descriptions")
    return tuple(tools)


def _from_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def _check_text(where: str, value: Any) -> None:
    """Refuse lone surrogates (halves of characters): JSON can contain them, but UTF-8 and tokenizers cannot."""
    for path, text in _strings(value, ""):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRecord(
                f"{where}: a lone surrogate (\\u{ord(text[error.start]):04x}) at character {error.start} of its {path}"
            ) from None


def _strings(value: Any, path: str) -> Iterator[tuple[str, str]]:
    waiting = [(value, path)]
    while waiting:
        value, path = waiting.pop()
        if isinstance(value, str):
            yield path or "text", value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                named = key if isinstance(key, str) and key.isprintable() else "keys"
                waiting += [(item, path or named), (key, path or "keys")]
        elif isinstance(value, list | tuple):
            waiting += [(item, path) for item in value]


def shown(value: Any) -> str:
    """Any value for a message: short, on one line, and printable."""
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind(value: Any) -> str:
    if not _is_given(value):
        return "nothing"
    names = {bool: "true or false", str: "text", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object")
