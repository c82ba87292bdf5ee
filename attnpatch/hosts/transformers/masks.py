"""Defers transformers' attention masks while a patched model is called, so that they are made by rows.

Every model that uses ``transformers.masking_utils`` gets its masks from one of two functions in a table by attention
implementation: ``sdpa_mask`` makes a bool mask, ``eager_mask`` an additive one. Both take the number of rows and the
first row, so they can make a few rows as well as all of them.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from attnpatch import compat
from attnpatch.hosts.tables import Replaced
from attnpatch.policy import NativeNeed, Policy
from attnpatch.rows import guard
from attnpatch.rows.attention_call import AttentionCall
from attnpatch.rows.creation import positions, row_masks
from attnpatch.rows.deferred.tensor import DeferredTensor

_MODULE = "transformers.masking_utils"
# Arguments that let the function skip a mask that is not needed. They are off when some rows are made, because the mask
# is known to be needed then.
_SKIPS = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}


def _replacement(key: str, function: Any) -> Any:
    module = sys.modules[_MODULE]
    known = {id(getattr(module, name, None)) for name in compat.MASK_FUNCTIONS}
    return _by_rows(function) if id(function) in known else None


_table = Replaced(_replacement)


@contextlib.contextmanager
def by_rows(call: AttentionCall) -> Iterator[None]:
    """Inside the block, defer transformers' masks if the policy of ``call`` says so."""
    module = sys.modules.get(_MODULE)
    if module is None or call.policy.mode == "never" or not hasattr(module, compat.MASK_TABLE):
        # ``None`` also stops a patched model around this one from deferring masks here.
        with row_masks.of_call(None):
            yield
        return
    table = getattr(module, compat.MASK_TABLE)
    with _table.inside(table._global_mapping, table._local_mapping), row_masks.of_call(call):
        yield


def is_short(policy: Policy, args: Any, kwargs: dict[str, Any]) -> bool:
    """True if no sequence of a call is long enough for a deferred mask; cheap, since each generation step runs it."""
    if policy.mode != "auto":
        return False
    given = [(None, value) for value in args] + [
        item for item in kwargs.items() if not item[0].endswith("mask")
    ]
    return all(
        not isinstance(value, torch.Tensor) or _tokens(name, value) <= policy.min_tokens
        for name, value in given
    )


def _tokens(name: str | None, value: torch.Tensor) -> int:
    """An upper bound on the tokens of an input; a generation step may pass embeddings."""
    return value.numel() // max(1, value.shape[-1]) if name == "inputs_embeds" else value.numel()


def makes_masks(module: nn.Module) -> bool:
    """True for a transformers model, which makes the masks of its layers in its own forward."""
    host = sys.modules.get("transformers.modeling_utils")
    return host is not None and isinstance(module, host.PreTrainedModel)


class _Asked(Exception):
    """The host has called its mask function, so it needs a mask."""


def _ask(*_: Any) -> Any:
    raise _Asked


def _by_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    """A transformers mask function that defers its mask if this thread is in a patched model's call that wants it."""

    @functools.wraps(original)
    def mask(*args: Any, **kwargs: Any) -> Any:
        count = _count(kwargs)
        if torch.compiler.is_compiling() or args or count is None:
            return original(*args, **kwargs)
        failure = None
        try:
            if "mask_function" in kwargs and row_masks.may_defer(count):
                return _asked(original, kwargs)
        except Exception as error:
            if guard.passes(error):
                raise
            failure = error
        found = original(**kwargs)  # if the error was the host's own, it is raised again here
        if failure is not None:
            row_masks.failed("a mask by rows", failure)
        return found

    return mask


def _count(given: dict[str, Any]) -> int | None:
    """The number of rows that a mask is asked for; ``None`` if a number is not known, or is given in an unknown form.

    transformers names a number of rows and the first one; until 5.3 it gave the positions of the rows as a tensor.
    """
    if type(given.get("kv_length")) is not int:
        return None
    positions = given.get(compat.MASK_POSITIONS)
    if "q_length" not in given and isinstance(positions, torch.Tensor) and positions.dim() == 1:
        return len(positions)
    # A static cache gives its first row as a tensor: its masks are prepared once for many calls.
    places = given.get("q_length"), given.get("q_offset", 0)
    return places[0] if all(type(number) is int for number in places) else None


def _place(given: dict[str, Any], low: int, high: int) -> dict[str, Any]:
    """The arguments that ask for rows ``low:high`` of a mask."""
    if "q_length" in given:
        return {"q_length": high - low, "q_offset": given.get("q_offset", 0) + low}
    return {compat.MASK_POSITIONS: given[compat.MASK_POSITIONS][low:high]}


def _asked(original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """The mask: deferred, or the host's own, as the policy says."""
    try:
        with positions.unwatched():
            found = _deferred(original, kwargs)
            return _whole(original, kwargs) if found is NotImplemented else found
    except row_masks.Unknown as unknown:
        found = original(**kwargs)
        if found is not None and not isinstance(found, DeferredTensor):
            need = _need(original, kwargs)(found.numel())
            row_masks.left_whole(f"a mask that reads a {unknown}", found.shape[-2], need, found)
        return found


def _whole(original: Callable[..., Any], given: dict[str, Any]) -> Any:
    """The host's own mask; deferred after all if it does not fit into memory."""
    try:
        return original(**given)
    except RuntimeError as error:
        if not row_masks.answers(error, torch.device(given.get("device", "cpu"))):
            raise
        found = _deferred(original, given)
        if found is NotImplemented:
            raise
        return found


def _deferred(original: Callable[..., Any], given: dict[str, Any]) -> Any:
    """The deferred mask; ``None`` if the host needs none; ``NotImplemented`` if the policy lets the host make it.

    Raises:
        row_masks.Unknown: The mask function refers to an object that cannot be copied.
    """
    q_len, kv_len = _count(given), given["kv_length"]
    assert q_len is not None
    try:
        # The host decides if it needs a mask: it returns ``None``, or calls its mask function, which raises ``_Asked``.
        if original(**{**given, "mask_function": _ask}) is None:
            return None
    except _Asked:
        pass
    rest = row_masks.keeping({key: value for key, value in given.items() if key != "config"})
    rest.update(_SKIPS)

    def rows(low: int, high: int) -> torch.Tensor:
        return original(**{**rest, **_place(rest, low, high)})

    found = row_masks.deferred(rows, q_len, kv_len, _need(original, given))
    return NotImplemented if found is None else found


def _need(original: Callable[..., Any], given: dict[str, Any]) -> Callable[[int], NativeNeed]:
    """A function that estimates what the host takes for a mask and its attention, from the mask's size.

    A bool mask is converted to an additive one: before eager attention, or inside torch's fused kernels. Eager
    attention then holds three tensors of scores for every head.
    """
    itemsize = getattr(given.get("dtype"), "itemsize", 4)
    heads = _heads(given.get("config")) if original.__name__ == "eager_mask" else 0
    return lambda count: NativeNeed(
        count * (1 + itemsize * (1 + 3 * heads)), count * itemsize * max(1, heads)
    )


def _heads(config: Any) -> int:
    """Attention heads per layer; 1 if the config does not have one number for all layers (it may raise anything)."""
    try:
        heads = config.num_attention_heads
    except Exception:
        return 1
    return heads if isinstance(heads, int) else 1
