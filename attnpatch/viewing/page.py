"""Writes block maps as one HTML file that contains the page's sources, the numbers and the texts.

The page loads nothing: no script, style, font or picture comes from elsewhere, and its content security policy forbids
it. Numbers are stored as the upper 24 bits of float32 (relative error at most 1.6e-5), in one deflated piece per layer,
head and step, which the browser inflates when it is shown.
"""

import base64
import hashlib
import html
import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from attnpatch.atomic_files import put, whole
from attnpatch.errors import PageError
from attnpatch.maps import picture
from attnpatch.maps.block_map import BlockMap
from attnpatch.maps.fields import own_columns, texts_of
from attnpatch.maps.meaning import numbers_of, uncertainty
from attnpatch.viewing.pictures import EmbeddedPictures, Pictures

_SCRIPTS = (
    "data.js",
    "colours.js",
    "drawing.js",
    "map.js",
    "panels.js",
    "finding.js",
    "text.js",
    "page.js",
    "beside.js",
    "input.js",
    "pictures.js",
    "start.js",
)
_MEAN = "mean"
_FOUND = 5  # cells of the last row that the page names when it opens
_MOST_OF_A_FACT = 300  # most characters shown of one metadata entry
_POLICY = (
    "default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; "
    "base-uri 'none'; form-action 'none'"
)


def write_page(
    maps: Mapping[str, BlockMap], path: str | os.PathLike, pictures: Pictures | None = None
) -> Path:
    """Write one self-contained HTML page that shows block maps.

    The texts of messages are taken from ``metadata["texts"]``: one string per block; with several sequences, one such
    list per sequence. Without texts the page shows labels.

    Args:
        maps: At least one map, by the name that the page shows; of any shape that a ``BlockMap`` can have. The page
            switches between layers, heads, steps and sequences, their means, and normalisations.
        path: The file to write; an existing file is replaced when the new one is complete.
        pictures: The pictures of a prompt, if the keys of a map are tiles of them (``Blocks.images``, ``Blocks.tiles``):
            PIL, numpy, torch or names of files, in order; or a dict such as ``{"image 2": picture, "video 1 f0": frame}``;
            for a batch, a list of these. The page draws the tiles over them. They are embedded, at most 640 pixels wide
            and high. Give them as the model sees them: a processor may have cut their edges off.

    Returns:
        The path.

    Raises:
        PageError: There is no map, a picture cannot be used or belongs to no tiles, or the file cannot be written.
        MissingExtraError: Pictures are given, and Pillow is not installed.
    """
    path = Path(path)
    if not maps:
        raise PageError("there is no block map to show; give at least one.")
    if path.is_dir():
        raise PageError(f"cannot write {path}: it is a folder; give the name of a file.")
    embedded = EmbeddedPictures(pictures)
    described = [_described(name, block_map, embedded) for name, block_map in maps.items()]
    embedded.check_used()
    with whole(path, PageError) as temporary:
        # A lone surrogate, which file names on Linux may contain, cannot be encoded as UTF-8.
        put(temporary, (piece.encode("utf-8", "replace") for piece in _page(maps, described, embedded)))
    return path


def _page(
    maps: Mapping[str, BlockMap], described: list[dict[str, Any]], embedded: EmbeddedPictures
) -> Iterator[str]:
    """Yields the page's text in pieces."""
    style, script = _source("page.css"), "\n".join(_source(name) for name in _SCRIPTS)
    policy = _POLICY.format(script=_digest(script), style=_digest(style))
    names = list(maps)
    title = names[0] if len(names) == 1 else f"{len(names)} block maps"
    filled = {
        "policy": lambda: [policy],
        "title": lambda: [html.escape(f"{title} - attnpatch")],
        "style": lambda: [style],
        "script": lambda: [script],
        "facts": lambda: [in_script(described)],
        "numbers": lambda: itertools.chain(
            embedded.elements(),
            *(_numbers(index, block_map) for index, block_map in enumerate(maps.values())),
        ),
    }
    # Split instead of str.replace, so that placeholders inside inserted text are left alone.
    for place, text in enumerate(re.split(r"\{\{(\w+)\}\}", _source("page.html"))):
        if place % 2:
            yield from filled[text]()
        else:
            yield text


