"""Two coloured shapes from a caption: the captions, their pictures, and a pipeline that draws them.

What ``demo_model/train_shapes.py`` and ``heat_maps.py`` share. A caption reads "red circle left, blue square right"; the
pictures are 32 x 32 pixels, and the models draw pixels, so there is no autoencoder.
"""

import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

MODELS = Path(__file__).parent / "shapes_models"
SIZE = 32
BACKGROUND = (0.92, 0.92, 0.92)
COLOURS = {
    "red": (0.86, 0.12, 0.12),
    "green": (0.12, 0.62, 0.16),
    "blue": (0.12, 0.22, 0.86),
    "yellow": (0.94, 0.82, 0.10),
    "purple": (0.58, 0.16, 0.68),
    "black": (0.08, 0.08, 0.08),
}
# How far each shape reaches from its middle, for a radius of 1.
SHAPES = {"circle": 1.0, "square": 0.88, "triangle": 1.1, "diamond": 1.15}
PLACES = (("left", "right"), ("top", "bottom"))
RADII = (4.5, 6.75)
HELD_OUT = 100


@dataclass(frozen=True)
class Thing:
    """One shape of a caption: its words."""

    colour: str
    shape: str
    place: str

    @property
    def words(self) -> tuple[str, ...]:
        """The words of the caption that name it."""
        return (self.colour, self.shape, self.place)


Caption = tuple[Thing, Thing]


def text(caption: Caption) -> str:
    """The caption as a pipeline is given it."""
    return ", ".join(" ".join(thing.words) for thing in caption)


def captions() -> tuple[list[Caption], list[Caption]]:
    """All captions, for training and held out; the same every time.

    A caption has two colours and two shapes, none twice, and the two shapes named in either order. What is held
    out is the picture: its caption is in the second list in one order, and neither order is in the first.
    """
    every = [
        (Thing(*one, first), Thing(*other, second))
        for first, second in PLACES
        for one in itertools.product(COLOURS, SHAPES)
        for other in itertools.product(COLOURS, SHAPES)
        if one[0] != other[0] and one[1] != other[1]
    ]
    shuffler = random.Random(0)
    shuffler.shuffle(every)
    held_out = [caption if shuffler.random() < 0.5 else caption[::-1] for caption in every[:HELD_OUT]]
    return [named for caption in every[HELD_OUT:] for named in (caption, caption[::-1])], held_out


def signed_distance(shape: str, down: torch.Tensor, across: torch.Tensor, radius: float) -> torch.Tensor:
    """How far each pixel is outside a shape, in pixels; negative inside.

    Args:
        shape: One of ``SHAPES``.
        down, across: ``[SIZE, SIZE]``, from the middle of the shape.
        radius: In pixels; shapes of one radius cover about the same area.
    """
    if shape == "circle":
        return (down.square() + across.square()).sqrt() - radius
    if shape == "square":
        return torch.maximum(down.abs(), across.abs()) - 0.88 * radius
    if shape == "diamond":
        return (down.abs() + across.abs() - 1.15 * radius) / 2**0.5
    sides = (across.abs() - 0.55 * (down + 1.1 * radius)) / (1 + 0.55**2) ** 0.5
    return torch.maximum(sides, down - 0.9 * radius)


