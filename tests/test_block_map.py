"""BlockMap: normalisations, selection, files, tables and pictures."""

import builtins
import io
import json
import os
import pickle
import subprocess
import sys
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from attnpatch.errors import BlockMapFileError, CaptureError, MissingExtraError
from attnpatch.maps.block_map import BlockMap
from attnpatch.maps.fields import NORMALIZATIONS


def make_map(
    num_layers=2, num_heads=None, queries=3, keys=4, batch=None, labels=None, num_steps=None, **more
):
    torch.manual_seed(0)
    shape = [num_layers, queries, keys]
    if num_heads is not None:
        shape.insert(1, num_heads)
    if num_steps is not None:
        shape.insert(0, num_steps)
        more = {"steps": range(num_steps), **more}
    if batch is not None:
        shape.insert(0, batch)
    mass = (2 * torch.randn(shape)).softmax(-1)
    options = {
        "mass": mass,
        "layers": list(range(num_layers)),
        "query_labels": [f"{labels or 'q'}{i}" for i in range(queries)],
        "key_labels": [f"{labels or 'k'}{i}" for i in range(keys)],
        "query_sizes": torch.arange(1, queries + 1),
        "key_sizes": torch.arange(2, keys + 2),
        "heads": "mean" if num_heads is None else list(range(num_heads)),
    }
    return BlockMap(**(options | more))


def ragged():
    """Two sequences; the second has one block fewer."""
    mass = torch.rand(2, 2, 3, 3).tril()
    mass[1, :, 2] = float("nan")
    mass[1, :, :, 2] = 0
    names = [["a", "b", "c"], ["d", "e"]]
    sizes = torch.tensor([[2, 2, 2], [2, 1, 0]])
    return BlockMap(mass, [0, 1], names, names, sizes, sizes)


VARIANTS = {
    "mean": {},
    "steps": {"num_steps": 4},
    "steps, heads and batch": {"num_steps": 4, "num_heads": 3, "batch": 2},
    "heads": {"num_heads": 3},
    "batch": {"batch": 2},
    "heads and batch": {"num_heads": 3, "batch": 2},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def any_map(request):
    return make_map(**request.param)


def test_normalizations(any_map):
    mass = any_map.mass.double()
    expected = {
        "none": mass,
        "row": mass / mass.sum(-1, keepdim=True),
        "density": mass / torch.arange(2, 6),
        "column": mass / mass.sum(-2, keepdim=True),
    }
    expected |= {f"absolute {name}": expected[name] for name in ("row", "column")}
    for first in NORMALIZATIONS:
        for second in NORMALIZATIONS:
            found = any_map.normalize(first).normalize(second)
            assert found.normalization == second
            assert found.values.dtype == torch.float32
            torch.testing.assert_close(found.values.double(), expected[second], atol=1e-7, rtol=1e-6)
            assert torch.equal(found.mass, any_map.mass)
    assert any_map.normalization == "none"


def test_density_uses_the_sizes_of_each_sequence():
    blocks = make_map(batch=2, num_heads=2, key_sizes=torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]))
    found = blocks.normalize("density").values
    torch.testing.assert_close(found[0, 1, 1, 2], blocks.mass[0, 1, 1, 2] / torch.tensor([1, 2, 3, 4]))
    torch.testing.assert_close(found[1, 0, 1, 2], blocks.mass[1, 0, 1, 2] / torch.tensor([5, 6, 7, 8]))


def test_columns_and_rows_of_zeros_stay_zero():
    mass = torch.tensor([[[0.5, 0.0], [0.0, 0.0]]])
    blocks = BlockMap(mass, [0], "ab", "ab", torch.tensor([1, 1]), torch.tensor([1, 1]))
    assert blocks.normalize("column").values.tolist() == [[[1, 0], [0, 0]]]
    assert blocks.normalize("row").values.tolist() == [[[1, 0], [0, 0]]]


def test_unknown_normalization():
    with pytest.raises(CaptureError, match=r"'rows'; accepted are 'none', 'row', 'density', 'column'"):
        make_map().normalize("rows")


def test_unassigned_mass():
    mass = torch.tensor([[[0.25, 0.25], [0.4, 0.6], [0.0, 0.0]]])
    blocks = BlockMap(mass, [0], "abc", "ab", torch.tensor([3, 1, 0]), torch.tensor([1, 1]))
    torch.testing.assert_close(blocks.unassigned_mass, torch.tensor([[0.5, 0.0, 0.0]]))
    assert ragged().unassigned_mass[1, :, 2].tolist() == [0, 0]
    assert make_map(num_heads=3, batch=2).unassigned_mass.shape == (2, 2, 3, 3)


