"""``load``: reads whatever attnpatch has saved."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from attnpatch.conversations.result import Analysis
from attnpatch.errors import AttnpatchWarning, BlockMapFileError, PageError
from attnpatch.maps import io
from attnpatch.maps.block_map import BlockMap
from attnpatch.viewing.files import load_maps


def load(path: str | os.PathLike) -> BlockMap | Analysis | dict[str, BlockMap]:
    """Read a file or folder that attnpatch has written.

    Args:
        path: A file of ``BlockMap.save`` or of the analyzer, or a folder of such files, as ``maps.save`` writes.

    Returns:
        ``BlockMap``; of the analyzer's file the ``Analysis``; of a folder the maps by file name without its suffix, with
        a warning for each file that is damaged or no map.

    Raises:
        BlockMapFileError: The file is missing or damaged, or the folder has no block map.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise BlockMapFileError(
            f"path={path!r:.60} is not accepted; give a file or a folder that attnpatch wrote"
        )
    path = Path(path)
    if path.is_dir():
        try:
            found, skipped = load_maps(path)
        except PageError as error:
            raise BlockMapFileError(str(error)) from error
        for line in skipped:
            warnings.warn(line, AttnpatchWarning, stacklevel=2)
        return {name.removesuffix(".safetensors"): one for name, one in found.items()}
    return Analysis.load(path) if "analysis" in (io.facts(path) or {}) else BlockMap.load(path)
