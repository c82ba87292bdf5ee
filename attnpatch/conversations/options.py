"""What an analysis looks at, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from attnpatch.errors import AnalysisError, CaptureError
from attnpatch.recording.statistics import checked_measures

# Tokens of a piece where nobody says how many.
CHUNK = 2048


@dataclasses.dataclass(frozen=True)
class Options:
    """What to look at, and how. Every ``analyze_...`` method takes them by name, over those of the analyzer.

    Attributes:
        blocks: ``"messages"``, a number of tokens, or ``"words"``.
        layers: ``None`` or ``"all"``: all; ``"last"``; or numbers, negative from the last.
        heads: ``"mean"``, ``"all"`` or numbers.
        measures: Also ``"received"``, ``"entropy"``, ``"sink"``.
        sample_rows: Look at so many query rows of each block; ``None``: at all.
        seed: Of the sample.
        weighting: ``"probability"``, or ``"gradient"``: probability times the gradient of the log-probability of
            ``target`` (single pass only).
        target: ``"answer"``, the last message of the assistant, or positions of tokens.
        max_tokens: The most a conversation may have.
        truncate: What is cut off a longer one, ``"left"`` or ``"right"``; ``None``: it is refused.
        chunk_size: Tokens of a piece of ``analyze_conversation_chunked``.
        template_options: For the chat template.
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
        """With some of them replaced.

        Raises:
            AnalysisError: There is no such option, or its value cannot be used.
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
        except CaptureError as error:
            raise AnalysisError(str(error)) from None
        return found

    def normalization(self, asked: str | None) -> str:
        """Of the map: what was asked for, or shares of the row, which gradients with their signs have none of."""
        if asked is None:
            return "none" if self.weighting == "gradient" else "row"
        return asked

    @property
    def of_capture(self) -> dict[str, Any]:
        """Those that ``capture`` takes too, as it takes them."""
        layers = (
            None if self.layers in (None, "all") else [-1] if self.layers == "last" else list(self.layers)
        )  # type: ignore[arg-type]
        return {
            "heads": self.heads,
            "layers": layers,
            "measures": self.measures,
            "sample_rows": self.sample_rows,
            "seed": self.seed,
            "weighting": self.weighting,
        }
