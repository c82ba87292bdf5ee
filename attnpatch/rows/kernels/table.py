"""The kernels that attnpatch knows: functions that compute attention and are no torch functions.

A kernel is replaced in its module by a function that is overridable as torch's own functions are
(``torch.overrides.handle_torch_function``). So attnpatch's modes see it as they see
``scaled_dot_product_attention``, and outside a patched model's attention the kernel is called at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import handle_torch_function

from attnpatch import compat
from attnpatch.errors import AttnpatchError
from attnpatch.rows.kernels.call import KernelCall


class CannotRead(AttnpatchError):
    """The arguments of a kernel's call mean something that ``KernelCall`` cannot express; the message says what."""


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A function that computes attention.

    Attributes:
        name: Its name, as reports and reasons show it.
        native: The function.
        read: Returns the ``KernelCall`` of its arguments, or raises ``CannotRead``.
        holds_scores: True if it holds all scores at once, so that it may run by rows.
        is_transparent: True if it may compute attention with torch's functions, which are served as ever. Only if it does
            not, it counts as a kernel.
        is_missing: True if the package is not installed: every call is computed by torch.
    """

    name: str
    native: Callable[..., Any]
    read: Callable[..., KernelCall]
    holds_scores: bool = False
    is_transparent: bool = False
    is_missing: bool = False


# The functions by which a module's code is recognised as attention.
NAMES = frozenset(
    "flash_attn_func flash_attn_varlen_func flash_attn_qkvpacked_func flash_attn_kvpacked_func "
    "flash_attn_varlen_qkvpacked_func flash_attn_varlen_kvpacked_func flash_attn_with_kvcache "
    "memory_efficient_attention memory_efficient_attention_forward sageattn sageattn_varlen "
    "sageattn_qk_int8_pv_fp16_triton sageattn_qk_int8_pv_fp16_cuda sageattn_qk_int8_pv_fp8_cuda "
    "sageattn_qk_int8_pv_fp8_cuda_sm90 sageattn3_blackwell flex_attention varlen_attn dispatch_attention_fn".split()
)
# The kernel of each overridable function, and the overridable function of each kernel's own.
_KERNELS: weakref.WeakKeyDictionary[Callable[..., Any], Kernel] = weakref.WeakKeyDictionary()
_OURS: weakref.WeakKeyDictionary[Callable[..., Any], Callable[..., Any]] = weakref.WeakKeyDictionary()


def kernel_of(function: Any, is_native: bool = False) -> Kernel | None:
    """The kernel that an overridable function calls (``is_native``: of its own function); ``None`` for any other."""
    try:
        return _KERNELS.get(_OURS.get(function) if is_native else function)
    except TypeError:  # it cannot be hashed, or not be referred to weakly
        return None


def overridable(kernel: Kernel) -> Callable[..., Any]:
    """The function to put in the place of a kernel's; always the same one, or compiled code would be compiled again."""
    with contextlib.suppress(TypeError):  # of an object that no weak reference can be made to
        if kernel.native in _OURS:
            return _OURS[kernel.native]

    @functools.wraps(kernel.native)
    def call(*args: Any, **kwargs: Any) -> Any:
        # A compiler traces the kernel itself.
        if not torch.compiler.is_compiling() and any(sees_kernels(mode) for mode in compat.function_modes()):
            return handle_torch_function(call, (), *args, **kwargs)
        return kernel.native(*args, **kwargs)

    _KERNELS[call] = kernel
    with contextlib.suppress(TypeError):
        _OURS[kernel.native] = call
    return call


def sees_kernels(mode: Any) -> bool:
    """True if a mode is one of attnpatch's that answers kernels."""
    return getattr(type(mode), "sees_kernels", False)


# As ``NAMES``, of kernels that a user has registered.
registered: set[str] = set()


def watch_operator(kernel: Kernel, *operators: Any) -> None:
    """See the calls of torch operators (``torch.ops``), which torch shows to modes itself."""
    for operator in operators:
        _KERNELS[operator] = kernel


def read_otherwise(function: Callable[..., Any], read: Callable[..., KernelCall]) -> None:
    """Give another reader to a kernel that is known already."""
    _KERNELS[function] = dataclasses.replace(_KERNELS[function], read=read)
