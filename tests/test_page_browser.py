"""The page in a browser: headless Chromium of the system, one for all tests; without one they skip and say so."""

import dataclasses
import itertools
import math
import re
import shutil
import time

import pytest
import torch

from attnpatch.maps.block_map import BlockMap
from attnpatch.viewing.page import write_page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install playwright"
)
pytestmark = [
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(CHROMIUM is None, reason=f"no browser here (looked for {', '.join(NAMES)})"),
]

DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
NORMALIZATIONS = ("none", "row", "density", "column")


def block_map(count=8, layers=3, heads=0, seed=0, **fields):
    """A causal map of a conversation, with texts."""
    shape = (layers, *[heads] * bool(heads), count, count)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(shape, generator=generator).mul(2)
    later = torch.ones(count, count, dtype=torch.bool).triu(1)
    sizes = torch.randint(1, 90, (count,), generator=generator)
    labels = [f"{i} {('user', 'assistant')[i % 2]}" for i in range(count)]
    texts = [f"message {i}: " + "lorem ipsum " * min(i * i, 99) for i in range(count)]
    given = {
        "mass": scores.masked_fill(later, -math.inf).softmax(-1),
        "layers": range(layers),
        "query_labels": labels,
        "key_labels": labels,
        "query_sizes": sizes,
        "key_sizes": sizes,
        "heads": range(heads) if heads else "mean",
        "metadata": {"model": "A <b>model</b>", "texts": texts},
    }
    return BlockMap(**{**given, **fields})


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a page of maps; at the end there must have been no error, and no request but for the page itself."""
    contexts, trouble, requests = [], [], []

    def open_page(maps, viewport=DESKTOP, at_mean=False, **options):
        context = browser.new_context(viewport=viewport, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("dialog", lambda dialog: trouble.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        given = maps if isinstance(maps, dict) else {"map.safetensors": maps}
        path = write_page(given, tmp_path / f"page{len(contexts)}.html")
        page.goto(path.as_uri())
        settled(page)
        if at_mean:  # no cell, and the mean of the layers, wherever the page opened
            page.evaluate("select(null, null), setAxis('layer', 0), refresh()")
            settled(page)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert trouble == []
    assert len(requests) == len(contexts) and all(url.startswith("file:") for url in requests)


def until(page, expression, seconds=60):
    """Wait until an expression is true. Playwright's own waiting evaluates texts, which the page forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"never true: {expression}"
        page.wait_for_timeout(20)


def settled(page):
    """Wait until what was asked for last is drawn."""
    until(page, "document.documentElement.dataset.shown === shownNow()")


# Canvases that are read often are kept elsewhere than those that are drawn; the page's own is only drawn.
COPIED = """
const copied = () => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [cellsCanvas.width, cellsCanvas.height];
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(cellsCanvas, 0, 0);
    return context;
};
"""


def picture(page):
    settled(page)
    return page.locator("#cells").evaluate("canvas => canvas.toDataURL()")


def place_of(page, row, column):
    """The middle of a cell on the screen."""
    settled(page)
    box = page.locator("#frame").bounding_box()
    at = {name: float(value) for name, value in page.evaluate("({...frameElement.dataset})").items()}
    zoom = page.evaluate("state.zoom")
    return (
        box["x"] + at["left"] + (column + 0.5 - zoom["column"]) * at["cellWidth"],
        box["y"] + at["top"] + (row + 0.5 - zoom["row"]) * at["cellHeight"],
    )


def hovered(page, row, column):
    """What the tooltip says over a cell: its number, and all of its text."""
    page.mouse.move(*place_of(page, row, column))
    tooltip = page.locator("#tooltip")
    tooltip.wait_for(state="visible")
    return tooltip.locator(".value").inner_text(), tooltip.inner_text()


def same_number(text, value):
    """Whether a text is a number to three significant digits."""
    if value == 0:
        return text == "0"
    digits = re.sub(r"e.*$", "", text).replace(".", "").lstrip("0")
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return len(digits) == 3 and abs(float(text) - value) <= unit * 0.502


def to_position(page, slider, position):
    page.locator(slider).fill(str(position))


def finding_map(**fields):
    """The last row attends most to block 2 in layer 1; in layer 0, to the first block; to itself most of all."""
    mass = torch.zeros(3, 6, 6)
    mass[:, :, 0] = 0.5
    mass[:, 5, 5] = torch.tensor([0.5, 0.1, 0.6])
    mass[:, 5, 2] = torch.tensor([0.0, 0.8, 0.1])
    mass[:, 5, 0] = torch.tensor([0.5, 0.05, 0.2])
    return block_map(count=6, mass=mass, layers=3, **fields)


