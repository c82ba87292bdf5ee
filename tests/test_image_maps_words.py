"""Words of prompts whose embeddings people have changed: right, or refused by name."""

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from dense_images import pipe_of
from image_columns import (
    CHANGES,
    WORDS,
    assert_shows,
    away_from_nothing,
    column,
    encodings,
    noise,
    probabilities,
    same_mean,
    sample,
    scaled,
    taken_back,
)
from pipelines import NEGATIVE, PROMPT

import attnpatch
from attnpatch import errors


def changing(callback):
    """A call whose text is changed after each step."""
    return {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_weighted(change):
    given, empty, negative = (each.clone() for each in encodings())
    call = {"prompt_embeds": change(given, empty), "negative_prompt_embeds": negative}
    pipe = pipe_of("sd15")
    calls = probabilities(pipe, **call)
    with attnpatch.capture(pipe) as maps:
        pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
        pipe.encode_prompt("", "cpu", 1, False)
        sample(pipe, **call)
    assert maps.words(sequence=1) == list(dict.fromkeys(WORDS))
    for word in ("red", "cube", "blue", "lamp"):
        assert_shows(maps.heat_map(word, sequence=1), column(calls, 1, [1 + WORDS.index(word)]))
    assert maps.left_out == {}


@pytest.mark.parametrize(
    "change", [scaled, away_from_nothing, same_mean, taken_back], ids=lambda change: change.__name__
)
def test_weighted_in_half_precision(change):
    """Rounded once more: the same words."""
    pipe = pipe_of("sd15", "half")
    given, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
    empty = pipe.encode_prompt("", "cpu", 1, False)[0]
    changed = change(given.clone(), empty).to(torch.bfloat16)
    assert (changed != given).any()
    call = {"prompt_embeds": changed, "negative_prompt_embeds": negative}
    calls = probabilities(pipe, **call)
    with attnpatch.capture(pipe) as maps:
        pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
        pipe.encode_prompt("", "cpu", 1, False)
        sample(pipe, **call)
    for word in ("red", "cube", "blue", "lamp"):
        assert_shows(maps.heat_map(word, sequence=1), column(calls, 1, [1 + WORDS.index(word)]))
    assert maps.left_out == {}


@pytest.mark.parametrize("weight", [1, 1.3])
def test_an_earlier_layer_of_the_encoder(weight, monkeypatch):
    """``clip_skip``: the pipeline itself brings its states to the last norm."""
    pipe = pipe_of("sd15")
    # Where diffusers looks for the norm; newer transformers have it in the encoder itself.
    monkeypatch.setitem(vars(pipe.text_encoder), "text_model", pipe.text_encoder)

    def encoded():
        return pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE, clip_skip=1)

    given, negative = encoded()
    given[:, 2] *= weight
    call = {"prompt_embeds": given, "negative_prompt_embeds": negative}
    calls = probabilities(pipe, **call)
    with attnpatch.capture(pipe) as maps:
        encoded()
        sample(pipe, **call)
        sample(pipe, PROMPT, negative_prompt=NEGATIVE, clip_skip=1)
    assert_shows(maps.heat_map("red", sequence=1, run=0), column(calls, 1, [2]))
    assert [each["role"] for each in maps["cross"].metadata["sequences"]] == ["prompt", "negative"]
    assert maps.words() == list(dict.fromkeys(WORDS))
    assert maps.left_out == {}


@pytest.mark.parametrize("change", [scaled, noise, same_mean], ids=lambda change: change.__name__)
def test_changed_while_sampling(change):
    """By a callback after the first step: one sequence, and the mean is over both steps."""

    def callback(pipe, step, timestep, kwargs):
        if step == 0:
            embeds = kwargs["prompt_embeds"].clone()
            embeds[1:] = change(embeds[1:], None)
            kwargs["prompt_embeds"] = embeds
        return kwargs

    call = changing(callback)
    pipe = pipe_of("sd15")
    calls = probabilities(pipe, **call)
    assert not np.array_equal(
        *(each.sites["mid_block.attentions.0.transformer_blocks.0.attn2"] for each in calls)
    )
    with attnpatch.capture(pipe, steps="all") as maps:
        sample(pipe, **call)
    for word in ("red", "lamp"):
        tokens = [1 + WORDS.index(word)]
        assert_shows(maps.heat_map(word), column(calls, 1, tokens))
        for step in (0, 1):
            assert_shows(maps.heat_map(word, step=step), column(calls[step : step + 1], 1, tokens))
    assert len(maps["cross"].metadata["sequences"]) == 2


