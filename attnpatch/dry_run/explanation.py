"""Predicts how a model's attention would run and what memory it would hold: a table for people, bytes for programs."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from attnpatch import compat
from attnpatch.compat import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    UnsupportedOperatorException,
)
from attnpatch.dry_run.rehearsal import RehearsalPatch, fake_inputs, on_shapes
from attnpatch.errors import ExplainError, first_line
from attnpatch.hosts.transformers import calls as host
from attnpatch.ledger import Shapes
from attnpatch.memory import free as memory
from attnpatch.patching.recognition import class_name
from attnpatch.plotting.text_table import aligned
from attnpatch.policy import Policy
from attnpatch.recording.layers import pattern_of
from attnpatch.sizes import size_text


@dataclasses.dataclass(frozen=True)
class Group:
    """Attention sites that differ only in their layer number and run the same way.

    Attributes:
        sites: Pattern of their paths, such as ``model.layers.*.self_attn``.
        kind: Class of the modules.
        count: Number of sites.
        kernel: What computes the native call: ``"fused: flash"`` (or another fused kernel of torch), ``"dense math"``
            (SDPA without a fused kernel), ``"hand-written"``, ``"outside torch: flash_attn_func"`` (a kernel), or
            ``"unknown"``.
        temporaries: The most bytes that one native call holds beside its inputs, its output and a cache.
        decision: ``"native"``, ``"by rows"``, ``"fused"`` if ``fuse=True`` runs hand-written attention with a fused
            kernel, or ``"replaced"`` if torch computes the calls of a kernel outside torch, not by rows.
        reason: The reason for the decision, in words.
        rows, heads: Query rows, and batch x heads, of one step; ``None`` if the call stays native.
        temporaries_now: Like ``temporaries``, for the call under the policy.
    """

    sites: str
    kind: str
    count: int
    kernel: str
    temporaries: int
    decision: str
    reason: str
    rows: int | None
    heads: int | None
    temporaries_now: int


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The prediction for one forward pass.

    Attributes:
        model: Class of the model.
        inputs: The inputs, in words.
        device: Where the model would run.
        free: Free bytes on the device now.
        parameters: Bytes of parameters and buffers.
        is_loaded: Whether the parameters are on the device already (not so for a model on ``meta``).
        policy: The policy that was assumed.
        groups: Attention sites, similar ones grouped.
        native_peak: The most bytes that tensors hold at once beyond parameters and inputs, without attnpatch.
        peak: The same under the policy. Neither includes free memory that an allocator keeps for later (on CPU in
            blocks below 32 MiB, on CUDA in its cache).
        assumed: Classes of modules that branch on values (experts), and how often they were called. Their memory beside
            the output is not counted.
        longest: Query rows of the longest call that the policy decided; 0: a fused kernel served all.
    """

    model: str
    inputs: str
    device: torch.device
    free: int
    parameters: int
    is_loaded: bool
    policy: Policy
    groups: tuple[Group, ...]
    native_peak: int
    peak: int
    assumed: dict[str, int] = dataclasses.field(default_factory=dict)
    longest: int = 0

    def __str__(self) -> str:
        later = "" if self.is_loaded else ", not loaded yet"
        lines = [
            f"{self.model}: {self.inputs} on {self.device}, {size_text(self.free)} free; parameters "
            f"{size_text(self.parameters)}{later}",
            f"{self.policy}",
        ]
        header = ["sites", "count", "kernel", "native holds", "now", "now holds", "rows x heads"]
        head, *body = aligned([header, *map(_cells, self.groups)], (1, 3, 5, 6))
        lines.append(head)
        for line, group in zip(body, self.groups, strict=True):
            lines += [line, f"  {group.kind}: {group.reason}"]
        lines.append(
            f"peak beyond parameters and inputs: native {size_text(self.native_peak)}, under the policy "
            f"{size_text(self.peak)}"
        )
        if self.policy.mode == "auto" and 0 < self.longest <= self.policy.min_tokens:
            lines.append(
                f"no call has more than min_tokens={self.policy.min_tokens} query rows, so all stay native whatever is "
                "free; min_tokens=0 (--min-tokens 0) shows what free memory would decide"
            )
        if self.assumed:
            parts = ", ".join(f"{count} x {kind}" for kind, count in self.assumed.items())
            lines.append(f"not counted, because it depends on values: memory inside {parts}")
        return "\n".join(lines)

    __repr__ = __str__


def _cells(group: Group) -> list[str]:
    step = "" if group.rows is None else f"{group.rows} x {group.heads}"
    return [
        group.sites, str(group.count), group.kernel, size_text(group.temporaries), group.decision,
        size_text(group.temporaries_now), step,
    ]  # fmt: skip


