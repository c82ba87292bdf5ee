"""Runs at the start of every interpreter; imports nothing unless ATTNPATCH is set.

``attnpatch.pth`` checks the variable itself, because importing this file already takes 0.2 ms
(``python -m benchmarks startup``); the entry point in ``attnpatch.start`` (Python 3.15, PEP 829) cannot check it.
Virtual environments run their start-up files twice, so ``_started`` guards against the second run.
"""

import os
import sys

_started = False


def start():
    """Activate attnpatch if ATTNPATCH asks for it; an error is printed and the interpreter goes on."""
    global _started
    if os.environ.get("ATTNPATCH", "") in ("", "0") or sys.flags.ignore_environment or _started:
        return
    _started = True
    try:
        from attnpatch.activation.start import start

        start()
    except Exception as error:
        if sys.stderr is not None:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            sys.stderr.write(f"attnpatch: not active: {reason}\n")
