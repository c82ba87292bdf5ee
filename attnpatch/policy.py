"""When attention runs by rows: one frozen dataclass with the same fields in Python, environment and command line."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from attnpatch.errors import PolicyError
from attnpatch.sizes import parse_size, size_text

MODES = ("auto", "always", "never")
# The fewest query rows in a step, unless the call has fewer: smaller products round differently (`rows/graph/axes.py`).
LEAST_ROWS = 16
# The variable that overrides what memory.free_bytes measures; defined here because this module needs no torch.
FREE_MEMORY = "ATTNPATCH_FREE_MEMORY"


# A size in words that is smaller than this is a slip: "2" for "2GB", "1KB" for "1MB".
_LEAST_IN_WORDS = 10**4


def _check_size(name: str, size: Any) -> None:
    """Refuse what is no size, and one that nobody can mean. A number in a program is taken as it is.

    Raises:
        PolicyError: The size is refused.
    """
    count = parse_size(size, name)
    if count == 0 and name != "min_free":
        raise PolicyError(f"{name}=0 leaves no room for a single row; give a size like '64MB', or None")
    check_words(name, size, count)


def check_words(name: str, size: Any, count: int) -> None:
    """Refuse a size in words that is too small to be meant; ``count`` are its bytes.

    Raises:
        PolicyError: The size is refused.
    """
    if isinstance(size, str) and 0 < count < _LEAST_IN_WORDS:
        shown = size if size.strip()[-1:].isalpha() else f"{size} bytes"
        raise PolicyError(
            f"{name}={size!r} is only {shown.strip()}, too little to be meant; give a size with its unit, such as '2GB'"
        )


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PolicyError(f"{name}={value!r} is not accepted; give a whole number of at least {least}")


class NativeNeed(NamedTuple):
    """What a call would take natively.

    Attributes:
        temporaries: Bytes that it would hold at once, beside its inputs and its output.
        largest: Bytes of the largest single tensor among them, as far as it is known beforehand.
    """

    temporaries: int
    largest: int


@dataclasses.dataclass(frozen=True)
class Policy:
    """When attention runs by rows, and in what steps.

    Attributes:
        mode: ``"auto"`` decides each call by the fields below; ``"always"`` runs every call by rows, ``"never"`` none.
        min_tokens: A call with this many query rows or fewer stays native.
        min_free: A call runs by rows when less memory than this is free; bytes, or a string such as ``"2GB"``.
        headroom: A call also runs by rows when its native temporaries would exceed this share of free memory.
        max_allocation: A call also runs by rows when its scores (query rows x keys of all heads) would be one tensor of
            more bytes than this, whatever is free; a step makes no larger one either. ``None``: the device's own limit,
            if one is known: 4 GiB or the longest buffer on MPS, 4 GiB on Intel GPUs without float64 (Arc A).
        workspace: The most bytes that one attention call may hold beside its inputs and output; ``None`` chooses by
            free memory and, on CPU, by the size of the processor's cache.
        rows: Query rows per step; ``None`` chooses. Steps are of about equal size, begin at multiples of 16 rows and
            have at least 16 rows (32 in narrow dtypes), because fewer rows round differently. A smaller number is
            raised to that, with one warning.
        heads: Heads per step; ``None`` chooses.
        retry_on_oom: When a native call runs out of memory, compute its result by rows, halving the step until it fits.
        fuse: Run hand-written attention with torch's fused kernel if its steps are those of
            ``scaled_dot_product_attention``. This does not depend on free memory: it holds for every call of more than
            ``min_tokens`` query rows, under ``mode="always"`` for every call, under ``"never"`` for none. It is faster,
            and agrees to rounding, not to the last bit. A call with any other step runs by rows, and the report names
            that step.
        replace_kernels: Compute calls of flash-attn, xFormers and SageAttention with torch's functions instead, fused
            where torch has a fused kernel for them, otherwise by rows. For devices that these packages do not support.

    Raises:
        PolicyError: A value is invalid.
    """

    mode: str = "auto"
    min_tokens: int = 1024
    min_free: int | str = "2GB"
    headroom: float = 0.5
    max_allocation: int | str | None = None
    workspace: int | str | None = None
    rows: int | None = None
    heads: int | None = None
    retry_on_oom: bool = True
    fuse: bool = False
    replace_kernels: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.mode, str) or self.mode not in MODES:
            raise PolicyError(
                f"mode={self.mode!r} is not accepted; give one of {', '.join(map(repr, MODES))}"
            )
        _check_count("min_tokens", self.min_tokens, 0)
        _check_size("min_free", self.min_free)
        for name in ("workspace", "max_allocation"):
            if getattr(self, name) is not None:
                _check_size(name, getattr(self, name))
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
        for name in ("retry_on_oom", "fuse", "replace_kernels"):
            if not isinstance(getattr(self, name), bool):
                raise PolicyError(f"{name}={getattr(self, name)!r} is not accepted; give True or False")

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Policy:
        """A policy from keyword arguments.

        Raises:
            PolicyError: A field is unknown (the message suggests the nearest known one) or its value is invalid.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ";"
                raise PolicyError(f"unknown policy field {name!r}{hint} Known fields: {', '.join(known)}")
        policy = cls(**fields)
        if policy.rows is not None and policy.rows < LEAST_ROWS:
            # The warning has the same text and line each time, so that Python shows it only once.
            warnings.warn(
                f"rows={policy.rows}: steps of {LEAST_ROWS} query rows are taken, because fewer round differently",
                stacklevel=2,
            )
        return policy

    @classmethod
    def of_texts(cls, texts: Mapping[str, tuple[str, str]]) -> Policy:
        """A policy from texts in the environment or on the command line.

        Every field has one written form (``TEXTS``), the same in both places. Nothing is guessed: ``2gigs`` is not a
        size, and ``true`` is not 1. ``None`` is written ``none``.

        Args:
            texts: For each field, the variable or option (``"ATTNPATCH_MIN_FREE="`` or ``"--min-free "``) and its text.

        Raises:
            PolicyError: A text is not accepted; one line names the variable or option, the text and the accepted form.
        """
        fields = {}
        for field, (shown, text) in texts.items():
            # Each field is checked by itself, so that the message can name the variable or option.
            fields[field] = TEXTS[field].of(shown, text, functools.partial(cls._with, field))
        return cls(**fields)

    @classmethod
    def _with(cls, field: str, value: Any) -> Policy:
        return cls(**{field: value})

    @property
    def min_free_bytes(self) -> int:
        return parse_size(self.min_free, "min_free")

    @property
    def workspace_bytes(self) -> int | None:
        return None if self.workspace is None else parse_size(self.workspace, "workspace")

    @property
    def max_allocation_bytes(self) -> int | None:
        return None if self.max_allocation is None else parse_size(self.max_allocation, "max_allocation")

    def by_rows(self, q_len: int, need: NativeNeed, free: int, limit: int | None = None) -> bool:
        """Whether a call runs by rows.

        Args:
            q_len: Its query rows.
            need: What it would take natively.
            free: Bytes that are free.
            limit: The most bytes of one tensor on its device, if that is known.
        """
        if self.mode != "auto":
            return self.mode == "always"
        if q_len <= self.min_tokens:
            return False
        if free < self.min_free_bytes or need.temporaries > self.headroom * free:
            return True
        most = self._most(limit)
        return most is not None and need.largest > most

    def _most(self, limit: int | None) -> int | None:
        return limit if self.max_allocation is None else self.max_allocation_bytes

    def reason(self, q_len: int, need: NativeNeed, free: int, limit: int | None = None) -> str:
        """The reason for the answer of ``by_rows``, in words."""
        if self.mode != "auto":
            return f"mode is {self.mode!r}"
        if q_len <= self.min_tokens:
            return f"short call: {q_len} rows, by rows only above {self.min_tokens} (min_tokens)"
        least = size_text(self.min_free_bytes)
        if free < self.min_free_bytes:
            return f"little memory: {size_text(free)} free is less than min_free {least}"
        needed = f"{size_text(free)} free, {size_text(need.temporaries)} needed"
        if need.temporaries > self.headroom * free:
            return f"little memory: {needed}, more than the share {self.headroom:g} (headroom)"
        most = self._most(limit)
        if most is not None and need.largest > most:
            whose = (
                "the device's limit of one allocation" if self.max_allocation is None else "max_allocation"
            )
            return f"scores of {size_text(need.largest)} exceed {whose}, {size_text(most)}"
        return f"enough memory: {needed}"


