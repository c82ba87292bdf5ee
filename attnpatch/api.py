"""The public functions."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from torch import nn

from attnpatch.capture.blocks import Blocks
from attnpatch.capture.maps import Maps
from attnpatch.capture.observer import SiteFacts
from attnpatch.capture.recorder import Heads, Recorder
from attnpatch.errors import PatchError
from attnpatch.explain import Explanation, explanation_of
from attnpatch.hosts import transformers as host
from attnpatch.hosts.diffusers import compiled_in, parts_of
from attnpatch.patching.choice import Sites, checked, choose
from attnpatch.patching.patch import Patch, patch_of, patches_in
from attnpatch.patching.registry import is_attention, register
from attnpatch.policy import Policy
from attnpatch.report import Report, joined, report_of

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
        patches = _put_in(model, rule, undo, sites, replaces=True)
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
    parts = _parts(model)
    whole = {name: patch_of(part) for name, part in parts.items()}
    found = [(part, [whole[name]] if whole[name] else patches_in(part)) for name, part in parts.items()]
    if not any(patches for _, patches in found):
        raise _not_patched(model)
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
        for patch in _put_in(model, rule, undo, sites):
            undo.callback(setattr, patch, "policy", patch.policy)
            patch.policy = rule
        yield model


@contextlib.contextmanager
def capture(
    model: nn.Module,
    blocks: Blocks | tuple[Blocks, Blocks],
    heads: Heads = "mean",
    layers: Sequence[int] | None = None,
    sites: str | None = None,
) -> Iterator[Maps]:
    """Reduce the attention of a model to block maps while it runs inside the ``with`` block.

    No N x N matrix is held: hand-written attention goes by rows and its probabilities are summed as they pass; beside
    fused attention they are recomputed some rows at a time.

    Args:
        model: A model; patched or not, it is afterwards as it was before.
        blocks: What a block is; a pair for queries and keys where they differ (cross-attention).
        heads: ``"mean"`` over heads, ``"all"`` of them, or a list of head numbers.
        layers: Positions among like sites, negative from the end; ``None``: all.
        sites: Pattern of module paths to capture, such as ``"decoder.*"``; ``None``: all.

    Yields:
        ``Maps``: read ``maps.block_map`` after the model ran. Calls that continue a cache add to the map of their
        sequence, every other call begins a new one.

    Raises:
        CaptureError, BlockError: What was asked for does not fit the model or the sequence.
        PatchError: As ``apply``.
    """
    with contextlib.ExitStack() as undo:
        (patch,) = _put_in(_checked(model), Policy(mode="never"), undo)
        before = patch.recorder
        if before is not None and not before.gives_way:
            raise PatchError("this model is being captured already; end the outer capture first")
        patch.recorder = recorder = recorder_of(patch, type(model), blocks, heads, layers, sites)
        try:
            yield Maps(recorder)
        finally:
            patch.recorder = before


def recorder_of(
    patch: Patch,
    kind: type[nn.Module],
    blocks: Blocks | tuple[Blocks, Blocks],
    heads: Heads = "mean",
    layers: Sequence[int] | None = None,
    sites: str | None = None,
) -> Recorder:
    """What captures the innermost attention sites of a patch, once it is the patch's ``recorder``.

    Args:
        patch: The patch of a model.
        kind: The model's class.
        blocks, heads, layers, sites: As ``capture`` takes them.

    Raises:
        CaptureError: What was asked for does not fit the model.
    """
    names = [site.name for site in patch.sites if site.is_attention]
    # A candidate may turn out to be none, so it hides nobody.
    sure = [site.name for site in patch.sites if site.is_attention and not site.is_candidate]
    innermost = [name for name in names if not any(other.startswith(name + ".") for other in sure)]

    def read_call(args: Any, kwargs: Any, whole: bool) -> host.ModelCall:
        return host.read_call(kind if whole else None, args, kwargs)

    def site_call(call: Any, name: str, args: Any, kwargs: Any) -> SiteFacts:
        cross = host.is_cross(kwargs)
        masks, others = host.masks_of(call, name, cross), host.other_lengths(args, kwargs)
        return SiteFacts(*masks, cross, *host.called_with(args, kwargs), others)

    return Recorder(blocks, heads, layers, sites, innermost, read_call, site_call, patch.model_kind)


def report(model: Any) -> Report:
    """What each attention site did since the model was patched; prints as a table.

    Of a pipeline: one table of all its components, whose names stand before the sites'.

    Raises:
        PatchError: The model is not patched.
    """
    patches = {name: patch for name, part in _parts(model).items() if (patch := patch_of(part)) is not None}
    if not patches:
        raise _not_patched(model)
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
    patch = patch_of(_checked(model))
    Policy.of(policy)  # an unknown field is named before it is mixed with others
    rule = Policy(**{**(vars(patch.policy) if patch is not None else {}), **policy})
    return explanation_of(model, rule, seq_len, batch, device, inputs)


def _put_in(
    model: Any, rule: Policy, undo: contextlib.ExitStack, sites: Sites | None = None, replaces: bool = False
) -> list[Patch]:
    """The patches of a model or of a pipeline's components; ``undo`` takes out those that were not there before.

    Where other sites are asked for than a patch has, it is replaced, or that is refused.
    """
    parts = _parts(model)
    chosen = None if sites is None else checked(sites)
    if "" not in parts:
        if isinstance(chosen, tuple):
            raise PatchError("sites by path are those of one model; give a component, such as pipe.unet")
        attending = {
            name: part
            for name, part in parts.items()
            if any(is_attention(module) for module in part.modules())
        }
        if not attending:
            raise PatchError(
                f"no component of this {type(model).__name__} has an attention module that attnpatch recognises "
                f"({', '.join(parts)}); name its class with attnpatch.register(MyAttention)"
            )
        parts = attending
    patches = []
    for name, part in parts.items():
        patch = patch_of(part)
        if patch is not None and chosen not in (None, patch.chosen):
            if not replaces:
                raise PatchError(
                    f"this model is patched with sites={patch.chosen!r}; leave sites out, or attnpatch.remove() it first"
                )
            choose(part, chosen)  # before the old patch goes
            patch.take_out(part)
            patch = None
        if patch is None:
            try:
                patch = Patch(part, rule, chosen=chosen or "auto")
            except PatchError as error:
                raise PatchError(f"{name}: {error}" if name else str(error)) from error
            undo.callback(patch.take_out, part)
        patches.append(patch)
    return patches


def _parts(model: Any) -> dict[str, nn.Module]:
    """The components of a pipeline by name; a model itself, without one."""
    if isinstance(model, nn.Module):
        return {"": model}
    parts = parts_of(model)
    if parts is None:
        raise PatchError(
            f"a torch.nn.Module, or a pipeline with modules for components, is needed, not {type(model).__name__}"
        )
    return parts


def _checked(model: Any) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    parts = parts_of(model)
    if parts is None:
        raise PatchError(f"a torch.nn.Module is needed, not {type(model).__name__}")
    first = next((name for name in ("unet", "transformer") if name in parts), next(iter(parts)))
    raise PatchError(
        f"a torch.nn.Module is needed, not the pipeline {type(model).__name__}; give one of its components for now, "
        f"such as pipe.{first}"
    )


def _not_patched(model: Any) -> PatchError:
    return PatchError(f"this {type(model).__name__} is not patched; call attnpatch.apply() on it first")


__all__ = ["apply", "capture", "explain", "patched", "register", "remove", "report"]
