"""Heat maps of words over images: what is accepted, where the colours lie, what is written."""

import builtins
import io
import os
import subprocess
import sys
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch

from attnpatch.errors import CaptureError, MissingExtraError
from attnpatch.plotting import images, map_figure, overlay, panel_grid


@pytest.fixture
def plot():
    """The drawing half of the tests."""
    pytest.importorskip("matplotlib")


def photo(height=24, width=24):
    return np.random.default_rng(0).random((height, width, 3), dtype=np.float32)


def spot(row, column, height=6, width=6, value=1.0):
    """Heat in one place."""
    heat = np.zeros((height, width), np.float32)
    heat[row, column] = value
    return heat


def rendered(figure):
    """What a reader sees, ``[H, W, 3]`` from 0 to 1; the first row is the upper edge."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[:, :, :3] / 255


def hottest(pixels):
    """Row and column, from 0 to 1, of the middle of what is bright yellow."""
    yellow = pixels[:, :, :2].min(2) - pixels[:, :, 2]
    rows, columns = np.nonzero(yellow > 0.75 * yellow.max())
    return (rows.mean() + 0.5) / len(pixels), (columns.mean() + 0.5) / pixels.shape[1]


def panel_pixels(figure, axes):
    """The part of the rendered figure that lies inside ``axes``."""
    seen = rendered(figure)
    box = axes.get_window_extent()
    top, bottom = (round(len(seen) - edge) for edge in (box.y1, box.y0))
    return seen[top:bottom, round(box.x0) : round(box.x1)]


def texts_of(figure):
    return [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, *axes.get_yticklabels())]


FORMS = {
    "numpy uint8": lambda base: base,
    "numpy float32": lambda base: base.astype(np.float32) / 255,
    "numpy float64": lambda base: base / 255,
    "numpy batch": lambda base: base[None],
    "torch, colours first": lambda base: torch.from_numpy(base).permute(2, 0, 1),
    "torch, colours last": lambda base: torch.from_numpy(base),
    "torch batch": lambda base: torch.from_numpy(base).permute(2, 0, 1)[None] / 255,
    "torch with gradient": lambda base: (torch.from_numpy(base).permute(2, 0, 1) / 255).requires_grad_(),
    "list of one": lambda base: [base],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("shape", [(4, 5), (6, 3), (1, 7), (7, 1)])
def test_images_of_every_form_are_the_same(form, shape):
    base = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    found = overlay.as_image(form(base))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, base / 255, atol=1e-6)


GREY_FORMS = {
    "numpy": lambda base: base,
    "torch": lambda base: torch.from_numpy(base).to(torch.bfloat16),
    "batch": lambda base: base[None],
    "channel last": lambda base: base[:, :, None],
    "channel first": lambda base: torch.from_numpy(base)[None, None],
}


@pytest.mark.parametrize("form", GREY_FORMS.values(), ids=GREY_FORMS.keys())
def test_grey_images_have_three_equal_colours(form):
    base = np.linspace(0, 1, 20, dtype=np.float32).reshape(4, 5)
    found = overlay.as_image(form(base))
    assert found.shape == (4, 5, 3)
    np.testing.assert_allclose(found, base[:, :, None].repeat(3, 2), atol=4e-3)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK", "LA"])
def test_pil_images_of_every_mode(mode):
    pil = pytest.importorskip("PIL.Image")
    base = pil.fromarray((photo(4, 5) * 255).astype(np.uint8)).convert(mode)
    assert_near = np.testing.assert_allclose
    assert_near(overlay.as_image(base), np.asarray(base.convert("RGB")) / 255, atol=1e-6)
    assert_near(overlay.as_image([base]), overlay.as_image(base))


def test_pil_transparency_is_white():
    pil = pytest.importorskip("PIL.Image")
    base = np.array([[[255, 0, 0, 0], [255, 0, 0, 255]]], np.uint8)
    assert overlay.as_image(pil.fromarray(base)).tolist() == [[[1, 1, 1], [1, 0, 0]]]


REFUSED = {
    "None": (None, "of type NoneType"),
    "path": ("cat.png", "of type str"),
    "colours first": (np.zeros((3, 8, 9)), r"numpy \[3, 8, 9\] float64"),
    "four colours": (np.zeros((8, 9, 4)), r"numpy \[8, 9, 4\]"),
    "latents": (torch.zeros(1, 4, 8, 9), r"torch \[1, 4, 8, 9\] float32"),
    "two images": (torch.zeros(2, 3, 8, 9), r"torch \[2, 3, 8, 9\]"),
    "list of two": ([np.zeros((8, 9, 3))] * 2, "a list of 2"),
    "vector": (np.zeros(8), r"numpy \[8\]"),
    "no pixels": (np.zeros((0, 9, 3)), r"numpy \[0, 9, 3\]"),
    "whole numbers": (np.zeros((8, 9, 3), int), r"numpy \[8, 9, 3\] int64"),
    "objects": (np.zeros((8, 9), object), r"numpy \[8, 9\] object"),
    "from -1": (torch.full((3, 8, 9), -1.0), r"values from -1 to -1; .*\(image \+ 1\) / 2"),
    "to 255": (np.full((8, 9, 3), 255.0), "values from 255 to 255; give uint8 or floats from 0 to 1"),
    "not a number": (np.full((8, 9, 3), np.nan), "values from nan"),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_image_is_named(given, message):
    with pytest.raises(CaptureError, match=message) as caught:
        overlay.as_image(given)
    assert "uint8" in str(caught.value)


def test_pil_images_of_sixteen_bits_are_refused():
    pil = pytest.importorskip("PIL.Image")
    with pytest.raises(CaptureError, match="of mode I;16; accepted are a PIL image"):
        overlay.as_image(pil.fromarray(np.full((4, 5), 40000, np.uint16)))


def test_resized_keeps_edges_on_edges():
    heat = np.array([[0.0, 1.0]])
    found = overlay.resized(heat, 3, 8)
    assert (found.shape, found.dtype) == ((3, 8), np.float32)
    # Eight pixels lie at (i + 0.5) / 4 - 0.5 of the two: bilinear between their middles, flat outside.
    expected = ((np.arange(8) + 0.5) / 4 - 0.5).clip(0, 1)
    np.testing.assert_allclose(found, np.tile(expected, (3, 1)), atol=1e-6)
    assert heat.tolist() == [[0, 1]]


def test_one_panel_per_word_after_the_image(plot):
    heats = {"circle": spot(1, 1, value=0.0312), "square": spot(4, 4, value=250), "the": np.zeros((6, 6))}
    figure = overlay.overlay(photo(), heats, title="a circle")
    *panels, bar = figure.axes
    assert [axes.get_title() for axes in panels] == ["image", *heats]
    assert [axes.get_xlabel() for axes in panels] == ["", "max 0.031", "max 250", "max 0"]
    assert figure.get_suptitle() == "a circle"
    assert [label.get_text() for label in bar.get_yticklabels()] == ["0", "max"]
    assert len(overlay.overlay(photo(), {"one": spot(0, 0)}).axes) == 3


def test_the_image_itself_keeps_its_colours_and_lies_grey_beneath(plot):
    image = np.zeros((24, 24, 3), np.float32)
    image[:12, :, 0] = image[12:, :, 1] = 1  # red over green
    figure = overlay.overlay(image, {"zeros": np.zeros((6, 6))})
    own = panel_pixels(figure, figure.axes[0])
    middle = len(own) // 2
    np.testing.assert_allclose(
        own[: middle - 3, 3:-3], np.broadcast_to([1, 0, 0], own[: middle - 3, 3:-3].shape)
    )
    np.testing.assert_allclose(own[middle + 3 : -3, 3:-3].max((0, 1)), [0, 1, 0])
    beneath = panel_pixels(figure, figure.axes[1])
    assert np.ptp(beneath[3:-3, 3:-3], axis=2).max() == 0
    assert beneath[middle + 5, middle].mean() > beneath[middle - 5, middle].mean() + 0.1  # green is brighter


@pytest.mark.parametrize("shape", [(24, 24), (32, 64), (64, 32), (300, 40), (700, 1100)])
@pytest.mark.parametrize("place", [(1, 4), (4, 0)])
def test_heat_lies_over_its_place(plot, shape, place):
    heats = {"other": spot(3, 3), "word": spot(*place)}
    figure = overlay.overlay(photo(*shape), heats)
    axes = figure.axes[2]
    where = hottest(panel_pixels(figure, axes))
    np.testing.assert_allclose(where, [(place[0] + 0.5) / 6, (place[1] + 0.5) / 6], atol=0.05)
    box = axes.get_window_extent()
    assert box.height / box.width == pytest.approx(shape[0] / shape[1], rel=0.02)


def test_the_image_stays_visible_where_heat_is_small_and_colours_are_in_order(plot):
    flat, colours = np.full((4, 64, 3), 0.5, np.float32), panel_grid.colours()
    ramp = np.linspace(0, 1, 64)[None]
    bright = images.blended(flat, ramp, 1.0, colours).astype(float).mean((0, 2))
    assert (np.diff(bright[16:]) > -1e-9).all()
    stripes = np.zeros((4, 64, 3), np.float32)
    stripes[::2] = 1
    contrast = np.ptp(images.blended(stripes, ramp, 1.0, colours).astype(float).mean(2), axis=0)
    assert (np.diff(contrast) <= 2).all()  # ever more covered, to rounding
    assert contrast[0] > 130 and contrast[16] > 80 and contrast[-1] > 5


def test_every_word_has_its_own_scale(plot):
    figure = overlay.overlay(photo(), {"weak": spot(2, 2, value=1e-6), "strong": spot(2, 2, value=0.9)})
    weak, strong = (axes.images[0].get_array() for axes in figure.axes[1:3])
    np.testing.assert_array_equal(weak, strong)


def test_steps_share_one_scale_and_one_bar(plot):
    heats = [spot(2, 2, value=value) for value in (0.001, 0.02, 0.04)]
    black = np.zeros((24, 24))
    figure = overlay.steps(black, heats, ["step 1", "step 2", "step 3"], title="circle")
    *panels, bar = figure.axes
    assert [axes.get_title() for axes in panels] == ["step 1", "step 2", "step 3"]
    brightest = [axes.images[0].get_array().mean(2).max() for axes in panels]
    assert brightest[0] + 40 < brightest[1] < brightest[2] - 40
    assert bar.get_ylim() == pytest.approx((0, 0.04))
    alone = overlay.steps(black, heats[:1], ["step 1"]).axes[0].images[0].get_array()
    assert alone.mean(2).max() == pytest.approx(brightest[2], abs=4)  # the first by itself


@pytest.mark.parametrize(("count", "shown"), [(1, 1), (4, 4), (10, 10), (11, 10), (50, 10)])
def test_many_steps_are_thinned_evenly(plot, count, shown):
    labels = [str(i) for i in range(count)]
    figure = overlay.steps(photo(), [spot(1, 1)] * count, labels)
    chosen = [int(axes.get_title()) for axes in figure.axes[:-1]]
    assert len(chosen) == shown
    assert (chosen[0], chosen[-1]) == (0, count - 1)
    gaps = [after - before for before, after in pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("as_array", [False, True])
def test_frames_of_a_video(plot, as_array):
    video = np.stack([np.full((12, 18, 3), i / 15, np.float32) for i in range(16)])
    heats = np.stack([spot(2, i % 6, value=0.1 * (i + 1)) for i in range(16)])
    figure = overlay.frames(video[None] if as_array else list(video), heats)
    *panels, bar = figure.axes
    titles = [axes.get_title() for axes in panels]
    assert (len(titles), titles[0], titles[-1]) == (8, "frame 0", "frame 15")
    corners = [int(axes.images[0].get_array()[-1, 0, 0]) for axes in panels]
    assert corners == sorted(set(corners))  # each its own image
    assert bar.get_ylim() == pytest.approx((0, 1.6))
    assert hottest(panel_pixels(figure, panels[-1]))[1] == pytest.approx(3.5 / 6, abs=0.05)


WRONG = {
    "no words": (lambda: overlay.overlay(photo(), {}), "there are no words"),
    "no words to write": (lambda: overlay.write_overlays(photo(), {}, "x"), "there are no words"),
    "no image": (lambda: overlay.overlay("x", {"a": spot(1, 1)}), "the image is of type str"),
    "shape": (lambda: overlay.overlay(photo(), {"a": np.zeros(3)}), r"heat of 'a' is numpy \[3\] float64"),
    "empty": (lambda: overlay.overlay(photo(), {"a": np.zeros((0, 3))}), r"numpy \[0, 3\]"),
    "ragged": (lambda: overlay.overlay(photo(), {"a": [[1, 2], [3]]}), "heat of 'a' is a list of 2"),
    "nan": (
        lambda: overlay.overlay(photo(), {"a": spot(1, 1, value=np.nan)}),
        "'a' .*negative or not finite",
    ),
    "negative": (lambda: overlay.overlay(photo(), {"a": spot(1, 1, value=-1)}), "'a' .*negative"),
    "images": (lambda: overlay.frames([photo()] * 3, [spot(1, 1)] * 2), "3 images for heats of 2 frames"),
    "generator": (
        lambda: overlay.frames(iter([photo()]), [spot(1, 1)]),
        "the images are of type list_iterator",
    ),
}


@pytest.mark.parametrize(("use", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_drawn_is_named(plot, use, message):
    with pytest.raises(CaptureError, match=message):
        use()


BROKEN = r"$\frac{$ x"  # as a formula it cannot be drawn
WORDS = [BROKEN, "\u4e2d\u6587", "W" * 200, "", "\n", "\ud800", "a\0b", "\u0e20\u0e32\u0e29\u0e32", "the"]


@pytest.mark.parametrize("count", [1, 6, 40])
@pytest.mark.parametrize("shape", [(32, 32), (30, 60), (60, 30), (10, 200)])
def test_panels_and_words_have_room(plot, count, shape):
    words = {WORDS[i] if i < len(WORDS) else f"{'W' * i} {i}": spot(1, 1) for i in range(count)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = overlay.overlay(photo(*shape), words, title="prompt " * 60)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # picture.write does
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in texts_of(figure) if text.get_text()]
        boxes.append(figure._suptitle.get_window_extent())
    boxes += [axes.get_window_extent() for axes in figure.axes]
    assert all(box.x0 >= 0 and box.y0 >= 0 for box in boxes)
    assert all(box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)
    for i, one in enumerate(boxes):
        assert not any(one.shrunk(0.98, 0.98).overlaps(other.shrunk(0.98, 0.98)) for other in boxes[i + 1 :])
    width, height = figure.get_size_inches()
    assert max(width, height) < 16
    assert all(axes.get_title() for axes in figure.axes[:-1])


def test_a_small_image_is_drawn_large_and_pixel_by_pixel(plot):
    checks = np.indices((32, 32)).sum(0) % 2 * 1.0
    figure = overlay.overlay(checks, {"word": spot(1, 1)})
    own = panel_pixels(figure, figure.axes[0])
    assert min(own.shape[:2]) > 250
    inner = own[5:-5, 5:-5]
    assert ((inner < 0.02) | (inner > 0.98)).mean() > 0.85  # black or white, not blurred to grey


def test_images_are_fitted():
    checks = np.indices((512, 512)).sum(0)[:, :, None] % 2 * np.ones(3, np.float32)
    np.testing.assert_allclose(images.fitted(checks.astype(np.float32), 128), 0.5)  # averaged, not picked
    assert images.fitted(photo(32, 16), 500).shape == (480, 240, 3)  # so that heat is smooth within a pixel


def test_a_large_image_makes_no_large_figure(plot):
    figure = overlay.overlay(photo(1024, 1024), {str(i): spot(1, 1) for i in range(12)})
    assert sum(axes.images[0].get_array().nbytes for axes in figure.axes) < 20e6
    assert len(map_figure.to_png(figure)) < 5e6


def test_figures_are_written_without_warnings(plot, tmp_path):
    heats = dict.fromkeys(WORDS, spot(1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, start in (("map.png", b"\x89PNG"), ("map.svg", b"<?xml"), ("map.pdf", b"%PDF")):
            path = map_figure.write(overlay.overlay(photo(), heats, title=BROKEN), tmp_path / name)
            assert path.read_bytes().startswith(start)
        map_figure.write(
            overlay.steps(photo(), [spot(1, 1)] * 2, [BROKEN, "\u4e2d"], title=BROKEN), tmp_path / "s.png"
        )


def read(path):
    from matplotlib.image import imread

    return imread(io.BytesIO(path.read_bytes()))[:, :, :3]


def test_files_are_named_by_words_and_complete(plot, tmp_path):
    words = ["circle", "a/b ..\\c", "", "\u4e2d\u6587", BROKEN, "x" * 300, "a b", "a_b", "\ud800"]
    heats = {word: spot(1, 4, value=0.01 * (i + 1)) for i, word in enumerate(words)}
    paths = overlay.write_overlays(photo(), heats, tmp_path / "new" / "folder")
    names = ["00_circle", "01_a_b_c", "02_word", "03_\u4e2d\u6587", "04_frac_x", f"05_{'x' * 40}", "06_a_b"]
    assert [path.name for path in paths] == [f"{name}.png" for name in [*names, "07_a_b", "08_word"]]
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == sorted(path.name for path in paths)
    for path in paths:
        seen = read(path)
        assert seen.shape == (504, 504, 3)  # 24 pixels, 21 times
        np.testing.assert_allclose(hottest(seen), [1.5 / 6, 4.5 / 6], atol=0.05)
    assert overlay.write_overlays(photo(), heats, tmp_path / "new" / "folder") == paths


@pytest.mark.parametrize(
    ("shape", "size"), [((32, 16), (512, 256)), ((300, 200), (600, 400)), ((700, 900), (700, 900))]
)
def test_files_have_the_pixels_of_the_image(plot, tmp_path, shape, size):
    (path,) = overlay.write_overlays(photo(*shape), {"a": spot(1, 1)}, tmp_path)
    assert read(path).shape[:2] == size


@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_files_are_written_whole_or_not_at_all(plot, tmp_path, monkeypatch, broken, error):
    heats = {"a": spot(1, 1), "b": spot(2, 2), "c": spot(3, 3)}
    calls, real = [], getattr(os, broken)

    def fail(*args):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return real(*args)

    kept = tmp_path / "notes.txt"
    kept.write_text("mine")
    monkeypatch.setattr(os, broken, fail)
    with pytest.raises((CaptureError, KeyboardInterrupt)) as caught:
        overlay.write_overlays(photo(), heats, tmp_path)
    if isinstance(error, OSError):
        assert str(caught.value).startswith(f"cannot write into {tmp_path}: No space left on device; choose")
    assert os.listdir(tmp_path) == ["notes.txt"]
    calls.clear()
    with pytest.raises((CaptureError, KeyboardInterrupt)):
        overlay.write_overlays(photo(), heats, tmp_path / "new" / "folder")
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_older_files_survive_a_failed_write(plot, tmp_path, monkeypatch):
    (path,) = overlay.write_overlays(photo(), {"a": spot(1, 1)}, tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(CaptureError):
        overlay.write_overlays(photo(), {"a": spot(4, 4), "b": spot(1, 1)}, tmp_path)
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() == before


def test_folders_that_cannot_be_written_are_named(plot, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CaptureError, match=r"cannot write into .*file: it is a file; choose another folder"):
        overlay.write_overlays(photo(), {"a": spot(1, 1)}, tmp_path / "file")
    with pytest.raises(CaptureError, match=r"cannot write into .*below: Not a directory"):
        overlay.write_overlays(photo(), {"a": spot(1, 1)}, tmp_path / "file" / "below")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(plot, tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(CaptureError, match="Permission denied"):
        overlay.write_overlays(photo(), {"a": spot(1, 1)}, tmp_path / "new")
    assert os.listdir(tmp_path) == []


def test_missing_extra_is_named(monkeypatch, tmp_path):
    real_import = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    for use in (
        lambda: overlay.overlay(photo(), {"a": spot(1, 1)}),
        lambda: overlay.steps(photo(), [spot(1, 1)], ["a"]),
        lambda: overlay.write_overlays(photo(), {"a": spot(1, 1)}, tmp_path / "new"),
    ):
        with pytest.raises(MissingExtraError, match=r'pip install "attnpatch\[plot\]"'):
            use()
    assert os.listdir(tmp_path) == []


def test_matplotlib_is_imported_late_and_pyplot_never(plot, tmp_path):
    code = (
        "import sys, numpy, attnpatch; from attnpatch.plotting import map_figure, overlay;"
        "print([name for name in ('matplotlib', 'PIL') if name in sys.modules]);"
        "image, heats = numpy.zeros((8, 8, 3)), {'a': numpy.ones((2, 2))};"
        "map_figure.to_png(overlay.overlay(image, heats)); overlay.steps(image, [heats['a']], ['1']);"
        "overlay.write_overlays(image, heats, sys.argv[1]);"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "False"]
