"""Activates attnpatch where its start-up file is not installed: ``attnpatch run`` puts this folder on PYTHONPATH.

Python imports only one ``sitecustomize``. If this file hides another one, it imports that one afterwards.
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
