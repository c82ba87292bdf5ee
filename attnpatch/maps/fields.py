"""The fields of a block map: checks them, brings them to one form, and finds entries by name or number."""

import json
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnpatch.errors import CaptureError
from attnpatch.plotting import map_figure

NORMALIZATIONS = ("none", "row", "density", "column", "absolute row", "absolute column")

Labels = Sequence[str] | Sequence[Sequence[str]]


def over_rows(per_block: Tensor, like: Tensor) -> Tensor:
    """Expand ``[(batch,) query_blocks]`` over the layers and heads of ``like``."""
    between = (1,) * (like.ndim - per_block.ndim)
    return per_block.view(*per_block.shape[:-1], *between, per_block.shape[-1]).expand(like.shape)


def is_signed(mass: Tensor, metadata: Mapping[str, Any]) -> bool:
    """Whether the numbers of a map may be negative, as gradients and differences: their sums may be near 0."""
    return metadata.get("weighting") in ("gradient", "difference") or bool((mass < 0).any())


def shortened(items: Sequence) -> str:
    shown = [repr(map_figure.shorten(item)) if isinstance(item, str) else repr(item) for item in items]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:5], "...", *shown[-2:]])


def position(wanted: Any, among: Sequence, what: str) -> int:
    """The index of ``wanted`` in ``among``: an entry, ``"last"``, or a position if entries are strings or it is negative."""
    if wanted in among and not isinstance(wanted, bool):
        return among.index(wanted)
    if wanted == "last" and among:
        return len(among) - 1
    counted = isinstance(wanted, Integral) and not isinstance(wanted, bool)
    counted = counted and (wanted < 0 or all(isinstance(name, str) for name in among))
    if counted and -len(among) <= wanted < len(among):
        return int(wanted) % len(among)
    raise CaptureError(f"there is no {what} {wanted!r} in this map; there are {shortened(among)}.")


def texts_of(metadata: Mapping[str, Any], side: str, count: int, sequence: int = 0) -> list[str] | None:
    """The text of each block of a sequence; ``None`` unless the metadata have one for each block.

    Args:
        metadata: ``metadata`` of a map. ``texts`` has a string per block, or a list of them per sequence;
            ``query_texts`` and ``key_texts``, if there are any, are those of one side.
        side: ``"query"`` or ``"key"``.
        count: Number of blocks.
        sequence: Which sequence of a batch.
    """
    texts = metadata.get(f"{side}_texts", metadata.get("texts"))
    if isinstance(texts, list) and texts and isinstance(texts[0], list):
        texts = texts[sequence] if sequence < len(texts) else None
    if not isinstance(texts, list) or len(texts) != count:
        return None
    return [str(text) for text in texts]


def metadata_of_sequence(metadata: Mapping[str, Any], sequence: int) -> dict[str, Any]:
    """The metadata of a map of one sequence of a batch: texts that are lists per sequence become its own."""
    found = dict(metadata)
    for name in ("texts", "query_texts", "key_texts"):
        lists = found.get(name)
        if isinstance(lists, list) and lists and isinstance(lists[0], list):
            del found[name]
            if sequence < len(lists):
                found[name] = lists[sequence]
    return found


def own_columns(one: Any) -> list[int | None]:
    """For each query block of a map of one sequence, the position of the same block among the keys; ``None`` if it is none.

    Query and key blocks are the same if their labels are. A part of such a map says in ``metadata["own_keys"]`` which are.
    """
    known = one.metadata.get("own_keys")
    count = len(one.query_labels)
    if isinstance(known, list) and len(known) == count:
        return known
    return [*range(count)] if one.query_labels == one.key_labels else [None] * count


