"""Whether block maps are right: of every model class of diffusers, each map beside the model's own softmax results.

``python -m tests.compat.maps_diffusers [name ...]``. A denoiser is captured twice: in blocks of tokens, and as an image
with tiles and words. Other classes (autoencoders, ControlNets) have the first only. Results are kept in a folder for
temporary files, as those of ``maps_transformers`` are; a whole run writes its part of docs/coverage_diffusers.md.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile
import traceback
from collections.abc import Iterator
from typing import Any

import torch

import attnpatch
from attnpatch.hosts.diffusers.components import is_denoiser
from attnpatch.patching.registry import is_attention

from . import maps_page, models_diffusers, softmax_oracle, sweep
from .maps import TOLERANCE, Native, Outcome, Run, Site, captured, put, run_all, status_of
from .recipes_diffusers import recipe_of

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "coverage_diffusers.md"
RESULTS = pathlib.Path(tempfile.gettempdir()) / "attnpatch-captured-diffusers"
WORDS = maps_page.Words("class", "classes", "captured", "in blocks of tokens and as images")
ABOUT = (
    "`make coverage-maps` runs the same small models with masks that close nothing, once under `capture(model,",
    "Blocks.fixed(8))` (`tokens`) and, if it is a denoiser, once under `capture(model)` (`image`: its own tokens, those of",
    "the text before those of the image). Every map is compared with what a loop makes of the softmax results that the",
    "model, without attnpatch and with SDPA's dense math, computes inside the same module. Equal is a difference of at most",
    "1e-5 to one of them. `sites` are those of more than one query row. Of",
)


def unpadded(name: str, model: Any) -> Iterator[dict[str, Any]]:
    """Inputs to try, in which every token is real."""
    for inputs in models_diffusers.inputs_of(model, recipe_of(name)):
        masks = [k for k, v in inputs.items() if "mask" in k and isinstance(v, torch.Tensor) and v.dim() == 2]
        yield {**inputs, **{k: torch.ones_like(inputs[k]) for k in masks}}


def examine(name: str) -> Outcome:
    """One class, in this process."""
    outcome = Outcome(name)
    try:
        model = models_diffusers.build(name)
        native = Native(model, unpadded(name, model))
    except Exception as error:
        outcome.problem = sweep.reason(error)
        return outcome
    outcome.runs["tokens"] = captured(model, native, TOLERANCE["sdpa"])
    if is_denoiser(model):
        outcome.runs["image"] = captured_image(model, native)
    return outcome


def captured_image(model: Any, native: Native) -> Run:
    """A denoiser's maps of tiles and words, on the grid of each site, beside what it computed natively."""
    result = Run()
    try:
        with attnpatch.capture(model) as maps:
            sweep.run(model, native.inputs)
        mapped = list(maps.sites) if maps.num_runs else []
        for name in mapped:
            one = maps.map(name, own_grid=True)
            verdict = softmax_oracle.judged_image(one, native.found[name], TOLERANCE["sdpa"])
            site = Site(verdict.status, verdict.says, maps=1, difference=verdict.difference)
            put(result.sites, name, site)
    except Exception as error:
        if "-v" in sys.argv:
            traceback.print_exc()
        result.raised = sweep.reason(error)
        return result
    names = {name for name, module in model.named_modules() if is_attention(module)}
    for name, reason in maps.left_out.items():
        # What is said of a part of a site (a second attention inside it, tokens in no block) leaves its map as it is.
        if name.partition(" (")[0] not in mapped:
            for own in [name] if name in names else names if name.startswith("step ") else ():
                put(result.sites, own, Site("left out", reason))
    for name, (kind, rows) in native.attending(names).items():
        site = result.sites.setdefault(name, Site("silent", "" if name in names else "no site"))
        site.kind, site.rows = kind, rows
    return result


def main() -> int:
    import diffusers

    known = list(models_diffusers.classes())
    outcomes = run_all("python -m tests.compat.maps_diffusers", __doc__, known, examine, RESULTS)
    if outcomes is None:
        return 0
    host = f"diffusers {diffusers.__version__}, in {{state}} of this package:"
    maps_page.write(DOCUMENT, outcomes, WORDS, [*ABOUT, host])
    return status_of(outcomes)


if __name__ == "__main__":
    raise SystemExit(main())
