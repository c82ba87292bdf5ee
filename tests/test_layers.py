"""Who may import whom (DESIGN section 5), and what importing the package costs."""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

import attnpatch

ROOT = pathlib.Path(attnpatch.__file__).parent
# A module may import from its own layer and from lower ones.
LAYERS = [
    {"errors"},
    {"releases"},
    {"atomic_files", "failures", "compat", "oom"},
    {"sizes"},
    {"policy"},
    {"memory", "sdpa_call"},
    {"ledger", "observing"},
    {"rows"},
    {"blocks", "plotting"},
    {"maps"},
    {"recording"},
    {"hosts"},
    {"patching"},
    {"reporting", "dry_run", "standins"},
    {"capturing"},
    {"api"},
    {"viewing"},
    {"conversations"},
    {"analysis"},
    {"__init__"},
    {"demo"},
    {"activation"},
    {"cli"},
    {"__main__"},
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def nodes_of(path):
    return list(ast.walk(tree_of(path)))


def imported(path):
    """First path component below the package of everything a file imports from it."""
    for node in nodes_of(path):
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


def test_what_is_imported_by_name_is_known():
    """The test above does not see it. Blocks of pictures are read by the code of a host, which stands above blocks.
    A stand-in imports its own modules.
    """
    found = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if "import_module(" in path.read_text(encoding="utf-8")
    }
    assert found == {
        "__init__.py",
        "analysis/__init__.py",
        "blocks/spec.py",
        "patching/forward_swap.py",
        "standins/modules.py",
    }


MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def imports_of(path):
    """Modules of the package that a file imports, in functions too, but not for type checkers alone.

    A class and a function that take each other need a name for it only in annotations.
    """
    tree = tree_of(path)
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def circles(graph):
    """Sets of files that reach each other: one look at what each file reaches is enough for a few hundred."""
    reached = {}
    for start in graph:
        seen, todo = set(), list(graph[start])
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += graph[name]
        reached[start] = seen
    return {frozenset(b for b in reached[a] if a in reached[b]) for a in graph if a in reached[a]}


def test_no_files_import_each_other_in_a_circle():
    graph = {
        name: {other for other in imports_of(path) if other in MODULES and other != name}
        for name, path in MODULES.items()
    }
    assert sum(map(len, graph.values())) > 300
    assert circles(graph) == set()
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {frozenset("bc")}


# Whose arguments others decide: options of a public function, of a command, an operator of torch, a kernel of Triton.
WIDE = {
    "capturing/capture.py: capture", "conversations/analyzer.py: __init__", "conversations/batch.py: analyze_all", "cli/app.py: run",
    "plotting/map_figure.py: draw", "cli/analyze.py: analyze", "cli/replay.py: replay", "rows/sdpa/encoder_fast_paths.py: multihead",
    "maps/block_map.py: plot", "rows/sdpa/encoder_fast_paths.py: encoder_layer", "recording/gpu/kernel.py: _tile_sum",
    "recording/gpu/kernel.py: sum_tiles",
}  # fmt: skip
# A command is its options, each with its help; a kernel of Triton is one function. ``_layout`` is to be cut.
LONG = {
    "cli/analyze.py: analyze", "recording/gpu/kernel.py: sum_tiles", "rows/provenance/dimensions.py: _layout",
}  # fmt: skip
MOST_FILE, MOST_FUNCTION, MOST_ARGUMENTS = 350, 60, 7


def lines_of(function):
    """Of its code: without the docstring."""
    first = function.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)
    return function.end_lineno - function.lineno + 1 - is_docstring * (first.end_lineno - first.lineno + 1)


def arguments_of(function):
    args = function.args
    named = [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    return len(named) - (named[:1] in (["self"], ["cls"]))


def functions_above(source, count, most):
    """Names of the functions of a file of which something is more than so much."""
    nodes = ast.walk(ast.parse(source))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in nodes if isinstance(node, kinds) and count(node) > most}