@dataclasses.dataclass(frozen=True)
class TextForm:
    """How a value is written in the environment and on the command line.

    Attributes:
        read: Turns a text into the value; raises ``ValueError`` if the text does not have this form.
        accepted: The form in words.
        metavar: The form in one word, for ``--help``.
        meaning: What the value does, for ``--help``.
    """

    read: Callable[[str], Any]
    accepted: str
    metavar: str = ""
    meaning: str = ""

    def of(self, shown: str, text: str, check: Callable[[Any], Any] | None = None) -> Any:
        """The value that a text stands for.

        Args:
            shown: The variable or option, such as ``"ATTNPATCH_MIN_FREE="`` or ``"--min-free "``; used in the message.
            text: The text.
            check: Raises ``PolicyError`` if the value is invalid.

        Raises:
            PolicyError: The text does not have this form, or its value is invalid.
        """
        try:
            value = self.read(text)
            if check is not None:
                check(value)
            return value
        except (PolicyError, ValueError):
            raise PolicyError(f"{shown}{text!r} is not accepted; give {self.accepted}") from None


def read_whole(text: str) -> int:
    """A whole number in plain digits; ``int()`` would also take ``1_000``, signs and spaces."""
    if not re.fullmatch("[0-9]+", text):
        raise ValueError(text)
    return int(text)


