"""A formula by rows: what it holds, and whether it says what it says natively and in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from live import Live
from torch import nn

import attnpatch


class Attention(nn.Module):
    """A site of one formula."""

    def __init__(self, formula: Callable[..., torch.Tensor], *tables: torch.Tensor) -> None:
        super().__init__()
        self.formula = formula
        self.tables = nn.ParameterList(tables)

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.formula(*tensors, *self.tables)


def check(
    formula: Callable[..., torch.Tensor],
    *tensors: torch.Tensor,
    tables: tuple[torch.Tensor, ...] = (),
    pairs: int,
    is_exact: bool = True,
    rows: int | None = None,
    gradients: bool = True,
) -> attnpatch.report:
    """Natively and by rows, forward and backward.

    Args:
        formula: From tensors and tables to a result.
        tensors: What the module is called with.
        tables: Its parameters.
        pairs: Pairs of a query and a key: no tensor may have so many elements.
        is_exact: Whether the result is that of the module to the last bit.
        rows: Of a step; ``None``: as many as fit a little workspace.
        gradients: Whether to ask for them too.
    """
    model = Attention(formula, *tables)
    with torch.no_grad():
        native = model(*tensors)
        with Live() as whole:
            model(*tensors)
        with attnpatch.patched(model, mode="always", rows=rows, workspace=2**16), Live() as live:
            got = model(*tensors)
            report = attnpatch.report(model)
    size = native.element_size() * pairs
    assert whole.largest >= size, "natively nothing is held: the test shows nothing"
    assert live.largest < size, f"{live.what}\n{report}"
    assert report.totals["materialised"] == 0 and report.totals["by_rows"] > 0, report
    assert type(got) is torch.Tensor and got.shape == native.shape and got.dtype == native.dtype
    exact = Attention(formula, *tables).double()(*(t.double() for t in tensors)).detach()
    if is_exact:
        assert torch.equal(got, native), f"differs by {(got - native).abs().max()}"
    _assert_near(got, native, exact)
    if gradients:
        _check_gradients(model, tensors, rows, size)
    return report


def _check_gradients(
    model: Attention, tensors: tuple[torch.Tensor, ...], rows: int | None, size: int
) -> None:
    asked = [t.detach().requires_grad_() for t in tensors]

    def gradients(model: Attention, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        result = model(*inputs)
        weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape)
        wanted = [*inputs, *model.parameters()]
        found = torch.autograd.grad((result * weights).sum(), wanted, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]

    native = gradients(model, asked)
    with attnpatch.patched(model, mode="always", rows=rows, workspace=2**16), Live() as live:
        got = gradients(model, asked)
    assert live.largest < size, live.what
    exact = gradients(model.double(), [t.detach().double().requires_grad_() for t in asked])
    model.float()
    for one, other, third in zip(got, native, exact, strict=True):
        _assert_near(one, other, third)


def _assert_near(got: torch.Tensor, native: torch.Tensor, exact: torch.Tensor) -> None:
    """No farther from float64 than natively, but for the order of a sum."""
    error, own = ((t.double() - exact).abs().max().item() for t in (got, native))
    assert error <= 4 * own + 1e-6 * exact.abs().max().item(), (error, own)
