"""Is a CUDA graph being captured (then nothing may be read back from the device)? Was a forward compiled?"""

from __future__ import annotations

from typing import Any

import torch

from attnpatch import compat


def is_recorded() -> bool:
    """True if the current CUDA stream is being captured into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def is_compiled(forward: Any) -> bool:
    """True if a forward was made by ``torch.compile``."""
    return hasattr(forward, compat.COMPILED_FUNCTION)
