"""The SDPA path: ``F.scaled_dot_product_attention`` stays native with a fused kernel, else goes by rows."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import torch
import torch.nn.functional as F

from attnpatch import compat
from attnpatch.oom import is_out_of_memory
from attnpatch.policy import NativeNeed
from attnpatch.rows import autocast, guard
from attnpatch.rows.attention_call import AttentionCall
from attnpatch.rows.autograd.saved_tensors import SavedTensorBuffer
from attnpatch.rows.deferred.tensor import is_pending, materialize
from attnpatch.rows.graph.random_state import random_state, set_random_state
from attnpatch.rows.provenance import observed
from attnpatch.rows.provenance.open_keys import causal_keys, once_for, open_keys
from attnpatch.rows.sdpa import deferred_weights, logsumexp
from attnpatch.rows.sdpa.as_graph import graph
from attnpatch.rows.sdpa.cuttable import can_be_cut
from attnpatch.rows.sdpa.kernel_choice import MATH_KERNEL, fused_choice
from attnpatch.rows.sdpa.probabilities import mask_rows, show
from attnpatch.sdpa_call import SdpaCall

# Number of score-sized tensors that the dense kernel holds at once: scores, float mask, softmax, ... (measured 2 to 9).
DENSE_COPIES = 3


def attend(args: Any, kwargs: dict[str, Any], site: AttentionCall) -> torch.Tensor:
    """One SDPA call under the policy of its site; the observer, if any, is shown its probabilities."""
    call = SdpaCall.of(args, kwargs)
    if not can_be_cut(call):
        kwargs = materialize(kwargs, "scaled_dot_product_attention")
        site.counters.count("native")
        site.counters.left_native("kind")
        return F.scaled_dot_product_attention(*args, **kwargs)
    if site.weights is not None:
        site.weights.append(deferred_weights.of_call(call, site))
    device = call.device
    dtype = autocast.narrow_dtype(device)
    if dtype is None:
        return _watched(call, args, kwargs, site)
    # Cast here as autocast would: torch chooses the kernel by the cast tensors, and autocast ignores its operator.
    given, named = call, autocast.cast(call.arguments(), device, dtype)
    call = SdpaCall.of((), named)
    if site.sources is not None:
        site.sources.same(given.query, call.query)
        site.sources.same(given.key, call.key)
    with torch.autocast(device.type, enabled=False):
        return _watched(call, (), named, site)


def _watched(call: SdpaCall, args: Any, kwargs: dict[str, Any], site: AttentionCall) -> torch.Tensor:
    """A call whose arguments are cast; the observer, if any, is shown its probabilities."""
    if site.observer is None:
        if site.sources is not None and site.sources.is_repeated:
            guard.attempted(
                observed.of_call, call, site.sources, name="following attention", counters=site.counters
            )
        return _attend(call, args, kwargs, site)
    if site.observer.is_of_gradient:
        result = guard.ran(_attend(call, args, kwargs, site))
        if result.requires_grad:
            result.register_hook(functools.partial(show_gradient, call, site))
        return result
    if not guard.attempted(
        _is_shown, call, site, name="preparing to observe attention", counters=site.counters
    ):
        return _attend(call, args, kwargs, site)
    site.counters.count("captured")
    result, lse = _fused(call, site)
    if result is None:
        result = _attend(call, args, kwargs, site)
    guard.ran(result)
    _look(call, site, lse)
    return result


def _fused(call: SdpaCall, site: AttentionCall) -> tuple[torch.Tensor | None, torch.Tensor | str]:
    """The result of a fused call and its logsumexp (or why that is missing); ``None`` and the reason if not fused."""
    if site.policy.mode == "always":
        return None, "by rows"
    if is_pending(call.attn_mask):
        return None, "a mask by rows"
    choice = fused_choice(call)
    reason = logsumexp.why_not(call, choice)
    if reason is not None:
        return None, reason
    try:
        result, lse = logsumexp.with_lse(call, choice)
    except RuntimeError as error:
        if not site.is_answered(error):
            raise
        return None, "no memory"
    site.counters.count("fused")
    with compat.DisableTorchFunction():
        is_right = logsumexp.is_right(call, choice, lse)
    return result, lse if is_right else "a wrong logsumexp"


def _look(call: SdpaCall, site: AttentionCall, lse: torch.Tensor | str) -> None:
    """Let the observer sum a call's probabilities at once, in a kernel, if it can; otherwise show them tile by tile."""
    observer, retries = site.observer, site.policy.retry_on_oom
    assert observer is not None
    reason = lse if isinstance(lse, str) else None
    if reason is None:
        try:
            with torch.no_grad(), compat.DisableTorchFunction():
                reason = observer.take(call, lse, site.policy.workspace_bytes)
        except RuntimeError as error:
            if not (retries and is_out_of_memory(error)):
                raise
            reason = "no memory"
    site.counters.summed("kernel" if reason is None else f"torch ({reason})")
    if reason is not None:
        _show(call, site, None if isinstance(lse, str) else lse)
    guard.attempted(observer.end, name="finishing observed attention", counters=site.counters)


