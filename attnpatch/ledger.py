"""Counts the bytes that tensors would hold while torch runs on shapes alone."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from attnpatch import compat
from attnpatch.compat import FakeTensor, FakeTensorMode, TorchDispatchMode, tree_leaves
from attnpatch.sdpa_call import SdpaCall

_FUSED = re.compile(r"_scaled_dot_product_(flash|efficient|cudnn|fused)_attention")


def _safe_softmax(scores: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """aten's ``_safe_softmax`` (native/transformers/attention.cpp) with its temporary, a mask of infinite scores."""
    out = torch.softmax(scores, dim, dtype=dtype)
    return out.masked_fill_(torch.all(torch.isneginf(scores), dim, keepdim=True), 0.0)


# Operators whose temporaries do not show when they run on shapes. They are written out in steps, so that the
# temporaries are counted.
_STEPS: dict[Any, Callable[..., Any]] = {compat.safe_softmax: _safe_softmax}


@dataclasses.dataclass
class Span:
    """A part of a run, and what it held.

    Attributes:
        entry: Bytes held when it began.
        peak: The most bytes held at once during it.
        exit: Bytes held when it ended.
        operators: Names of the operators that ran.
    """

    entry: int
    peak: int = 0
    exit: int = 0
    operators: set[str] = dataclasses.field(default_factory=set)

    def fused_kernel(self) -> str | None:
        """Name of torch's fused attention kernel that ran, if one did."""
        return next((found[1] for name in sorted(self.operators) if (found := _FUSED.search(name))), None)


class Ledger(TorchDispatchMode):
    """Counts the storages that operators on fake tensors allocate, until they are freed.

    Storages that no operator allocated (parameters, inputs) are not counted; views add nothing.

    Attributes:
        live: Bytes held now.
        peak: The most bytes held at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._spans: list[Span] = []
        self._is_paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for span in self._spans:
            span.operators.add(func.__name__)
        if self._is_paused:
            return func(*args, **(kwargs or {}))
        for tensor in _fakes((args, kwargs)):
            self._enter(tensor, False)
        steps = _STEPS.get(func)
        if steps is not None:
            with self:
                return steps(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for tensor in _fakes(result):
            self._enter(tensor, True)
        return result

    def _enter(self, tensor: FakeTensor, is_new: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = storage.nbytes() if is_new else 0
        self._sizes[key] = size
        weakref.finalize(storage, self._leave, key).atexit = False
        self.live += size
        self.peak = max(self.peak, self.live)
        for span in self._spans:
            span.peak = max(span.peak, self.live)

    def _leave(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def size_of(self, tensor: torch.Tensor) -> int:
        """Bytes of the storage of a tensor that an operator made."""
        return self._sizes.get(tensor.untyped_storage()._cdata, 0) if isinstance(tensor, FakeTensor) else 0

    @contextlib.contextmanager
    def span(self) -> Iterator[Span]:
        """Record what the run does inside a ``with`` block."""
        span = Span(self.live, self.live)
        self._spans.append(span)
        try:
            yield span
        finally:
            self._spans.pop()
            span.exit = self.live

    def fused_choice(self, call: SdpaCall) -> int:
        """What ``torch._fused_sdp_choice`` would return for real tensors like these, as 0 (dense math) or 1 (fused).

        That function always returns 0 for tensors without data. The call itself does choose its kernel by the device of
        the tensors. So the call is made, and the operators that it runs are read.
        """
        spans, self._spans, self._is_paused = self._spans, [], True
        try:
            with self.span() as span:
                F.scaled_dot_product_attention(**call.arguments())
        finally:
            self._spans, self._is_paused = spans, False
        return int(span.fused_kernel() is not None)


class Shapes(FakeTensorMode):
    """Tensors made inside have a shape, a dtype and a device but no memory; ``ledger`` counts what they would take."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.ledger = Ledger()


def ledger_of(tensor: torch.Tensor) -> Ledger | None:
    """The ledger that counts a tensor's bytes; None if the tensor was not made under ``Shapes``."""
    return getattr(getattr(tensor, "fake_mode", None), "ledger", None)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is an ordinary one, or one of ``Shapes``; other subclasses (distributed, quantised) are not."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) or ledger_of(tensor) is not None


def _fakes(value: Any) -> list[FakeTensor]:
    return [item for item in tree_leaves(value) if isinstance(item, FakeTensor)]
