"""What the ``ATTNPATCH_*`` variables say, read strictly and before anything heavy is imported."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
from collections.abc import Mapping

from attnpatch.errors import PolicyError
from attnpatch.policy import FREE_MEMORY, TEXTS, Policy, parse_size, read_switch, read_whole

SWITCH = "ATTNPATCH"
PREFIX = "ATTNPATCH_"
REPORT, CAPTURE, BLOCKS = "ATTNPATCH_REPORT", "ATTNPATCH_CAPTURE", "ATTNPATCH_BLOCKS"
FIELDS = {PREFIX + field.upper(): field for field in TEXTS}
KNOWN = (*FIELDS, REPORT, CAPTURE, BLOCKS, FREE_MEMORY)
DEFAULT_BLOCK = 128


def is_asked_for(environment: Mapping[str, str]) -> bool:
    """Whether the environment asks for activation.

    Raises:
        PolicyError: ``ATTNPATCH`` is neither ``1`` nor ``0`` nor empty.
    """
    value = environment.get(SWITCH, "")
    if value not in ("", "0", "1"):
        raise PolicyError(f"{SWITCH}={value!r} is not accepted; give 1 or 0")
    return value == "1"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the environment asks for.

    Attributes:
        policy: For every model.
        report: Whether the report is printed at exit.
        capture: Absolute path of the folder for block maps, or ``None``.
        blocks: Tokens per block.
    """

    policy: Policy = dataclasses.field(default_factory=Policy)
    report: bool = False
    capture: str | None = None
    blocks: int = DEFAULT_BLOCK

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Read the variables; an empty one counts as not set.

        Raises:
            PolicyError: A variable is unknown or its value cannot be used; one line that says which.
        """
        given = {name: value for name, value in environment.items() if name.startswith(PREFIX) and value}
        for name in given:
            if name not in KNOWN:
                near = difflib.get_close_matches(name, KNOWN, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(KNOWN)}"
                raise PolicyError(f"{name} is not a variable of attnpatch; {hint}")
        fields = {FIELDS[name]: (f"{name}=", value) for name, value in given.items() if name in FIELDS}
        if FREE_MEMORY in given:
            read_size_of(given[FREE_MEMORY])
        return cls(
            Policy.of_texts(fields),
            read_report(given[REPORT]) if REPORT in given else False,
            writable_folder(f"{CAPTURE}=", given[CAPTURE]) if CAPTURE in given else None,
            read_blocks(f"{BLOCKS}=", given[BLOCKS]) if BLOCKS in given else DEFAULT_BLOCK,
        )


def read_report(text: str) -> bool:
    """``1`` or ``0``.

    Raises:
        PolicyError: Anything else.
    """
    try:
        return read_switch(text)
    except ValueError:
        raise PolicyError(f"{REPORT}={text!r} is not accepted; give 1 or 0") from None


def read_size_of(text: str) -> int:
    """The bytes that ``ATTNPATCH_FREE_MEMORY`` gives.

    Raises:
        PolicyError: It is not a size.
    """
    try:
        return parse_size(text)
    except PolicyError:
        accepted = TEXTS["min_free"].accepted
        raise PolicyError(f"{FREE_MEMORY}={text!r} is not accepted; give {accepted}") from None


def read_blocks(shown: str, text: str) -> int:
    """Tokens per block.

    Args:
        shown: What the user knows the value by, such as ``"ATTNPATCH_BLOCKS="``.
        text: The value.

    Raises:
        PolicyError: It is no whole number of at least 1.
    """
    with contextlib.suppress(ValueError):
        if size := read_whole(text):
            return size
    raise PolicyError(f"{shown}{text!r} is not accepted; give a whole number of tokens of at least 1")


def writable_folder(shown: str, text: str) -> str:
    """The absolute path of a folder that files can be written to; made if it is not there.

    Absolute, because a script may change its working directory before the first file is written.

    Args:
        shown: What the user knows the value by, such as ``"ATTNPATCH_CAPTURE="``.
        text: The value.

    Raises:
        PolicyError: The folder cannot be made or written to.
    """
    folder = os.path.abspath(os.path.expanduser(text))
    try:
        os.makedirs(folder, exist_ok=True)
        probe = os.path.join(folder, f".attnpatch-{os.getpid()}.tmp")
        os.close(os.open(probe, os.O_CREAT | os.O_WRONLY))
        os.unlink(probe)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PolicyError(
            f"{shown}{text!r} is not accepted ({reason}); give a folder that can be written to"
        ) from None
    return folder
