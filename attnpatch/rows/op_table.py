"""The op table: one record per torch function, by the function's name.

A handler registers itself with ``@op``, so the dispatcher imports no handler and handlers import no dispatcher. A
handler gets the call as the host made it. It returns deferred tensors, or ``NotImplemented``: then the deferred
arguments are computed and the call runs natively. A handler must give the result that torch would. It must return
``NotImplemented`` for any argument that it does not fully understand (an unusual keyword).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

# ``handler(name, func, args, kwargs)`` returns the result.
Handler = Callable[[str, Callable[..., Any], Any, dict[str, Any]], Any]
_Handler = TypeVar("_Handler", bound=Handler)


@dataclasses.dataclass(frozen=True)
class Op:
    """One function of torch.

    Attributes:
        handler: Extends the graph; ``None``: deferred arguments are computed first.
        write: Extends the graph of the first argument, if the function writes to that argument.
        is_layout: True if the function only moves or selects elements of its first argument, which must be deferred.
        is_view: True if its result shares, or may share, the memory of its first argument.
        inplace_at: The position of its argument ``inplace``; with ``inplace=True`` it writes to its first argument.
    """

    handler: Handler | None = None
    write: Handler | None = None
    is_layout: bool = False
    is_view: bool = False
    inplace_at: int | None = None


_UNKNOWN = Op()
_OPS: dict[str, Op] = {}


def lookup(name: str) -> Op:
    """The record of a function; an empty one if the table does not have it."""
    return _OPS.get(name, _UNKNOWN)


def _know(name: str, **facts: Any) -> None:
    _OPS[name] = dataclasses.replace(lookup(name), **facts)


def op(*names: str, is_layout: bool = False, is_view: bool = False) -> Callable[[_Handler], _Handler]:
    """Register a handler of some functions; see ``Op``."""

    def register(handler: _Handler) -> _Handler:
        for name in names:
            if lookup(name).handler is not None:
                raise ValueError(f"{name} has a handler: {lookup(name).handler}")
            _know(name, handler=handler, is_layout=is_layout, is_view=is_view or lookup(name).is_view)
        return handler

    return register


def write(*names: str) -> Callable[[_Handler], _Handler]:
    """Register a handler of functions that write to their first argument."""

    def register(handler: _Handler) -> _Handler:
        for name in names:
            _know(name, write=handler)
        return handler

    return register


_BASIC = (
    "add sub subtract mul multiply div divide true_divide floor_divide rsub pow float_power neg negative "
    "abs absolute square sqrt rsqrt reciprocal exp exp2 expm1 log log2 log10 log1p logit xlogy logaddexp logaddexp2 "
    "ldexp sign sgn signbit floor ceil round trunc fix frac clamp clamp_min clamp_max clip maximum minimum fmax fmin "
    "fmod remainder lerp addcmul addcdiv hypot copysign heaviside nextafter nan_to_num where masked_fill "
    "deg2rad rad2deg"
)
_WAVES = (
    "sin cos tan asin acos atan atan2 arcsin arccos arctan arctan2 sinh cosh tanh asinh acosh atanh arcsinh arccosh "
    "arctanh sinc erf erfc erfinv lgamma digamma polygamma mvlgamma igamma igammac i0"
)
_ACTIVATIONS = (
    "sigmoid logsigmoid relu relu6 gelu silu mish softplus elu celu selu hardtanh hardsigmoid hardswish leaky_relu "
    "hardshrink softshrink tanhshrink softsign threshold _threshold"
)
_TRUTHS = (
    "eq ne lt le gt ge not_equal less less_equal greater greater_equal logical_and logical_or logical_not "
    "logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor bitwise_left_shift bitwise_right_shift isnan isinf "
    "isfinite isposinf isneginf isreal isclose"
)
_OPERATORS = (
    "radd rmul rsub rdiv rtruediv rpow pow eq ne lt le gt ge and or invert rand ror xor rxor mod rmod floordiv "
    "rfloordiv lshift rshift rlshift rrshift"
)
# torch.special uses different names for some of them.
_SPECIAL = (
    "erf erfc erfinv erfcx expit expm1 exp2 log1p log_ndtr ndtr ndtri logit xlogy xlog1py sinc round entr gammaln "
    "digamma psi polygamma i0 i0e i1 i1e zeta gammainc gammaincc"
)
_DTYPES = "bool int long"

POINTWISE = frozenset(
    " ".join((_BASIC, _WAVES, _ACTIVATIONS, _TRUTHS, _DTYPES)).split()
    + [f"__{name}__" for name in _OPERATORS.split()]
    + [f"special_{name}" for name in _SPECIAL.split()]
)
# Pointwise functions, copies and casts: every element stays at its index.
ELEMENTWISE = POINTWISE | frozenset("clone detach positive float half bfloat16 double".split())
# Functions that need one dimension complete, which keeps its length.
ALONG = frozenset("softmax log_softmax special_softmax special_log_softmax cumsum softmin".split())
# Functions that need some dimensions complete, which are removed or become 1.
REDUCING = frozenset(
    "sum mean amax amin prod logsumexp special_logsumexp argmax argmin any all nansum".split()
)
PAIRS = frozenset("max min sort topk".split())
CASTS = frozenset("to type type_as float half bfloat16 double".split())
SOFTMAX = frozenset("softmax special_softmax _safe_softmax masked_softmax _masked_softmax_rows".split())
# Casts whose result may be counts or indices.
TO_WHOLE = frozenset("to type int long short char byte".split())
# Functions whose result is a view of their first argument, also if that is computed already.
ALIASES = frozenset(
    "diagonal as_strided unfold broadcast_to imag conj resolve_conj resolve_neg adjoint H mH T t view view_as_real "
    "view_as_complex rename refine_names align_to align_as unsqueeze transpose swapaxes expand movedim unflatten narrow "
    "select split chunk unbind tensor_split detach data".split()
)
for _name in ALIASES:
    _know(_name, is_view=True)
for _place, _names in {
    1: "relu relu6 selu silu mish hardsigmoid hardswish",
    2: "leaky_relu elu celu",
    3: "hardtanh threshold _threshold dropout alpha_dropout",
    4: "rrelu",
}.items():
    for _name in _names.split():
        _know(_name, inplace_at=_place)
# Attributes that change a tensor's values when they are set.
_VALUES = frozenset("data real imag".split())


def first_in_place(name: str, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of a torch function with its first operand at position 0, also if it was given by keyword.

    ``where`` stays as it is, since its first argument is the condition.
    """
    if args or "input" not in kwargs or name == "where":
        return args, kwargs
    return (kwargs["input"],), {key: value for key, value in kwargs.items() if key != "input"}


def called(func: Any) -> str:
    """The name under which the op table has a torch function.

    Setting an attribute that changes values counts as an in-place function (``data_``). Another library's operator may
    have a torch function's name and do something else, so its name includes its module.
    """
    name: str = getattr(func, "__name__", "")
    module: str = getattr(func, "__module__", None) or "torch"
    if module.partition(".")[0] != "torch" or (
        module.startswith("torch._ops.") and module != "torch._ops.aten"
    ):
        return f"{module}.{name}"
    own: str = func.__self__.__name__ if name in ("__get__", "__set__") else ""
    return f"{own}_" if name == "__set__" and own in _VALUES else own or name
