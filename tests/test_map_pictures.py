"""What a picture of a block map says: the finding, texts, the strongest rows, and that nothing in it overlaps."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from attnpatch.maps.block_map import BlockMap

pytest.importorskip("matplotlib")


def conversation(count, decisive=None, sink=0.3, layers=4, texts=True, **fields):
    """A sink and an even rest; in layer 2 the last row attends to one message with 0.9."""
    mass = torch.full((layers, count, count), (1 - sink) / count).tril()
    mass[:, :, 0] = sink
    if decisive is not None:
        mass[2, -1] = 0.1 / count
        mass[2, -1, decisive] = 0.9
    labels = [f"{i} {('user', 'assistant')[i % 2]}" for i in range(count)]
    words = [f"message {i} speaks of the weather, of the sea and of much more" for i in range(count)]
    metadata = {"model": "tiny", **({"texts": words} if texts else {})}
    sizes = torch.ones(count)
    given = {"query_labels": labels, "key_labels": labels, "query_sizes": sizes, "key_sizes": sizes}
    return BlockMap(**{"mass": mass, "layers": range(layers), "metadata": metadata, **given, **fields})


def words_of(axes):
    return [text.get_text() for text in axes.texts] + [axes.get_title("left")]


def boxes(figure, axes, which):
    figure.draw_without_rendering()
    labels = axes.get_xticklabels() if which == "x" else axes.get_yticklabels()
    return [label for label in labels if label.get_text()]


def test_the_title_says_the_finding_first():
    figure = conversation(8, decisive=3).plot()
    finding, facts = " ".join(figure.get_suptitle().splitlines()[:-1]), figure.get_suptitle().splitlines()[-1]
    assert finding == (
        '7 assistant attends most to "3 assistant: message 3 speaks of the weather, of the sea an\u2026" (0.90, layer 2), '
        'then "0 user: message 0 speaks of the weather, of the sea and of\u2026" (0.30, layer 0)'
    )
    assert facts == "tiny, mean of 4 layers, mean over heads"
    # Only of the layer that is drawn.
    assert 'attends most to "0 user' in " ".join(
        conversation(8, decisive=3).plot(layer=1).get_suptitle().split()
    )
    given = conversation(8, decisive=3).plot(title="My title").get_suptitle().splitlines()
    assert given[0] == "My title" and given[1].startswith("7 assistant attends most to")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"query_sizes": torch.tensor([1, 1, 1, 1, 1, 0, 0, 0])}, "4 user attends most to"),
        ({"mass": torch.eye(8)[None], "layers": 1}, None),  # nothing but itself
        ({"metadata": {"weighting": "gradient"}}, "7 assistant: the largest probability x gradient is at"),
        ({"metadata": {"numbers": "difference"}}, "7 assistant: the largest difference is at"),
        ({"mass": torch.full((1, 8, 8), math.nan), "layers": 1}, None),
    ],
)
def test_findings_of_other_maps(change, says):
    title = conversation(8, **change).plot().get_suptitle()
    assert title.startswith(says) if says else title.count("\n") == 0 and "attends" not in title


def test_texts_are_those_of_the_sequence():
    one = conversation(4, decisive=1)
    batch = BlockMap(
        one.mass.expand(2, -1, -1, -1), one.layers, one.query_labels, one.key_labels, one.query_sizes, one.key_sizes,
        metadata={"texts": [["a", "b", "c", "d"], ["e", "f", "g", "h"]]},
    )  # fmt: skip
    assert '"1 assistant: f" (0.90, layer 2)' in batch.plot(sequence=1).get_suptitle()


@pytest.mark.parametrize("texts", [True, False], ids=["texts", "labels"])
@pytest.mark.parametrize("count", [1, 10, 24, 42, 60, 300, 1000])
def test_nothing_on_a_picture_overlaps_or_is_cut_off(count, texts):
    figure = conversation(count, decisive=count // 3, texts=texts).plot()
    axes = figure.axes[0]
    across = boxes(figure, axes, "x")
    transform = axes.transData.transform
    distance = abs(
        transform((across[-1].get_position()[0], 0))[0] - transform((across[0].get_position()[0], 0))[0]
    )
    distance /= max(1, len(across) - 1)
    for label in across:
        height = label.get_fontsize() * figure.dpi / 72
        turned = math.radians(label.get_rotation())
        assert (
            count == 1
            or distance * math.sin(turned) >= height * 0.9
            or label.get_window_extent().width <= distance
        )
    down = [label.get_window_extent() for label in boxes(figure, axes, "y")]
    assert all(above.y0 >= below.y1 - 1 for above, below in pairwise(down))
    for one in figure.axes:
        for text in [
            *one.texts,
            one.title,
            one._left_title,
            *one.get_xticklabels(),
            *one.get_yticklabels(),
            figure._suptitle,
        ]:
            box = text.get_window_extent()
            inside = (
                box.x0 >= -1
                and box.y0 >= -1
                and box.x1 <= figure.bbox.x1 + 1
                and box.y1 <= figure.bbox.y1 + 1
            )
            assert inside or not text.get_text(), text
    if texts and count <= 42:
        assert (
            across[-1].get_text().startswith(f"{count - 1} {('user', 'assistant')[(count - 1) % 2]}: message")
        )


@pytest.mark.parametrize("count", [60, 300, 1000])
def test_the_decisive_cell_is_named_and_marked_beside_the_whole(count):
    figure = conversation(count, decisive=count // 3).plot()
    first = figure.axes[1]
    if first.get_label() == "<colorbar>":
        first = figure.axes[2]
    assert words_of(first)[-1].startswith(f"A   {count - 1} assistant: message {count - 1} speaks")
    assert words_of(first)[0].startswith(f"{count // 3} {('user', 'assistant')[count // 3 % 2]}: message")
    assert words_of(first)[1] == "layer 2   0.90"
    (mark,) = {(line.get_xdata()[0], line.get_ydata()[0]) for line in figure.axes[0].lines[:2]}
    assert mark == (count // 3, count - 1)
    panels = [one for one in figure.axes[1:] if one.get_label() != "<colorbar>"]
    assert len(panels) == 3 and all(len(one.patches) <= 6 for one in panels)


def test_rows_beside_the_whole_are_those_that_stand_out():
    """Not the first rows, which attend to few blocks, and not those that attend to the block before them."""
    given = conversation(60, sink=0.01, layers=1)
    mass = given.mass.clone()
    mass[0, 40, 39] = 0.99
    mass[0, 50, 20] = 0.8
    mass[0, 30, 10] = 0.7
    figure = conversation(60, mass=mass, layers=1).plot()
    panels = [one for one in figure.axes[1:] if one.get_label() != "<colorbar>"]
    assert [words_of(one)[-1].split()[1] for one in panels] == ["59", "50", "30"]


def test_a_single_strong_cell_of_many_is_drawn():
    mass = torch.full((1, 1201, 1201), 1e-6)
    mass[0, 1200, 777] = 1
    labels = [str(i) for i in range(1201)]
    figure = BlockMap(mass, [0], labels, labels, torch.ones(1201), torch.ones(1201)).plot()
    image = figure.axes[0].images[0]
    shown = image.get_array()
    assert max(shown.shape) <= 500 and shown.max() == 1
    left, right, bottom, top = image.get_extent()
    row, column = np.unravel_index(shown.argmax(), shown.shape)
    height, width = (bottom - top) / shown.shape[0], (right - left) / shown.shape[1]
    assert top + row * height <= 1200 <= top + (row + 1) * height
    assert left + column * width <= 777 <= left + (column + 1) * width
    legend = next(one for one in figure.axes if one.get_label() == "<colorbar>").get_ylabel()
    assert "each point: the largest of 3 x 3 cells" in legend


@pytest.mark.parametrize("signed", [False, True])
def test_a_logarithmic_scale_tells_small_masses_apart(signed):
    given = conversation(8, sink=0.9)
    if signed:
        given = conversation(8, sink=0.9, metadata={"weighting": "gradient"})
    figure = given.plot(scale="log")
    image = figure.axes[0].images[0]
    norm = image.norm
    parts = [float(norm(value)) for value in (0.9, 0.09, 0.009)]
    assert parts[0] == pytest.approx(1) and min(parts[0] - parts[1], parts[1] - parts[2]) > 0.08
    bar = next(one for one in figure.axes if one.get_label() == "<colorbar>")
    assert "logarithmic scale" in bar.get_ylabel()


def test_axes_of_yours_get_the_map_alone():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4))
    axes = figure.subplots()
    conversation(60, decisive=5).plot(ax=axes)
    assert [one.get_label() for one in figure.axes] == ["", "<colorbar>"]
    assert axes.get_title() == "tiny, mean of 4 layers, mean over heads" and figure.get_suptitle() == ""
    assert not axes.lines


def test_pictures_of_an_analysis_say_the_finding_and_keep_layers_apart():
    from attnpatch.conversations import drawing

    given = conversation(800, decisive=300)
    row = drawing.row(given, 799)
    assert row.get_suptitle().startswith('799 assistant attends most to "300 user: message 300')
    shown = row.axes[0].images[0].get_array()
    assert shown.shape == (4, 400) and shown.argmax() == 2 * 400 + 150
    layers = drawing.layers(given, 16)
    assert layers.get_suptitle().startswith('799 assistant attends most to "300 user: message 300')
    assert [float(one.images[0].get_array().max()) for one in layers.axes[:4]] == pytest.approx(
        [0.3, 0.3, 0.9, 0.3]
    )
