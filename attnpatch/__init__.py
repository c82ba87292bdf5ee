"""Attention a few query rows at a time, exactly, and block maps of where it goes."""

# Names are imported on first use (PEP 562), so that the modules that need no torch (the policy, the errors, activation)
# can be imported without the second that importing torch takes.
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnpatch import errors
    from attnpatch.api import apply, by_rows, capture, explain, patched, register, remove, report
    from attnpatch.blocks.spec import Blocks
    from attnpatch.capturing.heads import heads
    from attnpatch.capturing.probes import Probes
    from attnpatch.capturing.token_scores import token_scores
    from attnpatch.conversations.analyzer import BlockAttentionAnalyzer
    from attnpatch.conversations.saved import load
    from attnpatch.hosts.kernels.registering import register_kernel
    from attnpatch.maps.arithmetic import compare
    from attnpatch.maps.block_map import BlockMap
    from attnpatch.policy import Policy
    from attnpatch.rows.kernels.call import KernelCall
    from attnpatch.standins.finder import replace_missing_kernels

__version__ = "0.1.0"
__all__ = [
    "BlockAttentionAnalyzer",
    "BlockMap",
    "Blocks",
    "KernelCall",
    "Policy",
    "Probes",
    "apply",
    "by_rows",
    "capture",
    "compare",
    "errors",
    "explain",
    "heads",
    "load",
    "patched",
    "register",
    "register_kernel",
    "remove",
    "replace_missing_kernels",
    "report",
    "token_scores",
]
_HOMES = {
    "BlockAttentionAnalyzer": "attnpatch.conversations.analyzer",
    "BlockMap": "attnpatch.maps.block_map",
    "Blocks": "attnpatch.blocks.spec",
    "KernelCall": "attnpatch.rows.kernels.call",
    "Policy": "attnpatch.policy",
    "Probes": "attnpatch.capturing.probes",
    "compare": "attnpatch.maps.arithmetic",
    "errors": "attnpatch.errors",
    "heads": "attnpatch.capturing.heads",
    "load": "attnpatch.conversations.saved",
    "register_kernel": "attnpatch.hosts.kernels.registering",
    "replace_missing_kernels": "attnpatch.standins.finder",
    "token_scores": "attnpatch.capturing.token_scores",
    **dict.fromkeys(
        ("apply", "by_rows", "capture", "explain", "patched", "register", "remove", "report"), "attnpatch.api"
    ),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        home = importlib.import_module(_HOMES[name])
    except (ImportError, AttributeError):
        from attnpatch.hosts import off

        error = off.missing()
        if error is None:
            raise
        return off.instead_of(name, error)
    value = home if name == "errors" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