def test_missing_mass_is_the_old_name_of_unassigned_mass():
    blocks = make_map(num_heads=3, batch=2)
    with pytest.warns(DeprecationWarning, match="unassigned_mass"):
        old = blocks.missing_mass
    torch.testing.assert_close(old, 1 - blocks.mass.sum(-1))


def test_blocks_without_tokens_are_zero():
    blocks = ragged()
    assert (blocks.mass[1, :, 2] == 0).all()
    for name in NORMALIZATIONS:
        assert torch.isfinite(blocks.normalize(name).values).all()
    assert blocks.query_labels == (("a", "b", "c"), ("d", "e"))


def test_to_numpy(any_map):
    found = any_map.normalize("row").to_numpy()
    assert found.dtype == np.float32
    assert found.shape == tuple(any_map.mass.shape)
    any_map.to_numpy()[:] = 0
    assert any_map.mass.sum() > 0


def test_one_sequence_has_no_batch():
    blocks = make_map(batch=1, num_heads=2, query_labels=[["a", "b", "c"]], query_sizes=torch.ones(1, 3))
    assert blocks.to_numpy().shape == (2, 2, 3, 4)
    assert blocks.query_labels == ("a", "b", "c")
    assert blocks.num_sequences == 1
    assert make_map(batch=2).num_sequences == 2


def test_select():
    blocks = make_map(3, num_heads=2, batch=2)
    one = blocks.normalize("density").select(layer=1, head=1, sequence=1)
    assert one.mass.shape == (1, 1, 3, 4)
    assert torch.equal(one.mass[0, 0], blocks.mass[1, 1, 1])
    assert (one.layers, one.heads, one.normalization) == ((1,), (1,), "density")
    assert one.query_labels == ("q0", "q1", "q2")
    torch.testing.assert_close(blocks.select(head="mean").mass, blocks.mass.mean(2))
    torch.testing.assert_close(blocks.select(layer="mean").mass, blocks.mass.mean(1, keepdim=True))
    assert blocks.select(layer=[2, 0]).layers == (2, 0)
    assert torch.equal(blocks.select(layer=[2, 0]).mass, blocks.mass[:, [2, 0]])
    assert torch.equal(blocks.select(layer=-1).mass, blocks.mass[:, [2]])
    assert blocks.select() == blocks
    assert ragged().select(sequence=1).mass.shape == (2, 2, 2)
    assert make_map().select(sequence=0) == make_map()


def test_layers_go_by_their_name_before_their_place():
    blocks = make_map(3, layers=[0, 5, 1])
    assert torch.equal(blocks.select(layer=1).mass, blocks.mass[2:])
    assert torch.equal(blocks.select(layer=np.int64(5)).mass, blocks.mass[1:2])
    named = make_map(3, layers=["down.0", "mid", "up.0"])
    assert torch.equal(named.select(layer="mid").mass, named.mass[1:2])
    assert torch.equal(named.select(layer=2).mass, named.mass[2:])


@pytest.mark.parametrize(
    "wanted",
    [
        {"layer": 7},
        {"layer": "x"},
        {"layer": True},
        {"layer": -3},
        {"head": 5},
        {"sequence": 2},
        {"head": "all"},
    ],
)
def test_select_names_what_there_is(wanted):
    with pytest.raises(CaptureError, match=f"no {next(iter(wanted))} .*there are 0, 1"):
        make_map(num_heads=2, batch=2).select(**wanted)


def test_select_of_a_head_that_was_averaged():
    with pytest.raises(CaptureError, match="heads were averaged; capture with heads='all'"):
        make_map().select(head=0)
    assert make_map().select(head="mean") == make_map()


def test_layers_kept_by_number_are_not_counted():
    with pytest.raises(CaptureError, match="no layer 1 in this map; there are 0, 5"):
        make_map(layers=[0, 5]).select(layer=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mass": torch.rand(3, 4)}, "mass is"),
        ({"mass": torch.rand(1, 2, 3, 4, 5, 6)}, "mass is"),
        ({"layers": [0]}, "with 1 layers"),
        ({"heads": [0, 1]}, "mass is"),
        ({"heads": "all"}, "cannot be used"),
        ({"layers": [None, 1]}, "cannot be used"),
        ({"query_sizes": torch.ones(4)}, "query sizes"),
        ({"key_sizes": torch.ones(2, 4)}, "key sizes"),
        ({"query_labels": ["a", "b", "c", "d"]}, "4 query labels for 3 query blocks"),
        ({"key_labels": ["a"]}, "1 key labels for 4 key blocks"),
        ({"key_labels": [["a"] * 4] * 2}, "labels for 2 sequences"),
        ({"metadata": {"model": object()}}, "metadata cannot be written as JSON"),
        ({"normalization": "x"}, "accepted are"),
    ],
)
def test_fields_must_fit(change, message):
    with pytest.raises(CaptureError, match=message):
        make_map(**change)


