"""Every exception that attnpatch raises on purpose. A message is one line: the value, what is accepted, a way out."""

import sys
import warnings


class AttnpatchError(Exception):
    """Base of all attnpatch errors."""


class AttnpatchWarning(UserWarning):
    """attnpatch's own code failed in a forward (the model's code was used instead), or a capture misses something."""


class PolicyError(AttnpatchError, ValueError):
    """A policy field is unknown or its value is invalid."""


class UsageError(AttnpatchError, ValueError):
    """An option of the command line has a value that is not accepted, or does not go with another one."""


class PatchError(AttnpatchError):
    """A model cannot be patched, or a model that should be patched is not."""


class BlockError(AttnpatchError, ValueError):
    """Blocks overlap, reach past the sequence or cannot be made from what was given."""


class CaptureError(AttnpatchError):
    """Nothing was captured, or what was captured does not contain what was asked for."""


class ExplainError(AttnpatchError):
    """``explain`` cannot run the model on shapes alone, or cannot make up inputs for it."""


class AnalysisError(AttnpatchError):
    """A conversation, a model or an option of an analysis cannot be read or used."""


class BlockMapFileError(AttnpatchError, OSError):
    """A block map file is missing, cut short, damaged or of another version."""


class ReleaseError(AttnpatchError):
    """The installed release of torch lacks a name that attnpatch needs."""


class PageError(AttnpatchError):
    """There is nothing to show on a page, or it cannot be written."""


class MissingExtraError(AttnpatchError, ImportError):
    """An optional package is needed for this and is not installed."""


def in_one_line(error: BaseException, most: int | None = None) -> str:
    """The message of an error in one line, of at most ``most`` characters."""
    return " ".join(str(error).split())[:most]


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type if the message is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def warn_deprecated(message: str) -> None:
    """A ``DeprecationWarning`` at the line outside attnpatch that led here."""
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("attnpatch."):
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    warnings.warn(message, DeprecationWarning, stacklevel=level)
