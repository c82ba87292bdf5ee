"""What ``make test-hosts`` makes of two runs of the hosts' tests."""

import importlib.util
import json
import pathlib
import sys

import pytest
import torch

_PATH = pathlib.Path(__file__).parent / "hosts" / "run.py"
_SPEC = importlib.util.spec_from_file_location("host_tests_run", _PATH)
runner = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(runner)


def a_run(outcome="passed", value=1.0, **more):
    outcomes = {
        "Llama::test_a": {"outcome": outcome, "reason": "why"},
        "Llama::test_b": {"outcome": "skipped", "reason": "no"},
    }
    return {
        "outcomes": {**outcomes, **more},
        "written": {"Llama.test_a": [{"scores": torch.full((2,), value)}]},
    }


@pytest.mark.parametrize(
    ("patched", "words"),
    [
        (a_run(), None),
        (a_run("failed"), "failed why"),
        (a_run("skipped"), "skipped why"),
        (a_run(value=1.001), "scores: by 0.001"),
        (a_run(value=float("nan")), "scores: by nan"),
        (a_run(more={"outcome": "passed", "reason": ""}), "passed"),
        ({"outcomes": {}, "written": {}}, "was not run"),
        ({**a_run(), "written": {}}, "0 items instead of 1"),
    ],
)
def test_what_differs_is_named_and_counted(patched, words, capsys):
    count = runner.show(a_run(), patched)
    shown = capsys.readouterr().out
    assert (count > 0) == (words is not None)
    assert words is None or words in shown
    assert "no" in shown.partition("skipped by")[2]


def test_without_a_difference_the_last_column_is_zero(capsys):
    runner.show(a_run(), a_run())
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("all")]
    assert row.split() == ["all", "1", "1", "0", "0"]


@pytest.mark.parametrize(
    "parts", [["failed"], ["passed", "failed"], ["failed", "passed"], ["failed", "skipped"]]
)
def test_what_failed_is_written_down_as_failed(parts):
    lines = [json.dumps({"test": "Llama::test_a", "outcome": part, "reason": part}) for part in parts]
    (line,) = runner.by_test(lines).values()
    assert (line["outcome"], line["reason"]) == ("failed", "failed")


def test_pip_is_asked_for_what_is_not_there(tmp_path, monkeypatch):
    asked = tmp_path / "asked"
    write = f"import pathlib, sys; pathlib.Path({str(asked)!r}).write_text(' '.join(sys.argv[1:]))"
    monkeypatch.setattr(runner, "PIP", [sys.executable, "-c", write])
    monkeypatch.setattr(runner, "KEPT", tmp_path)
    (tmp_path / "packages" / "fetched_before").mkdir(parents=True)
    runner.packages(("torch", "fetched_before"))
    assert not asked.exists()
    runner.packages(("torch", "fetched_before", "never_heard_of"))
    assert asked.read_text().split()[-1] == "never_heard_of"
    assert "torch" not in asked.read_text().split()
