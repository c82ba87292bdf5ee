"""Where the dimensions of a tensor come from: followed from a module's inputs through its functions.

A map of attention says which token looks at which. Its rows are tokens of an input of the module only if nothing on the
way from that input to the query has cut, sorted, pooled or mixed them. So every dimension of every tensor that a module
makes is followed: views by their strides, products by their labels, everything else by its shape. What cannot be followed
is known to be unknown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from attnpatch.observing import Layout
from attnpatch.rows.graph.axes import Axis, Dim, Dims, fresh, leaves, regroup, size_of
from attnpatch.rows.graph.strides import Part, single, viewed
from attnpatch.rows.matmul.spellings import NAMES, parse
from attnpatch.rows.op_table import called
from attnpatch.rows.provenance import element_places
from attnpatch.rows.provenance.filled_in_pieces import Pieces


@dataclasses.dataclass(frozen=True)
class Made:
    """An axis that is no input's, or no longer: joined of others, part of one, or made by the module.

    Attributes:
        parts: What it was joined from, in order: axes, ``None`` where they are not known, and how many.
        of: What it is a part of; ``None``: of nothing known.
        part: Which part.
        has: What was written into it, where it was there before (a cache of fixed size).
        is_of_others: Whether it is of sequences of which the queries are one, and the keys another.
    """

    parts: tuple[tuple[Dim | None, int], ...] = ()
    of: Axis | None = None
    part: Part | None = None
    has: Dim | None = None
    is_of_others: bool = False


class Sources:
    """The dimensions of the tensors of one call of a module.

    Args:
        inputs: The tensors that it is called with, in order, each once.
        outer: Those of a call that this one is inside of.
        moved: Of inputs whose elements lie elsewhere than the model's: what did that, by dimension, by their number.

    Attributes:
        inputs: Their dimensions, every one an axis of its own.
        made: What became of other axes.
    """

    def __init__(
        self,
        inputs: Sequence[torch.Tensor],
        outer: Sources | None = None,
        moved: dict[int, dict[int, str]] | None = None,
    ) -> None:
        self.outer, self.moved = outer, moved or {}
        self._known: Any = WeakIdKeyDictionary()
        # Of tensors that nothing was written into yet.
        self._blank: set[Axis] = set()
        # Of those that are filled piece by piece.
        self._pieces: dict[Axis, Pieces] = {}
        # Of views with one element of a dimension: which.
        self._singles: Any = WeakIdKeyDictionary()
        self.inputs = [fresh(tensor.shape) for tensor in inputs]
        self.made: dict[Axis, Made] = {}
        # Of axes that hold an input's elements in places that are not known: the number of the input.
        self._losses: dict[Axis, int] = {}
        # The number of the input that an axis is of. Only of those that are one's: others may yet become one's.
        self._ranks: dict[Axis, int] = {}
        # What was found of products of queries and keys (``shown``).
        self.scores: list[Any] = []
        # Whose probabilities were shown.
        self.shown: list[Any] = []
        for tensor, dims in zip(inputs, self.inputs, strict=True):
            self._known[tensor] = dims

    def of(self, tensor: torch.Tensor) -> Dims | None:
        """The axes of each dimension; ``None`` where they are not known."""
        return self._known.get(tensor)

    def origin(self, leaf: Axis) -> tuple[int, int, int] | None:
        """Of which input an axis is, of which of its dimensions, and which part of that; ``None``: of none."""
        for number, dims in enumerate(self.inputs):
            for place, dim in enumerate(dims):
                parts = leaves(dim)
                if leaf in parts:
                    return number, place, parts.index(leaf)
        return None

    def number(self, leaf: Axis) -> int | None:
        """Of which input an axis is."""
        found = self.origin(leaf)
        return None if found is None else found[0]

    def recall(self, query: torch.Tensor, key: torch.Tensor) -> Layout | None:
        """What attention of these was found to be before; ``None``: it has to be found out."""
        return None

    def remember(self, layout: Layout) -> None:
        """Attention that was asked for with ``recall`` was found to be this."""

    def give(self, tensor: torch.Tensor, dims: Dims) -> None:
        """Say what the dimensions of a tensor are that came from none of these functions."""
        self._known[tensor] = dims

    def same(self, tensor: torch.Tensor, copy: torch.Tensor) -> None:
        """A tensor has the elements of another in their places."""
        if copy is not tensor and tensor in self._known:
            self._known[copy] = self._known[tensor]

    def follow(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """A function of torch's has run."""
        if self.outer is not None:
            self.outer.follow(func, args, kwargs, result)
        name = called(func)
        results = [t for t in (result if isinstance(result, (tuple, list)) else (result,)) if _is_plain(t)]
        is_write = name in element_places.WRITES or name in element_places.SCATTERING
        if not results and not is_write:
            return  # a shape, a dtype
        # Memory that is handed over for the result says nothing of it.
        given = {key: value for key, value in kwargs.items() if key != "out"}
        operands = [t for t in tensors_in((args, given)) if _is_plain(t)]
        if operands and is_write:
            self._written(name, operands, args)
        own = {id(t) for t in operands}
        for one in results:
            if id(one) not in own:
                found = self._found(name, args, given, operands, one)
                if len(given) < len(kwargs):
                    self._forget(one)
                self._known[one] = found
            elif (
                self._known.get(one) is not None
                and name not in element_places.WRITES
                and not element_places.keeps(name)
            ):
                self._forget(one)  # in place

    def _found(
        self, name: str, args: Any, kwargs: dict[str, Any], operands: list[torch.Tensor], result: torch.Tensor
    ) -> Dims | None:
        known = [(t, dims) for t in operands if (dims := self._known.get(t)) is not None]
        if name in element_places.BLANK or (known and name in element_places.BLANK_LIKE):
            blank = fresh(result.shape)
            self._blank.update(leaf for dim in blank for leaf in dim)
            return blank
        if not known:
            return None
        if name in NAMES or name == "linear":
            return self._of_product(name, args, kwargs, result)
        if name in element_places.JOINING or name == "stack":
            return self._joined(name, args, kwargs, result)
        first, dims = known[0]
        if first is not operands[0]:
            # Learned numbers in the shape of an input are none of its tokens.
            is_made_of_all = element_places.is_of(name, element_places.OF_ALL)
            return (
                self._elementwise([own for _, own in known], result.shape, name) if is_made_of_all else None
            )
        if first.dtype == result.dtype and _shares(first, result):
            return self._viewed(dims, first, result)
        return self._of_first(name, args, kwargs, known, result)

    def _of_first(
        self,
        name: str,
        args: Any,
        kwargs: dict[str, Any],
        known: list[tuple[torch.Tensor, Dims]],
        result: torch.Tensor,
    ) -> Dims | None:
        first, dims = known[0]
        if name in element_places.IN_ORDER and result.numel() == first.numel():
            return regroup(dims, result.shape) or self._unknown(result, dims)
        if name in element_places.MOVING:
            return self._lost(element_places.moved(name, dims, args, kwargs, result), dims)
        if element_places.keeps_rows(name) and result.shape[:-1] == first.shape[:-1]:
            return (*dims[:-1], *fresh(result.shape[-1:]))
        if name == "pad":
            return self._lost(element_places.padded(dims, args, kwargs, result), dims)
        if name == "__getitem__":
            return self._picked(first, dims, args[1], result)
        if name in element_places.CONVOLUTIONS and result.dim() == len(dims):
            spatial = [
                (dim if size_of(dim) == size else fresh([size])[0])
                for dim, size in zip(dims[2:], result.shape[2:], strict=True)
            ]
            return (dims[0], *fresh(result.shape[1:2]), *spatial)
        if name == "_transform_bias_rescale_qkv":
            return (dims[0], *fresh(result.shape[1:2]), dims[1], *fresh(result.shape[3:4]))
        if name == "embedding":
            return (*dims, *fresh(result.shape[-1:]))
        if name == "view_as_real":
            return (*dims, *fresh(result.shape[-1:]))
        if name == "view_as_complex":
            return dims[:-1]
        if result.dim() < len(dims):
            return self._reduced(dims, args, kwargs, result, name)
        if element_places.is_of(name, element_places.OF_ALL):
            return self._elementwise([own for _, own in known], result.shape, name)
        if element_places.is_of(name, element_places.OF_FIRST):
            return self._elementwise([dims], result.shape)
        return self._unknown(result, dims)

    def _picked(self, source: torch.Tensor, dims: Dims, index: Any, result: torch.Tensor) -> Dims:
        """Some elements along one dimension, and the others as a view has them."""
        given = index if isinstance(index, tuple) else (index,)
        found = element_places.picked_at(given, source.dim())
        if found is None:
            return self._unknown(result, dims)
        pick, at = found
        view = source[(*given[:pick], slice(None), *given[pick + 1 :])]
        own = self._viewed(dims, source, view)
        return self._lost((*own[:at], *fresh([result.shape[at]]), *own[at + 1 :]), dims)

    def _elementwise(self, known: list[Dims], shape: Sequence[int], name: str = "") -> Dims:
        """Each dimension is the first operand's that has it, those of the earliest input first: later ones are positions.

        Tokens that were moved are those of their input all the same, and no others become them.
        """
        if len(known) > 1:
            known = sorted(known, key=self._earliest)
        dims: list[Dim] = []
        for back, size in zip(range(len(shape), 0, -1), shape, strict=True):
            found = [own[-back] for own in known if back <= len(own) and size_of(own[-back]) == size != 1]
            if element_places.is_of(name, element_places.CHOOSING):
                found.sort(key=lambda dim: not self._losses.keys().isdisjoint(leaves(dim)), reverse=True)
            dims.append(found[0] if found else fresh([size])[0])
        return tuple(dims)

    def _earliest(self, own: Dims) -> tuple[int, bool]:
        """The number of the earliest input that a tensor was made of, and whether it is lost where in it."""
        none = len(self.inputs)
        rank = min(map(self._rank, own), default=none)
        lost = min((self._losses.get(leaf, none) for dim in own for leaf in leaves(dim)), default=none)
        return min(rank, lost), lost < none

    def _lost(self, found: Dims | None, dims: Dims) -> Dims | None:
        """Dimensions of a result, of which new ones are places in a tensor that are not known any more."""
        if found is not None and (rank := self._earliest(dims)[0]) < len(self.inputs):
            for leaf in (leaf for dim in found for leaf in leaves(dim)):
                if leaf not in self.made and self._rank_of(leaf) == len(self.inputs):
                    self._losses.setdefault(leaf, rank)
        return found

    def _rank(self, dim: Dim) -> int:
        """The number of the input that it comes from; as many as there are: of none."""
        return min(map(self._rank_of, leaves(dim)), default=len(self.inputs))

    def _rank_of(self, leaf: Axis) -> int:
        if leaf in self._ranks:
            return self._ranks[leaf]
        origin = self.origin(leaf)
        made = self.made.get(leaf, Made())
        inside = [part for part, _ in made.parts if part is not None]
        inside += [(made.of,)] if made.of is not None else []
        inside += [made.has] if made.has is not None else []
        none = len(self.inputs)
        found = min([origin[0] if origin is not None else none, *map(self._rank, inside)])
        if found < none:
            self._ranks[leaf] = found
        return found

    def _of_product(self, name: str, args: Any, kwargs: dict[str, Any], result: torch.Tensor) -> Dims | None:
        product = parse(name, args, kwargs)
        if product is None and name == "addmm" and len(args) > 2:
            product = parse("mm", args[1:3], {})
        if product is None or len(product.result) != result.dim():
            return self._unknown(result)
        axes: dict[str, list[Dim]] = {}
        for tensor, labels in zip(product.operands, product.labels, strict=True):
            for label, dim in zip(labels, self._known.get(tensor) or (), strict=False):
                if size_of(dim) > 1:
                    axes.setdefault(label, []).append(dim)
        sizes = zip(product.result, result.shape, strict=True)
        return tuple(
            min(found, key=self._rank)
            if (found := [dim for dim in axes.get(label, []) if size_of(dim) == size])
            else fresh([size])[0]
            for label, size in sizes
        )

    def _viewed(self, dims: Dims, source: torch.Tensor, result: torch.Tensor) -> Dims:
        found = viewed(dims, source, result)
        ones = {p: part for p in range(result.dim()) if (part := single(dims, source, result, p)) is not None}
        if ones:
            self._singles[result] = ones
        changed = []
        for axes in found:
            dim: list[Axis] = []
            for axis in axes:
                if isinstance(axis, Axis):
                    dim.append(axis)
                else:
                    new = Axis(axis.count)
                    self.made[new] = Made(of=axis.of, part=axis)
                    dim.append(new)
            changed.append(tuple(dim))
        return tuple(changed)

    def _joined(self, name: str, args: Any, kwargs: dict[str, Any], result: torch.Tensor) -> Dims | None:
        pieces = args[0] if args else kwargs.get("tensors", ())
        at = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
        if not isinstance(at, int) or not isinstance(pieces, (tuple, list)):
            return self._unknown(result)
        place = at % result.dim()
        # An empty cache is a tensor of one dimension.
        pieces = [
            piece for piece in pieces if piece.numel() and piece.dim() == result.dim() - (name == "stack")
        ]
        known = [own for piece in pieces if (own := self._known.get(piece)) is not None]
        if not known:
            return None
        if name == "stack":
            return self._elementwise([(*own[:place], (), *own[place:]) for own in known], result.shape)
        shape = list(result.shape)
        shape[place] = 1
        dims = list(self._elementwise([(*own[:place], (), *own[place + 1 :]) for own in known], shape))
        parts = [(self._along(piece, place), piece.shape[place]) for piece in pieces]
        dims[place] = self._one(parts)
        return tuple(dims)

    def _along(self, piece: torch.Tensor, place: int) -> Dim | None:
        own = self._known.get(piece)
        part = self._singles.get(piece, {}).get(place)
        if own is None or part is None:
            return None if own is None else own[place]
        axis = Axis(1)
        self.made[axis] = Made(of=part.of, part=part)
        return (axis,)

    def _one(self, parts: list[tuple[Dim | None, int]]) -> Dim:
        """The dimension of pieces that lie one after the other."""
        if len(parts) == 1 and parts[0][0] is not None:
            return parts[0][0]
        whole = self._whole_again(parts)
        if whole is not None:
            return whole
        axis = Axis(sum(size for _, size in parts))
        if any(dim is None or self.is_known(dim) for dim, _ in parts):
            self.made[axis] = Made(tuple(parts))
        return (axis,) if axis.size > 1 else ()

    def is_known(self, dim: Dim) -> bool:
        """Whether something of it is an input's."""
        return self._rank(dim) < len(self.inputs) or any(
            (made.of is not None and self.is_known((made.of,)))
            or (made.has is not None and (not leaves(made.has) or self.is_known(made.has)))
            for leaf in leaves(dim)
            if (made := self.made.get(leaf)) is not None
        )

    def _whole_again(self, parts: list[tuple[Dim | None, int]]) -> Dim | None:
        """The axis that was cut into these pieces, if they are all of it in its order."""
        place, whole = 0, None
        for dim, size in parts:
            own = (list(dim) if size == 1 else leaves(dim)) if dim is not None else []
            made = self.made.get(own[0]) if len(own) == 1 else None
            if made is None or made.of is None or made.part is None:
                return None
            if whole not in (None, made.of) or made.part.start != place or made.part.step != 1:
                return None
            whole, place = made.of, place + size
        return (whole,) if whole is not None and place == whole.size else None

    def _reduced(
        self, dims: Dims, args: Any, kwargs: dict[str, Any], result: torch.Tensor, name: str
    ) -> Dims | None:
        at = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if name not in element_places.REDUCING or not isinstance(at, int) or result.dim() != len(dims) - 1:
            return self._unknown(result)
        gone = at % len(dims)
        return (*dims[:gone], *dims[gone + 1 :])

    def _written(self, name: str, operands: list[torch.Tensor], args: Any) -> None:
        """Something was written into a tensor that was there before."""
        target, value = operands[0], operands[-1]
        own, dims = self._known.get(target), self._known.get(value)
        if own is None:
            self._forget(target)  # of what lies in the same memory something may be known
            if dims is not None and value is not target and value.dim() == target.dim():
                self._into_unknown(target, value, dims, args)
            return
        if name == "__setitem__":
            place = args[1]
            if any(
                isinstance(one, (torch.Tensor, list))
                for one in (place if isinstance(place, tuple) else (place,))
            ):
                self._forget(target)
                return
            view = target[place]
            if not _shares(target, view):
                self._forget(target)
                return
            own = self._viewed(own, target, view)
        elif name in element_places.SCATTERING:
            self._forget(target)
            return
        if value is target:
            return
        # A vector that comes from nowhere is a token of the module's own; more than that may be tokens in any order.
        is_told = self._take_places(own, dims) if dims is not None else sum(n > 1 for n in value.shape) < 2
        if not is_told:
            self._forget(target)

    def _take_places(self, own: Dims, dims: Dims) -> bool:
        """Whether what is written comes from where it goes to; what is blank takes over where it comes from."""
        for mine, theirs in zip(reversed(own), reversed(dims), strict=False):
            place, source = leaves(mine), leaves(theirs)
            if len(place) == len(source) == 1 and place[0] in self._blank and place[0].size == source[0].size:
                place[0].become(source[0])
            elif (blank := self._blank_part(place)) is not None:
                if not self._fill(*blank, theirs):
                    return False
            elif (
                source
                and (self.is_known(theirs) or self.is_known(mine))
                and self._signed(mine) != self._signed(theirs)
            ):
                return False
        return True

    def _blank_part(self, place: list[Axis]) -> tuple[Axis, Part] | None:
        """The blank axis that a place is a piece of, and which; ``None``: of none."""
        made = self.made.get(place[0], Made()) if len(place) == 1 else Made()
        if made.of is None or made.part is None or made.part.step != 1 or made.of not in self._blank:
            return None
        return (made.of, made.part) if leaves((made.of,)) == [made.of] else None

    def _fill(self, blank: Axis, part: Part, source: Dim) -> bool:
        """Write into a piece of a blank axis, which so is joined of such pieces; whether it held nothing else there."""
        pieces = self._pieces.setdefault(blank, Pieces())
        there = pieces.at(part.start, part.count)
        if there is not None:
            return self._signed(there) == self._signed(source)
        if not pieces.put(part.start, part.count, source):
            return False
        parts = pieces.all_of(blank.size)
        whole = self._whole_again(parts)
        if whole is not None:
            blank.become(whole[0])
        elif any(self.is_known(dim) for dim, _ in parts):
            self.made[blank] = Made(tuple(parts))
        return True

    def _signed(self, dim: Dim) -> list[Any]:
        """Where a dimension comes from, alike for the same part of one input, and for what was joined of the same."""
        return [self.origin(leaf) or self._signed_made(leaf) for leaf in leaves(dim)]

    def _signed_made(self, leaf: Axis) -> Any:
        made = self.made.get(leaf, Made())
        if made.of is not None:
            return made.of, made.part
        if made.has is not None:
            return "slots", leaf.size, *self._signed(made.has)
        if made.parts:
            # Of what the module kept there is only the length: half of a key may lie in one cache, half in another.
            known = [part if part is not None and self.is_known(part) else None for part, _ in made.parts]
            sizes = [size for _, size in made.parts]
            return "joined", *sizes, *(None if part is None else tuple(self._signed(part)) for part in known)
        return leaf

    def _forget(self, target: torch.Tensor) -> None:
        """A tensor holds other elements than before, and so does all that lies in its memory."""
        for one, dims in list(self._known.items()):
            if dims is not None and _shares(one, target):
                self._known[one] = fresh(one.shape)

    def _into_unknown(self, target: torch.Tensor, value: torch.Tensor, dims: Dims, args: Any) -> None:
        """A memory of fixed size holds tokens along the dimension in which it is longer."""
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

    def _unknown(self, result: torch.Tensor, dims: Dims = ()) -> Dims:
        found = fresh(result.shape)
        self._lost(found, dims)
        return found


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not hasattr(value, "handle")


def _shares(source: torch.Tensor, result: torch.Tensor) -> bool:
    if source is result or source.is_meta or result.is_meta:
        return (
            source is result
            or result._base is source
            or (result._base is not None and result._base is source._base)
        )
    try:
        return source.untyped_storage().data_ptr() == result.untyped_storage().data_ptr() != 0
    except (RuntimeError, NotImplementedError):
        return False  # a tensor without a storage of its own


def tensors_in(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """The tensors that arguments are, or that tuples, lists and dicts among them hold."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)) and depth < 4:
        for item in value:
            yield from tensors_in(item, depth + 1)
    elif isinstance(value, dict) and depth < 4:
        for item in value.values():
            yield from tensors_in(item, depth + 1)


def inputs_among(args: Iterable[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors of numbers that a module is called with, each once: arguments, and what tuples and dicts hold."""
    found = (t for t in tensors_in((list(args), kwargs)) if t.is_floating_point() and t.dim() > 1)
    return list({id(tensor): tensor for tensor in found if _is_plain(tensor)}.values())
