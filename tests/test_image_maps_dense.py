"""Block maps of images equal those of dense float64 probabilities."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

import dense_images as dense
from dense_images import FACTS, Tiling, pipe_of, recorded, recording, sample, sequences
from pipelines import NEGATIVE, PROMPT

import attnpatch
from attnpatch import Blocks

# What a map of a float32 model may be off by: its probabilities are float32, the sums of them better.
TOLERANCE = 1e-6

OTHER = "the green lamp"
GUIDED = ("sd15", "sdxl", "sd3", "pixart", "wan", "ltx")
VIDEOS = "wan", "ltx"


@dataclasses.dataclass
class Sampled:
    """A pipeline that was captured, and what it should have given."""

    name: str
    maps: object
    calls: list
    found: list

    def sites(self, kind, query, key):
        """Names of the sites of one kind, by what of them is shown; without the component's."""
        names = []
        for site in self.calls[0].sites:
            shown = []
            for is_query, blocks in ((True, query), (False, key)):
                kinds = {each for each, _ in dense.segments_of(self.name, site, is_query)}
                shown.append(kinds & blocks.kinds)
            if shown == KINDS[kind]:
                names.append(site)
        return names


KINDS = {
    "cross": [{"image"}, {"text"}],
    "self": [{"image"}, {"image"}],
    "joint": [{"image", "text"}, {"image", "text"}],
    "text to image": [{"text"}, {"image"}],
}


def captured(
    name, processor="fused", way="native", prompt=PROMPT, negative=NEGATIVE, images=1, call=None, **kw
):
    """Capture a pipeline's images; they are those of the pipeline without attnpatch."""
    call = dict(call or {})
    if prompt is not PROMPT:
        call["prompt"] = prompt
    if images > 1:
        call["num_videos_per_prompt" if name in VIDEOS else "num_images_per_prompt"] = images
    if negative is None:
        call.update(guidance_scale=1.0, negative_prompt=None)
    elif negative != NEGATIVE:
        call["negative_prompt"] = negative
    elif name == "sd15" and not isinstance(prompt, str):
        call["negative_prompt"] = [negative] * len(prompt)
    native, calls = recorded(name, processor, **call)
    pipe = pipe_of(name, processor)
    with contextlib.ExitStack() as stack:
        if way == "rows":
            stack.enter_context(attnpatch.patched(pipe, mode="always", rows=7))
        maps = stack.enter_context(attnpatch.capture(pipe, **kw))
        made = sample(pipe, name, **call)
    assert np.array_equal(made, native), "capturing changed the images"
    # The attention to an image prompt, of so many keys, is not that to the text.
    assert set(maps.left_out.values()) == (
        {"its second attention, to 4 keys, is in no map"} if name == "image prompt" else set()
    )
    if name in ("flux", "flux wide", "flux even"):
        negative = None
    return Sampled(name, maps, calls, sequences(name, prompt, images, negative))


def assert_same(block_map, expected):
    """Equal where there is a block, nothing where there is none, and what a row lacks is missing."""
    got = block_map.to_numpy()
    assert got.shape == expected.shape
    there = ~np.isnan(expected)
    assert np.abs(got[there] - expected[there]).max() <= TOLERANCE
    assert (got[~there] == 0).all(), "a block that does not exist has mass"
    exists = there.any(-1)
    missing = block_map.unassigned_mass.numpy().astype(np.float64)
    assert np.abs((missing - (1 - np.nansum(expected, -1)))[exists]).max() <= TOLERANCE


def check(sampled, kind, query, key, block_map=None, sites=None, heads="mean", steps="mean"):
    """Values, names of layers, labels, sizes and sequences of one map."""
    facts, found = FACTS[sampled.name], sampled.found
    sites = sites or sampled.sites(kind, query, key)
    block_map = sampled.maps[kind] if block_map is None else block_map
    assert list(block_map.layers) == [f"{facts.denoiser}.{site}" for site in sites]
    expected = dense.dense_map(sampled.name, sampled.calls, found, sites, query, key, heads, steps)
    assert_same(block_map, expected)
    described = [(each["role"], each["text"]) for each in block_map.metadata["sequences"]]
    assert described == [(each.role, each.text) for each in found]
    for place, sequence in enumerate(found):
        one = block_map.select(sequence=place)
        for side, blocks in (("query", query), ("key", key)):
            labels, sizes = dense.labels_of(sampled.name, sites[0], side == "query", blocks, sequence)
            if not blocks.own_grid:
                assert list(getattr(one, f"{side}_labels")) == labels
                assert getattr(one, f"{side}_sizes").tolist() == sizes
    return block_map


