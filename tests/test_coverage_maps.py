"""A part of the sweep over the maps of diffusers' model classes, and that its oracle notices a wrong map.

All of them: ``make coverage-maps``, which writes its part of docs/coverage_diffusers.md.
"""

import pathlib
import re

import pytest
from compat import maps_diffusers, softmax_oracle, sweep

import attnpatch

pytest.importorskip("diffusers")

PAGES = pathlib.Path(__file__).parents[1] / "docs"
# Joint, cross, written into a tensor of their own, repeated key heads; no denoiser.
NAMES = """FluxTransformer2DModel SD3Transformer2DModel PixArtTransformer2DModel WanTransformer3DModel LuminaNextDiT2DModel
AutoencoderKL""".split()


@pytest.mark.parametrize("name", NAMES)
def test_maps_of_diffusers(name):
    outcome = maps_diffusers.examine(name)
    assert not outcome.problem
    assert list(outcome.runs) == (["tokens"] if name.startswith("Auto") else ["tokens", "image"])
    for run in outcome.runs.values():
        assert not run.raised and not run.is_changed
        assert {site.status for site in run.sites.values() if site.rows > 1} == {"equal"}, run


def test_a_wrong_map_is_noticed():
    name = "FluxTransformer2DModel"
    model = maps_diffusers.models_diffusers.build(name)
    native = maps_diffusers.Native(model, maps_diffusers.unpadded(name, model))
    with attnpatch.capture(model) as maps:
        sweep.run(model, native.inputs)
    site = next(iter(maps.sites))
    one = maps.map(site, own_grid=True)
    assert softmax_oracle.judged_image(one, native.found[site], 1e-5).status == "equal"
    one.mass[0, [20, 21]] = one.mass[0, [21, 20]].clone()
    verdict = softmax_oracle.judged_image(one, native.found[site], 1e-5)
    assert verdict.status == "WRONG" and "19 and 19 of text" in verdict.says


@pytest.mark.parametrize("page", ["coverage.md", "coverage_diffusers.md"])
def test_pages_say_that_none_is_wrong(page):
    text = (PAGES / page).read_text()
    assert "wrong: 0;" in text
    share = re.search(r"of which some attention is mapped: \d+ of \d+ \((.*?)%\)", text)
    assert float(share.group(1)) >= 90
