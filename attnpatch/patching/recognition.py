"""Finds attention by what it computes (softmax of a product of its inputs), if neither its name nor ``register`` tells.

This takes two steps. First, the code of a module names a softmax and a product; that makes it a candidate only, since
it could be something else (a router of experts with the product that combines them). ``apply`` needs this step to say
at once if a model has nothing to patch. Second, the candidate's first call shows what it computes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from attnpatch.patching.code_names import is_torch, names_of_class, names_of_instance, names_of_methods
from attnpatch.patching.registry import is_attention
from attnpatch.rows.kernels.table import NAMES as KERNELS
from attnpatch.rows.kernels.table import kernel_of, registered
from attnpatch.rows.provenance.tensors import tensors_in

_COMPLETE = frozenset(["scaled_dot_product_attention", "multi_head_attention_forward"])
_PRODUCTS = frozenset("matmul __matmul__ __rmatmul__ linalg_matmul bmm mm baddbmm einsum".split())
_SOFTMAXES = frozenset("softmax special_softmax log_softmax softmin gumbel_softmax".split())
_DIVISIONS = frozenset("div true_divide divide __truediv__ div_".split())
_POWERS = frozenset("exp exp_ exp2 exp2_".split())
_SUMS = frozenset("sum nansum logsumexp special_logsumexp normalize".split())
_WEIGHINGS = frozenset("mul mul_ multiply __mul__ __rmul__".split())
# These sum over their input, so their result is no longer scores, unless only heads were mixed.
_LAYERS = frozenset("linear conv1d conv2d conv3d addmm mv dot addbmm tensordot inner bilinear".split())

# The result holds the first tensor; the second gives only its dtype, its device or its shape.
_LIKENESSES = frozenset("to type_as expand_as view_as reshape_as".split())

# Names as they occur in code: ``FusedSoftmax``, ``matmul1``, ``xsoftmax``; ``contract`` is opt_einsum's.
_SOFTMAX_NAMES = re.compile(r"soft_?(max|min)|sparsemax|entmax", re.IGNORECASE)
_PRODUCT_NAMES = re.compile(r"mat_?mul|(^|_|add|b)mm_?$|einsum|tensordot|^contract$", re.IGNORECASE)

# Stages of a tensor on its way through attention. POWERS: ``exp`` of scores, not divided by its sum yet. WEIGHED:
# probabilities multiplied with values by element, not summed yet.
INPUT, SCORES, POWERS, PROBABILITIES, WEIGHED = 1, 2, 3, 4, 5


def candidates(model: nn.Module) -> set[nn.Module]:
    """Modules of a model whose code names a softmax and a product, or torch's own attention function.

    The code read is a module's forward, the functions that it calls, and the submodules that are not attention
    themselves. At least one of the two names must be the module's own, or that of a part without parameters: otherwise
    a model would be a candidate because one of its layers multiplies matrices and another has a softmax.
    """
    found: set[nn.Module] = set()
    _look(model, found, {})
    return found


def _look(
    module: nn.Module, found: set[nn.Module], seen: dict[nn.Module, tuple[frozenset[str], frozenset[str]]]
) -> tuple[frozenset[str], frozenset[str]]:
    """The names in a module that count as its owner's own code, and all names in it."""
    if module in seen:
        return seen[module]
    seen[module] = _NOTHING  # ends the recursion of a module that holds itself
    kind = type(module)
    own = {*names_of_class(kind), *names_of_instance(module)}
    every: set[str] = set()
    for child in module.children():
        near, far = _look(child, found, seen)
        own |= near | names_of_methods(child, kind)
        every |= far
    every |= own
    is_own = not is_torch(kind) and (kind.forward is not nn.Module.forward or "forward" in vars(module))
    if is_own and _names_attention(own, every):
        if not isinstance(module, torch.jit.ScriptModule):
            found.add(module)
    elif not is_attention(module):
        # A helper without parameters (a product or a masked softmax as a module), or a container.
        is_part = not is_own or next(module.parameters(), None) is None
        seen[module] = frozenset(own if is_part else ()), frozenset(every)
    return seen[module]


def class_name(module: nn.Module) -> str:
    """The name of a module's class; of a scripted module, the name that its class had."""
    return getattr(module, "original_name", None) or type(module).__name__


def scripted_attention(model: nn.Module) -> list[str]:
    """Paths of the TorchScript modules in a model whose graph has a softmax and a product, without those inside others."""
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and not any(
            not outer or name.startswith(outer + ".") for outer in found
        ):
            names = names_of_instance(module)
            if _names_attention(names, names):
                found.append(name)
    return found


_NOTHING: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())


def _names_attention(own: set[str], every: set[str]) -> bool:
    if own & _COMPLETE or own & KERNELS or own & registered:
        return True
    return (_normalises(own) or _multiplies(own)) and _normalises(every) and _multiplies(every)


def _normalises(names: set[str]) -> bool:
    return any(map(_SOFTMAX_NAMES.search, names)) or bool(names & _POWERS and names & _SUMS)


def _multiplies(names: set[str]) -> bool:
    return any(map(_PRODUCT_NAMES.search, names))


# Functions that add a product to their first argument.
_SUMMED_PRODUCTS = frozenset("baddbmm addbmm addmm baddbmm_ addbmm_ addmm_".split())


