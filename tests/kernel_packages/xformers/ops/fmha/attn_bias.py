"""The bias classes of xFormers with their documented attributes; ``materialize`` goes by plain loops over places."""

import itertools
import math
from dataclasses import dataclass

import torch


class AttentionBias:
    """Base class.

    Attributes:
        causal, ends: Whether there is a causal mask, and whether the last query is at the place of the last key.
    """

    causal, ends = False, True

    def _window(self):
        size = getattr(self, "_window_size", None)
        if size is not None:
            return size - 1, math.inf
        return getattr(self, "window_left", math.inf), getattr(self, "window_right", math.inf)

    def _sees(self, i, j, n, m):
        """True if query ``i`` of ``n`` sees key ``j`` of ``m``."""
        left, right = self._window()
        place = i + (m - n if self.ends else 0)
        return place - left <= j <= place + right and not (self.causal and j > place)

    def materialize(self, shape, dtype=torch.float64, device="cpu"):
        n, m = shape[-2:]
        rows = [[0.0 if self._sees(i, j, n, m) else -math.inf for j in range(m)] for i in range(n)]
        return torch.tensor(rows, dtype=dtype).expand(shape)


class LowerTriangularMask(AttentionBias):
    causal, ends = True, False

    def __init__(self, device=None):
        pass


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    def __init__(self, bias):
        self._bias = bias

    def materialize(self, shape, dtype=torch.float64, device="cpu"):
        return super().materialize(shape, dtype) + self._bias


class LowerTriangularFromBottomRightMask(AttentionBias):
    causal = True


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    _window_size: int


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    window_left: int
    window_right: int


@dataclass
class _SeqLenInfo:
    seqstart: torch.Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list

    def intervals(self):
        yield from itertools.pairwise(self.seqstart_py)


@dataclass
class _PaddedSeqLenInfo(_SeqLenInfo):
    seqlen: torch.Tensor
    seqlen_py: list
    padding: int

    def intervals(self):
        for start, length in zip(self.seqstart_py, self.seqlen_py, strict=False):
            yield start, start + length


@dataclass
class _GappySeqInfo(_SeqLenInfo):
    seqlen: torch.Tensor
    seqlen_py: list

    def intervals(self):
        for start, length in zip(self.seqstart_py, self.seqlen_py, strict=False):
            yield start, start + length


def _plain(lengths):
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return _SeqLenInfo(torch.tensor(starts, dtype=torch.int32), max(lengths), min(lengths), starts)


def _padded(lengths, padding):
    starts = [i * padding for i in range(len(lengths) + 1)]
    both = torch.tensor(starts, dtype=torch.int32), max(lengths), min(lengths), starts
    return _PaddedSeqLenInfo(*both, torch.tensor(lengths, dtype=torch.int32), list(lengths), padding)


def _gappy(starts, lengths, paged):
    both = torch.tensor(starts, dtype=torch.int32), max(lengths), min(lengths), list(starts)
    if paged:  # the ends instead of the lengths
        both[3].append(-1)
        lengths = [start + length for start, length in zip(starts, lengths, strict=False)]
    return _GappySeqInfo(*both, torch.tensor(lengths, dtype=torch.int32), list(lengths))


class _Packed(AttentionBias):
    def _keys(self):
        """For each sequence, the places of its keys."""
        return [list(range(*span)) for span in self.k_seqinfo.intervals()]

    def materialize(self, shape, dtype=torch.float64, device="cpu"):
        mask = torch.full(shape[-2:], -math.inf, dtype=dtype)
        for (low, high), keys in zip(self.q_seqinfo.intervals(), self._keys(), strict=False):
            for i in range(high - low):
                for j, place in enumerate(keys):
                    if self._sees(i, j, high - low, len(keys)):
                        mask[low + i, place] = 0.0
        return mask.expand(shape)


@dataclass
class BlockDiagonalMask(_Packed):
    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo
    _batch_sizes: object = None

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        return cls(_plain(q_seqlen), _plain(q_seqlen if kv_seqlen is None else kv_seqlen))

    def make_causal(self):
        return BlockDiagonalCausalMask(self.q_seqinfo, self.k_seqinfo)

    def make_causal_from_bottomright(self):
        return BlockDiagonalCausalFromBottomRightMask(self.q_seqinfo, self.k_seqinfo)

    def make_local_attention(self, window_size):
        return BlockDiagonalCausalLocalAttentionMask(self.q_seqinfo, self.k_seqinfo, _window_size=window_size)

    def make_local_attention_from_bottomright(self, window_size):
        return BlockDiagonalCausalLocalAttentionFromBottomRightMask(
            self.q_seqinfo, self.k_seqinfo, _window_size=window_size
        )


