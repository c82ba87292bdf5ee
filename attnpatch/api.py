"""The public functions."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from attnpatch.capturing.capture import capture
from attnpatch.errors import PatchError
from attnpatch.hosts.diffusers.components import compiled_in, parts_of
from attnpatch.patching.model_patches import ByRows, by_rows, not_patched, parts_in, put_in_place
from attnpatch.patching.patch import patch_of, patches_in
from attnpatch.patching.registry import register
from attnpatch.patching.selection import Sites, checked
from attnpatch.policy import Policy
from attnpatch.reporting import Report, joined, report_of

if TYPE_CHECKING:
    from attnpatch.dry_run.explanation import Explanation

# A module, or a pipeline (an object whose components are modules).
Model = TypeVar("Model")


def apply(
    model: Model, sites: Sites | None = None, layers: str | Sequence[int] | None = None, **policy: Any
) -> Model:
    """Run the attention of a model by rows when memory is short, and change nothing else.

    Args:
        model: Any ``torch.nn.Module`` with attention in it, or a pipeline of diffusers or transformers. Of a pipeline,
            every component with attention (``unet`` or ``transformer``, ``vae``, text encoders, ...) is patched.
        sites: Which modules are patched. ``"auto"``: modules whose class name contains Attention or Attn, registered
            modules, and modules that compute softmax of a product of their inputs in their first call.
            ``"registered"``: only registered modules. A pattern, such as ``"model.layers.*.self_attn"`` (``explain``
            prints them) or ``"decoder.*"``: the attention modules that match. A list of patterns and of module paths,
            such as ``["encoder.mixer"]``: these modules. ``None``: the sites of an earlier ``apply``, otherwise
            ``"auto"``.
        layers: Only attention in these layers, by the model's own numbers, as ``capture`` takes them. Negative numbers
            count layers with attention from the last one, and ``"last"`` is that one. ``None`` or ``"all"``: all.
        **policy: Fields of ``Policy``, such as ``min_free="8GB"``. Applying again replaces the policy, even that of a
            component that was patched separately. If other ``sites`` or ``layers`` are given, the sites are replaced
            too, and their counts restart at 0.

    Returns:
        The same model.

    Raises:
        PolicyError: A field is unknown or its value is invalid; the model is unchanged.
        PatchError: No attention is recognised in the model, a pattern matches nothing in it, or a part of the model is
            patched on its own.
    """
    rule, chosen = Policy.of(policy), checked(sites, layers)
    with contextlib.ExitStack() as undo:
        patches = put_in_place(model, rule, undo, chosen, replaces=True)
        undo.pop_all()
    for patch in patches:
        patch.policy = rule
    return model


def remove(model: Model) -> Model:
    """Remove the patch: every object that ``apply`` changed gets its old attributes back.

    Given a pipeline, all components are unpatched. Given a part of a patched model, only that part is unpatched: a tool
    may have taken the model apart since (PEFT's ``unload`` returns the inner model of the one that was patched).

    Returns:
        The same model.

    Raises:
        PatchError: Nothing in the model is patched.
    """
    parts = parts_in(model)
    found = [(part, [patch] if (patch := patch_of(part)) else patches_in(part)) for part in parts.values()]
    if not any(patches for _, patches in found):
        raise not_patched(model)
    for part, patches in found:
        for patch in patches:
            patch.take_out(part)
    return model


@contextlib.contextmanager
def patched(
    model: Model, sites: Sites | None = None, layers: str | Sequence[int] | None = None, **policy: Any
) -> Iterator[Model]:
    """Patch a model inside a ``with`` block only. The patch is removed at the end, also after an exception.

    If the model is patched already, the given policy holds inside the block and the old one afterwards; its sites stay.

    Args:
        model: A module or a pipeline, as ``apply`` takes it.
        sites, layers, **policy: As ``apply`` takes them.

    Raises:
        PolicyError, PatchError: As ``apply``.
    """
    rule, chosen = Policy.of(policy), checked(sites, layers)
    with contextlib.ExitStack() as undo:
        for patch in put_in_place(model, rule, undo, chosen):
            undo.callback(setattr, patch, "policy", patch.policy)
            patch.policy = rule
        yield model


def report(model: Any) -> Report:
    """What each attention site did since the model was patched; prints as a table.

    Given a pipeline, one table covers all components; a site's name begins with its component's name. A function that
    ``by_rows`` wraps can be given, too.

    Raises:
        PatchError: The model is not patched.
    """
    model = model.module if isinstance(model, ByRows) else model
    patches = {name: patch for name, part in parts_in(model).items() if (patch := patch_of(part)) is not None}
    if not patches:
        raise not_patched(model)
    reports = {name: report_of(patch) for name, patch in patches.items()}
    found = reports[""] if "" in reports else joined(type(model).__name__, reports)
    return dataclasses.replace(found, compiled=compiled_in(model))


def explain(
    model: nn.Module,
    seq_len: int | None = None,
    batch: int = 1,
    *,
    device: Any = None,
    inputs: Any = None,
    **policy: Any,
) -> Explanation:
    """Predict what each attention site would do in one forward pass and what memory it would hold; prints as a table.

    The model's own forward runs twice on shapes: natively and under the policy, in evaluation mode and without
    gradients (or in inference mode, if called inside ``torch.inference_mode()``). No values are computed, no memory is
    taken, and the model is unchanged afterwards. The model may be on ``meta``. Free memory is counted as the memory
    that is free now, less what the model would have taken before its attention begins.

    Args:
        model: Any ``torch.nn.Module`` with attention in it, patched or not.
        seq_len: Tokens per sequence; for an encoder-decoder model, on either side.
        batch: Number of sequences.
        device: Where the model would run. ``None``: where it is; for a model on ``meta`` the accelerator, or the CPU if
            there is none.
        inputs: The model's arguments (a dict, a tuple or a tensor), instead of made-up token ids. Only their shapes and
            dtypes are read.
        **policy: Fields of ``Policy``; they override those of the policy that the model is patched with.

    Returns:
        ``Explanation``; sizes in bytes.

    Raises:
        ExplainError: The model cannot run on shapes (it branches on values, or an operation has no implementation for
            shapes), or its inputs cannot be made from ``seq_len``.
        PolicyError, PatchError: As ``apply``.
    """
    patch = patch_of(_one_model(model))
    Policy.of(policy)  # an unknown field raises a PolicyError here, and a TypeError in the next line
    rule = Policy(**{**(vars(patch.policy) if patch is not None else {}), **policy})
    from attnpatch.dry_run.explanation import explanation_of  # imported on first use

    return explanation_of(model, rule, seq_len, batch, device, inputs)


def _one_model(model: Any) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    parts = parts_of(model)
    if parts is None:
        raise PatchError(f"a torch.nn.Module is needed, not {type(model).__name__}")
    first = next((name for name in ("unet", "transformer") if name in parts), next(iter(parts)))
    raise PatchError(
        f"a torch.nn.Module is needed, not the pipeline {type(model).__name__}; give one of its components, such as "
        f"pipe.{first}"
    )


__all__ = ["apply", "by_rows", "capture", "explain", "patched", "register", "remove", "report"]
