"""Records native steps on scores, so that a step that runs out of memory can be computed by rows instead.

The tape keeps how each tensor was made, not the tensor itself. When a step fails, the steps before it become a graph,
and large tensors that the host no longer holds stay freed. The module's forward is not run again, so a cache is not
appended to twice.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from attnpatch.rows.attention_call import AttentionCall
from attnpatch.rows.autograd.saved_tensors import SavedTensorBuffer
from attnpatch.rows.dispatch import writes
from attnpatch.rows.graph.nodes import Context, map_structure
from attnpatch.rows.graph.random_state import RandomState, random_state, set_random_state
from attnpatch.rows.guard import native
from attnpatch.rows.interception import dispatch
from attnpatch.rows.matmul import products
from attnpatch.rows.op_table import CASTS, called


class _Made:
    """A tensor on the tape: the step that made it, and which of the step's results it is."""

    def __init__(
        self,
        step: Step,
        index: int | None,
        tensor: torch.Tensor,
        gone: Callable[[weakref.ref[torch.Tensor]], None],
    ) -> None:
        self.step, self.index = step, index
        self.reference = weakref.ref(tensor, gone)
        self.storage = tensor.untyped_storage().data_ptr()

    def again(self, call: AttentionCall) -> Any:
        result = self.step.again(call)
        return result if self.index is None else result[self.index]


class Step:
    """One native call.

    Attributes:
        args, kwargs: Its arguments; tensors that are on the tape are replaced by their entries.
        product: The product of query and key, if the scores begin with this call.
        reads: Storages of the tensors that it and the steps before it read.
        random: States of the random generators before the first step that used one.
    """

    def __init__(
        self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], product: products.Product | None
    ) -> None:
        self.func, self.args, self.kwargs, self.product = func, args, kwargs, product
        found = list(_flat((args, kwargs)))
        before = [value.step for value in found if isinstance(value, _Made)]
        tensors = [value for value in found if isinstance(value, torch.Tensor)]
        device = tensors[0].device if not before else before[0].context_device
        self.context_device, self.context = device, Context(device)
        self.reads = {tensor.untyped_storage().data_ptr() for tensor in tensors}.union(
            *(s.reads for s in before)
        )
        self.random: list[RandomState] = next((s.random for s in before if s.random), [])
        if not self.random and any(name in func.__name__ for name in ("dropout", "gumbel")):
            self.random = [random_state(device)]
            if device.type != "cpu":
                # By rows a mask's seed is drawn from the CPU generator, whatever the device.
                self.random.append(random_state(torch.device("cpu")))
        self._result: Any = None

    def products(self) -> Iterator[products.Product]:
        """The products of query and key from which this step is computed."""
        if self.product is not None:
            yield self.product
        for value in _flat((self.args, self.kwargs)):
            if isinstance(value, _Made):
                yield from value.step.products()

    def again(self, call: AttentionCall) -> Any:
        """The result of the call, deferred."""
        if self._result is None:
            with self.context.enter():
                self._result = self._deferred(call)
        return self._result

    def _deferred(self, call: AttentionCall) -> Any:
        if self.product is not None:
            return products.deferred(self.func, self.product, call)

        def revive(value: Any) -> Any:
            return value.again(call) if isinstance(value, _Made) else value

        args, kwargs = map_structure(self.args, revive), map_structure(self.kwargs, revive)
        name = called(self.func)
        if not writes(name):
            return dispatch(self.func, args, kwargs)
        # Use the function that is not in place: the graph of the tensor before the write may still be needed.
        result = dispatch(getattr(torch.Tensor, name[:-1]), args, kwargs)
        return (
            result
            if result.dtype == args[0].dtype
            else dispatch(torch.Tensor.to, (result, args[0].dtype), {})
        )


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    else:
        yield value


class NativeTape:
    """The native steps on scores in the present call of a site."""

    def __init__(self) -> None:
        self._made: dict[int, _Made] = {}
        self.saved = SavedTensorBuffer()

    def _place(self, value: Any) -> Any:
        """The tape's entry for a tensor; any other value unchanged."""
        made = self._made.get(id(value))
        return made if made is not None and made.reference() is value else value

    def run(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], call: AttentionCall) -> Any:
        """Call ``func``; if it is a step of attention and runs out of memory, compute it by rows.

        Raises:
            RuntimeError: ``func`` raised another error, or it writes to its input: the host goes on with that tensor,
                whatever is returned here.
        """
        name = called(func)
        product = None
        if name in products.NAMES and not any(isinstance(v, _Made) for v in map(self._place, _flat(args))):
            product = products.native_scores(name, args, kwargs)
        step = None
        if product is not None:
            step = Step(func, args, kwargs, product)
        elif self._made:
            places = map_structure((args, kwargs), self._place)
            if any(isinstance(place, _Made) for place in _flat(places)):
                step = Step(func, *places, None)
            elif writes(name) or kwargs.get("out") is not None:
                self._forget(
                    *(v for v in _flat((args[:1], kwargs.get("out"))) if isinstance(v, torch.Tensor))
                )
        if writes(name) or kwargs.get("out") is not None:
            self.saved.hand_on()
        if step is None:
            return native(func, args, kwargs)
        try:
            with self.saved.holding():
                result = native(func, args, kwargs)
        except RuntimeError as error:
            if writes(name) or kwargs.get("out") is not None or not call.answers(error, step.context_device):
                raise
        else:
            self._note(step, name, args, kwargs, result)
            return result
        self.saved.forget()
        for first in step.products():
            call.remember(*products.native_size(first))
        for state in step.random:
            set_random_state(state)
        return step.again(call)

    def _note(self, step: Step, name: str, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Put the results of a step on the tape, if they are still computed from scores."""
        if any(result is value for value in _flat(args)) and (name in CASTS or name == "contiguous"):
            return  # the function returned its argument unchanged
        if writes(name) or kwargs.get("out") is not None or any(result is value for value in _flat(args)):
            self._note_write(step, name, args, kwargs, result)
            return
        if step.product is None and name in (*products.NAMES, "linear"):
            widest = max(made.numel() for made in _flat(args) if isinstance(self._place(made), _Made))
            if result.numel() < widest:
                self.saved.hand_on()
                return  # the product with the values: attention ends here
        if type(result) is torch.Tensor:
            self._keep(step, None, result)
        elif isinstance(result, tuple):
            for index, part in enumerate(result):
                if type(part) is torch.Tensor:
                    self._keep(step, index, part)

    def _note_write(self, step: Step, name: str, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        target = args[0] if args and isinstance(args[0], torch.Tensor) else result
        is_known = isinstance(self._place(target), _Made) and result is target
        self._forget(target)
        if is_known and name != "__setitem__" and hasattr(torch.Tensor, name[:-1]) and writes(name):
            self._keep(step, None, target)

    def _keep(self, step: Step, index: int | None, tensor: torch.Tensor) -> None:
        """Keep how a tensor was made only while the tensor lives, since its step holds the layer's query."""
        made, key = self._made, id(tensor)

        def gone(reference: weakref.ref[torch.Tensor]) -> None:
            # Another tensor may have the same id by now.
            if key in made and made[key].reference is reference:
                del made[key]

        made[key] = _Made(step, index, tensor, gone)

    def _forget(self, *written: torch.Tensor) -> None:
        """Drop tensors that were made from an overwritten tensor, because they cannot be computed again."""
        storages = {tensor.untyped_storage().data_ptr() for tensor in written}
        for key, made in list(self._made.items()):
            if made.storage in storages or made.step.reads & storages:
                self._made.pop(key, None)
