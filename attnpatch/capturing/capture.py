"""``capture``: puts a recorder into a model, and tells it how to read the host's calls."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from attnpatch.blocks.heads import Heads
from attnpatch.blocks.spec import Blocks
from attnpatch.capturing.capture_patch import innermost, owners, patch_for, recording, warn_of
from attnpatch.capturing.maps import Maps
from attnpatch.errors import CaptureError, PatchError
from attnpatch.hosts.diffusers.components import is_denoiser
from attnpatch.hosts.transformers import caches, image_tokens
from attnpatch.hosts.transformers import calls as host
from attnpatch.patching.model_patches import parts_in
from attnpatch.patching.patch import Patch
from attnpatch.recording.call_facts import AttentionCallInfo
from attnpatch.recording.options import CaptureOptions, Steps
from attnpatch.recording.text.recorder import HostReading, Recorder


@contextlib.contextmanager
def capture(
    model: Any,
    blocks: Blocks | tuple[Blocks, Blocks] | None = None,
    *,
    heads: Heads = "mean",
    layers: str | Sequence[int] | None = None,
    sites: str | None = None,
    steps: Steps = "mean",
    measures: Sequence[str] = (),
    sample_rows: int | None = None,
    seed: int = 0,
    weighting: str = "probability",
) -> Iterator[Any]:
    """Reduce the attention of a model to block maps while it runs inside the ``with`` block.

    No N x N matrix is held. Hand-written attention runs by rows, and its probabilities are summed on the way. For a
    fused kernel they are computed again, a few rows at a time.

    In a diffusers pipeline the denoiser is captured (``unet`` or ``transformer``). Every call of the pipeline is one
    image, or one batch of images, with the steps of its sampler. Batch rows with another text (guidance) are kept
    apart. A denoiser without a pipeline is captured in the same way; all its calls inside the block are steps of one
    image.

    Args:
        model: A model or a pipeline, patched or not. Afterwards it is as it was before, once the activation checkpoints
            of calls inside the block are gone (a backward pass recomputes such calls).
        blocks: What a block is; a pair for queries and keys if they differ (cross-attention). For an image
            ``Blocks.tiles(height, width, tile)``, in any unit: tiles attending to tiles, or in a pair with words.
            ``None`` for an image: at most 32 x 32 tiles as queries, 16 x 16 as keys, and the words of the prompt.
        heads: ``"mean"`` over heads, ``"all"`` of them, or a list of head numbers.
        layers: The model's own layer numbers, as in the map's ``layers``. Negative numbers count layers with attention
            from the last one, and ``"last"`` is that one. ``None`` or ``"all"``: all. Not for images: use ``sites``.
        sites: Pattern of module paths to capture, such as ``"decoder.*"``; ``None``: all. In a pipeline paths begin
            with the component's name, as in ``report``.
        steps: For a sampler: ``"mean"`` over steps, ``"all"`` to keep them apart, or a list of step numbers. For text
            each call that continues a cache is a step: ``"all"`` gives a map for every generated token.
        measures: Further statistics: ``"received"``, ``"entropy"``, ``"sink"`` (see ``maps.measured()``). Not for
            images.
        sample_rows: Number of query rows per block to sample, each exactly over all keys. The map is then an unbiased
            estimate, and ``block_map.error`` its standard error. ``None``: all rows. Not for images.
        seed: Seed of that sample.
        weighting: ``"gradient"``: each probability times its gradient (Barkan et al. 2021, Chefer et al. 2021), a
            signed value. Call the model once and then ``backward()``, both inside the ``with`` block. Only for
            attention through ``F.scaled_dot_product_attention``. The gradient is computed a few rows at a time.

    Yields:
        ``Maps``: read ``maps.block_map`` after the model ran. A call that continues a cache adds to the map of its
        sequence; every other call begins a new sequence. For images ``ImageMaps``: ``maps.heat_map("cat")``,
        ``maps["cross"]``. Attention for which a needed fact is not known is in ``maps.left_out`` with the reason, and
        one ``AttnpatchWarning`` says so at the end of the block. Calls of the running thread (or task) are captured, and
        those of threads, and of work for pools, that it starts between its own calls.

    Raises:
        CaptureError: An option does not fit the model. If something does not fit a sequence (blocks, heads), it is in
            ``maps.left_out``, and reading the missing map raises an error; the model's call never raises one.
        PatchError: As ``apply``.
    """
    parts = parts_in(model)
    options = CaptureOptions(blocks, heads, layers, sites, steps, measures, sample_rows, seed, weighting)
    images = {name: part for name, part in parts.items() if is_denoiser(part)}
    if images and ("" not in parts or _of_image(blocks)):
        from attnpatch.capturing.capture_image import capture_image

        with capture_image(model, images, options.for_image()) as maps:
            yield maps
        return
    if len(parts) > 1:
        raise PatchError(
            f"no component of this {type(model).__name__} is known as a denoiser (a forward with sample, hidden_states or x, "
            "and an argument named timestep, timesteps or timestep_ratio); capture one of them: "
            f"{', '.join(parts)}"
        )
    (part,) = parts.values()
    with text_recorder(part, options) as recorder:
        maps = Maps(recorder, options.chosen_steps)
        try:
            yield maps
        finally:
            recorder.finish()
            maps.end()
    warn_of(recorder.left_out)


@contextlib.contextmanager
def text_recorder(part: nn.Module, options: CaptureOptions) -> Iterator[Recorder]:
    """Record one model's attention to sequences of tokens; call the recorder's ``finish`` at the end.

    Raises:
        CaptureError, PatchError: As ``capture``.
    """
    with contextlib.ExitStack() as undo:
        patch = patch_for(part, undo)
        recorder = recorder_of(patch, type(part), options)
        _leave_out_towers(recorder, part)
        _check_tokens(recorder, part)
        with recording(patch, recorder):
            yield recorder


# One block for the whole sequence, for what measures rows and makes no map: only the check that rows sum to 1 needs it.
WHOLE = Blocks.fixed(1 << 40)


def only_model(model: Any, asked: str) -> nn.Module:
    """The model that ``asked``, the name of a function, is given.

    Raises:
        PatchError: It is a pipeline.
    """
    parts = parts_in(model)
    if set(parts) != {""}:
        raise PatchError(f"{asked} takes one model; give a component of it: {', '.join(parts)}")
    return parts[""]


def _leave_out_towers(recorder: Recorder, part: nn.Module) -> None:
    """With ``Blocks.images`` only the language model is captured: the tokens of a vision tower are no prompt.

    Raises:
        CaptureError: None of the language model's sites was asked for.
    """
    if "images" not in (recorder.query_blocks.kind, recorder.key_blocks.kind):
        return
    inside = image_tokens.language_model_in(part)
    if inside:
        recorder.wanted = {name for name in recorder.wanted if name.startswith(f"{inside}.")}
        recorder.owners = {name for name in recorder.owners if name.startswith(f"{inside}.")}
    if not recorder.wanted:
        raise CaptureError(
            f"Blocks.images is for the attention of the language model ({inside!r}), and no such site was asked for"
        )


def _check_tokens(recorder: Recorder, part: nn.Module) -> None:
    """Check in every call that its tokens fit the blocks: no virtual tokens of an adapter, and pictures where the tiles
    are.
    """
    read_call, site_call = recorder.read_call, recorder.site_call
    asked = [side.image for side in (recorder.query_blocks, recorder.key_blocks) if side.image is not None]
    # Shapes from the vision tower's latest calls: one for images, one for videos.
    shapes: deque[Any] = deque(maxlen=2)

    def checked(args: Any, kwargs: Any, kind: type | None) -> Any:
        call = read_call(args, kwargs, kind)
        call.problem = call.problem or host.why_other_tokens(part)
        if asked and call.problem is None:
            given = {**dict(zip(host.parameter_names(kind or type(part)), args, strict=False)), **kwargs}
            if kind is not None and given.get("grid_thw") is not None:
                shapes.append(given["grid_thw"])
            reasons = (image_tokens.why_no_picture(part, given, tiles, tuple(shapes)) for tiles in asked)
            call.problem = next(filter(None, reasons), None)
        return call

    towers = image_tokens.towers_in(part) if asked else {}

    def checked_site(call: Any, name: str, args: Any, kwargs: Any) -> AttentionCallInfo:
        facts = site_call(call, name, args, kwargs)
        inside = (why for tower, why in towers.items() if not tower or name.startswith(tower + "."))
        facts.problem = next(inside, None)
        return facts

    if asked or hasattr(part, "get_base_model"):
        recorder.read_call = checked
    if towers:
        recorder.site_call = checked_site


def _of_image(blocks: Any) -> bool:
    """True if blocks ask for an image of a denoiser: ``None``, or tiles without a start token."""
    sides = blocks if isinstance(blocks, tuple) else (blocks,)
    images = [side.image for side in sides if isinstance(side, Blocks) and side.image is not None]
    return blocks is None or (bool(images) and not any(image[3] for image in images))


def recorder_of(patch: Patch, kind: type[nn.Module], options: CaptureOptions) -> Recorder:
    """A recorder that captures the innermost attention sites of a patch, once it is added to the patch's ``recorders``.

    Args:
        patch: The patch of a model.
        kind: The model's class.
        options: The options of the capture.

    Raises:
        CaptureError: An option does not fit the model.
    """

    def read_call(args: Any, kwargs: Any, part: type | None) -> host.ModelCall:
        return host.read_call(part or kind, args, kwargs)

    def site_call(call: Any, name: str, args: Any, kwargs: Any) -> AttentionCallInfo:
        cross = host.is_cross(kwargs)
        handed = caches.among((), args, kwargs)
        return AttentionCallInfo(
            *host.masks_of(call, name, cross),
            past=call.past_of(handed),
            has_cache=bool(handed),
            cache=handed[0] if handed else None,
            batches=call.batches,
            lengths=call.lengths,
            windows=frozenset().union(*map(caches.windows_of, handed)),
            is_part=host.is_part(args, kwargs),
        )

    reading = HostReading(
        read_call,
        site_call,
        patch.model_kind,
        marks=caches.marks_of,
        version_of=caches.version_of,
        tokens_in=caches.tokens_in,
        rows_have_moved=caches.rows_have_moved,
    )
    return Recorder(options, innermost(patch), owners(patch), reading)
