"""The shipped model on a few held-out conversations; `make demo-figures` measures 200."""

import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples" / "demo_model"))

import measure


@pytest.fixture(scope="module")
def loaded():
    return measure.load(measure.MODEL)


def test_it_answers_from_the_right_message(loaded):
    figures = measure.measure(*loaded, layer=3, number=6, first=measure.LAYER_SEEDS)
    assert figures["exact"] >= 5 / 6
    assert figures["fact_block_strongest"] >= 5 / 6
    assert figures["mean_mass_on_fact"] > 0.5


def test_an_untrained_model_does_not(loaded):
    """What is measured can fail."""
    from transformers import AutoModelForCausalLM

    trained, tokenizer = loaded
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(trained.config).eval()
    figures = measure.measure(model, tokenizer, layer=3, number=2, first=measure.LAYER_SEEDS)
    assert figures["exact"] == 0
    assert figures["mean_mass_on_fact"] < 0.2


def test_size(loaded):
    parameters = sum(p.numel() for p in loaded[0].parameters())
    assert 2e6 <= parameters <= 4e6
    assert sum(path.stat().st_size for path in measure.MODEL.iterdir()) < 8e6
