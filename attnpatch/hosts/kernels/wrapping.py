"""Puts overridable functions in the places of kernels' functions, now or when their package is imported."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import wrapt

from attnpatch.failures import warn_once
from attnpatch.hosts.kernels import flash_attn
from attnpatch.rows.kernels.table import Kernel, kernel_of, overridable

# By module: its functions, with their readers.
READERS: dict[str, dict[str, Callable[..., Any]]] = {
    "flash_attn.flash_attn_interface": {"flash_attn_func": flash_attn.flash_attn_func},
}
# Functions that hold all scores at once.
HOLD_SCORES = frozenset(["flex_attention"])
_lock = threading.Lock()
_is_watching = False


def watch() -> None:
    """Wrap the kernels of packages that are imported, and of others when they are imported; once per process."""
    global _is_watching
    with _lock:
        if _is_watching:
            return
        _is_watching = True
    for name in READERS:
        # Runs at once if the module is imported already.
        wrapt.register_post_import_hook(_wrap_module, name)


def _wrap_module(module: types.ModuleType) -> None:
    try:
        for name, read in READERS[module.__name__].items():
            function = getattr(module, name, None)
            if callable(function) and kernel_of(function) is None:
                put_in_place(Kernel(name, function, read, holds_scores=name in HOLD_SCORES))
    except Exception as error:
        warn_once(f"wrapping the kernels of {module.__name__}", error)


def put_in_place(kernel: Kernel) -> Callable[..., Any]:
    """Replace a kernel's function in every module that has it among its names.

    Returns:
        The overridable function.
    """
    ours, native = overridable(kernel), kernel.native
    for module in list(sys.modules.values()):
        try:
            names = [name for name, value in vars(module).items() if value is native]
        except (TypeError, RuntimeError):  # no module, or one that another thread is changing
            continue
        for name in names:
            setattr(module, name, ours)
    return ours
