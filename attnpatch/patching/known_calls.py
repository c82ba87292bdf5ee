"""Calls that stayed native before, with memory to spare, run at once: watching a call takes time on the host.

A call is known by all that it is given: shapes, numbers, the length of a cache. If one like it stayed native, and memory
is free for four times what it took, the next one is not watched. Every ``AGAIN``-th one is, because a module may have
changed in a way that its arguments do not show. Calls of a whole model are known in the same way; the masks and
positions that it makes outside attention are then not watched, and its sites decide for themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from attnpatch import compat
from attnpatch.hosts.transformers import attention_outputs, caches
from attnpatch.patching.calls import calls_here
from attnpatch.policy import NativeNeed, Policy
from attnpatch.rows.attention_call import AttentionCall
from attnpatch.rows.autograd import checkpoints
from attnpatch.rows.creation import positions
from attnpatch.rows.deferred.handle import pending

if TYPE_CHECKING:
    from attnpatch.patching.site import Site

AGAIN, _SPARE, _MOST = 64, 4, 256
_NATIVE = frozenset(["native", "fused", "passed"])
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size)


@dataclasses.dataclass
class KnownCall:
    """What a call that stayed native did.

    Attributes:
        counts, reasons: What was counted.
        need: Bytes that its scores took.
        device: Where it ran.
        left: How often it may run without being watched.
    """

    counts: Counter[str]
    reasons: Counter[str]
    need: int
    device: torch.device
    left: int


class KnownCalls:
    """The known calls of a site, under one policy; those of a model have keys of their own."""

    def __init__(self) -> None:
        self.policy: Policy | None = None
        self.calls: dict[Hashable, KnownCall] = {}

    def of_model(self, site: Site, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Hashable | None:
        """The key of a model's call, for ``noted``; ``None``: it is known, and need not be watched between its sites.

        The key's second item is ``None`` if the call cannot be remembered.
        """
        # Inside another patched model's call, this model must be watched under its own policy.
        found = None if positions.is_watching() else self._key(site, module, args, kwargs)
        key = ("model", found)
        known = None if found is None else self.calls.get(key)
        if known is None or not self._is_native(site, known):
            return key
        known.left -= 1
        return None

    @contextlib.contextmanager
    def noted(self, key: Any, call: AttentionCall, args: Any, kwargs: dict[str, Any]) -> Iterator[None]:
        """Remember the model's call inside the block, unless it fails; ``call`` decides on its masks and positions."""
        yield
        device = _device_of(args, kwargs)
        if device is None or key[1] is None or len(self.calls) >= _MOST:
            return
        # Other values in the same shapes may need a mask where these did not: four bytes for each pair of tokens.
        sizes = [one.shape for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
        masks = [4 * size[0] * size[1] ** 2 for size in sizes if len(size) > 1]
        need = max([NativeNeed(*size).temporaries for _, *size in call.decisions] + masks, default=0)
        self.calls[key] = KnownCall(Counter(), Counter(), need, device, AGAIN)

    def attend(
        self,
        site: Site,
        forward: Callable[..., Any],
        module: nn.Module,
        first: Any,
        args: Any,
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a call at once if it is known, otherwise as ``Site.attend`` does."""
        try:
            key = self._key(site, module, args, kwargs)
            known = None if key is None else self.calls.get(key)
            is_native = known is not None and self._is_native(site, known)
        except Exception as error:
            site.failed("recognising a known call", error)
            key, is_native = None, False
        if is_native:
            assert known is not None
            known.left -= 1
            site.counts.update(known.counts)
            site.reasons.update(known.reasons)
            return forward(*first, **kwargs)
        if key is None:
            return site.attend(forward, module, first, args, kwargs)
        before, site.need = (site.counts.copy(), site.reasons.copy()), 0
        result = site.attend(forward, module, first, args, kwargs)
        self._note(site, key, before, args, kwargs)
        return result

    def _key(self, site: Site, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Hashable | None:
        """All that decides what a call does; ``None`` if it must be watched, or is given something unknown."""
        patch = site.patch
        rule = patch.policy
        if self.policy is not rule:
            self.policy, self.calls = rule, {}
        if rule.mode != "auto" or rule.fuse or rule.replace_kernels or rule.max_allocation is not None:
            return None
        running = calls_here.mode
        if patch.recorders or (running is not None and running.is_active()) or pending():
            return None
        if compat.is_in_backward() or compat.is_transformed() or compat.is_forward_mode():
            return None
        if checkpoints.current() is not None or attention_outputs.are_asked_for(module, kwargs):
            return None
        given = _described((args, kwargs), 4)
        if given is None:
            return None
        chosen = compat.chosen_attention(module)
        return (
            given,
            chosen,
            module.training,
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cuda"),
            torch.is_autocast_enabled("cpu"),
        )

    @staticmethod
    def _is_native(site: Site, known: KnownCall) -> bool:
        """True if there is so much memory that the call will stay native."""
        room, rule = site.patch.room(), site.patch.policy
        if known.left <= 0 or room.is_short(known.device) or room.limit(known.device) is not None:
            return False
        free = room.free(known.device)
        return free >= rule.min_free_bytes and _SPARE * known.need <= rule.headroom * free

    def _note(
        self,
        site: Site,
        key: Hashable,
        before: tuple[Counter[str], Counter[str]],
        args: Any,
        kwargs: dict[str, Any],
    ) -> None:
        """Remember a call if it stayed native."""
        counts, reasons = site.counts - before[0], site.reasons - before[1]
        device = _device_of(args, kwargs)
        if device is None or not counts or not counts.keys() <= _NATIVE or len(self.calls) >= _MOST:
            self.calls.pop(key, None)
            return
        self.calls[key] = KnownCall(counts, reasons, site.need, device, AGAIN)


def _device_of(args: Any, kwargs: dict[str, Any]) -> torch.device | None:
    return next((one.device for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)), None)


def _described(value: Any, depth: int) -> Hashable | None:
    """What decides how a call with this argument runs; ``None`` if it is of an unknown kind."""
    if type(value) is torch.Tensor or type(value) is nn.Parameter:
        return (value.shape, value.stride(), value.dtype, value.device, value.requires_grad)
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if depth == 0:
        return None
    if type(value) in (tuple, list):
        items = [_described(item, depth - 1) for item in value]
    elif type(value) is dict:
        items = [_described(item, depth - 1) for pair in value.items() for item in pair]
    elif caches.is_cache(value):
        return (type(value), caches.tokens_in(value))
    else:
        return None
    return None if None in items else (type(value), *items)