def test_a_page_opens_on_what_the_last_row_attends_to_most(opened):
    page = opened(finding_map())
    assert page.evaluate("[state.row, state.cursor]") == [5, {"row": 5, "column": 2}]
    assert page.locator("#layer-name").inner_text() == "1"
    assert page.locator("#finding").inner_text() == (
        "5 assistant attends most to \u201c2 user: message 2: lorem ipsum lorem ipsum lorem ipsum lorem ip\u2026\u201d "
        "(0.800, layer 1), then \u201c0 user: message 0:\u201d (0.500, layer 0)."
    )
    assert page.locator("#row-title").inner_text() == "What 5 assistant attends to"
    first = page.locator("#row-list button").first
    assert (
        first.locator(".name").inner_text() == "2 user" and first.locator(".number").inner_text() == "0.800"
    )
    assert first.locator(".words").inner_text().startswith("message 2: lorem ipsum")
    # The second block is a button that leads to its cell.
    page.locator("#finding button").nth(1).click()
    settled(page)
    assert page.evaluate("[state.cursor.column, state.layer]") == [0, 1]
    assert page.locator("#cell-value").inner_text() == "0.500"
    # The numbers of the sentence are those of the map, not of another normalisation.
    page.select_option("#normalization", "column")
    settled(page)
    assert page.locator("#finding").is_hidden()


@pytest.mark.parametrize(
    ("fields", "row", "column"),
    [
        ({"query_sizes": torch.tensor([1, 1, 1, 1, 0, 0])}, 3, 0),  # the last blocks have no tokens
        ({"key_labels": [f"k{i}" for i in range(6)]}, 5, 2),
        ({"heads": range(1), "mass": finding_map().mass[:, None]}, 5, 2),
    ],
)
def test_the_row_it_opens_on_has_tokens(opened, fields, row, column):
    page = opened(dataclasses.replace(finding_map(), **fields))
    assert page.evaluate("[state.row, state.cursor.column]") == [row, column]


def test_a_row_over_all_layers(opened):
    page = opened(finding_map())
    page.select_option("#order", "layers")
    until(page, "document.querySelectorAll('#row-list small').length > 0")
    names = page.locator("#row-list .name").all_inner_texts()
    assert [name.split() for name in names] == [
        ["2", "user", "layer", "1"], ["5", "assistant", "layer", "2"], ["0", "user", "layer", "0"],
    ]  # fmt: skip
    assert page.locator("#row-list .number").all_inner_texts() == ["0.800", "0.600", "0.500"]
    page.locator("#row-list button").nth(1).click()
    settled(page)
    assert page.evaluate("[state.cursor.column, state.layer]") == [5, 3]


def coloured(page):
    """The strength of each block's colour in percent."""
    settled(page)
    until(page, "written === theSequence() && document.querySelectorAll('#text .block').length > 0")
    styles = page.evaluate(
        "[...document.querySelectorAll('#text .block')].map((one) => one.style.backgroundColor)"
    )
    return [float(re.search(r"([\d.]+)%", style).group(1)) if style else 0.0 for style in styles]


def test_a_click_on_a_message_colours_the_others(opened):
    given = block_map(count=6)
    page = opened(given)
    coloured(page)
    message = page.locator("#text .block").nth(4)
    assert "message 4: lorem" in message.inner_text() and "4 user" in message.inner_text()
    page.select_option("#order", "order")
    to_position(page, "#layer", 2)
    message.click()
    assert page.evaluate("state.row") == 4
    mass = given.mass[1, 4]
    strengths = [math.sqrt(value / mass.max().item()) * 55 for value in mass.tolist()]
    assert coloured(page) == pytest.approx(strengths, abs=0.06)
    assert page.locator("#text [aria-selected=true]").count() == 1
    assert message.get_attribute("aria-selected") == "true"
    others = mass.clone()
    others[4] = 0
    assert page.evaluate("state.cursor.column") == others.argmax().item()
    for number, value in zip(page.locator("#text .number").all_inner_texts(), mass.tolist(), strict=True):
        assert same_number(number, value)
    assert page.locator("#text-title").inner_text() == "The text, coloured by what 4 user attends to"


def test_the_text_is_moved_through_with_keys(opened):
    page = opened(block_map(count=6))
    coloured(page)
    # One stop for the Tab key, and from there arrow keys.
    assert page.locator("#text [tabindex='0']").count() == 1
    page.locator("#text [tabindex='0']").focus()
    for key in ("Home", "ArrowDown", "ArrowDown", "ArrowUp", "Enter"):
        page.keyboard.press(key)
    assert page.evaluate("[state.row, document.activeElement.dataset.column]") == [1, "1"]
    page.keyboard.press("End")
    page.keyboard.press(" ")
    assert page.evaluate("state.row") == 5
    assert page.locator("#text [tabindex='0']").count() == 1


def test_words_flow_and_blocks_that_do_not_attend_have_no_row(opened):
    words = ["the", " sea", " is", " blue"]
    given = block_map(count=4, query_labels=["a", "b", "c", " sea"], key_labels=words, metadata={})
    page = opened(given)
    coloured(page)
    assert page.locator("#text").inner_text() == "the sea is blue"
    tops = page.evaluate("[...document.querySelectorAll('#text .block')].map((one) => one.offsetTop)")
    assert len(set(tops)) == 1
    page.locator("#text .block").nth(0).click()
    assert page.evaluate("[state.row, state.cursor.column]") == [3, 0]  # the row stays
    page.evaluate("select({ row: 0, column: 0 }, 0)")
    page.locator("#text .block").nth(1).click()
    assert page.evaluate("state.row") == 3  # the block of this name


