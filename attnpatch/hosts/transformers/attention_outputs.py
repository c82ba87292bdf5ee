"""transformers' attention weights: whether a call asks for them, and where they go in an attention module's result."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from attnpatch import compat
from attnpatch.hosts.transformers.calls import called_with

_MODULE = "transformers.utils.output_capturing"
_KIND = "attentions"


def are_asked_for(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """True if a transformers module is called by a model that was asked for attention weights."""
    collector = _collector()
    if collector and any(_KIND in key for key in collector):
        return True
    if "forward" in vars(module) and any(_KIND in key for key, _ in _wrapped(module)):
        return True
    return bool(kwargs.get("output_attentions")) and (type(module).__module__ or "").startswith(
        "transformers"
    )


def _collector() -> Any:
    """What transformers collects now, by name; ``None`` if nothing, or if this release keeps it elsewhere."""
    active = getattr(sys.modules.get(_MODULE), compat.OUTPUT_COLLECTOR, None)
    return None if active is None else active.get()


def _wrapped(module: nn.Module) -> Iterator[tuple[str, int]]:
    """What is collected from a module's result by functions that replace its forward: the kind of output and its index
    in the result.

    transformers 4.54 to 5.1 puts such functions in place during a model's call.
    """
    forward = vars(module).get("forward")
    while getattr(getattr(forward, "__code__", None), "co_name", "") == compat.OUTPUT_WRAPPER:
        inside = compat.closed_over(forward)
        if not {"key", "index", "orig_forward"} <= inside.keys():
            return
        yield inside["key"], inside["index"]
        forward = inside["orig_forward"]


def put_in(
    module: nn.Module, args: Any, kwargs: dict[str, Any], result: Any, weights: list[torch.Tensor]
) -> Any:
    """An attention module's result with weights in place of a ``None``, as its eager attention would return them.

    Args:
        module: The attention module.
        args, kwargs: The arguments of its call, without itself.
        result: The result of its call.
        weights: ``[batch, heads, q_len, kv_len]`` for every call of torch's attention in it.

    Returns:
        The new result; ``result`` itself if it has weights already or if their place is not known.
    """
    if len(weights) != 1 or not isinstance(result, tuple):
        return result
    found = weights[0]
    missing = [place for place, value in enumerate(result) if value is None]
    wanted = [place for place in _places(module) if place in missing]
    if len(wanted) != 1:
        wanted = missing if len(missing) == 1 else []
    if not wanted:
        return result
    _, tokens = called_with(args, kwargs)
    if tokens == 1 and found.dim() == 4 and found.shape[-2] != 1:
        # For one token, query heads that share a key head were given to torch as query rows.
        found = found.reshape(found.shape[0], -1, 1, found.shape[-1])
    return (*result[: wanted[0]], found, *result[wanted[0] + 1 :])


def _places(module: nn.Module) -> list[int]:
    """The indices in a module's result from which transformers collects attention weights."""
    found = [index for key, index in _wrapped(module) if _KIND in key]
    for hook in module._forward_hooks.values():
        if getattr(hook, "__name__", "") == compat.OUTPUT_HOOK:
            inside = compat.closed_over(hook)
            if {"key", "index"} <= inside.keys() and _KIND in inside["key"]:
                found.append(inside["index"])
    return found
