"""Numbered block map files in one folder, which several processes may write to."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnpatch.maps.block_map import BlockMap

SUFFIX = ".safetensors"
_NUMBERED = re.compile(r"\.?(\d{4,})[.-]")


class Folder:
    """Hands out numbers and writes block maps under them.

    Args:
        path: The absolute path of an existing folder.

    Attributes:
        written: How many sequences this process has written.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.written = 0

    def claim(self) -> int:
        """Reserve a number that no file has and no other process gets.

        The claim is a hidden file, created with ``O_EXCL``. Another process may have finished a number and removed its
        claim after the folder was listed. So the folder is listed again once the claim is made.
        """
        number = max(self._taken(), default=0)
        while True:
            number += 1
            try:
                os.close(os.open(self._claim_file(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                continue
            if number not in self._taken(claims=False):
                return number
            self.release(number)

    def write(self, number: int, maps: Mapping[str, BlockMap]) -> None:
        """Write one file per group of sites. Files of an earlier state of the sequence are replaced atomically.

        Raises:
            BlockMapFileError: A file cannot be written.
        """
        for group, block_map in maps.items():
            # A group may be named by a pattern with "*", which some file systems forbid.
            name = "" if len(maps) == 1 else "-" + re.sub(r"[^\w.-]", "_", group)[:150]
            block_map.save(os.path.join(self.path, f"{number:04d}{name}{SUFFIX}"))

    def release(self, number: int) -> None:
        """Remove a claim, after the files were written or could not be written."""
        with contextlib.suppress(OSError):
            os.unlink(self._claim_file(number))

    def _claim_file(self, number: int) -> str:
        return os.path.join(self.path, f".{number:04d}.claim")

    def _taken(self, claims: bool = True) -> set[int]:
        names = [name for name in os.listdir(self.path) if claims or not name.endswith(".claim")]
        return {int(match.group(1)) for match in map(_NUMBERED.match, names) if match}