def test_a_second_map_is_shown_beside_the_first(opened):
    first, second = block_map(count=6), block_map(count=6, seed=4)
    # Blocks are matched by label, layers by name.
    order = [5, 0, 1, 2, 3, 4]
    labels = [second.query_labels[i] for i in order]
    moved = dataclasses.replace(
        second,
        mass=second.mass[[2, 1, 0]][:, order][..., order],
        layers=[2, 1, 0],
        query_labels=labels,
        key_labels=labels,
    )
    page = opened({"one": first, "two": moved, "three": block_map(count=6, layers=2)}, at_mean=True)
    assert page.locator("#second-panel").is_hidden()
    assert page.locator("#second option").all_inner_texts() == ["none", "two", "three"]
    page.select_option("#second", "1")
    to_position(page, "#layer", 1)
    page.evaluate("select({ row: 4, column: 1 }, 4)")
    settled(page)
    until(page, "document.getElementById('second-note').textContent.includes('The cell')")
    here, there = re.search(
        r"The cell: (\S+) in the first map, (\S+) here", page.locator("#second-note").inner_text()
    ).groups()
    assert same_number(here, first.mass[0, 4, 1].item()) and same_number(there, second.mass[0, 4, 1].item())
    numbers = page.locator("#second-list .number").all_inner_texts()
    expected = sorted(second.mass[0, 4][:5].tolist(), reverse=True)
    assert len(numbers) == 5 and all(map(same_number, numbers, expected))
    # A bar of the second map leads to the same block in the first.
    page.locator("#second-list button").first.click()
    assert page.evaluate("state.cursor.column") == second.mass[0, 4].argmax().item()
    page.select_option("#second", "2")
    to_position(page, "#layer", 3)
    until(page, "document.getElementById('second-note').textContent === 'It has no layer 2.'")
    page.select_option("#second", "")
    assert page.locator("#second-panel").is_hidden()
    page.select_option("#map", "1")
    assert page.locator("#second option").all_inner_texts() == ["none", "one", "three"]


def test_a_colour_is_the_same_number_in_both_maps(opened):
    first = block_map(count=6, layers=1)
    mass = first.mass.clone()
    mass[0, 5, 0] = 40 * mass.max()  # beyond the first map's scale
    page = opened({"one": first, "two": dataclasses.replace(first, mass=mass)}, at_mean=True)
    page.select_option("#normalization", "none")
    settled(page)
    page.select_option("#second", "1")
    page.evaluate("select({ row: 4, column: 1 }, 4)")  # marked in both
    until(page, "/The cell.*beyond the scale/.test(document.getElementById('second-note').textContent)")
    # The colour in a corner of each cell, where no mark is.
    one, two = (
        page.evaluate(
            """([name]) => {
                const canvas = name ? document.getElementById(name) : painted.canvas;
                const size = canvas.width / 6;
                const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
                const at = (i) => 4 * (Math.floor(i / 6) * size * canvas.width + (i % 6) * size);
                return Array.from({ length: 36 }, (_, i) => [...data.slice(at(i), at(i) + 4)]);
            }""",
            [name],
        )
        for name in ("", "second-map")
    )
    assert [cell for cell in range(36) if one[cell] != two[cell]] == [30]
    assert "Numbers beyond the scale have its last colour." in page.locator("#second-note").inner_text()


def test_all_heads_of_a_layer_side_by_side(opened):
    given = block_map(count=6, heads=4)
    page = opened(given)
    assert page.locator("#heads .head").count() == 0
    page.locator("#heads-panel summary").click()
    until(page, "document.querySelectorAll('#heads .head small').length === 4")
    layer = page.evaluate("state.layer") - 1
    for head in range(4):
        row = given.mass[layer, head, 5, :5]
        text = page.locator("#heads .head").nth(head).inner_text().replace("\n", " ")
        number, label = re.fullmatch(rf"head {head} (\S+) on (.*)", text).groups()
        assert same_number(number, row.max().item()) and label == given.key_labels[row.argmax()]
    page.locator("#heads .head").nth(2).click()
    settled(page)
    assert page.locator("#head-name").inner_text() == "2"
    until(page, "document.querySelectorAll('#heads [aria-pressed=true]').length === 1")
    page.locator("#heads .head").nth(2).click()
    assert page.locator("#head-name").inner_text() == "mean of 4"
    assert opened(block_map()).locator("#heads-panel").is_hidden()


def test_a_finding_of_numbers_with_signs_is_the_largest_whatever_its_sign(opened):
    page = opened(
        dataclasses.replace(signed_map(SIGNED), metadata={"numbers": "difference", "weighting": "difference"})
    )
    said = page.locator("#finding").inner_text()
    page.click("#help-button")
    assert page.locator("#numbers-help").is_visible() and page.locator("#signed-help").is_hidden()
    assert said.startswith("2 user: the largest number (difference) is at \u201c0 user\u201d (0.250)")


