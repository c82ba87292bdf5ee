"""A formulation natively and by rows: results, gradients, checkpoints, maps, and the largest tensor that is made.

Nothing here knows how attnpatch works: probabilities are recorded where the unpatched module calls torch's softmax,
tensors where torch's dispatcher returns them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import attnpatch

from .passes import POLICY, Results, agreement, backward, built, cast, forward, said, tensors
from .table import Formulation

BLOCK = 16


@dataclasses.dataclass
class Tried:
    """What became of one formulation; each field is a cell of the table.

    ``float32``, ``bfloat16``, ``autocast``: of the results, without gradients. ``gradients``, ``checkpoint``,
    ``reentrant``: of the results and of every gradient in float32, plain and under both kinds of checkpoints.
    ``largest``: bytes of the largest tensor made by rows, and natively.
    """

    name: str
    float32: str = ""
    bfloat16: str = ""
    autocast: str = ""
    gradients: str = ""
    checkpoint: str = ""
    reentrant: str = ""
    report: str = ""
    captured: str = ""
    largest: tuple[int, int] = (0, 0)
    bound: int = 0

    @property
    def wrong(self) -> list[str]:
        """What is neither right nor refused."""
        cells = {
            f: getattr(self, f)
            for f in ("float32", "bfloat16", "autocast", "gradients", "checkpoint", "reentrant")
        }
        found = [f"{name}: {cell}" for name, cell in cells.items() if cell.startswith(("WRONG", "raises"))]
        return found + (
            [f"captured: {self.captured}"] if self.captured.startswith(("WRONG", "raises")) else []
        )

    @property
    def is_held(self) -> bool:
        """Whether a tensor with rows x keys elements was made."""
        return self.largest[0] > self.bound


class Probabilities(TorchFunctionMode):
    """Keeps the results of softmax that have rows and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "softmax":
            dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else -1)
            self.found.append(result.detach().double().movedim(dim, -1))
        return result


