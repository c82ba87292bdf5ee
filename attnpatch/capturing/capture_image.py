"""``capture`` for a diffusers pipeline or a denoiser: images, with the steps of their sampler.

Imported at the first such capture.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import nn

from attnpatch.capturing.capture_patch import innermost, patch_for, recording, warn_of
from attnpatch.capturing.image_maps import ImageMaps
from attnpatch.errors import CaptureError
from attnpatch.hosts.diffusers import denoiser
from attnpatch.hosts.diffusers.components import tokenizers_of
from attnpatch.hosts.diffusers.prompts import Prompts
from attnpatch.patching.model_patches import parts_in
from attnpatch.patching.patch import Patch
from attnpatch.recording.diffusion.denoiser_call import DenoiserCall
from attnpatch.recording.diffusion.denoising import Plan, Sampling
from attnpatch.recording.diffusion.recorder import DenoiserReading, ImageRecorder
from attnpatch.recording.options import CaptureOptions
from attnpatch.recording.threads import ELSEWHERE
from attnpatch.rows.provenance.reordered import mode as reordered
from attnpatch.rows.provenance.tensors import inputs_among


@contextlib.contextmanager
def capture_image(model: Any, parts: dict[str, nn.Module], options: CaptureOptions) -> Iterator[ImageMaps]:
    whole = parts_in(model)
    prompts = Prompts(whole, tokenizers_of(model))
    plan = Plan.of(options.blocks)
    with contextlib.ExitStack() as undo:
        is_pipeline = "" not in whole
        evaluations = functools.partial(denoiser.evaluations_in, model)
        known = {"find_texts": prompts.find, "evaluations": evaluations} if is_pipeline else {}
        sampling = Sampling(plan, options.is_per_step, **known)
        if is_pipeline:
            undo.enter_context(prompts.watching())
            undo.enter_context(_runs(model, sampling, prompts))
        recorders = []
        for name, part in parts.items():
            patch = patch_for(part, undo)
            prefix = f"{name}." if name else ""
            recorder = image_recorder_of(patch, part, sampling, options, prefix)
            undo.enter_context(recording(patch, recorder))
            recorders.append(recorder)
        if not any(recorder.wanted for recorder in recorders):
            raise CaptureError(
                f"no attention site matches {options.sites!r}; see attnpatch.report() for their names"
            )
        yield ImageMaps(sampling, options, type(model).__name__)
        is_missed = any(recorder.owner is not None and recorder.owner.missed for recorder in recorders)
        if is_missed and not any(any(run.records.values()) for run in sampling.runs):
            sampling.left_out.setdefault("", ELSEWHERE)
    warn_of(sampling.left_out, deep=2)  # inside a context of its own


def _runs(pipeline: Any, sampling: Sampling, prompts: Prompts) -> contextlib.AbstractContextManager[None]:
    """A context in which every call of the pipeline is a run of the sampler."""

    def begin(given: dict[str, Any]) -> None:
        prompts.begin(denoiser.texts_given(given))
        sampling.begin_run()

    def end(result: Any) -> None:
        sampling.end_run(denoiser.images_in(result))
        prompts.end()

    return denoiser.watching(pipeline, begin, end)


def image_recorder_of(
    patch: Patch, part: nn.Module, sampling: Sampling, options: CaptureOptions, prefix: str
) -> ImageRecorder:
    """A recorder for the innermost attention sites of a denoiser; it works once it is in the patch's ``recorders``."""

    def read_call(args: Any, kwargs: Any) -> DenoiserCall:
        return denoiser.read_denoiser_call(part, args, kwargs)

    reading = DenoiserReading(read_call, denoiser.num_heads_of(part), inputs_among, reordered.sides)
    return ImageRecorder(sampling, options, innermost(patch), prefix, reading)
