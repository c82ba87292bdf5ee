"""Where the words of a caption went: heat maps of two trained models, measured against what the models drew.

    python examples/heat_maps.py --out heat_maps

For each held-out caption ("red circle left, blue square right") a model draws its picture, and each shape gets a
heat map: the mean attention that the pixels pay to its words, over heads, layers with captions and steps. The
map above its own mean plus one standard deviation is compared with the pixels that have the shape's colour.
Every caption counts; a shape that was not drawn counts as an overlap of 0.
"""

import argparse
import collections
import contextlib
import time
from pathlib import Path

import shapes
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image

SIZE = shapes.SIZE
# What is measured, and what it is called in the table.
LABELS = {
    "words": "all words of a shape",
    "colour": "its colour alone",
    "shape": "its shape alone",
    "place": "its place alone",
}


class Recorder:
    """An attention processor for the layers that look at the caption: does as they do, and keeps where."""

    def __init__(self):
        self.maps: list[torch.Tensor] = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **others):
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        # The batch is the negative captions, then the captions.
        seen = attn.get_attention_scores(query, key).unflatten(0, (len(hidden_states), -1))[-1].mean(0)
        side = round(seen.shape[0] ** 0.5)
        seen = seen.T.reshape(1, -1, side, side)
        self.maps.append(F.interpolate(seen, size=(SIZE, SIZE), mode="bilinear")[0])
        return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask, **others)


@contextlib.contextmanager
def recorded(denoiser):
    """A :class:`Recorder` in every layer that looks at the caption, and what was there before afterwards."""
    before = dict(denoiser.attn_processors)
    recorder = Recorder()
    denoiser.set_attn_processor(
        {name: recorder if "attn2" in name else processor for name, processor in before.items()}
    )
    try:
        yield recorder
    finally:
        denoiser.set_attn_processor(before)


def heat(pipe, caption: str, words: list[tuple[str, ...]], seed: int = 0, **how) -> tuple:
    """Draw a caption and see where its words went.

    Args:
        pipe: A :class:`shapes.ShapesPipeline`.
        caption: What to draw.
        words: Groups of words of the caption.
        seed: Of the noise.
        how: For the pipeline: steps and guidance.

    Returns:
        The picture, ``[3, SIZE, SIZE]`` from 0 to 1, and for each group its mean heat map, ``[SIZE, SIZE]``.
    """
    generator = torch.Generator().manual_seed(seed)
    with recorded(pipe.denoiser) as recorder:
        picture = pipe(caption, generator=generator, output_type="pt", **how).images[0]
    tokens = pipe.tokenizer.convert_ids_to_tokens(pipe.tokenizer(caption).input_ids)
    of_token = torch.stack(recorder.maps).mean(0)
    return picture, [of_token[[tokens.index(word) for word in group]].mean(0) for group in words]


def hot(heat_map: torch.Tensor) -> torch.Tensor:
    """Where a heat map is above its own mean plus one standard deviation: bool, of the same shape."""
    return heat_map > heat_map.mean() + heat_map.std(correction=0)


def overlap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Intersection over union of two masks; 0 if both are empty."""
    return ((one & other).sum() / (one | other).sum().clamp(min=1)).item()


def measure(pipe, number: int, **how) -> tuple[dict[str, float], list]:
    """Figures over the first ``number`` held-out captions, and the pictures and heat maps they are of.

    Returns:
        Means over shapes: the overlap of a shape with its words ("own") and with the other shape's ("others"), for
        all its words and for each alone; the share drawn in place ("in place"); and its size in pixels ("pixels").
        And for each caption its picture and the heat maps of all words of its shapes.
    """
    found, kept = collections.defaultdict(list), []
    for seed, caption in enumerate(shapes.captions()[1][:number]):
        groups = [group for thing in caption for group in (thing.words, *zip(thing.words))]
        picture, maps = heat(pipe, shapes.text(caption), groups, seed, **how)
        half = len(LABELS)
        heats = [dict(zip(LABELS, maps[at : at + half], strict=True)) for at in (0, half)]
        for at, thing in enumerate(caption):
            mask = shapes.drawn(picture, thing)
            for kind in LABELS:
                found[f"own {kind}"].append(overlap(hot(heats[at][kind]), mask))
                found[f"others {kind}"].append(overlap(hot(heats[1 - at][kind]), mask))
            found["in place"].append(shapes.in_place(mask, thing))
            found["pixels"].append(int(mask.sum()))
        kept.append((picture, [of_thing["words"] for of_thing in heats]))
    return {name: sum(values) / len(values) for name, values in found.items()}, kept


def sheet(kept: list, scale: int = 4) -> Image.Image:
    """One row per caption: the picture, then for each shape its heat map and where that is hot on the picture."""
    rows = []
    for picture, heats in kept:
        row = [picture]
        for heat_map in heats:
            low, high = heat_map.min(), heat_map.max()
            row.append(((heat_map - low) / (high - low)).expand(3, -1, -1))
            row.append(torch.where(hot(heat_map), picture, 0.25 * picture))
        rows.append(torch.cat([F.pad(tile, (1, 1, 1, 1), value=1.0) for tile in row], dim=2))
    pixels = (torch.cat(rows, dim=1).permute(1, 2, 0) * 255).round().byte().numpy()
    image = Image.fromarray(pixels)
    return image.resize((image.width * scale, image.height * scale), Image.NEAREST)


def main() -> None:
    """Measure the models, print the figures, write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", help="by default all there are")
    parser.add_argument("--folder", type=Path, default=shapes.MODELS, help="where the models are")
    parser.add_argument(
        "--captions", type=int, default=shapes.HELD_OUT, help="how many of the held-out captions"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default=Path("heat_maps"), help="folder for the pictures")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.models or sorted(
        path.parent.name for path in options.folder.glob("*/model_index.json")
    ):
        started = time.monotonic()
        figures, kept = measure(
            shapes.load(name, options.folder),
            options.captions,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
        )
        print(
            f"{name}: {len(kept)} held-out captions, {options.steps} steps, guidance {options.guidance:g}, "
            f"{time.monotonic() - started:.0f} s. {figures['in place']:.1%} of the shapes are drawn in their place, "
            f"with {figures['pixels']:.0f} pixels on average."
        )
        print(f"  {'heat of':<24}{'the shape itself':>18}{'the other shape':>18}")
        for kind, label in LABELS.items():
            print(
                f"  {label:<24}{figures[f'own {kind}']:>18.3f}{figures[f'others {kind}']:>18.3f}", flush=True
            )
        sheet(kept[:12]).save(options.out / f"{name}.png")


if __name__ == "__main__":
    main()
