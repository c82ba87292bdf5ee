"""Files that appear whole or not at all, also after SIGKILL: written beside their place, on the disk, then moved there."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(
    path: Path,
    failure: type[Exception] | None = None,
    tag: str | int | None = None,
    publish: Callable[[Path, Path], None] = lambda temporary, path: os.replace(temporary, path),
) -> Iterator[Path]:
    """A place beside a file's to write it to: moved there when the block ends, and gone when it fails.

    Args:
        path: Of the file; one that is there is replaced, and survives a write that fails.
        failure: What an ``OSError`` is raised as, with the path and a way out; ``None``: as itself.
        tag: In the name of the place, ``.NAME.TAG.tmp``; ``None``: random, so that no two writers share it.
        publish: How the written file gets its name.

    Raises:
        OSError, failure: The file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4) if tag is None else tag}.tmp")
    try:
        yield temporary
        publish(temporary, path)
    except OSError as error:
        if failure is None:
            raise
        problem = error.strerror or error
        raise failure(f"cannot write {path}: {problem}; choose a path that can be.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def put(place: Path, pieces: Iterable[bytes]) -> None:
    """Write pieces to a place that ``whole`` gave; they are on the disk when this returns."""
    with open(place, "wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())


def create(path: Path, data: bytes, tag: str | int) -> bool:
    """Write a file unless there is one; whether this process was the one that did. Others then find it whole."""
    try:
        with whole(path, tag=tag, publish=_link) as temporary:
            put(temporary, [data])
    except FileExistsError:
        return False
    return True


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(path) from None
        os.replace(temporary, path)
