"""Values that cannot be meant are refused: one line that names what was given and what is accepted; usage ends with 2."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_analyzer import CHATML, MESSAGES, llama, sharp
from test_blocks import make_tokenizer
from typer.testing import CliRunner

import attnpatch
from attnpatch.cli.app import app
from attnpatch.errors import AttnpatchError

# Of the wrong type for most options.
ODD = (math.nan, 1.5, object(), [None], np.array([]), b"1")
COUNTS = (*ODD, -1, 0, "", "x", True, [])
FLAGS = (*ODD, -1, 0, 1, "", "x", [], None)
TEXTS = (*ODD, -1, "", True, [], {})
# For each call, its options and values that none of them can mean.
VALUES = {
    "capture": {
        "heads": COUNTS, "layers": COUNTS, "sites": TEXTS, "steps": COUNTS, "measures": (*ODD[:4], -1, None, "x"),
        "sample_rows": COUNTS, "seed": (*ODD, "", "x", True, None, 2**70), "weighting": TEXTS,
    },
    "token_scores": {"window": COUNTS, "per": TEXTS, "layers": COUNTS, "sites": TEXTS},
    "heads": {"probes": (*ODD, -1, "", "x", None, []), "local": COUNTS, "layers": COUNTS, "sites": TEXTS},
    "apply": {
        "sites": TEXTS, "layers": COUNTS, "mode": TEXTS, "min_tokens": (*ODD, -1, "x"), "headroom": (*COUNTS[:1], 0, 2, "x"),
        "min_free": (math.nan, -1, "", "2", "2 parsecs", [], True), "workspace": (math.nan, 0, "1KB", "10s", []),
        "rows": COUNTS, "heads": COUNTS, "retry_on_oom": FLAGS, "fuse": FLAGS, "max_allocation": (math.nan, 0, "5"),
    },
    "explain": {"seq_len": (*COUNTS, 10**30), "batch": (*COUNTS, 10**30), "device": (*TEXTS, "x")},
    "analyzer": {
        "blocks": COUNTS, "layers": COUNTS, "heads": COUNTS, "measures": (*ODD[:4], -1, None), "sample_rows": COUNTS,
        "seed": (*ODD, "x", None), "weighting": TEXTS, "target": COUNTS, "max_tokens": COUNTS, "truncate": TEXTS,
        "chunk_size": COUNTS, "template_options": COUNTS, "head_chunk_size": COUNTS, "policy": (*ODD, -1, "x", [1]),
        "use_gradient_checkpointing": FLAGS, "load_in_4bit": FLAGS, "device_map": ("cpu",), "torch_dtype": ("float32",),
        "max_memory": ({0: 1},), "model": COUNTS, "tokenizer": ODD[:5],
    },
    "analyze": {"messages": COUNTS, "method": TEXTS, "normalize": TEXTS},
    "generation": {"max_new_tokens": COUNTS, "generate": (*ODD, -1, "x"), "normalize": TEXTS, "steps": (*ODD, "x", -1)},
    "compare": {"a": TEXTS, "b": TEXTS},
    "top": {"n": COUNTS, "query": (*ODD, "x", 10**30), "own": (*ODD, 1, "x")},
    "select": {"layer": (*ODD, "x", 9), "head": (*ODD, "x", 9), "sequence": (*ODD, "x", 9), "step": (*ODD, "x", 9)},
    "plot": {"path": (*ODD, -1, True), "title": (*ODD, -1), "scale": TEXTS, "ax": COUNTS, "layer": ODD, "step": ODD},
    "load": {"path": (*ODD, -1, None)},
    "from_attentions": {"heads": TEXTS, "layers": ("x", b"1"), "metadata": (*ODD, -1, "x"), "attentions": COUNTS},
    "repeated": {"vocabulary": (*ODD, -1, "x"), "count": COUNTS, "length": COUNTS, "seed": (*ODD, "x")},
    "messages": {"messages": COUNTS},
    "fixed": {"size": COUNTS},
}  # fmt: skip
ROWS = [(name, option) for name, options in VALUES.items() for option in options]


@pytest.fixture(scope="module")
def calls():
    """Each call with sensible values, of which one is replaced."""
    tokenizer = make_tokenizer(CHATML)
    model = sharp(llama(len(tokenizer) + 8))
    ids = torch.arange(5, 25)[None]

    def captured(**given):
        with attnpatch.capture(model, attnpatch.Blocks.fixed(8), **given) as maps:
            model(ids)
        return maps.block_map

    def scored(**given):
        with attnpatch.token_scores(model, **given):
            model(ids)

    def patched(**given):
        with attnpatch.patched(model, **given):
            pass

    def analyzer(**given):
        return attnpatch.BlockAttentionAnalyzer(**{"model": model, "tokenizer": tokenizer, **given})

    weights = torch.full((1, 1, 4, 4), 0.25).tril()
    return {
        "capture": captured,
        "token_scores": scored,
        "heads": lambda **given: attnpatch.heads(model, **{"probes": [[5, 6, 5, 6]], **given}),
        "apply": patched,
        "explain": lambda **given: attnpatch.explain(model, **{"seq_len": 64, **given}),
        "analyzer": lambda **given: analyzer(**given).analyze(MESSAGES),
        "analyze": lambda **given: analyzer().analyze(**{"messages": MESSAGES, **given}),
        "generation": lambda **given: analyzer().analyze_generation(MESSAGES, **{"max_new_tokens": 2, **given}),
        "compare": lambda **given: attnpatch.compare(**{"a": captured(), "b": captured(), **given}),
        "top": lambda **given: captured().top(**given),
        "select": lambda **given: captured().select(**given),
        "plot": lambda **given: captured().plot(**given),
        "load": lambda **given: attnpatch.load(**given),
        "from_attentions": lambda **given: attnpatch.BlockMap.from_attentions(
            **{"attentions": [weights / weights.sum(-1, keepdim=True)], "blocks": attnpatch.Blocks.fixed(2), **given}
        ),
        "repeated": lambda **given: attnpatch.Probes.repeated(**{"vocabulary": range(99), "length": 9, **given}),
        "messages": lambda **given: attnpatch.Blocks.messages(tokenizer, **{"messages": MESSAGES, **given}),
        "fixed": lambda **given: attnpatch.Blocks.fixed(**{"size": 8, **given}),
    }  # fmt: skip


@pytest.mark.parametrize(("name", "option"), ROWS)
def test_what_cannot_be_meant_is_one_line(calls, name, option):
    for value in VALUES[name][option]:
        try:
            calls[name](**{option: value})
        except AttnpatchError as error:
            line = str(error)
            assert "\n" not in line and len(line) > 25, line
            assert any(
                word in line
                for word in ("give", "accepted", "there is no", "there are", "leave", "capture with", "Load")
            ), line
        else:
            pytest.fail(f"{name}({option}={value!r}) is accepted")


DEMO = str(Path(attnpatch.__file__).parent / "demo" / "model")
COUNT = ("-1", "0", "nan", "", "x", "1.5", "10s")
ANALYZE = ["analyze", "--model", DEMO, "--json", "c.json", "--out", "o"]
REPLAY = ["replay", "--model", DEMO, "--transcript", "c.json", "--out", "o"]
EXPLAIN = ["explain", DEMO, "--seq-len", "64"]
USAGE = {
    "analyze --sample-rows": ([*ANALYZE, "--use-sampling"], COUNT),
    "analyze --chunk-size": ([*ANALYZE, "--use-chunked"], COUNT),
    **{f"analyze {name}": (ANALYZE, COUNT) for name in ("--head-chunk-size", "--max-tokens", "--blocks")},
    "analyze --seed": (ANALYZE, ("-1", "nan", "", "x", "1.5", "9" * 30)),
    "analyze --layers": (ANALYZE, ("", "x", "99", "-99", "0,", "1.5")),
    "analyze --heads": (ANALYZE, ("", "x", "99", "0,,1")),
    **{f"analyze {name}": (ANALYZE, ("", "x")) for name in ("--normalize", "--weighting", "--truncate", "--dtype", "--mode")},
    "analyze --max-memory": (ANALYZE, ("", "x", "0", "0=", "0=x", "cpu=-1", "cpu=10", "0=nan", "0=20parsecs")),
    **{f"analyze {name}": (ANALYZE, ("",)) for name in ("--out", "--json", "--model", "--device-map")},
    "replay --top": (REPLAY, ("-1", "x", "nan", "", "1.5")),
    "replay --layers": (REPLAY, ("x", "", "1.5")),
    "explain --seq-len": (EXPLAIN[:2], (*COUNT, "9" * 30)),
    "explain --batch": (EXPLAIN, (*COUNT, "9" * 30)),
    **{f"explain {name}": (EXPLAIN, ("", "x")) for name in ("--dtype", "--mode", "--fuse", "--retry-on-oom")},
    **{f"explain {name}": (EXPLAIN, ("",)) for name in ("--attention", "--device")},
    "explain --min-free": (EXPLAIN, ("2", "-1", "nan", "", "2 parsecs", "1e9", "10s")),
    "explain --headroom": (EXPLAIN, ("0", "2", "nan", "-1", "50%", "")),
    "explain --workspace": (EXPLAIN, ("0", "1KB", "x", "")),
    "explain --max-allocation": (EXPLAIN, ("0", "5", "x", "")),
    **{f"explain {name}": (EXPLAIN, ("0", "-1", "x", "1.5", "")) for name in ("--rows", "--heads")},
    "explain --min-tokens": (EXPLAIN, ("-1", "x", "1.5", "")),
    "view --out": (["view", "o"], ("",)),
    "merge --by": (["merge", "o"], ("", "x")),
    "merge --out": (["merge", "o"], ("", "x.txt")),
    "demo --out": (["demo"], ("",)),
    "run --capture": (["run", "--blocks", "8", "s.py"], ()),
}  # fmt: skip


@pytest.mark.parametrize("name", [*USAGE])
def test_usage_ends_with_2(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.json").write_text(
        json.dumps([{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}])
    )
    Path("s.py").write_text("print('ran')")
    before, values = USAGE[name]
    option = name.split()[1]
    for arguments in [[*before, option, value] for value in values] or [before]:
        found = CliRunner().invoke(app, arguments)
        said = found.output + (found.stderr if found.stderr else "")
        assert found.exit_code == 2 and "Traceback" not in said, (arguments, said)
    assert not Path("o").exists()


def test_arguments_of_a_script_may_be_empty(tmp_path, monkeypatch):
    """What is after the script is the script's own."""
    given = []
    monkeypatch.setattr(
        "attnpatch.activation.launcher.launch", lambda script, *more: given.append((script, *more[:1]))
    )
    CliRunner().invoke(app, ["run", "--report", "s.py", "", "--name="])
    CliRunner().invoke(app, ["run", "-m", "some.module", "", "--name="])
    assert given == [(["s.py", "", "--name="], None), (["", "--name="], "some.module")]
    for arguments in (["run", "--capture", "", "s.py"], ["run", "--sites=", "s.py"]):
        assert CliRunner().invoke(app, arguments).exit_code == 2
    assert len(given) == 2
