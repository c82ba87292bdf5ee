"""Every exception attnpatch raises on purpose: one line that says what was given, what fits, and the way out."""


class AttnpatchError(Exception):
    """Base of all attnpatch errors."""


class AttnpatchWarning(UserWarning):
    """Code of attnpatch failed inside a forward, which went on natively."""


class PolicyError(AttnpatchError, ValueError):
    """A policy field is unknown or its value cannot be used."""


class PatchError(AttnpatchError):
    """A model cannot be patched, or the patch cannot be found."""


class BlockError(AttnpatchError, ValueError):
    """Blocks overlap, reach past the sequence or cannot be made from what was given."""


class CaptureError(AttnpatchError):
    """Nothing was captured, or what was captured cannot answer the question."""


class ExplainError(AttnpatchError):
    """A model cannot be explained: it cannot be run on shapes alone, or its inputs cannot be made up."""


class AnalysisError(AttnpatchError):
    """What is to be analysed cannot be read, or does not fit."""


class BlockMapFileError(AttnpatchError, OSError):
    """A block map file is missing, cut short, damaged or of another version."""


class PageError(AttnpatchError):
    """There is nothing to show on a page, or it cannot be written."""


class MissingExtraError(AttnpatchError, ImportError):
    """An optional package is needed for this and is not installed."""


def in_one_line(error: BaseException, most: int | None = None) -> str:
    """All that an error says, in one line of at most so many characters."""
    return " ".join(str(error).split())[:most]


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its type where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
