"""The public functions."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from attnpatch.capturing.capture import capture
from attnpatch.errors import PatchError
from attnpatch.hosts.diffusers.components import compiled_in, parts_of
from attnpatch.patching.model_patches import not_patched, parts_in, put_in_place
from attnpatch.patching.patch import patch_of, patches_in
from attnpatch.patching.registry import register
from attnpatch.patching.selection import Sites
from attnpatch.policy import Policy
from attnpatch.reporting import Report, joined, report_of

if TYPE_CHECKING:
    from attnpatch.dry_run.explanation import Explanation

# A module, or a pipeline: an object with modules for components.
Model = TypeVar("Model")


def apply(model: Model, sites: Sites | None = None, **policy: Any) -> Model:
    """Let the attention of a model go by rows when memory is short, and change nothing else.

    Args:
        model: Any ``torch.nn.Module`` with attention in it; or a pipeline of diffusers or transformers, whose components
            (``unet`` or ``transformer``, ``vae``, text encoders, ...) are patched one by one where they have attention.
        sites: ``"auto"``: what a class name or ``register`` says is attention, and what is recognised in its first
            call: a module that computes softmax of a product of its inputs. ``"registered"``: what ``register`` says.
            Or paths of a model's modules, such as ``["encoder.mixer"]``. ``None``: as they were when applied before,
            else ``"auto"``.
        **policy: Fields of ``Policy``, such as ``min_free="8GB"``. Applying again replaces the policy, of a component
            that was patched on its own too, and the sites (their counts begin anew) where others are asked for.

    Returns:
        The same model.

    Raises:
        PolicyError: A field is unknown or its value cannot be used; the model is as it was.
        PatchError: Nothing in it is recognised as attention, or a part of it is patched on its own.
    """
    rule = Policy.of(policy)
    with contextlib.ExitStack() as undo:
        patches = put_in_place(model, rule, undo, sites, replaces=True)
        undo.pop_all()
    for patch in patches:
        patch.policy = rule
    return model


def remove(model: Model) -> Model:
    """Take the patch out: every touched object is as it was, attribute for attribute.

    Of a part of a patched model too, which then is as it was while the rest stays patched: a tool may have taken the
    model apart since (PEFT's ``unload`` returns what was inside the patched one). Of a pipeline: out of all components.

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
def patched(model: Model, sites: Sites | None = None, **policy: Any) -> Iterator[Model]:
    """Patch a model inside a ``with`` block only; also restored when an exception leaves the block.

    A model that is patched already has the given policy inside the block and its own afterwards; its sites stay.

    Args:
        model: Any ``torch.nn.Module`` with attention in it.
        sites, **policy: As ``apply`` takes them.

    Raises:
        PolicyError, PatchError: As ``apply``.
    """
    rule = Policy.of(policy)
    with contextlib.ExitStack() as undo:
        for patch in put_in_place(model, rule, undo, sites):
            undo.callback(setattr, patch, "policy", patch.policy)
            patch.policy = rule
        yield model


def report(model: Any) -> Report:
    """What each attention site did since the model was patched; prints as a table.

    Of a pipeline: one table of all its components, whose names stand before the sites'.

    Raises:
        PatchError: The model is not patched.
    """
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
    """What each attention site would do and hold in one forward pass, before it runs; prints as a table.

    The model's own forward runs twice on shapes, natively and under the policy, in evaluation mode and without
    gradients (inside ``torch.inference_mode()``, in that mode). No values are computed, no memory is taken, and
    the model is afterwards as it was. A model on ``meta`` will do. Free memory is what is free now, less what the
    model would have taken before its attention begins.

    Args:
        model: Any ``torch.nn.Module`` with attention in it; patched or not.
        seq_len: Tokens per sequence, on either side of an encoder-decoder model.
        batch: Sequences.
        device: Where it would run; ``None``: where it is, and for a model on ``meta`` the accelerator there is,
            else cpu.
        inputs: What to call the model with instead of made-up token ids: a dict, a tuple or a tensor; only shapes
            and dtypes are read.
        **policy: Fields of ``Policy``, over those of the policy the model is patched with.

    Returns:
        ``Explanation``; sizes in bytes.

    Raises:
        ExplainError: The model cannot be run on shapes (it decides by values, or an operation has no
            implementation for shapes), or its inputs cannot be made from ``seq_len``.
        PolicyError, PatchError: As ``apply``.
    """
    patch = patch_of(_one_model(model))
    Policy.of(policy)  # an unknown field is named before it is mixed with others
    rule = Policy(**{**(vars(patch.policy) if patch is not None else {}), **policy})
    from attnpatch.dry_run.explanation import explanation_of  # with the first one that is asked for

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


__all__ = ["apply", "capture", "explain", "patched", "register", "remove", "report"]
