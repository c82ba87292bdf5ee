"""Tracks which tensors of a model's call hold its tokens at other positions than before, or at unknown ones.

Models transpose the rows and columns of an image, cut it into windows, or swap halves: dimensions are split, permuted
and merged again. They are followed as inside a module (``sources.py``), beginning with the tensor that is split or
transposed first, whose order is taken for the model's. A function that is not known to leave tokens in place makes new
axes that bear its name (``Axis.made_by``): a product along tokens, stacked pieces, a write at an index.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from attnpatch.observing import MAKING
from attnpatch.rows.graph.axes import Axis, Dims, fresh, leaves, regroup
from attnpatch.rows.provenance import element_places
from attnpatch.rows.provenance.origins import Made, lost
from attnpatch.rows.provenance.sources import Sources
from attnpatch.rows.provenance.tensors import share_memory, tensors_in
from attnpatch.rows.provenance.token_order import Order
from attnpatch.rows.provenance.unseen_writes import EXPOSING, UNSEEN, Notes, written_by

# Functions that permute dimensions, and functions that take a part of a tensor.
_TURNING = frozenset(
    "transpose permute movedim moveaxis swapaxes swapdims T mT H mH t adjoint as_strided unfold".split()
)
_CUTTING = frozenset(
    "__getitem__ narrow split split_with_sizes chunk tensor_split unsafe_chunk unsafe_split unbind select".split()
)
# Functions whose order ``reordered.py`` tracks exactly: here their tokens stay in their dimension.
_ORDERED = frozenset("roll flip fliplr flipud rot90 sort msort gather index_select take_along_dim".split())
# Functions that pool or spread tokens along the dimensions after the first two, and keep their order.
_SPATIAL = element_places.CONVOLUTIONS | frozenset(
    "avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d interpolate "
    "upsample upsample_nearest upsample_bilinear pixel_shuffle pixel_unshuffle unfold".split()
)
# Functions that compute each token from itself and others, at the same position.
_MIXING = frozenset("cumsum cumprod cummax cummin logcumsumexp lstm gru rnn_tanh rnn_relu".split())
_LEAVING_TOKENS = frozenset("linear bilinear index_fill embedding __get__".split()) | _MIXING
# Functions that expand a dimension of size 1.
_EXPANDING = frozenset("expand expand_as broadcast_to".split())
# Functions that write into a tensor, or into a copy of it.
_SETTING = frozenset(
    "__setitem__ copy scatter scatter_add scatter_reduce index_copy index_add index_put index_reduce put masked_scatter "
    "select_scatter slice_scatter diagonal_scatter".split()
)
_NAMES = {"__getitem__": "a slice or an index", "__setitem__": "writing at places"}
IN_ANOTHER_ORDER = _ORDERED | {"views", "an index"}
# How deep in a model's arguments tensors are looked for.
_DEPTH = 6
# Functions that leave torch, and functions that come back.
_OUT, _BACK = (
    frozenset("numpy tolist __array__".split()),
    frozenset("from_numpy tensor as_tensor asarray".split()),
)


class Turned:
    """Follows the tokens of a model's call."""

    def __init__(self, module: torch.nn.Module, given: Any) -> None:
        # These notes do not watch for unseen writes, since ``_is_bare`` does.
        self._sources, self._module = Sources([], notes=Notes()), module
        self._look = Order(self._sources)
        # For tensors whose origin was seen: True if they hold no tokens (new ones, or made from parameters alone).
        self._is_bare = Notes(self._strayed)
        # Integer inputs of the model with one element per token: ids, padding masks.
        self._of_tokens: list[torch.Tensor] = []
        # For slices with steps: the source tensor, and start and step by dimension.
        self._slices: Any = WeakIdKeyDictionary()
        self._constants: frozenset[int] | None = None
        self._has_left_torch = self._has_others = False
        self._see(given)

    def follow(
        self, name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], result: Any
    ) -> None:
        """Called after each torch function."""
        given = result if isinstance(result, (tuple, list)) else (result,)
        results = [one for one in given if type(one) is torch.Tensor]
        if not results and name in EXPOSING and args and self._is_plain(args[0]):
            self._is_bare.expose(args[0])
        is_set, is_foreign = is_setting(name), name.startswith("torch._ops.")
        if not results and name not in _OUT and not is_set and not is_foreign:
            return  # a shape, a dtype
        # ``out=`` does not contribute to the values of the result.
        given_out = [*tensors_in(kwargs.get("out"))]
        kwargs = {key: value for key, value in kwargs.items() if key != "out"}
        tensors = [tensor for tensor in tensors_in((args, kwargs)) if self._is_plain(tensor)]
        written = [tensor for tensor in tensors if any(tensor is one for one in results)] + given_out
        if is_set and (name == "__setitem__" or name.endswith("_")) and args and self._is_plain(args[0]):
            written = [args[0]]
        for one in written:
            self._is_bare.wrote(one)
        if is_foreign:
            for one in written_by(func, args, kwargs):
                self._is_bare.lose(one)
        before = [self.why(one) or self.why(_base(one)) for one in written]
        own = [tensor for tensor in tensors if self.has_tokens(tensor)]
        for one in results:
            if one not in self._is_bare or any(one is other for other in given_out):
                self._is_bare[one] = False
        if name in _OUT:
            self._has_left_torch |= any(tensor.is_floating_point() and _is_wide(tensor) for tensor in own)
        elif not own or name.startswith(MAKING) or _is_nothing(name, args):
            self._without_tokens(name, results)
        elif is_set:
            self._set(name, args, kwargs, tensors, results)
        elif any(map(_is_wide, results)):
            self._follow(name, func, (args, kwargs), own, results, result)
        for one, reasons in zip(written, before, strict=True):
            self._spread(one, reasons)

    def _spread(self, written: torch.Tensor, before: dict[int, str]) -> None:
        """After a write that changed a tensor's order, the order of all tensors in its memory is lost, too."""
        base = _base(written)
        now = self.why(written) or self.why(base)
        if not now or now == before:
            return
        for one in self.sharing(written):
            if one is not base and not self.why(one):
                self._lose(one, next(iter(now.values())))

    def sharing(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The other known tensors that share the memory of one."""
        return [one for one in self._is_bare if one is not tensor and share_memory(one, tensor)]

    def _strayed(self, tensor: torch.Tensor) -> bool:
        """Called if unseen code has written to a tensor: it may hold tokens now (False), in an unknown order."""
        self._lose(tensor, UNSEEN)
        return False

    def _see(self, given: Any, depth: int = 0) -> None:
        """Note the tensors among the model's arguments, also inside objects of any kind."""
        if isinstance(given, torch.Tensor):
            self._is_bare[given] = False
            if type(given) is torch.Tensor and given.dim() == 2 and not given.is_floating_point():
                self._of_tokens.append(given)
        elif depth < _DEPTH and not isinstance(given, (type, torch.nn.Module)):
            if isinstance(given, Mapping):
                inside = given.values()
            else:
                is_row = isinstance(given, (tuple, list, set, frozenset))
                inside = given if is_row else getattr(given, "__dict__", {}).values()
            for each in inside:
                self._see(each, depth + 1)

    def _is_plain(self, tensor: torch.Tensor) -> bool:
        """True for plain tensors. Subclasses make plain tensors unseen, and must not be asked for their base."""
        is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
        self._has_others |= not is_plain
        return is_plain

    def has_tokens(self, tensor: torch.Tensor) -> bool:
        """True if a tensor may hold tokens from the model's inputs.

        A tensor that no torch function has made inside the model's call is either a constant of the model, or was made
        from tokens by code that cannot be followed (another library's, scripted).
        """
        if type(tensor) is torch.nn.Parameter:
            return False
        is_bare = self._is_bare.get(tensor)
        if is_bare is None:
            if is_learned(tensor) or not self._is_plain(tensor) or not _is_wide(tensor):
                return not is_learned(tensor)
            if self._constants is None:
                self._constants = frozenset(map(id, self._module.buffers()))
            is_bare = self._is_bare[tensor] = id(_base(tensor)) in self._constants
            if not is_bare and tensor.is_floating_point() and not self._has_others:
                self._lose(tensor, UNSEEN)
        return not is_bare

    def adds(
        self,
        name: str,
        tensor: torch.Tensor,
        moved: torch.Tensor,
        result: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> bool:
        """True if a function adds a tensor with all of the result's tokens in order (a residual) to a reordered one."""
        return (
            element_places.is_of(name, element_places.ADDING)
            and self.has_tokens(tensor)
            and has_tokens_of(tensor, result)
            # The last dimension is channels, whose order does not matter.
            and not any(place < tensor.dim() - 1 for place in self.why(tensor))
            and all(
                self._shows(element_places.summand(tensor, name, moved, result, kwargs), moved, place)
                for place in range(result.dim() - 1)
            )
        )

    def through(self, given: Sequence[torch.Tensor], result: Any, inside: Sources | None) -> None:
        """Note after attention has run that its result has the order of its input tokens.

        Args:
            given: The tensors that it was called with.
            result: Its result.
            inside: The sources that have followed its functions, or ``None``.
        """
        for one in given:
            if inside is None or inside.has_seen_writes(one):
                self._is_bare.agree(one)
        for one in tensors_in(result):
            is_new = one not in self._is_bare
            if is_new:
                self._is_bare[one] = False
            if type(one) is not torch.Tensor or not is_new or self._sources.of(one) is not None:
                continue
            alike = next((each for each in given if each.shape[:-1] == one.shape[:-1]), None)
            if not given:
                continue
            if alike is None:
                reason = next(iter(self.why(given[0]).values()), None)
                if reason is not None:
                    self._lose(one, reason)
            elif (dims := self._sources.of(alike)) is not None:
                self._sources.give(one, (*dims[:-1], *fresh(one.shape[-1:])))

    def why(self, tensor: torch.Tensor) -> dict[int, str]:
        """By dimension whose elements are in another order than before, or in an unknown one: the cause."""
        dims = self._sources.of(tensor)
        return {} if dims is None else self._look.why(dims)

    def sides(self, tensor: torch.Tensor) -> list[int]:
        """The lengths (frames, rows, columns) merged into tokens ``[batch, tokens, channels]``; empty: not known."""
        dims = self._sources.of(tensor)
        return [] if dims is None or len(dims) != 3 else self._look.sides(dims[1])

    # ------------------------------------------------------------------------------------------------- one function

    def _without_tokens(self, name: str, results: list[torch.Tensor]) -> None:
        for one in results:
            if name in _BACK and self._has_left_torch and one.is_floating_point() and _is_wide(one):
                self._lose(one, name)
            else:
                self._is_bare[one] = True

    def _follow(
        self,
        name: str,
        func: Callable[..., Any],
        given: tuple[Any, dict[str, Any]],
        own: list[torch.Tensor],
        results: list[torch.Tensor],
        result: Any,
    ) -> None:
        first = own[0]
        if _leaves_tokens(name) and not (name == "embedding" and len(own) > 1):
            if all(self._sources.of(tensor) is None for tensor in own):
                return
        elif not self._begin(name, own, results[0]):
            return
        before = [dims for tensor in own if (dims := self._sources.of(tensor)) is not None]
        dims = self._sources.of(first)
        if name in _ORDERED and dims is not None and results[0].shape == first.shape:
            for one in results:
                self._sources.give(one, dims)
            return
        if name == "__getitem__" and dims is not None and results[0].numel() == first.numel():
            # A mask that is true everywhere, over one or several dimensions.
            count = first.dim() - results[0].dim() + 1
            if _is_mask(given[0][1], count):
                joined = tuple(axis for dim in dims[:count] for axis in dim)
                self._sources.give(results[0], (joined, *dims[count:]))
                return
        if name in _MIXING and dims is not None and results[0].dim() == len(dims):
            self._sources.give(results[0], (*dims[:-1], *fresh(results[0].shape[-1:])))
            return
        if name in element_places.IN_ORDER and dims is not None and results[0].numel() == first.numel():
            # Row-major order, whatever the memory layout: adjacent dimensions that are merged become one dimension.
            grouped = regroup(dims, results[0].shape)
            if grouped is not None:
                self._sources.give(results[0], grouped)
                return
        self._sources.follow(func, *given, result)
        if name in _SPATIAL and name not in element_places.CONVOLUTIONS and dims is not None:
            self._pooled(dims, first, results)
        if name == "pad" and dims is not None:
            self._padded(dims, first, results[0], *given)
        self._mark(name, before, own, results)
        self._merge(name, given, first, results[0])
        if _is_elementwise(name):
            self._settle(name, own, results[0], given[1])
        elif name in element_places.JOINING:
            self._beside(own, results[0])

    def _begin(self, name: str, own: list[torch.Tensor], result: torch.Tensor) -> bool:
        """Begin to follow a function's operands, if needed; False if there is nothing to follow."""
        if name in element_places.JOINING:
            for tensor in own:
                self._order(tensor)
        elif _begins(name, own[0], result):
            self._order(own[0])
        elif name in _CUTTING or name in element_places.IN_ORDER or name in _TURNING:
            return any(self._sources.of(tensor) is not None for tensor in own)
        else:
            for tensor in own:
                if self._sources.of(tensor) is None:
                    self._sources.give(tensor, fresh(tensor.shape))
        return True

    def _order(self, tensor: torch.Tensor) -> None:
        """Take the present order of a tensor as the right one for those of its axes that were not seen before."""
        dims = self._sources.of(tensor)
        if dims is None:
            dims = fresh(tensor.shape)
            self._sources.give(tensor, dims)
        made, origin = self._sources.made, self._sources.origin
        new = tuple(
            tuple(leaf for leaf in leaves(dim) if leaf not in made and origin(leaf) is None) for dim in dims
        )
        if any(new):
            self._sources.inputs.append(new)

    def _mark(
        self, name: str, before: list[Dims], own: list[torch.Tensor], results: list[torch.Tensor]
    ) -> None:
        """Mark new axes with the function that made them, unless it is known to keep tokens in place."""
        kept = {leaf for dims in before for dim in dims for leaf in leaves(dim)}
        by_place = _is_elementwise(name) or element_places.is_of(name, element_places.OF_FIRST)
        for one in results:
            dims = self._sources.of(one)
            if dims is None:
                if not _leaves_tokens(name) and all(one is not tensor for tensor in own):
                    self._lose(one, name)
                continue
            for place, dim in enumerate(dims):
                if (name in _SPATIAL and place > 1) or (by_place and name not in _EXPANDING):
                    continue
                for leaf in leaves(dim):
                    is_new = leaf not in kept and leaf not in self._sources.made
                    if is_new and self._sources.origin(leaf) is None:
                        leaf.made_by = leaf.made_by or _NAMES.get(name, name)

    def _merge(
        self, name: str, given: tuple[Any, dict[str, Any]], first: torch.Tensor, result: torch.Tensor
    ) -> None:
        """Recognise strided slices concatenated along channels: the same image, coarser (Swin's patch merging)."""
        if name == "__getitem__":
            index = _listed(given[0][1])
            steps = [(one.start or 0, one.step or 1) for one in index if isinstance(one, slice)]
            if len(steps) == len(index) and any(step > 1 for _, step in steps):
                self._slices[result] = id(first), self.why(first), steps
        elif name in element_places.JOINING and first in self._slices:
            found = [self._slices.get(piece) for piece in tensors_in(given[0][:1])]
            source, why, steps = self._slices[first]
            wanted = {*itertools.product(*(range(step) for _, step in steps))}
            its = {tuple(start for start, _ in each[2]) for each in found if each and each[0] == source}
            if its == wanted and len(found) == len(wanted) and result.shape[:-1] == first.shape[:-1]:
                dims = fresh(result.shape)
                for place, reason in why.items():
                    for leaf in leaves(dims[place]):
                        leaf.made_by = reason
                self._sources.give(result, dims)

    def _padded(
        self, dims: Dims, first: torch.Tensor, result: torch.Tensor, args: Any, kwargs: dict[str, Any]
    ) -> None:
        """Treat padding with a constant like a piece that was concatenated to the tokens."""
        mode = args[2] if len(args) > 2 else kwargs.get("mode", "constant")
        amounts = list(args[1] if len(args) > 1 else kwargs.get("pad", ()))
        if mode != "constant" or len(amounts) > 2 * len(dims):
            return
        found = list(self._sources.of(result) or ())
        for back, (low, high) in enumerate(zip(amounts[::2], amounts[1::2], strict=True)):
            place = len(dims) - 1 - back
            if (low or high) and min(low, high) >= 0:
                axis = Axis(result.shape[place])
                parts = ((None, low), (dims[place], first.shape[place]), (None, high))
                self._sources.made[axis] = Made(tuple(part for part in parts if part[1]))
                found[place] = (axis,)
        self._sources.give(result, tuple(found))

    def _pooled(self, dims: Dims, first: torch.Tensor, results: list[torch.Tensor]) -> None:
        """After pooling, dimensions that keep their length (sequences, channels) keep their axes."""
        for one in results:
            if one.dim() == len(dims) > 2:
                pairs = zip(dims, first.shape, one.shape, strict=True)
                kept = (dim if size == own else fresh([own])[0] for dim, size, own in pairs)
                self._sources.give(one, tuple(kept))

    def _settle(
        self, name: str, own: list[torch.Tensor], result: torch.Tensor, kwargs: dict[str, Any]
    ) -> None:
        """Choose the axes of an elementwise result among the operands that have all of its tokens.

        A sum takes those of an operand in order (a residual); any other function those of an operand out of order.
        """
        known = self._sources.of(result)
        whole = [tensor for tensor in own if has_tokens_of(tensor, result)]
        if not whole or known is None:
            return
        is_sum = element_places.is_of(name, element_places.ADDING)
        choices = [
            (tensor, self._sources.of(tensor) or fresh(result.shape), self.why(tensor)) for tensor in whole
        ]
        found = []
        for place in range(result.dim()):
            clean = [(tensor, dims[place]) for tensor, dims, why in choices if place not in why]
            other = [(tensor, dims[place]) for tensor, dims, why in choices if place in why]
            if other and is_sum:
                value = other[0][0]
                clean = [
                    one
                    for one in clean
                    if self._shows(element_places.summand(one[0], name, value, result, kwargs), value, place)
                ]
            found.append(next(iter(clean + other if is_sum else other + clean))[1])
        self._sources.give(result, tuple(found))

    def _shows(self, tensor: torch.Tensor, beside: torch.Tensor | None, place: int) -> bool:
        """True if the tokens of a tensor are visible in a sum; see ``element_places.shows``."""
        return element_places.shows(tensor, beside, place, self._of_tokens)

    def _beside(self, own: list[torch.Tensor], result: torch.Tensor) -> None:
        """For tensors concatenated along channels, take the axes of one that is in order, as in a sum."""
        known = self._sources.of(result)
        if known is None or len(own) < 2 or any(one.shape[:-1] != result.shape[:-1] for one in own):
            return
        choices = [(one, dims, self.why(one)) for one in own if (dims := self._sources.of(one)) is not None]
        found = list(known)
        for place in range(result.dim() - 1):
            is_other = any(place in why for _, _, why in choices)
            clean = (
                dims[place]
                for one, dims, why in choices
                if place not in why and not (is_other and not self._shows(one, None, place))
            )
            found[place] = next(clean, found[place])
        self._sources.give(result, tuple(found))

    # ------------------------------------------------------------------------------------------------------- writes

    def _set(
        self,
        name: str,
        args: Any,
        kwargs: dict[str, Any],
        tensors: list[torch.Tensor],
        results: list[torch.Tensor],
    ) -> None:
        """Follow a write into a tensor, or into a copy of it."""
        target, value = args[0] if args else tensors[0], _value_of(name, args, kwargs)
        if not self._is_plain(target):
            return
        is_in_place = name == "__setitem__" or name.endswith("_")
        out = target if is_in_place or not results else results[0]
        if out is not target:
            if self._is_bare.get(target):
                self._is_bare[out] = True
            elif (dims := self._sources.of(target)) is not None:
                self._sources.give(out, dims)
        is_known = value is None or value is target or not self._is_plain(value)
        if is_known or not self.has_tokens(value) or not _is_wide(out):
            return
        view = None
        if name == "__setitem__":
            if not any(isinstance(one, (torch.Tensor, list)) for one in _listed(args[1])):
                view = out[args[1]]
        elif name == "copy_":
            view, out = out, out if out._base is None else out._base
        if view is None:
            # A write at an index: it may replace some of the tokens, or all.
            is_piece = _base(value).numel() == out.numel() or _base(value) is _base(target)
            if self._is_bare.get(out) or value.numel() >= out.numel() or is_piece:
                self._lose(out, name)
            return
        source = _base(value)
        if view.shape == out.shape == value.shape:
            self._is_bare[out] = False
            self._sources.give(out, self._sources.of(value) or fresh(out.shape))
        elif source.shape == out.shape and source.stride() == out.stride():
            start, end = value.storage_offset() - source.storage_offset(), view.storage_offset()
            if (value.shape, value.stride(), start) != (
                view.shape,
                view.stride(),
                end - out.storage_offset(),
            ):
                # Integers may be shifted: a decoder's input is the text shifted by one token.
                if value.is_floating_point():
                    self._lose(out, name)
            elif self._is_bare.get(out):
                self._is_bare[out] = False
                if (dims := self._sources.of(source)) is not None:
                    self._sources.give(out, dims)
        elif self._is_bare.get(out) or source.numel() == out.numel():
            self._lose(out, name)

    def _lose(self, tensor: torch.Tensor, name: str) -> None:
        """Note that the origin of a tensor's elements is no longer known."""
        self._is_bare[tensor] = False
        self._sources.give(tensor, lost(tensor.shape, _NAMES.get(name, name)))


@functools.cache
def _is_elementwise(name: str) -> bool:
    return element_places.is_of(name, element_places.OF_ALL)


def _is_nothing(name: str, args: Any) -> bool:
    """True for a multiplication by the number 0."""
    return element_places.is_of(name, element_places.MULTIPLYING) and any(
        isinstance(one, (int, float)) and one == 0 for one in args
    )


@functools.cache
def is_setting(name: str) -> bool:
    """True if a function writes into a tensor, or into a copy of it."""
    return element_places.is_of(name, _SETTING)


@functools.cache
def _leaves_tokens(name: str) -> bool:
    """True if a function is known to leave tokens at their positions."""
    return (
        _is_elementwise(name)
        or name in _LEAVING_TOKENS
        or (name not in _EXPANDING and element_places.is_of(name, element_places.OF_FIRST))
    )


def _begins(name: str, first: torch.Tensor, result: torch.Tensor) -> bool:
    """True if a function slices or permutes a tensor along more than its channels."""
    if first.dim() < 2:
        return False
    if name in _TURNING:
        return True
    if name in _CUTTING:
        return result.shape[:-1] != first.shape[:-1]
    return name in element_places.IN_ORDER and first.shape[:-1] != result.shape[:-1]


def _is_wide(tensor: torch.Tensor) -> bool:
    """True if a tensor has more than one dimension longer than 1."""
    return sum(size > 1 for size in tensor.shape) > 1


def _base(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor._base is None else tensor._base


def _value_of(name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """The tensor that is written; ``None`` if it is a number."""
    named = [kwargs.get(key) for key in ("src", "source", "values", "value")]
    at = 1 if name in ("select_scatter", "slice_scatter", "diagonal_scatter") else -1
    given = [*named, *(args[at:][:1] if len(args) > 1 else ())]
    return next((one for one in given if isinstance(one, torch.Tensor)), None)


def _is_mask(index: Any, dims: int) -> bool:
    (one,) = index if isinstance(index, tuple) and len(index) == 1 else (index,)
    return isinstance(one, torch.Tensor) and one.dtype == torch.bool and one.dim() == dims


def _listed(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def is_learned(tensor: torch.Tensor) -> bool:
    """True if a tensor is a parameter or a view of one, so that it holds no tokens."""
    return isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter)


def has_tokens_of(tensor: torch.Tensor, result: torch.Tensor) -> bool:
    """True if a tensor can hold all of the result's tokens: same shape, and not a parameter."""
    return (
        tensor.shape == result.shape
        and not is_learned(tensor)
        and tensor.is_floating_point() == result.is_floating_point()
    )
