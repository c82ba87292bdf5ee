"""Conversations from files: the usual shapes, and what is wrong with a record in one line."""

import json
import time
import tracemalloc

import fresh
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnpatch.conversations.reading import files
from attnpatch.conversations.reading.files import Conversation, RejectedRecord, read_conversations
from attnpatch.errors import AnalysisError, AttnpatchError

PAIR = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
CALL = {"name": "weather", "arguments": {"city": "Ghent"}}


def written(tmp_path, content, name="chats.jsonl"):
    path = tmp_path / name
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)
    return path


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def read(tmp_path, content, name="chats.jsonl"):
    return list(read_conversations(written(tmp_path, content, name)))


def one(tmp_path, record):
    (found,) = read(tmp_path, lines(record))
    return found


@pytest.mark.parametrize(
    "record",
    [
        PAIR,
        {"messages": PAIR},
        {"conversations": SHAREGPT},
        {"conversations": PAIR},
        {"conversation": SHAREGPT, "score": 1},
        SHAREGPT,
        [
            {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "input_text", "text": "i"}]},
            {"role": "assistant", "content": ["hel", {"text": "lo"}]},
        ],
    ],
)
@pytest.mark.parametrize(
    "shape", ["line", "two lines", "document", "indented", "listed", "indented list", "bom"]
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".txt"])
def test_every_shape_in_every_file(tmp_path, record, shape, suffix):
    content = {
        "line": json.dumps(record),
        "two lines": lines(record, record),
        "document": "\n\n" + json.dumps(record) + "\n\n",
        "indented": json.dumps(record, indent=1),
        "listed": json.dumps([record, record]),
        "indented list": json.dumps([record, record], indent=2),
        "bom": "\ufeff" + json.dumps(record),
    }[shape]
    found = read(tmp_path, content, "chats" + suffix)
    assert [c.messages for c in found] == [tuple(PAIR)] * (
        2 if shape in ("two lines", "listed", "indented list") else 1
    )
    assert [c.name for c in found] == [f"chats-{i + 1:05d}" for i in range(len(found))]


def test_a_list_with_one_record_per_line_is_one_document(tmp_path):
    rows = ",\n".join(json.dumps({"messages": PAIR}) for _ in range(3))
    for name in ("chats.json", "chats.jsonl"):
        assert len(read(tmp_path, f"[\n{rows}\n]\n", name)) == 3
        assert len(read(tmp_path, f"[\n{json.dumps(PAIR)}\n]\n", name)) == 1


def test_sources_name_record_and_line(tmp_path):
    found = read(tmp_path, "\n" + lines(PAIR) + "\r\n  \n" + lines({"no": 1}, PAIR))
    assert [item.source for item in found] == [
        f"chats.jsonl record {r} (line {n})" for r, n in ((1, 2), (2, 5), (3, 6))
    ]
    assert [type(item) for item in found] == [Conversation, RejectedRecord, Conversation]
    assert [found[0].name, found[2].name] == ["chats-00001", "chats-00003"]
    found = read(tmp_path, json.dumps([PAIR, {"no": 1}, PAIR]), "chats.json")
    assert [item.source for item in found] == [f"chats.json record {n}" for n in (1, 2, 3)]
    assert str(found[1]).startswith("chats.json record 2: no messages in it (its keys: 'no'); accepted are")


def test_sharegpt_roles_and_tools(tmp_path):
    found = one(
        tmp_path,
        {
            "system": "be brief",
            "tools": json.dumps([{"type": "function", "function": {"name": "weather"}}]),
            "conversations": [
                {"from": "human", "value": "rain?"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "yes"},
                {"from": "gpt", "value": "It rains."},
            ],
        },
    )
    assert [m["role"] for m in found.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert found.messages[2] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": CALL}],
    }
    assert found.tools == ({"type": "function", "function": {"name": "weather"}},)


