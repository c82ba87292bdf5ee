"""Block maps in files: tensors as safetensors, everything else as JSON in the header, written whole or not at all."""

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
    """Write a file beside its place and move it there when it is complete.

    Args:
        path: Where to; an existing file survives a write that fails.
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
    """The words in the header of a safetensors file, without reading its tensors; ``None``: it is none, or not whole.

    By hand: ``safe_open`` takes no path that is not UTF-8.
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
    """All of a block map but its tensors; ``None`` if the file is none or not whole."""
    try:
        content = json.loads((header(path) or {})["block_map"])
    except (ValueError, KeyError, TypeError):
        return None
    return content if isinstance(content, dict) else None


def check_kind(path: Path, words: dict[str, str]) -> None:
    """See that a header is that of a block map.

    Raises:
        BlockMapFileError: It is not.
    """
    if words.get("format") != FILE_FORMAT:
        raise BlockMapFileError(f"{path} is safetensors but no block map; give what BlockMap.save wrote.")


def read(path: Path) -> dict[str, Any]:
    """Tensors and content of a file that ``write`` wrote, by name.

    Raises:
        BlockMapFileError: The file is missing, cut short, or of another kind or version.
    """
    if not path.is_file():
        raise BlockMapFileError(f"there is no file {path}; give the path that BlockMap.save was given.")
    try:
        with safe_open(path, framework="pt") as file:
            words = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except UnicodeEncodeError as error:
        raise BlockMapFileError(f"{path!a} is no UTF-8 name; rename the file.") from error
    except (SafetensorError, OSError) as error:
        raise BlockMapFileError(f"{path} is cut short or no block map ({error}); {AGAIN}") from error
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
