"""Tracks where the dimensions of tensors come from, from a module's inputs through its functions.

A map of attention says which token attends to which. Its rows are tokens of a module's input only if nothing between
that input and the query has cut, sorted, pooled or mixed them. So every dimension of every tensor that a module makes
is followed (``function_results.py``): views by their strides, products by their labels, other functions by name and
shape. If a function cannot be followed, its result is noted as unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attnpatch.observing import Layout
from attnpatch.rows.graph.axes import Axis, Dim, Dims, all_leaves, fresh, leaves
from attnpatch.rows.op_table import first_in_place
from attnpatch.rows.provenance import element_places
from attnpatch.rows.provenance.function_results import FunctionResults
from attnpatch.rows.provenance.hidden_tokens import HiddenTokens
from attnpatch.rows.provenance.origins import Made, lost
from attnpatch.rows.provenance.tensors import is_plain, is_wide, share_memory, tensors_in
from attnpatch.rows.provenance.unseen_writes import EXPOSING, UNSEEN, Notes, may_write_to, written_by

# Functions whose result may show one operand's tokens and not the other's.
_CHOOSING = element_places.ADDING | element_places.CHOOSING


class Sources(FunctionResults):
    """The dimensions of the tensors of one call of a module.

    Args:
        inputs: The tensors that it is called with, in order, each once.
        outer: The sources of a call around this one.
        moved: For each input, by number, and each of its dimensions: the function that has reordered its elements
            before the call.
        notes: The notes that hold the dimensions; ``None``: new notes, which watch for unseen writes.
        hidden: Which of the inputs hide tokens; ``None``: not known, if ``notes`` are not given either.
    """

    # True if a call may be recognised as a repetition of an earlier one.
    is_repeated = False

    def __init__(
        self,
        inputs: Sequence[torch.Tensor],
        outer: Sources | None = None,
        moved: dict[int, dict[int, str]] | None = None,
        notes: Notes | None = None,
        hidden: HiddenTokens | None = None,
    ) -> None:
        super().__init__(
            inputs, notes or Notes(_strayed), hidden or (HiddenTokens() if notes is None else None)
        )
        self.outer, self.moved = outer, moved or {}
        # Products of queries and keys (``observed.Scored``).
        self.scores: list[Any] = []
        # Nodes whose probabilities were shown.
        self.shown: list[Any] = []
        # Axes that were joined from pieces, some of which were not seen.
        self.strange: set[Axis] = set()
        # Tells if a tensor that no followed function has made holds no tokens; ``None``: nobody asks for the order of
        # what the module returns.
        self.is_bare: Callable[[torch.Tensor], bool] | None = None
        for tensor, dims in zip(inputs, self.inputs, strict=True):
            self._known[tensor] = dims

    def of(self, tensor: torch.Tensor) -> Dims | None:
        """The axes of each dimension of a tensor; ``None`` if they are not known."""
        return self._known.get(tensor)

    def returned(self, tensor: torch.Tensor) -> Dims | None:
        """As ``of``, for a tensor that leaves the module."""
        return self.of(tensor)

    def recall_results(self, results: Sequence[torch.Tensor]) -> tuple[int | None, ...] | None:
        """For each result, the number of the input whose order it has; ``None``: this has to be determined."""
        return None

    def remember_results(
        self, results: Sequence[torch.Tensor], orders: Callable[[], tuple[int | None, ...] | None]
    ) -> None:
        """Remember the order of the results that was asked for with ``recall_results``.

        Args:
            results: The results.
            orders: Returns it; ``None``: it is not that simple.
        """

    def known(self) -> list[torch.Tensor]:
        """All tensors that were seen and still exist."""
        return list(self._known)

    def knows(self, tensor: torch.Tensor) -> bool:
        """True if a tensor was seen."""
        return tensor in self._known

    def has_seen_writes(self, tensor: torch.Tensor) -> bool:
        """True if all writes to a tensor were seen, or if the tensor is not known at all."""
        return tensor not in self._known or self._known.knows_writes(tensor)

    def hidden_of(self, inputs: Sequence[torch.Tensor]) -> HiddenTokens | None:
        """Tells which of the tensors that a module inside is called with hide some of their tokens."""
        return None if self.hidden is None else self.hidden.inside(inputs)

    def recall(self, query: torch.Tensor, key: torch.Tensor) -> Layout | None:
        """The remembered layout of the attention of ``query`` and ``key``; ``None``: it has to be determined."""
        return None

    def remember(self, layout: Layout) -> None:
        """Remember the layout of the attention that was asked for with ``recall``."""

    def give(self, tensor: torch.Tensor, dims: Dims) -> None:
        """Set the dimensions of a tensor that no followed function has made."""
        self._known[tensor] = dims

    def give_later(self, tensor: torch.Tensor, dims: Callable[[Sources], Dims | None]) -> None:
        """As ``give``, with a function that returns the dimensions."""
        found = dims(self)
        if found is not None:
            self._known[tensor] = found

    def name_single(self, tensor: torch.Tensor, place: int) -> None:
        """Note which token a slice of size 1 holds; elsewhere a dimension of size 1 has no axis."""
        dims, own = self._known.get(tensor), self._along(tensor, place)
        if dims is not None and own is not None and tensor.shape[place] == 1:
            self._known[tensor] = (*dims[:place], own, *dims[place + 1 :])

    def same(self, tensor: torch.Tensor, copy: torch.Tensor) -> None:
        """Note that ``copy`` has the elements of ``tensor`` at the same positions."""
        if copy is not tensor and tensor in self._known:
            self._known[copy] = self._known[tensor]

    def before(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> None:
        """Called before each torch function, if tensors have no version."""
        if self.outer is not None:
            self.outer.before(func, args, kwargs)
        for one in may_write_to(func, args, kwargs):
            self._before_write(one)

    def _before_write(self, tensor: torch.Tensor) -> None:
        self._known.before_write(tensor)

    def follow(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Called after each torch function."""
        if self.outer is not None:
            self.outer.follow(func, args, kwargs, result)
        self._known.begin_function()
        try:
            self._follow(func, args, kwargs, result)
        finally:
            self._known.end_function()

    def _follow(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], result: Any) -> None:
        name = element_places.name_of(func)
        args, kwargs = first_in_place(name, args, kwargs)
        results = [t for t in (result if isinstance(result, (tuple, list)) else (result,)) if is_plain(t)]
        if name.startswith("torch._ops."):
            for one in written_by(func, args, kwargs):
                self._known.lose(one)
        is_write = name in element_places.WRITES or name in element_places.SCATTERING
        if not results and not is_write:
            if name in EXPOSING and args and is_plain(args[0]):
                self._known.expose(args[0])
            return  # a shape, a dtype
        # ``out=`` does not contribute to the values of the result.
        given = {key: value for key, value in kwargs.items() if key != "out"}
        everything = list(tensors_in((args, given)))
        # Scores that are not computed yet have dimensions only where they are multiplied with values.
        operands = [t for t in everything if is_plain(t) or t in self._known]
        if self.is_bare is not None and element_places.is_of(name, _CHOOSING):
            for one in filter(self._is_strange, operands):
                self._known[one] = lost(one.shape, UNSEEN)
        own = {id(t) for t in operands}
        for one in operands[:1] if is_write else [t for t in results if id(t) in own]:
            self._known.wrote(one)
        if operands and is_write:
            self._written(name, operands, args)
        with_tokens = [t for t in operands if self.hidden is not None and is_plain(t) and self._has_tokens(t)]
        for one in results:
            if id(one) not in own:
                is_out = len(given) < len(kwargs)
                if self.is_bare is not None and not is_out and self._known.get(one) is not None:
                    continue  # a function of several steps, which were followed one by one
                found = self._found(name, args, given, operands, one)
                if is_out:
                    self._forget(one)
                if found is not None or not any(map(self._is_strange, everything)):
                    self._known[one] = found
                if found is not None and name in element_places.JOINING:
                    self._join_strangers(operands, found)
            elif (
                self._known.get(one) is not None
                and name not in element_places.WRITES
                and not (element_places.keeps(name) and self._shows_in_place(name, one, operands, given))
            ):
                self._forget(one)  # in place
        if self.hidden is not None:
            written = operands[:1] if is_write else [t for t in results if id(t) in own]
            self.hidden.follow(name, args, given, with_tokens, results or written)
            for one in written:
                self.hidden.spread(one, self._sharing)

    def _is_strange(self, tensor: torch.Tensor) -> bool:
        """True if a tensor was not seen, and is none of the model's own: it may hold tokens in any order."""
        if self.is_bare is None or type(tensor) is torch.nn.Parameter or tensor in self._known:
            return False
        is_number = tensor.is_floating_point() and is_wide(tensor)
        return is_number and not (is_plain(tensor) and self.is_bare(tensor))

    def _join_strangers(self, pieces: Sequence[torch.Tensor], dims: Dims) -> None:
        """Note that tokens in an unknown order are among concatenated ones."""
        if any(map(self._is_strange, pieces)):
            self.strange.update(leaf for leaf in all_leaves(dims) if leaf in self.made)

    def _is_moved(self, dim: Dim) -> bool:
        if not self.moved:
            return False
        origins = (self.origin(leaf) for leaf in leaves(dim))
        return any(found is not None and found[1] in self.moved.get(found[0], ()) for found in origins)

    def _sharing(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The other known tensors that share the memory of one."""
        return [one for one, _ in self._known.items() if one is not tensor and share_memory(one, tensor)]

    def _has_tokens(self, tensor: torch.Tensor) -> bool:
        """True if a tensor is known to come from others, and is not new."""
        dims = self._known.get(tensor)
        if dims is None:
            return False
        axes = all_leaves(dims)
        return any(leaf not in self._blank for leaf in axes) if self._blank else bool(axes)

    def _written(self, name: str, operands: list[torch.Tensor], args: Any) -> None:
        """Follow a write into an existing tensor."""
        target, value = operands[0], operands[-1]
        own, dims = self._known.get(target), self._known.get(value)
        if own is None:
            self._forget(target, dims)  # other tensors in its memory may be known
            if dims is not None and value is not target and value.dim() == target.dim():
                self._into_unknown(target, value, dims, args)
            return
        if name == "__setitem__":
            place = args[1]
            if any(
                isinstance(one, (torch.Tensor, list))
                for one in (place if isinstance(place, tuple) else (place,))
            ):
                self._forget(target, dims)
                return
            view = target[place]
            is_elsewhere = dims is not None and self._is_of_another(target, place, view, value)
            if is_elsewhere or not share_memory(target, view):
                self._forget(target, dims)
                return
            own = self._viewed(own, target, view)
        elif name in element_places.SCATTERING:
            self._forget(target, dims)
            return
        if value is target:
            return
        # An unknown vector is a token of the module's own; a larger unknown tensor may hold tokens in any order.
        is_told = self._take_places(own, dims) if dims is not None else sum(n > 1 for n in value.shape) < 2
        if not is_told:
            self._forget(target, dims)

    def _is_of_another(
        self, target: torch.Tensor, index: Any, view: torch.Tensor, value: torch.Tensor
    ) -> bool:
        """True if an index picks single tokens or sequences, and those written there may be others.

        Axes do not tell which element a dimension of size 1 holds, so this is read from the memory that the written
        values are a view of.
        """
        given = index if isinstance(index, tuple) else (index,)
        if not any(type(one) is int for one in given) and view.dim() == target.dim():
            narrowed = [place for place, size in enumerate(target.shape) if view.shape[place] == 1 < size]
            if all(leaves(self._known[target][place]) == [] for place in narrowed):
                return False
        start = view.storage_offset() - target.storage_offset()
        return not any(
            dims is not None
            and (one.shape, one.stride()) == (target.shape, target.stride())
            and value.stride() == view.stride()
            and value.storage_offset() - one.storage_offset() == start
            and share_memory(one, value)
            for one, dims in self._known.items()
        )

    def _forget(self, target: torch.Tensor, value: Dims | None = None) -> None:
        """Note that a tensor, and all tensors in its memory, hold other elements than before.

        Args:
            target: The tensor.
            value: The dimensions of what was written.
        """
        for one, dims in self._known.items():
            if dims is not None and share_memory(one, target):
                self._known[one] = found = fresh(one.shape)
                self._lost(found, (*dims, *(value or ())))

    def _into_unknown(self, target: torch.Tensor, value: torch.Tensor, dims: Dims, args: Any) -> None:
        """Note tokens that are written into unknown memory of fixed size (a cache), along the dimension in which the
        memory is longer than the tokens.
        """
        place = [i for i, (a, b) in enumerate(zip(target.shape, value.shape, strict=True)) if a != b]
        if len(place) > 1:
            return
        if not place and len(args) == 2 and value is args[1]:
            self._known[target] = dims
            return
        at = args[1] if len(args) > 2 and isinstance(args[1], int) else target.dim() - 2
        at = place[0] if place else at % target.dim()
        axis = Axis(target.shape[at])
        self.made[axis] = Made(has=dims[at])
        self._known[target] = (*dims[:at], (axis,), *dims[at + 1 :])


def _strayed(tensor: torch.Tensor) -> Dims:
    """Dimensions for a tensor that unseen code has written to."""
    return lost(tensor.shape, UNSEEN)


def paired(sources: Sources, query: Dim, key: Dim | None, contracted: Sequence[Axis]) -> Dim:
    """A dimension of sequences or heads that queries and keys share, with the queries' axes.

    If the keys belong to other sequences (all to the first one, or in another order), it has a new axis instead.
    """
    if key is None:
        return query
    summed = {found[:2] for leaf in contracted if (found := sources.origin(leaf)) is not None}

    def sequences(dim: Dim) -> list[Axis]:
        found = ((leaf, sources.origin(leaf)) for leaf in leaves(dim))
        return [leaf for leaf, origin in found if origin is not None and origin[:2] not in summed]

    mine, its = sequences(query), sequences(key)
    alike = [one.size for one in mine] == [one.size for one in its] and all(
        one is other or sources.number(one) != sources.number(other)
        for one, other in zip(mine, its, strict=True)
    )
    if alike or not mine:
        return query
    strange = Axis(math.prod(axis.size for axis in query))
    sources.made[strange] = Made(is_of_others=True)
    return (strange,)
