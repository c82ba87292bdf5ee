"""Words of prompts that are put together or given apart: chunks, templates, several vectors, several text encoders."""

import numpy as np
import pipelines
import pytest
import torch

pytest.importorskip("diffusers")

from dense_images import pipe_of
from image_columns import WORDS, assert_shows, column, encodings, noise, probabilities, sample, scaled
from pipelines import NEGATIVE, PROMPT

import attnpatch
from attnpatch import errors

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
        ("sd15", "tokenizer", "a blue cube", "text token 2 is of 'red', but the blocks have 'blue' there"),
        ("flux", "tokenizer", PROMPT, "text token 1 is of 'red', but the blocks have 'a' there"),
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
