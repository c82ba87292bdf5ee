"""What a capture hands out: block maps, by kind of attention site and by sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attnpatch.capture.block_map import BlockMap
from attnpatch.capture.recorder import Recorder
from attnpatch.errors import CaptureError


class Maps:
    """Block maps of a capture: filled while the model runs, read afterwards.

    Args:
        recorder: Who collects them.
        steps: Numbers of the steps to show; ``None``: all that were kept apart.
    """

    def __init__(self, recorder: Recorder, steps: Sequence[int] | None = None) -> None:
        self._recorder, self._steps = recorder, steps

    @property
    def block_map(self) -> BlockMap:
        """The block map of the last sequence, where all captured sites are of one kind.

        Raises:
            CaptureError: Nothing was captured, or there are several kinds (``maps["decoder.*"]`` names one).
        """
        found = self._maps()
        if len(found) > 1:
            raise CaptureError(
                f"several kinds of attention were captured; choose one: maps[{'] or maps['.join(map(repr, found))}]"
            )
        return next(iter(found.values()))

    def __getitem__(self, sites: str) -> BlockMap:
        """The block map of one kind of site, by its pattern as ``maps.keys()`` gives it."""
        found = self._maps()
        if sites not in found:
            raise CaptureError(f"nothing was captured at {sites!r}; there are: {', '.join(map(repr, found))}")
        return found[sites]

    def _maps(self, sequence: int = -1) -> dict[str, BlockMap]:
        found = self._recorder.maps(sequence)
        if self._steps is None:
            return found
        return {sites: one.select(step=list(self._steps)) for sites, one in found.items()}

    def measured(self, sites: str | None = None) -> dict[str, torch.Tensor]:
        """What else was asked for with ``measures``, of the last sequence.

        Args:
            sites: The kind of sites, where there are several.

        Returns:
            By name, float32, the batch first where there are several sequences:
            ``"received"`` ``[layers, tokens]``: attention each token receives, summed over the query tokens and averaged
            over heads (the score that H2O evicts by; Zhang et al. 2023); ``[layers, heads, tokens]`` of the heads that
            are kept apart;
            ``"entropy"`` ``[layers, heads]``: mean over query tokens of ``-sum p log p``, in nats;
            ``"sink"`` ``[layers, heads]``: mean mass on the first token (attention sinks; Xiao et al. 2023).

        Raises:
            CaptureError: Nothing was measured, or there are several kinds of sites.
        """
        found = self._recorder.measured()
        if sites is None and len(found) == 1:
            return next(iter(found.values()))
        if sites not in found:
            known = (
                ", ".join(map(repr, found))
                or "nothing; capture with measures=('received', 'entropy', 'sink')"
            )
            raise CaptureError(f"measured at {sites!r} was nothing; there is: {known}")
        return found[sites]

    def keys(self) -> list[str]:
        """Patterns of the captured sites."""
        return list(self._maps())

    @property
    def sequences(self) -> list[dict[str, BlockMap]]:
        """Block maps of every sequence that was run, by pattern, in order."""
        count = self._recorder.num_sequences
        return [self._maps(i) for i in range(count)]

    def __repr__(self) -> str:
        count = self._recorder.num_sequences
        return f"Maps({count} sequences{', ' + ', '.join(self.keys()) if count else ''})"