def read_switch(text: str) -> bool:
    """``1`` or ``0``."""
    return {"1": True, "0": False}[text] if text in ("1", "0") else _refuse(text)


def _read_share(text: str) -> float:
    return float(text) if re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", text) else _refuse(text)


def read_size(text: str) -> str:
    """Check that a text is a size, and return it unchanged."""
    parse_size(text)
    return text


def _or_none(read: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text == "none" else read(text)


def _refuse(text: str) -> Any:
    raise ValueError(text)


_SIZE_FORM = "a size such as 2GB, 512MiB or a number of bytes (at least 10000)"
# One entry for every field of Policy; a test compares the two.
TEXTS = {
    "mode": TextForm(
        str,
        "auto, always or never",
        "MODE",
        "when attention runs by rows: auto (decided call by call), always, never",
    ),
    "min_tokens": TextForm(
        read_whole, "a whole number such as 1024", "N", "run by rows only with more query tokens than this"
    ),
    "min_free": TextForm(read_size, _SIZE_FORM, "SIZE", "run by rows when less memory than this is free"),
    "headroom": TextForm(
        _read_share,
        "a share above 0 and at most 1, such as 0.5",
        "SHARE",
        "also run by rows when a native call would take more than this share of free memory",
    ),
    "max_allocation": TextForm(
        _or_none(read_size),
        f"{_SIZE_FORM} above 0, or none",
        "SIZE",
        "also run by rows when the scores of a call would be one tensor of more than this; if not given, the device's limit",
    ),
    "workspace": TextForm(
        _or_none(read_size),
        f"{_SIZE_FORM} above 0, or none",
        "SIZE",
        "most memory that one attention call by rows may hold",
    ),
    "rows": TextForm(
        _or_none(read_whole), "a whole number of at least 1, or none", "N", "query rows per step"
    ),
    "heads": TextForm(_or_none(read_whole), "a whole number of at least 1, or none", "N", "heads per step"),
    "retry_on_oom": TextForm(
        read_switch, "1 or 0", "1|0", "after an out-of-memory error, run by rows in smaller steps"
    ),
    "fuse": TextForm(
        read_switch, "1 or 0", "1|0", "run hand-written attention with the fused kernel, equal to rounding"
    ),
    "replace_kernels": TextForm(
        read_switch,
        "1 or 0",
        "1|0",
        "compute flash-attn, xFormers and SageAttention calls with torch's functions",
    ),
}
