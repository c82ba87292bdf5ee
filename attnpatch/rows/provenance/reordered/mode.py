"""Tracks which tensors of a model's call hold its tokens in another order than the model was given them.

A site is followed from its own inputs (``sources.py``), whose tokens are taken for the model's. That is wrong if the
model rolls, flips or sorts its tokens, or the sequences of its batch, between sites. So functions that do this are
looked for, and their results are followed; views, sums and writes are followed by ``functions.py``. A sum with a tensor
that was not reordered (a residual) has that tensor's order.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from attnpatch import compat
from attnpatch.rows import guard
from attnpatch.rows.op_table import first_in_place
from attnpatch.rows.provenance.element_places import CONVOLUTIONS, name_of
from attnpatch.rows.provenance.hidden_tokens import HiddenTokens
from attnpatch.rows.provenance.remembered_calls import RememberedCalls
from attnpatch.rows.provenance.reordered import sums
from attnpatch.rows.provenance.reordered.function_tables import is_setting
from attnpatch.rows.provenance.reordered.functions import Turned
from attnpatch.rows.provenance.reordered.orders import Order, flat, is_picked, orders_of, picks_all
from attnpatch.rows.provenance.repeated import sources_of
from attnpatch.rows.provenance.sources import Sources
from attnpatch.rows.provenance.unseen_writes import may_write
from attnpatch.rows.thread_state import here
from attnpatch.rows.watching import without

# Functions that reorder elements along one or several dimensions.
_MOVING = frozenset(
    "roll flip fliplr flipud rot90 sort msort gather index_select take_along_dim __getitem__".split()
)
# Of these, the functions whose order differs from element to element; this order is not examined.
_BY_ELEMENT = frozenset("sort msort gather take_along_dim rot90".split())
# Functions after which a tensor holds another one's elements, in that one's order.
_TAKING = frozenset("copy_ set_ data_".split())

_FAILED = "a function that attnpatch failed to follow (a warning says which)"


class Moved(TorchFunctionMode):
    """A mode that sees the functions of a model's call, except those inside its attention sites."""

    def __init__(self, module: torch.nn.Module, given: Any) -> None:
        super().__init__()
        # Number of nested sites that are running.
        self.depth = 0
        # The sources that follow the functions of each of them, by its depth.
        self._inside: dict[int, Sources] = {}
        # True if attnpatch's own code has failed to follow a function.
        self._has_failed = False
        # For each tensor: the function that reordered it, and the order.
        self._found: Any = WeakIdKeyDictionary()
        with compat.DisableTorchFunction():
            self._turned = Turned(module, given)
        self._turned.picked.out_of_order = self._found

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.depth or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and may_write(func, kwargs):
            with compat.DisableTorchFunction():
                self._attempt(self._turned.before, func, args, kwargs)
        result = func(*args, **kwargs)
        # The functions called here are attnpatch's own: no other mode must see them.
        with compat.DisableTorchFunction():
            self._attempt(self._look, func, args, kwargs, result)
        return result

    def _attempt(self, step: Callable[..., Any], *args: Any) -> None:
        """Do a step. If it fails, no order is known any more."""

        def done() -> bool:
            step(*args)
            return True

        self._has_failed |= not guard.attempted(done, name="the order of tokens")

    def _look(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], result: Any) -> None:
        name = name_of(func)
        args, kwargs = first_in_place(name, args, kwargs)
        if (
            self._found
            or name == "embedding"
            or (name in _MOVING and (name != "__getitem__" or is_picked(args[1])))
        ):
            self._follow(name, args, kwargs, result)
        self._turned.is_bare.begin_function()
        try:
            self._turned.follow(name, func, args, kwargs, result)
        finally:
            self._turned.is_bare.end_function()

    def enter(self) -> None:
        """A site begins to run."""
        self.depth += 1
        self._inside.pop(self.depth, None)

    def why(self, tensor: torch.Tensor) -> dict[int, str]:
        """For each dimension in which a tensor's elements were reordered, the function that did it; other dimensions
        are in the model's order.
        """
        if self._has_failed:
            return dict.fromkeys(range(tensor.dim()), _FAILED)
        found = self._found.get(tensor)
        moved = {} if found is None else dict.fromkeys(range(tensor.dim()), found[0])
        self._turned.has_tokens(tensor)
        return {**self._turned.why(tensor), **moved}

    def hidden_of(self, inputs: Sequence[torch.Tensor]) -> HiddenTokens:
        """Tells which of the tensors that a site is called with hide some of their tokens."""
        bare = [one for one in inputs if self._turned.is_bare.get(one)]
        return self._turned.hidden.inside(inputs, bare)

    def sides(self, tensor: torch.Tensor) -> list[tuple[int, list[int]]]:
        """See ``TokenTensors.sides``."""
        return self._turned.sides(tensor)

    def follows(self, sources: Sources) -> None:
        """Note the sources that follow the functions of the running site.

        What a site around others does is seen by this mode itself.
        """
        if not self.depth:
            return
        # An autograd graph keeps the sources of its calls, and this mode knows the model: so these refer to it weakly.
        turned = weakref.ref(self._turned)

        def is_bare(tensor: torch.Tensor) -> bool:
            found = turned()
            return found is not None and not found.has_tokens(tensor)

        sources.is_bare = is_bare
        self._inside[self.depth] = sources

    def through(self, given: Sequence[torch.Tensor], result: Any) -> None:
        """Note after a site has run that its result has the order of its input tokens."""
        with compat.DisableTorchFunction():
            self._attempt(self._through, given, result)

    def _through(self, given: Sequence[torch.Tensor], result: Any) -> None:
        inside = self._inside.pop(self.depth + 1, None)
        self._turned.through(given, result, inside)
        if not given:
            return
        found = next((known for tensor in given if (known := self._found.get(tensor)) is not None), None)
        if found is not None:
            self._keep(found, given[0], result)

    def _keep(self, found: tuple[str, Order], source: torch.Tensor, result: Any) -> None:
        name, order = found
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if type(one) is not torch.Tensor or one.dim() < 1:
                continue
            is_there = order is not None and one.shape[: order[0] + 1] == source.shape[: order[0] + 1]
            self._found[one] = name, order if is_there else None

    def _follow(self, name: str, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        if args and (name in _TAKING or name == "__setitem__"):
            self._take(name, args, kwargs)
            return
        tensors = [value for value in flat((args, list(kwargs.values()))) if isinstance(value, torch.Tensor)]
        if not tensors:
            return
        first = tensors[0]
        if name in _MOVING and not self._turned.has_tokens(first):
            return  # made from positions, not from tokens
        before = self._found.get(first)
        if name in _MOVING:
            self._move(name, args, kwargs, first, before, result)
            return
        if name == "embedding" and len(tensors) > 1 and picks_all(*tensors[:2]):
            self._keep((name, None), result, result)
            return
        if name in CONVOLUTIONS or name in ("linear", "embedding"):
            tensors = tensors[:1]  # a filter that was flipped does not reorder tokens
        if is_setting(name):
            tensors = tensors[:1]  # the result has the order of the tensor that is written to
        moved = [tensor for tensor in tensors if tensor in self._found]
        one = result[0] if isinstance(result, (tuple, list)) and result else result
        if not moved or not isinstance(one, torch.Tensor) or any(one is tensor for tensor in moved):
            return
        in_order = (tensor for tensor in tensors if tensor not in self._found)
        if any(sums.adds(self._turned, name, tensor, moved[0], one, kwargs) for tensor in in_order):
            return
        self._keep(self._found[moved[0]], moved[0], result)

    def _take(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        """Take over the order of written values, if all of a tensor was overwritten."""
        target, *rest = (*args, *kwargs.values())
        value = next((one for one in reversed(rest) if isinstance(one, torch.Tensor)), None)
        index = args[1] if name == "__setitem__" else ...
        is_whole = all(one is ... or one == slice(None) for one in index) if isinstance(index, tuple) else (
            index is ... or (isinstance(index, slice) and index == slice(None))
        )  # fmt: skip
        is_alike = isinstance(value, torch.Tensor) and value.shape == target.shape
        found = self._found.get(value) if isinstance(value, torch.Tensor) else None
        if not is_whole or not is_alike or target is value:
            picked = self._turned.picked
            is_other = found is not None and not picked.has_places(value)
            if is_other and picked.have_common_input(target, value):
                self._found[target] = found[0], None
            return
        if found is not None:
            self._found[target] = found
            for one in self._turned.sharing(target):
                self._found[one] = found[0], None
        else:
            self._found.pop(target, None)

    def _move(
        self, name: str, args: Any, kwargs: dict[str, Any], first: torch.Tensor, before: Any, result: Any
    ) -> None:
        one = result[0] if isinstance(result, (tuple, list)) else result
        if not isinstance(one, torch.Tensor):
            return
        if name in _BY_ELEMENT:
            orders: list[Order] = [None] if one.shape == first.shape and one.dim() > 1 else []
        else:
            orders = [*orders_of(name, args, kwargs, first, one)]
        if not orders:
            if before is not None:
                self._keep(before, first, result)
            return
        known = before[1] if before is not None else None
        for order in orders:
            if order is None or (before is not None and known is None):
                known = None
                break
            dim, places = order
            if known is not None and known[0] != dim:
                known = None
                break
            known = dim, places if known is None else known[1][places]
        if known is None or not bool((known[1] == torch.arange(len(known[1]), device=known[1].device)).all()):
            self._found[one] = (
                (before[0] if before is not None else "an index" if name == "__getitem__" else name),
                known,
            )


@contextlib.contextmanager
def watched(module: torch.nn.Module, given: Any) -> Iterator[None]:
    """Watch the call of a model.

    Args:
        module: The model.
        given: Its arguments.
    """
    outer, here.order = here.order, Moved(module, given)
    try:
        with here.order:
            yield
    finally:
        here.order = outer


def watch() -> Moved | None:
    """The ``Moved`` mode of the running model call in this thread, or ``None``."""
    return here.order


def is_asked() -> bool:
    """True if somebody asks for the order of what the running site returns."""
    return here.order is not None and here.order.depth > 0


def sources_inside(
    inputs: Sequence[torch.Tensor], around: Sources | None, repeats: RememberedCalls | None
) -> Sources:
    """The ``Sources`` that follow the functions of a site's call; see ``sources_of`` for the arguments."""
    order = here.order
    hidden = known.hidden_of(inputs) if (known := around or order) else None
    moved = {} if order is None else {i: why for i, each in enumerate(inputs) if (why := order.why(each))}
    sources = sources_of(inputs, around, moved, repeats, hidden)
    if order is not None:
        order.follows(sources)
    return sources


def sides(tensor: torch.Tensor) -> list[tuple[int, list[int]]]:
    """See ``TokenTensors.sides``; empty outside a model's call."""
    return [] if here.order is None else here.order.sides(tensor)


@contextlib.contextmanager
def paused(watch: Moved) -> Iterator[None]:
    """Switch the mode off while a site runs: ``Sources`` follow its functions, and it must run as without a mode."""
    watch.enter()
    try:
        with without(watch):  # if it stays on torch's stack, ``depth`` makes it do nothing
            yield
    finally:
        watch.depth -= 1