def tiles(name, tile=1):
    """An image cut in the unit that maps have by default."""
    return dense.Blocks(True, Tiling(FACTS[name].image, tile))


def default(name):
    """Blocks where nobody says which: the words, and tiles of which at most 32 lie along an edge, 16 as keys."""
    longest = max(FACTS[name].image[1:])
    return tiles(name, -(-longest // 32)), tiles(name, -(-longest // 16))


def only_tiles(name, tile):
    return dense.Blocks(False, Tiling(FACTS[name].image, tile))


WORDS = dense.Blocks(True, None)


def words_of(name, text=PROMPT):
    pipe = pipe_of(name)
    return Blocks.words(pipe.tokenizer_2 if name == "flux" else pipe.tokenizer, text)


def asked(blocks):
    """The same as attnpatch is asked for it."""
    frames, height, width = blocks.tiling.image
    return Blocks.tiles(height, width, blocks.tiling.tile, frames=frames)


def kinds_of(name):
    return {"sd3": ("joint", "self"), "flux": ("joint",)}.get(name.split()[0], ("cross", "self"))


# ------------------------------------------------------------------------------------------------------ every pipeline


def some(*cases, of):
    """Cases, those beyond the first ``of`` for ``make test-long``."""
    return [pytest.param(*case, marks=[pytest.mark.long] if i >= of else []) for i, case in enumerate(cases)]


@pytest.mark.parametrize(
    ("name", "way"),
    some(
        *((name, "native") for name in (*GUIDED, "flux")),
        ("flux", "rows"),
        ("sd15", "rows"),
        *((name, "rows") for name in GUIDED if name != "sd15"),
        of=len(GUIDED) + 3,
    ),
)
def test_every_pipeline(name, way):
    """Words and the whole image, guidance beside the prompt, mean over heads and steps."""
    sampled = captured(name, way=way)
    assert sorted(sampled.maps.keys()) == sorted(kinds_of(name))
    for kind in kinds_of(name):
        check(sampled, kind, tiles(name), tiles(name))


@pytest.mark.parametrize("name", ["sd15", "flux", "wan"])
def test_heads_and_steps(name):
    """Every head and step apart, in words and in tiles that do not divide the image; in Wan a step is two calls."""
    sampled = captured(name, heads="all", steps="all")
    kind = kinds_of(name)[0]
    block_map = check(sampled, kind, tiles(name), tiles(name), heads="all", steps="all")
    assert block_map.steps == (0, 1)
    image = only_tiles(name, 5)
    sampled = captured(name, heads="all", steps="all", blocks=asked(image))
    assert sampled.maps.keys() == ["self"]
    check(sampled, "self", image, image, heads="all", steps="all")


@pytest.mark.parametrize("way", ["native", "rows"])
@pytest.mark.parametrize(("heads", "steps"), [([1], [0, -1]), ([1, 0], "mean"), ("mean", [-1])])
def test_some_heads_and_steps(heads, steps, way):
    image = only_tiles("sd15", 3)
    more = {"way": way, "call": {"num_inference_steps": 3}, "blocks": (asked(image), words_of("sd15"))}
    sampled = captured("sd15", heads=heads, steps=steps, **more)
    check(sampled, "cross", image, WORDS, heads=heads, steps=steps)


@pytest.mark.parametrize("name", [*GUIDED, "flux"])
def test_tiles_and_words(name):
    """A pair in either order; of the sequence of joint attention the rest is left out."""
    image = only_tiles(name, 3)
    sampled = captured(name, blocks=(asked(image), words_of(name)))
    assert sampled.maps.keys() == ["cross"]
    check(sampled, "cross", image, WORDS)
    if name in ("sd3", "flux"):
        sampled = captured(name, blocks=(words_of(name), asked(image)))
        assert sampled.maps.keys() == ["text to image"]
        check(sampled, "text to image", WORDS, image)


# ------------------------------------------------------------------------------------------------- grids of all sorts

LEVELS = {"*down_blocks.1*": (1, 22, 14), "*down_blocks.2*": (1, 11, 7), "*mid_block*": (1, 6, 4)}


@pytest.mark.parametrize(
    ("processor", "way"), [("fused", "native"), ("by hand", "native"), ("by hand", "rows")]
)
def test_sites_of_different_resolution(processor, way):
    """22 x 14, 11 x 7 and 6 x 4 tokens of 44 x 28 latents, in tiles of two latents as queries and three as keys."""
    sampled = captured("levels", processor, way)
    query, key = default("levels")
    assert (query.tiling.tile, key.tiling.tile) == (2, 3)
    for kind in ("cross", "self"):
        block_map = check(sampled, kind, query, key)
        assert len(block_map.layers) == 7


@pytest.mark.parametrize(
    ("image", "heads"),
    [(Tiling((1, 44, 28), 5), "all"), (Tiling((1, 11, 7), 2), "mean"), (Tiling((1, 22, 14), 1), "mean")],
)
def test_tiles_of_any_unit(image, heads):
    """The image in latents, or in tokens of one of its levels; tiles that fit no level."""
    blocks = dense.Blocks(False, image)
    sampled = captured("levels", blocks=asked(blocks), heads=heads)
    check(sampled, "self", blocks, blocks, heads=heads)


@pytest.mark.parametrize(("pattern", "site"), LEVELS.items())
def test_own_grid(pattern, site):
    """Sites of one resolution in their own cells: single tokens, or those inside one tile."""
    sampled = captured("levels")
    query, key = (dataclasses.replace(each, own_grid=True) for each in default("levels"))
    for end, kind in ((".attn1", "self"), (".attn2", "cross")):
        block_map = sampled.maps.map(pattern + end, own_grid=True)
        names = [n for n in sampled.sites(kind, query, key) if pattern.strip("*") in n]
        check(sampled, kind, query, key, block_map, names)
        if site[1] <= 11:
            assert block_map.metadata["query_tiles"] == list(site)
            assert block_map.query_labels[0][-1] == f"r{site[1] - 1}c{site[2] - 1}"


@pytest.mark.parametrize(
    ("name", "edge"),
    some(
        *((name, 3) for name in ("flux wide", "pixart high", "sd3 wide", "wan", "ltx wide")),
        *((name, 1) for name in ("flux wide", "pixart high", "sd3 wide", "wan", "ltx wide")),
        of=6,
    ),
)
def test_images_that_are_no_squares(name, edge):
    """All of it, and in tiles; of a video every frame."""
    if edge == 1:
        sampled = captured(name)
        for kind in kinds_of(name):
            check(sampled, kind, *default(name))
    else:
        image = only_tiles(name, edge)
        sampled = captured(name, blocks=asked(image))
        check(sampled, "self", image, image)


@pytest.mark.parametrize("name", ["flux even", "pixart even", "sd3 even", "wan even"])
def test_as_many_tokens_of_text_as_of_the_image(name):
    """Which is which does not show in how many they are."""
    sampled = captured(name)
    for kind in kinds_of(name):
        check(sampled, kind, *default(name))
    image = only_tiles(name, 3)
    sampled = captured(name, blocks=(asked(image), words_of(name.split()[0])))
    check(sampled, "cross", image, WORDS)


# ------------------------------------------------------------------------------------------------- batches of all sorts


@pytest.mark.parametrize("name", ["sd15", "flux", "wan", "pixart"])
def test_two_images(name):
    """Of one prompt: two sequences of the prompt, two of guidance."""
    sampled = captured(name, images=2)
    for kind in kinds_of(name):
        check(sampled, kind, tiles(name), tiles(name))


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan"])
def test_two_prompts(name):
    """Each with its own words, of which one has fewer."""
    sampled = captured(name, prompt=[PROMPT, OTHER])
    kind = kinds_of(name)[0]
    check(sampled, kind, tiles(name), tiles(name))


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan", "pixart"])
@pytest.mark.parametrize("negative", [None, ""])
def test_guidance_off_or_of_nothing(name, negative):
    sampled = captured(name, negative=negative)
    check(sampled, kinds_of(name)[0], tiles(name), tiles(name))


def test_guidance_of_flux():
    """A second call at the same step."""
    sampled = captured("flux guided", steps="all")
    assert len(sampled.calls) == 4
    check(sampled, "joint", tiles("flux"), tiles("flux"), steps="all")


@pytest.mark.parametrize("way", ["native", "rows"])
def test_an_image_prompt(way):
    """Attention to the text, beside which there is another."""
    sampled = captured("image prompt", way=way)
    for kind in ("cross", "self"):
        check(sampled, kind, tiles("sd15"), tiles("sd15"))
    assert len(sampled.maps.left_out) == 4


@pytest.mark.parametrize("name", ["sd15", "wan", "ltx"])
def test_words_of_two_prompts(name):
    """A list of texts is of the prompts; guidance keeps its own words."""
    image = only_tiles(name, 3)
    texts = [PROMPT, OTHER]
    sampled = captured(name, prompt=texts, blocks=(asked(image), words_of(name, texts)))
    check(sampled, "cross", image, WORDS)


@pytest.mark.parametrize(("name", "kept"), [("sd15", 70), ("flux", 39)])
def test_a_prompt_that_is_cut_off(name, kept):
    """Only what the encoder was given has blocks: 72 tokens with start and end, 40 with an end."""
    words = (PROMPT + " ") * 8
    sampled = captured(name, prompt=words.strip())
    first = sampled.found[0] = dataclasses.replace(sampled.found[0], text=" ".join(words.split()[:kept]))
    block_map = sampled.maps[kinds_of(name)[0]]
    assert block_map.metadata["sequences"][0]["text"] == words.strip()
    expected = dense.dense_map(
        name,
        sampled.calls,
        [first],
        sampled.sites(kinds_of(name)[0], tiles(name), tiles(name)),
        *[tiles(name)] * 2,
    )
    assert_same(block_map.select(sequence=0), expected)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_half_precision(name):
    """The probabilities of bfloat16 queries and keys, computed and summed in float32 or better."""
    sampled = captured(name, "half")
    kind = kinds_of(name)[0]
    check(sampled, kind, tiles(name), tiles(name))


# ------------------------------------------------------------------------------------------------------------ heat maps


@pytest.mark.parametrize("name", ["sd15", "flux wide", "wan", "levels"])
def test_heat_maps(name):
    """The mean over layers of a word's column, by step and head; a word that stands twice has both places."""
    sampled = captured(name, heads="all", steps="all")
    kind = kinds_of(name)[0]
    query, _ = default(name)
    sites = sampled.sites(kind, query, query)
    every = dense.dense_map(name, sampled.calls, sampled.found, sites, query, WORDS, "all", "all")
    expected = (every if name == "flux wide" else every[0]).mean(1)
    frames, height, width = (-(-length // edge) for length, edge in query.tiling.axes())
    expected = expected[..., -frames * height * width :, :]
    shape = (height, width) if frames == 1 else (frames, height, width)
    for word, places in (("red", [1]), ("Table,", [6]), ("a", [0, 8]), (3, [3])):
        heat = sampled.maps.heat_map(word)
        assert heat.shape == shape
        assert np.abs(heat - expected[..., places].mean((0, 1, -1)).reshape(shape)).max() <= TOLERANCE
    one = sampled.maps.heat_map("cube", step=1, head=0)
    assert np.abs(one - expected[1, 0, :, 2].reshape(shape)).max() <= TOLERANCE


# ---------------------------------------------------------------------------------------------------- denoisers alone


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan"])
def test_a_denoiser_by_itself(name):
    """Called directly: each call with another timestep is a step, rows of the batch are sequences in order."""
    denoiser = getattr(pipe_of(name), FACTS[name].denoiser)
    inputs = {"sd15": unet_inputs, "sd3": sd3_inputs, "flux": flux_inputs, "wan": wan_inputs}[name]
    steps = [inputs(900.0, 0), inputs(400.0, 1)]
    image = only_tiles(name, 3)

    def call():
        with torch.no_grad():
            return [denoiser(**each, return_dict=False)[0] for each in steps]

    with recording(denoiser) as calls:
        native = call()
    with attnpatch.capture(denoiser, blocks=(asked(image), words_of(name)), steps="all") as maps:
        made = call()
    assert all(torch.equal(a, b) for a, b in zip(native, made, strict=True))
    found = [dense.Sequence("", PROMPT, 0, row) for row in range(2)]
    sampled = Sampled(name, maps, calls, found)
    sites = sampled.sites("cross", image, WORDS)
    assert list(maps.block_map.layers) == sites
    expected = dense.dense_map(name, calls, found, sites, image, WORDS, steps="all")
    assert_same(maps.block_map, expected)
    assert list(maps.block_map.key_labels[0]) == PROMPT.split()


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet_inputs(timestep, seed):
    return {
        "sample": numbers(seed, 2, 4, 16, 16),
        "timestep": timestep,
        "encoder_hidden_states": numbers(7, 2, 72, 32),
    }


def sd3_inputs(timestep, seed):
    return {
        "hidden_states": numbers(seed, 2, 4, 16, 16),
        "timestep": torch.full((2,), timestep),
        "encoder_hidden_states": numbers(7, 2, 72 + 256, 64),
        "pooled_projections": numbers(8, 2, 64),
    }


def flux_inputs(timestep, seed):
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    return {
        "hidden_states": numbers(seed, 2, 64, 16),
        "timestep": torch.full((2,), timestep / 1000),
        "encoder_hidden_states": numbers(7, 2, 40, 32),
        "pooled_projections": numbers(8, 2, 32),
        "img_ids": torch.stack([torch.zeros(8, 8), rows, columns], -1).reshape(64, 3),
        "txt_ids": torch.zeros(40, 3),
    }


def wan_inputs(timestep, seed):
    return {
        "hidden_states": numbers(seed, 2, 16, 3, 4, 6),
        "timestep": torch.full((2,), timestep),
        "encoder_hidden_states": numbers(7, 2, 40, 32),
    }
