"""Finds the layer number of each attention site, and the sites that a capture asks for."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from torch.nn import Module, ModuleList

from attnpatch.errors import CaptureError
from attnpatch.maps.fields import shortened

_NUMBER = re.compile(r"\d+")


def pattern_of(names: Sequence[str]) -> dict[str, tuple[str, int]]:
    """The group and the layer number of each site.

    Sites of one group differ only in numbers: ``model.layers.3.self_attn`` is layer 3 of ``model.layers.*.self_attn``,
    even if layers 0 to 2 have no attention. Two attentions of one layer (``attn1``, ``attn2``) are two groups. In a
    group's name the first number of the path is a star; other numbers are stars only if they vary.

    The layer number is the first number of the path that differs from site to site (that of ``block`` in
    ``encoder.block.3.layer.0.SelfAttention``). If more than one number is needed to tell sites apart, as in
    ``down_blocks.1.attentions.0``, or if the number is part of a word (``attn1``), sites are counted from 0.

    Args:
        names: Paths of modules, in the order of the model.

    Returns:
        ``(group, layer number)`` by name, group after group.
    """
    loose: dict[str, list[str]] = {}
    for name in names:
        loose.setdefault(_NUMBER.sub("*", name), []).append(name)
    found: dict[str, tuple[str, int]] = {}
    for members in loose.values():
        for kind in _kinds(members):
            numbers = [_NUMBER.findall(name) for name in kind]
            varies = [i == 0 or len(set(column)) > 1 for i, column in enumerate(zip(*numbers, strict=True))]
            for name, number in zip(kind, _layer_numbers(kind), strict=True):
                parts = re.split(r"(\d+)", name)
                parts[1::2] = [
                    "*" if star else number for star, number in zip(varies, parts[1::2], strict=True)
                ]
                found[name] = ("".join(parts), number)
    return found


def _kinds(names: list[str]) -> list[list[str]]:
    """Divide sites that differ only in numbers into groups, so that no layer has several sites of a group."""
    # Each path up to its last free-standing number, and the rest inside that layer.
    cut = [re.fullmatch(r"((?:.*\.)?\d+)(|\..*)", name) for name in names]
    if None in cut or len({match[1] for match in cut}) == len(names):
        return [names]
    kinds: dict[str, list[str]] = {}
    for match in cut:
        kinds.setdefault(match[2], []).append(match[0])
    return list(kinds.values())


def _layer_numbers(names: list[str]) -> list[int]:
    """A layer number per site, all different."""
    paths = [name.split(".") for name in names]
    for column in zip(*paths, strict=True):
        if column[0].isdigit() and len(set(column)) == len(names):
            return [int(number) for number in column]
    return list(range(len(names)))


def is_inside(name: str, outer: str) -> bool:
    """True if a path is that of a module inside another one; the path of the model itself is empty."""
    return name != outer and name.startswith(outer + "." if outer else "")


def outer_names(names: Iterable[str]) -> frozenset[str]:
    """The paths of every module around those with these paths."""
    paths = [name.split(".") for name in names if name]
    return frozenset(".".join(path[:depth]) for path in paths for depth in range(len(path)))


def count_layers(model: Module, group: str, known: int) -> int:
    """How many layers a model has, those without attention (a hybrid's) included.

    Args:
        model: The model.
        group: A group of sites, such as ``model.layers.*.self_attn``.
        known: The number of its sites.
    """
    try:
        layers = model.get_submodule(group.partition(".*")[0])
    except AttributeError:
        return known
    return max(known, len(layers)) if isinstance(layers, ModuleList) else known


def layer_numbers(layers: Any) -> tuple[int, ...] | None:
    """What ``layers=`` means wherever it is an option: the numbers of layers, or ``None`` for all.

    Args:
        layers: ``None`` or ``"all"``; ``"last"``, the last layer with attention; or a list of numbers.

    Raises:
        ValueError: It is something else; the message says what is accepted.
    """
    if layers is None or (isinstance(layers, str) and layers == "all"):
        return None
    numbers = listed_numbers(layers)
    if numbers is None:
        raise ValueError(
            f"layers={layers!r} is not accepted; give a list of numbers such as [0, -1], or 'last', or 'all'"
        )
    return numbers


def listed_numbers(given: Any) -> tuple[int, ...] | None:
    """The numbers that an option lists, such as layers or steps; ``"last"`` is -1. ``None``: it is no such list.

    Lists, ranges, arrays and tensors of whole numbers are lists of numbers. A single number, truth values, texts and an
    empty list are none.
    """
    if isinstance(given, str):
        return (-1,) if given == "last" else None
    if hasattr(given, "tolist"):
        given = given.tolist()
    found = list(given) if isinstance(given, Iterable) and not isinstance(given, (bytes, Mapping)) else []
    if not found or not all(isinstance(each, Integral) and not isinstance(each, bool) for each in found):
        return None
    return tuple(map(int, found))


def chosen_sites(
    places: Mapping[str, tuple[str, int]],
    names: Sequence[str],
    layers: str | Sequence[int] | None,
    sites: str | None,
) -> set[str]:
    """The sites that a capture asks for.

    Args:
        places: Group and layer number of each site, from ``pattern_of``.
        names: The attention sites, in order.
        layers: As ``layer_numbers`` takes them: numbers from ``pattern_of``. Negative numbers count the sites of each
            group from the last, so -1 is the last layer with attention of that group. ``None``: all.
        sites: Pattern (``fnmatch``) of site names; ``None``: all.

    Raises:
        CaptureError: No such layer or site.
    """
    matching = [name for name in names if sites is None or fnmatch.fnmatchcase(name, sites)]
    if not matching:
        groups = sorted({group for group, _ in places.values()})
        raise CaptureError(f"no attention site matches {sites!r}; there are: {', '.join(groups)}")
    try:
        numbers = layer_numbers(layers)
    except ValueError as error:
        raise CaptureError(str(error)) from None
    if numbers is None:
        return set(matching)
    kinds: dict[str, list[str]] = {}
    for name in matching:
        kinds.setdefault(places[name][0], []).append(name)
    found: set[str] = set()
    unknown = []
    for layer in numbers:
        chosen = [name for members in kinds.values() for name in _of_layer(members, places, layer)]
        found.update(chosen)
        if not chosen:
            unknown.append(layer)
    if unknown:
        known = sorted({places[name][1] for name in matching})
        raise CaptureError(
            f"layers={list(numbers)!r}: the layers with attention are {shortened(known)}; give some of these numbers, or "
            f"-1 to {-max(map(len, kinds.values()))} to count from the last"
        )
    return found


def _of_layer(members: list[str], places: Mapping[str, tuple[str, int]], layer: int) -> list[str]:
    """The site of a layer among those of one kind, if there is one."""
    if layer < 0:
        return members[layer:][:1] if layer >= -len(members) else []
    return [name for name in members if places[name][1] == layer]
