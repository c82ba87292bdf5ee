"""The notebooks of examples/notebooks run from the first cell to the last, and find what their saved outputs show."""

import json
import pathlib
import re

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
start_new_kernel = pytest.importorskip("jupyter_client.manager").start_new_kernel
FOLDER = pathlib.Path(__file__).parents[1] / "examples" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
# Free memory, which a machine decides.
_VARIES = ("free", "peak beyond", "  LlamaAttention")
# Their last digits differ between processors.
_DECIMALS = re.compile(r"\d+\.\d{3,}")


def outputs_of(notebook):
    """What each code cell shows: its text without what varies, or the kinds of its pictures."""
    found = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                continue
            data = output.get("data", {})
            if "image/png" in data:
                found.append("a picture")
                continue
            text = output.get("text", data.get("text/plain", ""))
            lines = ("".join(text) if isinstance(text, list) else text).splitlines()
            found += [line.rstrip() for line in lines if not any(word in line for word in _VARIES)]
    return found


# Each in an empty folder and without the names of others, by one process: importing the hosts takes seconds.
CLEAR = "%reset -f\nimport os as _os, matplotlib.pyplot as _plt; _plt.close('all'); _os.chdir({!r})"
pytestmark = pytest.mark.xdist_group("notebooks")


@pytest.fixture(scope="module")
def kernel():
    manager, client = start_new_kernel(kernel_name="python3")
    client.stop_channels()
    yield manager
    manager.shutdown_kernel(now=True)


# These take half a minute each. The README's code runs the same conversation as ``long_conversation``, and ``test_shapes``
# looks at what the models of ``heat_maps`` draw.
LONG = ("heat_maps", "long_conversation")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in NAMES]
)
def test_a_notebook_runs(name, kernel, tmp_path):
    saved = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    clear = nbformat.v4.new_code_cell(CLEAR.format(str(tmp_path)))
    for cells in ([clear], notebook.cells):
        part = nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)
        client = nbclient.NotebookClient(part, timeout=240, km=kernel)
        client.execute(cleanup_kc=False)
        client.kc.stop_channels()  # else its sockets raise a warning in a later test
    shown, expected = ([_DECIMALS.sub("0", line) for line in outputs_of(one)] for one in (notebook, saved))
    assert shown == expected
    values = [_DECIMALS.findall("\n".join(outputs_of(one))) for one in (notebook, saved)]
    for value, other in zip(*values, strict=True):
        assert abs(float(value) - float(other)) < 5 * 10.0 ** -len(value.partition(".")[2])
    assert len(outputs_of(saved)) > 3


def test_there_are_notebooks():
    assert {"heat_maps", "long_conversation", "out_of_memory", "rag"} <= set(NAMES)
