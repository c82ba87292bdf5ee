"""The bias classes of ``xformers.ops.fmha.attn_bias`` that its documentation describes: which keys a query may see.

A reader recognises them by the names of classes and attributes, as it does xFormers' own (``hosts/kernels``).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

__all__ = [
    "AttentionBias",
    "BlockDiagonalCausalFromBottomRightMask",
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask",
    "BlockDiagonalCausalLocalAttentionMask",
    "BlockDiagonalCausalMask",
    "BlockDiagonalCausalWithOffsetPaddedKeysMask",
    "BlockDiagonalMask",
    "BlockDiagonalPaddedKeysMask",
    "LocalAttentionFromBottomRightMask",
    "LowerTriangularFromBottomRightLocalAttentionMask",
    "LowerTriangularFromBottomRightMask",
    "LowerTriangularMask",
    "LowerTriangularMaskWithTensorBias",
]


class AttentionBias:
    """Base of all biases."""

    def materialize(
        self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: Any = "cpu"
    ) -> torch.Tensor:
        """The bias as a tensor: 0 where a query may see a key, -inf elsewhere.

        Args:
            shape: ``[..., queries, keys]``.
        """
        is_open = self._opened(shape[-2], shape[-1]).to(device)
        bias = torch.zeros(is_open.shape, dtype=dtype, device=device).masked_fill(~is_open, -math.inf)
        return bias.expand(shape)

    def _opened(self, q_len: int, kv_len: int) -> torch.Tensor:
        """bool ``[queries, keys]``."""
        raise NotImplementedError


def _distance(q_len: int, kv_len: int, aligns_ends: bool) -> torch.Tensor:
    """int ``[queries, keys]``: the place of the query less that of the key."""
    first = kv_len - q_len if aligns_ends else 0
    return torch.arange(q_len)[:, None] + first - torch.arange(kv_len)


class LowerTriangularMask(AttentionBias):
    """Causal; the first query is at the place of the first key."""

    def __init__(self, *args: Any, device: Any = None, **kwargs: Any) -> None:
        self.device = device

    def _opened(self, q_len: int, kv_len: int) -> torch.Tensor:
        return _distance(q_len, kv_len, False) >= 0

    def to(self, device: Any) -> LowerTriangularMask:
        return self

    def add_bias(self, bias: torch.Tensor) -> LowerTriangularMaskWithTensorBias:
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """Causal, and a tensor that is added to the scores."""

    def __init__(self, bias: torch.Tensor) -> None:
        super().__init__()
        self._bias = bias

    def materialize(
        self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: Any = "cpu"
    ) -> torch.Tensor:
        return super().materialize(shape, dtype, device) + self._bias.to(device, dtype)


class LowerTriangularFromBottomRightMask(AttentionBias):
    """Causal; the last query is at the place of the last key."""

    def _opened(self, q_len: int, kv_len: int) -> torch.Tensor:
        return _distance(q_len, kv_len, True) >= 0

    def to(self, device: Any) -> LowerTriangularFromBottomRightMask:
        return self

    def make_local_attention(self, window_size: int) -> LowerTriangularFromBottomRightLocalAttentionMask:
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """As its base, and a query sees ``window_size`` keys, its own among them."""

    def __init__(self, _window_size: int) -> None:
        self._window_size = _window_size

    def _opened(self, q_len: int, kv_len: int) -> torch.Tensor:
        return super()._opened(q_len, kv_len) & (_distance(q_len, kv_len, True) < self._window_size)


@dataclasses.dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    """A query sees so many keys before and after its place; the last query is at the place of the last key."""

    window_left: int
    window_right: int

    def _opened(self, q_len: int, kv_len: int) -> torch.Tensor:
        distance = _distance(q_len, kv_len, True)
        return (distance <= self.window_left) & (distance >= -self.window_right)

    def to(self, device: Any) -> LocalAttentionFromBottomRightMask:
        return self


class _Sequences:
    """Where packed sequences begin and end.

    Args:
        lengths: Their lengths.
        device: Of ``seqstart``.
    """

    def __init__(self, lengths: Iterable[int], device: Any = None) -> None:
        lengths = [int(length) for length in lengths]
        self.seqstart_py = [0, *itertools.accumulate(lengths)]
        self.seqstart = torch.tensor(self.seqstart_py, dtype=torch.int32, device=device)
        self.max_seqlen, self.min_seqlen = max(lengths, default=-1), min(lengths, default=-1)

    def spans(self) -> list[tuple[int, int]]:
        """First token, and one past the last, of each."""
        return list(itertools.pairwise(self.seqstart_py))

    def split(self, tensor: torch.Tensor, batch_sizes: Sequence[int] | None) -> list[torch.Tensor]:
        """``[1, total, ...]`` as one tensor ``[batch, length, ...]`` for each of the given batches of equal lengths."""
        if tensor.shape[:2] != (1, self.seqstart_py[-1]):
            raise ValueError(f"a tensor [1, {self.seqstart_py[-1]}, ...] is split, not {list(tensor.shape)}")
        sizes = [1] * (len(self.seqstart_py) - 1) if batch_sizes is None else batch_sizes
        ends = [0, *itertools.accumulate(sizes)]
        return [
            tensor[:, self.seqstart_py[low] : self.seqstart_py[high]].reshape(
                high - low, -1, *tensor.shape[2:]
            )
            for low, high in itertools.pairwise(ends)
        ]


class _PaddedSequences(_Sequences):
    """Packed keys in slots of equal size, of which each sequence uses the first ones."""

    def __init__(self, lengths: Sequence[int], padding: int, device: Any = None) -> None:
        super().__init__([padding] * len(lengths), device)
        self.padding = padding
        self.seqlen_py = [int(length) for length in lengths]
        self.seqlen = torch.tensor(self.seqlen_py, dtype=torch.int32, device=device)

    def spans(self) -> list[tuple[int, int]]:
        return [(i * self.padding, i * self.padding + length) for i, length in enumerate(self.seqlen_py)]


class BlockDiagonalMask(AttentionBias):
    """Packed sequences; each attends to itself.

    Args:
        q_seqinfo, k_seqinfo: Where their queries and keys are.
    """

    # What is open inside a sequence.
    inside: AttentionBias | None = None

    def __init__(self, q_seqinfo: Any, k_seqinfo: Any, _batch_sizes: Sequence[int] | None = None) -> None:
        self.q_seqinfo, self.k_seqinfo, self._batch_sizes = q_seqinfo, k_seqinfo, _batch_sizes

    def _opened(self, q_len: int, kv_len: int) -> torch.Tensor:
        found = torch.zeros(q_len, kv_len, dtype=torch.bool)
        for (low, high), (first, end) in zip(self.q_seqinfo.spans(), self.k_seqinfo.spans(), strict=True):
            size = high - low, end - first
            found[low:high, first:end] = True if self.inside is None else self.inside._opened(*size)
        return found

    def to(self, device: Any) -> BlockDiagonalMask:
        return self

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None, *, device: Any = None
    ) -> Any:
        """The mask of sequences of these lengths; ``kv_seqlen=None``: as many keys as queries."""
        queries = _Sequences(q_seqlen, device)
        is_same = kv_seqlen is None or list(kv_seqlen) == list(q_seqlen)
        return cls(queries, queries if is_same else _Sequences(kv_seqlen or (), device))

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[torch.Tensor]) -> tuple[Any, torch.Tensor]:
        """The mask of tensors ``[batch, length, ...]``, and the tensors packed: ``[1, total, ...]``."""
        mask, packed, _, _ = cls.from_tensor_lists_qkv(tensors, tensors)
        mask.k_seqinfo = mask.q_seqinfo
        return mask, packed

    @classmethod
    def from_tensor_lists_qkv(
        cls,
        tensors_q: Sequence[torch.Tensor],
        tensors_k: Sequence[torch.Tensor],
        tensors_v: Sequence[torch.Tensor] | None = None,
    ) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The mask of lists of queries and keys, and queries, keys and values packed."""
        lengths = [[one.shape[1] for one in some for _ in one] for some in (tensors_q, tensors_k)]
        mask = cls.from_seqlens(*lengths, device=tensors_q[0].device)
        mask._batch_sizes = [one.shape[0] for one in tensors_q]
        return mask, _packed(tensors_q), _packed(tensors_k), None if tensors_v is None else _packed(tensors_v)

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The inverse of ``from_tensor_list``."""
        return self.q_seqinfo.split(tensor, self._batch_sizes)

    def split_queries(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return self.q_seqinfo.split(tensor, self._batch_sizes)

    def split_kv(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return self.k_seqinfo.split(tensor, self._batch_sizes)

    def _as(self, kind: type[Any], *others: Any) -> Any:
        return kind(self.q_seqinfo, self.k_seqinfo, self._batch_sizes, *others)

    def make_causal(self) -> BlockDiagonalCausalMask:
        return self._as(BlockDiagonalCausalMask)

    def make_causal_from_bottomright(self) -> BlockDiagonalCausalFromBottomRightMask:
        return self._as(BlockDiagonalCausalFromBottomRightMask)

    def make_local_attention(self, window_size: int) -> BlockDiagonalCausalLocalAttentionMask:
        return self._as(BlockDiagonalCausalLocalAttentionMask, window_size)

    def make_local_attention_from_bottomright(
        self, window_size: int
    ) -> BlockDiagonalCausalLocalAttentionFromBottomRightMask:
        return self._as(BlockDiagonalCausalLocalAttentionFromBottomRightMask, window_size)


def _packed(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([one.reshape(1, -1, *one.shape[2:]) for one in tensors], 1)


class BlockDiagonalCausalMask(BlockDiagonalMask):
    """As its base, and causal; the first query of a sequence is at the place of its first key."""

    inside = LowerTriangularMask()


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """As its base, and causal; the last query of a sequence is at the place of its last key."""

    inside = LowerTriangularFromBottomRightMask()


class _Local(BlockDiagonalMask):
    aligns_ends = False

    def __init__(
        self, q_seqinfo: Any, k_seqinfo: Any, _batch_sizes: Sequence[int] | None = None, _window_size: int = 0
    ) -> None:
        super().__init__(q_seqinfo, k_seqinfo, _batch_sizes)
        if _window_size <= 0:
            raise ValueError(f"a window of {_window_size} keys is not accepted; give at least 1")
        self._window_size = _window_size
        self.inside = _Window(_window_size, self.aligns_ends)


class _Window(AttentionBias):
    def __init__(self, size: int, aligns_ends: bool) -> None:
        self.size, self.aligns_ends = size, aligns_ends

    def _opened(self, q_len: int, kv_len: int) -> torch.Tensor:
        distance = _distance(q_len, kv_len, self.aligns_ends)
        return (distance >= 0) & (distance < self.size)


class BlockDiagonalCausalLocalAttentionMask(_Local):
    """As ``BlockDiagonalCausalMask``, and a query sees ``_window_size`` keys, its own among them."""


class BlockDiagonalCausalLocalAttentionFromBottomRightMask(_Local):
    """As ``BlockDiagonalCausalFromBottomRightMask``, and a query sees ``_window_size`` keys, its own among them."""

    aligns_ends = True


class BlockDiagonalPaddedKeysMask(BlockDiagonalMask):
    """Packed queries; the keys of each sequence are the first of a slot of ``kv_padding`` keys."""

    def __init__(self, q_seqinfo: Any, k_seqinfo: Any) -> None:
        super().__init__(q_seqinfo, k_seqinfo)

    @classmethod
    def from_seqlens(  # type: ignore[override]
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        causal_diagonal: Any = None,
        *,
        device: Any = None,
    ) -> Any:
        """The mask of sequences of these lengths."""
        made = cls(_Sequences(q_seqlen, device), _PaddedSequences(kv_seqlen, kv_padding, device))
        made.causal_diagonal = causal_diagonal
        return made

    causal_diagonal: Any = None


class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """As its base, and causal; the last query of a sequence is at the place of its last key."""

    inside = LowerTriangularFromBottomRightMask()
