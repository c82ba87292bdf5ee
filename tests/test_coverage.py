"""A part of the sweep over all architectures of transformers, and that the sweep notices what it is there for.

All of them: ``python -m tests.compat --transformers``, which writes docs/coverage.md.
"""

import pathlib
import re

import pytest
import torch
from compat import by_rows_transformers, models_transformers, sweep
from torch import nn

import attnpatch

transformers = pytest.importorskip("transformers")

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "coverage.md"
# One or two of each kind: decoders, hybrids, latent attention, shapes by layer, encoders, both, images, sound, several.
NAMES = """llama gpt_oss gemma3n_text gemma4_text deepseek_v3 qwen3_next jamba mixtral gptj bloom falcon
bert deberta-v2 modernbert xlnet big_bird t5 bart vit swinv2 detr perceiver wav2vec2 whisper clip qwen2_vl
llava llava_next idefics3 blip-2 sam reformer nemotron_h granite_swa dots3_note_text mamba""".split()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.long] if name == "dots3_note_text" else []) for name in NAMES],
)
def test_architectures(name):
    outcome = by_rows_transformers.examine(name)
    assert outcome.runs, outcome.problem
    for implementation, run in outcome.runs.items():
        told = f"{name}, {implementation}: {run}"
        assert not run.raised and run.equal and run.finite, told
        assert run.by_rows == run.sites and not run.missed, told
        assert bool(run.sites) == (name != "mamba"), told


def test_page_is_of_these_architectures():
    """Every architecture of the installed transformers is in the page, and the page says the targets are reached."""
    text = PAGE.read_text()
    absent = [name for name in models_transformers.model_classes() if f"`{name}`" not in text]
    assert not absent, "run make coverage"
    built = int(re.search(r"(\d+) built and called", text).group(1))
    by_rows, sites = map(int, re.search(r"went by rows: (\d+) of (\d+)", text).groups())
    bits, runs = map(int, re.search(r"equal to the last bit: (\d+) of (\d+)", text).groups())
    assert built >= by_rows_transformers.BUILT
    assert by_rows >= by_rows_transformers.SHARE_BY_ROWS * sites
    assert bits >= by_rows_transformers.SHARE_BITS * runs
    assert re.search(r"otherwise: 0\b", text) and "raise only when patched: 0" in text


class Hidden(nn.Module):
    """Attention that its own module does not compute."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.query(x) @ self.key(x).mT).softmax(-1) @ self.value(x)


class Attention(Hidden):
    """The same under a name that says so."""


def compared(model: nn.Module, x: torch.Tensor) -> by_rows_transformers.Run:
    return by_rows_transformers.compare(model, {"x": x}, sweep.run(model, {"x": x}))


def test_attention_is_seen():
    """Several query rows, and one."""
    found = compared(Attention(), torch.randn(2, 11, 8))
    assert (found.sites, found.by_rows, found.equal) == (1, 1, 2)
    found = compared(Attention(), torch.randn(2, 1, 8))
    assert (found.sites, found.one_row) == (0, {"Attention": 1})


def test_attention_that_is_missed_is_reported():
    """What is no site, and what a site computes beside SDPA and products."""
    model = nn.Module()
    model.inner = Hidden()
    model.attention = Attention()
    model.forward = lambda x: model.inner(x) + model.attention(x)
    native = sweep.run(model, {"x": (x := torch.randn(2, 11, 8))})
    result = by_rows_transformers.Run()
    with sweep.seen({"x": x}) as seen:
        sweep.run(model, {"x": x})
    names = {module: name for name, module in model.named_modules()}
    with attnpatch.patched(model, sites=["attention"], mode="always"):
        assert sweep.equal(sweep.run(model, {"x": x}), native)
        sites = {site.name: site for site in attnpatch.report(model).sites}
    by_rows_transformers._judge(result, seen.rows, names, sites)
    assert (result.sites, result.by_rows, result.missed) == (2, 1, {"Hidden": 1})


def test_differences_are_reported():
    first, second = [torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.5])]
    assert not sweep.equal(first, second)
    assert sweep.difference(first, second) == pytest.approx(0.2)
    assert sweep.difference(first, [torch.zeros(3)]) == float("inf")


def test_process_that_dies_is_one_line():
    def dies(name):
        raise SystemExit(3)

    outcome = sweep.apart(dies, "anything", by_rows_transformers.Outcome)
    assert outcome.problem == "the process died"
