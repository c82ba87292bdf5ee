"""Entries of a server's log that have no answer, or not the whole prompt, are refused; nothing of an answer is lost."""

import json

import pytest

from attnpatch.conversations.reading.records import BadRecord, messages_of

ASKED = [{"role": "user", "content": "q"}]
ANSWER = {"choices": [{"message": {"role": "assistant", "content": "a"}}]}
MESSAGE = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]}
READ = [("user", "q"), ("assistant", "a")]


def of_responses(*output, request=None, **response):
    asked = {"input": "q", **(request or {})}
    return {
        "request": asked,
        "response": {"object": "response", "output": output and list(output), **response},
    }


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"messages": ASKED, "response": {"error": {"message": "busy"}}}, "its response has no answer"),
        ({"messages": ASKED, "response": None, "error": "busy"}, "its response has no answer"),
        ({"messages": ASKED, "response": {"type": "message", "content": [{"text": "a"}]}}, "has no answer"),
        (of_responses(MESSAGE, previous_response_id="r1"), "kept on the server"),
        (of_responses(MESSAGE, request={"previous_response_id": "r1"}), "kept on the server"),
        (of_responses(MESSAGE, request={"conversation": "c1"}), "kept on the server"),
        (of_responses(MESSAGE, request={"prompt": {"id": "p1"}}), "kept on the server"),
        (of_responses(MESSAGE, {"type": "function_call", "name": "f"}), "a function_call beside the message"),
        ({"request": {"messages": ASKED, "functions": [{"name": "f"}]}, "response": ANSWER}, "'functions'"),
        ({"request": {"messages": ASKED, "continue_final_message": True}, "response": ANSWER}, "'continue_"),
        ({"request": {"messages": ASKED, "chat_template": "{{ x }}"}, "response": ANSWER}, "'chat_template'"),
    ],
)
def test_entries_without_an_answer_or_a_whole_prompt(entry, message):
    with pytest.raises(BadRecord, match=message):
        messages_of(entry)


@pytest.mark.parametrize(
    "entry",
    [
        {"messages": json.dumps(ASKED), "response": json.dumps(ANSWER)},
        {"request": json.dumps({"messages": ASKED}), "response": json.dumps({"body": ANSWER})},
        {"messages": [*ASKED, {"role": "assistant", "content": "a"}], "response": None},
        {"messages": [*ASKED, {"role": "assistant", "content": "a"}], "response": "of a table"},
    ],
)
def test_entries_as_json_text_and_tables_with_a_column_response(entry):
    assert [(one["role"], one["content"]) for one in messages_of(entry)[0]] == READ


def test_reasoning_of_the_responses_api_is_kept():
    reasoning = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]}
    found, _ = messages_of(of_responses(reasoning, MESSAGE))
    assert found[1] == {"role": "assistant", "content": "a", "reasoning_content": "hm"}