def explanation_of(
    model: nn.Module, policy: Policy, seq_len: int | None, batch: int, device: Any, inputs: Any
) -> Explanation:
    """Run a model's forward pass on shapes, natively and under a policy. The arguments are those of ``explain``.

    Raises:
        ExplainError: The model cannot run on shapes, or inputs cannot be made up for it.
        PatchError: The model has no attention.
    """
    # The parameters of a scripted module are kept in C++, where no attribute could be restored.
    scripted = [name for name, part in model.named_modules() if isinstance(part, torch.jit.ScriptModule)]
    if scripted:
        inside = "" if scripted[0] == "" else f" has a part ({scripted[0]}) that"
        raise ExplainError(
            f"{class_name(model)}{inside} is TorchScript, which cannot be run on shapes; explain the eager model"
        )
    said = "inputs as given"
    if inputs is None:
        inputs, said = _made_up(model, seq_len, batch)
    every = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}.values()
    where = _device_of(list(every), device)
    parameters = sum(tensor.nbytes for tensor in every)
    # A model on meta must be loaded before it runs, so its parameters reduce the free memory.
    missing = sum(tensor.nbytes for tensor in every if tensor.device != where)
    free = memory.free_bytes(where)
    is_fixed = bool(os.environ.get(memory.OVERRIDE))
    left = free if is_fixed else max(0, free - missing)
    native, native_peak, _ = _rehearse(model, Policy(mode="never"), where, inputs, left, is_fixed)
    now, peak, assumed = _rehearse(model, policy, where, inputs, left, is_fixed)
    return Explanation(
        type(model).__name__, said, where, free, parameters, not missing, policy, _groups(native, now),
        native_peak, peak, dict(assumed), max((site.seen.asked_rows for site in now.innermost()), default=0),
    )  # fmt: skip


def _rehearse(
    model: nn.Module, rule: Policy, device: torch.device, inputs: Any, free: int, is_fixed: bool
) -> tuple[RehearsalPatch, int, Counter[str]]:
    """Run one forward pass on shapes.

    Returns:
        The patch, with what its sites did; the peak in bytes; and the modules that could not run, with their calls.
    """
    shapes = Shapes()
    with on_shapes(model, shapes, device) as assumed:
        args, kwargs = fake_inputs(inputs, shapes, device)
        patch = RehearsalPatch(model, rule, shapes.ledger, free, is_fixed)
        try:
            with _without_torchs_notes(), torch.no_grad(), shapes, shapes.ledger:
                model(*args, **kwargs)
        except Exception as error:
            raise ExplainError(_said(model, error)) from error
        finally:
            patch.take_out(model)
    return patch, shapes.ledger.peak, assumed


@contextlib.contextmanager
def _without_torchs_notes() -> Iterator[None]:
    """Without the warnings of torch's own code, and without the traceback that its fake tensors log before an error is
    raised: the error itself says what could not run. Warnings of the model's code are shown.
    """
    log = logging.getLogger(FakeTensor.__module__)
    before = log.disabled
    log.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\.")
            yield
    finally:
        log.disabled = before


def _said(model: nn.Module, error: Exception) -> str:
    """One line that says why a model cannot run on shapes, and the way out."""
    name = type(model).__name__
    operation = getattr(error, "func", None)
    first = first_line(error)
    if isinstance(error, UnsupportedOperatorException):
        return (
            f"{name} cannot be run on shapes: {operation} has no implementation for shapes; explain the model "
            "without that operation (unquantised, or with another attention implementation)"
        )
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return (
            f"{name} cannot be run on shapes: it branches on the values of a tensor ({operation}); give inputs= "
            "that avoid the branch, or run the model under attnpatch.patched() and print attnpatch.report()"
        )
    return (
        f"{name} cannot be run on these shapes: {type(error).__name__}: {first}; give the arguments of "
        "its forward as inputs=, or another seq_len"
    )


def _device_of(tensors: Sequence[torch.Tensor], device: Any) -> torch.device:
    """The device: the given one, else the one with most parameters, else the accelerator, else the CPU."""
    if device is None:
        sizes: Counter[torch.device] = Counter()
        for tensor in tensors:
            sizes[tensor.device] += tensor.nbytes
        most = sizes.most_common(1)
        if most and most[0][0].type != "meta":
            return most[0][0]
        device = compat.accelerator() or "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise ExplainError(
            f"device={str(device)!r} cannot be used: {first_line(error)}; give a device of this machine"
        ) from error


# Tokens or sequences; with more, torch cannot count elements.
_MOST = 10**9


def _made_up(model: nn.Module, seq_len: int | None, batch: int) -> tuple[dict[str, torch.Tensor], str]:
    for name, value in (("seq_len", seq_len), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ExplainError(f"{name}={value!r} is not accepted; give a whole number of at least 1")
        if value > _MOST:
            raise ExplainError(f"{name}={value} is more than can be meant; give at most {_MOST:,}")
    assert seq_len is not None
    made = host.made_up_inputs(model, seq_len, batch)
    if made is None:
        raise ExplainError(
            f"inputs of {type(model).__name__} cannot be made from seq_len: it needs more than token ids; give "
            "inputs=, a dict or tuple of tensors (torch.empty(..., device='meta') is enough)"
        )
    return made, f"{batch} x {seq_len} tokens"


def _groups(native: RehearsalPatch, now: RehearsalPatch) -> tuple[Group, ...]:
    """The sites that were called, similar ones grouped, in the model's order."""
    first = {site.name: site.seen for site in native.innermost()}
    sites = [site for site in now.innermost() if site.name in first]
    places = pattern_of([site.name for site in sites])
    found: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
    for site in sites:
        before, after = first[site.name], site.seen
        decision = "by rows" if site.counts["by_rows"] else "native"
        if site.counts["fused"] and before.fused is None and before.outside is None:
            decision = "fused"
        if site.replaced is not None and decision != "by rows":
            decision = "replaced"
        alike = (
            places[site.name][0] or "(model)", site.kind, before.kernel, decision, site.reason(), after.step,
        )  # fmt: skip
        found.setdefault(alike, []).append((before.temporaries, after.temporaries))
    groups = []
    for (name, kind, kernel, decision, reason, step), sizes in found.items():
        most, most_now = (max(column) for column in zip(*sizes, strict=True))
        rows, heads = step or (None, None)
        groups.append(Group(name, kind, len(sizes), kernel, most, decision, reason, rows, heads, most_now))
    return tuple(groups)
