"""Files of block maps: tensors as safetensors, everything else as JSON in the header; written atomically."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from attnpatch.atomic_files import put, whole
from attnpatch.errors import BlockMapFileError

FILE_FORMAT = "attnpatch.block_map"
FILE_VERSION = "1"
AGAIN = "capture and save it again."


def write(path: Path, tensors: dict[str, Tensor], content: dict[str, Any]) -> Path:
    """Write a file atomically.

    Args:
        path: The file; if writing fails, an existing file is kept.
        tensors: Contiguous tensors on the CPU.
        content: Anything JSON can hold.

    Raises:
        BlockMapFileError: The file cannot be written.
    """
    words = {"format": FILE_FORMAT, "version": FILE_VERSION, "block_map": json.dumps(content)}
    data = to_safetensors(tensors, words)
    with whole(path, BlockMapFileError) as temporary:
        put(temporary, [data])
    return path


def header(path: Path) -> dict[str, str] | None:
    """The ``__metadata__`` of a safetensors file, without reading its tensors.

    The header is parsed here because ``safe_open`` refuses paths that are not UTF-8.

    Returns:
        ``None`` if the file is not safetensors, or is truncated.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                return None
            entries = json.loads(file.read(length))
        words = entries.pop("__metadata__", {})
        end = max((tensor["data_offsets"][1] for tensor in entries.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None
    return words if isinstance(words, dict) and 8 + length + end == size else None


def facts(path: Path) -> dict[str, Any] | None:
    """The fields of a block map file that are not tensors; ``None`` if it is not such a file, or is truncated."""
    try:
        content = json.loads((header(path) or {})["block_map"])
    except (ValueError, KeyError, TypeError):
        return None
    return content if isinstance(content, dict) else None


def check_kind(path: Path, words: dict[str, str]) -> None:
    """Check that a header belongs to a block map.

    Raises:
        BlockMapFileError: It does not.
    """
    if words.get("format") != FILE_FORMAT:
        raise BlockMapFileError(
            f"{path} is a safetensors file but not a block map; give a file that BlockMap.save wrote."
        )


def read(path: Path) -> dict[str, Any]:
    """Tensors and content of a file that ``write`` wrote, by name.

    Raises:
        BlockMapFileError: The file is missing, truncated, or has another format or version.
    """
    if not path.is_file():
        raise BlockMapFileError(f"there is no file {path}; give the path that BlockMap.save was given.")
    try:
        with safe_open(path, framework="pt") as file:
            words = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except UnicodeEncodeError as error:
        raise BlockMapFileError(f"{path!a} is not a UTF-8 name; rename the file.") from error
    except (SafetensorError, OSError) as error:
        raise BlockMapFileError(f"{path} is truncated or not a block map ({error}); {AGAIN}") from error
    check_kind(path, words)
    if words.get("version") != FILE_VERSION:
        raise BlockMapFileError(
            f"{path} has version {words.get('version')!r}, this attnpatch reads {FILE_VERSION!r}; read "
            f"it with the attnpatch that wrote it, or {AGAIN}"
        )
    try:
        return {**json.loads(words["block_map"]), **tensors}
    except KeyError as error:
        raise BlockMapFileError(f"{path} lacks {error}; {AGAIN}") from error
    except (ValueError, TypeError) as error:
        raise BlockMapFileError(f"{path} is damaged ({error}); {AGAIN}") from error
