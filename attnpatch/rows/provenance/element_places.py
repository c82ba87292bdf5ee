"""What functions of torch do to the places of elements, for who follows tokens (``sources``)."""

from __future__ import annotations

from typing import Any

import torch

from attnpatch.rows.graph.axes import Dims, fresh, size_of
from attnpatch.rows.op_table import CASTS, ELEMENTWISE

# Functions of torch by what they do to the places of elements. Of anything else the result is not known.
# The first operand's elements in their order, whatever the shape.
IN_ORDER = frozenset(
    "reshape view flatten unflatten contiguous clone view_as reshape_as ravel squeeze unsqueeze _unsafe_view".split()
)
JOINING = frozenset("cat concat concatenate".split())
# Other elements of the first operand, or in another order, along one dimension or along some.
MOVING = frozenset(
    "roll flip fliplr flipud rot90 sort argsort msort topk gather index_select take_along_dim repeat_interleave repeat "
    "tile cumsum cumprod cummax cummin".split()
)
# In place: other elements along any dimension.
SCATTERING = frozenset(
    "scatter_ scatter_add_ scatter_reduce_ index_copy_ index_add_ index_put_ index_fill_ put_ masked_scatter_ swapaxes_ "
    "transpose_ resize_ set_".split()
)
REDUCING = frozenset("sum mean amax amin prod logsumexp norm std var median max min any all".split())
CONVOLUTIONS = frozenset("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split())
# Each element is made of the operands' in its place.
OF_ALL = ELEMENTWISE | {"lerp", "copy", "fill", "zero", "complex", "polar"}
# Each element is one of the operands' in its place: of one that was moved it may be every element.
CHOOSING = frozenset(["where", "lerp"])
# Each element is made of the first operand's in its place, or of those in its row of channels.
OF_FIRST = CASTS | frozenset(
    "softmax log_softmax special_softmax layer_norm rms_norm group_norm batch_norm instance_norm normalize dropout "
    "dropout1d dropout2d alpha_dropout feature_alpha_dropout native_dropout prelu rrelu glu expand expand_as "
    "broadcast_to requires_grad_ cpu cuda pin_memory real imag conj angle interpolate mean sum amax amin norm "
    "vector_norm linalg_vector_norm var std argmax argmin softmin data".split()
)
# Operators of other libraries: each row of the result is made of the same row of the first operand. These are the
# quantised linear layers of bitsandbytes.
_OF_ROWS = frozenset(
    f"torch._ops.bitsandbytes.{name}"
    for name in (
        "int8_vectorwise_quant int8_linear_matmul int8_scaled_mm int8_mixed_scaled_mm int8_mm_dequant gemm_4bit gemv_4bit"
    ).split()
)
# What is written into these says what their dimensions are.
BLANK = frozenset(["new_empty"])
# The same where the operand is followed: what is made in the shape of a memory that is not may be one too.
BLANK_LIKE = frozenset("empty_like zeros_like".split())
WRITES = frozenset("copy_ data_ index_copy_ __setitem__ index_put_ scatter_".split())


def is_of(name: str, names: frozenset[str]) -> bool:
    """Whether a function is among some, also written in place (``add_``, ``__iadd__``)."""
    return name in names or name.rstrip("_") in names or (name[:3] == "__i" and f"__{name[3:]}" in names)


def keeps(name: str) -> bool:
    """Whether a function that returns its operand leaves elements where they are: most of them have nothing to do."""
    is_in_place = name.endswith("_") and (name[:3] == "__i" or not name.endswith("__"))
    return not is_in_place or (is_of(name, OF_ALL) and not is_of(name, CHOOSING)) or is_of(name, OF_FIRST)


def keeps_rows(name: str) -> bool:
    """Whether an operator, in whichever overload, makes each row of the same row of its first operand."""
    return name.removesuffix(".default") in _OF_ROWS


def moved(name: str, dims: Dims, args: Any, kwargs: dict[str, Any], result: torch.Tensor) -> Dims | None:
    """Along some dimensions other elements; along all where it is not said along which."""
    if name in ("repeat", "tile"):
        # Once along a dimension is all of it in its order.
        whole = ((),) * (result.dim() - len(dims)) + dims
        pairs = zip(whole, result.shape, strict=True)
        return tuple(dim if size_of(dim) == size else fresh([size])[0] for dim, size in pairs)
    if result.dim() != len(dims):
        return None
    given = kwargs.get("dim", kwargs.get("dims"))
    if given is None:
        said = args[2:] if name == "roll" else args[1:]
        given = next((v for v in reversed(said) if isinstance(v, (int, tuple, list))), None)
        if name == "flip" and isinstance(given, int):
            given = said
        if isinstance(given, (tuple, list)) and not all(isinstance(v, int) for v in given):
            given = None
    places = (given,) if isinstance(given, int) else given
    gone = range(len(dims)) if places is None else {place % len(dims) for place in places}
    return tuple(
        fresh([size])[0] if place in gone or size_of(dim) != size else dim
        for place, (dim, size) in enumerate(zip(dims, result.shape, strict=True))
    )


def padded(dims: Dims, args: Any, kwargs: dict[str, Any], result: torch.Tensor) -> Dims:
    """Along dimensions that are padded, or cut, no element need be in its place."""
    amounts = list(args[1] if len(args) > 1 else kwargs.get("pad", ()))
    amounts += [0] * (2 * len(dims) - len(amounts))
    return tuple(
        fresh([size])[0] if any(amounts[2 * back : 2 * back + 2]) else dim
        for back, dim, size in zip(range(len(dims) - 1, -1, -1), dims, result.shape, strict=True)
    )


def picked_at(index: tuple[Any, ...], dims: int) -> tuple[int, int] | None:
    """Which part of an index picks single elements, and along which dimension of the result; ``None``: it is not that
    simple."""
    picks = [place for place, one in enumerate(index) if isinstance(one, (list, torch.Tensor))]
    if len(picks) != 1:
        return None
    pick, others = index[picks[0]], [one for place, one in enumerate(index) if place != picks[0]]
    if isinstance(pick, list):
        is_row = all(type(one) is int for one in pick)
    else:
        is_row = pick.dim() == 1 and pick.dtype not in (torch.bool, torch.uint8)
    if not is_row or not all(one is None or one is ... or isinstance(one, slice) for one in others):
        return None
    rest = dims - sum(one is not None and one is not ... for one in index)
    return picks[0], sum(rest if one is ... else 1 for one in index[: picks[0]])