@pytest.mark.parametrize("arguments", [CALL["arguments"], json.dumps(CALL["arguments"])])
def test_tool_calls_are_kept(tmp_path, arguments):
    function = {"name": "weather", "arguments": arguments}
    call = {"id": "abc", "type": "function", "function": function}
    messages = [
        {"role": "user", "content": "rain?", "name": "Zora"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "yes", "tool_call_id": "abc", "name": "weather"},
        {"role": "assistant", "content": "Yes.", "reasoning_content": "wet", "audio": None},
    ]
    wanted = [
        messages[0],
        {"role": "assistant", "content": "", "tool_calls": [{**call, "function": CALL}]},
        messages[2],
        {"role": "assistant", "content": "Yes.", "reasoning_content": "wet"},
    ]
    assert list(one(tmp_path, messages).messages) == wanted
    messages[1] = {"role": "assistant", "content": None, "function_call": function}
    del wanted[1]["tool_calls"][0]["id"]
    assert list(one(tmp_path, messages).messages) == wanted


def test_arguments_that_are_no_json_stay_text(tmp_path):
    call = {"function": {"name": "weather", "arguments": "{broken"}}
    found = one(tmp_path, [*PAIR, {"role": "assistant", "tool_calls": [call]}])
    assert found.messages[2]["tool_calls"][0]["function"]["arguments"] == "{broken"


# What a table that several were put together in has in the columns that a row lacks.
CALLING = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
FILLED = {
    "content beside value": ({"conversations": [{**m, "role": ..., "content": ...} for m in SHAREGPT]}, PAIR),
    "value beside content": ({"messages": [{**m, "from": ..., "value": ...} for m in PAIR]}, PAIR),
    "messages beside conversations": ({"messages": ..., "conversations": SHAREGPT}, PAIR),
    "conversations beside messages": ({"conversations": ..., "conversation": ..., "messages": PAIR}, PAIR),
    "what is around them": ({"messages": PAIR, "id": ..., "system": ..., "tools": ...}, PAIR),
    "what a message may have": (
        [{**m, "tool_calls": ..., "function_call": ..., "name": ..., "reasoning_content": ...} for m in PAIR],
        PAIR,
    ),
    "fields of a function_call": (
        [{**m, "function_call": {"name": ..., "arguments": ...}} for m in PAIR],
        PAIR,
    ),
    "a call's own fields": (
        [{"role": "assistant", "content": ..., "tool_calls": [{"id": ..., "function": CALL}]}],
        [CALLING],
    ),
    "a call without a function": (
        [{"role": "assistant", "content": ..., "tool_calls": [{**CALL, "function": ...}]}],
        [CALLING],
    ),
    "fields of a part": (
        [{**m, "content": [{"type": ..., "text": m["content"], "image_url": ...}]} for m in PAIR],
        PAIR,
    ),
}


