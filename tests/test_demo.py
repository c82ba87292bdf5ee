"""The demo: end to end as a user starts it, and its parts on small input."""

import io
import json
import shlex
import sys
from pathlib import Path

import fresh
import pytest
import torch
from rich.console import Console

import attnpatch
from attnpatch.demo import run, worker
from attnpatch.demo.conversation import DemoConversation

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "demo_model"))

from generator import held_out_conversation

MODEL = run.FOLDER / "model"
PNG = b"\x89PNG\r\n\x1a\n"


def finding(mass, reply="Lazy Ivory Comet", layer=2):
    """What ``look`` would return for an answer that attends like ``mass``."""
    blocks = len(mass) + 1
    rows = torch.eye(blocks).repeat(3, 1, 1)
    rows[layer, -1] = torch.tensor([*mass, 1 - sum(mass)])
    labels, sizes = [str(i) for i in range(blocks)], torch.ones(blocks, dtype=torch.int64)
    metadata = {"tokens": blocks}
    block_map = attnpatch.BlockMap(rows, [0, 1, 2], labels, labels, sizes, sizes, metadata=metadata)
    return run.Finding(reply, block_map, layer, block_map.mass[layer, -1, :-1])


@pytest.fixture
def conversation():
    """Five messages, the fact in the second."""
    said = ["Welcome.", "Marta's boat is called Lazy Ivory Comet.", "[bold]Noted.", "How are [you?", "Who?"]
    roles = ["system", "user", "assistant", "user", "user"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    return DemoConversation(messages, fact_message=1, answer="Lazy Ivory Comet", asked=[])


def printed(show, *arguments):
    """What ``show(console, ...)`` prints where there is no terminal."""
    console = Console(file=io.StringIO(), width=80, highlight=False)
    show(console, *arguments)
    return console.file.getvalue()


def measured(way, difference=0.0, counts=None):
    return worker.Measured("sdpa", way, 1.25, 52_000_000, counts, difference, difference == 0)


def test_table_tells_bits_from_rounding():
    counts = {"native": 0, "by_rows": 4, "fused": 0, "materialised": 0}
    same = printed(worker.show_runs, [measured("native"), measured("rows", 0.0, counts)])
    rounded = printed(worker.show_runs, [measured("native"), measured("rows", 2.6e-5, counts)])
    assert "same to the" in same and "last bit" in same and "round differently" not in same
    assert "up to 3e-05" in rounded and "last bit" not in rounded and "round differently" in rounded
    for text in (same, rounded):
        assert "not patched" in text and "4 by rows" in text and "fused │" not in text
        assert "1.25 s" in text and "52 MB" in text


def test_what_the_report_counted_is_shown_in_full():
    assert worker.counted(
        {"native": 0, "by_rows": 3, "fused": 1, "materialised": 2, "largest": 8_190_720}
    ) == ("3 by rows\n1 fused\n2 materialised")


def test_the_fact_is_named_when_it_is_found(conversation):
    text = printed(run.tell, conversation, finding([0.1, 0.6, 0.05, 0.1, 0.1]))
    assert "Message 1 is the one that holds the fact." in text
    assert "the same" in text
    assert "60.0%  1 user: Marta's boat is called Lazy Ivory Comet." in text


def test_a_miss_is_admitted(conversation):
    text = printed(run.tell, conversation, finding([0.1, 0.2, 0.05, 0.5, 0.1], reply="Shy Comet"))
    assert "That is not the message that holds the fact: message 1 gets 20.0%." in text
    assert "the same" not in text and "Lazy Ivory Comet" in text


def test_messages_are_printed_as_they_are(conversation):
    text = printed(run.tell, conversation, finding([0.1, 0.1, 0.6, 0.2, 0.0]))
    assert "2 assistant: [bold]Noted." in text and "3 user: How are [you?" in text


def test_the_layer_is_the_one_the_evaluation_chose(tmp_path):
    assert run.trained_layer(tmp_path) is None
    (tmp_path / "evaluation.json").write_text('{"layer": 3}')
    assert run.trained_layer(tmp_path) == 3


def test_pictures_and_figures_are_written(conversation, tmp_path):
    found = finding([0.1, 0.6, 0.05, 0.1, 0.1])
    written = run.write(tmp_path, conversation, found)
    for path in written.values():
        assert path.is_file() and path.parent == tmp_path
    assert all(path.read_bytes()[:8] == PNG for path in written.values() if path.suffix == ".png")
    assert attnpatch.BlockMap.load(written["the block map"]) == found.block_map


def test_the_three_lines_do_what_they_say(tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    names = {"model": model, "inputs": {"input_ids": torch.arange(300)[None] % 64}}
    monkeypatch.chdir(tmp_path)
    exec(f"{run.SNIPPET}\nmaps.block_map.plot('map.png')", names)
    assert names["maps"].block_map.mass.shape == (2, 3, 3)
    assert (tmp_path / "map.png").read_bytes()[:8] == PNG


@pytest.mark.parametrize("terminal", [True, False])
def test_a_process_that_fails_is_one_line_and_a_bar_needs_a_terminal(terminal, tmp_path):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    with pytest.raises(worker.DemoError, match=r"^the eager run \(native\) failed: FileNotFoundError[^\n]*$"):
        worker.measure_all(console, MODEL, tmp_path / "missing.json")
    assert ("eager, native" in console.file.getvalue()) == terminal
    assert terminal or console.file.getvalue().strip() == ""


@pytest.fixture(scope="module")
def shipped():
    """The trained model and its tokenizer."""
    return worker.load(MODEL, "sdpa")


def test_attention_of_the_answer_is_the_dense_one(shipped):
    model, tokenizer = shipped
    conversation = held_out_conversation(3, 450)
    found = run.look(model, tokenizer, conversation, 0)
    messages = [*conversation.messages, {"role": "assistant", "content": found.reply}]
    ends = [
        len(tokenizer.apply_chat_template(messages[: count + 1])["input_ids"])
        for count in range(len(messages))
    ]
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt")["input_ids"]
    eager, _ = worker.load(MODEL, "eager")
    with torch.inference_mode():
        rows = eager(ids, output_attentions=True).attentions[0][0, :, ends[-2] :].double().mean((0, 1))
    starts = [0, *ends[:-2]]
    dense = [rows[start:end].sum() for start, end in zip(starts, ends[:-1], strict=True)]
    torch.testing.assert_close(found.mass.double(), torch.stack(dense), atol=1e-6, rtol=0)


def test_without_an_evaluation_the_question_does_not_choose_the_layer(shipped):
    model, tokenizer = shipped
    found = run.look(model, tokenizer, held_out_conversation(4, 450), None)
    earlier = found.block_map.mass[:, -1, :-2].max(-1).values
    assert found.layer == int(earlier.argmax())


@pytest.mark.slow
def test_demo_from_start_to_end(tmp_path):
    done = fresh.run("-m", "attnpatch", "demo", "--out", "shown", "--json", "figures.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    commands = [line.strip() for line in done.stdout.splitlines() if " --" in line]
    assert max(len(line) for line in done.stdout.splitlines() if line.strip() not in commands) <= 80
    figures = json.loads((tmp_path / "figures.json").read_text())
    check_runs(figures["runs"])
    assert figures["tokens"] >= 4096
    assert figures["exact"] and figures["answer"] in done.stdout
    assert figures["strongest_is_fact"]
    assert f"Message {figures['fact_message']} is the one that holds the fact." in done.stdout
    for name in ("answer.png", "block_map.png"):
        assert (tmp_path / "shown" / name).read_bytes()[:8] == PNG
        assert str(Path("shown") / name) in done.stdout
    block_map = attnpatch.BlockMap.load(tmp_path / "shown" / "block_map.safetensors")
    assert block_map.mass.shape[-1] == figures["messages"] + 1
    assert run.SNIPPET.splitlines()[0] in done.stdout
    # What it proposes next can be pasted.
    assert [line.split("attnpatch ", 1)[1].split()[0] for line in commands] == ["view", "analyze", "explain"]
    for command in (commands[0], commands[2]):
        arguments = shlex.split(command.split("attnpatch ", 1)[1])
        again = fresh.run("-m", "attnpatch", *arguments, cwd=tmp_path)
        assert again.returncode == 0, again.stderr
    assert (tmp_path / "shown" / "block_map.html").stat().st_size > 1e5


def check_runs(runs):
    """By rows: eager to the last bit in less than half the memory, sdpa to rounding, nothing materialised."""
    by_name = {(one["implementation"], one["way"]): one for one in runs}
    assert list(by_name) == list(worker.CASES)
    eager, rows = by_name["eager", "native"], by_name["eager", "rows"]
    assert rows["identical"] and rows["difference"] == 0
    assert 0 < rows["peak"] < eager["peak"] / 2
    # Were it 0, the comparison would be suspect: the fused kernel sums in another order. Logits reach tens.
    assert 0 < by_name["sdpa", "rows"]["difference"] < 1e-2
    for one in runs:
        assert one["seconds"] > 0
        if one["way"] == "rows":
            assert one["counts"]["by_rows"] > 0 and one["counts"]["materialised"] == 0
        else:
            assert one["counts"] is None
