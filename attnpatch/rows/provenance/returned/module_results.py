"""What a module has made, in the axes by which the model's tokens are followed between modules.

Inside a module, ``Sources`` follow its own inputs. ``reordered`` follows the model's tokens. Here the axes of the first
become axes of the second, so that a result's order is as well known as if no module had been called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from attnpatch.rows.graph.axes import Axis, Dim, Dims, fresh, leaves, regroup, size_of
from attnpatch.rows.graph.strides import Part
from attnpatch.rows.provenance.origins import Made
from attnpatch.rows.provenance.sources import Sources
from attnpatch.rows.provenance.tensors import is_wide
from attnpatch.rows.provenance.unseen_writes import UNSEEN

# Why the order of a result is not known, if no function has a name for it.
_UNKNOWN = "an attention module that may return them in another order"


class Model(Protocol):
    """The model's own axes.

    Attributes:
        sources: Its sources.
        order: Takes the present order of a tensor as the right one.
    """

    sources: Sources
    order: Callable[[torch.Tensor], None]


def alike(inner: Sources, dims: Dims) -> int | None:
    """The number of the input whose sequences and tokens a tensor has, each in its dimension; ``None``: of none."""
    for number, own in enumerate(inner.inputs):
        if len(own) == len(dims) and all(
            leaves(a) == leaves(b) for a, b in zip(own[:-1], dims[:-1], strict=True)
        ):
            return number
    return None


class Translation:
    """Turns axes of a module into axes of the model.

    Args:
        model: The model's axes.
        inner: The sources of the module's call.
        given: The tensors that the module is called with.
        is_alone: True if the module has made no other tensor. If it then has some of the tokens, at equal distances, they
            are a coarser sequence (LeViT). Otherwise another tensor may have those between them.
    """

    def __init__(
        self, model: Model, inner: Sources, given: Sequence[torch.Tensor], is_alone: bool = False
    ) -> None:
        self._model, self._inner, self._given, self._is_alone = model, inner, given, is_alone
        self._found: dict[Axis, Axis] = {}

    def dims(self, dims: Dims) -> Dims:
        """The model's axes of a tensor; its last dimension is channels."""
        number = alike(self._inner, dims)
        if number is not None:
            own = self._model.sources.of(self._given[number])
            channels = fresh([size_of(dims[-1])])
            return (*own[:-1], *channels) if own is not None else ()
        last = len(dims) - 1
        return tuple(self._dim(dim, is_channels=place == last) for place, dim in enumerate(dims))

    def _dim(self, dim: Dim, is_channels: bool = False) -> Dim:
        rest, found = leaves(dim), list[Axis]()
        others = [leaf for leaf in rest if self._inner.origin(leaf) is None]
        if any(self._is_lost(axis) for leaf in others for axis in self._leaf(leaf, is_channels)):
            # The model's own axes are not cut for what is lost.
            return tuple(axis for leaf in rest for axis in self._lost(leaf))
        while rest:
            origin = self._inner.origin(rest[0])
            own = None if origin is None else leaves(self._inner.inputs[origin[0]][origin[1]])
            if origin is not None and own == rest[: len(own or ())]:
                # As a whole, so that the model's axis is not cut where the module has cut it.
                found += self._of_given(*origin[:2])
                rest = rest[len(own) :]
            else:
                found += self._leaf(rest.pop(0), is_channels)
        return tuple(found)

    def _of_given(self, number: int, place: int) -> Dim:
        """The model's axes of a dimension of an input."""
        self._model.order(self._given[number])
        dims = self._model.sources.of(self._given[number])
        return () if dims is None else dims[place]

    def _leaf(self, leaf: Axis, is_channels: bool) -> Dim:
        inner = self._inner
        origin = inner.origin(leaf)
        if origin is not None:
            return self._of_input(leaf, *origin)
        whole = next((one for one in leaf.wholes() if one in inner.made), None)
        if whole is not None and self._is_alone and self._is_coarser(inner.made[whole]):
            return (self._found.setdefault(leaf, Axis(leaf.size)),)
        if whole is not None:
            own = regroup(((self._made(whole, inner.made[whole]),),), [one.size for one in whole.leaves()])
            return self._lost(leaf) if own is None else own[whole.leaves().index(leaf)]
        is_new = any(one in inner.new for one in leaf.wholes())
        if is_new or (is_channels and not inner.has_loss(leaf)):
            return (self._found.setdefault(leaf, Axis(leaf.size)),)
        return self._lost(leaf)

    def _is_uncut(self, axis: Axis) -> bool:
        """False for a part of an input's dimension: the model's axis would be cut as well, and no slice of it followed."""
        origin = self._inner.origin(axis)
        return origin is None or len(leaves(self._inner.inputs[origin[0]][origin[1]])) == 1

    def _is_coarser(self, made: Made) -> bool:
        """True if an axis takes elements of an input's dimension at equal distances."""
        return (
            made.of is not None
            and made.part is not None
            and made.part.step > 1
            and made.part.count > 1
            and all(
                (found := self._inner.origin(leaf)) is not None and found[1] > 0
                for leaf in leaves((made.of,))
            )
        )

    def _of_input(self, leaf: Axis, number: int, place: int, part: int) -> Dim:
        parts = leaves(self._inner.inputs[number][place])
        own = regroup((self._of_given(number, place),), [one.size for one in parts])
        return self._lost(leaf) if own is None else own[part]

    def _made(self, axis: Axis, made: Made) -> Axis:
        """An axis that the module has joined from others, or cut from one."""
        if axis in self._found:
            return self._found[axis]
        new = self._found[axis] = Axis(axis.size)
        if axis in self._inner.strange:
            new.made_by = UNSEEN
        elif made.parts:
            self._is_alone = False
            parts = tuple((None if dim is None else self._dim(dim), size) for dim, size in made.parts)
            self._model.sources.made[new] = Made(parts)
        elif made.of is not None and made.part is not None and self._is_uncut(made.of):
            own = self._dim((made.of,))
            if len(own) != 1:
                new.made_by = self._why(axis)
                return new
            part = Part(own[0], made.part.start, made.part.count, made.part.step)
            self._model.sources.made[new] = Made(of=own[0], part=part)
        else:
            new.made_by = self._why(axis)
        return new

    def _is_lost(self, axis: Axis) -> bool:
        made = self._model.sources.made.get(axis)
        parts = made.parts if made is not None else ()
        return axis.made_by is not None or any(
            map(self._is_lost, (one for dim, _ in parts for one in dim or ()))
        )

    def _lost(self, leaf: Axis) -> Dim:
        axis = self._found.setdefault(leaf, Axis(leaf.size))
        axis.made_by = self._why(leaf)
        return (axis,)

    def _why(self, leaf: Axis) -> str:
        named = (self._inner.moved_by.get(one) for one in leaf.wholes())
        return leaf.made_by or next((name for name in named if name is not None), _UNKNOWN)


def is_moved(inner: Sources, number: int, tensor: torch.Tensor) -> bool:
    """True if a module has put other elements into the places of one of its inputs, or may have."""
    dims = inner.returned(tensor)
    if dims is None:
        return inner.knows(tensor)
    own = inner.inputs[number]
    return any(leaves(a) != leaves(b) for a, b in zip(own[:-1], dims[:-1], strict=True))


def orders(
    inner: Sources, given: Sequence[torch.Tensor], results: Sequence[torch.Tensor]
) -> tuple[int | None, ...] | None:
    """For each result, the number of the input whose order it has (``None``: it is no tensor of tokens).

    ``None`` in place of all of them: an input or a result is in another order, or in an unknown one.
    """
    found: list[int | None] = []
    for one in results:
        dims = inner.returned(one)
        number = None if dims is None else alike(inner, dims)
        if number is None and is_wide(one) and one.is_floating_point():
            return None
        found.append(number)
    is_any_moved = any(is_moved(inner, number, one) for number, one in enumerate(given))
    return None if is_any_moved else tuple(found)
