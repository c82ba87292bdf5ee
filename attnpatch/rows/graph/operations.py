"""OpNode: a torch function in a graph; its result goes into new memory or into memory that can be reused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from attnpatch.rows.graph.axes import Axis, Dims, Tile, local_shape

if TYPE_CHECKING:
    from attnpatch.rows.evaluate.evaluator import Evaluator

from attnpatch.rows.graph.nodes import Child, Context, Node, map_structure


@dataclasses.dataclass(frozen=True)
class Letters:
    """A letter per dimension, as in ``einsum``, of the two operands and the result of a product.

    A dimension whose letter the result lacks is summed over.
    """

    operands: tuple[str, str]
    result: str

    def has_gradient(self, operand: int) -> bool:
        """True if the gradient of an operand is a product of the result's gradient and the other operand."""
        own, other = (set(self.operands[i]) for i in (operand, 1 - operand))
        return own <= other.union(self.result) and other <= own.union(self.result)


class OpNode(Node):
    """The host's own call, on the tile's part of every argument.

    Attributes:
        work: Number of multiplications per head, if it is a product.
        letters: A letter per dimension of its two children and itself, if it is nothing but their product.
        is_guess: True if it is a product of queries and a table, which may be a linear layer's instead of scores.
        score_width: Elements per row of the widest intermediate tensor.
    """

    work = 0
    letters: Letters | None = None
    is_guess = False
    score_width = 1

    def __init__(
        self,
        func: Callable[..., Any],
        args: Any,
        kwargs: dict[str, Any],
        dims: Dims,
        dtype: torch.dtype,
        device: torch.device,
        whole: tuple[Axis, ...] = (),
    ) -> None:
        self.func = func
        self.dims, self.dtype, self.device, self.whole = dims, dtype, device, whole
        self.context = Context(device)
        self.stops_gradient = getattr(func, "__name__", "") in ("detach", "detach_")
        children: list[Node] = []

        def number(value: Any) -> Any:
            if not isinstance(value, Node):
                return value
            children.append(value)
            return Child(len(children) - 1)

        self.args = map_structure(args, number)
        self.kwargs = map_structure(kwargs, number)
        self.children = tuple(children)

    def compute(self, tile: Tile, run: Evaluator) -> torch.Tensor:
        values = run.operands(self, tile)
        shared = run.shared_operands(self, tile)
        if shared:
            values = [value.detach() if i in shared else value for i, value in enumerate(values)]
            return run.with_wide_gradients(self, shared, values, tile, self.called_with(values, tile, run))
        return self.called_with(values, tile, run)

    def called_with(self, values: list[Any], tile: Tile, run: Evaluator) -> torch.Tensor:
        """The call on these parts of its arguments."""

        def fill(value: Any) -> Any:
            return values[value.index] if isinstance(value, Child) else value

        args, kwargs = map_structure(self.args, fill), map_structure(self.kwargs, fill)
        if self.context.is_current():
            if (out := run.buffer(self, local_shape(self.dims, tile))) is not None:
                return _written_to(out, self.func, args)
            if run.may_overwrite(self) and list(args[0].shape) == local_shape(self.dims, tile):
                return _overwriting(self.func, args, kwargs, run)
            return self.func(*args, **kwargs)
        with self.context.enter():
            return self.func(*args, **kwargs)


# Products, each with a function that computes it and takes ``out=``.
INTO: dict[Any, Callable[..., torch.Tensor]] = {
    torch.matmul: torch.matmul,
    torch.Tensor.matmul: torch.matmul,
    torch.Tensor.__matmul__: torch.matmul,
    torch.bmm: torch.bmm,
    torch.Tensor.bmm: torch.bmm,
    torch.mm: torch.mm,
    torch.Tensor.mm: torch.mm,
    torch.linalg.matmul: torch.matmul,
}


def _written_to(out: torch.Tensor, func: Callable[..., Any], args: Any) -> torch.Tensor:
    """Write the result of a product, a cast or a softmax in another dtype to ``out``; the bits are the same."""
    if func in INTO:
        return INTO[func](*args, out=out)
    out.copy_(args[0])
    # On CPU, softmax in another dtype is a cast followed by a softmax.
    return torch.softmax(out, -1, out=out) if func.__name__ == "softmax" else out


def _overwriting(func: Callable[..., Any], args: Any, kwargs: dict[str, Any], run: Evaluator) -> torch.Tensor:
    """Write the call's result over its first argument; the bits are the same."""
    value = args[0]
    if func.__name__ != "softmax":
        return getattr(value, func.__name__ + "_")(*args[1:], **kwargs)
    # On CPU a contiguous row is read before it is written (aten vec_softmax_lastdim); other layouts use another kernel.
    rows = run.padded(value)
    if not rows.is_contiguous():
        return func(*args, **kwargs)
    # The padding behind the scores gets no probability.
    rows[..., value.shape[-1] :] = -torch.inf
    torch.softmax(rows, -1, out=rows)
    return value