def filled(value, filling):
    if value is ...:
        return filling
    if isinstance(value, dict):
        return {key: filled(item, filling) for key, item in value.items()}
    return [filled(item, filling) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("record, wanted", FILLED.values(), ids=FILLED)
@pytest.mark.parametrize("filling", [None, float("nan")], ids=["null", "NaN"])
@pytest.mark.parametrize("shape", ["line", "listed"])
def test_columns_that_a_merged_table_filled(tmp_path, record, wanted, filling, shape):
    record = filled(record, filling)
    content = lines(record) if shape == "line" else json.dumps([record, {"messages": PAIR}])
    found = read(tmp_path, content)
    assert [type(item) for item in found] == [Conversation] * (1 if shape == "line" else 2), found
    assert list(found[0].messages) == wanted


@pytest.mark.parametrize("empty", ["", []])
def test_an_empty_field_gives_way_to_a_full_one_of_another_name(tmp_path, empty):
    turns = [{**m, "content": empty} for m in SHAREGPT]
    assert list(one(tmp_path, {"messages": [], "conversations": turns}).messages) == PAIR
    # Two that are full: the first name counts, as it always did.
    assert one(tmp_path, {"messages": PAIR, "conversations": SHAREGPT[:1]}).messages == tuple(PAIR)


USER = {"role": "user", "content": "hi"}
BAD = {
    "role and from are null": (
        [{"role": None, "from": None, "content": "hi"}],
        "neither a role nor a 'from'",
    ),
    "every list is null": ({"messages": None, "conversations": None}, "its messages are nothing"),
    "content and value are null": (
        [{**USER, "content": None, "value": None}],
        "message 0 (user) has no content",
    ),
    "null": (None, "its messages are nothing"),
    "number": (5, "its messages are a number"),
    "text": ("hi", "its messages are text"),
    "empty list": ([], "it is empty: no messages"),
    "empty messages": ({"messages": []}, "it is empty: no messages"),
    "no messages": (
        {"prompt": "a", "completion": "b"},
        "no messages in it (its keys: 'prompt', 'completion')",
    ),
    "empty object": ({}, "no messages in it (its keys: none)"),
    "messages is text": ({"messages": "hi"}, "its messages are text"),
    "message is text": ([USER, "hi"], "message 1 is text"),
    "no role": ([USER, {"content": "hi"}], "message 1 has neither a role nor a 'from'"),
    "wrong role": (
        [USER, {"role": "robot", "content": "hi"}],
        "message 1 has the role 'robot'; accepted are system, developer, user, assistant, tool, and of ShareGPT "
        "human, gpt, function_call, observation",
    ),
    "role is a list": ([{"role": ["user"], "content": "hi"}], "message 0 has the role ['user']"),
    "role is an object": ([{"role": {}, "content": "hi"}], "message 0 has the role {}"),
    "role with a line break": ([{"role": "us\ner\x1b[31m", "content": "hi"}], "the role 'us\\ner\\x1b[31m'"),
    "long role": ([{"role": "x" * 10**6, "content": "hi"}], "xxx...; accepted are"),
    "no content": ([USER, {"role": "assistant", "content": None}], "message 1 (assistant) has no content"),
    "content is a number": ([{"role": "user", "content": 5}], "message 0 (user) has a number as content"),
    "only white space": ([{"role": "user", "content": " \n"}], "it is empty: no message has text"),
    "image": (
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {}}],
            }
        ],
        "message 0 (user): its part 1 is of type 'image_url'; only text is analysed",
    ),
    "part without text": ([{"role": "user", "content": [{"type": "text"}]}], "its part 0 has no text"),
    "part is a number": ([{"role": "user", "content": ["a", 5]}], "its part 1 has no text"),
    "tool calls are text": ([{"role": "assistant", "content": "", "tool_calls": "x"}], "tool_calls are text"),
    "tool call without name": (
        [{"role": "assistant", "tool_calls": [{}]}],
        "its tool call 0 has no function name",
    ),
    "function_call": ([{"from": "function_call", "value": "call it"}], "its function_call is not JSON"),
    "tools": ({"messages": PAIR, "tools": "[1]"}, "its tools are not a list"),
    "surrogate": (
        [USER, {"role": "assistant", "content": "abc\ud83dx"}],
        "message 1 (assistant): a lone surrogate (\\ud83d) at character 3 of its content",
    ),
    "surrogate in a call": (
        [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"\udc00": 1}}]}],
        "message 1 (assistant): a lone surrogate (\\udc00) at character 0 of its tool_calls",
    ),
    "surrogate in a tool": (
        {"messages": PAIR, "tools": [{"\udc00": "\udc01"}]},
        "its tools: a lone surrogate",
    ),
    "surrogate as a role": ([{"role": "\udc00", "content": "hi"}], "the role '\\udc00'"),
}


