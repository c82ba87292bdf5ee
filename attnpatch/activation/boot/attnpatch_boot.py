"""What the start-up files run in every interpreter: imports nothing before it has seen ATTNPATCH.

``attnpatch.pth`` looks at the variable itself, because even this import takes 0.1 ms; the entry point in
``attnpatch.start`` (Python 3.15, PEP 829) cannot. A virtual environment may run both more than once.
"""

import os
import sys

_started = False


def start():
    """Activate attnpatch if the environment asks for it; whatever goes wrong, the interpreter goes on."""
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
