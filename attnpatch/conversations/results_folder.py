"""The folder of a run: its options, its results and an index. It stays consistent if a process is killed at any moment.

The safetensors files decide what is done; they are written atomically. Each process appends to its own index
(``index-00000.jsonl``), and each process that finishes merges all of these into ``index.jsonl``.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attnpatch.atomic_files import create, put, whole
from attnpatch.errors import AnalysisError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".safetensors"
RUN = "run.json"
INDEX = "index.jsonl"
VERSION = 1
_PARTS = "index-[0-9]*.jsonl"


class RunFolder:
    """One process's view of the folder of a run.

    Args:
        folder: The folder; created if it does not exist.
        options: The options that the results depend on, anything JSON can hold.
        resume: Continue with the results in the folder.
        shard: This process's number, and the number of processes.

    Raises:
        AnalysisError: The folder has results already, has results of other options, or cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        options: Mapping[str, Any],
        resume: bool,
        shard: tuple[int, int],
    ) -> None:
        self.folder = folder
        self.rank, count = shard
        # The folders that this process creates, innermost first.
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        if folder.exists() and not folder.is_dir():
            raise AnalysisError(f"{folder} is a file; give a folder, or a name that is not taken")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._agree(json.loads(json.dumps(dict(options), default=str)), resume, count)
            self._part = self._open_part(resume)
        except OSError as error:
            _remove_empty(self._made)
            raise AnalysisError(f"cannot write into {folder}: {error.strerror or error}") from error
        self.entries = {_key(line): line for line in self._lines()}
        self._left: dict[str, list[Path]] = {}
        for path in folder.glob(f".*{SUFFIX}.*.tmp"):
            self._left.setdefault(path.name[1:].rsplit(SUFFIX, 1)[0], []).append(path)

    def close(self) -> None:
        """Close this process's index, so that other processes can continue it."""
        self._part.close()

    def discard(self) -> None:
        """Remove this run's files if it has no result, so that the folder does not look used.

        Call it only after ``close``, and after the run's other processes have ended.
        """
        discard(self.folder, self._made)

    def path(self, name: str) -> Path:
        """The path of a conversation's file."""
        return self.folder / f"{name}{SUFFIX}"

    def clear(self, name: str) -> None:
        """Remove temporary files of a conversation that a killed process left behind."""
        for path in self._left.pop(name, ()):
            path.unlink(missing_ok=True)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Append a line to this process's index, unless the index has it. It is on the disk when this returns.

        Raises:
            AnalysisError: The line cannot be written.
        """
        if self.entries.get(_key(entry)) == entry:
            return
        self.entries[_key(entry)] = dict(entry)
        try:
            self._part.write(_line(entry))
            self._part.flush()
            os.fsync(self._part.fileno())
        except OSError as error:
            raise AnalysisError(
                f"cannot write the index in {self.folder}: {error.strerror or error}; free space, then use --resume"
            ) from error

    def merge(self) -> Path:
        """Write ``index.jsonl`` from the lines of all processes, in the order of the input file.

        There is no lock, because shared file systems often have none. Instead, a process writes again if the parts have
        changed since it read them, so the last process to write has read everything.
        """
        path = self.folder / INDEX
        seen = None
        while seen != (now := self._sizes()):
            seen = now
            lines = sorted(_best(self._lines(), self.folder), key=lambda line: line["record"])
            with whole(path, tag=self.rank) as temporary:
                put(temporary, map(_line, lines))
        return path

    def _sizes(self) -> list[tuple[str, int]]:
        return [(path.name, path.stat().st_size) for path in sorted(self.folder.glob(_PARTS))]

    def _lines(self) -> Iterator[dict[str, Any]]:
        for path in sorted(self.folder.glob(_PARTS)):
            yield from read_lines(path)

    def _agree(self, options: dict[str, Any], resume: bool, count: int) -> None:
        """Check that the folder belongs to a run with these options, or write them if it is new."""
        path = self.folder / RUN
        way_out = "continue it with --resume, or give another folder"
        wanted = {"version": VERSION, "processes": count, "options": options}
        text = (json.dumps(wanted, indent=1) + "\n").encode()
        if not path.exists():
            results = [entry for pattern in (f"*{SUFFIX}", _PARTS) for entry in self.folder.glob(pattern)]
            # Another process of this run may have created the file in the meantime.
            if results and not path.exists():
                raise AnalysisError(
                    f"{self.folder} has {results[0].name}, but no {RUN} with the run's options; give another folder"
                )
            if create(path, text, self.rank):
                return
        if not resume and self._is_of_nothing():
            # A run was killed before its first result. Processes that start together all write the same text.
            with whole(path, tag=self.rank) as temporary:
                put(temporary, [text])
            for part in self.folder.glob(_PARTS):
                if int(part.stem.removeprefix("index-")) >= count:
                    part.unlink(missing_ok=True)
            return
        found = _read_run(path)
        different = sorted(
            name for name in {*options, *found["options"]} if options.get(name) != found["options"].get(name)
        )
        if different:
            said = "; ".join(
                f"{name} was {json.dumps(found['options'].get(name))} and is {json.dumps(options.get(name))}"
                for name in different
            )
            raise AnalysisError(
                f"{self.folder} has results of other options ({said}); give the same options, or another folder"
            )
        if not resume and found["processes"] != count:
            raise AnalysisError(f"{self.folder} has results already; {way_out}")

    def _is_of_nothing(self) -> bool:
        """Whether the folder has no result, and no process is working in it."""
        if fcntl is None or any(self.folder.glob(f"*{SUFFIX}")):
            return False
        for path in self.folder.glob(_PARTS):
            with open(path, "rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:  # locked, or a file system without locks
                    return False
        return True

    def _open_part(self, resume: bool) -> Any:
        """Open this process's part of the index; a half-written last line is removed."""
        path = self.folder / f"index-{self.rank:05d}.jsonl"
        is_of_nothing = not resume and path.exists() and self._is_of_nothing()
        try:
            mode = "r+b" if is_of_nothing or (resume and path.exists()) else "xb"
            file = open(path, mode)  # noqa: SIM115
        except FileExistsError:
            raise AnalysisError(
                f"{self.folder} has results already; continue it with --resume, or give another folder"
            ) from None
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise AnalysisError(
                    f"another process is working on {self.folder}; wait for it, or give another folder"
                ) from None
            except OSError:  # a file system without locks
                pass
        if file.readable():
            lines = b"" if is_of_nothing else file.read()
            file.truncate(lines.rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)
        return file


