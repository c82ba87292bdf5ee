"""Reads conversations from JSON and JSONL files, one after the other. A bad record does not stop the rest."""

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import Any

from attnpatch.conversations.reading.records import BadRecord, is_message, is_record, messages_of
from attnpatch.errors import AnalysisError

# Largest line of a JSONL file, and largest JSON file: while parsed, each is in memory several times.
LINE_LIMIT = 64 * 2**20
DOCUMENT_LIMIT = 512 * 2**20
_LINE_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
_BLANK = b" \t\r\n"
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Conversation:
    """A conversation from a file.

    Attributes:
        messages: ``{"role", "content"}`` with text as content; and ``"tool_calls"``, ``"name"``,
            ``"tool_call_id"`` and reasoning if the record has them.
        name: The record's id if it is usable, otherwise the file's name and a number. It is unique in the file, and
            a valid file name on any system.
        source: Its place in the file, such as ``"chats.jsonl record 12 (line 13)"``.
        tools: The tools that it offers.
    """

    messages: tuple[dict, ...]
    name: str
    source: str
    tools: tuple[dict, ...] = ()


@dataclass(frozen=True)
class RejectedRecord:
    """A record, or a whole file, that is not a conversation; prints as one line."""

    source: str
    reason: str

    def __str__(self) -> str:
        return " ".join(f"{self.source}: {self.reason}".split())


def read_conversations(path: str | Path) -> Iterator[Conversation | RejectedRecord]:
    """Read the conversations of a file, in order.

    A JSON file has one conversation or a list of them; a JSONL file has one per line. The content decides which of the
    two a file is. JSONL is read as a stream, and blank lines are skipped.

    A conversation is a list of ``{"role", "content"}``, or an object with such a list as ``"messages"``, or
    ShareGPT's ``"conversations"`` of ``{"from", "value"}``. Content is text or a list of text parts.

    Yields:
        For every record, a ``Conversation`` or a ``RejectedRecord`` with the reason.

    Raises:
        AnalysisError: The file cannot be opened or read.
    """
    path = Path(path)
    try:
        file = path.open("rb")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return _conversations(path, file)


def _unreadable(path: Path, error: Exception) -> AnalysisError:
    return AnalysisError(f"{_printable(str(path))}: {getattr(error, 'strerror', None) or error}")


def _printable(name: str) -> str:
    """A file name, with bytes that are not text replaced."""
    return name.encode("utf-8", "replace").decode()


def _conversations(path: Path, file: BufferedReader) -> Iterator[Conversation | RejectedRecord]:
    names = _Names(path.stem)
    with file:
        try:
            for source, record in _records(path, file):
                if isinstance(record, RejectedRecord):
                    names.number += 1
                    yield record
                    continue
                yield _conversation(source, record, names)
        except OSError as error:
            raise _unreadable(path, error) from error


def _conversation(source: str, record: Any, names: "_Names") -> Conversation | RejectedRecord:
    names.number += 1
    try:
        messages, tools = messages_of(record)
    except BadRecord as error:
        return RejectedRecord(source, str(error))
    except RecursionError:
        return RejectedRecord(source, "nested too deep")
    return Conversation(messages, names.name(record), source, tools)


def _records(path: Path, file: BufferedReader) -> Iterator[tuple[str, Any]]:
    """Yields each record's place in the file, and the record or its rejection."""
    name = _printable(path.name)
    if file.peek(3)[:3] == b"\xef\xbb\xbf":
        file.read(3)
    by_suffix = path.suffix.lower() in _LINE_SUFFIXES
    lines = _lines(file, LINE_LIMIT if by_suffix else DOCUMENT_LIMIT)
    head: list[tuple[int, bytes | None]] = []
    for number, line in lines:
        head.append((number, line))
        if len(head) == 2:
            break
    if not head:
        yield name, RejectedRecord(name, "the file is empty")
        return
    first = head[0][1]
    if first is not None and (wrong := _not_text(first)):
        yield name, RejectedRecord(name, wrong)
        return
    if _is_lines(head, by_suffix):
        yield from _line_records(name, chain(head, lines))
    else:
        yield from _document_records(name, chain(head, lines))


