"""Writes files atomically, even under SIGKILL: into a temporary file beside the target, flushed, then renamed."""

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
    """Yields the path of a temporary file beside ``path``; when the block ends it is renamed to ``path``.

    If the block fails, the temporary file is removed.

    Args:
        path: The file to write. An existing file is replaced; if the write fails, it is kept.
        failure: Exception class that an ``OSError`` is turned into, with a message that names the path and a way out;
            ``None``: the ``OSError`` itself is raised.
        tag: Part of the temporary file's name, ``.NAME.TAG.tmp``; ``None``: random, so that no two writers share it.
        publish: Gives the temporary file its final name.

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
        raise failure(f"cannot write {path}: {problem}; choose another path.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def put(place: Path, pieces: Iterable[bytes]) -> None:
    """Write pieces to a path that ``whole`` yielded; they are on the disk when this returns."""
    with open(place, "wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())


def create(path: Path, data: bytes, tag: str | int) -> bool:
    """Write a file unless it exists; other processes never see a part of it.

    Returns:
        Whether this process wrote it.
    """
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
