"""What a stand-in has: the attention functions of a package for which there is a reader, with the package's signatures.

A function runs as one that ``attnpatch.by_rows`` wraps. Inside a patched model's attention, the policy of that model and
its captures hold.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

from attnpatch import compat
from attnpatch.errors import PatchError, in_one_line
from attnpatch.hosts.kernels.wrapping import READERS
from attnpatch.patching.model_patches import ByRows
from attnpatch.patching.patch import Patch, patch_of
from attnpatch.policy import Policy
from attnpatch.rows.kernels.call import KernelCall
from attnpatch.rows.kernels.compute import in_place_of
from attnpatch.rows.kernels.table import CannotRead, Kernel, overridable
from attnpatch.rows.mode import RowsMode
from attnpatch.standins import padding, xformers_biases
from attnpatch.standins.packages import MODULES, PACKAGES

# Where the functions of a module are read.
HOMES = {
    "flash_attn": "flash_attn.flash_attn_interface",
    "flash_attn.flash_attn_interface": "flash_attn.flash_attn_interface",
    "xformers.ops": "xformers.ops.fmha",
    "xformers.ops.fmha": "xformers.ops.fmha",
    "sageattention": "sageattention.core",
    "sageattention.core": "sageattention.core",
}
# A part of attention whose result only the kernel itself could merge.
_NOT_OFFERED = frozenset(["memory_efficient_attention_partial"])
# Parts of flash-attn that diffusers and others import beside its public functions. Without them they take the package
# for broken, although they call them only if attention is split over devices.
_REFUSED = (
    "_flash_attn_forward _flash_attn_backward _flash_attn_varlen_forward _flash_attn_varlen_backward "
    "_wrapped_flash_attn_forward _wrapped_flash_attn_backward _wrapped_flash_attn_varlen_forward "
    "_wrapped_flash_attn_varlen_backward"
).split()
# By home and name.
_made: dict[tuple[str, str], Callable[..., Any]] = {}
_wrapped: list[ByRows] = []


def fill(module: types.ModuleType, policy: Callable[[], Policy]) -> None:
    """Put everything that a stand-in offers into its module.

    Args:
        module: An empty module.
        policy: Returns the policy of calls outside patched models.
    """
    name = module.__name__
    package = name.partition(".")[0]
    values = _functions(HOMES.get(name), policy) | _others(name)
    children = [other for other in MODULES if other.rpartition(".")[0] == name]
    offered = [*values, *(child.rpartition(".")[2] for child in children)]
    module.__doc__ = f"Stand-in of attnpatch for {name}, which is not installed: {', '.join(offered)}."
    module.__version__ = PACKAGES[package][1]  # type: ignore[attr-defined]
    module.__getattr__ = functools.partial(_missing, name, offered)  # type: ignore[method-assign]
    vars(module).update(values)
    for child in children:
        importlib.import_module(child)


def used() -> list[Patch]:
    """The patches of stand-ins that were called outside patched models."""
    patches = [patch_of(each.module) for each in _wrapped]
    return [patch for patch in patches if patch is not None and patch.was_used]


def _functions(home: str | None, policy: Callable[[], Policy]) -> dict[str, Any]:
    if home is None:
        return {}
    names = [name for name in READERS.get(home, {}) if name not in _NOT_OFFERED]
    for name in names:
        if (home, name) not in _made:
            _made[home, name] = _stand_in(home, name, policy())
    return {name: _made[home, name] for name in names}


def _others(name: str) -> dict[str, Any]:
    """What scripts import beside attention functions."""
    if name == "flash_attn.bert_padding":
        return {one: getattr(padding, one) for one in padding.__all__}
    if name == "flash_attn.flash_attn_interface":
        return {one: _refused(one) for one in _REFUSED}
    if name == "xformers.ops":
        return {one: getattr(xformers_biases, one) for one in ("AttentionBias", "LowerTriangularMask")}
    if name.startswith("xformers.ops.fmha"):
        return {one: getattr(xformers_biases, one) for one in xformers_biases.__all__}
    return {}


def _stand_in(home: str, name: str, policy: Policy) -> Callable[..., Any]:
    read = READERS[home][name]
    by_rows = ByRows(_computed, vars(policy) | {"replace_kernels": True})
    _wrapped.append(by_rows)
    patch = patch_of(by_rows.module)
    assert patch is not None
    patch.model_kind = f"{name} (stand-in, outside patched models)"
    site = patch.sites[0]

    def native(*args: Any, **kwargs: Any) -> Any:
        try:
            call = read(*args, **kwargs)
        except CannotRead as reason:
            raise PatchError(
                f"{name}: {in_one_line(reason)}; {home.partition('.')[0]} is not installed, and attnpatch's stand-in "
                "cannot compute this call"
            ) from reason
        if policy.mode != "always" and call.q_len <= policy.min_tokens:
            # As a short call of a site: without a mode, which costs more than such a call itself.
            site.kernel(name, is_replaced=True)
            site.short[call.q_len] += 1
            return in_place_of(call, None)
        return by_rows(call, name)

    signature = inspect.signature(read, eval_str=False)
    native.__signature__ = signature.replace(return_annotation=inspect.Signature.empty)  # type: ignore[attr-defined]
    native.__name__ = native.__qualname__ = name
    native.__module__ = home
    native.__doc__ = f"``{home}.{name}``, computed by torch's functions (attnpatch)."
    return overridable(Kernel(name, native, read, is_missing=True))


def _computed(call: KernelCall, name: str) -> Any:
    """What the kernel would return. If a mode of attnpatch is active, it serves torch's functions."""
    sites = [mode.call for mode in compat.function_modes() if isinstance(mode, RowsMode)]
    if not sites:
        return in_place_of(call, None)
    sites[-1].counters.kernel(name, is_replaced=True)
    return in_place_of(call, sites[-1])


def _refused(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"flash_attn is not installed, and attnpatch's stand-in has no {name}, a part of flash-attn for code that "
            "splits attention over devices"
        )

    refuse.__name__ = refuse.__qualname__ = name
    return refuse


def _missing(module: str, offered: list[str], name: str) -> Any:
    """``__getattr__`` of a stand-in.

    Raises:
        ImportError: The name is imported from it.
        AttributeError: It is asked for in another way.
    """
    if name.startswith("__"):
        raise AttributeError(name)
    package = module.partition(".")[0]
    said = f"{package} is not installed; attnpatch's stand-in for {module} has no {name!r}, only {', '.join(offered)}"
    with contextlib.suppress(IndexError, ValueError):
        frame = sys._getframe(1)
        if dis.opname[frame.f_code.co_code[frame.f_lasti]] == "IMPORT_FROM":
            # Python would replace the text of an AttributeError.
            raise ImportError(said, name=module)
    raise AttributeError(said)