def test_exchanged_while_sampling():
    """For what no encoder returned: what is known is of the first step, and the map says so."""

    def callback(pipe, step, timestep, kwargs):
        return {"prompt_embeds": torch.randn(2, 72, 32, generator=torch.Generator().manual_seed(5))}

    call = changing(callback)
    pipe = pipe_of("sd15")
    calls = probabilities(pipe, **call)
    with attnpatch.capture(pipe) as maps:
        sample(pipe, **call)
    assert_shows(maps.heat_map("red"), column(calls[:1], 1, [2]))
    described = maps["cross"].metadata["sequences"]
    assert [each["role"] for each in described] == ["prompt", "", "", "negative"]
    assert [each["steps"] for each in described] == [[0], [1], [1], [0]]
    assert set(maps.left_out) == {"words of text 2", "words of text 3"}
    assert all("no text encoder of the pipeline returned" in why for why in maps.left_out.values())


def test_a_batch_of_many_prompts():
    """Each keeps its words while as many negative prompts are encoded: the first map is the first prompt's."""
    prompts = [f"a red {word}" for word in "cube table lamp photo under on the blue green".split()]
    call = {"prompt": prompts, "negative_prompt": [NEGATIVE] * len(prompts)}
    pipe = pipe_of("sd15")
    calls = probabilities(pipe, **call)
    with attnpatch.capture(pipe) as maps:
        sample(pipe, **call)
    assert maps.left_out == {}
    assert_shows(maps.heat_map("red"), column(calls, len(prompts), [2]))
    assert_shows(maps.heat_map("green", sequence=8), column(calls, len(prompts) + 8, [3]))


# -------------------------------------------------------------------------------------- words that cannot be mapped


def test_all_words_are_those_of_nobody():
    """The padding is the prompt's, which tells nothing of the words."""
    given, _, negative = (each.clone() for each in encodings())
    given[:, 1:12] = torch.randn(11, 32, generator=torch.Generator().manual_seed(5))
    call = {"prompt_embeds": given, "negative_prompt_embeds": negative}
    pipe = pipe_of("sd15")
    with attnpatch.capture(pipe) as maps:
        pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
        sample(pipe, **call)
    assert maps.words(sequence=1) == []
    with pytest.raises(
        errors.CaptureError, match="no map of 'red': its embedding, like most of the prompt's"
    ):
        maps.heat_map("red", sequence=1)


