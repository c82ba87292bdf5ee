"""Which image a call of the denoiser is of: guidance, samplers and hosts that call it in other ways than once in a step."""

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from dense_images import pipe_of, recording
from image_columns import sample
from image_denoisers import TEXT, Attention, numbers, recording_of
from pipelines import NEGATIVE, PROMPT

import attnpatch
from attnpatch import errors
from attnpatch.hosts.diffusers.components import is_denoiser

SITES = "*.attn1"


def of(kind, **more):
    """Another pipeline of Stable Diffusion's parts."""
    parts = {each: part for each, part in pipe_of("sd15").components.items() if part is not None}
    unchecked = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = getattr(diffusers, kind)(**{**parts, **unchecked}, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def captured(pipe, denoiser="unet", **call):
    """Every call's probabilities without attnpatch, and the maps; the images are the same."""
    with recording(getattr(pipe, denoiser)) as calls:
        native = sample(pipe, PROMPT, **call)[0]
    with attnpatch.capture(pipe, sites=SITES if denoiser == "unet" else None) as maps:
        made = sample(pipe, PROMPT, **call)[0]
    assert np.array_equal(np.asarray(native), np.asarray(made))
    return calls, maps


def assert_shows(maps, sequence, rows):
    """Self-attention on each site's own grid is the mean of rows: a call, and a place in its batch."""
    for name in maps.sites:
        one = maps.map(name, own_grid=True)
        mass = (one.select(sequence=sequence) if one.is_batch else one).mass[0].numpy()
        site = name.partition(".")[2]
        expected = np.mean([call.sites[site][place].mean(0) for call, place in rows], axis=0)
        assert mass.shape == expected.shape and np.abs(mass - expected).max() < 1e-6


def described(maps):
    found = maps.map(next(iter(maps.sites))).metadata["sequences"]
    return [(each["role"], each["image"], each.get("again", False)) for each in found]


# ------------------------------------------------------------------------------------------------ calls beside the sampler's


def test_an_image_that_is_blurred_for_guidance():
    """Self-attention guidance calls the UNet again, with the negative prompt and other latents: the prompt's are as ever."""
    pipe = of("StableDiffusionSAGPipeline")
    calls, maps = captured(pipe, negative_prompt=NEGATIVE, sag_scale=0.75)
    assert [call.batch for call in calls] == [2, 1] * 2
    assert described(maps) == [("prompt", 0, False)]
    assert_shows(maps, 0, [(call, 1) for call in calls if call.batch == 2])
    (left,) = maps.left_out.items()
    assert left[0] == "images of text 0" and "2 times in one step, each time with other latents" in left[1]


def test_no_image_that_is_known():
    """Without a negative prompt both calls have the prompt."""
    pipe = of("StableDiffusionSAGPipeline")
    calls, maps = captured(pipe, guidance_scale=1.0, sag_scale=0.75)
    assert len(calls) == 4
    with pytest.raises(
        errors.CaptureError, match=r"nothing was captured.*other latents, but the sampler asks for 1"
    ):
        _ = maps.block_map


@pytest.mark.parametrize("at_once", [1, 2])
def test_parts_of_an_image_one_by_one(at_once):
    """A panorama: three views of one image in each step, also where the last call has fewer of them than the first."""
    pipe = of("StableDiffusionPanoramaPipeline")
    wide = {"height": 32, "width": 96, "num_inference_steps": 1, "view_batch_size": at_once}
    pipe.get_views = lambda *_, **__: [(0, 16, left, left + 16) for left in (0, 16, 32)]
    calls, maps = captured(pipe, negative_prompt=NEGATIVE, **wide)
    assert [call.batch for call in calls] == ([2, 2, 2] if at_once == 1 else [4, 2])
    with pytest.raises(errors.CaptureError, match=r"nothing was captured.*parts of it"):
        _ = maps.block_map
    assert list(maps.left_out) == ["images of text 0", "images of text 1"]


def test_a_sampler_that_asks_twice():
    """Heun's method: every call is the sampler's."""
    pipe = of("StableDiffusionPipeline")
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    calls, maps = captured(pipe, negative_prompt=NEGATIVE, num_inference_steps=3)
    assert len(calls) == 5 and maps.left_out == {}
    assert described(maps) == [("prompt", 0, False), ("negative", 0, False)]
    assert_shows(maps, 0, [(call, 1) for call in calls])


def test_layers_that_are_skipped_for_guidance():
    """The prompt and its latents once more, through a transformer without a layer."""
    pipe = pipe_of("sd3")
    guided = {
        "skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0,
        "num_inference_steps": 3, "negative_prompt": NEGATIVE,
    }  # fmt: skip
    calls, maps = captured(pipe, "transformer", **guided)
    plain = [call for call in calls if call.batch == 2]
    assert len(plain) < len(calls)
    ((name, why),) = maps.left_out.items()
    assert name == "image 0 of text 1" and "again in one step, with the same text and latents" in why
    site = "transformer_blocks.1.attn"
    block_map = maps.map("transformer." + site, own_grid=True)
    count, image = len(PROMPT.split()), 16 * 16
    dense = np.mean([call.sites[site][1].mean(0) for call in plain], axis=0)[:image, :image]
    mass = block_map.select(sequence=0).mass[0].numpy()[count:, count:]
    assert np.abs(mass - dense).max() < 1e-6


@pytest.mark.parametrize("images", [1, 2])
def test_rows_that_are_perturbed_for_guidance(images):
    """Perturbed-attention guidance puts the prompt's rows into the batch once more: these are no other images."""
    pipe = of("StableDiffusionPAGPipeline", pag_applied_layers=["mid"])
    calls, maps = captured(pipe, negative_prompt=NEGATIVE, pag_scale=3.0, num_images_per_prompt=images)
    numbers = range(images)
    assert described(maps) == [
        *(("prompt", n, False) for n in numbers),
        *(("negative", n, False) for n in numbers),
        *(("prompt", n, True) for n in numbers),
    ]
    for sequence, place in enumerate([*range(images, 2 * images), *numbers, *range(2 * images, 3 * images)]):
        assert_shows(maps, sequence, [(call, place) for call in calls])
    assert (
        all("pieces (sequences x heads), but" in why for why in maps.left_out.values())
        and len(maps.left_out) == 1
    )


def test_inference_mode():
    """Its tensors do not count what is written to them."""
    pipe = of("StableDiffusionPipeline")
    with recording(pipe.unet) as calls:
        sample(pipe, PROMPT, negative_prompt=NEGATIVE)
    with attnpatch.capture(pipe, sites=SITES) as maps, torch.inference_mode():
        sample(pipe, PROMPT, negative_prompt=NEGATIVE)
    assert maps.left_out == {} and len(maps.sites) == 4
    assert_shows(maps, 0, [(call, 1) for call in calls])


# ----------------------------------------------------------------------------------------------------- steps, texts, names


class Denoiser(nn.Module):
    """One attention, of the image to itself or to a text."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = Attention()

    def forward(self, hidden_states, timestep, encoder_hidden_states=None, encoder_hidden_states_t5=None):
        image = hidden_states.flatten(2).mT
        given = [each for each in (encoder_hidden_states, encoder_hidden_states_t5) if each is not None]
        return self.attention(image, *([torch.cat(given, 1)] if given else []))


# Of two frames' tokens: the first is given (an image that a video is made of), or noise that is ahead of the other's.
SCHEDULES = {
    "one": [900.0, 600.0, 300.0],
    "of each of a batch": [[900.0], [600.0], [300.0]],
    "of each token": [[[0.0] * 8 + [t] * 8] for t in (900.0, 600.0, 300.0)],
    "of what is given, not 0": [[[50.0] * 8 + [t] * 8] for t in (900.0, 600.0, 300.0)],
    "one after the other": [[[900.0, 900.0]], [[600.0, 900.0]], [[300.0, 900.0]]],
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_timesteps_of_single_tokens(case):
    """Image to video: what is given has a timestep that stays as it is."""
    denoiser, steps = Denoiser().eval(), SCHEDULES[case]
    images = [numbers(seed, 1, 16, 4, 4) for seed in range(len(steps))]
    with torch.no_grad(), recording_of(denoiser) as dense:
        for image, step in zip(images, steps, strict=True):
            denoiser(image, torch.tensor(step))
    with torch.no_grad(), attnpatch.capture(denoiser, steps="all") as maps:
        for image, step in zip(images, steps, strict=True):
            denoiser(image, torch.tensor(step))
    block_map = maps.map("attention", own_grid=True)
    assert block_map.metadata["timesteps"] == [max(torch.tensor(step).flatten().tolist()) for step in steps]
    assert len(block_map.mass) == len(dense) == 3
    for layer, one in zip(block_map.mass, dense, strict=True):
        assert np.abs(layer[0].numpy() - one[0].mean(0)).max() < 1e-6


def test_guidance_that_is_given_no_image():
    """A second call of a step leaves out the timestep of what is given."""
    denoiser, image = Denoiser().eval(), numbers(1, 1, 16, 4, 4)
    with torch.no_grad(), attnpatch.capture(denoiser, steps="all") as maps:
        for step in (900.0, 600.0):
            for timesteps, seed in (([0.0, step], 7), ([step, step], 8)):
                denoiser(image, torch.tensor([timesteps]), numbers(seed, 1, TEXT, 16))
    block_map = maps.block_map
    assert block_map.metadata["timesteps"] == [900.0, 600.0] and block_map.mass.shape[:2] == (2, 2)


class OfOneText(Denoiser):
    """Looks at some of the texts that it is given."""

    def __init__(self, which):
        super().__init__()
        self.which = which

    def forward(self, hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_t5):
        texts = encoder_hidden_states, encoder_hidden_states_t5
        chosen = [text if number in self.which else None for number, text in enumerate(texts)]
        return super().forward(hidden_states, timestep, *chosen)


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
def test_two_texts_of_one_length(which):
    """Words are the first one's: tokens of another text are none of them, however many they are."""
    denoiser, image = OfOneText(which).eval(), numbers(1, 1, 16, 4, 4)
    call = image, torch.tensor(1.0), numbers(7, 1, TEXT, 16), numbers(8, 1, TEXT, 16)
    with torch.no_grad(), recording_of(denoiser) as dense:
        denoiser(*call)
    with torch.no_grad(), attnpatch.capture(denoiser) as maps:
        denoiser(*call)
    if which == (1,):
        assert maps.left_out == {"attention": f"it attends with {TEXT} keys of a second text"}
        return
    layer = maps.map("attention", own_grid=True).mass[0].numpy()
    assert np.abs(layer - dense[0][0].mean(0)[:, :TEXT]).max() < 1e-6
    said = {f"attention ({TEXT} tokens)": "these tokens are of a second text; they are in no block"}
    assert maps.left_out == (said if 1 in which else {})


class OfLatentDiffusion(nn.Module):
    """Arguments as in the code that latent diffusion was published with."""

    def __init__(self):
        super().__init__()
        self.inner = Denoiser()

    def forward(self, x, timesteps=None, context=None):
        return self.inner(x, timesteps, context)


def test_names_of_published_code():
    denoiser, text = OfLatentDiffusion().eval(), numbers(7, 1, TEXT, 16)
    image, step = numbers(1, 1, 16, 4, 4), torch.tensor([5.0])
    with torch.no_grad(), recording_of(denoiser.inner) as dense:
        denoiser(image, step, context=text)
    with torch.no_grad(), attnpatch.capture(denoiser) as maps:
        denoiser(image, step, context=text)
    assert list(maps.keys()) == ["cross"] and maps["cross"].metadata["timesteps"] == [5.0]
    assert np.abs(maps["cross"].mass[0].numpy() - dense[0][0].mean(0)).max() < 1e-6


def test_who_is_a_denoiser():
    """ControlNet-XS's UNet takes what controls it; Stable Cascade's and HiDream's call their timestep otherwise."""
    for name in (
        "UNetControlNetXSModel",
        "StableCascadeUNet",
        "HiDreamImageTransformer2DModel",
        "UNet2DModel",
    ):
        assert is_denoiser(object.__new__(getattr(diffusers, name))), name
    for name in ("ControlNetModel", "ControlNetXSAdapter", "FluxControlNetModel", "AutoencoderKL"):
        assert not is_denoiser(object.__new__(getattr(diffusers, name))), name


class ChannelsLast(Denoiser):
    """As Kandinsky 5: patches of 2 x 2, a mask among the channels, and positions of frames, rows and columns."""

    def forward(self, hidden_states, timestep, visual_rope_pos=None):
        batch, frames, rows, columns, _ = hidden_states.shape
        patches = hidden_states[..., :4].view(batch, frames, rows // 2, 2, columns // 2, 2, 4)
        return self.attention(patches.transpose(3, 4).flatten(4).flatten(1, 3))


def test_positions_of_each_axis():
    denoiser, video = ChannelsLast().eval(), numbers(1, 1, 2, 8, 12, 9)
    positions = [torch.arange(count) for count in (2, 4, 6)]
    with torch.no_grad(), recording_of(denoiser) as dense:
        denoiser(video, torch.tensor(1.0))
    with torch.no_grad(), attnpatch.capture(denoiser) as maps:
        denoiser(video, torch.tensor(1.0), positions)
    block_map = maps.map("attention", own_grid=True)
    assert block_map.metadata["query_tiles"] == [2, 4, 6] and maps.left_out == {}
    assert np.abs(block_map.mass[0].numpy() - dense[0][0].mean(0)).max() < 1e-6
    for unclear in (None, positions[:2], [2, 4, 6]):
        with torch.no_grad(), attnpatch.capture(denoiser) as maps:
            denoiser(video, torch.tensor(1.0), unclear)
        assert "the call does not say in which rows and columns they lie" in maps.left_out["attention"]


OTHERS_ROWS = {
    "the first's": lambda image: image[:1].expand(len(image), -1, -1),
    "the first's, repeated": lambda image: image[:1].repeat(len(image), 1, 1),
    "the first's, stacked": lambda image: torch.stack([image[0]] * len(image)),
    "the first's, added to nothing": lambda image: torch.zeros_like(image) + image[:1],
    "the next one's": lambda image: torch.cat([image[1:], image[:1]]),
    "in reverse": lambda image: torch.cat(image.chunk(3)[::-1]),
    "the mean of all": lambda image: image.mean(0, keepdim=True).expand_as(image),
    "turned around": lambda image: image.flip(0),
}
OWN_ROWS = {
    "its own": lambda image: image * 1.0,
    "tokens first and back": lambda image: image.transpose(0, 1).contiguous().transpose(0, 1),
    "folded": lambda image: image.flatten(0, 1).mul(1.0).unflatten(0, image.shape[:2]),
    "with the first's added": lambda image: image[:1] + image,
}


class Context(Denoiser):
    """Attends to what is made of the images outside the module."""

    def __init__(self, made):
        super().__init__()
        self.made = made

    def forward(self, hidden_states, timestep):
        image = hidden_states.flatten(2).mT
        return self.attention(image, self.made(image))


@pytest.mark.parametrize("case", [*OTHERS_ROWS, *OWN_ROWS])
def test_rows_of_the_batch(case):
    """Keys of another image of the batch are none of this one's tiles."""
    denoiser, images = Context({**OTHERS_ROWS, **OWN_ROWS}[case]).eval(), numbers(1, 3, 16, 4, 4)
    with torch.no_grad(), recording_of(denoiser) as dense:
        denoiser(images, torch.tensor(1.0))
    with torch.no_grad(), attnpatch.capture(denoiser) as maps:
        denoiser(images, torch.tensor(1.0))
    if case in OTHERS_ROWS:
        assert set(maps.left_out) == {"attention"}
        with pytest.raises(errors.CaptureError, match="nothing was captured"):
            _ = maps.block_map
        return
    assert maps.left_out == {}
    for row, native in zip(maps.map("attention", own_grid=True).mass, dense[0], strict=True):
        assert np.abs(row[0].numpy() - native.mean(0)).max() < 1e-6


def test_a_reference_of_another_row_beside_its_own():
    """Own tokens are shown; those of the first image are in no block."""
    denoiser, images = (
        Context(lambda image: torch.cat([image, image[:1].expand_as(image)], 1)).eval(),
        numbers(1, 3, 16, 4, 4),
    )
    with torch.no_grad(), recording_of(denoiser) as dense:
        denoiser(images, torch.tensor(1.0))
    with torch.no_grad(), attnpatch.capture(denoiser) as maps:
        denoiser(images, torch.tensor(1.0))
    ((name, why),) = maps.left_out.items()
    assert name == "attention (16 tokens)" and "of rows of the batch" in why
    for row, native in zip(maps.map("attention", own_grid=True).mass, dense[0], strict=True):
        assert np.abs(row[0].numpy() - native.mean(0)[:, :16]).max() < 1e-6


@pytest.mark.parametrize("steps", ["mean", "all"])
def test_a_site_that_is_refused_later_has_no_map(steps):
    """Nor one of the calls before, which had another batch."""
    denoiser = Context(lambda image: image if len(image) == 1 else image.flip(0)).eval()
    with torch.no_grad(), attnpatch.capture(denoiser, steps=steps) as maps:
        denoiser(numbers(1, 1, 16, 4, 4), torch.tensor(2.0))
        denoiser(numbers(1, 3, 16, 4, 4), torch.tensor(1.0))
    assert "put into another order (flip)" in maps.left_out["attention"]
    with pytest.raises(errors.CaptureError, match="nothing was captured"):
        _ = maps.block_map
