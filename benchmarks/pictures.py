"""The pictures of the README that come from no other command: ``python -m benchmarks pictures``.

The page and the map of the demo's conversation, and heat maps of a small trained model.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

import attnpatch
from attnpatch.maps.block_map import BlockMap
from attnpatch.viewing.page import write_page
from benchmarks.page import a_browser, wait
from benchmarks.runner import ROOT

DOCS = ROOT / "docs"
CAPTION, WORDS = "blue square right, black circle left", ["circle", "blue", "square"]


def answered() -> BlockMap:
    """What the demo's model attends to while it answers a question of the demo's conversation."""
    folder = Path(attnpatch.__file__).parent / "demo"
    messages = json.loads((folder / "conversation.json").read_text(encoding="utf-8"))["messages"]
    analyzer = attnpatch.BlockAttentionAnalyzer(str(folder / "model"))
    return analyzer.analyze(messages, "generation", max_new_tokens=12).block_map


def page(block_map: BlockMap, target: Path) -> None:
    """The page in the system's Chromium, after a click on the second block that the finding names."""
    from playwright.sync_api import sync_playwright

    browser = a_browser()
    with tempfile.TemporaryDirectory() as temporary:
        file = write_page({"demo": block_map}, Path(temporary) / "page.html")
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=browser)
            opened = chromium.new_page(viewport={"width": 1280, "height": 780}, device_scale_factor=1.25)
            opened.goto(file.as_uri())
            wait(opened, "document.documentElement.dataset.shown")
            opened.locator("#finding button").nth(1).click()
            wait(
                opened,
                "document.documentElement.dataset.shown === shownNow() && document.querySelector('.block')",
            )
            opened.wait_for_timeout(300)
            opened.screenshot(path=target, full_page=True)
            chromium.close()


def heat_map(target: Path) -> None:
    """Where the UNet that draws coloured shapes attends to three words of a held-out caption."""
    sys.path.insert(0, str(ROOT / "examples"))
    import shapes

    pipe = shapes.load("unet")
    texts = [shapes.text(caption) for caption in shapes.captions()[1]]
    seed = texts.index(CAPTION)
    with attnpatch.capture(pipe, sites="*.attn2") as maps:
        generator = torch.Generator().manual_seed(seed)
        picture = pipe(
            CAPTION, generator=generator, output_type="pt", num_inference_steps=20, guidance_scale=3.0
        )
    maps.plot_overlay(picture.images[0], WORDS, target)


def pictures(arguments: list[str]) -> None:
    """Make the pictures."""
    block_map = answered()
    page(block_map, DOCS / "page.png")
    block_map.plot(DOCS / "map.png", layer=3)
    heat_map(DOCS / "heat_map.png")
    print(f"written: page.png, map.png and heat_map.png in {DOCS.relative_to(ROOT)}")
