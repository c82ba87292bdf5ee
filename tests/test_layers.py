"""Who may import whom (DESIGN section 5), and what importing the package costs."""

import ast
import pathlib
import subprocess
import sys

import attnpatch

ROOT = pathlib.Path(attnpatch.__file__).parent
# A module may import from its own layer and from lower ones.
LAYERS = [
    {"errors"},
    {"policy"},
    {"memory"},
    {"ledger"},
    {"rows"},
    {"patching", "capture", "hosts"},
    {"report", "rehearsal"},
    {"explain"},
    {"api"},
    {"__init__"},
    {"demo", "analysis", "viewing"},
    {"cli", "activation"},
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


def test_rows_and_capture_do_not_know_each_other():
    for one, other in (
        ("rows", "capture"),
        ("capture", "rows"),
        ("rows", "patching"),
        ("capture", "patching"),
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
