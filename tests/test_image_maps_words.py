"""Words of prompts whose embeddings people have changed, put together or given apart: right, or refused by name.

What is right comes from a plain processor of diffusers' kind, or from float64 probabilities (``dense_images.recording``):
the mean of a token's column over sites, heads, steps and the image.
"""

import functools

import numpy as np
import pipelines
import pytest
import torch

pytest.importorskip("diffusers")

from dense_images import pipe_of, recording
from pipelines import NEGATIVE, PROMPT, SIZE

import attnpatch
from attnpatch import errors

WORDS = PROMPT.split()
NUMBERS = {"num_inference_steps": 2, "output_type": "np", **SIZE}


def sample(pipe, prompt=None, **more):
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **{**NUMBERS, **more})


def probabilities(pipe, denoiser="unet", **call):
    """Every call's probabilities, float64 ``[batch, heads, q_len, kv_len]`` by site, of an unpatched pipeline."""
    with recording(getattr(pipe, denoiser)) as calls:
        sample(pipe, **call)
    return calls


def column(calls, row, tokens, end="attn2"):
    """float64 ``[8, 8]``: what the image puts on some tokens, in sum; the mean over sites, heads and steps."""
    found = []
    for call in calls:
        for name, site in call.sites.items():
            if name.endswith(end):
                total = 0
                for token in tokens:
                    total = total + site[row, :, :, token].mean(0)
                found.append(total.reshape(8, 8))
    return np.mean(found, axis=0)


def assert_shows(heat, expected):
    """A heat map in tiles of a half of the site's tokens."""
    assert heat.shape == (16, 16)
    assert np.abs(heat - np.kron(expected, np.ones((2, 2)))).max() < 1e-6


@functools.cache
def encodings():
    """What the text encoder says of the prompt, of nothing, and of the negative prompt: ``[1, 72, 32]`` each."""
    pipe = pipe_of("sd15")
    given, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
    return given, pipe.encode_prompt("", "cpu", 1, False)[0], negative


# -------------------------------------------------------------------------------------------------- weighted prompts


def scaled(given, _):
    """One word by a factor."""
    given[:, 2] *= 1.3
    return given


def away_from_nothing(given, empty):
    """As compel weights: away from the embeddings of no text, word by word."""
    weights = torch.ones(1, 72, 1)
    weights[:, 2], weights[:, 5:7] = 1.4, 0.6
    return empty + (given - empty) * weights


def all_words(given, empty):
    """Every word of the prompt."""
    weights = torch.ones(1, 72, 1)
    weights[:, 1:12] = 1.2
    return empty + (given - empty) * weights


def same_mean(given, _):
    """As the web UI weights: the mean is put back, which changes every token."""
    before = given.mean()
    given[:, 2] *= 1.3
    return given * (before / given.mean())


def taken_back(given, empty):
    """All of it, half of the way to no text: no token is as it was returned."""
    return (given + empty) / 2


def noise(given, _):
    """What nobody returned, in the place of one word."""
    given[:, 2] = torch.randn(32, generator=torch.Generator().manual_seed(5))
    return given


def nothing(given, _):
    """A word put out."""
    given[:, 2] = 0
    return given


CHANGES = [scaled, away_from_nothing, all_words, same_mean, taken_back, noise, nothing]


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

    call = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
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

    call = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
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


# -------------------------------------------------------------------------------------- words that cannot be mapped


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


# ------------------------------------------------------------------------------------------- texts in several pieces


