"""Which releases of Python, torch and its hosts attnpatch is tested with, and what an older or newer one means.

``tests/versions/`` runs these; nothing here imports any of them.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import sys
import warnings

from attnpatch.errors import AttnpatchWarning

# The oldest and the newest release of each package that the tests run with.
TESTED: dict[str, tuple[str, str]] = {
    "python": ("3.10", "3.14"),
    "torch": ("2.5.1", "2.14.1"),
    "transformers": ("4.46.3", "5.24.0"),
    "diffusers": ("0.31.0", "0.42.1"),
}
# Packages that ``apply`` looks at, if they were imported.
_LOOKED_AT = ("torch", "transformers", "diffusers")
_said: set[str] = set()


def numbers(version: str, count: int = 2) -> tuple[int, ...]:
    """The first numbers of a version. What follows the second one is a repair of the same release."""
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:count])


@functools.cache
def installed(name: str) -> str | None:
    """The version of an installed package, or of this Python; ``None`` if it is not installed."""
    if name == "python":
        return ".".join(map(str, sys.version_info[:3]))
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_at_least(name: str, version: str) -> bool:
    """True if a package is installed, in this release or a newer one."""
    found = installed(name)
    return found is not None and numbers(found) >= numbers(version)


def older_than_tested(name: str) -> str | None:
    """One line if the installed release is older than all that are tested; otherwise ``None``."""
    found = installed(name)
    if name not in TESTED or found is None or numbers(found, 3) >= numbers(TESTED[name][0], 3):
        return None
    return f"{name} {found} is older than {TESTED[name][0]}, the oldest release that attnpatch supports"


def newer_than_tested(name: str) -> str | None:
    """One line if the installed release is newer than all that are tested; otherwise ``None``."""
    found = installed(name)
    if name not in TESTED or found is None or numbers(found) <= numbers(TESTED[name][1]):
        return None
    return f"{name} {found} is newer than tested (up to {TESTED[name][1]})"


def warn_of_old_ones() -> None:
    """Warn of each imported package that is older than supported, once in a process."""
    for name in _LOOKED_AT:
        if name in sys.modules and name not in _said:
            _said.add(name)
            words = older_than_tested(name)
            if words is not None:
                message = f"attnpatch: {words}: {way_out(name)}"
                warnings.warn(message, AttnpatchWarning, stacklevel=4)


def way_out(name: str) -> str:
    """How to get a supported release."""
    return f'pip install "{name}>={TESTED[name][0]}"'