@pytest.mark.parametrize("record, reason", BAD.values(), ids=BAD)
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_bad_record_is_one_line_and_the_others_go_on(tmp_path, record, reason, kind):
    records = [{"messages": PAIR}, record, {"messages": PAIR}]
    content = lines(*records) if kind == "jsonl" else json.dumps(records)
    before, bad, after = read(tmp_path, content, f"chats.{kind}")
    assert before.messages == after.messages == tuple(PAIR)
    assert isinstance(bad, RejectedRecord) and reason in bad.reason
    text = str(bad)
    assert text.startswith(f"chats.{kind} record 2") and len(text.splitlines()) == 1 and len(text) < 400
    text.encode()


BAD_LINES = {
    "garbage": (b"hello", "not JSON (Expecting value, column 1)"),
    "cut off": (b'{"messages": [{"role": "user", "content": "h', "not JSON (Unterminated string"),
    "two values": (b"[] []", "not JSON (Extra data, column 4)"),
    "latin-1": ('[{"role": "user", "content": "caf\xe9"}]'.encode("latin-1"), "not UTF-8 (byte 33)"),
    "deep": (b"[" * 100_000, "nested too deep"),
    "deep objects": (b'{"a":' * 100_000, "nested too deep"),
    "deep content": (
        b'[{"role": "user", "content": ' + b"[" * 900 + b"]" * 900 + b"}]",
        "its part 0 has no text",
    ),
    "long number": (b"1" * 10_000, "Exceeds the limit"),
    "binary": (b"\x00\x01\x02", "not JSON"),
}


@pytest.mark.parametrize("bad, reason", BAD_LINES.values(), ids=BAD_LINES)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_bad_line_is_one_line_wherever_it_is(tmp_path, bad, reason, place):
    if place == 0 and b"\x00" in bad:
        return  # such a file is refused as a whole, below
    rows = [json.dumps(PAIR).encode()] * 2
    rows.insert(place, bad)
    for name in ("chats.jsonl",) if place == 0 else ("chats.jsonl", "chats.json"):
        found = read(tmp_path, b"\n".join(rows), name)
        assert [type(item) for item in found].count(Conversation) == 2
        assert reason in found[place].reason and f"(line {place + 1})" in found[place].source


WHOLE = {
    "empty": (b"", "the file is empty"),
    "blank": (b" \n\n", "the file is empty"),
    "only a mark": (b"\xef\xbb\xbf", "the file is empty"),
    "utf-16": (json.dumps(PAIR).encode("utf-16"), "UTF-16"),
    "utf-16 without mark": (json.dumps(PAIR).encode("utf-16-le"), "UTF-16 without a mark"),
    "utf-32": (json.dumps(PAIR).encode("utf-32-be"), "binary, or UTF-16"),
    "zip": (b"PK\x03\x04\x14\x00\x08\x00", "binary"),
    "weights": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M", "not"),
    "a number": (b"5", "a single value"),
    "empty list": (b"[]", "empty"),
    "cut off": (
        b'[\n{"role": "user",\n"content": "a',
        "not JSON (Unterminated string starting at, line 3 column 12)",
    ),
    "after blank lines": (b'\n\n[\n\n{"role"\n', "line 6"),
}


@pytest.mark.parametrize("content, reason", WHOLE.values(), ids=WHOLE)
def test_a_file_that_holds_none_is_one_line(tmp_path, content, reason):
    (found,) = read(tmp_path, content, "chats.json")
    assert (
        isinstance(found, RejectedRecord) and reason in found.reason and found.source.startswith("chats.json")
    )


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "missing.json", f"{tmp_path}/a\0b", tmp_path / ("x" * 5000)):
        with pytest.raises(AnalysisError) as raised:
            list(read_conversations(path))
        assert len(str(raised.value).splitlines()) == 1
    assert issubclass(AnalysisError, AttnpatchError)


