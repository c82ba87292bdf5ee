"""A program natively, in float64 and by rows, and what is the same about them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import attnpatch
from attnpatch.errors import AttnpatchError
from attnpatch.rows.graph import axes

from . import helpers
from .programs import POLICIES, Program, compiled, inputs

# Programs are small: so that they come in several steps, a step has fewer rows than elsewhere.
axes.LEAST[axes.ROW] = 4
# By rows an error may be so many times that of the native pass: sums are taken in another order.
FACTOR = 4.0
# Other roundings of the inputs that are tried where the native error says little.
NEIGHBOURS = 12


class Attention(nn.Module):
    """Runs the program it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = helpers.Parts()

    def forward(self, body: Any, *given: Any) -> Any:
        return tuple(body(self.parts, *given))


@functools.cache
def modules() -> tuple[Attention, list[Attention]]:
    """An unpatched module, and a patched one for each policy."""
    patched = [Attention() for _ in POLICIES]
    for module, policy in zip(patched, POLICIES, strict=True):
        attnpatch.apply(module, mode="always", min_tokens=0, **policy)
    return Attention(), patched


@dataclasses.dataclass
class Outcome:
    """What a run gave: every result by name, or the error, and what torch did with hooks that cannot be compared.

    ``refused``: what attnpatch said when a result was read, in its own words.
    """

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: BaseException | None = None
    accident: str = ""
    refused: str = ""


def run(
    program: Program,
    module: nn.Module,
    dtype: torch.dtype,
    wide: bool = False,
    given: dict | None = None,
    only: int | None = None,
) -> Outcome:
    """One forward and one backward pass; ``only``: from the output of that number alone."""
    tensors = dict(given or inputs(program, dtype))
    notes, found = helpers.Notes(), Outcome()
    body = compiled(program, wide)
    leaves = {name: tensors[name] for name in program.grads}
    call = (body, *(tensors[name] for name in ("q", "k", "v", "bias", "sink", "keep")), program.shape, notes)
    casts = (
        torch.autocast("cpu", torch.bfloat16) if program.autocast and not wide else contextlib.nullcontext()
    )
    try:
        with casts:
            if program.around:
                outputs = checkpoint(module, *call, use_reentrant=program.around == "reentrant")
            else:
                outputs = module(*call)
        flags = [output.requires_grad for output in outputs]
        wanted = [output for i, output in enumerate(outputs) if output.requires_grad and only in (None, i)]
        weights = [helpers.ramp(*output.shape, like=output) + 0.25 for output in wanted]
        if wanted:
            torch.autograd.backward(wanted, weights)
    except Exception as error:
        found.error = error
        return found
    finally:
        found.accident = notes.of_torch()
    try:
        # Not earlier: what is computed on demand is to be as it was, whatever the backward pass has overwritten.
        found.values = {f"out {i}": _read(output) for i, output in enumerate(outputs)}
    except AttnpatchError as error:
        found.refused = str(error)
        return found
    found.values |= {f"requires_grad {i}": flag for i, flag in enumerate(flags)}
    found.values |= {f"grad {name}": leaf.grad for name, leaf in leaves.items()}
    # Who runs again until it has seen enough comes to different steps.
    ends_early = program.around == "other" or "use_reentrant=False" in str(program.lines)
    kept = [tensor.grad for tensor, is_again in notes.kept if not (is_again and ends_early)]
    hooked = [grad for grad, is_again in notes.grads if not (is_again and ends_early)]
    found.values |= {f"note {i}": value for i, value in enumerate(notes.log)}
    found.values |= {f"kept {i}": grad for i, grad in enumerate(kept)}
    found.values |= {f"hook {i}": grad for i, grad in enumerate(hooked)}
    return found


def _read(output: torch.Tensor) -> torch.Tensor:
    if type(output) is torch.Tensor:
        return output.detach()
    with torch.no_grad():
        return torch.empty(output.shape, dtype=output.dtype).copy_(output)


def _is_close(got: torch.Tensor, native: torch.Tensor, exact: Any, allowed: float) -> bool:
    """Whether ``got`` is within ``allowed`` of ``exact`` where that and ``native`` are numbers, and is as one of them elsewhere.

    Some kernels for narrow dtypes make NaN of an infinite operand where another one, for another size, makes infinity.
    """
    if not isinstance(exact, torch.Tensor) or exact.shape != got.shape:
        exact = native
    got, native, exact = got.double(), native.double(), exact.double()
    numbers = exact.isfinite() & native.isfinite()
    neither = ~exact.isfinite() & ~native.isfinite()
    if not ((_is_as(got, native) | _is_as(got, exact)) | ~neither).all():
        return False
    error = (got[numbers] - exact[numbers]).abs()
    return bool((error <= allowed).all())  # of what is no number this is false


