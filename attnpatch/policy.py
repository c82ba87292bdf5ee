"""When attention goes by rows: one frozen dataclass, the same fields in Python, environment and command line."""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import Any

from attnpatch.errors import PolicyError

_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*")
MODES = ("auto", "always", "never")


def parse_size(value: int | float | str, name: str = "size") -> int:
    """Bytes meant by ``value``.

    Args:
        value: A number of bytes, or a string such as ``"2GB"`` (decimal), ``"512MiB"`` (binary), ``"1.5 GB"``.
        name: What the value is called in the error message.

    Returns:
        The size in bytes.

    Raises:
        PolicyError: The value is negative, not a size, or has an unknown unit.
    """
    accepted = 'a number of bytes, or a string like "2GB", "512MiB" or "1.5GB"'
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value != value or value < 0 or value == float("inf"):
            raise PolicyError(f"{name}={value!r} is not a size; give {accepted}")
        return int(value)
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        if match and match.group(2).upper() in _UNITS:
            return int(float(match.group(1)) * _UNITS[match.group(2).upper()])
    raise PolicyError(f"{name}={value!r} is not a size; give {accepted}")


def size_text(size: int | float) -> str:
    """Bytes as people write them, decimal as ``parse_size`` reads them: ``1.4 GB``."""
    for unit, least in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        # 999.6 MB would be printed as 1000.
        if size >= 0.9995 * least:
            return f"{size / least:.3g} {unit}"
    return f"{size:.0f} B"


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PolicyError(f"{name}={value!r} is not accepted; give a whole number of at least {least}")


@dataclasses.dataclass(frozen=True)
class Policy:
    """When attention goes by rows, and in what steps.

    Attributes:
        mode: ``"auto"`` decides call by call, ``"always"`` and ``"never"`` do not ask.
        min_tokens: The number of query rows must exceed this.
        min_free: By rows when less memory than this is free; bytes or a string such as ``"2GB"``.
        headroom: Also by rows when the native call's predicted temporaries exceed this share of free memory.
        workspace: Ceiling in bytes on what one attention call may hold beside its inputs and output;
            ``None`` takes it from free memory and, on CPU, from what the cache holds.
        rows: Fixed number of query rows per step; ``None`` chooses.
        heads: Fixed number of heads per step; ``None`` chooses.
        retry_on_oom: Answer an out-of-memory error of a native call by rows, halving them until they fit.

    Raises:
        PolicyError: A value cannot be used.
    """

    mode: str = "auto"
    min_tokens: int = 1024
    min_free: int | str = "2GB"
    headroom: float = 0.5
    workspace: int | str | None = None
    rows: int | None = None
    heads: int | None = None
    retry_on_oom: bool = True

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise PolicyError(
                f"mode={self.mode!r} is not accepted; give one of {', '.join(map(repr, MODES))}"
            )
        _check_count("min_tokens", self.min_tokens, 0)
        parse_size(self.min_free, "min_free")
        if self.workspace is not None and parse_size(self.workspace, "workspace") == 0:
            raise PolicyError("workspace=0 leaves no room for a single row; give a size like '64MB', or None")
        if (
            isinstance(self.headroom, bool)
            or not isinstance(self.headroom, (int, float))
            or not 0 < self.headroom <= 1
        ):
            raise PolicyError(
                f"headroom={self.headroom!r} is not accepted; give a share above 0 and at most 1"
            )
        for name in ("rows", "heads"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), 1)
        if not isinstance(self.retry_on_oom, bool):
            raise PolicyError(f"retry_on_oom={self.retry_on_oom!r} is not accepted; give True or False")

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Policy:
        """A policy from keyword arguments.

        Raises:
            PolicyError: A field is unknown (the nearest known one is named) or its value cannot be used.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise PolicyError(f"unknown policy field {name!r}{hint} Known fields: {', '.join(known)}")
        return cls(**fields)

    @property
    def min_free_bytes(self) -> int:
        return parse_size(self.min_free, "min_free")

    @property
    def workspace_bytes(self) -> int | None:
        return None if self.workspace is None else parse_size(self.workspace, "workspace")

    def by_rows(self, q_len: int, temporaries: int, free: int) -> bool:
        """Whether a native call that would hold ``temporaries`` bytes goes by rows with ``free`` bytes left."""
        if self.mode != "auto":
            return self.mode == "always"
        if q_len <= self.min_tokens:
            return False
        return free < self.min_free_bytes or temporaries > self.headroom * free

    def reason(self, q_len: int, temporaries: int, free: int) -> str:
        """Why ``by_rows`` answers what it answers, in words."""
        if self.mode != "auto":
            return f"mode is {self.mode!r}"
        if q_len <= self.min_tokens:
            return f"{q_len} rows are not more than min_tokens {self.min_tokens}"
        least = size_text(self.min_free_bytes)
        if free < self.min_free_bytes:
            return f"{size_text(free)} free is less than min_free {least}"
        share = f"{self.headroom:g} of {size_text(free)} free"
        if temporaries > self.headroom * free:
            return f"temporaries of {size_text(temporaries)} exceed {share}"
        return f"min_free {least} is free, and temporaries of {size_text(temporaries)} fit into {share}"