def test_names_are_file_names_and_unique(tmp_path):
    ids = [
        "a",
        "a",
        "A",
        "a-2",
        "../../etc/passwd",
        "..",
        "",
        "\u00e9t\u00e9 1",
        7,
        None,
        True,
        "nul",
        "x" * 500,
    ]
    found = read(tmp_path, lines(*({"id": given, "messages": PAIR} for given in ids)))
    assert [c.name for c in found] == [
        *("a", "a-2", "A-3", "a-2-2", "etc_passwd", "chats-00006", "chats-00007", "t_1", "7"),
        *("chats-00010", "chats-00011", "_nul", "x" * 80),
    ]
    (found,) = read(tmp_path, lines(PAIR), "\u4e2d \u6587.jsonl")
    assert found.name == "conversation-00001"


def test_many_records_of_one_name_take_no_time(tmp_path):
    began = time.perf_counter()
    found = read(tmp_path, lines({"id": "a", "messages": PAIR}) * 5000)
    assert len({c.name for c in found}) == 5000
    assert time.perf_counter() - began < 5


@given(st.lists(st.text(), max_size=20))
def test_any_ids_become_different_safe_names(ids):
    names = files._Names("chats")
    found = []
    for number, given_id in enumerate(ids, 1):
        names.number = number
        found.append(names.name({"id": given_id}))
    assert len({name.casefold() for name in found}) == len(ids)
    assert all(name.isascii() and name.strip("._") and not set(name) & set('/\\:*?"<>|\n ') for name in found)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "role content from value messages conversations id tool_calls function name type text".split()
            )
            | st.text(),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_any_json_is_a_conversation_or_one_line(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text(json.dumps(value) + "\n" + json.dumps(PAIR) + "\n")
    first, second = read_conversations(path)
    assert second.messages == tuple(PAIR)
    if isinstance(first, RejectedRecord):
        assert len(str(first).splitlines()) == 1
        str(first).encode()
    else:
        assert all(isinstance(m["content"], str) and isinstance(m["role"], str) for m in first.messages)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.bin"
    path.write_bytes(content)
    for found in read_conversations(path):
        str(found).encode()


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_ten_megabytes_on_one_line(tmp_path, suffix):
    text = "lorem \u00e9 " * 1_200_000
    began = time.perf_counter()
    (found,) = read(tmp_path, lines([{"role": "user", "content": text}]), "chats" + suffix)
    assert found.messages[0]["content"] == text
    (bad,) = read(tmp_path, "[" + "x" * 10**7, "chats" + suffix)
    assert len(str(bad)) < 200
    assert time.perf_counter() - began < 10


def test_lines_over_the_limit_are_refused_and_the_rest_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LINE_LIMIT", 2**20)
    monkeypatch.setattr(files, "DOCUMENT_LIMIT", 2**21)
    long = [{"role": "user", "content": "x" * 2**22}]
    for rows in ([PAIR, long, PAIR], [long, PAIR, PAIR], [PAIR, PAIR, long]):
        found = read(tmp_path, lines(*rows))
        place = rows.index(long)
        assert found[place].reason == "the line is longer than 1 MB, the limit"
        assert [type(item) for item in found].count(Conversation) == 2
    for indent in (None, 1):
        (found,) = read(tmp_path, json.dumps(long, indent=indent), "chats.json")
        assert "longer than 2 MB, the limit" in found.reason


def test_lines_are_a_stream(tmp_path):
    row = lines([{"role": "user", "content": "x" * 10_000}])
    path = written(tmp_path, row * 2000)
    tracemalloc.start()
    try:
        for found in read_conversations(path):
            assert found.messages
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2e6


def test_former_names_still_import():
    """In a process of its own: a module warns once."""
    code = (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    from attnpatch.analysis.conversations import Refused, read_conversations\n"
        "    from attnpatch.analysis.analyzer import BlockAttentionAnalyzer\n"
        "print([str(one.message).split(' is now ')[1].split(';')[0] for one in said"
        " if one.category is DeprecationWarning and 'is now' in str(one.message)], Refused.__name__)\n"
    )
    done = fresh.run("-c", code)
    assert done.stdout.strip() == "['attnpatch.conversations', 'RejectedRecord'] RejectedRecord"
