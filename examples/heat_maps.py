"""Heat maps of a caption's words, compared with the pixels that trained models drew for these words.

    python examples/heat_maps.py                  # the first 4 held-out captions, seconds
    python examples/heat_maps.py --captions 100   # all held-out captions, minutes

For each held-out caption ("red circle left, blue square right") a model draws a picture, and ``attnpatch.capture``
gives a heat map for each shape: the attention of the pixels to the shape's words, averaged over heads, steps and
cross-attention layers. The part of the heat map above its mean plus one standard deviation is compared with the pixels
of the shape's colour. Every caption counts; a shape that was not drawn has an overlap of 0.

The pictures need matplotlib.
"""

import argparse
import collections
import time
from pathlib import Path

import shapes
import torch

import attnpatch
from attnpatch.capturing.image_maps import ImageMaps

SIZE = shapes.SIZE
# The layers that attend to the caption.
CROSS = "*.attn2"
# The kinds of heat maps that are measured, and their names in the table.
LABELS = {
    "words": "all words of a shape",
    "colour": "its colour alone",
    "shape": "its shape alone",
    "place": "its place alone",
}


def heats_of(maps: ImageMaps, thing: shapes.Thing) -> dict[str, torch.Tensor]:
    """A heat map, ``[SIZE, SIZE]``, for each of ``LABELS``."""
    texts = dict(zip(LABELS, (" ".join(thing.words), *thing.words), strict=True))
    return {kind: torch.from_numpy(maps.heat_map(words, size=(SIZE, SIZE))) for kind, words in texts.items()}


def hot(heat_map: torch.Tensor) -> torch.Tensor:
    """Where a heat map is above its mean plus one standard deviation: bool, same shape."""
    return heat_map > heat_map.mean() + heat_map.std(correction=0)


def overlap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Intersection over union of two masks; 0 if both are empty."""
    return ((one & other).sum() / (one | other).sum().clamp(min=1)).item()


def measure(pipe: shapes.ShapesPipeline, number: int, **how) -> dict[str, float]:
    """Measure the first ``number`` held-out captions. The index of a caption is the seed of its noise.

    Args:
        pipe: The pipeline that draws.
        number: How many captions.
        how: Arguments for the pipeline: steps and guidance.

    Returns:
        Means over shapes: the overlap of a shape's pixels with the heat of its own words ("own") and with that of the
        other shape's words ("others"), for all words together and for each; the share of shapes that are drawn in
        their place ("in place"); and the size in pixels ("pixels").
    """
    found = collections.defaultdict(list)
    for seed, caption in enumerate(shapes.captions()[1][:number]):
        with attnpatch.capture(pipe, sites=CROSS) as maps:
            picture = drawing(pipe, caption, seed, **how)
        heats = [heats_of(maps, thing) for thing in caption]
        for at, thing in enumerate(caption):
            mask = shapes.drawn(picture, thing)
            for kind in LABELS:
                found[f"own {kind}"].append(overlap(hot(heats[at][kind]), mask))
                found[f"others {kind}"].append(overlap(hot(heats[1 - at][kind]), mask))
            found["in place"].append(shapes.in_place(mask, thing))
            found["pixels"].append(int(mask.sum()))
    return {name: sum(values) / len(values) for name, values in found.items()}


def drawing(pipe: shapes.ShapesPipeline, caption: shapes.Caption, seed: int, **how) -> torch.Tensor:
    """A picture of a caption, ``[3, SIZE, SIZE]`` from 0 to 1."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(shapes.text(caption), generator=generator, output_type="pt", **how).images[0]


def write_pictures(pipe: shapes.ShapesPipeline, number: int, start: str, **how) -> list[Path]:
    """Draw heat maps over the pictures of a few captions; for the first caption, also over the steps.

    Args:
        pipe: The pipeline that draws.
        number: How many captions.
        start: Folder and beginning of the file names.
        how: Arguments for the pipeline.

    Returns:
        The files that were written.
    """
    written = []
    for seed, caption in enumerate(shapes.captions()[1][:number]):
        with attnpatch.capture(pipe, sites=CROSS, steps="all") as maps:
            picture = drawing(pipe, caption, seed, **how)
        phrases = [" ".join(thing.words) for thing in caption]
        words = [word for thing in caption for word in thing.words]
        written.append(maps.plot_overlay(picture, [*phrases, *words], f"{start}_caption_{seed}.png"))
        if seed == 0:
            written.append(maps.plot_steps(picture, phrases[0], f"{start}_steps.png"))
    return written


def show(name: str, figures: dict[str, float]) -> None:
    """Print the table of a model."""
    print(
        f"{name}: {figures['in place']:.1%} of the shapes are drawn in their place, "
        f"with {figures['pixels']:.0f} pixels on average."
    )
    print(f"  {'heat of':<24}{'the shape itself':>18}{'the other shape':>18}")
    for kind, label in LABELS.items():
        print(f"  {label:<24}{figures[f'own {kind}']:>18.3f}{figures[f'others {kind}']:>18.3f}", flush=True)


def main() -> None:
    """Measure the models, print the figures, write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", help="names of models; all by default")
    parser.add_argument("--folder", type=Path, default=shapes.MODELS, help="folder of the models")
    parser.add_argument(
        "--captions", type=int, default=4, help=f"how many of the {shapes.HELD_OUT} held-out captions"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument(
        "--pictures", type=int, default=1, help="how many captions to draw with their heat maps"
    )
    parser.add_argument("--out", type=Path, default=Path("heat_maps"), help="folder for the pictures")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    how = {"num_inference_steps": options.steps, "guidance_scale": options.guidance}
    found = sorted(path.parent.name for path in options.folder.glob("*/model_index.json"))
    for name in options.models or found:
        started = time.monotonic()
        pipe = shapes.load(name, options.folder)
        figures = measure(pipe, options.captions, **how)
        print(
            f"{min(options.captions, shapes.HELD_OUT)} held-out captions, {options.steps} steps, "
            f"guidance {options.guidance:g}, {time.monotonic() - started:.0f} s"
        )
        show(name, figures)
        for path in write_pictures(pipe, options.pictures, str(options.out / name), **how):
            print(f"  {path}")


if __name__ == "__main__":
    main()
