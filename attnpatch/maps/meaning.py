"""Words for the numbers of a block map, used in pictures, pages and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attnpatch.maps.fields import over_rows, shortened
from attnpatch.plotting import map_figure

if TYPE_CHECKING:
    from attnpatch.maps.block_map import BlockMap

PROBABILITY = {
    "none": "attention mass, mean over the query tokens",
    "row": "share of the query block's attention mass",
    "density": "attention mass per key token",
    "column": "share of the mass the key block receives",
    "absolute row": "share of the query block's attention mass",
    "absolute column": "share of the mass the key block receives",
}
# Of other numbers, named by a word.
OTHER = {
    "none": "{}, mean over the query tokens",
    "density": "{} per key token",
    "row": "{}, share of the query block's sum",
    "column": "{}, share of the key block's sum",
    "absolute row": "{}, share of the query block's absolute sum",
    "absolute column": "{}, share of the key block's absolute sum",
}


def numbers_of(one: BlockMap) -> str | None:
    """What the numbers of a map that was computed from other maps are, such as a difference; ``None`` for others."""
    return one.metadata.get("numbers")


def why_signed(one: BlockMap) -> str:
    """Why the numbers of a map are no probabilities."""
    if one.is_of_gradient:
        return "this map is weighted by gradients"
    if numbers_of(one) is not None:
        return f"this map holds the {numbers_of(one)}"
    return "this map has negative weights, as those that are mixed after softmax"


def meaning(one: BlockMap) -> str:
    """What a number in ``values`` means."""
    numbers = numbers_of(one)
    if numbers is not None and one.normalization == "none":
        return numbers
    if one.is_of_gradient or one.is_signed or numbers is not None:
        word = "probability x gradient" if one.is_of_gradient else "weight after mixing"
        return OTHER[one.normalization].format(numbers or word)
    return PROBABILITY[one.normalization]


def uncertainty(one: BlockMap) -> str:
    """For a title: the standard error of a sampled map, or the spread of the maps that were averaged."""
    if one.spread is not None:
        known = one.spread[~one.spread.isnan()]
        what = one.metadata.get("spread", "standard deviation")
        return f"spread ({what})" + (f" up to {known.max():.2g}" if known.numel() else " not known")
    if one.error is None:
        return ""
    known = one.error[~one.error.isnan()]
    return f"sampled, standard error up to {known.max():.2g}" if known.numel() else "sampled, error unknown"


def title(whole: BlockMap, one: BlockMap, layer: Any, sequence: int) -> str:
    """The title of a picture: model, layer, head, step.

    Args:
        whole: The map.
        one: The part of it that is drawn: the result of ``select``.
        layer, sequence: As given to ``select``.
    """
    layers = _named("layer", whole.layers, one.layers) if layer == "mean" else f"layer {one.layers[0]}"
    heads = "mean over heads" if one.heads == "mean" else f"head {one.heads[0]}"
    steps = _named("step", whole.steps, one.steps)
    parts = [whole.metadata.get("model"), layers, heads, uncertainty(one)]
    parts += [steps * bool(whole.steps), f"sequence {sequence}" * whole.is_batch]
    return ", ".join(str(part) for part in parts if part)


def _named(what: str, names: Sequence[int | str], chosen: Sequence[int | str]) -> str:
    """The layer or step that is drawn, or how many were averaged, if that is known."""
    if chosen != ("mean",) or (len(names) == 1 and names != ("mean",)):
        return f"{what} {(*(names if len(names) == 1 else chosen), 0)[0]}"
    return f"mean over {what}s" if names == ("mean",) else f"mean of {len(names)} {what}s"


def described(one: BlockMap) -> str:
    """The text of a map's ``repr``."""
    queries, keys = one.mass.shape[-2:]
    size = [f"{len(one.layers)} layers", f"{queries} query x {keys} key blocks"]
    if one.heads != "mean":
        size.insert(1, f"{len(one.heads)} heads")
    if one.steps:
        size.insert(0, f"{len(one.steps)} steps")
    if one.is_batch:
        size.insert(0, f"{one.num_sequences} sequences")
    labels = one.query_labels[0] if one.is_batch else one.query_labels
    tokens = one.query_sizes.sum(-1).tolist()
    sums = one.mass.sum(-1)
    sums = sums[over_rows(one.query_sizes > 0, sums)]
    rows = f"rows sum to {sums.min():.4g} to {sums.max():.4g}" if sums.numel() else "no rows"
    lines = [
        f"BlockMap: {', '.join(size)}",
        f"  layers    {shortened(one.layers)}",
        f"  heads     {one.heads if one.heads == 'mean' else shortened(one.heads)}",
        f"  queries   {shortened(labels)} ({tokens} tokens)",
        f"  mass      {rows}; normalization {one.normalization!r}",
    ]
    lines += [f"  {name}: {map_figure.shorten(str(value), 160)}" for name, value in one.metadata.items()]
    return "\n".join(lines)
