"""The kernel path: a kernel runs as it is, or torch computes its result; observers see its probabilities either way."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from attnpatch import compat
from attnpatch.oom import is_out_of_memory
from attnpatch.policy import NativeNeed
from attnpatch.rows import guard
from attnpatch.rows.attention_call import AttentionCall, Counters
from attnpatch.rows.deferred.tensor import materialize
from attnpatch.rows.kernels.call import KernelCall
from attnpatch.rows.kernels.check import ROWS, why_wrong
from attnpatch.rows.kernels.compute import attention, in_place_of, masked, scores_of, weights_of
from attnpatch.rows.kernels.packing import Packing
from attnpatch.rows.kernels.table import CannotRead, Kernel
from attnpatch.rows.provenance.returned import attention_results
from attnpatch.rows.provenance.tensors import tensors_in
from attnpatch.rows.sdpa import deferred_weights, serve
from attnpatch.rows.watching import Watching
from attnpatch.sdpa_call import SdpaCall

# Score-sized tensors that a kernel which holds all scores has at once: scores, changed scores, softmax, mask.
_COPIES = 4


def attend(kernel: Kernel, args: Any, kwargs: dict[str, Any], mode: Watching) -> Any:
    """One call of a kernel under the policy of its site.

    Args:
        kernel: The kernel.
        args, kwargs: The host's arguments.
        mode: The mode that answers; it is not active now.
    """
    site = mode.call
    call: KernelCall | str | None = None
    # Reading may wait for the device (lengths of packed sequences), so it is done only if somebody needs the call.
    if kernel.is_missing or kernel.holds_scores or site.policy.replace_kernels:
        call = _read(kernel, args, kwargs, mode)
        if isinstance(call, KernelCall) and _is_replaced(kernel, call, site):
            return _by_torch(kernel, call, mode)
    try:
        result, is_seen = _natively(kernel, args, kwargs, mode)
    except RuntimeError as error:
        if not site.answers_shortage or not is_out_of_memory(error):
            raise
        call = _read(kernel, args, kwargs, mode) if call is None else call
        if not isinstance(call, KernelCall) or not site.answers(error, call.query.device):
            raise
        return _by_torch(kernel, call, mode)
    if is_seen:
        return result
    site.counters.count("fused")
    site.counters.kernel(kernel.name)
    if not kernel.holds_scores:
        site.counters.left_native("unread" if isinstance(call, str) else "fused")
    if site.observer is not None or site.weights is not None:
        call = _read(kernel, args, kwargs, mode) if call is None else call
        guard.attempted(_show, kernel, call, result, mode, name="a kernel's call", counters=site.counters)
    return result


def _natively(kernel: Kernel, args: Any, kwargs: dict[str, Any], mode: Watching) -> tuple[Any, bool]:
    """The kernel's own result, and whether attention was seen in torch's functions that it calls."""
    if not kernel.is_transparent:
        native = materialize(args, kernel.name), materialize(kwargs, kernel.name)
        return guard.native(kernel.native, *native), False
    counted = Tee(mode.call.counters)
    outer, mode.call.counters = mode.call.counters, counted
    try:
        with mode:
            result = guard.native(kernel.native, args, kwargs)
    finally:
        mode.call.counters = outer
    return result, counted.has_counted


class Tee:
    """Passes all counts on, and notes whether there were any.

    Args:
        counters: The counters of the site.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters, self.has_counted = counters, False

    def count(self, what: str) -> None:
        self.has_counted = True
        self._counters.count(what)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._counters, name)


def _read(kernel: Kernel, args: Any, kwargs: dict[str, Any], mode: Watching) -> KernelCall | str:
    """The call, or why it is not known."""
    try:
        with mode:
            return kernel.read(*args, **kwargs)
    except CannotRead as reason:
        return str(reason)


