"""Features that depend on names in torch and its hosts, which releases may change; and whether the installed releases
have these names.

If a host lacks the name, the feature is off: the model's own code does the work, and nothing else changes. ``apply``
warns of it once, and ``attnpatch doctor`` says which releases have it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import pathlib
import re
import sys
import warnings
from typing import Any

from attnpatch import compat
from attnpatch.errors import AttnpatchWarning
from attnpatch.releases.tested import TESTED, installed, is_at_least


@dataclasses.dataclass(frozen=True)
class Feature:
    """A feature that reads names of a host.

    Attributes:
        name: What is off without them, in words.
        package, since: The host, and its first release with these names.
        places: Where the names are: a module of the host, and words that must all occur in it. One place is enough.
        found: What ``compat`` found under these names; each is ``None`` if the host has no such name.
    """

    name: str
    package: str
    since: str
    places: tuple[tuple[str, tuple[str, ...]], ...] = ()
    found: tuple[Any, ...] = ()

    @property
    def is_there(self) -> bool | None:
        """Whether the installed host has the names; ``None`` if its sources cannot be read."""
        if self.found:
            return all(each is not None for each in self.found)
        found = [(source_of(module), wanted) for module, wanted in self.places]
        if any(source is None for source, _ in found):
            return None
        return any(
            all(re.search(rf"\b{name}\b", source or "") for name in wanted) for source, wanted in found
        )

    def __str__(self) -> str:
        newest = TESTED.get(self.package, ("", "the newest"))[1]
        return f"{self.name} ({self.package} {self.since} to {newest})"


def features() -> tuple[Feature, ...]:
    """Every feature that depends on names of a host."""
    masks, tables = "transformers.masking_utils", (compat.MASK_TABLE, *compat.MASK_FUNCTIONS)
    compiled = (compat.COMPILED_MODULE, compat.COMPILED_FUNCTION)
    return (
        Feature(
            "masks by rows", "transformers", "4.53",
            ((masks, (*tables, "q_length")), (masks, (*tables, compat.MASK_POSITIONS))),
        ),
        Feature(
            "attention weights under SDPA", "transformers", "4.54",
            (
                ("transformers.utils.output_capturing", (compat.OUTPUT_COLLECTOR, compat.OUTPUT_HOOK)),
                ("transformers.utils.generic", (compat.OUTPUT_WRAPPER,)),
            ),
        ),
        Feature(
            "maps of a generation with a quantised cache", "transformers", "4.57",
            (("transformers.cache_utils", (compat.QUANTIZED_KEYS,)),),
        ),
        Feature(
            "maps of beam search with a quantised cache", "transformers", "5.20",
            (("transformers.cache_utils", (compat.PENDING_BEAMS,)),),
        ),
        Feature(
            "kernels behind attention functions of transformers", "transformers", "4.48",
            (("transformers.modeling_utils", (compat.ATTENTION_TABLE,)),),
        ),
        Feature(
            "kernels behind attention back ends of diffusers", "diffusers", "0.35",
            (("diffusers.models.attention_dispatch", (compat.BACKEND_REGISTRY, compat.BACKENDS)),),
        ),
        Feature(
            "modules offloaded by accelerate", "accelerate", "1.0",
            (("accelerate.hooks", (compat.ACCELERATE_HOOK, compat.ACCELERATE_FORWARD)),),
        ),
        Feature(
            "models that no host builds, under ATTNPATCH=1", "torch", "2.5",
            (("torch.nn.modules.module", (compat.COMPILED_CALL, compat.PLAIN_CALL)),),
        ),
        Feature("compiled modules in a model", "torch", "2.5", (("torch._dynamo.eval_frame", compiled),)),
        Feature(
            "operators of others that write to an argument", "torch", "2.5",
            (("torch._ops", (compat.OPERATOR_SCHEMA,)),),
        ),
        Feature(
            "custom operators as kernels, if they are called through torch.ops", "torch", "2.5",
            (("torch._library.custom_ops", (compat.CUSTOM_OPERATOR,)),),
        ),
        Feature(
            "attention by rows in checkpoints", "torch", "2.5",
            found=(compat.CheckpointFrame, compat.StopRecomputation),
        ),
        Feature("attention by rows in torch's encoder layers", "torch", "2.5", found=compat.ENCODER_OPERATORS),
        Feature(
            "dense math of scaled_dot_product_attention by rows", "torch", "2.5", found=(compat.sdp_choice,)
        ),
        Feature("maps beside fused kernels without computing scores again", "torch", "2.5", found=compat.KERNELS),
    )  # fmt: skip


@functools.cache
def source_of(module: str) -> str | None:
    """A module's source, which is not run; empty if there is none, ``None`` if its package cannot be read."""
    package, *parts = module.split(".")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    folder = next(iter(spec.submodule_search_locations or ()), None) if spec is not None else None
    if folder is None or not (pathlib.Path(folder) / "__init__.py").is_file():
        return None
    path = pathlib.Path(folder, *parts)
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file.read_text(encoding="utf-8", errors="replace")
    return ""


def off() -> list[Feature]:
    """Features that are off with the installed hosts."""
    return [each for each in features() if installed(each.package) and each.is_there is False]


_said: set[str] = set()


def warn_of_missing_names() -> None:
    """Warn once of each feature that is off although the imported host's release should have it."""
    for each in features():
        if each.package not in sys.modules or each.name in _said:
            continue
        _said.add(each.name)
        if each.is_there is False and is_at_least(each.package, each.since):
            warnings.warn(
                f"attnpatch: off with {each.package} {installed(each.package)}: {each}. The model's own code runs there; "
                "attnpatch doctor says more.",
                AttnpatchWarning,
                stacklevel=4,
            )
