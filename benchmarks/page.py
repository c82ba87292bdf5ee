"""How fast the page of block maps opens in a browser: ``python -m benchmarks page``.

500 blocks x 32 layers, causal, with a text per message. Each opening is a fresh headless browser; the time goes from the
order to open the file until the frame with the map.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from attnpatch.maps.block_map import BlockMap
from attnpatch.viewing.page import write_page

BLOCKS, LAYERS, ROUNDS = 500, 32, 5
LIMIT = 2.0  # seconds
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 60  # seconds


def conversation() -> BlockMap:
    """Random attention, as precise as a real one: nothing in it is easy to compress but the zeros."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(LAYERS, BLOCKS, BLOCKS, generator=generator).mul(2)
    scores.masked_fill_(torch.ones(BLOCKS, BLOCKS, dtype=torch.bool).triu(1), -torch.inf)
    labels = [f"{i} {('user', 'assistant')[i % 2]}" for i in range(BLOCKS)]
    sizes = torch.full((BLOCKS,), 128)
    texts = [f"message {i}: " + "a few words, " * 40 for i in range(BLOCKS)]
    return BlockMap(
        scores.softmax(-1), range(LAYERS), labels, labels, sizes, sizes, metadata={"texts": texts}
    )


def opened(browser: str, page_file: Path) -> tuple[float, float]:
    """Seconds until the map is on the screen, and until the profile over all layers of the cell that it opens on is."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser)
        page = chromium.new_page(viewport={"width": 1280, "height": 800})
        start = time.perf_counter()
        page.goto(page_file.as_uri())
        wait(page, "document.documentElement.dataset.shown")
        page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
        drawn = time.perf_counter() - start
        wait(page, "profileFrame?.lines.length === 1")
        profile = time.perf_counter() - start
        chromium.close()
    return drawn, profile


def a_browser() -> str:
    """The system's Chromium."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"no browser here (looked for {', '.join(BROWSERS)})")
    return browser


def wait(page: Any, expression: str) -> None:
    """Until it is true in the page."""
    end = time.perf_counter() + PATIENCE
    while not page.evaluate(expression):
        if time.perf_counter() > end:
            raise SystemExit(f"the page does not get there in {PATIENCE} s: {expression}")
        time.sleep(0.005)


def page(arguments: list[str]) -> int:
    """Print the figures; 1 when the page opened too slowly."""
    browser = a_browser()
    block_map = conversation()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        page_file = write_page({"conversation": block_map}, Path(folder) / "page.html")
        written = time.perf_counter() - start
        size = page_file.stat().st_size / 1e6
        runs = [opened(browser, page_file) for _ in range(ROUNDS)]
    drawn, profile = (statistics.median(values) for values in zip(*runs, strict=True))
    worst = max(first for first, _ in runs)
    print(
        f"page: {BLOCKS} blocks x {LAYERS} layers, {size:.1f} MB, written in {written:.1f} s; opens in {drawn:.2f} s "
        f"(median of {ROUNDS}, slowest {worst:.2f}, the limit is {LIMIT:g}); profile over the layers after {profile:.2f} s"
    )
    return int(drawn > LIMIT)