def _is_replaced(kernel: Kernel, call: KernelCall, site: AttentionCall) -> bool:
    """True if torch computes the call: by rows, or because the kernel is missing or unwanted."""
    if kernel.is_missing or site.policy.replace_kernels:
        return True
    if not kernel.holds_scores or site.policy.mode == "never":
        return False
    size = math.prod(call.query.shape[:-1]) * call.kv_len * max(4, call.query.element_size())
    return site.by_rows(call.q_len, NativeNeed(_COPIES * size, size), call.query.device)


def _by_torch(kernel: Kernel, call: KernelCall, mode: Watching) -> Any:
    """What the kernel would return, computed by torch's functions, which the mode serves."""
    mode.call.counters.kernel(kernel.name, is_replaced=True)
    with mode:
        return in_place_of(call, mode.call)


def _show(kernel: Kernel, call: KernelCall | str, result: Any, mode: Watching) -> None:
    """Show a call's probabilities to the observer, and keep its weights if the host asked for them."""
    site = mode.call
    reason = call if isinstance(call, str) else _why_not(call, site)
    if isinstance(call, str) or reason is not None:
        if site.observer is not None:
            site.observer.cannot_show(f"{kernel.name}: {reason}")
        return
    with compat.DisableTorchFunction():
        found = call.output(result)
        attention_results.note_kernel(site.sources, call.query, found, result)
    with mode:
        packing = Packing.of(call, site)
    rows = ROWS if len(packing.calls) < ROWS else 1
    for number, (piece, own) in enumerate(zip(packing.calls, packing.cut(found), strict=True)):
        if not piece.q_len or not piece.kv_len:
            continue
        with compat.DisableTorchFunction():
            wrong = why_wrong(piece, own, rows)
        if wrong is not None:
            if site.observer is not None:
                site.observer.cannot_show(f"{kernel.name}: {wrong}")
            return
        with torch.autocast(piece.query.device.type, enabled=False):
            # Hosts know no weights of packed sequences.
            if site.weights is not None and call.lengths is None:
                site.weights.append(_weights(piece, mode))
            _show_piece(piece, lambda whole, i=number: packing.cut(call.output(whole))[i], result, mode)


def _why_not(call: KernelCall, site: AttentionCall) -> str | None:
    """Why no probabilities of a call can be shown; ``None`` if they can."""
    if call.dropout_p:
        return "it is called with dropout, so its result cannot be checked"
    observer = site.observer
    if observer is not None and observer.is_of_gradient and not call.is_softmax_of_masked:
        return "it bounds or changes scores, or has sinks; probability times gradient is computed for plain softmax only"
    return None


def _show_piece(call: KernelCall, output: Callable[[Any], torch.Tensor], result: Any, mode: Watching) -> None:
    """Show a call that is not packed.

    Args:
        call: The call.
        output: Returns its result, given what the kernel has returned for all packed sequences.
        result: What the kernel has returned.
        mode: The mode.
    """
    site, observer = mode.call, mode.call.observer
    if observer is None:
        return
    if not call.is_softmax_of_masked:
        # These steps are on the matmul path, which shows them.
        with torch.no_grad(), mode:
            attention(call, site)
        return
    sdpa = call.as_sdpa(masked(call, site))
    if not observer.is_of_gradient:
        serve.show_beside(sdpa, site)
    elif (first := next(iter(tensors_in(result)), None)) is not None and first.requires_grad:
        first.register_hook(functools.partial(_show_gradient, sdpa, site, output))


def _weights(call: KernelCall, mode: Watching) -> torch.Tensor:
    """The probabilities of a call, deferred: ``[batch, heads, q_len, kv_len]`` in the dtype of its query."""
    site = mode.call
    if call.is_softmax_of_masked:
        return deferred_weights.of_call(call.as_sdpa(masked(call, site)), site)
    with torch.no_grad(), mode:
        scores = scores_of(call, masked(call, site), site)
        return weights_of(call, scores).to(call.query.dtype)


def _show_gradient(
    sdpa: SdpaCall, site: AttentionCall, output: Callable[[Any], torch.Tensor], grad: torch.Tensor
) -> None:
    serve.show_gradient(sdpa, site, output(grad))
