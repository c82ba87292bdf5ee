"""The former name of ``attnpatch.conversations``. Its modules are imported under both names, with a warning."""

import importlib
import sys
import warnings

_MOVED = {
    "analyzer": "analyzer",
    "conversations": "reading.files",
    "drawing": "drawing",
    "gradient": "gradient",
    "merging": "merge",
    "passes": "passes",
    "records": "reading.records",
    "result": "result",
    "running": "batch",
}
warnings.warn(
    "attnpatch.analysis is now attnpatch.conversations; the former name goes with the next release",
    DeprecationWarning,
    stacklevel=2,
)
for _old, _new in _MOVED.items():
    _module = importlib.import_module(f"attnpatch.conversations.{_new}")
    sys.modules[f"{__name__}.{_old}"] = globals()[_old] = _module
