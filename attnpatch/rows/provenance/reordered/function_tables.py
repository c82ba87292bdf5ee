"""Tables of torch functions by what they do to the order of tokens between a model's attention modules."""

from __future__ import annotations

import functools
from typing import Any

import torch

from attnpatch.rows.provenance import element_places

# Functions that permute dimensions, and functions that take a part of a tensor.
TURNING = frozenset(
    "transpose permute movedim moveaxis swapaxes swapdims T mT H mH t adjoint as_strided unfold".split()
)
CUTTING = frozenset(
    "__getitem__ narrow split split_with_sizes chunk tensor_split unsafe_chunk unsafe_split unbind select".split()
)
# Functions whose order ``mode.py`` tracks exactly: here their tokens stay in their dimension.
ORDERED = frozenset("roll flip fliplr flipud rot90 sort msort gather index_select take_along_dim".split())
# Functions that pool or spread tokens along the dimensions after the first two, and keep their order.
SPATIAL = element_places.CONVOLUTIONS | frozenset(
    "avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d interpolate "
    "upsample upsample_nearest upsample_bilinear pixel_shuffle pixel_unshuffle unfold".split()
)
# Functions that compute each token from itself and others, at the same position.
MIXING = frozenset("cumsum cumprod logcumsumexp lstm gru rnn_tanh rnn_relu".split())
_LEAVING_TOKENS = frozenset("linear bilinear index_fill embedding __get__".split()) | MIXING
# Functions that expand a dimension of size 1.
EXPANDING = frozenset("expand expand_as broadcast_to".split())
# Functions that write into a tensor, or into a copy of it.
_SETTING = frozenset(
    "__setitem__ copy scatter scatter_add scatter_reduce index_copy index_add index_put index_reduce put masked_scatter "
    "select_scatter slice_scatter diagonal_scatter".split()
)
# How a reason names functions that have no name of their own.
IN_WORDS = {
    "__getitem__": "a slice or an index",
    "__setitem__": "a write at an index",
    "__mul__": "mul",
    "__rmul__": "mul",
}
IN_ANOTHER_ORDER = ORDERED | {"views", "an index"}
# Functions whose second operand only gives a shape or a dtype.
LIKE = frozenset("expand_as view_as reshape_as type_as".split())
# Functions that pass a tensor out of torch, and functions that bring one into torch.
LEAVING_TORCH = frozenset("numpy tolist __array__".split())
ENTERING_TORCH = frozenset("from_numpy tensor as_tensor asarray".split())


@functools.cache
def is_setting(name: str) -> bool:
    """True if a function writes into a tensor, or into a copy of it."""
    return element_places.is_of(name, _SETTING)


@functools.cache
def is_elementwise(name: str) -> bool:
    """True if each element of the result is computed from the operands' elements at the same position."""
    return element_places.is_of(name, element_places.OF_ALL)


@functools.cache
def leaves_tokens(name: str) -> bool:
    """True if a function is known to leave tokens at their positions."""
    return (
        is_elementwise(name)
        or name in _LEAVING_TOKENS
        or (name not in EXPANDING and element_places.is_of(name, element_places.OF_FIRST))
    )


def begins(name: str, first: torch.Tensor, result: torch.Tensor) -> bool:
    """True if a function slices or permutes a tensor along more than its channels."""
    if first.dim() < 2:
        return False
    if name in TURNING:
        return True
    if name in CUTTING:
        return result.shape[:-1] != first.shape[:-1]
    return name in element_places.IN_ORDER and first.shape[:-1] != result.shape[:-1]


def is_nothing(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """True for a multiplication by the number 0."""
    return element_places.is_of(name, element_places.MULTIPLYING) and any(
        isinstance(one, (int, float)) and one == 0 for one in (*args, *kwargs.values())
    )
