"""Maps whose numbers have signs: nothing is divided by their sums, and colours go both ways from 0."""

import numpy as np
import pytest
import torch

from attnpatch.conversations import drawing
from attnpatch.errors import CaptureError
from attnpatch.maps.block_map import BlockMap
from attnpatch.maps.fields import NORMALIZATIONS
from attnpatch.maps.meaning import meaning
from attnpatch.viewing.page import _described
from attnpatch.viewing.pictures import EmbeddedPictures

GRADIENT = {"weighting": "gradient"}
# Rows and columns whose sums are 0, negative and positive, and one of zeros.
MASS = torch.tensor([[[0.2, -0.2, 0.0], [-0.5, 0.1, 0.0], [0.3, 0.3, 0.0]]])


def signed(mass=MASS, metadata=GRADIENT, **more):
    names, sizes = [f"{i} user" for i in range(mass.shape[-1])], torch.tensor([1, 2, 4])
    return BlockMap(mass, range(len(mass)), names, names, sizes, sizes, metadata=metadata, **more)


@pytest.mark.parametrize("metadata", [GRADIENT, {}], ids=["by its weighting", "by its numbers"])
@pytest.mark.parametrize("asked", NORMALIZATIONS)
def test_normalizations(asked, metadata):
    expected = {
        "none": MASS,
        "density": MASS / torch.tensor([1, 2, 4]),
        "row": torch.tensor([[[0.5, -0.5, 0], [-5 / 6, 1 / 6, 0], [0.5, 0.5, 0]]]),
        "column": torch.tensor([[[0.2, -1 / 3, 0], [-0.5, 1 / 6, 0], [0.3, 0.5, 0]]]),
    }[asked.removeprefix("absolute ")]
    found = signed(metadata=metadata).normalize(asked)
    assert found.normalization == {"row": "absolute row", "column": "absolute column"}.get(asked, asked)
    torch.testing.assert_close(found.values, expected, atol=1e-6, rtol=0)
    assert torch.equal(found.normalize("none").values, MASS)


def test_a_file_that_was_divided_by_signed_sums_is_so_no_more(tmp_path):
    path = signed().save(tmp_path / "map.safetensors")
    path.write_bytes(
        path.read_bytes().replace(rb"\"normalization\": \"none\"", rb"\"normalization\": \"row\" ")
    )
    assert BlockMap.load(path) == signed().normalize("absolute row")


def test_what_is_of_probabilities_is_refused():
    with pytest.raises(CaptureError, match="weighted by gradients"):
        _ = signed().unassigned_mass


@pytest.mark.parametrize("normalization", ["none", "row", "column", "density"])
def test_negative_weights_that_are_no_gradients(normalization, tmp_path):
    """Weights that are mixed after softmax (talking heads, differences): no gradient is spoken of."""
    one = signed(metadata={"notes": ["weights are mixed after softmax"]}).normalize(normalization)
    assert "weight after mixing" in meaning(one)
    assert "gradient" not in meaning(one) and "gradient" in meaning(signed().normalize(normalization))
    with pytest.raises(CaptureError, match="negative weights, as those that are mixed after softmax"):
        _ = one.unassigned_mass
    described = _described("map", one, EmbeddedPictures(None))
    assert (
        described["signed"]
        and not described["gradient"]
        and _described("map", signed(), EmbeddedPictures(None))["gradient"]
    )


@pytest.mark.parametrize("scale", ["sqrt", "linear"])
@pytest.mark.parametrize(
    "mass", [MASS, MASS.abs(), -MASS.abs(), 0 * MASS], ids=["both", "up", "down", "zeros"]
)
@pytest.mark.parametrize("normalization", ["none", "row"])
def test_colours_go_both_ways_from_zero(mass, scale, normalization):
    pytest.importorskip("matplotlib")
    one = signed(mass).normalize(normalization)
    figure = one.plot(scale=scale)
    axes, bar = figure.axes
    norm = axes.images[0].norm
    most = float(one.values.abs().max()) or 1.0
    assert (norm.vmin, norm.vmax) == pytest.approx((-most, most))
    assert norm(0.0) == pytest.approx(0.5) and norm(-most) == 0 and norm(most) == 1
    ticks = bar.get_yticks()
    assert min(ticks) < 0 < max(ticks)
    assert "gradient" in bar.get_ylabel() and "mass" not in bar.get_ylabel()
    colours = axes.images[0].cmap(norm(np.array([-most, 0.0, most])))[:, :3]
    assert colours[0, 2] > colours[0, 1]  # purple
    assert (colours[1] > 0.95).all()  # white
    assert colours[2, 0] > colours[2, 2]  # orange


@pytest.mark.parametrize(
    "mass", [torch.linspace(-1, 1, 63).view(7, 3, 3), torch.linspace(0, 1, 63).view(7, 3, 3)]
)
def test_numbers_can_be_read_on_every_colour(mass):
    """A contrast of at least 4.5 (WCAG 2.2), of the colours as matplotlib's own rendering has them."""
    pytest.importorskip("matplotlib")
    one = signed(mass, {} if mass.min() >= 0 else GRADIENT)
    light = {"black": 0.0, "white": 1.0}
    for layer in range(len(mass)):
        axes = one.select(layer=layer).plot().axes[0]
        image = axes.images[0]
        for text in axes.texts:
            column, row = text.get_position()
            channels = np.array(image.to_rgba(image.get_array()[int(row), int(column)])[:3])
            linear = np.where(channels > 0.04045, ((channels + 0.055) / 1.055) ** 2.4, channels / 12.92)
            low, high = sorted([float(linear @ [0.2126, 0.7152, 0.0722]), light[text.get_color()]])
            assert (high + 0.05) / (low + 0.05) >= 4.5


def test_pictures_of_layers_and_rows():
    pytest.importorskip("matplotlib")
    one = signed(torch.cat([MASS, MASS.abs()]))
    for figure in (drawing.layers(one, 4), drawing.row(one, 1)):
        bar = figure.axes[-1]
        assert min(bar.get_yticks()) < 0 < max(bar.get_yticks())
        assert "probability x gradient" in bar.get_ylabel()
        norms = [axes.images[0].norm for axes in figure.axes[:-1] if axes.images]
        assert all(norm.vmin == -norm.vmax for norm in norms)