def test_repr_says_what_a_person_needs():
    text = repr(make_map(num_heads=2, metadata={"model": "tiny"}))
    for part in (
        "2 layers",
        "2 heads",
        "3 query x 4 key blocks",
        "'q0'",
        "6 tokens",
        "rows sum to 1",
        "tiny",
    ):
        assert part in text
    assert len(repr(make_map(queries=300, keys=300, labels="long " * 50))) < 1000
    assert "2 sequences" in repr(ragged())


def test_pickle_and_equality(any_map):
    assert pickle.loads(pickle.dumps(any_map)) == any_map
    assert any_map != any_map.normalize("row")
    assert any_map != "a map"
    assert make_map() != make_map(mass=make_map().mass * 0.5)
    assert make_map() != make_map(key_sizes=torch.ones(4))


def test_steps_are_an_axis():
    whole = make_map(num_steps=4, num_heads=3, batch=2)
    one = whole.select(step=2)
    assert one.steps == (2,) and torch.equal(one.mass, whole.mass[:, 2:3])
    mean = whole.select(step="mean", layer="mean", head="mean")
    assert mean.steps == ("mean",)
    torch.testing.assert_close(mean.mass, whole.mass.mean((1, 2, 3))[:, None, None])
    assert whole.select(step=[0, -1]).steps == (0, 3)
    assert torch.equal(make_map().select(step="mean").mass, make_map().mass)
    with pytest.raises(CaptureError, match="no step 4"):
        whole.select(step=4)
    with pytest.raises(CaptureError, match="4 steps in one picture"):
        whole.plot(step=[0, 1, 2, 3])
    with pytest.raises(CaptureError, match="2 layers, 3 steps"):
        make_map(num_steps=4, steps=range(3))


def test_files_without_steps_are_read(tmp_path):
    path = make_map().save(tmp_path / "map.safetensors")
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = file.metadata()
    content = json.loads(header["block_map"])
    assert content.pop("steps") == []
    save_file(tensors, path, header | {"block_map": json.dumps(content)})
    assert BlockMap.load(path) == make_map()


def test_dataframe_has_a_row_per_cell(any_map):
    pytest.importorskip("pandas")
    frame = any_map.normalize("density").to_dataframe()
    assert len(frame) == any_map.mass.numel()
    batched, split = any_map.num_sequences > 1, any_map.heads != "mean"
    columns = ["sequence"] * batched + ["step"] * bool(any_map.steps) + ["layer"] + ["head"] * split
    assert list(frame.columns) == [*columns, "query", "key", "query_label", "key_label", "mass", "value"]
    row = frame.iloc[-1]
    where = (-1,) * any_map.mass.ndim
    assert row["mass"] == any_map.mass[where]
    assert row["value"] == any_map.normalize("density").values[where]
    assert (row["query_label"], row["key_label"], row["key"]) == ("q2", "k3", 3)
    assert "value" not in any_map.to_dataframe()


def test_dataframe_leaves_out_blocks_a_sequence_does_not_have():
    pytest.importorskip("pandas")
    assert ragged().to_dataframe().groupby("sequence").size().to_dict() == {0: 18, 1: 8}


def test_round_trip(any_map, tmp_path):
    blocks = make_map(
        labels="\u7b54\u3048 \U0001f600 \"'\n\0", metadata={"model": "m", "n": [1, {"a": None}], "t": (1, 2)}
    )
    for one in (any_map, blocks.normalize("column"), ragged()):
        path = one.save(tmp_path / "map.safetensors")
        assert BlockMap.load(path) == one
    assert os.listdir(tmp_path) == ["map.safetensors"]


