"""Whether what runs is being recorded as a CUDA graph: then nothing may be read back from the device."""

from __future__ import annotations

import torch


def is_recorded() -> bool:
    """Whether this thread's stream is recorded."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