def _is_as(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one == other) | (one.isnan() & other.isnan())


def difference(
    got: Outcome, native: Outcome, exact: Outcome, dtype: torch.dtype, errors: dict[str, float] | None = None
) -> str | None:
    """What of ``got`` is neither the bits of the native pass nor about as near float64 as it is; ``None``: nothing."""
    if got.error is not None:
        return f"raises {type(got.error).__name__}: {str(got.error).strip().splitlines()[0][:200] if str(got.error).strip() else ''}"
    if got.values.keys() != native.values.keys():
        return f"results differ: {sorted(got.values.keys() ^ native.values.keys())}"
    for name, value in native.values.items():
        other, wide = got.values[name], exact.values.get(name) if exact.error is None else None
        if isinstance(value, float):
            value, other = (torch.as_tensor(x, dtype=torch.float64) for x in (value, other))
            wide = (
                None if wide is None or isinstance(wide, str) else torch.as_tensor(wide, dtype=torch.float64)
            )
        if isinstance(value, list):
            value, other = torch.tensor(value), torch.tensor(other)
            wide = torch.tensor(wide) if isinstance(wide, list) else None
        if hasattr(value, "dtype") and not isinstance(value, torch.Tensor):
            value, other = torch.from_numpy(value), torch.from_numpy(other)
            wide = torch.from_numpy(wide) if wide is not None else None
        if not isinstance(value, torch.Tensor) or not isinstance(other, torch.Tensor):
            if type(value) is not type(other) or value != other:
                return f"{name}: {_said(other)} instead of {_said(value)}"
            continue
        if other.shape != value.shape or other.dtype != value.dtype:
            return f"{name}: {other.dtype} {tuple(other.shape)} instead of {value.dtype} {tuple(value.shape)}"
        other = _read(other)
        if torch.equal(other, value) or (
            value.is_floating_point() and torch.equal(other.nan_to_num(7.0), value.nan_to_num(7.0))
        ):
            continue
        if not value.is_floating_point():
            return f"{name}: other whole numbers"
        own = dtype if dtype == torch.bfloat16 else value.dtype
        scale = value.double().nan_to_num(0, 0, 0).abs().max().item()
        error = errors.get(name, 0.0) if errors else _error(value, wide)
        allowed = FACTOR * max(error, torch.finfo(own).eps * scale)
        if scale > torch.finfo(value.dtype).max / 64:
            # Sums of the largest numbers overflow in one order, and not in another.
            other = torch.where(other.isfinite() & ~value.isinf(), other, value)
        if not _is_close(other, value, wide, allowed):
            worst = (other.double() - value.double()).nan_to_num(0, 0, 0).abs().max().item()
            return f"{name}: off by {worst:.3g}, {allowed:.3g} allowed"
    return None


def _said(value: Any) -> str:
    return f"tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:60]


def _error(value: torch.Tensor, wide: Any) -> float:
    if not isinstance(wide, torch.Tensor) or wide.shape != value.shape:
        return 0.0
    return (value.double() - wide.double()).nan_to_num(0, 0, 0).abs().max().item()


def _sensitivity(program: Program, native: Outcome, exact: Outcome, narrow: torch.dtype) -> dict[str, float]:
    """The largest error of native passes whose inputs are rounded otherwise, by result.

    By rows each output makes gradients of its own, which are rounded before they are summed: where they cancel each other,
    the sum is smaller than their error.
    """
    dtype = getattr(torch, program.dtype)
    errors: dict[str, float] = {}
    count = sum(name.startswith("out ") for name in native.values)
    parts = [run(program, modules()[0], dtype, only=only) for only in range(count if count > 1 else 0)]
    for alone in parts:
        for name, value in alone.values.items():
            if name.startswith("grad ") and value is not None:
                size = value.double().nan_to_num(0, 0, 0).abs().max().item()
                errors[name] = errors.get(name, 0.0) + torch.finfo(narrow).eps * size
    generator = torch.Generator().manual_seed(1)
    for _ in range(NEIGHBOURS):
        given = inputs(program, dtype)
        with torch.no_grad():
            for name in ("q", "k", "v", "bias", "sink"):
                noise = torch.randn(given[name].shape, generator=generator) * torch.finfo(dtype).eps * 2
                given[name].mul_(1 + noise.to(torch.float32)).add_(noise * 0.25)
        other = run(program, modules()[0], dtype, given=given)
        for name, value in other.values.items():
            reference = exact.values.get(name) if exact.error is None else native.values.get(name)
            if isinstance(value, (float, list)) and reference is not None and not isinstance(reference, str):
                value, reference = (
                    torch.as_tensor(value, dtype=torch.float64),
                    torch.as_tensor(reference, dtype=torch.float64),
                )
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                errors[name] = max(errors.get(name, 0.0), _error(value, reference))
    return errors


