"""The block maps in a file or a folder."""

from pathlib import Path

from attnpatch.errors import BlockMapFileError, PageError
from attnpatch.maps import io
from attnpatch.maps.block_map import BlockMap


def load_maps(path: Path) -> tuple[dict[str, BlockMap], list[str]]:
    """Read the block maps of a file, or of all ``*.safetensors`` in a folder.

    Args:
        path: A file that ``BlockMap.save`` wrote, or a folder with some.

    Returns:
        The maps by file name, in the order of the names, and one line for each file of a folder that holds none.

    Raises:
        BlockMapFileError: The file holds no block map.
        PageError: There is nothing at ``path``, or no block map in the folder.
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
    """``BlockMap.load``, which reads all tensors, only where the header says it is one: weights are large."""
    words = io.header(file)
    if words is not None:
        io.check_kind(file, words)
    return BlockMap.load(file)
