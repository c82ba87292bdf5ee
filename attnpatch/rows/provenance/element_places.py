"""Tables of torch functions by what they do to the positions of elements; ``function_results.py`` uses them."""

from __future__ import annotations

import functools
from typing import Any

import torch

from attnpatch.rows.graph.axes import Dims, fresh, size_of
from attnpatch.rows.op_table import CASTS, ELEMENTWISE, called

# For functions in none of these sets, the result is not known.
# Functions that keep the first operand's elements in row-major order, whatever the shape.
IN_ORDER = frozenset(
    "reshape view flatten unflatten contiguous clone view_as reshape_as ravel squeeze unsqueeze _unsafe_view".split()
)
JOINING = frozenset("cat concat concatenate".split())
# Functions that pick or reorder the first operand's elements along one or several dimensions.
MOVING = frozenset(
    "roll flip fliplr flipud rot90 sort argsort msort topk gather index_select take_along_dim repeat_interleave repeat "
    "tile cumsum cumprod cummax cummin".split()
)
# In-place functions after which any dimension may hold other elements.
SCATTERING = frozenset(
    "scatter_ scatter_add_ scatter_reduce_ index_copy_ index_add_ index_put_ index_fill_ put_ masked_scatter_ swapaxes_ "
    "transpose_ resize_ set_".split()
)
REDUCING = frozenset("sum mean amax amin prod logsumexp norm std var median max min any all".split())
CONVOLUTIONS = frozenset("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split())
# Functions whose every element is computed from the operands' elements at the same position.
OF_ALL = ELEMENTWISE | {"lerp", "copy", "fill", "zero", "complex", "polar"}
ADDING = frozenset("add sub subtract __add__ __radd__ __sub__ __rsub__".split())
MULTIPLYING = frozenset("mul multiply __mul__ __rmul__".split())
# Functions that choose one operand's element at each position; if an operand was reordered, all elements may come from
# it.
CHOOSING = frozenset(["where", "lerp"])
# Functions that compute every element from the first operand's element at the same position, or from elements of the
# same row of channels.
OF_FIRST = CASTS | frozenset(
    "softmax log_softmax special_softmax layer_norm rms_norm group_norm batch_norm instance_norm normalize dropout "
    "dropout1d dropout2d alpha_dropout feature_alpha_dropout native_dropout prelu rrelu glu expand expand_as "
    "broadcast_to requires_grad_ cpu cuda pin_memory real imag conj angle interpolate mean sum amax amin norm "
    "vector_norm linalg_vector_norm var std argmax argmin softmin data".split()
)
# Other libraries' operators that compute each row of the result from the same row of the first operand: the quantised
# linear layers of bitsandbytes.
_OF_ROWS = frozenset(
    f"torch._ops.bitsandbytes.{name}"
    for name in (
        "int8_vectorwise_quant int8_linear_matmul int8_scaled_mm int8_mixed_scaled_mm int8_mm_dequant gemm_4bit gemv_4bit"
    ).split()
)
# Functions that make memory whose dimensions are known only by what is written into it.
BLANK = frozenset(["new_empty"])
# The same, but only if the operand is followed; otherwise the result may be a cache.
BLANK_LIKE = frozenset("empty_like zeros_like".split())
WRITES = frozenset("copy_ data_ index_copy_ __setitem__ index_put_ scatter_".split())


def name_of(func: Any) -> str:
    """The name of a torch function; the same for all overloads of an operator."""
    try:
        return _name_of(func)
    except TypeError:  # it cannot be hashed
        return _name_of.__wrapped__(func)


@functools.lru_cache(1024)
def _name_of(func: Any) -> str:
    name = called(func)
    return name if name.startswith("torch._ops.") else name.partition(".")[0]


@functools.lru_cache(4096)
def is_of(name: str, names: frozenset[str]) -> bool:
    """True if a function, or its form that is not in place (of ``add_``, ``__iadd__``), is among ``names``."""
    return name in names or name.rstrip("_") in names or (name[:3] == "__i" and f"__{name[3:]}" in names)


def is_in_place(name: str) -> bool:
    """True if a function's name says that it writes to its first operand (``add_``, ``__iadd__``)."""
    return name.endswith("_") and (name[:3] == "__i" or not name.endswith("__"))


def keeps(name: str) -> bool:
    """True if a function that returned its operand has left all elements in their positions."""
    return (
        not is_in_place(name) or (is_of(name, OF_ALL) and not is_of(name, CHOOSING)) or is_of(name, OF_FIRST)
    )


def keeps_rows(name: str) -> bool:
    """True if an operator (any overload) computes each row from the same row of its first operand."""
    return name.removesuffix(".default") in _OF_ROWS


def moved(name: str, dims: Dims, args: Any, kwargs: dict[str, Any], result: torch.Tensor) -> Dims | None:
    """Dimensions after a function of ``MOVING``: new axes along its ``dim``, or along all if it names none."""
    if name in ("repeat", "tile"):
        # A dimension that is repeated once stays as it is.
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
    """Dimensions after ``pad``: new axes for those that are padded or cut."""
    amounts = list(args[1] if len(args) > 1 else kwargs.get("pad", ()))
    amounts += [0] * (2 * len(dims) - len(amounts))
    return tuple(
        fresh([size])[0] if any(amounts[2 * back : 2 * back + 2]) else dim
        for back, dim, size in zip(range(len(dims) - 1, -1, -1), dims, result.shape, strict=True)
    )


def picked_at(index: tuple[Any, ...], dims: int) -> tuple[int, int] | None:
    """The position in an index of its only list or index tensor, and the result's dimension; ``None`` otherwise."""
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
