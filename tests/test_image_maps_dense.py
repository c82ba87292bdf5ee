"""Block maps of images equal those of dense float64 probabilities."""

import contextlib
import dataclasses

import numpy as np
import pytest

pytest.importorskip("diffusers")

import dense_images as dense
from dense_images import FACTS, Tiling, pipe_of, recorded, sample, sequences
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
        for site, matrix in self.calls[0].sites.items():
            shown = []
            for length, blocks in zip(matrix.shape[-2:], (query, key), strict=True):
                kinds = {each for each, _ in dense.segments_of(FACTS[self.name], site, length)}
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


def captured(name, processor="fused", way="native", prompt=PROMPT, negative=NEGATIVE, images=1, call=None, **kw):
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
    assert maps.left_out == {}
    if name == "flux":
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
    missing = block_map.missing_mass.numpy().astype(np.float64)
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
        lengths = sampled.calls[0].sites[sites[0]].shape[-2:]
        for side, blocks, length in zip(("query", "key"), (query, key), lengths, strict=True):
            labels, sizes = dense.labels_of(facts, sites[0], length, blocks, sequence)
            if not blocks.own_grid:
                assert list(getattr(one, f"{side}_labels")) == labels
                assert getattr(one, f"{side}_sizes").tolist() == sizes
    return block_map


def tiles(name, tile=1):
    """An image cut in the unit that maps have by default."""
    return dense.Blocks(True, Tiling(FACTS[name].image, tile))


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
    return {"sd3": ("joint", "self"), "flux": ("joint",)}.get(name, ("cross", "self"))


# ------------------------------------------------------------------------------------------------------ every pipeline


@pytest.mark.parametrize("way", ["native", "rows"])
@pytest.mark.parametrize("name", [*GUIDED, "flux"])
def test_every_pipeline(name, way):
    """Words and the whole image, guidance beside the prompt, mean over heads and steps."""
    sampled = captured(name, way=way)
    assert sorted(sampled.maps.keys()) == sorted(kinds_of(name))
    for kind in kinds_of(name):
        check(sampled, kind, tiles(name), tiles(name))


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan"])
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


@pytest.mark.parametrize("processor", ["fused", "by hand"])
@pytest.mark.parametrize("way", ["native", "rows"])
def test_sites_of_different_resolution(way, processor):
    """22 x 14, 11 x 7 and 6 x 4 tokens of 44 x 28 latents, in tiles of two latents as queries and three as keys."""
    sampled = captured("levels", processor, way)
    query, key = tiles("levels", 2), tiles("levels", 3)
    for kind in ("cross", "self"):
        block_map = check(sampled, kind, query, key)
        assert len(block_map.layers) == 7


@pytest.mark.parametrize("image", [Tiling((1, 44, 28), 5), Tiling((1, 11, 7), 2), Tiling((1, 22, 14), 1)])
@pytest.mark.parametrize("heads", ["mean", "all"])
def test_tiles_of_any_unit(image, heads):
    """The image in latents, or in tokens of one of its levels; tiles that fit no level."""
    blocks = dense.Blocks(False, image)
    sampled = captured("levels", blocks=asked(blocks), heads=heads)
    check(sampled, "self", blocks, blocks, heads=heads)


@pytest.mark.parametrize(("pattern", "site"), LEVELS.items())
def test_own_grid(pattern, site):
    """Sites of one resolution in their own cells: single tokens, or those inside one tile."""
    sampled = captured("levels")
    query, key = (dataclasses.replace(tiles("levels", edge), own_grid=True) for edge in (2, 3))
    for end, kind in ((".attn1", "self"), (".attn2", "cross")):
        block_map = sampled.maps.map(pattern + end, own_grid=True)
        names = [n for n in sampled.sites(kind, query, key) if pattern.strip("*") in n]
        check(sampled, kind, query, key, block_map, names)
        if site[1] <= 11:
            assert block_map.metadata["query_tiles"] == list(site)
            assert block_map.query_labels[0][-1] == f"r{site[1] - 1}c{site[2] - 1}"


# ------------------------------------------------------------------------------------------------- batches of all sorts


@pytest.mark.parametrize("name", ["sd15", "flux", "wan", "pixart"])
def test_two_images(name):
    """Of one prompt: two sequences of the prompt, two of guidance."""
    sampled = captured(name, images=2)
    for kind in kinds_of(name):
        check(sampled, kind, tiles(name), tiles(name))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "wan", "ltx"])
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