def discard(folder: Path, made: Sequence[Path] = ()) -> None:
    """Remove a run's files from a folder that has no result.

    Args:
        folder: The folder of the run, whose processes have ended.
        made: Folders to remove as well if they are empty, innermost first.
    """
    if any(folder.glob(f"*{SUFFIX}")):
        return
    half_written = (f".{RUN}.*.tmp", f".{INDEX}.*.tmp", f".*{SUFFIX}.*.tmp")
    for pattern in (_PARTS, INDEX, RUN, *half_written):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    _remove_empty(made)


@contextlib.contextmanager
def made_for(folder: Path) -> Iterator[None]:
    """Create a folder for files that are written inside the block; if the block fails and the folder is empty, remove
    it.

    Raises:
        OSError: The folder cannot be created.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        _remove_empty(made)
        raise


def _remove_empty(folders: Sequence[Path]) -> None:
    for path in folders:
        with contextlib.suppress(OSError):  # it is not empty
            path.rmdir()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the valid lines of an index; half-written and damaged lines are skipped."""
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    if (
                        isinstance(entry, dict)
                        and {"source", "record"} <= {*entry}
                        and ({"error", "file"} & {*entry})
                    ):
                        yield entry


def _line(entry: Mapping[str, Any]) -> bytes:
    # A lone surrogate, which file names may contain, cannot be encoded as UTF-8.
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _key(line: Mapping[str, Any]) -> str:
    """The key of a line: the conversation's name, or the source of a rejected record."""
    return line.get("name") or line["source"]


def _best(lines: Iterator[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """One line per record: the result if its file exists, otherwise the latest error."""
    best: dict[str, dict[str, Any]] = {}
    for line in lines:
        if "error" in line:
            # The parts are not ordered in time: an error may be older than the result.
            if "error" in best.get(_key(line), line):
                best[_key(line)] = line
        elif (folder / line["file"]).exists():
            best[_key(line)] = line
    # Drop the old error of a record that was rejected, then corrected and analysed.
    done = {line["source"] for line in best.values() if "error" not in line}
    return [line for line in best.values() if "error" not in line or line["source"] not in done]


def _read_run(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["version"] == VERSION and isinstance(found["options"], dict) and found["processes"]:
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise AnalysisError(f"{path} is damaged, or from another version of attnpatch; give another folder")
