"""Names of the torch functions that keep query rows apart, by what they need complete."""

from __future__ import annotations

from typing import Any

_BASIC = (
    "add sub subtract mul multiply div divide true_divide floor_divide rsub pow float_power neg negative positive "
    "abs absolute square sqrt rsqrt reciprocal exp exp2 expm1 log log2 log10 log1p logit xlogy logaddexp logaddexp2 "
    "ldexp sign sgn signbit floor ceil round trunc fix frac clamp clamp_min clamp_max clip maximum minimum fmax fmin "
    "fmod remainder lerp addcmul addcdiv hypot copysign heaviside nextafter nan_to_num where masked_fill clone detach "
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
# torch.special has names of its own for some of them.
_SPECIAL = (
    "erf erfc erfinv erfcx expit expm1 exp2 log1p log_ndtr ndtr ndtri logit xlogy xlog1py sinc round entr gammaln "
    "digamma psi polygamma i0 i0e i1 i1e zeta gammainc gammaincc"
)
_DTYPES = "float half bfloat16 double bool int long"

ELEMENTWISE = frozenset(
    " ".join((_BASIC, _WAVES, _ACTIVATIONS, _TRUTHS, _DTYPES)).split()
    + [f"__{name}__" for name in _OPERATORS.split()]
    + [f"special_{name}" for name in _SPECIAL.split()]
)
# Complete along one dimension, which keeps its length.
ALONG = frozenset("softmax log_softmax special_softmax special_log_softmax cumsum softmin".split())
# Complete along some dimensions, which vanish or become 1.
REDUCING = frozenset(
    "sum mean amax amin prod logsumexp special_logsumexp argmax argmin any all nansum".split()
)
PAIRS = frozenset("max min sort topk".split())
CASTS = frozenset("to type type_as float half bfloat16 double".split())
# Casts after which a result may be counts or indices.
TO_WHOLE = frozenset("to type int long short char byte".split())
# Attributes that give a tensor other values when they are set.
_VALUES = frozenset("data real imag".split())


def called(func: Any) -> str:
    """The name of a function of torch; values that are set by an attribute are a step in place (``data_``).

    Another library's operator may have the name of one of torch's and do something else: it has its module in its name.
    """
    name: str = getattr(func, "__name__", "")
    module: str = getattr(func, "__module__", None) or "torch"
    if module.partition(".")[0] != "torch" or (
        module.startswith("torch._ops.") and module != "torch._ops.aten"
    ):
        return f"{module}.{name}"
    own: str = func.__self__.__name__ if name in ("__get__", "__set__") else ""
    return f"{own}_" if name == "__set__" and own in _VALUES else own or name
