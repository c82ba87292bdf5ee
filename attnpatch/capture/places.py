"""Which layer a site of attention is, and which sites a capture asks for."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence

from attnpatch.errors import CaptureError


def pattern_of(names: Sequence[str]) -> dict[str, tuple[str, int]]:
    """The group of each site and its place in it.

    Sites of one kind differ in their layer number only: ``model.layers.3.self_attn`` is number 3 of
    ``model.layers.*.self_attn``. The first number of a path is taken for the layer's; others only where they vary.
    """
    loose: dict[str, list[str]] = {}
    for name in names:
        loose.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    found: dict[str, tuple[str, int]] = {}
    for members in loose.values():
        numbers = [re.findall(r"\d+", name) for name in members]
        varies = [i == 0 or len(set(column)) > 1 for i, column in enumerate(zip(*numbers, strict=True))]
        for place, name in enumerate(members):
            parts = re.split(r"(\d+)", name)
            parts[1::2] = ["*" if star else number for star, number in zip(varies, parts[1::2], strict=True)]
            found[name] = ("".join(parts), place)
    return found


def chosen_sites(
    places: Mapping[str, tuple[str, int]],
    names: Sequence[str],
    layers: Sequence[int] | None,
    sites: str | None,
) -> set[str]:
    """The sites that a capture asks for.

    Args:
        places: Of each site, as ``pattern_of`` gives them.
        names: The attention sites, in order.
        layers: Positions within a group of like sites, negative from the end; ``None``: all.
        sites: Pattern (``fnmatch``) of site names; ``None``: all.

    Raises:
        CaptureError: No such layer or site.
    """
    matching = [name for name in names if sites is None or fnmatch.fnmatchcase(name, sites)]
    if not matching:
        groups = sorted({group for group, _ in places.values()})
        raise CaptureError(f"no attention site matches {sites!r}; there are: {', '.join(groups)}")
    if layers is None:
        return set(matching)
    if isinstance(layers, int) or not all(isinstance(layer, int) for layer in layers):
        raise CaptureError(
            f"layers={layers!r} is not accepted; give a list of numbers such as [0, -1], or None"
        )
    sizes: dict[str, int] = {}
    for name in matching:
        sizes[places[name][0]] = sizes.get(places[name][0], 0) + 1
    most = max(sizes.values())
    outside = [layer for layer in layers if not -most <= layer < most]
    if outside or not layers:
        raise CaptureError(
            f"layers={list(layers)!r}: there are {most} layers; give numbers from {-most} to {most - 1}"
        )
    return {
        name
        for name in matching
        for group, place in [places[name]]
        if any(layer % sizes[group] == place for layer in layers if -sizes[group] <= layer < sizes[group])
    }
