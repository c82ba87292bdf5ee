"""``attnpatch explain``: what it prints, and one line for what is wrong."""

import pytest
from typer.testing import CliRunner

from attnpatch.cli.app import app


@pytest.fixture
def folder(tmp_path, monkeypatch):
    from transformers import LlamaConfig

    config = LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    return CliRunner().invoke(app, ["explain", *arguments])


@pytest.mark.usefixtures("folder")
def test_command():
    done = run("model", "--seq-len", "2048", "--attention", "eager", "--min-free", "900TB", "--rows", "32",
               "--dtype", "bfloat16", "--batch", "2")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "LlamaForCausalLM: 2 x 2048 tokens" in done.output and "less than min_free 900 TB" in done.output
    assert "32 x " in done.output


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["empty", "--seq-len", "9"], "model 'empty' has no config.json"),
        (["./none", "--seq-len", "9"], "model './none': there is no such folder"),
        (["some/model", "--seq-len", "9"], "model 'some/model' is no folder, and not on the hub"),
        (["model", "--seq-len", "0"], "--seq-len 0: give a whole number"),
        (["model", "--seq-len", "9", "--dtype", "int7"], "--dtype int7: give float32"),
        (["model", "--seq-len", "9", "--attention", "nix"], "model 'model' cannot be built of its config"),
        (["model", "--seq-len", "9", "--mode", "fast"], "--mode 'fast' is not accepted"),
        (["model", "--seq-len", "9", "--device", "abacus"], "device='abacus'"),
    ],
)
def test_command_says_what_is_wrong_in_one_line(arguments, says):
    done = run(*arguments)
    assert done.exit_code == (2 if {"--mode", "--dtype", "0"} & {*arguments} else 1), done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("attnpatch: ") and says in line
    assert done.stdout == ""
