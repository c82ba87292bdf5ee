"""Maps, the result of a capture: block maps by kind of attention site and by sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
import torch

from attnpatch.capturing.by_kind import ByKind
from attnpatch.errors import CaptureError
from attnpatch.maps.block_map import BlockMap
from attnpatch.recording.text.gathered import maps_of, measured_of, nothing
from attnpatch.recording.text.recorder import Recorder
from attnpatch.recording.text.sequences import Calls


class Maps(ByKind):
    """Block maps of a capture: filled while the model runs, read afterwards.

    It is a mapping from kinds of attention sites (``keys()``) to the block maps of the last sequence. ``maps[0]`` and
    ``maps[-1]`` are the maps of one sequence, as in ``sequences``.

    Args:
        recorder: Collects the sums.
        steps: Numbers of the steps to show; ``None``: all that were kept separate.
    """

    def __init__(self, recorder: Recorder, steps: Sequence[int] | None = None) -> None:
        self._recorder, self._steps = recorder, steps
        # The maps and problems of each sequence, once nothing is added any more.
        self._made: dict[int, tuple[dict[str, BlockMap], dict[str, str]]] | None = None

    def end(self) -> None:
        """Called when the capture has ended: from now on each map is made once."""
        self._made = {}

    @overload
    def __getitem__(self, sites: str) -> BlockMap: ...
    @overload
    def __getitem__(self, sites: int) -> dict[str, BlockMap]: ...
    def __getitem__(self, sites: str | int) -> BlockMap | dict[str, BlockMap]:
        """The block map of one kind of site (a pattern of ``maps.keys()``), from the last sequence that has it.

        Given a number, the maps of that sequence by kind.
        """
        captured = self._captured()
        if isinstance(sites, bool) or not isinstance(sites, (str, int, np.integer)):
            raise CaptureError(f"maps[{sites!r}]: accepted are a kind of sites and the number of a sequence.")
        if not isinstance(sites, str):
            if not -len(captured) <= sites < len(captured):
                raise CaptureError(f"there is no sequence {sites}; {len(captured)} were captured, from 0 on.")
            return self._of(captured[sites])
        self._check_last(sites)
        for calls in reversed(captured):
            found = self._of(calls)
            if sites in found:
                return found[sites]
        if sites in self._problems:
            raise CaptureError(self._problems[sites])
        known = ", ".join(map(repr, dict.fromkeys(key for calls in captured for key in self._of(calls))))
        raise CaptureError(f"nothing was captured at {sites!r}; there are: {known}{self._why_not(sites)}")

    def _why_not(self, sites: str) -> str:
        reasons = [
            why
            for name, why in self.left_out.items()
            if name in self._recorder.places and self._recorder.place_of(name)[0] == sites
        ]
        return f". It is left out: {reasons[0]}" if reasons else ""

    @property
    def left_out(self) -> dict[str, str]:
        """Sites that are missing from the maps of some or all sequences, each with the fact that is not known there."""
        self._problems: dict[str, str] = {}
        for calls in self._recorder.captured():
            self._of(calls)
        return {**self._recorder.left_out, **self._problems}

    def _captured(self) -> list[Calls]:
        self._problems = {}
        captured = self._recorder.captured()
        if not captured:
            raise nothing(self._recorder)
        return captured

    def _check_last(self, sites: str | None = None) -> None:
        """Check that the last sequence is not left out as a whole: the map of an earlier one would be taken for its map.

        Raises:
            CaptureError: It is left out; or, if ``sites`` are given, all that it has of this kind.
        """
        recorder = self._recorder
        if not recorder.sequences:
            return
        last = recorder.sequences[-1]
        recorded = {name for calls in last.calls for each in (calls, *calls.apart) for name in each}
        if sites is not None:
            recorded = {name for name in recorded if recorder.place_of(name)[0] == sites}
        out = [name for name in recorder.left_out if name in last.out]
        if sites is not None:
            out = [name for name in out if name in recorder.places and recorder.place_of(name)[0] == sites]
        if out and not recorded:
            raise CaptureError(
                f"the last sequence has no map; maps.sequences has the earlier ones. {out[0]}: {recorder.left_out[out[0]]}"
            )

    def _maps(self) -> dict[str, BlockMap]:
        captured = self._captured()
        self._check_last()
        found = self._of(captured[-1])
        if not found:
            raise CaptureError(next(iter(self._problems.values())))
        return found

    def _of(self, calls: Calls) -> dict[str, BlockMap]:
        made = {} if self._made is None else self._made
        if id(calls) not in made:
            made[id(calls)] = maps_of(self._recorder, calls)
        found, problems = made[id(calls)]
        self._problems.update(problems)
        if self._steps is None:
            return dict(found)
        steps = list(self._steps)
        return {sites: one.select(step=steps) if one.steps else one for sites, one in found.items()}

    def _by_sequence(self) -> list[dict[str, BlockMap]]:
        return self.sequences

    def measured(self, sites: str | None = None) -> dict[str, torch.Tensor]:
        """The statistics that were asked for with ``measures``, of the last sequence.

        Args:
            sites: The kind of sites, if there are several.

        Returns:
            float32 tensors by name, with the batch as first dimension if there are several sequences:
            ``"received"`` ``[layers, tokens]``: the attention that each token receives, summed over query tokens and
            averaged over heads (the score by which H2O evicts; Zhang et al. 2023); ``[layers, heads, tokens]`` if heads
            are kept separate;
            ``"entropy"`` ``[layers, heads]``: mean over query tokens of ``-sum p log p``, in nats;
            ``"sink"`` ``[layers, heads]``: mean mass on the first token (attention sinks; Xiao et al. 2023).

        Raises:
            CaptureError: Nothing was measured, or there are several kinds of sites.
        """
        captured = self._recorder.captured()
        self._check_last()
        found = measured_of(self._recorder, captured[-1]) if captured else {}
        if sites is None and len(found) == 1:
            return next(iter(found.values()))
        if sites not in found:
            known = (
                ", ".join(map(repr, found))
                or "nothing; capture with measures=('received', 'entropy', 'sink')"
            )
            raise CaptureError(f"nothing was measured at {sites!r}; there is: {known}")
        return found[sites]

    def keys(self) -> list[str]:
        """Patterns of the captured sites."""
        return list(self._maps())

    @property
    def sequences(self) -> list[dict[str, BlockMap]]:
        """The block maps of every sequence that was run, in order; each a dict by pattern of sites."""
        self._problems = {}
        return [self._of(calls) for calls in self._recorder.captured()]

    def _repr_png_(self) -> bytes | None:
        """The picture that a notebook shows, if there is one map."""
        return self.block_map._repr_png_() if len(self) == 1 else None

    def __repr__(self) -> str:
        found = self._recorder.captured()
        self._problems = {}
        keys = dict.fromkeys(key for calls in found for key in self._of(calls))
        lines = [f"Maps({len(found)} sequences{', ' + ', '.join(keys) if keys else ''})"]
        lines += [f"  left out: {name or '(model)'}: {reason}" for name, reason in self.left_out.items()]
        return "\n".join(lines)
