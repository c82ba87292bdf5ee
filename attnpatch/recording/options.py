"""CaptureOptions: the arguments of ``capture``, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from attnpatch.blocks.heads import Heads, checked_heads
from attnpatch.blocks.spec import Blocks
from attnpatch.errors import CaptureError
from attnpatch.recording.layers import listed_numbers
from attnpatch.recording.statistics import checked_measures

Steps = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class CaptureOptions:
    """The arguments of ``capture``, which documents them, and what other functions ask for beside them.

    Blocks and layers are checked later, when it is known if they are for text or for an image (``pair``, ``for_image``;
    ``layers.chosen_sites``, ``diffusion/denoising.Plan``).

    Raises:
        CaptureError: A value is not accepted, or options do not go together.
    """

    blocks: Any = None
    heads: Heads = "mean"
    layers: str | Sequence[int] | None = None
    sites: str | None = None
    steps: Steps = "mean"
    measures: Sequence[str] = ()
    sample_rows: int | None = None
    seed: int = 0
    weighting: str = "probability"
    # Only the last rows of each sequence in a call, at most this many.
    window: int | None = None
    # Makes ``Statistics`` other than those of ``measures``: ``(batch, heads, tokens, heads of keys or None)``.
    statistics: Callable[[int, int, int, int | None], Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", checked_heads(self.heads))
        object.__setattr__(self, "measures", checked_measures(self.measures))
        if not (isinstance(self.steps, str) and self.steps in ("mean", "all")):
            numbers = listed_numbers(self.steps)
            if numbers is None:
                raise CaptureError(
                    f"steps={self.steps!r} is not accepted; give 'mean', 'all', 'last' or a list of numbers such as [0, -1]"
                )
            object.__setattr__(self, "steps", numbers)
        if self.sample_rows is not None and (type(self.sample_rows) is not int or self.sample_rows < 1):
            raise CaptureError(
                f"sample_rows={self.sample_rows!r} is not accepted; give 1 or more rows per block, or None for all of them"
            )
        if self.sites is not None and not (isinstance(self.sites, str) and self.sites):
            raise CaptureError(
                f"sites={self.sites!r} is not accepted; give a pattern of module paths such as 'decoder.*', or None for all"
            )
        if type(self.seed) is not int or not -(2**63) <= self.seed < 2**64:
            raise CaptureError(f"seed={self.seed!r} is not accepted; give a whole number such as 0")
        if not isinstance(self.weighting, str) or self.weighting not in ("probability", "gradient"):
            raise CaptureError(
                f"weighting={self.weighting!r} is not accepted; give 'probability' or 'gradient'"
            )
        if self.is_of_gradient and (self.measures or self.sample_rows is not None):
            raise CaptureError(
                "measures and sample_rows need probabilities; leave them out with weighting='gradient'"
            )

    @property
    def is_of_gradient(self) -> bool:
        """True if each probability is multiplied by its gradient."""
        return self.weighting == "gradient"

    @property
    def is_per_step(self) -> bool:
        """True if each step has its own map."""
        return self.steps != "mean"

    @property
    def chosen_steps(self) -> Sequence[int] | None:
        """Numbers of the steps to show; ``None``: all that are kept separate."""
        return None if isinstance(self.steps, str) else self.steps

    @property
    def pair(self) -> tuple[Blocks, Blocks]:
        """The blocks of queries and of keys.

        Raises:
            CaptureError: No blocks are given, or the value is something else.
        """
        if self.blocks is None:
            raise CaptureError(
                "say what a block is, such as blocks=Blocks.fixed(128) or Blocks.messages(...)"
            )
        pair = self.blocks if isinstance(self.blocks, tuple) else (self.blocks, self.blocks)
        if len(pair) != 2 or not all(isinstance(item, Blocks) for item in pair):
            raise CaptureError(
                f"blocks={self.blocks!r} is not accepted; give Blocks.fixed(128), Blocks.spans(...), "
                "Blocks.messages(...), or a pair of them for queries and keys"
            )
        return pair

    def for_image(self) -> CaptureOptions:
        """The same options, checked for an image.

        Raises:
            CaptureError: An option works for text only.
        """
        if self.measures or self.sample_rows is not None or self.is_of_gradient:
            raise CaptureError("measures, sample_rows and weighting are not for images; leave them out")
        if self.layers is not None:
            raise CaptureError(
                "layers of a denoiser have no common numbering; give sites='*.attn2' or another pattern"
            )
        return self
