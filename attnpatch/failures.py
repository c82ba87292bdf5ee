"""The warning for errors in attnpatch's own code inside a user's forward, which then goes on natively."""

from __future__ import annotations

import pathlib
import sys
import traceback
import warnings

from attnpatch.errors import AttnpatchWarning, in_one_line

_PACKAGE = pathlib.Path(__file__).parent
# Places and errors that were reported already. Only text is kept: an error's frames would keep tensors alive.
_said: set[tuple[str, str, str]] = set()


def warn_once(where: str, error: BaseException) -> None:
    """Warn about an error in attnpatch's own code, once per step, error type and line. Never raises.

    Args:
        where: The step that failed, in words that a user can report: ``"softmax of deferred scores"``.
        error: The error.
    """
    kind, line = type(error).__name__, _line_of(error)
    if (where, kind, line) in _said:
        return
    _said.add((where, kind, line))
    message = (
        f"attnpatch failed at {where} ({kind}: {_words(error)}; {line}). The model's own code was used instead, so the "
        "result is right, but memory may not have been saved. Please report this line."
    )
    try:
        warnings.warn(message, AttnpatchWarning, stacklevel=3)
    except Exception:
        # This process turns warnings into errors. Raising one would end a forward that can go on without attnpatch.
        if sys.stderr is not None:
            print(message, file=sys.stderr)


def _words(error: BaseException) -> str:
    try:
        return in_one_line(error, 300)
    except Exception:
        return "an error that cannot be printed"


def _line_of(error: BaseException) -> str:
    """The innermost line of this package in the error's traceback."""
    line = "no line"
    for frame in traceback.StackSummary.extract(traceback.walk_tb(error.__traceback__), lookup_lines=False):
        path = pathlib.Path(frame.filename)
        if path.is_relative_to(_PACKAGE):
            line = f"{path.relative_to(_PACKAGE).as_posix()}, line {frame.lineno}"
    return line