class Largest(TorchDispatchMode):
    """The bytes of the largest storage that an operator returns, beside those that were there before."""

    def __init__(self, before: list[torch.Tensor]) -> None:
        super().__init__()
        self.bytes = 0
        self._before = {t.untyped_storage().data_ptr() for t in before}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors(result):
            if type(tensor) is torch.Tensor and tensor.untyped_storage().data_ptr() not in self._before:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def _dense_map(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor | None:
    """Mass between blocks, averaged over everything else, from probabilities that the module itself computes."""
    with Probabilities() as seen:
        forward(model, inputs)
    if not seen.found:
        return None
    rows = torch.stack(
        [
            p.movedim(0, -2) if p.dim() == 4 and p.shape[0] == p.shape[-1] != p.shape[2] else p
            for p in seen.found
        ]
    )
    if "padding" in inputs:
        apart = rows.unflatten(1, (len(inputs["padding"]), -1)) if rows.dim() == 4 else rows
        return _without_padding(apart, ~inputs["padding"])
    if rows.shape[-2] != rows.shape[-1] and rows.dim() > 4 and rows.shape[-3] ** 2 == rows.shape[-1]:
        rows = rows.flatten(-3, -2)  # rows of a picture
    matrix = rows.flatten(0, -3).mean(0)
    columns = torch.stack([part.sum(-1) for part in matrix.split(BLOCK, -1)], -1)
    return torch.stack([part.mean(0) for part in columns.split(BLOCK, 0)])


def _without_padding(rows: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The same of ``[..., batch, heads, rows, keys]``, whose padding at the end is no token; what is missing counts as 0."""
    found = []
    for b, own in enumerate(real):
        matrix = rows[..., b, :, :, :].flatten(0, -3).mean(0)
        whole = torch.zeros_like(matrix)
        count = int(own.sum())
        whole[:count, :count] = matrix[:count, :count]
        columns = torch.stack([part.sum(-1) for part in whole.split(BLOCK, -1)], -1)
        sizes = [max(1, min(BLOCK, count - start)) for start in range(0, len(own), BLOCK)]
        parts = zip(columns.split(BLOCK, 0), sizes, strict=True)
        found.append(torch.stack([part.sum(0) / size for part, size in parts]))
    return torch.stack(found).mean(0)


def _captured(formulation: Formulation, model: nn.Module, inputs: dict[str, Any]) -> str:
    fixed = attnpatch.Blocks.fixed(BLOCK)
    refusals = []
    for blocks in ((fixed, fixed), fixed):
        try:
            with attnpatch.capture(model, blocks=blocks) as maps:
                forward(model, inputs)
            keys = maps.keys()
            block_map = maps.block_map if len(keys) == 1 else maps[keys[0]]
            # Heads in a loop are attentions of one module, each by its name.
            loop = [maps[key].mass for key in keys if key.partition(":")[0] == keys[0]]
            break
        except attnpatch.errors.AttnpatchError as error:
            refusals.append(said(error))
        except Exception as error:
            return f"raises {said(error)}"
    else:
        return "refused: " + refusals[0].partition(": ")[2]
    if any("mixed" in note for note in block_map.metadata.get("notes", ())):
        return "captured, mixed"
    mass = block_map.mass.double()
    total = mass.sum(-1)
    if bool((total > 1 + 1e-4).any()) or bool((mass < -1e-6).any()) or not bool(mass.isfinite().all()):
        return f"WRONG: rows sum to {total.max():.4g}"
    if formulation.share and bool((total < 1 - 1e-4).any()):
        return f"WRONG: rows sum to {total.min():.4g}"
    if not formulation.plain:
        return "captured"
    expected = _dense_map(model, inputs)
    if len(loop) > 1 and all(one.shape == loop[0].shape for one in loop):
        mass = torch.stack([one.double() for one in loop])
    got = mass.flatten(0, -3).mean(0)
    if expected is None or expected.shape != got.shape:
        return (
            f"WRONG: map {tuple(got.shape)} instead of {None if expected is None else tuple(expected.shape)}"
        )
    off = (got - expected).abs().max().item()
    return "as dense" if off < 1e-5 else f"WRONG: map off by {off:.2g}"


def _reported(model: nn.Module) -> str:
    totals = attnpatch.report(model).totals
    counted = [
        f"{name.replace('_', ' ')} {totals[name]}"
        for name in ("by_rows", "fused", "native")
        if totals.get(name)
    ]
    if totals.get("materialised"):
        operations = {}
        for site in attnpatch.report(model).sites:
            operations |= site.materialised_by
        counted.append("materialised: " + ", ".join(operations))
    if totals.get("failed"):
        counted.append(f"failed {totals['failed']}")
    return ", ".join(counted) or "nothing"


def try_out(formulation: Formulation, everything: bool = True) -> Tried:
    """All cells of a formulation; without ``everything`` no longer sequences."""
    tried = Tried(formulation.name)
    inputs = formulation.inputs(formulation.length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = {
            dtype: built(formulation, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)
        }
        model, wide = models[torch.float32], models[torch.float64]
        exact = _once(lambda: forward(wide, cast(inputs, torch.float64)))
        try:
            with attnpatch.patched(model, **POLICY):
                pass
        except attnpatch.errors.PatchError:
            tried.report = "not recognised"
            return tried
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            one = models[dtype]
            setattr(tried, name, agreement(functools.partial(forward, one), one, cast(inputs, dtype), exact))
        with torch.autocast("cpu", torch.bfloat16):
            tried.autocast = agreement(functools.partial(forward, model), model, inputs, _outside(exact))
        for name, reentrant in (("gradients", None), ("checkpoint", False), ("reentrant", True)):
            run = functools.partial(backward, model, reentrant=reentrant)
            gradients = _once(lambda: backward(wide, cast(inputs, torch.float64)))
            setattr(tried, name, agreement(run, model, inputs, gradients))
        tried.captured = _captured(formulation, model, inputs)
        with contextlib.suppress(Exception), attnpatch.patched(model, **POLICY):
            forward(model, inputs)
            tried.report = _reported(model)
        if everything:
            tried.largest, tried.bound = _largest(formulation, model), 4 * formulation.longer**2
    return tried


def _largest(formulation: Formulation, model: nn.Module) -> tuple[int, int]:
    inputs, sizes = formulation.inputs(formulation.longer), []
    before = [*model.parameters(), *model.buffers(), *tensors(inputs)]
    for mode in ("always", "never"):
        with attnpatch.patched(model, **{**POLICY, "mode": mode}), Largest(before) as largest:
            try:
                forward(model, inputs)
            except Exception:
                largest.bytes = 2**62  # nothing is known of it
        sizes.append(largest.bytes)
    return sizes[0], sizes[1]


def _once(compute: Callable[[], Results]) -> Callable[[], Results]:
    """What float64 gives, computed when it is needed; nothing where the module does not run in float64."""

    @functools.cache
    def found() -> Results:
        try:
            return compute()
        except Exception:
            return {}

    return found


def _outside(compute: Callable[[], Results]) -> Callable[[], Results]:
    def run() -> Results:
        with torch.autocast("cpu", enabled=False):
            return compute()

    return run
