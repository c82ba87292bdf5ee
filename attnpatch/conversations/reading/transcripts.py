"""Converts an entry of a server's log (request and response of OpenAI's chat API) to a record with messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_RESPONSES = ("response", "output", "result", "completion")


class NoTranscript(ValueError):
    """An entry has a response whose answer cannot be used; the message has the reason."""


def is_transcript(record: Any) -> bool:
    """Whether a record has the response of a chat server in it."""
    return isinstance(record, Mapping) and _response_of(record) is not None


def with_answer(record: Any) -> Any:
    """A record of messages that end with the answer; a record that is no log entry is returned as it is.

    These entries are known: request and response in one object (``{"messages": [...], "choices": [...]}``); each under a
    name of its own (``{"request": {...}, "response": {...}}``, also with ``body`` around them, as in files of the batch
    API); and those of the Responses API (``input``, ``output``).

    Raises:
        NoTranscript: There is not one answer, the entry is a chunk of a stream or of a failed request, or its prompt is
            not all in it.
    """
    response = _response_of(record) if isinstance(record, Mapping) else None
    if response is None:
        if isinstance(record, Mapping) and _has_other_response(record):
            raise NoTranscript("its response has no answer (an error, or not of OpenAI's API)")
        return record
    request = _request_of(record)
    _check_complete(request, response)
    messages = _from_json(request.get("messages", request.get("input")))
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list) or not messages:
        raise NoTranscript(
            "it has an answer, but no messages that it answers (a text completion?); log the request's messages beside it"
        )
    instructions = request.get("instructions")
    if isinstance(instructions, str) and instructions.strip():
        messages = [{"role": "system", "content": instructions}, *messages]
    kept = {key: record[key] for key in ("id", "custom_id") if isinstance(record.get(key), (str, int))}
    found = {
        "id": kept.get("custom_id", kept.get("id", response.get("id"))),
        "messages": [*messages, _answer_of(response)],
    }
    return {**found, "tools": request["tools"]} if request.get("tools") else found


def _has_other_response(record: Mapping) -> bool:
    """Whether an entry is of a request without an answer that is known: the model has answered nothing, or elsewhere."""
    response = record.get("response")
    return isinstance(response, Mapping) or (
        "response" in record and response is None and bool(record.get("error"))
    )


def _check_complete(request: Mapping, response: Mapping) -> None:
    """Refuse requests whose prompt is not all in the log."""
    for name in ("previous_response_id", "conversation", "prompt"):
        if "choices" not in response and (request.get(name) or response.get(name)):
            raise NoTranscript(f"its request has {name!r}: part of its prompt is kept on the server")
    for name in ("functions", "continue_final_message", "chat_template"):
        if request.get(name):
            raise NoTranscript(
                f"its request has {name!r}, which is not supported: the prompt would be another one"
            )


def _from_json(value: Any) -> Any:
    """A value that a table of a log holds as JSON text; other values as they are."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _body(value: Any) -> Any:
    value = _from_json(value)
    return value["body"] if isinstance(value, Mapping) and isinstance(value.get("body"), Mapping) else value


def _response_of(record: Mapping) -> Mapping | None:
    """The part of an entry that has the answer."""
    named = (_body(record.get(name)) for name in _RESPONSES)
    for one in (*named, record):
        if isinstance(one, Mapping) and (
            isinstance(one.get("choices"), list)
            or (isinstance(one.get("output"), list) and one.get("object") == "response")
        ):
            return one
    return None


def _request_of(record: Mapping) -> Mapping:
    """The part of an entry that has the messages."""
    for name in ("request", "body", "kwargs", "input"):
        one = _body(record.get(name))
        if isinstance(one, Mapping) and ("messages" in one or "input" in one):
            return one
    return record


def _answer_of(response: Mapping) -> Any:
    """The message that a server has answered with."""
    if "choices" not in response:
        kinds = [item.get("type") if isinstance(item, Mapping) else None for item in response["output"]]
        items = [item for item, kind in zip(response["output"], kinds, strict=True) if kind == "message"]
        if len(items) != 1:
            raise NoTranscript(f"its response has {len(items)} messages; one is needed")
        other = next((kind for kind in kinds if kind not in ("message", "reasoning")), None)
        if other is not None:
            raise NoTranscript(
                f"its response has a {other} beside the message; only messages and reasoning are read"
            )
        parts = [
            part["text"]
            for item in response["output"]
            if item["type"] == "reasoning" and isinstance(item.get("content"), list)
            for part in item["content"]
            if isinstance(part, Mapping) and isinstance(part.get("text"), str)
        ]
        reasoning = {"reasoning_content": "".join(parts)} if parts else {}
        return {"role": items[0].get("role", "assistant"), "content": items[0].get("content"), **reasoning}
    choices = response["choices"]
    if len(choices) != 1:
        raise NoTranscript(f"its response has {len(choices)} choices; log each in an entry of its own")
    choice = choices[0]
    if isinstance(choice, Mapping) and isinstance(choice.get("message"), Mapping):
        return {"role": "assistant", **choice["message"]}
    if isinstance(choice, Mapping) and "delta" in choice:
        raise NoTranscript("it is a chunk of a streamed answer; log the whole answer")
    raise NoTranscript("its response has no message (a text completion?); log answers of the chat API")