class Watch(TorchFunctionMode):
    """Follows the inputs of one call of a candidate through three steps: a product of two of them, the softmax of that
    product, and a product with the softmax.

    Args:
        inputs: The arguments of the candidate's call.
        failed: Called with an error in attnpatch's own code, which does not end the call.

    Attributes:
        found: True if all three were seen.
        has_failed: True if something may have been missed.
        is_paused: True while an attention module inside the candidate runs, whose operations do not count.
    """

    sees_kernels = True

    def __init__(self, inputs: Any, failed: Callable[[str, Exception], None]) -> None:
        super().__init__()
        self.failed, self.has_failed = failed, False
        self.found = self.is_paused = False
        self.marks: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._shapes: set[torch.Size] = set()
        self._is_summed = self._is_weighing = False
        for tensor in _tensors_within(inputs, _NESTED):
            self.marks[tensor] = INPUT

    def mark(self, value: Any, as_what: int = INPUT) -> None:
        for tensor in tensors_in(value):
            self.marks[tensor] = as_what
            if as_what == SCORES:
                self._shapes.add(tensor.shape)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        kernel = kernel_of(func)
        name = getattr(func, "__name__", "") if kernel is None else kernel.name
        try:
            # Read the marks before the call: an in-place function changes them.
            given = [(tensor, self._what_is(tensor, name)) for tensor in tensors_in((args, kwargs))]
        except Exception as error:
            self._failed(error)
            given = []
        result = func(*args, **kwargs)
        try:
            self._note(name, given, args, result)
        except Exception as error:
            self._failed(error)
        return result

    def _failed(self, error: Exception) -> None:
        self.has_failed = True
        self.failed("watching an operation of a candidate", error)

    def _note(self, name: str, given: list[tuple[torch.Tensor, int]], args: Any, result: Any) -> None:
        if name in _LIKENESSES:
            given = given[:1]
        most = max((mark for _, mark in given), default=0)
        if most:
            what = INPUT if self.is_paused else self._became(name, given, result, most)
            self.mark(result, what)
            if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
                self.mark(args[:1], what)

    def _what_is(self, tensor: torch.Tensor, name: str) -> int:
        mark = self.marks.get(tensor, 0)
        if mark or name not in _PRODUCTS or tensor.shape not in self._shapes or _is_weight(tensor):
            return mark
        # An unmarked tensor of the scores' shape: made from scores by code that cannot be watched (TorchScript, C++).
        return PROBABILITIES

    def _became(self, name: str, given: list[tuple[torch.Tensor, int]], result: Any, most: int) -> int:
        known = [mark for _, mark in given if mark]
        if name in _COMPLETE or name in KERNELS or name in registered:
            self.found = True
            return INPUT
        if name in _LAYERS and len(known) == 1:
            return most if _is_mixed(given, result, most) else INPUT
        if name in _SUMMED_PRODUCTS:
            # The added tensor (a bias made from scores) is not a factor of the product.
            (_, added), *factors = given
            known_of_factors = max((mark for _, mark in factors), default=0)
            product = self._multiplied(factors, result, known_of_factors) if known_of_factors else 0
            return max(added, product)
        if name in _PRODUCTS or name in _LAYERS:
            return self._multiplied(given, result, most)
        if name in _SUMS and most >= SCORES:
            self._is_summed = True
            self.found = self.found or self._is_weighing or most == WEIGHED
        if most in (SCORES, POWERS):
            is_share = name in _DIVISIONS and len(known) == 2 and min(known) >= SCORES
            if name in _SOFTMAXES or is_share:
                return PROBABILITIES
            if name in _POWERS:
                return POWERS
        if most == PROBABILITIES and name in _WEIGHINGS and self._weighs(given):
            return WEIGHED
        return most

    def _multiplied(self, given: list[tuple[torch.Tensor, int]], result: Any, most: int) -> int:
        known = [mark for _, mark in given if mark]
        if most == INPUT:
            # The left factor may be a learned query (pooling); an unmarked right factor is a linear layer's weight.
            return SCORES if len(known) > 1 or not given[0][1] else INPUT
        if len(known) == 1 and _is_mixed(given, result, most):
            return most
        # The values need not come from the inputs (a grid of coordinates).
        self._is_weighing = self._is_weighing or most == POWERS
        self.found = self.found or most >= PROBABILITIES or (self._is_weighing and self._is_summed)
        return INPUT

    def _weighs(self, given: list[tuple[torch.Tensor, int]]) -> bool:
        """True if all probabilities are multiplied by another tensor, element by element."""
        (weights, _), *others = sorted(given, key=lambda pair: -pair[1])
        is_whole = weights.numel() in {shape.numel() for shape in self._shapes}
        return is_whole and any(mark < SCORES and tensor.numel() > 1 for tensor, mark in others)


def _is_weight(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


def _is_mixed(given: list[tuple[torch.Tensor, int]], result: Any, most: int) -> bool:
    """True if the result has as many elements as its input: only heads were mixed, and keys are still there."""
    source = next(tensor for tensor, mark in given if mark == most)
    return isinstance(result, torch.Tensor) and result.numel() == source.numel()


def _tensors_within(value: Any, depth: int) -> list[torch.Tensor]:
    """Tensors in a module's arguments, also inside containers and attributes of objects (a graph, a cache)."""
    if isinstance(value, torch.Tensor):
        return [value]
    if depth == 0 or isinstance(value, (nn.Module, type)):
        return []
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple, set, frozenset)):
        value = getattr(value, "__dict__", {}).values()
    return [tensor for item in list(value) for tensor in _tensors_within(item, depth - 1)]


# How deep in a module's arguments tensors are looked for.
_NESTED = 5
