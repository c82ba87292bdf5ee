"""What the sweeps over all models of a library share: runs that are compared, attention that is seen, processes apart.

Each model runs in a process of its own, forked when everything is imported, so that a crash costs one line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import resource
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as modules
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import attnpatch
from attnpatch.patching.recognition import INPUT, PROBABILITIES, SCORES, Watch
from attnpatch.rows.deferred.tensor import DeferredTensor
from attnpatch.rows.matmul import products

SECONDS, BYTES = 60, 12 * 2**30
ROWS = 7


def tensors(output: Any) -> list[torch.Tensor]:
    """Every tensor of an output, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    elif dataclasses.is_dataclass(output):
        output = [getattr(output, field.name) for field in dataclasses.fields(output)]
    elif not isinstance(output, (list, tuple, zip)):
        # A distribution of an autoencoder, a cache.
        output = list(vars(output).values()) if hasattr(output, "__dict__") else []
    return [tensor for each in output for tensor in tensors(each)]


def run(model: nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        return [tensor.clone() for tensor in tensors(model(**inputs))]


def first_that_runs(
    model: nn.Module, candidates: Iterable[dict[str, Any]]
) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """The first inputs that a model takes, and what it makes of them.

    Raises:
        Exception: None will do; the error of those that came furthest says what is missing.
    """
    problems = []
    for inputs in candidates:
        try:
            return inputs, run(model, inputs)
        except Exception as error:
            problems.append(error)
    raise max(problems, key=lambda error: len(traceback.extract_tb(error.__traceback__)))


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """Whether two runs have the same bits; a NaN is equal to a NaN."""
    return len(left) == len(right) and all(map(_same, left, right))


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if not left.is_floating_point():
        return torch.equal(left, right)
    return torch.equal(left.isnan(), right.isnan()) and torch.equal(left.nan_to_num(), right.nan_to_num())


def difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """The largest difference of two runs, relative to the largest value of its tensor; infinite if shapes differ."""
    if len(left) != len(right) or any(a.shape != b.shape for a, b in zip(left, right, strict=True)):
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(left, right, strict=True) if a.numel()]
    return max(
        (
            float((a - b).nan_to_num().abs().max() / b.nan_to_num().abs().max().clamp_min(1e-30))
            for a, b in pairs
        ),
        default=0.0,
    )