def _is_same_in_float64(
    program: Program, got: Outcome, native: Outcome, exact: Outcome, dtype: torch.dtype
) -> bool:
    """Whether by rows in float64 everything is as natively, and here as near as a few dozen roundings.

    Where large numbers cancel each other (gradients of a softmax that has one key only) the native error may be none by luck.
    """
    wide = run(program, modules()[1][program.policy], torch.float64, wide=True)
    if difference(wide, exact, exact, torch.float64, _relative(exact, 1e-10)) is not None:
        return False
    roundings = 4 if dtype == torch.bfloat16 else 32
    return (
        difference(got, native, exact, dtype, _relative(native, roundings * torch.finfo(dtype).eps)) is None
    )


def _relative(outcome: Outcome, error: float) -> dict[str, float]:
    """An error relative to the largest element, by result."""
    return {
        name: error * value.double().nan_to_num(0, 0, 0).abs().max().item()
        for name, value in outcome.values.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel()
    }


# A checkpoint inside a program that is not reentrant.
_INNER = re.compile(r"checkpoint\(part, (.*), use_reentrant=False\)")


# Lines after which some rows are in nobody's result, and lines that normalise scores along rows.
_CUT = re.compile(r"narrow\(-2, 1|\[\.\.\., (1|-1):, :\]")
_ALONG_ROWS = re.compile(r"softmax\(-2\)|flatten\(-2\)\.softmax")


def _without_cut_rows(program: Program, got: Outcome, native: Outcome) -> None:
    """What natively is NaN in a gradient because of rows that are in nobody's result: by rows these are not computed.

    There their gradient of zero meets NaN in a row of them (all of it hidden), and whatever was NaN stays so.
    """
    if not any(map(_CUT.search, program.lines)):
        return
    for name, value in native.values.items():
        own = got.values.get(name)
        if name.startswith("grad ") and value is not None and own is not None and own.shape == value.shape:
            got.values[name] = torch.where(value.isnan(), value, own)


def _not_noticed(program: Program, dtype: torch.dtype) -> str:
    """What torch says of a program where it notices; nothing: it is as right there.

    That a saved tensor is overwritten it does not see in a checkpoint, nor if it is written to by ``data``. That an argument
    of a checkpoint was overwritten, or has a hook, does not matter if nothing is saved in that, and it need not run again.
    """
    lines = tuple(
        _INNER.sub(r"part(\1)", re.sub(r"\.data\b(?! =)", ".detach()", line)) for line in program.lines
    )
    around = "" if program.around == "other" else program.around
    saving = tuple(line.replace("return s\ns =", "return Saves.apply(s)\ns =") for line in program.lines)
    for changed in (
        dataclasses.replace(program, lines=lines, around=around),
        dataclasses.replace(program, lines=saving),
    ):
        if changed != program:
            found = run(changed, modules()[0], dtype)
            if "modified by an inplace operation" in str(found.error):
                return f"not noticed: {str(found.error)[:120]}"
            if found.accident:
                return found.accident
    return ""


# A view that is made in place: torch leaves the hook of ``retain_grad`` where it was, and asserts once it is written to.
_TURNING = re.compile(r"\.(squeeze|unsqueeze|transpose|swapaxes|swapdims|t)_\(")
# Scores that are made a leaf, as a line of a program or of a part of it.
_LEAF = re.compile(r"^( *)s\.requires_grad_\(\)$", re.MULTILINE)
_NO_VIEW = r"\1s = s.clone() if s._is_view() and not torch.is_grad_enabled() else s\n\1s.requires_grad_()"


def _is_of_no_view(program: Program, got: Outcome, dtype: torch.dtype, exact: Outcome) -> bool:
    """Whether ``got`` is what the native pass gives where scores that are made a leaf without gradients are no view.

    What an ``autograd.Function`` of no input with a gradient returns (a reentrant checkpoint), torch detaches, and a view not:
    ``einsum`` returns one and ``matmul`` of the same tensors does not.
    """
    lines = tuple(_LEAF.sub(_NO_VIEW, line) for line in program.lines)
    if lines == program.lines:
        return False
    native = run(dataclasses.replace(program, lines=lines), modules()[0], getattr(torch, program.dtype))
    return native.error is None and difference(got, native, exact, dtype) is None


