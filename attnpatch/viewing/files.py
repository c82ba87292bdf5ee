"""Reads the block maps in a file or a folder."""

from pathlib import Path

from attnpatch.errors import BlockMapFileError, PageError
from attnpatch.maps import io
from attnpatch.maps.block_map import BlockMap


def load_maps(path: Path) -> tuple[dict[str, BlockMap], list[str]]:
    """Read the block maps of a file, or of all ``*.safetensors`` in a folder.

    Args:
        path: A file that ``BlockMap.save`` wrote, or a folder of such files.

    Returns:
        The maps by file name, sorted, and one line for each file in the folder that is not a block map.

    Raises:
        BlockMapFileError: The file is not a block map.
        PageError: ``path`` does not exist, or the folder has no block map.
    """
    if not path.exists():
        raise PageError(f"there is nothing at {path}; give a block map or a folder of them.")
    if not path.is_dir():
        return {path.name: _load(path)}, []
    maps, skipped = {}, []
    files = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    for file in files:
        try:
            maps[file.name] = _load(file)
        except BlockMapFileError as error:
            skipped.append(f"skipped {file.name}: {error}")
    if not maps:
        seen = f"{len(files)} other .safetensors files" if files else "no .safetensors file"
        raise PageError(f"{path} holds no block map ({seen}); give a folder that BlockMap.save wrote into.")
    return maps, skipped


def _load(file: Path) -> BlockMap:
    """Check the header before ``BlockMap.load`` reads all tensors, because a file of weights may be large."""
    words = io.header(file)
    if words is not None:
        io.check_kind(file, words)
    return BlockMap.load(file)