@pytest.mark.parametrize("change", [None, scaled, noise], ids=["as it is", "scaled", "noise"])
def test_a_prompt_in_two_chunks(change):
    """Two encodings one after the other, as prompts of more than 77 tokens are given."""
    pipe = pipe_of("sd15")

    def encoded(text):
        return pipe.encode_prompt(text, "cpu", 1, False)[0]

    first, second = encoded("a red cube on the blue table"), encoded("under green lamp")
    second = second if change is None else change(second.clone(), None)
    empty = encoded("")
    call = {
        "prompt_embeds": torch.cat([first, second], 1),
        "negative_prompt_embeds": torch.cat([encoded(NEGATIVE), empty], 1),
    }
    calls = probabilities(pipe, **call)
    with attnpatch.capture(pipe) as maps:
        for text in ("a red cube on the blue table", "under green lamp", NEGATIVE, ""):
            encoded(text)
        sample(pipe, **call)
    assert maps.words(sequence=1) == "a red cube on the blue table under green lamp".split()
    assert maps.words(sequence=0) == NEGATIVE.split()
    for word, token in (("red", 2), ("table", 7), ("under", 72 + 1), ("green", 72 + 2), ("lamp", 72 + 3)):
        assert_shows(maps.heat_map(word, sequence=1), column(calls, 1, [token]))
    assert maps.left_out == {}


def test_a_concept_of_several_vectors():
    """Textual inversion: a word of the prompt that stands for three tokens, which are added up."""
    torch.manual_seed(0)
    pipe = pipelines.build("sd15")
    pipe.load_textual_inversion(torch.randn(3, 32), token="<thing>")
    prompt = "a red <thing> on the table"
    calls = probabilities(pipe, prompt=prompt, negative_prompt=NEGATIVE)
    with attnpatch.capture(pipe) as maps:
        sample(pipe, prompt, negative_prompt=NEGATIVE)
    assert maps.words() == prompt.split()
    assert_shows(maps.heat_map("<thing>"), column(calls, 1, [3, 4, 5]))
    assert_shows(maps.heat_map("table"), column(calls, 1, [8]))
    assert maps["cross"].select(sequence=0).key_sizes.tolist()[2] == 3


def test_embeddings_for_two_images():
    """Encoded once, inside the block, and given to two calls."""
    pipe = pipe_of("sd15")
    given, _, negative = encodings()
    call = {"prompt_embeds": given, "negative_prompt_embeds": negative}
    calls = probabilities(pipe, **call)
    with attnpatch.capture(pipe) as maps:
        pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
        for _ in range(2):
            sample(pipe, **call)
    for run in (0, 1):
        assert_shows(maps.heat_map("red", sequence=1, run=run), column(calls, 1, [2]))


@pytest.mark.parametrize("change", [None, scaled], ids=["as it is", "scaled"])
def test_a_prompt_in_a_template(change):
    """A pipeline that puts a text before the prompt and cuts it off again, as those with a language model do."""
    pipe = pipe_of("sd15")
    inner = type(pipe).encode_prompt

    class Templating(type(pipe)):
        def encode_prompt(self, prompt, device, number, guided, negative=None, **_):
            texts = (f"the blue lamp under {each} on a" for each in (prompt, negative))
            found = [inner(self, text, device, number, False)[0][:, 4:] for text in texts]
            return [found[0] if change is None else change(found[0].clone(), None), found[1]]

    pipe = Templating(**pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "red cube on table", "negative_prompt": NEGATIVE}
    calls = probabilities(pipe, **call)
    with attnpatch.capture(pipe) as maps:
        sample(pipe, **call)
    assert maps.words() == ["red", "cube", "on", "table"] and maps.words(sequence=1) == NEGATIVE.split()
    # A start token and four of the template come before the words, of which the first four tokens are gone.
    for place, word in enumerate(maps.words()):
        assert_shows(maps.heat_map(word), column(calls, 1, [1 + place]))
    assert [each["role"] for each in maps["cross"].metadata["sequences"]] == ["prompt", "negative"]


# --------------------------------------------------------------------------------------------------- several encoders


