"""``attnpatch analyze``: every option, bad input, exit codes; no traceback reaches the user."""

import json
import os
import pathlib

import chats
import fresh
import pytest
from typer.testing import CliRunner

from attnpatch.cli.app import app
from attnpatch.conversations.result import Analysis
from attnpatch.maps.block_map import BlockMap

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def analyze(*arguments):
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, ["analyze", *map(str, arguments)])


def said(result):
    """What went wrong, which must not be a traceback."""
    assert isinstance(result.exception, SystemExit | type(None)), result.exception
    assert "Traceback" not in result.output
    return result.stderr


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return chats.write_good(tmp_path_factory.mktemp("two") / "two.jsonl", 2)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return chats.write_good(tmp_path_factory.mktemp("one") / "one.jsonl", 1)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return chats.write_mixed(tmp_path_factory.mktemp("mixed") / "mixed.jsonl")


def test_bad_records_are_one_line_each_and_the_others_go_on(chat_model, mixed, tmp_path):
    result = analyze("--model", chat_model, "--json", mixed, "--out", tmp_path / "out")
    lines = said(result).splitlines()
    assert result.exit_code == 3
    assert len(lines) == len(chats.BAD)
    for line, (number, (_, reason)) in zip(lines, chats.BAD.items(), strict=True):
        assert line.startswith(f"mixed.jsonl record {number + 1} (line {number + 1}): ") and reason in line
    index = chats.index_of(tmp_path / "out")
    assert [line["record"] for line in index] == list(range(1, 13))
    assert [line["record"] - 1 for line in index if "error" not in line] == list(chats.GOOD)
    files = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert files == {line["file"] for line in index if "file" in line}
    assert "a_chat_of_mine.safetensors" in files
    for line in index:
        if "file" in line:
            analysis = Analysis.load(tmp_path / "out" / line["file"])
            assert line["tokens"] == int(analysis.block_map.query_sizes.sum())
            assert line["messages"] == len(analysis.block_map.query_labels)
            assert (line["method"], line["notes"]) == ("sequential", [])
            assert line["seconds"] > 0 and line["peak_bytes"] >= 0
    assert "conversations analysed" in result.stdout and str(tmp_path / "out") in result.stdout


