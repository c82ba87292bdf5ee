"""The fields of ``Policy`` as options of a command."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from attnpatch.policy import TEXTS, Policy

OPTIONS = {field: "--" + field.replace("_", "-") for field in TEXTS}


def with_policy_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a typer command one option per field of ``Policy``.

    The command gets these options as its first argument, in the form that ``Policy.of_texts`` reads: for each field's
    name, the option's name (with a space after it) and the typed text.
    """
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    added = [
        inspect.Parameter(
            field,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                str | None,
                typer.Option(OPTIONS[field], metavar=form.metavar, help=_help(field, form.meaning)),
            ],
        )
        for field, form in TEXTS.items()
    ]

    @functools.wraps(command)
    def with_options(**values: Any) -> None:
        texts = {field: values.pop(field) for field in TEXTS}
        given = {field: (OPTIONS[field] + " ", text) for field, text in texts.items() if text is not None}
        command(given, **values)

    own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    with_options.__signature__ = inspect.Signature([*added, *own])  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in [*added, *own]}
    del with_options.__wrapped__  # type: ignore[attr-defined]
    return with_options


def _help(field: str, meaning: str) -> str:
    default = getattr(Policy(), field)
    written = int(default) if isinstance(default, bool) else default
    return f"{meaning[0].upper()}{meaning[1:]}." + ("" if default is None else f" Default: {written}.")
