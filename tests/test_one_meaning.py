"""``normalize``, ``layers`` and ``steps`` mean the same, with the same default, wherever they are options."""

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
import transformers
from test_analyzer import CHATML, MESSAGES, llama, sharp
from test_blocks import make_tokenizer

import attnpatch
from attnpatch.conversations.analyzer import BlockAttentionAnalyzer
from attnpatch.conversations.result import Analysis
from attnpatch.errors import AnalysisError, CaptureError

NAMES = {
    "analyze": lambda one: one.analyze(MESSAGES),
    "single": lambda one: one.analyze_conversation(MESSAGES),
    "sequential": lambda one: one.analyze_conversation_sequential(MESSAGES),
    "chunked": lambda one: one.analyze_conversation_chunked(MESSAGES, chunk_size=16),
    "generation": lambda one: one.analyze_generation(MESSAGES, max_new_tokens=2),
}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(CHATML)


@pytest.fixture(scope="module")
def analyzer(tokenizer):
    return BlockAttentionAnalyzer(model=sharp(llama(len(tokenizer) + 8)), tokenizer=tokenizer)


def test_rollout_takes_shares_of_the_residual(analyzer):
    found = analyzer.analyze_conversation(MESSAGES)
    torch.testing.assert_close(found.rollout(residual=1), torch.eye(4))
    for share in (-0.1, 1.1, math.nan, "half", True):
        with pytest.raises(AnalysisError, match="a share from 0 to 1"):
            found.rollout(share)


@pytest.mark.parametrize("layers", [[0, 2], [1, 2], [2, 1, 0], "last", [0, 1]])
def test_rollout_needs_all_layers(analyzer, layers):
    whole, chosen = (analyzer.analyze_conversation(MESSAGES, layers=some) for some in ("all", layers))
    part = whole.block_map.select(layer=[-1] if layers == "last" else layers)
    for found in (chosen, dataclasses.replace(whole, block_map=part)):
        if found.block_map.layers == (0, 1, 2):  # a capture sorts them
            continue
        with pytest.raises(AnalysisError, match=r"multiplies all layers .*capture with layers='all'"):
            found.rollout()
        # Each layer has a ratio of its own.
        places = torch.tensor(found.block_map.layers)
        torch.testing.assert_close(found.lookback(), whole.lookback()[places], equal_nan=True)
    with pytest.raises(AnalysisError, match="'mean'"):
        dataclasses.replace(whole, block_map=whole.block_map.mean("layer")).rollout()


def test_rollout_needs_attention_in_every_layer(tokenizer):
    """Attention in the first two layers of three: their numbers alone do not show that a layer is missing."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    kinds = ["full_attention", "full_attention", "conv"]
    config = transformers.Lfm2Config(
        vocab_size=len(tokenizer) + 8, num_hidden_layers=3, layer_types=kinds, **sizes
    )
    found = BlockAttentionAnalyzer(
        model=sharp(transformers.Lfm2ForCausalLM(config)), tokenizer=tokenizer
    ).analyze_conversation(MESSAGES)
    assert found.block_map.layers == (0, 1)
    with pytest.raises(AnalysisError, match=r"this map has 0, 1 of 3 layers"):
        found.rollout()


def test_rollout_refuses_a_map_that_does_not_say_how_many_layers_there_are(analyzer):
    """Such as a mean of conversations, whose metadata are its own."""
    found = analyzer.analyze_conversation(MESSAGES, layers=[0, 1]).block_map
    bare = dataclasses.replace(found, metadata={"conversations": 2})
    with pytest.raises(AnalysisError, match="does not say how many there are"):
        Analysis(bare).rollout()


@pytest.mark.parametrize("name", [*NAMES])
def test_one_default_of_normalize(analyzer, name):
    """No normalisation, as that of ``capture``, whatever the name; and no warning where the former one is the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = NAMES[name](analyzer)
    assert found.block_map.normalization == "none"
    torch.testing.assert_close(
        found.block_map.values, found.normalize("row").block_map.values, rtol=0, atol=1e-5
    )