def _not_text(first: bytes) -> str | None:
    """Why the beginning of a file is not UTF-8 text; None if it is."""
    if first.startswith((b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")):
        return "it is UTF-16 or UTF-32; save it as UTF-8"
    if b"\x00" in first[:4096]:
        return "it is binary, or UTF-16 without a mark; accepted is JSON or JSONL in UTF-8"
    return None


def _lines(file: BufferedReader, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Yields the lines that are not blank, with their numbers; None for a line that is longer than the limit."""
    number = 0
    while True:
        number += 1
        line = file.readline(limit + 1)
        if not line:
            return
        if len(line.rstrip(b"\r\n")) > limit:
            while line and not line.endswith(b"\n"):
                line = file.readline(2**20)
            yield number, None
        elif line.strip(_BLANK):
            yield number, line


def _is_lines(head: list[tuple[int, bytes | None]], by_suffix: bool) -> bool:
    """Whether a file has one record per line, by its first two lines; if they do not decide it, by its suffix."""
    first, second = head[0][1], head[1][1] if len(head) > 1 else b""
    if first is None:
        return by_suffix
    whole, unfinished = _whole(first)
    if len(head) == 1:
        return by_suffix and not (isinstance(whole, list) and any(map(is_record, whole)))
    if whole is not None:
        return True
    if unfinished and first.strip(_BLANK) in (b"[", b"{"):
        return False
    return by_suffix or (second is not None and _whole(second)[0] is not None)


def _whole(line: bytes) -> tuple[list | dict | None, bool]:
    """A line parsed as JSON (None if it is not JSON), and whether it may be the beginning of a longer JSON text."""
    try:
        value = json.loads(line.decode())
        return value if isinstance(value, list | dict) else None, False
    except json.JSONDecodeError as error:
        return None, error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        return None, False


def _parse(text: bytes) -> Any:
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise BadRecord(f"not JSON ({error.msg}, {place})") from None
    except RecursionError:
        raise BadRecord("not readable as JSON: nested too deep") from None
    except ValueError as error:  # a number of more digits than Python converts
        raise BadRecord(f"not readable as JSON: {str(error).split(';')[0]}") from None


def _line_records(name: str, lines: Iterator[tuple[int, bytes | None]]) -> Iterator[tuple[str, Any]]:
    for record, (number, line) in enumerate(lines, 1):
        source = f"{name} record {record} (line {number})"
        if line is None:
            yield source, RejectedRecord(source, f"the line is longer than {LINE_LIMIT >> 20} MB, the limit")
            continue
        try:
            yield source, _parse(line.strip(_BLANK))
        except BadRecord as error:
            yield source, RejectedRecord(source, str(error))


def _document_records(name: str, lines: Iterator[tuple[int, bytes | None]]) -> Iterator[tuple[str, Any]]:
    pieces, size, next_number = [], 0, 1
    for number, line in lines:
        size += DOCUMENT_LIMIT + 1 if line is None else len(line)
        if size > DOCUMENT_LIMIT:
            yield (
                name,
                RejectedRecord(
                    name, f"it is longer than {DOCUMENT_LIMIT >> 20} MB, the limit; write one record per line"
                ),
            )
            return
        # Blank lines are put back, so that errors name the right line of the file.
        pieces += [b"\n" * (number - next_number), line]
        next_number = number + 1
    try:
        document = _parse(b"".join(pieces))
    except BadRecord as error:
        yield name, RejectedRecord(name, str(error))
        return
    del pieces
    if not isinstance(document, list | dict):
        yield name, RejectedRecord(name, "it has a single value, which is not a conversation")
    elif isinstance(document, dict) or (
        any(is_message(item) for item in document) and not any(is_record(item) for item in document)
    ):
        yield f"{name} record 1", document
    elif not document:
        yield name, RejectedRecord(name, "it is empty: an empty list")
    else:
        for record, item in enumerate(document, 1):
            yield f"{name} record {record}", item


class _Names:
    """Gives each conversation a name that is unique, even ignoring case, and safe as a file name."""

    def __init__(self, stem: str) -> None:
        self.number = 0
        self._stem = _safe(stem) or "conversation"
        self._taken: set[str] = set()
        self._next: dict[str, int] = {}

    def name(self, record: Any) -> str:
        """A name for the current record."""
        ids = [record.get(key) for key in ("custom_id", "id")] if isinstance(record, dict) else []
        given = next((one for one in ids if one is not None), None)
        usable = isinstance(given, str | int) and not isinstance(given, bool)
        wanted = (_safe(str(given)) if usable else "") or f"{self._stem}-{self.number:05d}"
        base, name = wanted.casefold(), wanted
        while name.casefold() in self._taken:
            self._next[base] = self._next.get(base, 1) + 1
            name = f"{wanted}-{self._next[base]}"
        self._taken.add(name.casefold())
        return name


def _safe(text: str) -> str:
    """A text as a file name that is valid on any system; empty if no character can be used."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", text[:200]).strip("._-")[:80].rstrip("._-")
    return f"_{name}" if _RESERVED.match(name) else name


def __getattr__(name: str) -> Any:
    if name != "Refused":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("Refused is now RejectedRecord", DeprecationWarning, stacklevel=2)
    return RejectedRecord