OPTIONS = {
    "plain": ([], {}),
    "8bit": (["--use-8bit"], {}),
    "4bit": (["--use-4bit"], {}),
    "sampling": (["--use-sampling", "--sample-rows", "3", "--seed", "4"], {"sample_rows": 3, "seed": 4}),
    "sampling_16": (["--use-sampling"], {"sample_rows": 16}),
    "chunked": (["--use-chunked", "--chunk-size", "7"], {"method": "chunked"}),
    "single": (["--single-pass", "--dtype", "bfloat16"], {"method": "single pass"}),
    "last": (["--layers", "last"], {}),
    "negative": (["--layers", "-1"], {}),
    "both": (["--layers", "0,-1", "--heads", "0,-1", "--head-chunk-size", "2"], {}),
    "all_heads": (["--layers", "all", "--heads", "all"], {}),
    "density": (["--normalize", "density"], {}),
    "fixed": (["--blocks", "16"], {}),
    "words": (["--blocks", "words"], {}),
    "memory": (["--max-memory", "cpu=4GiB"], {}),
    "map": (["--device-map", "cpu"], {}),
    "cut": (["--max-tokens", "30", "--truncate", "left"], {}),
    "gradient": (["--weighting", "gradient", "--use-gradient-checkpointing"], {"method": "gradient"}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option(name, chat_model, one, tmp_path):
    arguments, facts = OPTIONS[name]
    result = analyze("--model", chat_model, "--json", one, "--out", tmp_path, "--no-pictures", *arguments)
    assert result.exit_code == 0, said(result)
    assert said(result) == ""
    block_map = BlockMap.load(tmp_path / "one-00001.safetensors")
    for fact, value in {"method": "sequential", **facts}.items():
        assert block_map.metadata[fact] == value
    assert block_map.layers == ((1,) if name in ("last", "negative") else (0, 1))
    assert block_map.heads == {"both": (0, 3), "all_heads": (0, 1, 2, 3)}.get(name, "mean")
    assert block_map.normalization == {"density": "density"}.get(name, "none")
    if name == "fixed":
        assert int(block_map.query_sizes[0]) == 16
    elif name == "words":
        assert "key" in block_map.query_labels
    elif name == "cut":
        assert int(block_map.query_sizes.sum()) == 30
    else:
        assert block_map.query_labels == ("0 system", "1 user", "2 assistant", "3 user", "4 assistant")


@pytest.mark.parametrize("option", ["--use-4bit", "--use-8bit"])
def test_fewer_bits_are_another_model(option, chat_model, two, tmp_path):
    maps = []
    for out, arguments in (("plain", []), ("bits", [option])):
        usual = ["--model", chat_model, "--json", two, "--out", tmp_path / out, "--single-pass"]
        assert analyze(*usual, *arguments).exit_code == 0
        maps.append(BlockMap.load(tmp_path / out / "two-00002.safetensors").mass)
    assert 1e-6 < (maps[0] - maps[1]).abs().max() < 0.2
    # Bits belong to the result: not to be mixed in one folder.
    mixed = analyze(*usual, "--resume")
    assert mixed.exit_code == 1 and "bit was true and is false" in said(mixed)


def test_ways_agree(chat_model, two, tmp_path):
    ways = {"sequential": [], "chunked": ["--use-chunked"], "single": ["--single-pass"]}
    maps = []
    for way, arguments in ways.items():
        result = analyze("--model", chat_model, "--json", two, "--out", tmp_path / way, *arguments)
        assert result.exit_code == 0, said(result)
        maps.append(BlockMap.load(tmp_path / way / "two-00002.safetensors").mass)
    assert max((maps[0] - one).abs().max() for one in maps) < 1e-5


def test_gradient_checkpointing_is_accepted_and_said_once_to_save_nothing(chat_model, two, tmp_path):
    result = analyze("--model", chat_model, "--json", two, "--out", tmp_path, "--use-gradient-checkpointing")
    assert result.exit_code == 0
    assert len(said(result).splitlines()) == 1 and "saves nothing here" in said(result)


def test_demo(tmp_path):
    cut = ["--max-tokens", "300", "--truncate", "left", "--single-pass", "--no-pictures"]
    result = analyze("--mode", "demo", "--out", tmp_path, *cut)
    assert result.exit_code == 0, said(result)
    assert BlockMap.load(tmp_path / "demo.safetensors").metadata["texts"][-1] == "Singing Pearl Violin"


def test_pictures_of_one_conversation(chat_model, tmp_path):
    pytest.importorskip("attnpatch.viewing.page")
    one = tmp_path / "one.json"
    one.write_text(json.dumps(chats.conversation(0)))
    for out, arguments, drawn in (("a", [], True), ("b", ["--no-pictures"], False)):
        result = analyze("--model", chat_model, "--json", one, "--out", tmp_path / out, *arguments)
        assert result.exit_code == 0, said(result)
        assert (tmp_path / out / "pictures" / "one-00001" / "block_map.png").exists() == drawn


WRONG = {
    "no_model": (["--json", "{two}"], "--model is missing"),
    "no_json": (["--model", "{model}"], "--json is missing"),
    "model_nowhere": (["--model", "./nowhere", "--json", "{two}"], "no such folder"),
    "model_a_file": (["--model", "{two}", "--json", "{two}"], "is a file"),
    "model_empty": (["--model", "{empty}", "--json", "{two}"], "no config.json"),
    "model_damaged": (["--model", "{damaged}", "--json", "{two}"], "{damaged}"),
    "json_nowhere": (["--model", "{model}", "--json", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
    "json_a_folder": (["--model", "{model}", "--json", "{empty}"], "Is a directory"),
    "out_a_file": (["--out", "{two}"], "is a file"),
    "out_below_a_file": (["--out", "{two}/below"], "cannot write"),
    "out_unwritable": (["--out", "/proc/none"], "cannot write into /proc/none"),
    "layers_text": (["--layers", "first"], "--layers first: give all, last"),
    "layers_none": (["--layers", "7"], "the layers with attention are 0, 1"),
    "heads_text": (["--heads", "0,,1"], "--heads 0,,1: give mean, all"),
    "heads_none": (["--heads", "7"], "there are 4 heads"),
    "blocks": (["--blocks", "0"], "--blocks 0"),
    "memory": (["--max-memory", "much"], "--max-memory much"),
    "memory_size": (["--max-memory", "cpu=much"], "--max-memory cpu='much'"),
    "dtype": (["--dtype", "int8"], "int8"),
    "bits": (["--use-4bit", "--use-8bit"], "choose one"),
    "methods": (["--use-chunked", "--single-pass"], "choose one"),
    "rows": (["--sample-rows", "4"], "without --use-sampling"),
    "piece": (["--chunk-size", "4"], "without --use-chunked"),
    "gradient": (["--weighting", "gradient", "--use-chunked"], "needs a single pass"),
    "demo": (["--mode", "demo", "--json", "{two}"], "--mode demo brings"),
    "device": (["--device-map", "nonsense"], "nonsense"),
    "device_not_there": (["--device-map", "cuda:77"], "cannot be loaded"),
}
# Those that the command line alone shows to be wrong.
USAGE = "no_model no_json layers_text heads_text blocks memory memory_size bits methods rows piece gradient demo dtype layers_none heads_none".split()


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_one_line_and_nothing_is_written(name, chat_model, two, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir(), (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    places = {"model": chat_model, "two": two, "empty": tmp_path / "empty", "damaged": tmp_path / "damaged"}
    arguments, words = WRONG[name]
    arguments = [argument.format(**places) for argument in arguments]
    if name not in ("no_model", "no_json", "demo") and "--model" not in arguments:
        arguments = ["--model", chat_model, "--json", two, *arguments]
    result = analyze(*arguments)
    lines = said(result).splitlines()
    assert result.exit_code == (2 if name in USAGE else 1) and len(lines) == 1, result.output
    assert lines[0].startswith("attnpatch: ") and words.format(**places) in lines[0], lines[0]
    assert not (tmp_path / "attention_maps").exists()


def test_usage_errors(two):
    for arguments in (
        ["--mode", "other"],
        ["--normalize", "best"],
        ["--sample-rows", "x"],
        ["--sample-rows", "0"],
        ["--chunk-size", "0"],
        ["--head-chunk-size", "0"],
        ["--max-tokens", "0"],
        ["--truncate", "up"],
    ):
        result = analyze(*arguments)
        assert result.exit_code == 2 and arguments[0] in said(result)


def test_a_file_in_which_nothing_is_good(chat_model, tmp_path):
    for name, content, reason in (
        ("binary.json", b"\x00\x01\x02" * 40, "binary"),
        ("empty.jsonl", b"", "the file is empty"),
        ("text.json", b"hello", "not JSON"),
        ("line.jsonl", b'{"messages": "' + b"x" * 10_000_000 + b'"}', "its messages are text"),
    ):
        (tmp_path / name).write_bytes(content)
        result = analyze("--model", chat_model, "--json", tmp_path / name, "--out", tmp_path / f"{name}.out")
        (line,) = said(result).splitlines()
        assert result.exit_code == 1 and line.startswith(name) and reason in line
        assert len(line) < 300
        assert "results: none" in result.stdout and not (tmp_path / f"{name}.out").exists()


def test_names_of_files_that_are_no_text(chat_model, two, tmp_path):
    """Bytes that are no UTF-8, and a console that knows few characters: still no traceback."""
    odd = tmp_path / os.fsdecode(b"o\xffd\xc3\xa9")
    try:
        odd.mkdir()
    except OSError:
        pytest.skip("no such names on this file system")
    source = odd / os.fsdecode(b"t\xffo.jsonl")
    source.write_text(two.read_text() + "not json\n")
    arguments = ["--model", chat_model, "--json", source, "--out", odd / "out", "--single-pass"]
    code = (
        f"import sys; sys.argv = {['attnpatch', 'analyze', *map(str, arguments)]!r}\n"
        "from attnpatch.__main__ import main\ntry: main()\nexcept SystemExit as end: assert end.code == 3\n"
        f"sys.argv = {['attnpatch', 'merge', str(odd / 'out')]!r}\n"
        "try: main()\nexcept SystemExit as end: assert end.code in (0, 1)\n"
    )
    done = fresh.interpreter("-c", code, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "record 3 (line 3): not JSON" in done.stderr


def test_too_long_a_conversation_fails_alone(chat_model, tmp_path):
    long = {"messages": [{"role": "user", "content": "stone " * 3000}]}
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (long, chats.conversation(1))))
    result = analyze("--model", chat_model, "--json", path, "--out", tmp_path / "out")
    assert result.exit_code == 3
    assert said(result).startswith("chats.jsonl record 1 (line 1): the conversation has ")
    assert (tmp_path / "out" / "chats-00002.safetensors").exists()


def test_resume_goes_on_and_nothing_is_overwritten(chat_model, mixed, tmp_path):
    usual = ["--model", chat_model, "--json", mixed, "--out", tmp_path, "--single-pass"]
    assert analyze(*usual).exit_code == 3
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    index = chats.index_of(tmp_path)
    again = analyze(*usual)
    assert again.exit_code == 1 and "--resume, or give another folder" in said(again)
    other = analyze(*usual, "--resume", "--layers", "last")
    assert other.exit_code == 1 and 'layers was "all" and is "last"' in said(other)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")} == files
    lost = tmp_path / "mixed-00001.safetensors"
    lost.unlink()
    resumed = analyze(*usual, "--resume")
    assert resumed.exit_code == 3 and len(said(resumed).splitlines()) == len(chats.BAD)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert {path for path in after if after[path] != files[path]} == {lost}
    dropped = ("seconds", "peak_bytes")
    plain = [{key: value for key, value in line.items() if key not in dropped} for line in index]
    assert [{k: v for k, v in line.items() if k not in dropped} for line in chats.index_of(tmp_path)] == plain


# --------------------------------------------------------------------------------------------- in fresh processes

GUIDE = [
    "--mode real --model {model} --json {json} --use-gradient-checkpointing",
    pytest.param(
        "--mode real --model {model} --json {json} --use-4bit --use-gradient-checkpointing",
        marks=pytest.mark.long,
    ),
    pytest.param("--mode real --model {model} --json {json} --use-sampling", marks=pytest.mark.long),
    pytest.param(
        "--mode real --model {model} --json {json} --use-chunked --use-gradient-checkpointing",
        marks=pytest.mark.long,
    ),
]


@pytest.mark.parametrize("line", GUIDE)
def test_the_lines_of_the_guide(line, chat_model, two, tmp_path):
    done = fresh.run(
        EXAMPLES / "block_attention.py", *line.format(model=chat_model, json=two).split(), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert len(list((tmp_path / "attention_maps").glob("two-*.safetensors"))) == 2


def test_the_import_of_the_guide():
    done = fresh.run("-c", "from block_attention import BlockAttentionAnalyzer", cwd=EXAMPLES)
    assert done.returncode == 0, done.stderr


def test_help_says_what_the_exit_codes_mean_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom attnpatch.cli.app import app\n"
        "try: app(['analyze', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'accelerate', 'matplotlib'} & set(sys.modules)"
    )
    done = fresh.interpreter("-c", code)
    assert done.returncode == 0, done.stderr
    assert "3 some conversations failed" in " ".join(done.stdout.replace("│", " ").split())