def agrees_in_double(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether all that differs is rounding: in float64 the outputs agree to 1e-12. The model stays in float64."""
    inputs = tree_map(
        lambda v: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v, inputs
    )
    model.double()
    if hasattr(model, "set_experts_implementation"):
        # Grouped products of experts know no float64.
        model.set_experts_implementation("eager")
    native = run(model, inputs)
    with attnpatch.patched(model, mode="always", rows=ROWS):
        got = run(model, inputs)
    return difference(got, native) <= 1e-12


# --------------------------------------------------------------------------------------- attention that is seen


_COMPLETE = frozenset(["scaled_dot_product_attention", "multi_head_attention_forward"])


def _is_weight(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter) or tensor.dim() < 3


def _raised(where: str, error: Exception) -> None:
    raise error


class Seen(Watch):
    """Follows a model's inputs, and writes down which module was running when attention was computed.

    Wider than what it inherits: that looks at the inputs of one module, this at everything that a model computes.

    Attributes:
        rows: By the modules that were running, innermost first: the most query rows of an attention call.
    """

    def __init__(self, inputs: Any) -> None:
        super().__init__(inputs, _raised)
        self.rows: Counter[tuple[nn.Module, ...]] = Counter()
        self.running: list[nn.Module] = []

    def _became(self, name: str, given: Any, result: Any, most: int) -> int:
        known = [mark for _, mark in given if mark]
        is_product = name in products.NAMES and len(given) > 1
        if is_product and known.count(PROBABILITIES) > 1:
            return PROBABILITIES  # a power of a matrix: no values yet
        if name in _COMPLETE or (is_product and PROBABILITIES in known):
            stack = tuple(reversed(self.running))
            self.rows[stack] = max(self.rows[stack], self._query_rows(name, given))
            return INPUT
        # Queries may be learned: then they depend on no input.
        if is_product and (
            len(known) > 1 or not any(_is_weight(tensor) for tensor, mark in given if not mark)
        ):
            return SCORES
        if is_product and most == INPUT:
            return INPUT  # a layer, its weight on either side
        if name == "exp" and most == SCORES:
            return PROBABILITIES  # whose sum is taken off before
        return super()._became(name, given, result, most)

    def _query_rows(self, name: str, given: list[tuple[torch.Tensor, int]]) -> int:
        first = given[0][0]
        if name == "scaled_dot_product_attention":
            return first.shape[-2]
        if name == "multi_head_attention_forward":
            return first.shape[0]
        product = self._product
        if product is None:
            return 2
        first, second = product.pair()
        is_first = any(t is product.operands[first] for t, mark in given if mark == PROBABILITIES)
        own = product.only(first, second) if is_first else product.only(second, first)
        sizes = product.sizes()
        return max((sizes[label] for label in own), default=1)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self._product = products.parse(name, args, kwargs or {}) if name in products.NAMES else None
        return super().__torch_function__(func, types, args, kwargs)


@contextlib.contextmanager
def seen(inputs: Any) -> Iterator[Seen]:
    """Watch a call of a model that is not patched."""
    watch = Seen(inputs)

    def enter(module: nn.Module, args: Any) -> None:
        watch.running.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        watch.running.pop()

    hooks = [
        modules.register_module_forward_pre_hook(enter),
        modules.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        with watch:
            yield watch
    finally:
        for hook in hooks:
            hook.remove()


class Whole(TorchDispatchMode):
    """Notes what makes a tensor of tokens x tokens, as often as one is made.

    Args:
        sizes: Numbers of tokens; primes, so that no other shape has their products.

    Attributes:
        made: By operation and the model's own function that called it.
    """

    def __init__(self, sizes: Iterable[int]) -> None:
        super().__init__()
        sizes = set(sizes)
        self.products = [a * b for a in sizes for b in sizes]
        self.made: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage_of(tensor) for tensor in plain_tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in plain_tensors(result):
            count = tensor.untyped_storage().nbytes() // tensor.element_size()
            if count and storage_of(tensor) not in given and not all(count % each for each in self.products):
                self.made[f"{func._schema.name.rpartition('::')[2]} in {_caller()}"] += 1
        return result


def plain_tensors(value: Any) -> list[torch.Tensor]:
    """Tensors with memory of their own in a structure; not those that are deferred."""
    return [
        t for t in tree_leaves(value) if isinstance(t, torch.Tensor) and not isinstance(t, DeferredTensor)
    ]


def storage_of(tensor: torch.Tensor) -> int:
    """What tells the memory of a tensor from other memory, as long as it lives."""
    return tensor.untyped_storage()._cdata


def _caller() -> str:
    """The innermost function of the model that runs."""
    for frame, _ in traceback.walk_stack(None):
        if "transformers" in frame.f_code.co_filename:
            return getattr(frame.f_code, "co_qualname", frame.f_code.co_name)
    return "?"


# ------------------------------------------------------------------------------------------------ processes apart


def _child(examine: Callable[[str], Any], name: str, pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    pipe.send(examine(name))


def apart(examine: Callable[[str], Any], name: str, failed: Callable[[str, str], Any]) -> Any:
    """``examine(name)`` in a forked process; ``failed(name, why)`` if it takes too long or dies."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    child = fork.Process(target=_child, args=(examine, name, theirs))
    child.start()
    theirs.close()
    try:
        if not ours.poll(SECONDS):
            return failed(name, f"took more than {SECONDS} s")
        return ours.recv()
    except EOFError:
        return failed(name, "the process died")
    finally:
        child.kill()
        child.join()


def reason(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:160]


def listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} x{count}" for name, count in sorted(counts.items()))


def table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]


def at_first_level(levels: Iterable[int], attempt: Callable[[int], Any]) -> tuple[Any, str]:
    """What an attempt gives at the first size of a model at which nothing raises, or else why the first one failed."""
    problems = []
    for level in levels:
        try:
            return attempt(level), ""
        except Exception as error:
            problems.append(error)
            if "-v" in sys.argv:
                traceback.print_exc()
    return None, reason(problems[0])
