"""What Python 3.10 lacks: notes of exceptions."""

from __future__ import annotations


def add_note(error: BaseException, note: str) -> None:
    """Add a line to what a traceback shows of an error."""
    if hasattr(error, "add_note"):
        error.add_note(note)
    elif error.args and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]}\n{note}", *error.args[1:])