def check(program: Program) -> tuple[str, str]:
    """``ok``, ``rounding``, ``native raises``, ``torch's own``, ``refused`` or ``wrong``, and what was."""
    dtype = getattr(torch, program.dtype)
    plain, patched = modules()
    native = run(program, plain, dtype)
    if native.error is not None:
        return "native raises", str(native.error)[:120]
    if said := native.accident or _not_noticed(program, dtype):
        return "torch's own", said
    got = run(program, patched[program.policy], dtype)
    if got.refused:
        return "refused", got.refused
    _without_cut_rows(program, got, native)
    nothing = Outcome(error=RuntimeError())
    # What a program rounds to on the way is not finer than that.
    narrow = program.autocast or any("bfloat16" in line or ".half()" in line for line in program.lines)
    dtype = torch.bfloat16 if narrow else dtype
    wrong = difference(got, native, nothing, dtype)
    if wrong is None:
        return "ok", ""
    exact = run(program, plain, torch.float64, wide=True)
    if difference(got, native, exact, dtype) is None:
        return "rounding", ""
    if "off by" in wrong or "whole numbers" in wrong:
        errors = _sensitivity(program, native, exact, dtype)
        if any(map(_ALONG_ROWS.search, program.lines)):
            # Scores are computed twice, and their roundings do not cancel each other where one key has all the weight.
            # What terms of about 1 leave that cancel each other is rounding if it is less than a rounding of a rounding.
            least = torch.finfo(dtype).eps ** 2
            errors = {name: max(FACTOR * error, least / FACTOR) for name, error in errors.items()}
        if difference(got, native, exact, dtype, errors) is None:
            return "rounding", ""
        if exact.error is None and _is_same_in_float64(program, got, native, exact, dtype):
            return "rounding", ""
    if wrong.startswith("kept ") and any(map(_TURNING.search, program.lines)):
        return (
            "torch's own",
            "retain_grad is of the shape before a view was made in place, or an INTERNAL ASSERT",
        )
    if _is_of_no_view(program, got, dtype, exact):
        return (
            "torch's own",
            "a view that was made a leaf keeps that outside of a Function, another tensor does not",
        )
    return "wrong", wrong


def shrunk(program: Program, budget: int = 400) -> Program:
    """A smaller program that is wrong in the same way."""

    def kind(candidate: Program) -> str | None:
        nonlocal budget
        budget -= 1
        try:
            verdict, wrong = check(candidate)
        except Exception:
            return None
        return wrong.split(":")[0].split(" ")[0] if verdict == "wrong" else None

    aim = kind(program)
    changed = aim is not None
    while changed and budget > 0:
        changed = False
        for candidate in _smaller(program):
            if budget <= 0:
                break
            if kind(candidate) == aim:
                program, changed = candidate, True
                break
    return program


def _smaller(program: Program) -> Any:
    for i in range(len(program.lines)):
        yield dataclasses.replace(program, lines=(*program.lines[:i], *program.lines[i + 1 :]))
    for i, line in enumerate(program.lines):
        parts = line.split("; ")
        if len(parts) > 1 and "\n" not in line:
            for j in range(len(parts)):
                fewer = "; ".join(parts[:j] + parts[j + 1 :])
                yield dataclasses.replace(program, lines=(*program.lines[:i], fewer, *program.lines[i + 1 :]))
        if line.startswith("def part("):
            rows = line.split("\n")
            for j in range(1, len(rows) - 2):
                fewer = "\n".join(rows[:j] + rows[j + 1 :])
                yield dataclasses.replace(program, lines=(*program.lines[:i], fewer, *program.lines[i + 1 :]))
            inside = "\n".join(row[4:] for row in rows[1:-2])
            yield dataclasses.replace(program, lines=(*program.lines[:i], inside, *program.lines[i + 1 :]))
    simple = Program(program.lines)
    for field in ("autocast", "around", "dtype", "grid", "policy", "dim", "shared", "seed"):
        if getattr(program, field) != getattr(simple, field):
            yield dataclasses.replace(program, **{field: getattr(simple, field)})
    for place, size in enumerate((1, 1, 4, 4)):
        if program.shape[place] != size and (place != 1 or program.shared == 1):
            yield dataclasses.replace(
                program, shape=(*program.shape[:place], size, *program.shape[place + 1 :])
            )
    for name in program.grads:
        yield dataclasses.replace(program, grads=tuple(other for other in program.grads if other != name))
