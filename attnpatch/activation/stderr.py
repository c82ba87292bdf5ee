"""Messages of an active process, one line each on stderr: a model was patched, something failed, or how the run ended."""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from attnpatch.errors import in_one_line

if TYPE_CHECKING:
    from attnpatch.patching.patch import Patch

NOTHING_SEEN = "attnpatch was active and saw no model with attention in this process"
# How many kinds of models one line names.
_NAMED = 4


class Lines:
    """Prints lines that begin with the package's name; none twice.

    Args:
        is_quiet: Whether only errors are printed.
    """

    def __init__(self, is_quiet: bool) -> None:
        self.is_quiet, self.pid = is_quiet, os.getpid()
        self._said: set[str] = set()
        self._kinds: set[str] = set()

    def warn(self, what: str, error: Exception) -> None:
        """Say that something failed."""
        self._print(f"attnpatch: {what}: {type(error).__name__}: {in_one_line(error)}")

    def say(self, what: str) -> None:
        """Print a message that is not an error."""
        if not self.is_quiet and is_first_process() and os.getpid() == self.pid:
            self._print(what)

    def announce(self, patches: Iterable[Patch]) -> None:
        """Say which kinds of models are patched, each once."""
        found: dict[str, list[int]] = {}
        for patch in patches:
            modules = sum(site.is_attention and not site.is_candidate for site in patch.sites)
            if modules and patch.model_kind not in self._kinds:
                found.setdefault(patch.model_kind, []).append(modules)
        if not found:
            return
        listed = [_kind_in_words(kind, modules) for kind, modules in found.items()]
        more = f" and {len(listed) - _NAMED} more kinds" if len(listed) > _NAMED else ""
        first = "" if self._kinds else "active; "
        self._kinds.update(found)
        self.say(f"attnpatch: {first}patched {', '.join(listed[:_NAMED])}{more}")

    def _print(self, line: str) -> None:
        line = " ".join(line.split())
        if line not in self._said and sys.stderr is not None:
            self._said.add(line)
            with contextlib.suppress(OSError, ValueError):
                print(line, file=sys.stderr)


def _kind_in_words(kind: str, modules: list[int]) -> str:
    times = f" x{len(modules)}" if len(modules) > 1 else ""
    number = max(modules)
    return f"{kind}{times} ({number} attention module{'s' * (number != 1)}{' each' if times else ''})"


def is_first_process() -> bool:
    """False in a worker of ``multiprocessing`` and in all but the first process that ``torchrun`` starts."""
    multiprocessing = sys.modules.get("multiprocessing.process")
    is_child = multiprocessing is not None and multiprocessing.parent_process() is not None
    return not is_child and os.environ.get("RANK", "0") in ("", "0")


def is_users_script() -> bool:
    """True if this process runs a file of the user's: not a command of a package (``torchrun``), nor ``python -c``."""
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    if not file:
        return False
    folders = [sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "scripts")]
    file = os.path.abspath(file)
    return not any(folder and file.startswith(os.path.abspath(folder) + os.sep) for folder in folders)


def seen_in_words(seen: Counter[tuple[str, str]], parts: Counter[str]) -> list[str]:
    """A line for each kind of module that was called and not patched, with the reason."""
    lines = [
        f"attnpatch: not patched: {kind}{f' x{number}' if number > 1 else ''}: {why_not}"
        for (kind, why_not), number in seen.most_common()
    ]
    if parts:
        lines.append(f"attnpatch: not patched: modules of torch called by themselves: {', '.join(parts)}")
    return lines