def draw(caption: Caption, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture of a caption, its shapes of random size and anywhere in their halves.

    Returns:
        The picture, ``[3, SIZE, SIZE]`` float32 from -1 to 1, and where its shapes are, ``[2, SIZE, SIZE]`` bool.
    """
    rows, columns = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    picture = torch.tensor(BACKGROUND)[:, None, None].expand(3, SIZE, SIZE)
    masks = []
    for thing in caption:
        size, within, along = torch.rand(3, generator=generator).tolist()
        radius = RADII[0] + (RADII[1] - RADII[0]) * size
        reach = SHAPES[thing.shape] * radius
        half = reach + (SIZE / 2 - 2 * reach) * within
        middle = SIZE / 2 + (SIZE / 2 - reach) * 0.6 * (2 * along - 1)
        if thing.place in ("right", "bottom"):
            half += SIZE / 2
        y, x = (middle, half) if thing.place in PLACES[0] else (half, middle)
        outside = signed_distance(thing.shape, rows - y, columns - x, radius)
        cover = (0.5 - outside).clamp(0, 1)
        picture = picture + cover * (torch.tensor(COLOURS[thing.colour])[:, None, None] - picture)
        masks.append(cover > 0.5)
    return picture * 2 - 1, torch.stack(masks)


def drawn(picture: torch.Tensor, thing: Thing) -> torch.Tensor:
    """Where a picture shows a thing: pixels that are more than half its colour, the rest background.

    The rim of a shape is a mixture too, and one of black and background lies near purple; so a pixel is of the colour
    whose mixtures with the background come nearest to it, of all colours there are.

    Args:
        picture: ``[3, SIZE, SIZE]`` from 0 to 1, as a pipeline returns it.
        thing: What is looked for. No two things of a caption have the same colour.

    Returns:
        ``[SIZE, SIZE]`` bool; all False if the model did not draw it.
    """
    background = torch.tensor(BACKGROUND)[:, None, None]
    away = torch.tensor(list(COLOURS.values()))[:, :, None, None] - background
    share = ((picture - background) * away).sum(1) / away.square().sum(1)
    share = share.clamp(0, 1)
    distance = (picture - background - share[:, None] * away).square().sum(1)
    own = list(COLOURS).index(thing.colour)
    return (distance.argmin(0) == own) & (share[own] > 0.5)


def in_place(mask: torch.Tensor, thing: Thing) -> bool:
    """Whether a mask is as large as a shape may be and at least nine tenths of it lie in the right half.

    Args:
        mask: ``[SIZE, SIZE]`` bool.
        thing: What it is to be a mask of.
    """
    half = SIZE // 2
    side = {"left": mask[:, :half], "right": mask[:, half:], "top": mask[:half], "bottom": mask[half:]}
    area = int(mask.sum())
    # The smallest triangle has 42 pixels, the largest circle 143.
    return 30 <= area <= 180 and int(side[thing.place].sum()) >= 0.9 * area


def places(count: int) -> torch.Tensor:
    """How far down and how far across each tile of 2 x 2 pixels is, for a UNet.

    A transformer adds to each tile where it is; convolutions know only how far the border is, if it is near.

    Returns:
        ``[count, 8, SIZE / 2, SIZE / 2]``: sines and cosines, larger than the noise, or they are lost in it.
    """
    along = torch.linspace(-1, 1, SIZE // 2)
    waves = [(0.5 * torch.pi * along).sin(), *((k * torch.pi * along).sin() for k in (1, 2))]
    waves = 4 * torch.stack([*waves, (torch.pi * along).cos()])
    down, across = waves[:, :, None].expand(-1, -1, SIZE // 2), waves[:, None].expand(-1, SIZE // 2, -1)
    return torch.cat([down, across])[None].expand(count, -1, -1, -1)


def predict(
    denoiser: nn.Module, noisy: torch.Tensor, level: torch.Tensor, words: torch.Tensor
) -> torch.Tensor:
    """What a denoiser takes for noise minus picture.

    A transformer says that itself. A UNet is given tiles of 2 x 2 pixels too, with where they are, and says what the
    picture is: it need not carry the noise through, and most of its loss is which colour goes where.

    Args:
        denoiser: The UNet or the transformer.
        noisy: ``[B, 3, SIZE, SIZE]``, ``(1 - level) * picture + level * noise``.
        level: ``[B]``, above 0 to 1.
        words: ``[B, tokens, hidden]``.

    Returns:
        ``[B, 3, SIZE, SIZE]``.
    """
    told = {"timestep": level * 1000, "encoder_hidden_states": words, "return_dict": False}
    if not isinstance(denoiser, UNet2DConditionModel):
        return denoiser(noisy, **told)[0]
    tiles = torch.cat([F.pixel_unshuffle(noisy, 2), places(len(noisy)).to(noisy)], dim=1)
    picture = F.pixel_shuffle(denoiser(tiles, **told)[0], 2)
    return (noisy - picture) / level[:, None, None, None]


class ShapesPipeline(DiffusionPipeline):
    """Text to pictures in pixels, with the calling conventions of diffusers' own pipelines.

    Args:
        tokenizer: One token per word.
        text_encoder: Its ``last_hidden_state`` is what the denoiser attends to, as it is.
        scheduler: Flow matching: it is given noise minus picture.
        unet: The denoiser, or None if it is a transformer.
        transformer: The denoiser, or None if it is a UNet.
    """

    model_cpu_offload_seq = "text_encoder->unet->transformer"
    _optional_components: ClassVar[list[str]] = ["unet", "transformer"]

    def __init__(
        self, tokenizer, text_encoder, scheduler: FlowMatchEulerDiscreteScheduler, unet=None, transformer=None
    ):
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            scheduler=scheduler,
            unet=unet,
            transformer=transformer,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def denoiser(self):
        """The UNet or the transformer."""
        return self.unet if self.unet is not None else self.transformer

    @property
    def guidance_scale(self) -> float:
        """Of the call that runs."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the batch is the negative captions followed by the captions."""
        return self._guidance_scale > 1

    def encode_prompt(self, prompt: list[str]) -> torch.Tensor:
        """``[B, tokens, hidden]``; every caption is padded to the same length."""
        ids = self.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.text_encoder(ids.to(self._execution_device)).last_hidden_state

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 3.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ):
        """Draw captions.

        Args:
            prompt: One caption or several.
            negative_prompt: What to lead away from; no caption by default. One, or as many as there are captions.
            num_inference_steps: Calls of the denoiser.
            guidance_scale: Above 1, both captions go through the denoiser, in one batch.
            num_images_per_prompt: Pictures per caption.
            generator: Where the noise comes from.
            latents: The noise itself, ``[B, 3, SIZE, SIZE]``.
            output_type: ``"pil"``, ``"np"`` (``[B, H, W, 3]``) or ``"pt"`` (``[B, 3, H, W]``), both from 0 to 1.
            return_dict: False for a plain tuple.

        Returns:
            ``ImagePipelineOutput`` with ``images``.
        """
        self._guidance_scale = guidance_scale
        prompt = [prompt] if isinstance(prompt, str) else list(prompt)
        negative = negative_prompt if negative_prompt is not None else ""
        negative = [negative] * len(prompt) if isinstance(negative, str) else list(negative)
        words = self.encode_prompt(prompt).repeat_interleave(num_images_per_prompt, dim=0)
        if self.do_classifier_free_guidance:
            led_away = self.encode_prompt(negative).repeat_interleave(num_images_per_prompt, dim=0)
            words = torch.cat([led_away, words])
        count = len(prompt) * num_images_per_prompt
        if latents is None:
            latents = randn_tensor((count, 3, SIZE, SIZE), generator, self._execution_device, words.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            inputs = torch.cat([latents, latents]) if self.do_classifier_free_guidance else latents
            level = (timestep / self.scheduler.config.num_train_timesteps).expand(len(inputs))
            velocity = predict(self.denoiser, inputs, level, words)
            if self.do_classifier_free_guidance:
                without, with_caption = velocity.chunk(2)
                velocity = without + guidance_scale * (with_caption - without)
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        images = self.image_processor.postprocess(latents, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def load(name: str, folder: Path = MODELS) -> ShapesPipeline:
    """A trained pipeline, ``"unet"`` or ``"dit"``, in float32."""
    pipe = ShapesPipeline.from_pretrained(folder / name, local_files_only=True)
    # It is stored in float16.
    pipe.denoiser.float()
    pipe.text_encoder.float()
    pipe.set_progress_bar_config(disable=True)
    return pipe
