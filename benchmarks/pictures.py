"""The pictures of the README that come from no other command: ``python -m benchmarks pictures``.

The page, opened on the demo's conversation with a cell chosen, and heat maps of a small trained model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import attnpatch
from attnpatch.viewing.files import load_maps
from attnpatch.viewing.page import write_page
from benchmarks.page import a_browser, wait
from benchmarks.runner import ROOT

DOCS = ROOT / "docs"
# The cell that is chosen, as shares of the map's width and height: a late message that looks at an early one.
CELL = (0.357, 0.982)
CAPTION, WORDS = "blue square right, black circle left", ["circle", "blue", "square"]


def page(target: Path) -> None:
    """The page of the demo's conversation, in the system's Chromium."""
    from playwright.sync_api import sync_playwright

    browser = a_browser()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        command = [sys.executable, "-m", "attnpatch", "analyze", "--mode", "demo", "--out", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        file = write_page(load_maps(out)[0], out / "page.html")
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=browser)
            opened = chromium.new_page(viewport={"width": 1280, "height": 780}, device_scale_factor=1.25)
            opened.goto(file.as_uri())
            wait(opened, "document.documentElement.dataset.shown")
            left, top = opened.evaluate(
                "(({x, y}) => [x + place.left, y + place.top])(frameElement.getBoundingClientRect())"
            )
            width, height = opened.evaluate("[place.width, place.height]")
            at = (left + CELL[0] * width, top + CELL[1] * height)
            opened.mouse.click(*at)
            opened.mouse.move(*at)
            wait(opened, "profileFrame.lines.length === 1")
            opened.screenshot(path=target)
            chromium.close()


def block_map(target: Path) -> None:
    """What the demo's model attends to while it answers a question of the demo's conversation."""
    folder = Path(attnpatch.__file__).parent / "demo"
    messages = json.loads((folder / "conversation.json").read_text(encoding="utf-8"))["messages"]
    result = attnpatch.BlockAttentionAnalyzer(str(folder / "model")).analyze(
        messages, "generation", max_new_tokens=12
    )
    result.block_map.plot(target, layer=3)


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
    page(DOCS / "page.png")
    block_map(DOCS / "map.png")
    heat_map(DOCS / "heat_map.png")
    print(f"written: page.png, map.png and heat_map.png in {DOCS.relative_to(ROOT)}")
