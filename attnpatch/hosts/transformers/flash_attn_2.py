"""Lets transformers load models with ``flash_attention_2`` where a stand-in for flash-attn is found, on any device.

Without it, a script that asks for ``flash_attention_2`` because ``import flash_attn`` succeeds would be refused on a
machine without an NVIDIA or AMD GPU. FlashAttention 3 and 4 have no stand-in, and are refused as ever.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

# The function that says whether flash-attn 2 can be used; all of transformers imports it from here.
_CHECK, _HOME = "is_flash_attn_2_available", "transformers.utils.import_utils"
# What each version of FlashAttention needs.
_NEEDS, _NEEDS_HOME = "FLASH_ATTENTION_COMPATIBILITY_MATRIX", "transformers.modeling_flash_attention_utils"


def accept(is_missing: Callable[[], bool], failed: Callable[[Exception], None]) -> None:
    """Let transformers accept ``flash_attention_2``, when it is imported or now.

    Args:
        is_missing: Returns True if flash-attn is not installed, so that a stand-in takes its place.
        failed: Called instead of raising into the script's import of transformers.
    """
    import wrapt

    def changed(change: Callable[[Any], None]) -> Callable[[Any], None]:
        def hook(module: Any) -> None:
            try:
                if is_missing():
                    change(module)
            except Exception as error:
                failed(error)

        return hook

    wrapt.register_post_import_hook(changed(_replace_check), _HOME)
    wrapt.register_post_import_hook(changed(_add_device), _NEEDS_HOME)


def _replace_check(module: Any) -> None:
    before = getattr(module, _CHECK, None)
    if before is None or before is _available:
        return
    for each in list(sys.modules.values()):
        if getattr(each, "__name__", "").startswith("transformers") and vars(each).get(_CHECK) is before:
            setattr(each, _CHECK, _available)


def _add_device(module: Any) -> None:
    needs = getattr(module, _NEEDS, {}).get(2)
    if needs is not None and (_available, "cpu") not in needs["supported_devices"]:
        needs["general_availability_check"] = _available
        needs["supported_devices"] = (*needs["supported_devices"], (_available, "cpu"))


def _available(*args: Any, **kwargs: Any) -> bool:
    return True
