"""What is said of a failure of attnpatch's own code."""

import warnings

import pytest

from attnpatch import failures
from attnpatch.errors import AttnpatchWarning
from attnpatch.memory.free import free_bytes


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch):
    monkeypatch.setattr(failures, "_said", set())


class Unprintable(Exception):
    def __str__(self):
        raise ValueError


def raised(cause):
    try:
        cause()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def asking_no_device():
    free_bytes("no device")


def test_one_warning_names_the_step_the_error_and_the_line():
    with pytest.warns(AttnpatchWarning) as said:
        failures.warn_once("the look at memory", raised(asking_no_device))
        failures.warn_once("the look at memory", raised(asking_no_device))
        failures.warn_once("the look at masks", raised(asking_no_device))
    texts = [str(each.message) for each in said]
    assert len(texts) == 2
    assert all(
        part in texts[0] for part in ("the look at memory", "RuntimeError", "memory/free.py, line", "report")
    )


def test_it_never_raises(capsys):
    """Where warnings are errors, and where the error cannot be printed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        failures.warn_once("a step", Unprintable())
    assert "a step (Unprintable: an error that cannot be printed; no line)" in capsys.readouterr().err
