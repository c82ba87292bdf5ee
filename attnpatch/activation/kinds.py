"""Adds up patches of models of one kind, for the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnpatch.patching.patch import Patch


def added_up(kinds: dict[Any, tuple[Patch, int]], patch: Patch) -> None:
    """Add a patch's counts to the sum for its kind; ``kinds`` maps a kind to this sum and the number of its patches."""
    key = (patch.model_kind, patch.policy, tuple(site.name for site in patch.sites))
    kept, number = kinds.get(key, (None, 0))
    if kept is None:
        kept = patch
    else:
        for mine, other in zip(kept.sites, patch.sites, strict=True):
            mine.add(other)
    kinds[key] = (kept, number + 1)