def _source(name: str) -> str:
    return (resources.files("attnpatch.viewing") / "static" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def in_script(content: Any) -> str:
    """JSON that is safe inside a script element: it cannot end the element or begin a comment.

    Raises:
        ValueError: A number is not finite, which JSON cannot express.
    """
    return json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _described(name: str, block_map: BlockMap, embedded: EmbeddedPictures) -> dict[str, Any]:
    """Everything that the page needs about a map, except its numbers."""
    singles = [block_map.select(sequence=i) for i in range(block_map.num_sequences)]
    facts = {
        key: value
        for key, value in block_map.metadata.items()
        if key not in ("texts", "query_texts", "key_texts", "own_keys")
    }
    return {
        "name": name,
        "normalization": block_map.normalization.removeprefix("absolute "),
        "signed": block_map.is_signed,
        "gradient": block_map.is_of_gradient,
        "numbers": numbers_of(block_map),
        "part": "own_keys" in block_map.metadata,
        "uncertainty": uncertainty(block_map),
        "layers": _with_mean(block_map.layers),
        "heads": [_MEAN] if block_map.heads == _MEAN else _with_mean(block_map.heads),
        "steps": _with_mean(block_map.steps or (_MEAN,)),
        "facts": {str(key): str(value)[:_MOST_OF_A_FACT] for key, value in facts.items()},
        "sequences": [
            _sequence(one, index) | {"grids": embedded.grids(one, index, len(singles))}
            for index, one in enumerate(singles)
        ],
    }


def _sequence(one: BlockMap, index: int) -> dict[str, Any]:
    sides = {}
    for side in ("query", "key"):
        labels = getattr(one, f"{side}_labels")
        sides[side] = {
            "labels": labels,
            "sizes": getattr(one, f"{side}_sizes").tolist(),
            "texts": texts_of(one.metadata, side, len(labels), index),
        }
    return {
        "name": _name(one.metadata.get("sequences"), index),
        **sides,
        # For each row the column of the same block.
        "own": own_columns(one),
        "profile": _profiles(one),
        "found": _found(one),
    }


def _found(one: BlockMap) -> dict[str, Any] | None:
    """What the page opens on: the last query row with tokens, and the blocks to which it attends most.

    Returns:
        ``row``, and ``cells``: ``[position of the layer slider, column, number]``, the largest first. Each column is
        listed once, with the layer where its number is largest. Heads and steps are averaged. The row's own block is
        left out. ``None`` if no other block has a number.
    """
    about = picture.named(one, "mean", "mean", 0, "mean")
    cells = about.strongest(about.rows[-1], _FOUND) if about.rows else []
    if not cells:
        return None
    mean = int(len(one.layers) > 1)  # the slider begins with the mean
    return {
        "row": about.rows[-1],
        "cells": [[mean + layer, column, float(f"{value:.5g}")] for layer, column, value in cells],
    }


def _name(sequences: Any, index: int) -> str:
    """The number of a sequence, and its role (such as the negative prompt) if the capture of a pipeline names one."""
    known = sequences[index] if isinstance(sequences, list) and index < len(sequences) else None
    role = known.get("role") if isinstance(known, dict) else None
    return f"{index} ({role})" if role else str(index)


def _with_mean(names: Sequence[int | str]) -> list[int | str]:
    """The positions of a slider: the mean first if there are several entries, then the entries."""
    return [_MEAN, *names] if len(names) > 1 else list(names)


def _by_axes(one: BlockMap) -> np.ndarray:
    """The mass of one sequence, ``[steps, layers, heads, query_blocks, key_blocks]``."""
    mass = one.mass.numpy()
    if not one.steps:
        mass = mass[None]
    return mass[:, :, None] if one.heads == _MEAN else mass


def _positions(count: int) -> list[slice]:
    """The slice of an axis that each position of a slider shows."""
    singles = [slice(i, i + 1) for i in range(count)]
    return [slice(None), *singles] if count > 1 else singles


def _numbers(index: int, block_map: BlockMap) -> Iterator[str]:
    """Yields one script element of data per sequence, step, layer and head."""
    for sequence in range(block_map.num_sequences):
        mass = _by_axes(block_map.select(sequence=sequence))
        steps, layers, heads = (list(enumerate(_positions(count))) for count in mass.shape[:3])
        for s, step in steps:
            for la, layer in layers:
                for h, head in heads:
                    mean = mass[step, layer, head].mean((0, 1, 2), dtype=np.float64).astype(np.float32)
                    data = base64.b64encode(packed(mean)).decode()
                    name = f"n{index}-{sequence}-{s}-{la}-{h}"
                    yield f'<script type="application/octet-stream" id="{name}">{data}</script>\n'


def packed(values: np.ndarray) -> bytes:
    """float32 values rounded to their upper 24 bits, stored as three planes of bytes and deflated without a header."""
    bits = np.ascontiguousarray(values, dtype=np.float32).reshape(-1).view(np.uint32)
    bits = np.where(np.isnan(values).reshape(-1), np.uint32(0x7FC00000), bits)
    # Round by adding half of the last kept bit; a carry into the higher bits is correct too.
    upper = (bits + np.uint32(0x7F) + ((bits >> np.uint32(8)) & np.uint32(1))) >> np.uint32(8)
    planes = [(upper >> np.uint32(shift)).astype(np.uint8).tobytes() for shift in (16, 8, 0)]
    deflate = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    return b"".join([deflate.compress(plane) for plane in planes] + [deflate.flush()])


def _profiles(one: BlockMap) -> list[list[dict[str, list[float | None]]]]:
    """Profiles over the layers, averaged over rows: one for each step and head of the sliders.

    ``own`` is the mass of a block on itself (only if queries and keys are the same blocks), ``first`` its mass on the
    first block, ``largest`` its mass on the block that it attends to most (for signed numbers, the largest absolute
    value).
    """
    mass = _by_axes(one)
    rows = np.flatnonzero((one.query_sizes > 0).numpy())
    measured = {}
    if len(rows) and mass.shape[-1]:
        mass = mass[..., rows, :]
        largest = np.abs(mass).argmax(-1, keepdims=True)
        measured = {"first": mass[..., 0], "largest": np.take_along_axis(mass, largest, -1)[..., 0]}
        own = own_columns(one)
        if all(own[row] is not None for row in rows):
            measured["own"] = mass[..., np.arange(len(rows)), [own[row] for row in rows]]
    by_layer = {name: values.mean(-1, dtype=np.float64) for name, values in measured.items()}
    return [
        [
            {name: _finite(values[step, :, head].mean((0, 2))) for name, values in by_layer.items()}
            for head in _positions(mass.shape[2])
        ]
        for step in _positions(mass.shape[0])
    ]


def _finite(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values.tolist()]
