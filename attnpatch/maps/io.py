"""Block maps in files: tensors as safetensors, everything else as JSON in the header, written whole or not at all."""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

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
    header = {"format": FILE_FORMAT, "version": FILE_VERSION, "block_map": json.dumps(content)}
    data = to_safetensors(tensors, header)
    with whole(path, BlockMapFileError) as temporary, open(temporary, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return path


@contextlib.contextmanager
def whole(path: Path, failure: type[Exception]) -> Iterator[Path]:
    """A place beside a file's to write it to: moved there when the block ends, and gone when it fails.

    Raises:
        failure: The file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        problem = error.strerror or error
        raise failure(f"cannot write {path}: {problem}; choose a path that can be.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """Tensors and content of a file that ``write`` wrote, by name.

    Raises:
        BlockMapFileError: The file is missing, cut short, or of another kind or version.
    """
    if not path.is_file():
        raise BlockMapFileError(f"there is no file {path}; give the path that BlockMap.save was given.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except UnicodeEncodeError as error:
        raise BlockMapFileError(f"{path!a} is no UTF-8 name; rename the file.") from error
    except (SafetensorError, OSError) as error:
        raise BlockMapFileError(f"{path} is cut short or no block map ({error}); {AGAIN}") from error
    if header.get("format") != FILE_FORMAT:
        raise BlockMapFileError(f"{path} is safetensors but no block map; give what BlockMap.save wrote.")
    if header.get("version") != FILE_VERSION:
        raise BlockMapFileError(
            f"{path} has version {header.get('version')!r}, this attnpatch reads {FILE_VERSION!r}; read "
            f"it with the attnpatch that wrote it, or {AGAIN}"
        )
    try:
        return {**json.loads(header["block_map"]), **tensors}
    except KeyError as error:
        raise BlockMapFileError(f"{path} lacks {error}; {AGAIN}") from error
    except (ValueError, TypeError) as error:
        raise BlockMapFileError(f"{path} is damaged ({error}); {AGAIN}") from error
