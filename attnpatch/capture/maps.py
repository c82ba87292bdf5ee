"""What a capture hands out: block maps, by kind of attention site and by sequence."""

from __future__ import annotations

from attnpatch.capture.block_map import BlockMap
from attnpatch.capture.recorder import Recorder
from attnpatch.errors import CaptureError


class Maps:
    """Block maps of a capture: filled while the model runs, read afterwards."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    @property
    def block_map(self) -> BlockMap:
        """The block map of the last sequence, where all captured sites are of one kind.

        Raises:
            CaptureError: Nothing was captured, or there are several kinds (``maps["decoder.*"]`` names one).
        """
        found = self._recorder.maps()
        if len(found) > 1:
            raise CaptureError(
                f"several kinds of attention were captured; choose one: maps[{'] or maps['.join(map(repr, found))}]"
            )
        return next(iter(found.values()))

    def __getitem__(self, sites: str) -> BlockMap:
        """The block map of one kind of site, by its pattern as ``maps.keys()`` gives it."""
        found = self._recorder.maps()
        if sites not in found:
            raise CaptureError(f"nothing was captured at {sites!r}; there are: {', '.join(map(repr, found))}")
        return found[sites]

    def keys(self) -> list[str]:
        """Patterns of the captured sites."""
        return list(self._recorder.maps())

    @property
    def sequences(self) -> list[dict[str, BlockMap]]:
        """Block maps of every sequence that was run, by pattern, in order."""
        count = sum(bool(records) for records in self._recorder.sequences)
        return [self._recorder.maps(i) for i in range(count)]

    def __repr__(self) -> str:
        count = sum(bool(records) for records in self._recorder.sequences)
        return f"Maps({count} sequences{', ' + ', '.join(self.keys()) if count else ''})"