@given(
    layers=st.integers(1, 3),
    heads=st.none() | st.integers(1, 3),
    batch=st.none() | st.integers(2, 3),
    labels=st.lists(st.text(), min_size=1, max_size=4),
    normalization=st.sampled_from(NORMALIZATIONS),
    metadata=st.dictionaries(
        st.text(), st.integers() | st.text() | st.booleans() | st.lists(st.floats(0, 1))
    ),
)
@settings(max_examples=60, deadline=None)
def test_round_trip_of_any_map(tmp_path_factory, layers, heads, batch, labels, normalization, metadata):
    blocks = make_map(
        layers,
        heads,
        queries=len(labels),
        batch=batch,
        query_labels=labels,
        normalization=normalization,
        metadata=metadata,
    )
    path = blocks.save(tmp_path_factory.mktemp("maps") / "map")
    again = BlockMap.load(path)
    assert again == blocks
    assert torch.equal(again.values, blocks.values)
    assert again.query_labels == blocks.query_labels


def test_file_holds_no_pickle_and_readable_json(tmp_path):
    path = make_map().save(tmp_path / "map.safetensors")
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert (header["format"], header["version"]) == ("attnpatch.block_map", "1")
    assert json.loads(header["block_map"])["query_labels"] == ["q0", "q1", "q2"]


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.99])
def test_file_cut_short(tmp_path, keep):
    path = make_map().save(tmp_path / "map.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(BlockMapFileError, match=r"map.safetensors is truncated or not a block map") as caught:
        BlockMap.load(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == data[: int(len(data) * keep)]


def rewrite(path, drop_tensor=None, **header):
    with safe_open(path, framework="pt") as file:
        old, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors.pop(drop_tensor, None)
    save_file(tensors, path, {k: v for k, v in (old | header).items() if v is not None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "2"}, "has version '2', this attnpatch reads '1'"),
        ({"version": None}, "has version None"),
        ({"format": "something"}, "not a block map"),
        ({"format": None}, "not a block map"),
        ({"block_map": None}, "lacks 'block_map'"),
        ({"block_map": "{}"}, "lacks 'layers'"),
        ({"block_map": "{"}, "is damaged"),
        ({"block_map": "[]"}, "is damaged"),
        ({"drop_tensor": "key_sizes"}, "lacks 'key_sizes'"),
        ({"drop_tensor": "mass"}, "lacks 'mass'"),
    ],
)
def test_file_of_another_kind(tmp_path, change, message):
    path = make_map().save(tmp_path / "map.safetensors")
    rewrite(path, **change)
    with pytest.raises(BlockMapFileError, match=message) as caught:
        BlockMap.load(path)
    assert str(path) in str(caught.value)


def test_file_whose_labels_do_not_fit(tmp_path):
    path = make_map().save(tmp_path / "map.safetensors")
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["block_map"])
    rewrite(path, block_map=json.dumps(content | {"layers": [1, 2, 3]}))
    with pytest.raises(BlockMapFileError, match=r"is damaged .*3 layers"):
        BlockMap.load(path)


def test_no_file_and_no_safetensors(tmp_path):
    with pytest.raises(BlockMapFileError, match="there is no file"):
        BlockMap.load(tmp_path / "none")
    with pytest.raises(BlockMapFileError, match="there is no file"):
        BlockMap.load(tmp_path)
    (tmp_path / "text").write_text("hello, this is a text and nothing else")
    with pytest.raises(BlockMapFileError, match="truncated or not a block map"):
        BlockMap.load(tmp_path / "text")


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_an_existing_file_survives_a_failed_save(tmp_path, monkeypatch, broken):
    path = make_map().save(tmp_path / "map.safetensors")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(BlockMapFileError, match="No space left"):
        make_map(num_layers=5).save(path)
    assert BlockMap.load(path) == make_map()
    assert os.listdir(tmp_path) == ["map.safetensors"]


def test_save_where_nothing_can_be_written(tmp_path):
    with pytest.raises(BlockMapFileError, match=r"cannot write .*none.map: No such file"):
        make_map().save(tmp_path / "none" / "map")
    (tmp_path / "file").write_text("")
    with pytest.raises(BlockMapFileError, match="cannot write"):
        make_map().save(tmp_path / "file" / "map")


def test_pictures_by_suffix(tmp_path):
    pytest.importorskip("matplotlib")
    blocks = make_map(num_heads=2, batch=2)
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")):
        path = blocks.plot(tmp_path / f"map{suffix}", layer=1, head=0, sequence=1)
        assert path.read_bytes().startswith(start)
    with pytest.raises(CaptureError, match=r"'map.jpg'; accepted suffixes are .png, .svg, .pdf"):
        blocks.plot(tmp_path / "map.jpg")
    with pytest.raises(CaptureError, match="scale is 'cubic'"):
        blocks.plot(scale="cubic")
    with pytest.raises(CaptureError, match="2 layers in one picture"):
        blocks.plot(layer=[0, 1])
    assert blocks._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize(("count", "step"), [(1, 1), (5, 1), (30, 1), (42, 1), (43, 2), (250, 10)])
