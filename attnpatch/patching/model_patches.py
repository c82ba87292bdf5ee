"""Patches of a model, or of the components of a pipeline."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

from torch import nn

from attnpatch.errors import AttnpatchWarning, PatchError
from attnpatch.hosts import features
from attnpatch.hosts.diffusers.components import parts_of
from attnpatch.patching.patch import Patch, patch_of
from attnpatch.patching.recognition import scripted_attention
from attnpatch.patching.registry import is_attention
from attnpatch.patching.selection import AUTO, Chosen, choose
from attnpatch.policy import Policy
from attnpatch.releases.tested import warn_of_old_ones


def put_in_place(
    model: Any,
    rule: Policy,
    undo: contextlib.ExitStack,
    chosen: Chosen | None = None,
    replaces: bool = False,
) -> list[Patch]:
    """The patches of a model or of a pipeline's components, made where there are none; ``undo`` takes out the new ones.

    If a patch has other sites than are asked for, it is replaced (``replaces``) or a PatchError is raised.
    """
    warn_of_old_ones()
    features.warn_of_missing_names()
    parts = parts_in(model)
    if "" not in parts:
        if chosen is not None and (isinstance(chosen.sites, tuple) or chosen.layers is not None):
            raise PatchError(f"{chosen} names modules of one model; give a component, such as pipe.unet")
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
        patch = left = patch_of(part)
        if patch is not None and patch.is_leaving:
            patch.take_out(part)
            patch = None
        if patch is not None and chosen not in (None, patch.chosen):
            if not replaces:
                raise PatchError(
                    f"this model is patched with {patch.chosen}; leave sites and layers out, or attnpatch.remove() it first"
                )
            choose(part, chosen)  # before the old patch goes
            patch.take_out(part)
            patch = None
        if patch is None:
            try:
                patch = Patch(part, rule, chosen=chosen or AUTO)
            except PatchError as error:
                raise PatchError(f"{name}: {error}" if name else str(error)) from error
            if left is not None:
                patch.watched |= left.watched
            undo.callback(patch.take_out, part)
            _warn_of_scripted(part)
        patches.append(patch)
    return patches


def _warn_of_scripted(model: nn.Module) -> None:
    """Say which attention of a model that is patched stays as it is."""
    scripted = scripted_attention(model)
    if scripted:
        more = f", ... {len(scripted)} in all" if len(scripted) > 3 else ""
        warnings.warn(
            f"the attention of {type(model).__name__} in {', '.join(scripted[:3])}{more} is TorchScript, which cannot be "
            "patched; use the eager model",
            AttnpatchWarning,
            stacklevel=4,
        )


def parts_in(model: Any) -> dict[str, nn.Module]:
    """The components of a pipeline by name; for a model, itself under the name ``""``."""
    if isinstance(model, nn.Module):
        return {"": model}
    parts = parts_of(model)
    if parts is None:
        raise PatchError(
            f"expected a torch.nn.Module or a pipeline whose components are modules, not {type(model).__name__}"
        )
    return parts


def not_patched(model: Any) -> PatchError:
    return PatchError(f"this {type(model).__name__} is not patched; call attnpatch.apply() on it first")
