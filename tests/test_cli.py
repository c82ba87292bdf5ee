"""The command line: what it answers to bad input, and that no traceback reaches the user."""

import os
import signal
import subprocess
import sys
from importlib.metadata import entry_points

import fresh
import pytest
import typer
from typer.testing import CliRunner

import attnpatch
from attnpatch.cli.app import OneLineErrors, app
from attnpatch.errors import CaptureError

# Put before the command in a child interpreter: the packages named are not there.
WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
sys.argv = ["attnpatch", *{arguments!r}]
from attnpatch.__main__ import main
main()
"""


def child(*command):
    """Run a Python interpreter with ``command``."""
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)


def one_line(text):
    """The only line of ``text``, which must be all there is."""
    lines = text.splitlines()
    assert len(lines) == 1, text
    return lines[0]


def test_version():
    assert CliRunner().invoke(app, ["--version"]).output == f"attnpatch {attnpatch.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["dmeo"], "dmeo"),
        (["demo", "--uot", "x"], "--uot"),
        (["demo", "extra"], "extra"),
        (["demo", "--out"], "--out"),
        # The one subcommand there is needs its name, so that a second one changes nothing for its users.
        (["--out", "x"], "--out"),
    ],
)
def test_usage_errors_name_what_was_given(arguments, says):
    result = CliRunner(env={"TERM": "dumb", "COLUMNS": "100"}).invoke(app, arguments)
    assert result.exit_code == 2
    assert says in result.stderr and "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--out", "file"], "--out file is a file"),
        (["--out", "file/below"], "cannot write --out file/below: Not a directory"),
        (["--out", "/proc/none"], "cannot write --out /proc/none: "),
        (["--json", "folder"], "--json folder is a folder"),
        (["--json", "nowhere/f.json"], "cannot write --json nowhere/f.json: No such file or directory"),
        (["--json", "file/f.json"], "cannot write --json file/f.json: Not a directory"),
    ],
)
def test_demo_refuses_a_place_it_cannot_write_to(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    result = CliRunner().invoke(app, ["demo", *arguments])
    assert result.exit_code == 1
    assert one_line(result.stderr).startswith(f"attnpatch: {says}")
    assert result.stdout == ""
    assert (tmp_path / "file").read_text() == "mine"


def failing(error):
    """A command line as ``attnpatch``'s, whose only subcommand fails."""
    other = typer.Typer(cls=OneLineErrors, pretty_exceptions_enable=False)
    other.callback()(lambda: None)

    @other.command()
    def fail():
        if error is KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)
        raise error

    return CliRunner().invoke(other, ["fail"])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (CaptureError("nothing was captured:\n  call the model"), "nothing was captured: call the model"),
        (PermissionError(13, "Permission denied", "map.png"), "map.png: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("unreadable"), "unreadable"),
        (KeyboardInterrupt, "stopped"),
    ],
)
def test_failures_are_one_line(error, line):
    result = failing(error)
    assert result.exit_code == 1
    assert one_line(result.stderr) == f"attnpatch: {line}"


def test_a_bug_is_not_hidden():
    assert isinstance(failing(ZeroDivisionError()).exception, ZeroDivisionError)


def test_a_reader_that_goes_away_is_no_failure_to_talk_about():
    result = failing(BrokenPipeError(32, "Broken pipe"))
    assert result.exit_code == 1 and result.stderr == ""


@pytest.mark.parametrize("absent", ["typer", "rich"])
def test_without_the_extra_it_says_what_to_install(absent):
    done = child("-c", WITHOUT.format(absent={absent}, arguments=["demo"]))
    assert done.returncode == 1
    expected = 'attnpatch needs typer and rich for its command line: pip install "attnpatch[cli]"'
    assert one_line(done.stderr) == expected


@pytest.mark.parametrize("absent", ["transformers", "matplotlib"])
def test_demo_without_its_extras_says_what_to_install(absent, tmp_path):
    out = tmp_path / "out"
    done = child("-c", WITHOUT.format(absent={absent}, arguments=["demo", "--out", str(out)]))
    assert done.returncode == 1
    line = one_line(done.stderr)
    assert line == f'attnpatch: the demo needs {absent}: pip install "attnpatch[transformers,plot,cli]"'
    assert not out.exists()


def test_module_and_console_script_are_the_same_command():
    done = child("-m", "attnpatch", "--version")
    assert done.stdout == f"attnpatch {attnpatch.__version__}\n"
    (script,) = entry_points(group="console_scripts", name="attnpatch")
    assert script.value == "attnpatch.__main__:main"


def test_help_lists_the_commands():
    done = child("-m", "attnpatch", "--help")
    assert (
        done.returncode == 0 and "demo" in done.stdout and "view" in done.stdout and os.linesep in done.stdout
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--min-free", "2", "s.py"], "--min-free '2' is not accepted; give a size such as 2GB"),
        (["run", "--blocks", "128", "s.py"], "--blocks 128 is given without --capture; add --capture FOLDER"),
        (["analyze", "--model", "m", "--json", "j", "--layers", "x"], "--layers x: give all, last, or whole"),
        (["analyze", "--model", "m"], "--json is missing"),
        (
            ["replay", "--model", "m", "--transcript", "t", "--layers", "x"],
            "--layers x: give all, last, or whole numbers",
        ),
        (["view", "m.safetensors", "--out", "."], "--out . is a folder"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, message):
    done = fresh.run("-m", "attnpatch", *arguments)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
