"""Sizes in bytes: what a person writes, and what is printed."""

from __future__ import annotations

import re

from attnpatch.errors import PolicyError

_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*")


def parse_size(value: int | float | str, name: str = "size") -> int:
    """The number of bytes that ``value`` means.

    Args:
        value: A number of bytes, or a string such as ``"2GB"`` (decimal), ``"512MiB"`` (binary), ``"1.5 GB"``.
        name: The name of the value in the error message.

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
    """A number of bytes for people, in the decimal units that ``parse_size`` reads: ``1.4 GB``."""
    for unit, least in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        # Without the factor 999.6 MB would be printed as 1000 MB.
        if size >= 0.9995 * least:
            return f"{size / least:.3g} {unit}"
    return f"{size:.0f} B"