@pytest.mark.parametrize("second", ["lamp under green table", "lamp"])
def test_the_second_prompt_of_sdxl(second):
    """It shares its tokens with the first: a word of either is the tokens it has, of as many words of the other."""
    pipe = pipe_of("sdxl")
    call = {"prompt": "a red cube", "prompt_2": second, "negative_prompt": NEGATIVE}
    calls = probabilities(pipe, **call)
    with attnpatch.capture(pipe) as maps:
        sample(pipe, **call)
    assert set(maps.words()) == {*"a red cube".split(), *second.split()}
    for text in ("a red cube", second):
        for place, word in enumerate(text.split()):
            assert_shows(maps.heat_map(word), column(calls, 1, [1 + place]))
    assert maps["cross"].select(sequence=0).key_labels[0] == f"a + {second.split()[0]}"
    assert maps.words(sequence=1) == NEGATIVE.split()


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_one_of_two_encoders_is_weighted(name):
    """Their features stand side by side: the second one's are scaled."""
    pipe, denoiser = pipe_of(name), {"sdxl": "unet", "sd3": "transformer"}[name]
    names = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    more = {"prompt_3": None} if name == "sd3" else {}

    def encoded():
        return pipe.encode_prompt(PROMPT, prompt_2=None, negative_prompt=NEGATIVE, device="cpu", **more)

    call = dict(zip(names, (each.clone() for each in encoded()), strict=True))
    call["prompt_embeds"][:, 2, 32:64] *= 1.3
    if name == "sd3":
        call["guidance_scale"] = 6.0
    calls = probabilities(pipe, denoiser, **call)
    with attnpatch.capture(pipe) as maps:
        encoded()
        sample(pipe, **call)
    heat = maps.heat_map("red", sequence=1)
    if name == "sdxl":
        assert_shows(heat, column(calls, 1, [2]))
    else:
        sites = [site[1] for each in calls for end, site in each.sites.items() if end.endswith(".attn")]
        expected = np.mean([site[:, :256, 256 + 2].mean(0) for site in sites], axis=0)
        assert np.abs(heat - expected.reshape(16, 16)).max() < 1e-6


def test_chunks_of_two_encoders():
    """SDXL, beyond 77 tokens: two encoders side by side, and two chunks of each; the second chunk's prompts differ."""
    pipe = pipe_of("sdxl")

    def encoded(*texts):
        return pipe.encode_prompt(texts[0], prompt_2=texts[-1], negative_prompt=NEGATIVE, device="cpu")

    first, negative, pooled, none = encoded("a red cube")
    second = encoded("under lamp", "blue table")[0]
    call = {
        "prompt_embeds": torch.cat([first, second], 1),
        "negative_prompt_embeds": torch.cat([negative, negative], 1),
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": none,
    }
    calls = probabilities(pipe, **call)
    with attnpatch.capture(pipe) as maps:
        encoded("a red cube"), encoded("under lamp", "blue table")
        sample(pipe, **call)
    assert set(maps.words(sequence=1)) == {*"a red cube under lamp blue table".split()}
    for word, token in {"red": 2, "cube": 3, "under": 73, "lamp": 74, "blue": 73, "table": 74}.items():
        assert_shows(maps.heat_map(word, sequence=1), column(calls, 1, [token]))
    assert_shows(maps.heat_map("photo", sequence=0), (column(calls, 0, [3]) + column(calls, 0, [75])) / 2)


def test_a_weighted_prompt_of_wan():
    """Padding is nothing but zeros, which tell nothing; guidance is a call of its own."""
    pipe = pipe_of("wan")
    size = {"max_sequence_length": 40, "num_frames": 5}

    def encoded():
        return pipe.encode_prompt(PROMPT, NEGATIVE, device="cpu", max_sequence_length=40)

    given, negative = (each.clone() for each in encoded())
    given[:, 1] *= 1.3
    given[:, 4] = torch.randn(32, generator=torch.Generator().manual_seed(5))
    call = {"prompt_embeds": given, "negative_prompt_embeds": negative, **size}
    calls = probabilities(pipe, "transformer", **call)
    with attnpatch.capture(pipe) as maps:
        encoded()
        sample(pipe, **call)
    described = [each["text"] for each in maps["cross"].metadata["sequences"]]
    row = described.index(PROMPT)
    for word in ("red", "cube", "blue", "lamp"):
        columns = [
            site[0, :, :, WORDS.index(word)].mean(0)
            for each in calls[::2]
            for name, site in each.sites.items()
            if name.endswith("attn2")
        ]
        heat = maps.heat_map(word, sequence=row)
        expected = np.mean(columns, axis=0).reshape(heat.shape[0], 2, 2)
        assert np.abs(heat - np.kron(expected, np.ones((1, 2, 2)))).max() < 1e-6
    assert maps.left_out == {}


