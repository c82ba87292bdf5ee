"""Reads the ``ATTNPATCH_*`` variables strictly, before anything slow is imported."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from attnpatch.errors import PolicyError
from attnpatch.policy import FREE_MEMORY, TEXTS, Policy, TextForm, read_switch, read_whole

SWITCH = "ATTNPATCH"
PREFIX = "ATTNPATCH_"
REPORT, CAPTURE, BLOCKS = "ATTNPATCH_REPORT", "ATTNPATCH_CAPTURE", "ATTNPATCH_BLOCKS"
MODULES, SITES, QUIET = "ATTNPATCH_MODULES", "ATTNPATCH_SITES", "ATTNPATCH_QUIET"
FIELDS = {PREFIX + field.upper(): field for field in TEXTS}
KNOWN = (*FIELDS, REPORT, CAPTURE, BLOCKS, MODULES, SITES, QUIET, FREE_MEMORY)
DEFAULT_BLOCK = 128


def _read_tokens(text: str) -> int:
    tokens = read_whole(text)
    if tokens < 1:
        raise ValueError(text)
    return tokens


def _read_list(form: str, text: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(","))
    if not all(re.fullmatch(form, part) for part in found):
        raise ValueError(text)
    return found


def _read_sites(text: str) -> str | tuple[str, ...]:
    return text if text in ("auto", "registered") else _read_list(r"[\w.*?\[\]!-]+", text)


SWITCH_FORM = TextForm(read_switch, "1 or 0")
MODULES_FORM = TextForm(
    functools.partial(_read_list, r"\w+(\.\w+)*:\w+(\.\w+)*"),
    "classes such as package.module:Class, with commas between them",
)
SITES_FORM = TextForm(
    _read_sites,
    "auto, registered, or paths and patterns such as model.layers.*.self_attn, with commas between them",
)
BLOCKS_FORM = TextForm(_read_tokens, "a whole number of tokens of at least 1")


def is_asked_for(environment: Mapping[str, str]) -> bool:
    """Whether the environment asks for activation.

    Raises:
        PolicyError: ``ATTNPATCH`` is neither ``1`` nor ``0`` nor empty.
    """
    value = environment.get(SWITCH, "")
    return bool(value) and SWITCH_FORM.of(f"{SWITCH}=", value)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the environment asks for.

    Attributes:
        policy: The policy of every model.
        report: Whether the report is printed at exit.
        capture: Absolute path of the folder for block maps, or ``None``.
        blocks: Tokens per block.
        modules: Classes whose models are patched, ``"package.module:Class"``; empty: all.
        sites: Which modules of a model are patched, as ``apply`` takes it, or ``None``.
        quiet: Whether only errors are printed, and the report if it is asked for.
    """

    policy: Policy = dataclasses.field(default_factory=Policy)
    report: bool = False
    capture: str | None = None
    blocks: int = DEFAULT_BLOCK
    modules: tuple[str, ...] = ()
    sites: str | tuple[str, ...] | None = None
    quiet: bool = False

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Read the variables; an empty one counts as not set.

        Raises:
            PolicyError: A variable is unknown or its value is invalid; the one-line message names it.
        """
        given = {name: value for name, value in environment.items() if name.startswith(PREFIX) and value}
        for name in given:
            if name not in KNOWN:
                near = difflib.get_close_matches(name, KNOWN, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(KNOWN)}"
                raise PolicyError(f"{name} is not a variable of attnpatch; {hint}")
        fields = {FIELDS[name]: (f"{name}=", value) for name, value in given.items() if name in FIELDS}
        if FREE_MEMORY in given:
            TEXTS["min_free"].of(f"{FREE_MEMORY}=", given[FREE_MEMORY])

        def read(name: str, read: Callable[[str, str], Any], otherwise: Any) -> Any:
            return read(f"{name}=", given[name]) if name in given else otherwise

        return cls(
            Policy.of_texts(fields),
            read(REPORT, SWITCH_FORM.of, False),
            read(CAPTURE, writable_folder, None),
            read(BLOCKS, BLOCKS_FORM.of, DEFAULT_BLOCK),
            read(MODULES, MODULES_FORM.of, ()),
            read(SITES, SITES_FORM.of, None),
            read(QUIET, SWITCH_FORM.of, False),
        )


def writable_folder(shown: str, text: str) -> str:
    """Check that files can be written to a folder, which is created if it does not exist.

    Args:
        shown: The variable or option that holds the value, such as ``"ATTNPATCH_CAPTURE="``; used in the message.
        text: The value.

    Returns:
        The absolute path, because a script may change its working directory before the first file is written.

    Raises:
        PolicyError: The folder cannot be created or written to.
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
