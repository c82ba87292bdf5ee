"""Found through the PYTHONPATH of ``attnpatch run`` where the start-up file is not installed.

An interpreter loads one module of this name; the one that this hides is loaded after it.
"""

import os
import sys

import attnpatch_boot

attnpatch_boot.start()

_here = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [_path for _path in sys.path if os.path.abspath(_path) != _here]
_own = sys.modules.pop(__name__)
try:
    import sitecustomize  # noqa: F401
except ImportError as _error:
    if _error.name != __name__:
        raise
    sys.modules[__name__] = _own