def test_a_weighted_prompt_of_flux():
    """T5, which looks both ways and whose padding is no text."""
    pipe = pipe_of("flux")
    sizes = {"max_sequence_length": 40}

    def encoded():
        return pipe.encode_prompt(PROMPT, None, device="cpu", **sizes)[:2]

    given, pooled = (each.clone() for each in encoded())
    given[:, 1] *= 1.3
    given[:, 4:6] = torch.randn(2, 32, generator=torch.Generator().manual_seed(5))
    call = {"prompt_embeds": given, "pooled_prompt_embeds": pooled}
    calls = probabilities(pipe, "transformer", **call)
    with attnpatch.capture(pipe) as maps:
        encoded()
        sample(pipe, **call)
    sites = [site[0] for each in calls for site in each.sites.values()]
    for word in ("red", "cube", "blue", "lamp"):
        expected = np.mean([site[:, 40:, WORDS.index(word)].mean(0) for site in sites], axis=0)
        assert np.abs(maps.heat_map(word) - expected.reshape(8, 8)).max() < 1e-6


@pytest.mark.parametrize("spelled", ["a (red:1.3) cube", "a red++ cube", "(a red)1.2 cube-"])
def test_signs_of_weights_in_the_prompt(spelled):
    """A pipeline that reads signs of weights encodes the text without them: it is the prompt all the same."""
    pipe = pipe_of("sd15")
    inner = type(pipe).encode_prompt

    class Weighting(type(pipe)):
        def encode_prompt(self, prompt, *args, **kwargs):
            return inner(self, "a red cube", *args, **kwargs)

    pipe = Weighting(**pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    with attnpatch.capture(pipe) as maps:
        sample(pipe, spelled, negative_prompt=NEGATIVE)
    assert maps.words() == ["a", "red", "cube"]
    assert maps["cross"].metadata["sequences"][0]["role"] == "prompt"


def test_words_that_the_tokenizer_does_not_know():
    """Their tokens are all the same one, and theirs."""
    pipe = pipe_of("sd15")
    calls = probabilities(pipe, prompt="a purple cube over red", negative_prompt=NEGATIVE)
    with attnpatch.capture(pipe) as maps:
        sample(pipe, "a purple cube over red", negative_prompt=NEGATIVE)
    assert maps.words() == "a purple cube over red".split()
    for place, word in enumerate(maps.words()):
        assert_shows(maps.heat_map(word), column(calls, 1, [1 + place]))


@pytest.mark.parametrize(
    ("name", "tokenizer", "text", "said"),
    [
        ("sd15", "tokenizer", "a blue cube", "text token 2 is of 'red', the blocks have 'blue' there"),
        ("flux", "tokenizer", PROMPT, "text token 1 is of 'red', the blocks have 'a' there"),
    ],
)
def test_words_that_are_not_there(name, tokenizer, text, said):
    """Of another text, or of another tokenizer: the image is made, and no map says otherwise."""
    pipe = pipe_of(name)
    words = attnpatch.Blocks.words(getattr(pipe, tokenizer), text)
    call = {"max_sequence_length": 40} if name == "flux" else {"negative_prompt": NEGATIVE}
    with attnpatch.capture(pipe, blocks=(attnpatch.Blocks.tiles(8, 8, 1), words)) as maps:
        sample(pipe, PROMPT, **call)
    assert set(maps.left_out) == {"step 0", "step 1"} and said in maps.left_out["step 0"]
    with pytest.raises(errors.CaptureError, match="nothing was captured"):
        maps.heat_map("red")
