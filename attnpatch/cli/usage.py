"""Wrong usage in one line. typer's own message fills a box of several lines and does not say what was given."""

from __future__ import annotations

import difflib
import inspect
import re
import typing
from typing import Any

import typer

# The class that typer raises for wrong usage. It is click's, or typer's own copy of it, depending on the release.
WrongUsage: type[Exception] = typer.BadParameter.__mro__[1]


def said_in_one_line(error: Any, command: Any, args: list[str]) -> str:
    """What was given, what is accepted and the way out.

    Args:
        error: A ``WrongUsage``.
        command: The command that was called.
        args: Its arguments, as they were given.
    """
    kind = type(error).__name__
    name = getattr(error.ctx, "command_path", None) or "attnpatch"
    if kind == "NoSuchOption":
        return _no_such_option(error.option_name, command, name)
    option = getattr(error, "param", None) or _named(command, getattr(error, "option_name", None))
    if option is not None:
        if kind == "MissingParameter":
            return f"{_written(option)} is missing; give {_described(command, option)}"
        if kind == "BadOptionUsage" and getattr(option, "is_flag", False):
            return f"{_given(option, args)}: {error.option_name} takes no value; leave it out"
        if kind == "BadOptionUsage":
            return f"{error.option_name} has no value; give {_described(command, option)}"
        accepted = _accepted(command, option)
        if accepted is not None:
            return f"{_given(option, args)}: give {accepted}"
    extra = re.search(r"unexpected extra argument.*\((.*)\)", str(error))
    if extra:
        taken = [_written(option) for option in command.params if not option.opts[0].startswith("-")]
        return f"{extra[1]}: {name} takes {' '.join(taken) or 'no arguments'} and options; {name} --help lists them"
    return f"{error.format_message().rstrip('.')}; {name} --help shows what is accepted"


def no_such_command(given: str, commands: list[str]) -> str:
    """The line for a command that does not exist."""
    close = difflib.get_close_matches(given, commands, 1)
    meant = f"did you mean {close[0]}? The commands are" if close else "give one of"
    return f"there is no command {given}; {meant} {', '.join(commands)}"


def _no_such_option(given: str, command: Any, name: str) -> str:
    options = [text for option in command.params for text in option.opts if text.startswith("-")]
    close = difflib.get_close_matches(given, options)
    meant = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(options)};"
    if name == "attnpatch" and not close:
        meant += " options of a command come after the command's name;"
    return f"{name} has no option {given}; {meant} {name} --help describes all"


def _named(command: Any, name: str | None) -> Any:
    return next((option for option in command.params if name in option.opts), None)


def _written(option: Any) -> str:
    """An option as it is given; an argument by its name in the help."""
    return option.opts[0] if option.opts[0].startswith("-") else str(option.metavar or option.name.upper())


def _described(command: Any, option: Any) -> str:
    """What a missing value may be: what is accepted, or the value's name and meaning in the help."""
    _, info = _annotation(command, option)
    meaning = str(info.help).rstrip(".")
    meaning = meaning[:1].lower() + meaning[1:]
    if not option.opts[0].startswith("-"):
        return meaning
    return f"{option.metavar or _accepted(command, option) or 'a name'} ({meaning})"


def _given(option: Any, args: list[str]) -> str:
    """The option with its value, as they were given."""
    names = [*option.opts, *option.secondary_opts]
    for place in reversed(range(len(args))):
        text, separator, _ = args[place].partition("=")
        if text in names:
            return args[place] if separator else " ".join(args[place : place + 2])
    return _written(option)


def _accepted(command: Any, option: Any) -> str | None:
    """The values that an option takes, from the annotation of its parameter; ``None``: any text."""
    bare, info = _annotation(command, option)
    kinds = typing.get_args(bare) if type(None) in typing.get_args(bare) else (bare,)
    words = [
        str(word)
        for kind in kinds
        if typing.get_origin(kind) is typing.Literal
        for word in typing.get_args(kind)
    ]
    if words:
        return ", ".join(words[:-1]) + " or " + words[-1]
    if int not in kinds:
        return None
    if info.min is None:
        return "a whole number"
    return (
        f"a whole number, at least {info.min}"
        if info.max is None
        else f"a whole number from {info.min} to {info.max}"
    )


def _annotation(command: Any, option: Any) -> tuple[Any, Any]:
    """The type of an option's parameter, and what typer is told of it. typer's own types differ between releases."""
    annotation = inspect.signature(command.callback, eval_str=True).parameters[option.name].annotation
    kind, info = typing.get_args(annotation)
    return kind, info
