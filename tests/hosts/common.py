"""The hosts' common test mixins, from the source distribution of transformers, and what stands in for those it leaves out.

The distribution is unpacked where ``HOST_TESTS_FOLDER`` says; nothing of it is in this repository. It ships the tests
that every model has in common, not those of single models, of exporting or of generation: the first two are left out,
and ``generating.py`` takes the place of the third.
"""

from __future__ import annotations

import importlib
import os
import sys
import types

import generating

_PACKAGE = "tests"
# What the distribution's modules import and it does not ship: names, and what stands in for them.
_STANDINS = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": generating.GenerationChecks},
}


def load(name: str) -> types.ModuleType:
    """A module of the hosts' tests."""
    if _PACKAGE not in sys.modules:
        package = types.ModuleType(_PACKAGE)
        package.__path__ = [os.environ["HOST_TESTS_FOLDER"]]
        sys.modules[_PACKAGE] = package
        for path, names in _STANDINS.items():
            parent, _, _ = path.rpartition(".")
            for each in (parent, path):
                module = types.ModuleType(f"{_PACKAGE}.{each}")
                module.__path__ = []
                sys.modules[module.__name__] = module
            vars(sys.modules[f"{_PACKAGE}.{path}"]).update(names)
    return importlib.import_module(f"{_PACKAGE}.{name}")


ModelTesterMixin = load("test_modeling_common").ModelTesterMixin
TrainingTesterMixin = load("test_training_mixin").TrainingTesterMixin
