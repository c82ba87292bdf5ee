"""Block maps of images equal those of dense float64 probabilities."""

import contextlib
import dataclasses

import numpy as np
import pytest

pytest.importorskip("diffusers")

import dense_images as dense
from dense_images import FACTS, Tiling, pipe_of, recorded, sample, sequences
from pipelines import CASES, NEGATIVE, PROMPT

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

    def sites(self, kind):
        """Names of the sites of one kind, without the component's."""
        facts = FACTS[self.name]
        names = []
        for site, matrix in self.calls[0].sites.items():
            sides = [{k for k, _ in dense.segments_of(facts, site, n)} for n in matrix.shape[-2:]]
            if sides == KINDS[kind]:
                names.append(site)
        return names


KINDS = {
    "cross": [{"image"}, {"text"}],
    "self": [{"image"}, {"image"}],
    "joint": [{"image", "text"}, {"image", "text"}],
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
        call["negative_prompt"] = negative or None
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
    sites = sites or sampled.sites(kind)
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


def whole(name):
    """Blocks where nobody says which: the words, and the image in as many tiles as it has, which is little here."""
    return dense.Blocks(True, Tiling(FACTS[name].image, 1))


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
        check(sampled, kind, whole(name), whole(name))


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan"])
def test_heads_and_steps(name):
    """Every head and step apart; in Wan a step is two calls."""
    sampled = captured(name, heads="all", steps="all")
    for kind in kinds_of(name):
        block_map = check(sampled, kind, whole(name), whole(name), heads="all", steps="all")
        assert block_map.steps == (0, 1)


@pytest.mark.parametrize("way", ["native", "rows"])
@pytest.mark.parametrize(("heads", "steps"), [([1], [0, -1]), ([1, 0], "mean"), ("mean", [-1])])
def test_some_heads_and_steps(heads, steps, way):
    sampled = captured("sd15", heads=heads, steps=steps, way=way, call={"num_inference_steps": 3})
    for kind in ("cross", "self"):
        check(sampled, kind, whole("sd15"), whole("sd15"), heads=heads, steps=steps)