@pytest.mark.parametrize(("prompt", "is_known"), [("lamp", False), ("on a", False), ("red lamp", True)])
def test_a_template_that_has_the_words_of_the_prompt(prompt, is_known):
    """The template's own words are not the prompt's."""
    pipe = pipe_of("sd15")
    inner = type(pipe).encode_prompt

    class Templating(type(pipe)):
        def encode_prompt(self, prompt, device, number, guided, negative=None, **_):
            texts = (f"the blue lamp on a {each} on a photo" for each in (prompt, negative))
            return [inner(self, text, device, number, False)[0] for text in texts]

    pipe = Templating(**pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": prompt, "negative_prompt": NEGATIVE}
    calls = probabilities(pipe, **call)
    with attnpatch.capture(pipe) as maps:
        sample(pipe, **call)
    word = prompt.split()[0]
    if is_known:
        assert_shows(maps.heat_map(word), column(calls, 1, [6]))
    else:
        with pytest.raises(
            errors.CaptureError, match=f"no map of '{word}': the text encoder was given it in several"
        ):
            maps.heat_map(word)


def another_word(given, negative):
    """The token of "cube" is that of "bad"."""
    given[:, 3] = negative[:, 2]
    return given


def twice(given, negative):
    """The token of "cube" is that of "red"."""
    given[:, 3] = given[:, 2]
    return given


def blended(given, negative):
    """Half of another prompt in one place."""
    given[:, 3] = (given[:, 3] + negative[:, 3]) / 2
    return given


@pytest.mark.parametrize("change", [another_word, twice, blended], ids=lambda change: change.__name__)
def test_a_word_in_the_place_of_another(change):
    """Neither by its place nor by its values: asked for it raises, and the others are right."""
    given, _, negative = (each.clone() for each in encodings())
    call = {"prompt_embeds": change(given, negative), "negative_prompt_embeds": negative}
    pipe = pipe_of("sd15")
    calls = probabilities(pipe, **call)
    with attnpatch.capture(pipe) as maps:
        pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
        sample(pipe, **call)
    assert_shows(maps.heat_map("red", sequence=1), column(calls, 1, [2]))
    with pytest.raises(
        errors.CaptureError, match="no map of 'cube': its place holds the embedding of another token"
    ):
        maps.heat_map("cube", sequence=1)
    assert "cube" not in maps.words(sequence=1) and "cube" not in maps["cross"].select(sequence=1).key_labels
    assert maps.left_out == {"word 'cube'": "its place holds the embedding of another token"}
    assert "left out: word 'cube': its place holds" in repr(maps)


def test_two_prompts_mixed_everywhere():
    """Half of either: of places with two words no map is given."""
    given, _, negative = encodings()
    call = {"prompt_embeds": (given + negative) / 2, "negative_prompt_embeds": negative}
    pipe = pipe_of("sd15")
    calls = probabilities(pipe, **call)
    with attnpatch.capture(pipe) as maps:
        pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
        sample(pipe, **call)
    for word in ("red", "cube"):  # where the other has "bad" and "photo"
        with pytest.raises(errors.CaptureError, match=f"no map of '{word}'"):
            maps.heat_map(word, sequence=1)
    assert_shows(maps.heat_map("table", sequence=1), column(calls, 1, [7]))


def test_a_word_that_was_cut_off():
    pipe = pipe_of("sd15")
    with attnpatch.capture(pipe) as maps:
        sample(pipe, "red " * 70 + "lamp")
    assert maps.words() == ["red"]
    with pytest.raises(errors.CaptureError, match="no map of 'lamp': the prompt was cut off before it"):
        maps.heat_map("lamp")
    assert list(maps.left_out) == ["word 'lamp'"]


def test_a_negative_prompt_that_ends_the_prompt():
    """Embeddings of one's own are not taken for the text beside them that they end with."""
    pipe = pipe_of("sd15")
    with attnpatch.capture(pipe) as maps:
        given = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
        sample(pipe, prompt_embeds=given, negative_prompt="lamp")
    assert [each["role"] for each in maps["cross"].metadata["sequences"]] == ["", "negative"]
    assert maps.words(sequence=0) == list(dict.fromkeys(WORDS)) and maps.words(sequence=1) == ["lamp"]


def test_a_prompt_that_begins_another():
    """A negative prompt that the prompt goes on from is no prompt that was cut off."""
    pipe = pipe_of("sd15")
    with attnpatch.capture(pipe) as maps:
        sample(pipe, PROMPT, negative_prompt="a red cube")
    assert [each["role"] for each in maps["cross"].metadata["sequences"]] == ["prompt", "negative"]
    assert maps.words(sequence=1) == ["a", "red", "cube"]


def test_a_prompt_that_is_the_negative_of_another():
    """Their texts do not tell which rows are guidance: which is the prompt's is asked for, and each row has its own map."""
    pipe = pipe_of("sd15")
    call = {"prompt": ["a red cube", NEGATIVE], "negative_prompt": [NEGATIVE, "a red cube"]}
    calls = probabilities(pipe, **call)
    with attnpatch.capture(pipe) as maps:
        sample(pipe, **call)
    known = maps["cross"].metadata["sequences"]
    assert [each["role"] for each in known] == [""] * 4
    with pytest.raises(errors.CaptureError, match="not known which is the prompt's"):
        maps.heat_map("red")
    rows = [place for place, each in enumerate(known) if each["text"] == "a red cube"]
    for sequence, row in zip(rows, (1, 2), strict=True):
        assert_shows(maps.heat_map("red", sequence=sequence), column(calls, row, [2]))
