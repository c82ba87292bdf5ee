"""What the start-up files run in every interpreter: imports nothing before it has seen ATTNPATCH.

``attnpatch.pth`` looks for the variable itself, because even this import takes 0.2 ms (``python -m benchmarks startup``);
the entry point in ``attnpatch.start`` (Python 3.15, PEP 829) cannot. Virtual environments run their files twice.
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