def largest_over(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each cell the entry of the first axis (layers, heads, steps) whose number is largest in absolute value.

    Returns:
        Its number, and its size; what is no finite number counts as 0.
    """
    sizes = np.where(np.isfinite(values), np.abs(values), 0)
    return sizes.argmax(0), sizes.max(0, initial=0.0)


def checked_fields(given: Any) -> dict[str, Any]:
    """The fields of ``given``, checked and in canonical form: float32, tuples, no batch dimension for one sequence."""
    if not isinstance(given.normalization, str) or given.normalization not in NORMALIZATIONS:
        accepted = ", ".join(repr(name) for name in NORMALIZATIONS)
        raise CaptureError(f"normalization is {given.normalization!r}; accepted are {accepted}.")
    try:
        heads = given.heads if given.heads == "mean" else tuple(int(head) for head in given.heads)
        layers = tuple(layer if isinstance(layer, str) else int(layer) for layer in given.layers)
        steps = tuple(step if isinstance(step, str) else int(step) for step in given.steps)
    except (TypeError, ValueError):
        raise CaptureError(
            f"heads {given.heads!r}, layers {given.layers!r} or steps {given.steps!r} cannot be used; accepted are "
            "'mean' or a list of head numbers, and lists of numbers or names of layers and steps."
        ) from None
    mass = given.mass.detach().to("cpu", torch.float32)
    dims = 3 + (heads != "mean") + bool(steps)
    if mass.ndim == dims + 1 and mass.shape[0] == 1:
        mass = mass[0]
    batch = mass.shape[:1] if mass.ndim == dims + 1 else ()
    apart = (*((len(steps),) if steps else ()), len(layers), *(() if heads == "mean" else (len(heads),)))
    expected = (*batch, *apart, *mass.shape[-2:])
    if mass.ndim not in (dims, dims + 1) or tuple(mass.shape) != expected:
        raise CaptureError(
            f"mass is {list(mass.shape)}, with {len(layers)} layers{f', {len(steps)} steps' if steps else ''} and "
            f"heads {heads!r}; accepted is [(batch,) (steps,) layers, (heads,) query_blocks, key_blocks]."
        )
    checked: dict[str, Any] = {"heads": heads, "layers": layers, "steps": steps}
    for side, count in (("query", mass.shape[-2]), ("key", mass.shape[-1])):
        sizes = torch.as_tensor(getattr(given, f"{side}_sizes")).detach().to("cpu", torch.int64)
        labels = getattr(given, f"{side}_labels")
        checked[f"{side}_sizes"], checked[f"{side}_labels"] = _checked_side(side, sizes, labels, count, batch)
    empty = over_rows(checked["query_sizes"] == 0, mass.new_empty(mass.shape[:-1]))
    checked["mass"] = mass.masked_fill(empty[..., None], 0)
    for name in ("error", "spread"):
        if getattr(given, name) is not None:
            each = getattr(given, name).detach().to("cpu", torch.float32)
            if each.numel() != mass.numel():
                raise CaptureError(
                    f"{name} is {list(each.shape)}, mass {list(mass.shape)}; give one value per mass."
                )
            checked[name] = each.reshape(mass.shape).masked_fill(empty[..., None], 0)
    try:
        checked["metadata"] = json.loads(json.dumps(dict(given.metadata)))
    except (TypeError, ValueError) as error:
        raise CaptureError(
            f"metadata cannot be written as JSON ({error}); give strings and numbers."
        ) from error
    if given.normalization in ("row", "column") and is_signed(mass, checked["metadata"]):
        checked["normalization"] = f"absolute {given.normalization}"
    return checked


def _checked_side(
    side: str, sizes: Tensor, labels: Labels, count: int, batch: tuple[int, ...]
) -> tuple[Tensor, tuple]:
    """Sizes and labels of the query or key blocks; if sequences share them, they are repeated for each."""
    nested = len(labels) > 0 and not isinstance(labels[0], str)
    per_sequence = [tuple(str(label) for label in one) for one in (labels if nested else [labels])]
    num_sequences = batch[0] if batch else 1
    if len(per_sequence) == 1:
        per_sequence = per_sequence * num_sequences
    if sizes.shape in ((count,), (1, count)):
        sizes = sizes.reshape(count).expand(num_sequences, count)
    if sizes.shape != (num_sequences, count) or len(per_sequence) != num_sequences:
        raise CaptureError(
            f"{side} sizes are {list(sizes.shape)} and labels for {len(per_sequence)} sequences, the map has "
            f"{num_sequences} sequences of {count} {side} blocks; give one size and label per block."
        )
    for row, names in enumerate(per_sequence):
        if len(names) > count or bool((sizes[row, len(names) :] > 0).any()):
            raise CaptureError(f"{len(names)} {side} labels for {count} {side} blocks; give one per block.")
    if not batch:
        return sizes[0].clone(), per_sequence[0]
    return sizes.clone(), tuple(per_sequence)
