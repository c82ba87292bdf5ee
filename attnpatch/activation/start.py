"""Called once at the start of an interpreter that was asked to activate."""

from __future__ import annotations

import os
import sys

from attnpatch.activation.settings import Settings, is_asked_for
from attnpatch.errors import PolicyError, in_one_line


def start() -> None:
    """Read the environment, and wait for the hosts to be imported.

    A value that cannot be used ends the interpreter with one line and exit code 2: better no run than hours of one
    that is not what was asked for. By ``os._exit``, since an exception here is a "Fatal Python error" with a traceback.
    """
    try:
        if not is_asked_for(os.environ):
            return
        settings = Settings.of_environment(os.environ)
    except PolicyError as error:
        if sys.stderr is not None:
            sys.stderr.write(f"attnpatch: {in_one_line(error)}\n")
            sys.stderr.flush()
        os._exit(2)
    from attnpatch.activation.session import begin

    begin(settings)
