"""RowsMode: the TorchFunctionMode that is active only inside a swapped forward. It watches SDPA and matrix products."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from attnpatch import compat
from attnpatch.oom import Attempts
from attnpatch.rows import dispatch, guard
from attnpatch.rows.attention_call import AttentionCall
from attnpatch.rows.autograd import checkpoints
from attnpatch.rows.autograd.native_tape import NativeTape
from attnpatch.rows.creation import positions, uninitialized
from attnpatch.rows.deferred.handle import after_write, left
from attnpatch.rows.deferred.tensor import DeferredTensor, is_watching_writes, materialize
from attnpatch.rows.interception import dispatch_in
from attnpatch.rows.kernels import serve as kernels
from attnpatch.rows.kernels.table import kernel_of
from attnpatch.rows.matmul import products
from attnpatch.rows.matmul.spellings import FUNCTIONS
from attnpatch.rows.provenance import observed
from attnpatch.rows.provenance.returned.weights import name_weights
from attnpatch.rows.provenance.unseen_writes import may_write
from attnpatch.rows.sdpa import cuttable, encoder_fast_paths, serve
from attnpatch.rows.watching import Watching

_BLANK_USERS = frozenset(
    getattr(space, name) for space in (torch, torch.Tensor) for name in ("baddbmm", "addbmm", "addmm")
)
_SOFTMAX = frozenset([torch.softmax, torch.Tensor.softmax, F.softmax])
_BEGINNINGS = frozenset(FUNCTIONS) | {F.scaled_dot_product_attention}
# Python functions of torch that reach a mode as one call: their inside must be watched, too.
_COMPOSITES = frozenset([F.multi_head_attention_forward])
# Fused torch operators that compute attention inside, each with a function that runs its single steps. Where torch lacks
# one, they have the key ``None``, which is no function.
FAST_PATHS: dict[Any, Callable[..., Any]] = {
    compat.native_multi_head_attention: encoder_fast_paths.multihead,
    compat.transformer_encoder_layer: encoder_fast_paths.encoder_layer,
}


def num_heads(func: Callable[..., Any], args: Any) -> int:
    return args[4] if func is compat.native_multi_head_attention else args[2]


class RowsMode(Watching):
    """Attention by rows for the call of one site.

    Args:
        call: Policy, counters and observer of the site; replaced while a nested site runs.
    """

    sees_kernels = True

    def __init__(self, call: AttentionCall) -> None:
        super().__init__(call)
        self.trail = NativeTape()
        self.checkpoint: Any = None

    def __enter__(self) -> RowsMode:
        self.checkpoint = guard.attempted(
            checkpoints.current, name="a checkpoint", counters=self.call.counters
        )
        return super().__enter__()

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        guard.attempted(self.trail.saved.hand_on, name="what autograd saved", counters=self.call.counters)
        guard.attempted(left, name="the end of attention", counters=self.call.counters)

    def answer(self, func: Callable[..., Any], types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        sources = self.call.sources
        if sources is not None and torch.is_inference_mode_enabled() and may_write(func, kwargs):
            with compat.DisableTorchFunction():
                sources.before(func, args, kwargs)
        result = self._answer(func, types, args, kwargs)
        if sources is not None and sources is self.call.sources:
            # The functions called there are attnpatch's own: no other mode must see them.
            with compat.DisableTorchFunction():
                if DeferredTensor in types and func in FUNCTIONS and type(result) is torch.Tensor:
                    name_weights(args, kwargs, sources)
                sources.follow(func, args, kwargs, result)
            if func in _SOFTMAX and type(result) is torch.Tensor and result.shape[-2:] == (1, 1):
                observed.of_one(result, self.call)
        return result

    def _answer(self, func: Callable[..., Any], types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if compat.is_transformed() or compat.is_forward_mode():
            return self._transformed(func, types, args, kwargs)
        kernel = kernel_of(func)
        if kernel is not None:
            return kernels.attend(kernel, args, kwargs, self)
        if DeferredTensor in types:
            return self._deferred(func, args, kwargs)
        if getattr(func, "__name__", "") == "__set__":
            args = materialize(args, "data")  # of ``tensor.data = scores``, ``types`` names the target only
        if func in _BEGINNINGS:
            self._follow()
        if func in FUNCTIONS:
            result = products.defer(func.__name__, func, args, kwargs, self.call)
            return self._native(func, args, kwargs) if result is NotImplemented else result
        if func is F.scaled_dot_product_attention:
            return serve.attend(args, kwargs, self.call)
        if func in _COMPOSITES:
            with self:
                return encoder_fast_paths.opened(func)(*args, **kwargs)
        if func is torch.empty:
            return uninitialized.empty(args, kwargs, self.call, lambda: func(*args, **kwargs))
        begin = positions.BEGINNINGS.get(func)
        if begin is not None:
            begun = begin(func, args, kwargs, self.call)
            if begun is not NotImplemented:
                return begun
        if func in FAST_PATHS:
            return self._fast_path(func, args, kwargs)
        is_write = is_watching_writes() and dispatch.protect(func, args, kwargs)
        result = self._native(func, args, kwargs)
        if is_write:
            after_write()
        return result

    def _follow(self) -> None:
        """If a part of the module is checkpointed on its own: watch that part again when it is recomputed."""
        frame = checkpoints.current()
        if frame is not None and frame is not self.checkpoint:
            again = dataclasses.replace(
                self.call, observer=None, weights=None, again=True, attempts=Attempts()
            )
            checkpoints.follow(frame, functools.partial(type(self), again))

    def _native(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        if self.call.answers_shortage:
            return self.trail.run(func, args, kwargs, self.call)
        return guard.native(func, args, kwargs)

    def _transformed(self, func: Callable[..., Any], types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The native call: inside ``vmap``, ``torch.func.grad`` and forward-mode AD, shapes and values are not real."""
        if DeferredTensor in types:
            name = getattr(func, "__name__", "")
            args, kwargs = materialize(args, name), materialize(kwargs, name)
        elif is_watching_writes():
            dispatch.protect(func, args, kwargs)
        return func(*args, **kwargs)

    def _fast_path(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        if not encoder_fast_paths.goes_by_rows(args[0], num_heads(func, args), self.call):
            try:
                return guard.native(func, args, kwargs)
            except RuntimeError as error:
                if not self.call.answers(error, args[0].device):
                    raise
        with self:
            return FAST_PATHS[func](*args, **kwargs)

    def _deferred(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        self._follow()  # a checkpoint may overwrite tensors that scores from outside it read
        if func in _BLANK_USERS:
            found = uninitialized.without(args, kwargs)
            if found is not None:
                return self.__torch_function__(func, (), *found)
        if func is F.scaled_dot_product_attention:
            return serve.attend(*cuttable.materialized(args, kwargs), self.call)
        if func in _COMPOSITES:
            with self:
                return encoder_fast_paths.opened(func)(*args, **kwargs)
        return dispatch_in(self.call, func, args, kwargs)
