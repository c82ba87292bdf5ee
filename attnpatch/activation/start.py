"""Starts activation; called once, at the start of an interpreter whose environment sets ``ATTNPATCH``."""

from __future__ import annotations

import os
import sys

from attnpatch.activation.settings import Settings, is_asked_for
from attnpatch.errors import PolicyError, in_one_line


def start() -> None:
    """Read the environment, and arrange that models are patched once transformers or diffusers is imported.

    An invalid value ends the interpreter with one line and exit code 2, because the script would otherwise run for
    hours with other settings than were asked for. ``os._exit`` is used because an exception here would print a
    "Fatal Python error" with a traceback.
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