def show_beside(call: SdpaCall, site: AttentionCall) -> None:
    """Show the observer the probabilities of a call whose result another kernel has computed."""
    if not guard.attempted(
        _is_shown, call, site, name="preparing to observe attention", counters=site.counters
    ):
        return
    site.counters.count("captured")
    lse: torch.Tensor | str = "a kernel outside torch"
    mask = call.attn_mask
    is_exact = mask is None or mask.dtype in (torch.bool, call.dtype)
    if call.device.type == "cuda" and not is_pending(mask) and is_exact:
        # The kernel that sums probabilities at once needs the logsumexp, which torch's own kernel returns.
        with torch.no_grad():
            _, lse = _fused(call, site)
    _look(call, site, lse)


def _is_shown(call: SdpaCall, site: AttentionCall) -> bool:
    """True if the observer, told what the call's dimensions are, wants to see its probabilities."""
    assert site.observer is not None
    layout = observed.of_call(call, site.sources)

    def opened(own: int | None) -> torch.Tensor | None:
        mask, q_len, kv_len = call.attn_mask, layout.q_len, layout.kv_len
        if mask is None:
            return causal_keys(layout.batch, q_len, kv_len) if call.is_causal else None
        rows = mask_rows(call)

        # If a host passes the heads of one token as rows, any of these rows will do.
        heads = layout.heads // (call.q_len if layout.head_rows else 1)

        def some(sequence: int, low: int, high: int) -> torch.Tensor:
            return rows(sequence * heads, low, high)

        key = (layout.batch, heads, q_len, kv_len, own)
        return once_for(mask, key, lambda: open_keys(some, layout.batch, q_len, kv_len, own))

    return site.observer.begin(layout, opened)


def show_gradient(call: SdpaCall, site: AttentionCall, grad: torch.Tensor) -> None:
    """Called in the backward pass: show the observer each probability times its gradient."""
    if not guard.attempted(
        _is_shown, call, site, name="preparing to observe attention", counters=site.counters
    ):
        return
    site.counters.count("captured")
    site.counters.summed("torch (gradients)")
    assert site.observer is not None
    if not guard.attempted(
        _is_gradient_shown, call, site, grad, name="showing gradients", counters=site.counters
    ):
        # The attention is left out, because its tiles have not ended.
        guard.attempted(site.observer.finish, name="the end of a captured call", counters=site.counters)


def _is_gradient_shown(call: SdpaCall, site: AttentionCall, grad: torch.Tensor) -> bool:
    assert site.observer is not None
    _show(call, site, None, grad)
    site.observer.end()
    return True


def _show(
    call: SdpaCall, site: AttentionCall, lse: torch.Tensor | None, grad: torch.Tensor | None = None
) -> None:
    assert site.observer is not None
    on_retry = site.retried if site.policy.retry_on_oom else None
    show(call, site.observer, lse, on_retry, grad, site.policy.workspace_bytes)


def _attend(call: SdpaCall, args: Any, kwargs: dict[str, Any], site: AttentionCall) -> torch.Tensor:
    q_len = call.q_len
    # Bytes of one tensor of scores.
    size = math.prod(call.query.shape[:-1]) * call.kv_len * call.query.element_size()
    if site.policy.mode == "always" or is_pending(call.attn_mask):
        # A deferred mask: the native call would hold all of it, and the kernel's conversion of it.
        native, fused = q_len < 2, False
        if native:
            site.counters.left_native("one row")
    else:
        fused = fused_choice(call) != MATH_KERNEL
        need = NativeNeed(DENSE_COPIES * size, size)
        # A fused kernel holds no scores, so by rows is worse unless the kernel ran out of memory the first time.
        decide = site.went_by_rows if fused else functools.partial(site.by_rows, device=call.device)
        native = not decide(q_len, need)
    if native:
        random = [random_state(call.device)] if call.dropout_p > 0 else []
        saved = SavedTensorBuffer()
        try:
            with saved.holding() if site.answers_shortage else contextlib.nullcontext():
                result = guard.native(F.scaled_dot_product_attention, args, kwargs)
            saved.hand_on()
            site.counters.count("fused" if fused else "native")
            if fused:
                # A kernel converts its mask, and holds the copy meanwhile.
                mask = 0 if call.attn_mask is None else 2 * call.attn_mask.numel() * call.query.element_size()
                site.counters.left_native("fused", mask)
                site.remember(q_len, need, False)
            elif q_len > 1:
                site.counters.made(size)
            return result
        except RuntimeError as error:
            if q_len < 2 or not site.answers(error, call.device):
                raise
        site.remember(q_len, need)
        for state in random:
            set_random_state(state)
    site.counters.count("by_rows")
    return site.replay(graph(call))
