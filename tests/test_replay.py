"""``attnpatch replay``: logs of servers in every form, and what their answers attend to."""

import json

import chats
import pytest
from typer.testing import CliRunner

import attnpatch
from attnpatch.cli.app import app
from attnpatch.conversations.reading.files import RejectedRecord, read_conversations

ASKED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the code?"},
]
ANSWER = {"role": "assistant", "content": "4711."}
CHAT = {"id": "chatcmpl-1", "object": "chat.completion", "choices": [{"index": 0, "message": ANSWER}]}
RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "output": [
        {"type": "reasoning", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "4711."}]},
    ],
}
REQUEST = {"model": "served", "messages": ASKED, "temperature": 0}
LOGS = {
    "one object": {**REQUEST, **CHAT},
    "request and response": {"request": REQUEST, "response": CHAT},
    "bodies": {"custom_id": "task-7", "body": REQUEST, "response": {"status_code": 200, "body": CHAT}},
    "an answer beside messages": {**REQUEST, "response": CHAT},
    "kwargs and result": {"kwargs": REQUEST, "result": CHAT},
    "responses": {"request": {"input": ASKED[1:], "instructions": "Be brief."}, "response": RESPONSE},
    "responses, a text": {
        "request": {"input": "What is the code?", "instructions": "Be brief."},
        "response": RESPONSE,
    },
    "batch, responses": {
        "id": "b",
        "body": {"input": ASKED},
        "response": {"body": RESPONSE},
    },
}


def read(record, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(record) + "\n" + json.dumps(record) + "\n")
    return list(read_conversations(path))


@pytest.mark.parametrize("name", LOGS)
def test_logs_are_read(name, tmp_path):
    for found in read(LOGS[name], tmp_path):
        assert [(one["role"], one["content"]) for one in found.messages] == [
            ("system", "Be brief."),
            ("user", "What is the code?"),
            ("assistant", "4711."),
        ]
    if name == "bodies":
        assert found.name == "task-7-2"


REFUSED = {
    "several choices": ({**REQUEST, "choices": [{"message": ANSWER}] * 2}, "its response has 2 choices"),
    "no choice": ({**REQUEST, "choices": []}, "its response has 0 choices"),
    "a chunk": ({**REQUEST, "choices": [{"delta": {"content": "47"}}]}, "a chunk of a streamed answer"),
    "a text completion": (
        {"prompt": "What is", "choices": [{"text": " it"}]},
        "no messages that it answers",
    ),
    "a completion of messages": ({**REQUEST, "choices": [{"text": " it"}]}, "its response has no message"),
    "no request": ({"response": CHAT}, "no messages that it answers"),
    "several messages": (
        {"request": {"input": ASKED}, "response": {**RESPONSE, "output": RESPONSE["output"] * 2}},
        "its response has 2 messages",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_entries_that_have_no_single_answer(name, tmp_path):
    record, reason = REFUSED[name]
    for found in read(record, tmp_path):
        assert isinstance(found, RejectedRecord) and reason in str(found)


def test_what_is_no_log_is_read_as_before(tmp_path):
    found = read({"messages": [*ASKED, ANSWER], "response": "fine"}, tmp_path)
    assert [len(one.messages) for one in found] == [3, 3]


def replay(*arguments):
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, ["replay", *map(str, arguments)])


def test_replay_lists_what_answers_attend_to(chat_model, tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(json.dumps(LOGS[name]) for name in ("bodies", "request and response")))
    done = replay("--model", chat_model, "--transcript", log, "--out", tmp_path / "out", "--top", 2)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    start = lines.index("task-7: 4711.")
    assert lines[start + 1].split() == ["layer", "query", "key", "text", "mass"]
    found = attnpatch.load(tmp_path / "out" / "task-7.safetensors")
    for line, cell in zip(lines[start + 2 : start + 4], found.top(2), strict=True):
        assert line.split() == [
            str(cell.layer),
            *cell.query.split(),
            *cell.key.split(),
            *cell.text.split(),
            f"{cell.mass:.4f}",
        ]
    assert found.texts[-1] == "4711." and len(found.block_map.query_labels) == 3
    assert len(chats.index_of(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--transcript", "missing.jsonl"], 1, "missing.jsonl: No such file"),
        (["--transcript", "log.jsonl", "--layers", "first"], 2, "--layers first: give all, last, or whole"),
    ],
)
def test_bad_options_are_one_line(chat_model, arguments, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.jsonl").write_text(json.dumps(LOGS["one object"]))
    done = replay("--model", chat_model, *arguments)
    assert done.exit_code == code and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "attention_maps").exists()