@pytest.mark.parametrize("long", [False, True])
def test_picture_shows_values_and_labels_inside_the_page(count, step, long):
    pytest.importorskip("matplotlib")
    names = [f"{i} user" + " who costs $5 or $6 a_b^c {\n" * 9 * long for i in range(count)]
    mass = torch.rand(1, count, count).tril()
    sizes = torch.ones(count)
    blocks = BlockMap(mass, [3], names, names, sizes, sizes, metadata={"model": "tiny"})
    figure = blocks.plot(layer=3)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    bar = next(one for one in figure.axes if one.get_label() == "<colorbar>")
    shown = axes.images[0].get_array()
    np.testing.assert_array_equal(shown.filled(0), mass[0].numpy())
    assert shown.mask.sum() == (mass == 0).sum()  # what is exactly 0 has its own colour
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        texts = [label.get_text() for label in labels]
        assert [text.split()[0] for text in texts] == [str(i) for i in range(0, count, step)]
        assert all(len(text) <= 22 and "\n" not in text for text in texts)
        for label in labels:
            box = label.get_window_extent()
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert "attention mass" in bar.get_ylabel()
    assert figure.get_suptitle().endswith("tiny, layer 3, mean over heads")
    heights = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(above.y0 >= below.y1 - 1 for above, below in pairwise(heights))


def test_colour_bar_says_what_the_number_is():
    pytest.importorskip("matplotlib")
    for name, words in {
        "row": "share of the query",
        "density": "per key token",
        "column": "receives",
    }.items():
        figure = make_map().normalize(name).plot(title="t")
        assert words in figure.axes[1].get_ylabel()
        assert "square-root" in figure.axes[1].get_ylabel()
        assert figure.get_suptitle().splitlines()[0] == "t"
    assert "square-root" not in make_map().plot(scale="linear").axes[1].get_ylabel()


def test_empty_map_and_foreign_script_draw_without_warnings(tmp_path):
    pytest.importorskip("matplotlib")
    names = ["\u4e2d\u6587", "\u0e44\u0e17\u0e22"]
    blocks = BlockMap(torch.zeros(1, 2, 2), [0], names, names, torch.ones(2), torch.ones(2))
    assert blocks.plot().axes[0].images[0].norm.vmax == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blocks.plot(tmp_path / "map.png")


def test_labels_and_titles_are_text_not_formulas(tmp_path):
    pytest.importorskip("matplotlib")
    broken = r"$\frac{$ x"  # as a formula it cannot be drawn
    make_map(query_labels=[broken] * 3).plot(tmp_path / "map.png")
    make_map(key_labels=[broken] * 4).plot(tmp_path / "map.png")
    make_map().plot(tmp_path / "map.png", title=broken)


@pytest.mark.parametrize("title", ["meta-llama/" + "Llama-3.1-" * 20, "a long title " * 12])
def test_long_title_stays_on_the_page(title):
    pytest.importorskip("matplotlib")
    figure = make_map(queries=3, keys=3).plot(title=title)
    figure.draw_without_rendering()
    box = figure._suptitle.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


@pytest.mark.parametrize(("package", "use"), [("matplotlib", "plot"), ("pandas", "to_dataframe")])
def test_missing_extra_is_named(monkeypatch, package, use):
    real_import = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r'pip install "attnpatch\[plot\]"'):
        getattr(make_map(), use)()
    if package == "matplotlib":
        assert make_map()._repr_png_() is None


def test_importing_capture_brings_in_nothing_heavy():
    code = (
        "import sys, attnpatch.maps.block_map, attnpatch.blocks.spec, attnpatch.recording.block_sums;"
        "print([m for m in ('matplotlib', 'pandas', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_drawing_leaves_pyplot_alone():
    pytest.importorskip("matplotlib")
    code = (
        "import sys, torch; from attnpatch.maps.block_map import BlockMap;"
        "one = torch.ones(1);"
        "BlockMap(torch.ones(1, 1, 1), [0], ['a'], ['a'], one, one)._repr_png_();"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_png_for_a_notebook_is_a_picture():
    image = pytest.importorskip("matplotlib.image")
    assert image.imread(io.BytesIO(make_map()._repr_png_())).shape[2] == 4
