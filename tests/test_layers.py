"""Who may import whom (DESIGN section 5), and what importing the package costs."""

import ast
import pathlib
import subprocess
import sys

import pytest

import attnpatch

ROOT = pathlib.Path(attnpatch.__file__).parent
# A module may import from its own layer and from lower ones.
LAYERS = [
    {"errors"},
    {"failures", "class_methods", "precision"},
    {"policy"},
    {"memory"},
    {"ledger", "observing"},
    {"rows"},
    {"blocks", "plotting"},
    {"maps"},
    {"recording"},
    {"hosts"},
    {"patching"},
    {"reporting", "model_patches", "dry_run"},
    {"capturing"},
    {"api"},
    {"viewing"},
    {"conversations"},
    {"__init__"},
    {"demo"},
    {"activation"},
    {"cli"},
    {"__main__"},
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}


def imported(path):
    """First path component below the package of everything a file imports from it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "attnpatch":
            parts = node.module.split(".")[1:]
            yield from (
                [parts[0]] if parts else [a.name if a.name in HEIGHT else "__init__" for a in node.names]
            )
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "attnpatch":
                    yield (alias.name.split(".") + ["__init__"])[1]


def test_imports_go_one_way():
    wrong, seen = [], 0
    for path in ROOT.rglob("*.py"):
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for other in imported(path):
            seen += 1
            if HEIGHT[other] > HEIGHT[own]:
                wrong.append(f"{path.relative_to(ROOT)} imports {other}")
    assert not wrong
    assert seen > 40


def test_rows_and_recording_do_not_know_each_other():
    for one, other in (
        ("rows", "recording"),
        ("recording", "rows"),
        ("rows", "patching"),
        ("recording", "patching"),
    ):
        for path in (ROOT / one).rglob("*.py"):
            assert other not in set(imported(path)), path


def test_hosts_are_named_nowhere_else():
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0] in ("hosts", "demo"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("transformers", "diffusers") for name in names), path


@pytest.mark.parametrize(
    "what", ["attnpatch", "attnpatch.policy", "attnpatch.errors", "attnpatch.activation.session"]
)
def test_what_needs_no_torch_imports_none(what):
    """An interpreter that was asked to activate must know a bad value before the second that torch takes."""
    code = f"import sys, {what}; print(sorted({{'torch', 'numpy', 'psutil', 'wrapt', 'transformers'}} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "first",
    [
        "attnpatch.reporting",
        "attnpatch.blocks.spec",
        *(pytest.param(f"attnpatch.{name}", marks=pytest.mark.long) for name in ("api", "policy", "errors")),
    ],
)
def test_public_names_are_what_they_are_whatever_is_imported_first(first):
    code = (
        f"import {first}\n"
        "import attnpatch, types\n"
        "from attnpatch.reporting import Report\n"
        "names = {name: getattr(attnpatch, name) for name in attnpatch.__all__}\n"
        "assert set(names) <= set(dir(attnpatch))\n"
        "functions = [n for n, value in names.items() if isinstance(value, types.FunctionType)]\n"
        "assert functions == ['apply', 'capture', 'explain', 'patched', 'register', 'remove', 'report'], functions\n"
        "from attnpatch import *\n"
        "assert all(globals()[name] is value for name, value in names.items())\n"
        "assert not hasattr(attnpatch, 'nonsense')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_those_that_type_checkers_see():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = [alias.name for node in block.body for alias in node.names]
    assert sorted(seen) == sorted(attnpatch.__all__) == sorted(attnpatch._HOMES)


def test_import_is_light_and_patches_nothing():
    code = (
        "import sys, torch; forward = torch.nn.MultiheadAttention.forward\n"
        "import attnpatch\n"
        "assert torch.nn.MultiheadAttention.forward is forward\n"
        "heavy = {'transformers', 'diffusers', 'matplotlib', 'pandas', 'typer', 'rich', 'accelerate', 'bitsandbytes'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
