"""Wrong usage of every command is one line on stderr: what was given, what is accepted; the exit code is 2."""

import typing

import pytest
import typer
from typer.testing import CliRunner

from attnpatch.cli.app import app

COMMANDS = typer.main.get_command(app).commands
# Enough for a command to read its options to the end.
ENOUGH = {"view": ["m"], "explain": ["m", "--seq-len", "8"], "replay": ["--model", "m", "--transcript", "t"]}
ENOUGH["merge"] = ["m"]
OPTIONS = [
    (name, option)
    for name, command in COMMANDS.items()
    for option in command.params
    if option.opts[0].startswith("-") and option.name != "help"
]
NAMED = [f"{name} {option.opts[0]}" for name, option in OPTIONS]


def line_of(*arguments):
    """The one line that wrong usage prints."""
    result = CliRunner(env={"TERM": "dumb", "COLUMNS": "60"}).invoke(app, arguments)
    assert result.exit_code == 2 and result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("attnpatch: "), result.stderr
    return lines[0].removeprefix("attnpatch: ")


@pytest.mark.parametrize(("name", "option"), OPTIONS, ids=NAMED)
def test_an_option_without_its_value_or_with_one_too_many(name, option):
    (given, *_) = option.opts
    if option.is_flag:
        assert line_of(name, f"{given}=7") == f"{given}=7: {given} takes no value; leave it out"
        return
    line = line_of(name, given)
    meaning = option.help.rstrip(".")
    assert line.startswith(f"{given} has no value; give ")
    assert line.endswith(f"({meaning[0].lower()}{meaning[1:]})")


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_that_does_not_exist(name):
    line = line_of(name, *ENOUGH.get(name, []), "--zzzzz") if name != "run" else line_of(name, "--zzzzz")
    assert line.startswith(f"attnpatch {name} has no option --zzzzz; it has ")
    assert all(option.opts[0] in line for command, option in OPTIONS if command == name)
    for command, option in OPTIONS:
        if command == name and option.opts[0].startswith("--"):
            assert f"did you mean {option.opts[0]}" in line_of(name, option.opts[0] + "x")


@pytest.mark.parametrize("name", COMMANDS)
def test_an_argument_too_many(name):
    if name == "run":  # everything after the script is the script's
        return
    line = line_of(name, *ENOUGH.get(name, []), "more")
    arguments = [option.metavar for option in COMMANDS[name].params if not option.opts[0].startswith("-")]
    assert line.startswith(
        f"more: attnpatch {name} takes {' '.join(arguments) or 'no arguments'} and options;"
    )


NUMBERS = [
    ("explain", "--seq-len", "x", "a whole number"),
    ("explain", "--batch", "1.5", "a whole number"),
    ("analyze", "--sample-rows", "0", "a whole number, at least 1"),
    ("analyze", "--seed", "-1", f"a whole number from 0 to {2**63}"),
    ("analyze", "--seed", str(2**63 + 1), f"a whole number from 0 to {2**63}"),
    ("analyze", "--chunk-size", "many", "a whole number, at least 1"),
    ("analyze", "--head-chunk-size", "0", "a whole number, at least 1"),
    ("analyze", "--max-tokens", "1e3", "a whole number, at least 1"),
    ("replay", "--top", "-1", "a whole number, at least 0"),
]
WORDS = [
    ("analyze", "--mode", "reel", "real or demo"),
    ("analyze", "--normalize", "rows", "none, row, density or column"),
    ("analyze", "--weighting", "grad", "probability or gradient"),
    ("analyze", "--truncate", "middle", "left or right"),
    ("merge", "--by", "roles", "labels or role"),
]


@pytest.mark.parametrize(("name", "option", "value", "accepted"), NUMBERS + WORDS)
def test_a_value_that_is_not_accepted(name, option, value, accepted):
    enough = ENOUGH.get(name, [])
    assert line_of(name, *enough, option, value) == f"{option} {value}: give {accepted}"
    assert line_of(name, *enough, f"{option}={value}") == f"{option}={value}: give {accepted}"


def test_every_number_and_choice_is_in_the_table():
    def is_checked(name, option):
        annotation = typing.get_type_hints(COMMANDS[name].callback.__wrapped__).get(option.name, str)
        kinds = [annotation, *typing.get_args(annotation)]
        return int in kinds or any(typing.get_origin(kind) is typing.Literal for kind in kinds)

    tested = {(name, option) for name, option, *_ in NUMBERS + WORDS}
    assert {(name, option.opts[0]) for name, option in OPTIONS if is_checked(name, option)} == tested


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["view"], "DIR|FILE is missing; give a file that BlockMap.save wrote, or a folder of them"),
        (["merge"], "DIR is missing; give a folder that attnpatch analyze wrote"),
        (["explain", "--seq-len", "8"], "MODEL is missing; give a folder with a config.json, or a name on the hub"),
        (["explain", "m"], "--seq-len is missing; give a whole number (tokens per sequence)"),
        (["replay", "--transcript", "t"], "--model is missing; give PATH (the served model: its folder, or its name"),
        (["replay", "--model", "m"], "--transcript is missing; give FILE (the log: requests with their responses"),
        (["run"], "nothing to run; give a script (attnpatch run script.py) or a module (-m module)"),
        (["viw"], f"there is no command viw; did you mean view? The commands are {', '.join(COMMANDS)}"),
        (["xyz", "--out", "o"], f"there is no command xyz; give one of {', '.join(COMMANDS)}"),
        (["--out", "o", "view"], "attnpatch has no option --out; it has --version; options of a command come after"),
        (["--versoin"], "attnpatch has no option --versoin; did you mean --version?"),
        (["--version=3"], "--version=3: --version takes no value; leave it out"),
    ],
)  # fmt: skip
def test_what_is_missing_or_unknown(arguments, line):
    assert line_of(*arguments).startswith(line)