def test_the_help_says_that_a_map_is_a_part(opened):
    whole = block_map()
    for one, is_part in ((whole, False), (whole.isel(key=slice(2, 5)), True)):
        page = opened(one)
        page.click("#help-button")
        assert page.locator("#part-help").is_visible() == is_part


def test_a_page_opens_without_errors_and_shows_what_it_holds(opened):
    page = opened(block_map())
    assert page.title() == "map.safetensors - attnpatch"
    assert "8 \u00d7 8 blocks, 3 layers" in page.locator("#shape").inner_text()
    for absent in ("#head-field", "#step-field", "#sequence-field", "#map-field", "#trouble"):
        assert page.locator(absent).is_hidden(), absent
    page.click("#help-button")
    assert "A <b>model</b>" in page.locator("#facts").inner_text()
    assert "lorem" not in page.locator("#facts").inner_text()


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("spread", "; spread (standard deviation over 3 conversations) up to 0.25"),
        ("error", "; sampled, standard error up to 0.25"),
        (None, ""),
    ],
)
def test_a_page_says_what_its_numbers_are_means_of(opened, field, said):
    """Of several conversations, or of a sample of the rows."""
    shown = block_map()
    known = {field: torch.full_like(shown.mass, 0.25)} if field else {}
    metadata = {**shown.metadata, "spread": "standard deviation over 3 conversations"}
    page = opened(dataclasses.replace(shown, metadata=metadata, **known))
    assert page.inner_text("#shape").endswith("rows attend to columns" + said)


def test_sliders_change_the_picture(opened):
    page = opened(block_map(heads=2), at_mean=True)
    seen = {picture(page)}
    for slider, count in (("#layer", 3), ("#head", 2)):
        for position in range(1, count + 1):
            to_position(page, slider, position)
            assert page.locator(f"{slider}-name").inner_text() == str(position - 1)
            seen.add(picture(page))
    assert len(seen) == 1 + 3 + 2
    to_position(page, "#layer", 0)
    to_position(page, "#head", 0)
    assert picture(page) in seen


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_hover_shows_the_number_and_both_texts(opened, normalization):
    given = block_map(heads=2).normalize(normalization)
    page = opened(given, at_mean=True)
    assert page.locator("#normalization").input_value() == normalization
    for layer, head in (("mean", "mean"), (2, "mean"), ("mean", 1), (1, 0)):
        to_position(page, "#layer", 0 if layer == "mean" else layer + 1)
        to_position(page, "#head", 0 if head == "mean" else head + 1)
        values = given.select(layer=layer, head=head).values.reshape(8, 8)
        for row, column in ((0, 0), (3, 1), (7, 7), (5, 2), (2, 6)):
            number, text = hovered(page, row, column)
            assert same_number(number, values[row, column].item()), (layer, head, row, column, number)
            assert f"message {row}:" in text and f"message {column}:" in text
            assert given.query_labels[row] in text and given.key_labels[column] in text


def test_normalizations_can_be_switched(opened):
    given = block_map()
    page = opened(given, at_mean=True)
    for name in NORMALIZATIONS[::-1]:
        page.select_option("#normalization", name)
        number, _ = hovered(page, 6, 3)
        assert same_number(number, given.select(layer="mean").normalize(name).values[0, 6, 3].item())


@pytest.mark.parametrize("value", [0.12345, 1.0, 0.0012344, 9.996e-4, 3.14159e-7, 1e-12, 0.99951, 0.0])
def test_numbers_have_three_significant_digits(opened, value):
    page = opened(block_map(count=2, layers=1, mass=torch.tensor([[[0.5, 0.5], [value, 0.25]]])))
    number, _ = hovered(page, 1, 0)
    assert same_number(number, torch.tensor(value).item()), number


def test_long_texts_are_short_in_the_tooltip_and_whole_beside_it(opened):
    given = block_map()
    page = opened(given)
    _, text = hovered(page, 7, 6)
    assert "\u2026" in text and len(text) < 1200
    page.mouse.click(*place_of(page, 7, 6))
    assert page.locator("#cell-query").text_content() == given.metadata["texts"][7]
    assert page.locator("#cell-key").text_content() == given.metadata["texts"][6]


def test_a_click_shows_where_the_row_looks(opened):
    given = block_map()
    page = opened(given, at_mean=True)
    assert page.locator("#row-hint").is_visible() and page.locator("#row-list").is_hidden()
    page.mouse.click(*place_of(page, 5, 2))
    assert page.locator("#row-title").inner_text() == "What 5 assistant attends to"
    mass = given.select(layer="mean").mass[0, 5]
    order = mass[:6].argsort(descending=True).tolist()
    bars = page.locator("#row-list button")
    assert bars.locator(".name").all_inner_texts() == [given.key_labels[i] for i in order]
    for text, i in zip(bars.locator(".number").all_inner_texts(), order, strict=True):
        assert same_number(text, mass[i].item())
    widths = [box["width"] for box in (fill.bounding_box() for fill in bars.locator(".fill").all())]
    assert widths == sorted(widths, reverse=True)
    # A bar leads to its cell, in the same row.
    bars.nth(1).click()
    assert page.evaluate("state.cursor") == {"row": 5, "column": order[1]}
    page.select_option("#order", "order")
    assert page.locator("#row-bars").is_visible() and page.locator("#row-list").is_hidden()
    page.locator("#row-bars").hover()
    assert "5 assistant" in page.locator("#tooltip").inner_text()