class BlockDiagonalCausalMask(BlockDiagonalMask):
    causal, ends = True, False


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    causal = True


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    _window_size: int = 0


@dataclass
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    _window_size: int = 0


@dataclass
class BlockDiagonalPaddedKeysMask(_Packed):
    q_seqinfo: _SeqLenInfo
    k_seqinfo: _PaddedSeqLenInfo

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_padding, kv_seqlen, causal_diagonal=None, *, device=None):
        return cls(_plain(q_seqlen), _padded(kv_seqlen, kv_padding))

    @classmethod
    def from_seqlens_local(cls, q_seqlen, kv_padding, kv_seqlen, *window):
        return cls(_plain(q_seqlen), _padded(kv_seqlen, kv_padding), *window)


@dataclass
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    causal_diagonal: object = None
    causal = True


@dataclass
class BlockDiagonalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    window_left: int
    window_right: int


@dataclass
class BlockDiagonalCausalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    _window_size: int
    causal = True


@dataclass
class BlockDiagonalGappyKeysMask(_Packed):
    q_seqinfo: _SeqLenInfo
    k_seqinfo: _GappySeqInfo

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqstarts, kv_seqlen, *, device=None):
        return cls(_plain(q_seqlen), _gappy(kv_seqstarts, kv_seqlen, False))


class BlockDiagonalCausalWithOffsetGappyKeysMask(BlockDiagonalGappyKeysMask):
    causal = True


@dataclass
class BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask(BlockDiagonalGappyKeysMask):
    window_left: int
    window_right: int

    @classmethod
    def from_seqlens_local_gappy(
        cls, q_seqlen, kv_seqstarts, kv_seqlen, window_left, window_right, device=None
    ):
        return cls(_plain(q_seqlen), _gappy(kv_seqstarts, kv_seqlen, False), window_left, window_right)


class _Paged(_Packed):
    def _keys(self):
        found = []
        for row, table in enumerate(self.block_tables.tolist()):
            slots = [page * self.page_size + i for page in table for i in range(self.page_size)]
            is_padded = isinstance(self.k_seqinfo, _PaddedSeqLenInfo)
            start = 0 if is_padded else self.k_seqinfo.seqstart_py[row]
            found.append(slots[start : self.k_seqinfo.seqlen_py[row]])
        return found


@dataclass
class PagedBlockDiagonalPaddedKeysMask(_Paged):
    q_seqinfo: _SeqLenInfo
    k_seqinfo: _PaddedSeqLenInfo
    block_tables: torch.Tensor
    page_size: int

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen, block_tables, page_size, *, device=None):
        info = _padded(kv_seqlen, block_tables.shape[1] * page_size)
        return cls(_plain(q_seqlen), info, block_tables, page_size)

    @classmethod
    def from_seqlens_local(cls, q_seqlen, kv_seqlen, block_tables, page_size, window_size):
        info = _padded(kv_seqlen, block_tables.shape[1] * page_size)
        return cls(_plain(q_seqlen), info, block_tables, page_size, window_size)


class PagedBlockDiagonalCausalWithOffsetPaddedKeysMask(PagedBlockDiagonalPaddedKeysMask):
    causal = True


@dataclass
class PagedBlockDiagonalCausalLocalPaddedKeysMask(PagedBlockDiagonalPaddedKeysMask):
    _window_size: int
    causal = True


@dataclass
class PagedBlockDiagonalGappyKeysMask(_Paged):
    q_seqinfo: _SeqLenInfo
    k_seqinfo: _GappySeqInfo
    block_tables: torch.Tensor
    page_size: int

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqstarts, kv_seqlen, block_tables, page_size, *, device=None):
        info = _gappy(kv_seqstarts, kv_seqlen, True)
        return cls(_plain(q_seqlen), info, block_tables, page_size)


class PagedBlockDiagonalCausalWithOffsetGappyKeysMask(PagedBlockDiagonalGappyKeysMask):
    causal = True
