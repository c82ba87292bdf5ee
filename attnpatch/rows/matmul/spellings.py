"""Reads a call of any torch product as a ``Product``: its operands, and a letter per dimension as in ``einsum``."""

from __future__ import annotations

import dataclasses
import itertools
import math
import string
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attnpatch import compat

# ``rebuild(operands, added)``: the arguments of the call, with other operands and another added tensor.
Rebuild = Callable[[Sequence[Any], Any], tuple[Any, dict[str, Any]]]


@dataclasses.dataclass
class Product:
    """A call that contracts two or more tensors.

    Attributes:
        operands: The tensors, in the order of the call.
        labels: A letter for every dimension of each operand.
        result: A letter for every dimension of the result; a letter that the result lacks is summed over.
        rebuild: Returns the call's arguments, given replacements of the operands and of ``added``.
        added: A tensor added to the result (``baddbmm``), or ``None``.
        func: A function that computes parts with the bits of the whole; ``None``: the function that was called.
        is_bilinear: True if the result is nothing but the sum of products, apart from ``added``.
        is_elementwise: True if torch holds all elementwise products before it sums them.
    """

    operands: tuple[torch.Tensor, ...]
    labels: tuple[str, ...]
    result: str
    rebuild: Rebuild
    added: torch.Tensor | None = None
    func: Callable[..., Any] | None = None
    is_bilinear: bool = True
    is_elementwise: bool = False

    def sizes(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for tensor, labels in zip(self.operands, self.labels, strict=True):
            for label, size in zip(labels, tensor.shape, strict=True):
                known = found.get(label, 1)
                found[label] = min(size, known) if 0 in (size, known) else max(size, known)
        return found

    def elements(self) -> int:
        """The number of elements of the result."""
        sizes = self.sizes()
        return math.prod(sizes[label] for label in self.result)

    def pair(self) -> tuple[int, int]:
        """Indices of query and key, if these are scores: each has a dimension of the result that the other lacks."""
        for i, j in itertools.combinations(range(len(self.operands)), 2):
            if self.only(i, j) and self.only(j, i):
                return i, j
        return 0, 1

    def only(self, one: int, other: int) -> list[str]:
        """Dimensions of the result that one operand has and another lacks."""
        return [
            label for label in self.result if label in self.labels[one] and label not in self.labels[other]
        ]

    def widest_step(self) -> int:
        """Elements of the largest intermediate tensor: more than two operands are contracted one after the other."""
        sizes, own = self.sizes(), set(self.labels[0])
        widest = math.prod(sizes.values()) if self.is_elementwise else 0
        for at in range(1, len(self.operands) - 1):
            own |= set(self.labels[at])
            later = set(self.result).union(*self.labels[at + 1 :])
            own &= later
            widest = max(widest, math.prod(sizes[label] for label in own))
        return widest


def parse(name: str, args: Any, kwargs: dict[str, Any]) -> Product | None:
    """The product that a call computes; ``None`` if it cannot be deferred."""
    if kwargs.get("out") is not None or kwargs.get("out_dtype") is not None:
        return None
    found = _PARSERS.get(name, _matmul)(args, kwargs)
    if found is None or not all(isinstance(tensor, torch.Tensor) for tensor in found.operands):
        return None
    return found


def _two(args: Any, kwargs: dict[str, Any], *names: str) -> tuple[Any, ...]:
    """Arguments given by position or by any of several names (``mat2`` of one function is ``other`` of another)."""
    rest = [kwargs[name] for name in names if name in kwargs]
    return (*args, *rest)


def _matmul(args: Any, kwargs: dict[str, Any], reverse: bool = False) -> Product | None:
    operands = _two(args, kwargs, "input", "self", "other", "mat2", "tensor2")[:2]
    left, right = reversed(operands) if reverse else operands
    if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
        return None
    depth = max(left.dim(), right.dim())
    if right.dim() == 1 and 1 < depth < 20 and not reverse:
        lead = string.ascii_uppercase[: depth - 1]
        return Product((left, right), (lead + "k", "k"), lead, lambda t, _: (tuple(t), {}))
    if min(left.dim(), right.dim()) < 2 or depth > 20:
        return None
    lead = string.ascii_uppercase[: depth - 2]
    labels = lead[depth - left.dim() :] + "ik", lead[depth - right.dim() :] + "kj"
    if reverse:
        return Product((left, right), labels, lead + "ij", lambda t, _: ((t[1], t[0]), {}))
    return Product((left, right), labels, lead + "ij", lambda t, _: (tuple(t), {}))


def _added(args: Any, kwargs: dict[str, Any], labels: tuple[str, str, str], *names: str) -> Product | None:
    """``baddbmm`` and the like: a product, and a tensor that is added to it."""
    given = (*args, *(kwargs.get(name) for name in names[len(args) :]))[:3]
    if not all(isinstance(tensor, torch.Tensor) for tensor in given):
        return None
    added, left, right = given
    rest = {key: kwargs[key] for key in ("beta", "alpha") if key in kwargs}
    if (left.dim(), right.dim()) != (len(labels[0]), len(labels[1])) or set(kwargs) - {*rest, *names}:
        return None
    return Product((left, right), labels[:2], labels[2], lambda t, c: ((c, *t), rest), added)


def _baddbmm(args: Any, kwargs: dict[str, Any]) -> Product | None:
    return _added(args, kwargs, ("Aik", "Akj", "Aij"), "input", "batch1", "batch2")


def _addbmm(args: Any, kwargs: dict[str, Any]) -> Product | None:
    return _added(args, kwargs, ("Aik", "Akj", "ij"), "input", "batch1", "batch2")


def _addmm(args: Any, kwargs: dict[str, Any]) -> Product | None:
    found = _added(args, kwargs, ("ik", "kj", "ij"), "input", "mat1", "mat2")
    is_layer = found is None or found.added is None or found.added.dim() < 2
    return None if is_layer else found


def _linear(args: Any, kwargs: dict[str, Any]) -> Product | None:
    left, right, bias = (*args, *(kwargs.get(key) for key in ("input", "weight", "bias")[len(args) :]))
    if right.dim() != 2:
        return None
    lead = string.ascii_uppercase[: left.dim() - 1]
    return Product((left, right), (lead + "k", "jk"), lead + "j", lambda t, c: ((*t, c), {}), bias)


def _tensordot(args: Any, kwargs: dict[str, Any]) -> Product | None:
    left, right = _two(args, kwargs, "a", "b")[:2]
    dims = args[2] if len(args) > 2 else kwargs.get("dims", 2)
    if isinstance(dims, int):
        dims = [list(range(-dims, 0)), list(range(dims))]
    if not isinstance(dims, (list, tuple)) or len(dims) != 2 or left.dim() + right.dim() > 40:
        return None
    firsts, seconds = ([dims] if isinstance(dims, int) else list(dims) for dims in dims)
    own = list(string.ascii_lowercase[: left.dim()])
    other = list(string.ascii_uppercase[: right.dim()])
    for first, second in zip(firsts, seconds, strict=True):
        if left.shape[first] != right.shape[second]:
            return None
        other[second] = own[first]
    result = [label for label in own if label not in other] + [label for label in other if label not in own]
    return Product(
        (left, right),
        ("".join(own), "".join(other)),
        "".join(result),
        lambda t, _: ((*t, [firsts, seconds]), {}),
    )


def _inner(args: Any, kwargs: dict[str, Any]) -> Product | None:
    left, right = _two(args, kwargs, "input", "other")[:2]
    if min(left.dim(), right.dim()) < 2 or max(left.dim(), right.dim()) > 20:
        return None
    own, other = string.ascii_lowercase[: left.dim() - 1], string.ascii_uppercase[: right.dim() - 1]
    return Product((left, right), (own + "z", other + "z"), own + other, lambda t, _: (tuple(t), {}))


def _vecdot(args: Any, kwargs: dict[str, Any]) -> Product | None:
    """``(q[..., :, None, :] * k[..., None, :, :]).sum(-1)`` in one call."""
    operands = _two(args, kwargs, "x", "y")[:2]
    rest = {"dim": args[2] if len(args) > 2 else kwargs.get("dim", -1)}
    left, right = operands
    depth = max(left.dim(), right.dim())
    if rest["dim"] != -1 or min(left.dim(), right.dim()) < 3 or depth > 20:
        return None
    result = string.ascii_uppercase[: depth - 1]
    free = iter(string.ascii_lowercase)
    labels = []
    for tensor in operands:
        own = result[depth - tensor.dim() :]
        # An operand that has size 1 (broadcast) in one of the result's last two dimensions does not get that letter.
        ends = [
            label if size != 1 else next(free)
            for label, size in zip(own[-2:], tensor.shape[-3:-1], strict=True)
        ]
        labels.append(own[:-2] + "".join(ends) + "z")
    return Product(operands, tuple(labels), result, lambda t, _: (tuple(t), rest), is_elementwise=True)


def _cdist(args: Any, kwargs: dict[str, Any]) -> Product | None:
    """``cdist``: distances between rows of two tensors; hosts use their negatives as scores."""
    left, right = _two(args, kwargs, "x1", "x2")[:2]
    rest = {"p": args[2] if len(args) > 2 else kwargs.get("p", 2.0)}
    mode = args[3] if len(args) > 3 else kwargs.get("compute_mode", "use_mm_for_euclid_dist_if_necessary")
    found = _matmul((left, right.mT), {}) if right.dim() > 1 else None
    if found is None:
        return None
    if mode == "use_mm_for_euclid_dist_if_necessary":
        # torch decides by the number of rows: fix the decision for the whole, since a part has fewer.
        is_long = max(left.shape[-2], right.shape[-2]) > 25
        mode = "use_mm_for_euclid_dist" if is_long else "donot_use_mm_for_euclid_dist"
    rest["compute_mode"] = mode
    labels = found.labels[0], found.labels[1][:-2] + "jk"
    return Product((left, right), labels, found.result, lambda t, _: (tuple(t), rest), is_bilinear=False)


def _einsum(args: Any, kwargs: dict[str, Any]) -> Product | None:
    if not args or not isinstance(args[0], str) or kwargs:
        return None
    operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    equation = args[0].replace(" ", "")
    inputs, arrow, result = equation.partition("->")
    labels = inputs.split(",")
    if len(operands) < 2 or len(labels) != len(operands):
        return None
    if not all(isinstance(tensor, torch.Tensor) for tensor in operands):
        return None
    if not arrow:
        # torch's rule for the result: the dimensions that are named once, capital letters first.
        letters = inputs.replace(",", "").replace(".", "")
        result = "..." * ("..." in inputs) + "".join(sorted(x for x in letters if letters.count(x) == 1))
    free = [letter for letter in string.ascii_letters if letter not in equation]
    counts = [
        tensor.dim() - len(part.replace("...", "")) for tensor, part in zip(operands, labels, strict=True)
    ]
    if max(counts) > len(free):
        return None
    dots = "".join(free[: max(counts)])
    counts = [*counts, len(dots)]
    parts = [
        part.replace("...", dots[len(dots) - count :] if count > 0 else "")
        for part, count in zip((*labels, result), counts, strict=True)
    ]
    shapes_fit = all(len(part) == tensor.dim() for part, tensor in zip(parts, operands, strict=False))
    if not shapes_fit or any(len(set(part)) != len(part) for part in parts):
        return None
    func = _einsum_in_order(args[0], operands) if len(operands) > 2 else None
    return Product(tuple(operands), tuple(parts[:-1]), parts[-1], lambda t, _: ((args[0], *t), {}), func=func)


def _einsum_in_order(equation: str, operands: Sequence[torch.Tensor]) -> Callable[..., Any] | None:
    """An einsum that contracts parts in the order chosen for the whole operands (opt_einsum chooses by size)."""
    from torch.backends import opt_einsum

    if not (opt_einsum.is_available() and opt_einsum.enabled):
        return None
    steps = opt_einsum.get_opt_einsum().contract_path(
        equation, *(tensor.shape for tensor in operands), shapes=True, optimize=opt_einsum.strategy
    )[0]
    path = [*itertools.chain.from_iterable(steps)]

    def einsum(equation: str, *parts: torch.Tensor) -> torch.Tensor:
        return compat.einsum_in_order(equation, parts, path=path)

    return einsum


_PARSERS: dict[str, Callable[[Any, dict[str, Any]], Product | None]] = {
    "__rmatmul__": lambda args, kwargs: _matmul(args, kwargs, reverse=True),
    "baddbmm": _baddbmm,
    "addbmm": _addbmm,
    "addmm": _addmm,
    "linear": _linear,
    "einsum": _einsum,
    "tensordot": _tensordot,
    "inner": _inner,
    "linalg_vecdot": _vecdot,
    "cdist": _cdist,
}
NAMES = frozenset({*_PARSERS, *"matmul __matmul__ bmm mm linalg_matmul".split()} - {"linear"})
FUNCTIONS = frozenset(
    [torch.einsum, torch.tensordot, torch.cdist, torch.linalg.vecdot, torch.linalg.matmul]
    + [getattr(torch, name) for name in "matmul bmm mm baddbmm addbmm addmm inner".split()]
    + [
        getattr(torch.Tensor, name)
        for name in "matmul __matmul__ __rmatmul__ bmm mm baddbmm addbmm addmm inner".split()
    ]
)