def test_files_and_functions_are_short():
    """A file is one idea, a function does one thing; what is not so is named above."""
    sources = {path.relative_to(ROOT).as_posix(): path.read_text() for path in ROOT.rglob("*.py")}
    assert {name for name, text in sources.items() if len(text.splitlines()) > MOST_FILE} == set()
    for count, most, known in ((lines_of, MOST_FUNCTION, LONG), (arguments_of, MOST_ARGUMENTS, WIDE)):
        found = {
            f"{name}: {own}" for name, text in sources.items() for own in functions_above(text, count, most)
        }
        # A reader of a kernel's call has the arguments of the package's function.
        assert {one for one in found if not (one.startswith("hosts/") and "kernels" in one)} <= known
    sample = 'class A:\n    def f(self, a, *, b):\n        "x"\n        a\n        b\n'
    assert functions_above(sample, arguments_of, 1) == functions_above(sample, lines_of, 2) == {"f"}
    assert functions_above(sample, arguments_of, 2) == functions_above(sample, lines_of, 3) == set()


def test_folders_can_be_looked_over():
    for folder in {path.parent for path in MODULES.values()}:
        assert len(list(folder.glob("*.py"))) <= 14, folder


def test_every_handler_is_registered():
    """A file that registers functions and is not in ``handlers.py`` would leave them unknown, silently."""
    from attnpatch.rows import handlers

    marks = ("\n@op(", "\n@write(")
    found = {path.stem for path in (ROOT / "rows").rglob("*.py") if any(m in path.read_text() for m in marks)}
    assert found == set(handlers.__all__)


def test_rows_and_recording_do_not_know_each_other():
    for one, other in (
        ("rows", "recording"),
        ("recording", "rows"),
        ("rows", "patching"),
        ("recording", "patching"),
    ):
        for path in (ROOT / one).rglob("*.py"):
            assert other not in set(imported(path)), path


def test_tests_import_nothing_of_the_benchmarks():
    """What both need is in ``tests/``: a benchmark may be changed without a look at what tests assume."""
    for path in pathlib.Path(__file__).parent.rglob("*.py"):
        for node in nodes_of(path):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "benchmarks" for name in names), path


def test_running_out_of_memory_is_recognised_in_one_place():
    """By type or by words: MPS, CPU and Triton have no type for it."""
    found = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if "OutOfMemoryError" in path.read_text() or 'out of memory"' in path.read_text()
    }
    assert found == {"oom.py"}


def test_thread_state_is_declared_in_one_place():
    """``rows/thread_state.py`` says why the others are apart: it must not know what they hold, or they are of a capture."""
    found = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if "threading.local" in path.read_text() or "ContextVar" in path.read_text()
    }
    known = {"rows/thread_state.py", "patching/calls.py"}
    assert found == known | {"recording/threads.py", "recording/text/state.py"}