def test_what_a_row_lost_to_sinks_is_said(opened):
    given = block_map()
    page = opened(block_map(mass=given.mass * 0.75))
    page.mouse.click(*place_of(page, 5, 2))
    assert "sums to 0.750" in page.locator("#row-note").inner_text()
    page.select_option("#normalization", "row")
    settled(page)
    assert page.locator("#row-note").inner_text() == ""


def test_the_profile_follows_the_cell(opened):
    given = block_map(layers=5).normalize("column")
    page = opened(given, at_mean=True)
    assert "mean over all rows" in page.locator("#profile-title").inner_text()
    assert page.locator("#profile-key li").count() == 3
    page.mouse.click(*place_of(page, 4, 1))
    until(page, "profileFrame.lines.length === 1")
    shown = page.evaluate("profileFrame.lines[0].values")
    assert shown == pytest.approx(given.values[:, 4, 1].tolist(), rel=1e-4)
    # A click on the profile goes to the layer.
    box = page.locator("#profile").bounding_box()
    x = page.evaluate("profileFrame.x(3)")
    page.mouse.click(box["x"] + x, box["y"] + 60)
    settled(page)
    assert page.locator("#layer-name").inner_text() == "3"


def test_everything_can_be_done_with_keys(opened):
    given = block_map(heads=2)
    page = opened(given, at_mean=True)
    page.locator("#frame").focus()
    outline = page.locator("#frame").evaluate("frame => getComputedStyle(frame).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("ArrowDown")
    assert page.evaluate("state.cursor") == {"row": 7, "column": 0}
    for key in ("ArrowUp", "ArrowUp", "ArrowRight"):
        page.keyboard.press(key)
    assert page.evaluate("[state.cursor, state.row]") == [{"row": 5, "column": 1}, None]
    value = given.select(layer="mean", head="mean").mass[0, 5, 1].item()
    assert same_number(page.locator("#cell-value").inner_text(), value)
    assert page.locator("#spoken").inner_text().startswith("5 assistant on 1 assistant: ")
    page.keyboard.press("Enter")
    assert page.evaluate("state.row") == 5
    page.keyboard.press("End")
    assert page.evaluate("state.cursor.column") == 7
    page.keyboard.press("Shift+ArrowLeft")
    assert page.evaluate("state.cursor.column") == 0
    for key, expected in (("]", "0"), ("]", "1"), ("[", "0"), ("[", "mean of 3"), ("[", "mean of 3")):
        page.keyboard.press(key)
        assert page.locator("#layer-name").inner_text() == expected
    for key, expected in (("}", "0"), ("}", "1"), ("}", "1"), ("{", "0")):
        page.keyboard.press(key)
        assert page.locator("#head-name").inner_text() == expected
    settled(page)
    page.keyboard.press("Escape")
    assert page.evaluate("[state.row, state.cursor !== null]") == [None, True]
    page.keyboard.press("Escape")
    assert page.evaluate("state.cursor") is None
    assert page.locator("#cell").is_hidden()


def test_keys_in_a_control_stay_in_the_control(opened):
    page = opened(block_map(), at_mean=True)
    page.locator("#layer").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#layer-name").inner_text() == "0"
    assert page.evaluate("state.cursor") is None


def test_every_control_has_a_name_and_can_be_reached(opened):
    page = opened({"one": block_map(heads=2), "two": block_map(seed=1)})
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert {
        "map",
        "help-button",
        "theme",
        "layer",
        "head",
        "normalization",
        "scale",
        "zoom-in",
        "frame",
    } <= set(reached)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, [tabindex]")].filter((one) =>
            !one.ariaLabel && !one.labels?.length && !one.textContent.trim()).map((one) => one.id)"""
    )
    assert unnamed == []


def test_zoom_shows_fewer_cells_and_finds_them(opened):
    given = block_map(count=30)
    page = opened(given, at_mean=True)
    before = picture(page)
    page.mouse.click(*place_of(page, 20, 9))
    page.locator("#frame").focus()
    page.keyboard.press("+")
    page.keyboard.press("+")
    settled(page)
    assert page.locator("#zoom-name").inner_text() == "4\u00d7"
    assert picture(page) != before
    number, text = hovered(page, 20, 9)
    assert same_number(number, given.select(layer="mean").mass[0, 20, 9].item()) and "message 20:" in text
    # Dragging moves the view, and selects nothing.
    x, y = place_of(page, 20, 9)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 80, y + 40, steps=4)
    page.mouse.up()
    moved = place_of(page, 20, 9)
    assert moved == pytest.approx((x + 80, y + 40), abs=1)
    assert page.evaluate("state.cursor") == {"row": 20, "column": 9}
    # The view follows the cell.
    page.keyboard.press("End")
    settled(page)
    number, text = hovered(page, 20, 29)
    assert number == "0" and "message 29:" in text
    page.keyboard.press("0")
    assert picture(page) == before


def test_the_chooser_lists_all_maps(opened):
    first, second = block_map(), block_map(count=5, layers=1, seed=3)
    page = opened({"<i>first</i>.safetensors": first, "second.safetensors": second})
    assert page.locator("#map option").all_inner_texts() == ["<i>first</i>.safetensors", "second.safetensors"]
    page.mouse.click(*place_of(page, 6, 2))
    page.select_option("#map", "1")
    settled(page)
    assert "5 \u00d7 5 blocks, 1 layer;" in page.locator("#shape").inner_text()
    assert page.locator("#layer-field").is_hidden()
    strongest = second.mass[0, 4, :4].argmax().item()  # its own place to open on
    assert page.evaluate("[state.row, state.cursor]") == [4, {"row": 4, "column": strongest}]
    number, _ = hovered(page, 4, 1)
    assert same_number(number, second.mass[0, 4, 1].item())


def test_sequences_and_steps_can_be_chosen(opened):
    labels = [["a", "b", "c"], ["d", "e"]]
    sizes = torch.tensor([[1, 2, 3], [4, 5, 0]])
    mass = torch.rand(2, 2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    mass[1, ..., 2] = 0
    given = BlockMap(
        mass, layers=["down", "up"], steps=[0, 40], query_labels=labels, key_labels=labels,
        query_sizes=sizes, key_sizes=sizes,
    )  # fmt: skip
    page = opened(given, at_mean=True)
    number, _ = hovered(page, 2, 1)
    assert same_number(number, mass[0, :, :, 2, 1].mean().item())
    page.select_option("#sequence", "1")
    assert "2 \u00d7 2 blocks" in page.locator("#shape").inner_text()
    to_position(page, "#step", 2)
    to_position(page, "#layer", 1)
    assert page.locator("#step-name").inner_text() == "40"
    assert page.locator("#layer-name").inner_text() == "down"
    number, text = hovered(page, 1, 0)
    assert same_number(number, mass[1, 1, 0, 1, 0].item()) and "row: e (5 tokens)" in text


def test_a_message_that_holds_a_script_is_text(opened):
    evil = ["<script>window.ran = 1</script>", "</script><script>window.ran = 1</script>",
            "<img src=x onerror='window.ran = 1'>", "<!--", "a & b &amp; c"]  # fmt: skip
    given = block_map(count=5, query_labels=evil, key_labels=evil, metadata={"texts": evil, "<s>": evil[1]})
    page = opened({evil[1]: given, evil[2]: given})
    for i, text in enumerate(evil):
        _, seen = hovered(page, i, 0)
        assert text in seen
        page.mouse.click(*place_of(page, i, i))
        assert page.locator("#cell-query").text_content() == text
        assert text in page.locator("#row-title").text_content()
    page.click("#help-button")
    assert page.evaluate("window.ran") is None
    assert page.locator("img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_is_the_systems_until_it_is_chosen(opened, scheme):
    page = opened(block_map(), color_scheme=scheme)
    other = {"light": "dark", "dark": "light"}[scheme]

    def theme(awaited=None):
        if awaited is not None:
            # The system's change arrives as an event, some time after it was made.
            page.wait_for_function("name => document.documentElement.dataset.theme === name", arg=awaited)
        settled(page)
        return page.evaluate(
            "[document.documentElement.dataset.theme, getComputedStyle(document.body).backgroundColor]"
        )

    before, first = theme(), picture(page)
    assert before[0] == scheme
    page.emulate_media(color_scheme=other)
    assert theme(other)[0] == other
    page.emulate_media(color_scheme=scheme)
    theme(scheme)
    page.click("#theme")
    after = theme(other)
    assert after[0] == other and after[1] != before[1]
    assert picture(page) != first
    page.emulate_media(color_scheme=other)
    page.emulate_media(color_scheme=scheme)
    assert theme()[0] == other


@pytest.mark.parametrize("scale", ["sqrt", "linear", "log"])
def test_colours_are_those_of_the_legend(opened, scale):
    mass = torch.tensor([[[1.0, 0.0], [0.25, 0.75]]])
    page = opened(block_map(count=2, layers=1, mass=mass, metadata={}))
    page.select_option("#scale", scale)
    settled(page)
    parts = {"sqrt": 0.5, "linear": 0.25, "log": 1 + math.log10(0.25) / 4}
    seen = page.evaluate(
        COPIED
        + """[[0, 0], [1, 0], [0, 1]].map(([row, column]) => {
            const at = frameElement.dataset;
            const pixel = (place, start, size) => Math.round(Number(start) + (place + 0.1) * size);
            const where = [pixel(column, at.left, at.cellWidth), pixel(row, at.top, at.cellHeight)];
            const [r, g, b] = copied().getImageData(...where, 1, 1).data;
            return "#" + [r, g, b].map((part) => part.toString(16).padStart(2, "0")).join("");
        })"""
    )
    colours = page.evaluate("VIRIDIS")
    index = min(255, math.floor(parts[scale] * 256))
    assert seen[:2] == ["#" + colours[-6:], "#" + colours[6 * index : 6 * index + 6]]
    assert seen[2] == page.evaluate("themeColour('zero')")
    ticks = page.locator("#ticks span").all_inner_texts()
    assert ticks[-1] == "1"
    middle = {"sqrt": "0.25", "linear": "0.5", "log": "0.01"}
    assert ticks[2] == middle[scale]


@pytest.mark.parametrize("width", [1280, 400, 390])
@pytest.mark.parametrize("largest", [1.0, 0.983])
@pytest.mark.parametrize("scale", ["sqrt", "linear", "log"])
def test_numbers_of_the_legend_lie_apart(opened, scale, largest, width):
    """At 400 pixels the legend is narrower than at 390, where the key of "exactly 0" is below it."""
    mass = torch.tensor([[[largest, 0.0], [0.25, 0.75]]])
    page = opened(block_map(count=2, layers=1, mass=mass, metadata={}), viewport={**PHONE, "width": width})
    page.select_option("#scale", scale)
    settled(page)
    ticks = page.evaluate(
        """() => [...document.querySelectorAll("#ticks span")].map((one) => one.getBoundingClientRect())
            .filter((box) => box.width).map(({ left, right }) => [left, right])"""
    )
    assert len(ticks) >= 3
    assert all(right + 3 <= left for (_, right), (left, _) in itertools.pairwise(ticks)), ticks


@pytest.mark.parametrize("metadata", [{}, {"weighting": "gradient"}], ids=["mixed", "gradients"])
def test_controls_of_numbers_with_signs_lie_inside_their_frame(opened, metadata):
    """Their menu has the longest texts."""
    page = opened(dataclasses.replace(signed_map(SIGNED), metadata=metadata), viewport=PHONE)
    frame, *controls = (
        page.locator(name).evaluate_all("all => all.map(one => one.getBoundingClientRect().right)")
        for name in ("#controls", "#controls select", "#controls input")
    )
    assert max(right for found in controls for right in found) < frame[0]


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("count", [10, 500])
def test_nothing_is_cut_off_or_overlaps(opened, viewport, count):
    page = opened(block_map(count=count, layers=2), viewport=viewport, has_touch=viewport is PHONE)
    if viewport is PHONE:
        page.locator("#frame").scroll_into_view_if_needed()
        page.touchscreen.tap(*place_of(page, count - 2, 1))
    else:
        page.mouse.click(*place_of(page, count - 2, 1))
    assert page.evaluate("state.row") == count - 2
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    boxes = page.evaluate(
        """() => Object.fromEntries(["header", "#controls", "#legend", "#frame", "#row-panel", "#profile-panel",
            "#cell-panel", "#text-panel"].map((name) => {
                const { left, right, top, bottom } = document.querySelector(name).getBoundingClientRect();
                return [name, [left, right, top + scrollY, bottom + scrollY]];
            }))"""
    )
    for name, (left, right, top, bottom) in boxes.items():
        assert left >= 0 and right <= viewport["width"] and bottom > top, name
        for other, (l2, r2, t2, b2) in boxes.items():
            apart = right <= l2 or r2 <= left or bottom <= t2 or b2 <= top
            assert name == other or apart, (name, other)
    if viewport is DESKTOP:
        assert boxes["#frame"][3] <= viewport["height"], "the whole map is on the screen"
    assert page.locator("canvas").count() == 6, "cells are drawn, not built of elements"
    assert page.evaluate("document.querySelectorAll('*').length") < 600 + 4 * count, "cells"


def test_a_window_without_room_does_not_hang(opened):
    page = opened(block_map(), viewport={"width": 30, "height": 30})
    page.evaluate("document.body.style.width = 0, refresh()")
    page.evaluate("select({ row: 3, column: 1 }, 3), state.order = 'order', refresh()")
    page.evaluate("document.body.style.width = ''")
    page.set_viewport_size(DESKTOP)
    until(page, "frameElement.clientWidth > 300")


def test_the_largest_mass_of_a_crowded_picture_is_seen(opened):
    """Where cells are smaller than pixels, one strong cell among 800 x 800 must not fall between them."""
    mass = torch.full((1, 800, 800), 1e-6)
    mass[0, 413, 277] = 1
    page = opened(block_map(count=800, layers=1, mass=mass, metadata={}), viewport=PHONE)
    settled(page)
    brightest = page.evaluate(
        COPIED
        + """(() => {
            const { data } = copied().getImageData(0, 0, cellsCanvas.width, cellsCanvas.height);
            let count = 0;
            for (let i = 0; i < data.length; i += 4) count += data[i] === 253 && data[i + 1] === 231;
            return count;
        })()"""
    )
    assert brightest >= 1


def test_500_blocks_of_32_layers_open_and_answer(opened):
    given = block_map(count=500, layers=32, metadata={})
    page = opened(given, at_mean=True)
    number, _ = hovered(page, 480, 40)
    row, column = page.evaluate("[state.hover.row, state.hover.column]")
    assert same_number(number, given.select(layer="mean").mass[0, row, column].item())
    page.mouse.click(*place_of(page, row, column))
    until(page, "profileFrame.lines.length === 1")
    shown = page.evaluate("profileFrame.lines[0].values")
    assert shown == pytest.approx(given.mass[:, row, column].tolist(), rel=1e-4)
    assert page.locator("#row-list li").count() == 40


def test_an_old_browser_is_told_so(browser, tmp_path):
    context = browser.new_context()
    page = context.new_page()
    page.add_init_script("delete window.DecompressionStream")
    page.goto(write_page({"map": block_map()}, tmp_path / "page.html").as_uri())
    page.locator("#trouble").wait_for(state="visible")
    assert "too old" in page.locator("#trouble").inner_text()
    context.close()


def signed_map(mass):
    """Of probability times gradient."""
    return block_map(count=mass.shape[-1], layers=len(mass), mass=mass, metadata={"weighting": "gradient"})


# A row that sums to 0, one that is negative, and a cell of 0.
SIGNED = torch.tensor([[[0.2, -0.2, 0.0], [-0.5, 0.125, 0.0], [0.25, 0.125, -0.125]]])


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_numbers_with_signs_are_divided_by_absolute_sums(opened, kind):
    given = signed_map(SIGNED)
    page = opened(given)
    page.select_option("#normalization", kind)
    settled(page)
    seen = page.evaluate("current.mass.length && [...valuesOf(current, state.normalization)]")
    sizes = given.key_sizes.clamp(min=1)
    divisor = {
        "none": 1,
        "density": sizes,
        "row": SIGNED.abs().sum(-1, keepdim=True),
        "column": SIGNED.abs().sum(-2),
    }
    expected = (SIGNED / divisor[kind]).flatten().tolist()
    assert seen == pytest.approx(expected, rel=1e-4)
    text = page.locator("#meaning").inner_text()
    assert text.startswith("probability \u00d7 gradient") and "mass" not in text
    assert ("absolute" in text) == (kind in ("row", "column"))


@pytest.mark.parametrize("scale", ["sqrt", "linear", "log"])
@pytest.mark.parametrize("sign", [1, -1])
def test_colours_of_numbers_with_signs_go_both_ways(opened, scale, sign):
    page = opened(signed_map(sign * SIGNED[:, :2, :2]))
    page.select_option("#scale", scale)
    settled(page)
    seen = page.evaluate(
        COPIED
        + """[[1, 0], [0, 0], [0, 1]].map(([row, column]) => {
            const at = frameElement.dataset;
            const pixel = (place, start, size) => Math.round(Number(start) + (place + 0.1) * size);
            const where = [pixel(column, at.left, at.cellWidth), pixel(row, at.top, at.cellHeight)];
            return [...copied().getImageData(...where, 1, 1).data].slice(0, 3);
        })"""
    )
    purple, orange = [0x2D, 0, 0x4B], [0x7F, 0x3B, 0x08]
    assert seen[0] == (purple if sign > 0 else orange)  # -0.5 times the sign, the largest
    for (red, _, blue), is_above in zip(seen[1:], (sign > 0, sign < 0), strict=True):
        assert (red > blue) == is_above
    ticks = page.locator("#ticks span").all_inner_texts()
    assert (ticks[0], ticks[2], ticks[4]) == ("-0.5", "0", "+0.5")
    assert ticks[1] == "-" + ticks[3][1:] and ticks[3][0] == "+"


def test_a_row_of_numbers_with_signs(opened):
    page = opened(signed_map(SIGNED))
    page.evaluate("select({ row: 1, column: 0 }, 1)")
    settled(page)
    bars = page.locator("#row-list .number").all_inner_texts()
    assert bars == ["-0.500", "0.125"]  # largest in size first
    assert page.locator("#row-list .fill.down").count() == page.locator("#row-list .fill.up").count() == 1
    assert page.locator("#row-note").inner_text() == ""  # nothing about what a row sums to
    page.select_option("#order", "order")
    settled(page)
    # Down from the line of 0.
    places = page.evaluate(
        "[rowFrame.y(0), rowFrame.y(-0.5), rowFrame.box.bottom, rowFrame.y(0.125), rowFrame.box.top]"
    )
    assert places[4] <= places[3] < places[0] < places[1] <= places[2]
    page.evaluate("select(null, null)")
    settled(page)
    assert "mass" not in page.locator("#profile-title").inner_text()
    profile = page.evaluate("theSequence().profile[0][0].largest")
    assert profile == pytest.approx([(0.2 - 0.5 + 0.25) / 3], rel=1e-3)
