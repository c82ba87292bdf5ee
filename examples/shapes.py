"""Captions of two coloured shapes, their pictures, and a pipeline that draws them.

``demo_model/train_shapes.py`` and ``heat_maps.py`` use this module. A caption is "red circle left, blue square right".
The pictures are 32 x 32 pixels; the models draw pixels, so there is no autoencoder.
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
# The distance from a shape's centre to its farthest edge, for a radius of 1.
SHAPES = {"circle": 1.0, "square": 0.88, "triangle": 1.1, "diamond": 1.15}
PLACES = (("left", "right"), ("top", "bottom"))
RADII = (4.5, 6.75)
HELD_OUT = 100


@dataclass(frozen=True)
class Thing:
    """One shape of a caption, by its words."""

    colour: str
    shape: str
    place: str

    @property
    def words(self) -> tuple[str, ...]:
        """The words of the caption that describe it."""
        return (self.colour, self.shape, self.place)


Caption = tuple[Thing, Thing]


def text(caption: Caption) -> str:
    """The caption as text."""
    return ", ".join(" ".join(thing.words) for thing in caption)


def captions() -> tuple[list[Caption], list[Caption]]:
    """All captions: those for training, and those held out; the same every time.

    A caption names two different shapes in two different colours, in either order. Pictures are held out, not captions:
    the second list has a held-out picture's caption in one order, and the first list has it in neither.
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
        down, across: ``[SIZE, SIZE]``, distances from the shape's centre in pixels.
        radius: In pixels; shapes of the same radius have about the same area.
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
    """Draw a caption, with shapes of random size at random positions in their halves.

    Returns:
        The picture, ``[3, SIZE, SIZE]`` float32 from -1 to 1, and the masks of its shapes, ``[2, SIZE, SIZE]`` bool.
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
    """The pixels of a picture that show a thing: more than half of the pixel is the thing's colour.

    A pixel at a shape's edge mixes its colour with the background, and such a mixture of black is close to purple. So
    each pixel is assigned to the colour whose mixtures with the background come nearest to it.

    Args:
        picture: ``[3, SIZE, SIZE]`` from 0 to 1, as a pipeline returns it.
        thing: The thing to find. The two things of a caption have different colours.

    Returns:
        ``[SIZE, SIZE]`` bool; all False if the model did not draw the thing.
    """
    background = torch.tensor(BACKGROUND)[:, None, None]
    away = torch.tensor(list(COLOURS.values()))[:, :, None, None] - background
    share = ((picture - background) * away).sum(1) / away.square().sum(1)
    share = share.clamp(0, 1)
    distance = (picture - background - share[:, None] * away).square().sum(1)
    own = list(COLOURS).index(thing.colour)
    return (distance.argmin(0) == own) & (share[own] > 0.5)


def in_place(mask: torch.Tensor, thing: Thing) -> bool:
    """Whether a mask has a possible size for a shape, and at least nine tenths of it are in the correct half.

    Args:
        mask: ``[SIZE, SIZE]`` bool.
        thing: The thing that the mask should show.
    """
    half = SIZE // 2
    side = {"left": mask[:, :half], "right": mask[:, half:], "top": mask[:half], "bottom": mask[half:]}
    area = int(mask.sum())
    # The smallest triangle has 42 pixels, the largest circle 143.
    return 30 <= area <= 180 and int(side[thing.place].sum()) >= 0.9 * area


def places(count: int) -> torch.Tensor:
    """Position channels for a UNet: the row and the column of each tile of 2 x 2 pixels.

    A transformer adds position embeddings itself. Convolutions can infer a position only close to the border.

    Returns:
        ``[count, 8, SIZE / 2, SIZE / 2]``: sines and cosines, scaled to be larger than the noise.
    """
    along = torch.linspace(-1, 1, SIZE // 2)
    waves = [(0.5 * torch.pi * along).sin(), *((k * torch.pi * along).sin() for k in (1, 2))]
    waves = 4 * torch.stack([*waves, (torch.pi * along).cos()])
    down, across = waves[:, :, None].expand(-1, -1, SIZE // 2), waves[:, None].expand(-1, SIZE // 2, -1)
    return torch.cat([down, across])[None].expand(count, -1, -1, -1)


def predict(
    denoiser: nn.Module, noisy: torch.Tensor, level: torch.Tensor, words: torch.Tensor
) -> torch.Tensor:
    """Predict noise minus picture with a denoiser.

    A transformer predicts it directly. A UNet gets tiles of 2 x 2 pixels and their positions, and predicts the picture:
    then it need not reproduce the noise, and most of its loss is about which colour belongs where.

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
    """Draws captions as pixels, with the calling conventions of diffusers' own pipelines.

    Args:
        tokenizer: One token per word.
        text_encoder: The denoiser attends to its ``last_hidden_state`` directly.
        scheduler: Flow matching; it takes noise minus picture.
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
        """The guidance scale of the running call."""
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
            negative_prompt: Caption to steer away from; an empty one by default. One, or as many as captions.
            num_inference_steps: Calls of the denoiser.
            guidance_scale: Above 1, captions and negative captions go through the denoiser in one batch.
            num_images_per_prompt: Pictures per caption.
            generator: Generator of the noise.
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
    """Load a trained pipeline, ``"unet"`` or ``"dit"``, in float32."""
    pipe = ShapesPipeline.from_pretrained(folder / name, local_files_only=True)
    # The weights are stored in float16.
    pipe.denoiser.float()
    pipe.text_encoder.float()
    pipe.set_progress_bar_config(disable=True)
    return pipe
