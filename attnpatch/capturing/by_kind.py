"""What the results of all captures have in common: block maps by kind of attention site, as a mapping."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnpatch.errors import BlockMapFileError, CaptureError
from attnpatch.maps.block_map import BlockMap

if TYPE_CHECKING:
    from attnpatch.maps.ranking import Ranking


class ByKind:
    """A mapping from kinds of attention sites to block maps."""

    def keys(self) -> list[str]:
        """The kinds of attention that were captured."""
        raise NotImplementedError

    def _by_sequence(self) -> list[dict[str, BlockMap]]:
        """The maps of every sequence, or run of a sampler, in order."""
        raise NotImplementedError

    @property
    def block_map(self) -> BlockMap:
        """The block map, if only one kind of attention was captured; that of the last sequence.

        Raises:
            CaptureError: Nothing was captured, or there are several kinds (``maps["decoder.*"]`` names one).
        """
        found = self.keys()
        if len(found) > 1:
            raise CaptureError(
                f"several kinds of attention were captured; choose one: maps[{'] or maps['.join(map(repr, found))}]"
            )
        return self[found[0]]

    def __getitem__(self, sites: str) -> BlockMap:
        raise NotImplementedError

    def __len__(self) -> int:
        """Number of kinds; 0 if nothing was captured."""
        try:
            return len(self.keys())
        except CaptureError:
            return 0

    def __bool__(self) -> bool:
        # An object of maps is no empty list while the model has not run yet.
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, sites: object) -> bool:
        return len(self) > 0 and sites in self.keys()

    def values(self) -> list[BlockMap]:
        """The block maps, in the order of ``keys()``."""
        return [self[sites] for sites in self.keys()]

    def items(self) -> list[tuple[str, BlockMap]]:
        """Kinds and their block maps."""
        return [(sites, self[sites]) for sites in self.keys()]

    def top(self, n: int = 10, query: Any = -1, own: bool = False) -> Ranking:
        """What a block attends to most, as a table; see ``BlockMap.top``.

        Raises:
            CaptureError: As ``block_map`` and ``BlockMap.top``.
        """
        return self.block_map.top(n, query, own)

    def save(self, folder: str | os.PathLike) -> list[Path]:
        """Write every block map into a folder, one safetensors file each; ``attnpatch.load(folder)`` reads them.

        Files are named by kind, with the number of the sequence before it if there are several. Files of the same name
        are replaced, each atomically.

        Returns:
            The files.

        Raises:
            CaptureError: Nothing was captured.
            BlockMapFileError: The folder or a file cannot be written.
        """
        folder, sequences = Path(folder), self._by_sequence()
        written: dict[Path, BlockMap] = {}
        for number, found in enumerate(sequences):
            for sites, one in found.items():
                name = re.sub(r"[^\w.-]+", "_", sites.replace("*", "N")).strip("_") or "model"
                number_of = f"{number:04d}-" if len(sequences) > 1 else ""
                written[folder / f"{number_of}{name}.safetensors"] = one
        if not written:
            self.keys()  # raises an error that says why there is nothing
            raise CaptureError("there is no map to save; maps.left_out says why")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = "it is a file; give a folder" if folder.is_file() else error.strerror or error
            raise BlockMapFileError(f"cannot write into {folder}: {why}") from error
        return [one.save(path) for path, one in written.items()]
