"""The options of an analysis."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from attnpatch.errors import AnalysisError, CaptureError, warn_deprecated
from attnpatch.maps.block_map import BlockMap
from attnpatch.maps.fields import NORMALIZATIONS
from attnpatch.recording.layers import layer_numbers
from attnpatch.recording.options import Steps
from attnpatch.recording.statistics import checked_measures

# Tokens per chunk by default.
CHUNK = 2048
# Rows that sum to 1 but for this are the same under the normalisations "none" and "row".
_ROUNDING = 1e-3


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of an analysis. Every ``analyze_...`` method takes them by name; they override the analyzer's.

    Attributes:
        blocks: ``"messages"``, a number of tokens per block, or ``"words"``.
        layers: ``None`` or ``"all"``: all layers; ``"last"``; or numbers, negative ones from the last layer.
        heads: ``"mean"``, ``"all"`` or numbers.
        measures: Further measures: any of ``"received"``, ``"entropy"``, ``"sink"``.
        sample_rows: Measure only this many query rows of each block; ``None``: all rows.
        seed: Seed of the sample.
        weighting: ``"probability"``, or ``"gradient"``: probability times the gradient of the log-probability of
            ``target`` (single pass only).
        target: ``"answer"`` (the assistant's last message), or positions of tokens.
        max_tokens: The largest number of tokens that a conversation may have; ``None``: the model's limit.
        truncate: Which end of a longer conversation is cut off, ``"left"`` or ``"right"``; ``None``: it is refused.
        chunk_size: Tokens per chunk of ``analyze_conversation_chunked``.
        template_options: Arguments for the chat template.
    """

    blocks: str | int = "messages"
    layers: str | Sequence[int] | None = None
    heads: str | Sequence[int] = "mean"
    measures: Sequence[str] = ()
    sample_rows: int | None = None
    seed: int = 0
    weighting: str = "probability"
    target: str | Sequence[int] = "answer"
    max_tokens: int | None = None
    truncate: str | None = None
    chunk_size: int = CHUNK
    template_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def changed(self, given: Mapping[str, Any]) -> Options:
        """The options with some of them replaced.

        Raises:
            AnalysisError: An option is unknown or its value is invalid.
        """
        known = {f.name for f in dataclasses.fields(self)}
        unknown = sorted(set(given) - known)
        if unknown:
            raise AnalysisError(f"unknown option {unknown[0]!r}; there are {', '.join(sorted(known))}")
        found = dataclasses.replace(self, **given)
        is_size = type(found.blocks) is int and found.blocks > 0
        if not is_size and found.blocks not in ("messages", "words"):
            raise AnalysisError(
                f"blocks={found.blocks!r} is not accepted; give 'messages', 'words' or a number of tokens"
            )
        if type(found.chunk_size) is not int or found.chunk_size < 1:
            raise AnalysisError(f"chunk_size={found.chunk_size!r} is not accepted; give 1 token or more")
        try:
            checked_measures(found.measures)
            layer_numbers(found.layers)
        except (CaptureError, ValueError) as error:
            raise AnalysisError(str(error)) from None
        return found

    @property
    def of_capture(self) -> dict[str, Any]:
        """The options that are passed to ``capture``, in its form."""
        return {
            "heads": self.heads,
            "layers": self.layers,
            "measures": self.measures,
            "sample_rows": self.sample_rows,
            "seed": self.seed,
            "weighting": self.weighting,
        }


def check_normalization(normalize: str | None) -> None:
    """Check the name of a normalisation; ``None`` is the default.

    Raises:
        AnalysisError: There is no such normalisation.
    """
    if normalize is not None and normalize not in NORMALIZATIONS:
        raise AnalysisError(
            f"normalize={normalize!r} is not accepted; give {', '.join(map(repr, NORMALIZATIONS))}"
        )


def chosen_steps(steps: Steps | bool) -> Steps:
    """The option ``steps`` of ``capture``; truth values, which ``analyze_generation`` took before, still mean theirs."""
    if not isinstance(steps, bool):
        return steps
    meant = "all" if steps else "mean"
    warn_deprecated(f"steps={steps} is now steps={meant!r}")
    return meant


def warn_of_default(block_map: BlockMap) -> None:
    """Warn if the former default, ``"row"``, would give other numbers."""
    if block_map.is_signed:
        return
    elsewhere = block_map.unassigned_mass.max().item()
    if elsewhere > _ROUNDING:
        warn_deprecated(
            f"normalize is now 'none' by default; it was 'row', which differs here, because up to {elsewhere:.2g} of a "
            "row's attention is on no block. Give normalize='row' for shares, or normalize='none'"
        )