def test_files_take_their_place_in_one_way():
    found = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        for name in ("os.replace(", "os.link(", ".rename(", '.tmp"')
        if name in path.read_text()
    }
    # The last two look for what a killed process left, and try whether a folder can be written to.
    assert found == {"atomic_files.py", "conversations/results_folder.py", "activation/settings.py"}
    assert "os.replace(" not in (ROOT / "conversations" / "results_folder.py").read_text()


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def private_names(path):
    """Names of torch and its hosts with a private part: imported, reached by dots, or asked for by ``getattr``."""
    tree, roots, found = tree_of(path), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named = {(alias.asname or alias.name.split(".")[0]): alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            named = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        else:
            continue
        own = {key: name for key, name in named.items() if name.split(".")[0] in HOSTS}
        roots |= own
        found |= {name for name in own.values() if any(map(is_private, name.split(".")))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, *rest = ast.unparse(node).split(".")
            if first in roots and all(map(str.isidentifier, rest)) and any(map(is_private, rest)):
                found.add(".".join([roots[first], *rest]))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            asked = ast.unparse(node.args[0])
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            if asked.split(".")[0] in roots and is_private(name):
                found.add(f"{asked}.{name}")
    return found


HOSTS = ("torch", "transformers", "diffusers")
# Private names that are asked for by a string: our own, and those that Python and torch document.
OWN_STRINGS = (
    "_attnpatch",
    "_lengths_seen",
    "_fields",
    "_parameters",
    "_buffers",
    "_modules",
    "_alias",
    "_parts",
)
# What every subclass of a tensor begins with.
ALLOWED = {"torch.Tensor._make_wrapper_subclass"}


def test_private_names_of_torch_are_in_one_place(tmp_path):
    found = {str(path.relative_to(ROOT.parent)): private_names(path) - ALLOWED for path in MODULES.values()}
    assert len(found.pop("attnpatch/compat.py")) > 30
    assert {name: names for name, names in found.items() if names} == {}
    spelled = tmp_path / "spelled.py"
    spelled.write_text(
        "import torch\nfrom torch.overrides import _a as b\nfrom torch.utils import checkpoint\n"
        "torch._b\ncheckpoint._c\ngetattr(checkpoint, '_d')\nx._e\n"
    )
    assert sorted(name[-1] for name in private_names(spelled)) == ["a", "b", "c", "d"]


def private_strings(path):
    """Private names that attributes are asked for by: of ``getattr`` and its like, of ``in``, and keys of tables."""
    found = set()
    for node in nodes_of(path):
        asked = []
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "getattr",
            "hasattr",
            "setattr",
            "delattr",
        ):
            asked = node.args[1:2]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".pop", ".get")):
            asked = node.args[:1]
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn)):
            asked = [node.left]
        elif isinstance(node, ast.Subscript):
            asked = [node.slice]
        elif isinstance(node, ast.Tuple):
            asked = node.elts
        values = [one.value for one in asked if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        found |= {v for v in values if v.isidentifier() and is_private(v) and not v.startswith(OWN_STRINGS)}
    return found


def test_private_names_of_hosts_are_in_one_place(tmp_path):
    found = {str(path.relative_to(ROOT.parent)): private_strings(path) for path in MODULES.values()}
    assert len(found.pop("attnpatch/compat.py")) > 4
    assert {name: names for name, names in found.items() if names} == {}
    spelled = tmp_path / "spelled.py"
    spelled.write_text("getattr(cache, '_keys')\n'_beams' in vars(cache)\n'a _sentence'\n'_attnpatch_x'\n")
    assert private_strings(spelled) == {"_keys", "_beams"}


def test_hosts_are_named_nowhere_else():
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0] in ("hosts", "demo"):
            continue
        for node in nodes_of(path):
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
        "assert functions == ['apply', 'by_rows', 'capture', 'compare', 'explain', 'heads', 'load', 'patched', 'register', 'register_kernel', 'remove', 'replace_missing_kernels', 'report', 'token_scores'], functions\n"
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


def test_what_few_calls_need_is_imported_by_the_first_of_them():
    """The fused kernel, images and their pictures, ``explain``, chat templates, and the kernel of block mass."""
    code = (
        "import sys, attnpatch\n"
        "attnpatch.apply, attnpatch.capture, attnpatch.report, attnpatch.explain, attnpatch.Blocks, attnpatch.BlockMap\n"
        "print(*sorted(name for name in sys.modules if name.startswith('attnpatch.')))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "attnpatch.rows.mode" in out and "attnpatch.recording.text.recorder" in out
    rare = (
        "rows.fusion.run", "recording.diffusion", "recording.gpu", "capturing.image_maps", "hosts.diffusers.denoiser",
        "plotting.overlay", "dry_run", "blocks.chat.segmentation", "blocks.tiles", "recording.text.row_sampling", "maps.dataframe", "maps.from_weights",
        "maps.picture", "maps.ranking", "plotting.row_panels", "capturing.token_scores", "capturing.heads", "conversations", "viewing",
    )  # fmt: skip
    assert all(
        (ROOT / name.replace(".", "/")).is_dir() or (ROOT / f"{name.replace('.', '/')}.py").exists()
        for name in rare
    )
    assert [name for name in out if name.removeprefix("attnpatch.").startswith(rare)] == []
