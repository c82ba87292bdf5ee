"""attnpatch where torch lacks a name that it needs: models run as they are, with one warning, and no map is made."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from attnpatch.errors import AttnpatchWarning, ReleaseError, in_one_line
from attnpatch.releases.tested import TESTED, installed

_said: set[str] = set()


@functools.cache
def missing() -> ReleaseError | None:
    """The error for the name that torch lacks; ``None`` if it has all of them. This imports torch.

    Raises:
        ImportError: torch itself is not installed.
    """
    try:
        from attnpatch import compat  # noqa: F401
    except (ImportError, AttributeError) as error:
        if "torch" not in sys.modules:
            raise
        oldest, newest = TESTED["torch"]
        name = in_one_line(error).partition(" (")[0]  # without the path of torch's file
        return ReleaseError(f"attention by rows and maps (torch {oldest} to {newest}): {name}")
    return None


def instead_of(name: str, error: ReleaseError) -> Any:
    """What the package's public name means as long as attnpatch is off."""

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise ReleaseError(f"{name} is off with torch {installed('torch')}: {error}")

    return _INSTEAD.get(name, lambda _: refused)(error)


def _warn(error: ReleaseError) -> None:
    words = f"attnpatch: off with torch {installed('torch')}: {error}. Models run as they are."
    if words not in _said:
        _said.add(words)
        warnings.warn(words, AttnpatchWarning, stacklevel=3)


def _unchanged(error: ReleaseError) -> Callable[..., Any]:
    def given(model: Any, *args: Any, **kwargs: Any) -> Any:
        _warn(error)
        return model

    return given


def _unchanged_inside(error: ReleaseError) -> Callable[..., Any]:
    @contextlib.contextmanager
    def given(model: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        _warn(error)
        yield model

    return given


def _function(error: ReleaseError) -> Callable[..., Any]:
    def given(function: Any = None, /, **policy: Any) -> Any:
        _warn(error)
        return function if function is not None else lambda decorated: decorated

    return given


def _report(error: ReleaseError) -> Callable[..., Any]:
    return lambda model: f"attnpatch is off with torch {installed('torch')}: {error}"


def _register(_: ReleaseError) -> Callable[..., Any]:
    return lambda kind: kind


# Scripts go on with these; any other name raises an error when it is called.
_INSTEAD: dict[str, Callable[[ReleaseError], Any]] = {
    "apply": _unchanged,
    "remove": _unchanged,
    "patched": _unchanged_inside,
    "by_rows": _function,
    "report": _report,
    "register": _register,
}
