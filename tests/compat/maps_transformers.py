"""Whether block maps are right: of every architecture of transformers, each map beside the model's own softmax results.

``python -m tests.compat.maps_transformers [name ...]``. Results are kept in a folder for temporary files, one file for
each architecture, so that a run of all of them goes on where it stopped, and then writes its part of docs/coverage.md.
A second process may do the rest from the other end (``--backwards``). ``--again`` begins anew.
"""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from . import inputs_transformers, maps_page, models_transformers, sweep
from .maps import TOLERANCE, Native, Outcome, Run, captured, run_all, status_of
from .recipe import Recipe
from .recipes_transformers import recipe_of

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "coverage.md"
RESULTS = pathlib.Path(tempfile.gettempdir()) / "attnpatch-captured-transformers"
WORDS = maps_page.Words("architecture", "architectures", "attention", "with both implementations", " (eager)")
ABOUT = (
    "`make coverage-maps` runs the same small models, without padding, under `capture(model, Blocks.fixed(8))`, eager and",
    "SDPA, and compares every map with what a loop makes of the softmax results that the model, without attnpatch, computes",
    "inside the same module. Equal is a difference of at most 1e-6 (SDPA: 1e-5) to one of them. Eager is the oracle of both;",
    "where a model gives SDPA another mask, SDPA's own dense math is. `sites` are those of more than one query row. Of",
)
_MASKS = """attention_mask decoder_attention_mask padding_mask feature_attention_mask input_features_mask pixel_mask
encoder_attention_mask""".split()


def _all_real(length: int, side: str, padding: int = 0) -> torch.Tensor:
    return torch.ones(inputs_transformers.BATCH, length, dtype=torch.long)


def unpadded(model: Any, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Inputs to try, in which every token is real."""
    with mock.patch.object(inputs_transformers, "mask", _all_real):
        for inputs in inputs_transformers.inputs_of(model, recipe):
            full = {k: torch.ones_like(v) for k, v in inputs.items() if k in _MASKS and v.dim() in (2, 3)}
            yield {**inputs, **full}


def examine(model_type: str) -> Outcome:
    """One architecture, in this process."""
    outcome = Outcome(model_type)
    recipe = recipe_of(model_type)

    def attempt(level: int) -> dict[str, Run]:
        native, runs = None, {}
        for implementation, model in models_transformers.built_with(model_type, level, TOLERANCE):
            native = native or Native(model, unpadded(model, recipe))
            found = captured(model, native, TOLERANCE[implementation])
            if implementation == "sdpa" and found.has_wrong():
                # Some models are handed other masks by it: then the oracle is its own dense math.
                math = models_transformers.build(model_type, level, implementation)
                native = Native(math, unpadded(math, recipe))
                found = captured(model, native, TOLERANCE[implementation])
            runs[implementation] = found
        return runs

    runs, outcome.problem = sweep.at_first_level((0, 1), attempt)
    outcome.runs.update(runs or {})
    return outcome


def main() -> int:
    import transformers.modeling_utils  # before processes are forked

    transformers.logging.set_verbosity_error()
    known = list(models_transformers.model_classes())
    outcomes = run_all("python -m tests.compat.maps_transformers", __doc__, known, examine, RESULTS)
    if outcomes is None:
        return 0
    host = f"transformers {transformers.__version__}, in {{state}} of this package:"
    maps_page.write(DOCUMENT, outcomes, WORDS, [*ABOUT, host])
    return status_of(outcomes)


if __name__ == "__main__":
    raise SystemExit(main())
