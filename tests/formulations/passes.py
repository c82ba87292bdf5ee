"""Passes of a formulation, natively and by rows, and whether they agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import attnpatch

from .table import Formulation

# By rows an error against float64 may be so many times the native one: sums are taken in another order.
FACTOR = 4.0
POLICY = {"mode": "always", "min_tokens": 4, "rows": 32}


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return (
        [t for item in value for t in tensors(item)]
        if isinstance(value, (list, tuple, type({}.values())))
        else []
    )


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def built(formulation: Formulation, dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = formulation.make().eval()
    return model.to(dtype)


Results = dict[str, torch.Tensor | None]


def forward(model: nn.Module, inputs: dict[str, Any], seed: int = 0) -> Results:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        return {f"result {i}": t for i, t in enumerate(tensors(model(*inputs.values())))}


def backward(model: nn.Module, inputs: dict[str, Any], reentrant: bool | None = None) -> Results:
    """Results, and the gradients of parameters and inputs."""
    model.zero_grad(set_to_none=True)
    leaves = {
        name: value.clone().requires_grad_()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if reentrant is None:
            outputs = model(*leaves.values())
        else:
            outputs = checkpoint(model, *leaves.values(), use_reentrant=reentrant)
        outputs = [t for t in tensors(outputs) if t.requires_grad]
        # A weight for every element of a result: in a plain sum errors would cancel.
        weights = [
            torch.linspace(-1, 1, t.numel(), dtype=torch.float64).sin().to(t.dtype).reshape(t.shape)
            for t in outputs
        ]
        torch.autograd.backward(outputs, weights)
    found: Results = {f"result {i}": t.detach() for i, t in enumerate(outputs)}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    found |= {
        f"gradient of {n}": v.grad
        for n, v in leaves.items()
        if isinstance(v, torch.Tensor) and v.is_floating_point()
    }
    return found


def _verdict(
    native: Results, got: Results, exact: Callable[[], Results], nearby: Callable[[], list[Results]]
) -> str:
    """``bits``, ``rounding`` or what is wrong.

    Args:
        exact: Computes in float64.
        nearby: Natively, with inputs that are rounded otherwise: how much rounding alone changes.
    """
    if native.keys() != got.keys():
        return f"WRONG: {sorted(native.keys() ^ got.keys())}"
    if all(_same(native[name], got[name]) for name in native):
        return "bits"
    wide = exact()
    for name, value in native.items():
        other = got[name]
        if (value is None) != (other is None):
            return f"WRONG: no {name}" if other is None else f"WRONG: there is a {name}"
        if value is None or _same(value, other):
            continue
        if value.shape != other.shape or value.dtype != other.dtype:
            return f"WRONG: {name} is {other.dtype} {tuple(other.shape)}"
        reference = wide.get(name)
        reference = value if reference is None or reference.shape != value.shape else reference
        error = (value.double() - reference.double()).abs().max().item()
        off = (other.double() - reference.double()).abs().max().item()
        least = torch.finfo(value.dtype).eps * value.double().abs().max().item()
        if not off <= FACTOR * max(error, least):
            others = [r[name].double() for r in nearby() if r.get(name) is not None]
            error = max([error, *((other - reference.double()).abs().max().item() for other in others)])
        if not off <= FACTOR * max(error, least):
            return f"WRONG: {name} off by {off:.2g}, natively {error:.2g}"
    return "rounding"


def _same(value: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if value is None or other is None:
        return value is other
    if value.shape != other.shape or value.dtype != other.dtype:
        return False
    return torch.equal(value * 1, other * 1) or torch.equal(
        (value * 1).nan_to_num(7.0), (other * 1).nan_to_num(7.0)
    )


def said(error: BaseException) -> str:
    """The error's type, and the beginning of its message without the part that all refusals share."""
    text = str(error).strip().removeprefix("no attention could be mapped. (model): ").splitlines()
    return f"{type(error).__name__}: {text[0][:90] if text else ''}"


def _nudged(inputs: dict[str, Any], seed: int) -> dict[str, Any]:
    """Inputs whose numbers are changed by about their rounding."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return value * (1 + torch.randn(value.shape, generator=generator) * torch.finfo(value.dtype).eps).to(
            value.dtype
        )

    return {name: nudge(value) for name, value in inputs.items()}


def agreement(
    run: Callable[[dict[str, Any]], Results],
    model: nn.Module,
    inputs: dict[str, Any],
    exact: Callable[[], Results],
) -> str:
    try:
        expected = run(inputs)
    except Exception as error:
        return f"natively {said(error)}"
    try:
        got = _rows(model, lambda: run(inputs))
    except Exception as error:
        return f"raises {said(error)}"
    return _verdict(expected, got, exact, lambda: [run(_nudged(inputs, seed)) for seed in range(6)])


def _rows(model: nn.Module, run: Callable[[], Results]) -> Results:
    with attnpatch.patched(model, **POLICY):
        # What is computed late is computed while the module is patched.
        return {name: value if value is None else value.detach().clone() for name, value in run().items()}