def test_a_warning_where_the_former_default_of_normalize_gave_other_numbers(tokenizer):
    """A model with learned sinks: rows sum to less than 1."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if not hasattr(transformers, "GptOssConfig"):
        pytest.skip("this transformers has no gpt-oss")
    config = transformers.GptOssConfig(
        vocab_size=len(tokenizer) + 8, **sizes, num_key_value_heads=2, head_dim=16, num_local_experts=2,
        num_experts_per_tok=1, max_position_embeddings=4096,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM._from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.constant_(parameter, 3.0)
    analyzer = BlockAttentionAnalyzer(model=model, tokenizer=tokenizer)
    with pytest.warns(DeprecationWarning, match="normalize is now 'none' by default") as said:
        found = analyzer.analyze(MESSAGES)
    assert said[0].filename == __file__ and found.block_map.unassigned_mass.max() > 0.01
    for asked in ("none", "row"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)
            given = analyzer.analyze(MESSAGES, normalize=asked)
        assert given.block_map.normalization == asked and torch.equal(
            given.block_map.mass, found.block_map.mass
        )


# What lists the last two of three layers or steps, and what lists none.
LISTS = ([1, 2], (1, 2), range(1, 3), np.array([1, 2]), torch.tensor([1, 2]), [np.int64(1), -1])
NONE = (1, True, "1,2", "first", [], [True], [1.5], ["1"], math.nan, {}, b"12", np.int64(1))


@pytest.fixture(scope="module")
def model(tokenizer):
    return sharp(llama(len(tokenizer) + 8))


def captured(model, **options):
    ids = torch.arange(5, 45)[None]
    with attnpatch.capture(model, attnpatch.Blocks.fixed(8), **options) as maps:
        first = model(ids, use_cache=True)
        for token in (7, 8):
            first = model(torch.tensor([[token]]), past_key_values=first.past_key_values)
    return maps.block_map


def scored(model, layers):
    with attnpatch.token_scores(model, layers=layers) as scores:
        model(torch.arange(5, 45)[None])
    return scores.layers


WAYS = {
    "capture": lambda model, layers: captured(model, layers=layers).layers,
    "token_scores": scored,
    "heads": lambda model, layers: attnpatch.heads(model, [[5, 6, 5, 6]], layers=layers).layers,
    "select": lambda model, layers: captured(model).select(layer=layers).layers,
    "apply": lambda model, layers: patched_layers(model, layers),
}


def patched_layers(model, layers):
    with attnpatch.patched(model, layers=layers):
        return [int(site.name.split(".")[2]) for site in attnpatch.report(model).sites]


@pytest.mark.parametrize("way", [*WAYS])
def test_layers_mean_the_same_everywhere(model, way):
    find = WAYS[way]
    assert list(find(model, "last")) == [2] and list(find(model, [-1])) == [2]
    assert list(find(model, "all")) == list(find(model, None)) == [0, 1, 2]
    for some in LISTS if way != "select" else LISTS[:2]:
        assert list(find(model, some)) == [1, 2], some
    for wrong in NONE if way != "select" else [7, "first", True]:
        with pytest.raises(
            attnpatch.errors.AttnpatchError, match=r"is not accepted; give|there is no layer"
        ) as caught:
            find(model, wrong)
        assert "\n" not in str(caught.value)


def test_steps_mean_the_same_everywhere(model):
    whole = captured(model, steps="all")
    assert whole.steps == (0, 1, 2)
    for some in LISTS:
        assert captured(model, steps=some).steps == (1, 2), some
    assert torch.equal(captured(model, steps="last").mass, whole.mass[2:])
    assert torch.equal(whole.select(step="last").mass, whole.mass[2:]) and whole.select(step="all") == whole
    for wrong in NONE:
        with pytest.raises(CaptureError, match="'mean', 'all', 'last' or a list of numbers"):
            captured(model, steps=wrong)
