"""Whether what runs is a graph of torch's: recorded (nothing may be read back from the device then), or compiled."""

from __future__ import annotations

from typing import Any

import torch

from attnpatch import compat


def is_recorded() -> bool:
    """Whether this thread's stream is recorded."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def is_compiled(forward: Any) -> bool:
    """Whether a forward is what ``torch.compile`` made of one."""
    return hasattr(forward, compat.COMPILED_FUNCTION)
