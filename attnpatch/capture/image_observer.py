"""Watches the calls of a denoiser: where each tile of its attention belongs, and what is in no map and why."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attnpatch.capture import fused_mass
from attnpatch.capture.grid import Grid
from attnpatch.capture.heads import Heads, checked_heads, chosen_heads
from attnpatch.capture.observer import Passing, SiteObserver
from attnpatch.capture.origins import IMAGE, OTHER, TEXT, Origin, Origins
from attnpatch.capture.partition import Partition
from attnpatch.capture.sampling import (
    KEY_TILES,
    QUERY_TILES,
    DenoiserCall,
    ImageRecord,
    Sampling,
    Side,
    TextRow,
    tiles_of,
)
from attnpatch.errors import AttnpatchError, CaptureError

UNSAID = (
    "in which rows and columns they lie is not said by the call (no img_ids, img_shapes, or height and width); give "
    "blocks=Blocks.tiles(height, width, tile) with the rows and columns of its tokens"
)


class ImageRecorder:
    """Collects for one denoiser.

    Args:
        sampling: Where to.
        names: Its attention sites.
        prefix: Before their names: the component's.
        heads: As ``capture`` takes them.
        sites: Pattern of site names, ``None``: all.
        read_call: Makes a ``DenoiserCall`` of arguments.
        num_heads: Of sites, where it is known.

    Raises:
        CaptureError: There is no such site, or these are no heads.
    """

    # Whether a capture that somebody asks for takes its place.
    gives_way = False
    # Every row is looked at, and nothing else is measured.
    sample_rows, seed, measures, is_of_gradient = None, 0, (), False

    def __init__(
        self,
        sampling: Sampling,
        names: Sequence[str],
        prefix: str,
        heads: Heads,
        sites: str | None,
        read_call: Callable[[Any, Any], DenoiserCall],
        num_heads: dict[str, int],
    ) -> None:
        self.sampling, self.prefix, self.heads = sampling, prefix, checked_heads(heads)
        self.num_heads = {prefix + name: count for name, count in num_heads.items()}
        self.read_call = read_call
        self.wanted = {name for name in names if sites is None or fnmatch.fnmatchcase(prefix + name, sites)}
        self.call: DenoiserCall | None = None
        self.owner: Any = None
        self._stack = contextlib.ExitStack()

    def is_mine(self) -> bool:
        """Whether the running thread's calls are seen."""
        return self.owner is None or bool(self.owner.is_mine())

    def begin_call(self, args: Any, kwargs: Any) -> None:
        """The denoiser is about to run."""
        sampling, self.call = self.sampling, None
        call = self.read_call(args, kwargs)
        step = sampling.run.step_of(call.timestep)
        try:
            self.rows = sampling.rows_of(call)
        except AttnpatchError as error:
            # Blocks that do not fit the text, say: the images are made all the same.
            sampling.left_out.setdefault(f"step {step}", str(error))
            return
        self.call = call
        key = (step if sampling.is_kept_apart else 0, self.rows)
        self.records = sampling.run.records.setdefault(key, {})
        self.origins = self._stack.enter_context(Origins())
        for kind, tensors in ((IMAGE, call.images), (TEXT, call.texts)):
            for tensor in tensors:
                self.origins.mark(tensor, kind)

    def end_call(self) -> None:
        self._stack.close()
        self.call = None

    def wants(self, name: str) -> bool:
        """Whether a site was asked for; not outside a call of the denoiser."""
        return self.call is not None and name in self.wanted

    def head_numbers(self, num_heads: int) -> list[int]:
        """The heads that are kept apart.

        Raises:
            CaptureError: One was asked for that there is not.
        """
        return chosen_heads(self.heads, num_heads)

    def observer(self, site: Any, args: Any, kwargs: Any) -> SiteObserver:
        """Who looks at the call of a site that is about to be made."""
        # Beside an image prompt the text is the first of a tuple.
        values = [v for v in (*args, *kwargs.values()) for v in (v if isinstance(v, tuple) else (v,))]
        given = [(self.origins.of(t), t) for t in values if isinstance(t, torch.Tensor)]
        inputs = [(origin, _lengths(t)) for origin, t in given if origin is not None]
        return ImageObserver(self, self.prefix + site.name, self.call, self.records, inputs)


def _lengths(tensor: torch.Tensor) -> set[int]:
    """How many tokens a tensor may hold; images may come with channels first or last."""
    if tensor.dim() == 4:
        height, width, *_ = tensor.shape[1:]
        return {height * width, tensor.shape[2] * tensor.shape[3]}
    return {tensor.shape[1]} if tensor.dim() == 3 else set()


class ImageObserver(SiteObserver):
    """Adds the tiles of one call of one site of a denoiser to its record."""

    def __init__(
        self,
        recorder: ImageRecorder,
        name: str,
        call: Any,
        records: dict[str, Any],
        inputs: list[tuple[Origin, set[int]]],
    ) -> None:
        super().__init__(recorder, name)  # type: ignore[arg-type]
        self.recorder: Any = recorder
        self.call, self.records, self.inputs = call, records, inputs
        self.before: Any = None
        self.lengths: tuple[int, int] | None = None
        self.is_out = False
        self.grids: dict[int | None, Grid] = {}

    def begin(self, layout: Any, opened: Any) -> bool:
        """An attention of the site: what its tokens are is found out at its first tile."""
        return True

    def take(self, call: dict[str, Any], lse: torch.Tensor, workspace: int | None = None) -> str | None:
        """Add a whole attention call at once; see ``sums_of``."""
        reason = fused_mass.why_not(call)
        if reason is not None:
            return reason
        (batch, num_heads, q_len, _), kv_len = call["query"].shape, call["key"].shape[-2]
        if batch != self.call.batch:
            return "another layout"
        if not self._is_shown(batch * num_heads, q_len, kv_len):
            return "some rows"
        if self.record is None:
            self._open(q_len, kv_len, num_heads)
        return self.sums_of(call, lse, workspace, num_heads)

    def _observe(self, probabilities: torch.Tensor, passing: Passing) -> None:
        if not self._is_shown(passing.lead_count, passing.q_len, passing.kv_len):
            return
        if passing.lead_count % self.call.batch:
            self._refuse(f"attends in {passing.lead_count} pieces, which is no multiple of its batch")
            return
        num_heads = passing.lead_count // self.call.batch
        if self.record is None:
            self._open(passing.q_len, passing.kv_len, num_heads)
        for b, numbers, tile, weights in self.of_sequences(probabilities, passing, num_heads):
            if 0 in numbers:
                self.count(b, *passing.rows)
            for place, chosen in self.places(numbers, num_heads):
                some = None if weights is None else weights[chosen]
                self.add(b, place, tile[chosen], some, *passing.rows)

    def restart(self) -> None:
        """Forget the tiles of this call."""
        if self.record is None:
            return
        if self.before is None:
            del self.records[self.name]
        else:
            self.records[self.name] = self.before
        self.record = None

    def rows(self, lead_count: int, q_len: int, kv_len: int) -> torch.Tensor | None:
        """All rows, or none of an attention that is in no map."""
        return None if self._is_shown(lead_count, q_len, kv_len) else torch.zeros(0, dtype=torch.int64)

    def _is_shown(self, lead_count: int, q_len: int, kv_len: int) -> bool:
        """Whether this attention of the site goes into a map; which is found out at its first tile."""
        if self.lengths is None:
            self.lengths = (q_len, kv_len)
            whole = self.call.batch * self.recorder.num_heads.get(self.name, 0)
            if self.name in self.recorder.sampling.run.refused:
                self.is_out = True
            elif (whole and lead_count != whole) or lead_count % self.call.batch:
                # Some rows of the batch only (perturbed attention guidance), some heads, or other rows than images.
                heads = f"{whole} of its batch and heads" if whole else f"{self.call.batch} of its batch"
                self._refuse(f"attends in {lead_count} pieces, not in the {heads}")
            else:
                self._place(q_len, kv_len, lead_count // self.call.batch)
        elif self.lengths != (q_len, kv_len):
            # A second attention inside the module, as an image prompt's: shown it would be mixed with the first.
            self._leave_out(f"attends a second time, to {kv_len} keys", f" ({kv_len} keys)")
            return False
        return not self.is_out

    def _refuse(self, reason: str) -> None:
        self._leave_out(reason)
        self.recorder.sampling.run.refused.add(self.name)
        self.is_out = True

    def _leave_out(self, reason: str, part: str = "") -> None:
        self.recorder.sampling.left_out.setdefault(self.name + part, reason)

    def _place(self, q_len: int, kv_len: int, num_heads: int) -> None:
        """Find out whose tokens the queries and the keys are."""
        queries, keys = self._kinds_of(q_len, self.inputs[:1]), None
        if queries is not None:
            inside = any(q_len in lengths for _, lengths in self.inputs[:1])
            others = self.inputs[1:] if inside else []
            keys = self._kinds_of(kv_len, others) or (
                queries if kv_len == q_len else self._kinds_of(kv_len, [])
            )
        if queries is None or keys is None:
            side, count = ("queries", q_len) if queries is None else ("keys", kv_len)
            self._refuse(f"attends with {count} {side} of which it is not known what they are")
            return
        plan = self.recorder.sampling.plan
        if not {kind for kind, _ in queries} & plan.queries or not {kind for kind, _ in keys} & plan.keys:
            self.is_out = True  # not asked for
            return
        try:
            self.segments = self._segments(queries), self._segments(keys)
            if self.recorder.heads != "mean":
                self.recorder.head_numbers(num_heads)
            self._check_before()
        except AttnpatchError as error:
            self._refuse(str(error))

    def _segments(self, side: Origin) -> Origin:
        """Kinds of tokens on one side and how many; of several pictures the image is the first.

        Raises:
            CaptureError: They cannot be shown.
        """
        found: list[tuple[str, int | None]] = []
        for kind, length in side:
            if kind in (each for each, _ in found if each != OTHER):
                raise CaptureError(f"attends with tokens of the {kind} in several places of one sequence")
            rest = 0
            if kind == IMAGE:
                image = self._image(length)
                rest = length - image.tokens
            elif kind == TEXT in self._asked() and any(
                len(text.assignment) != length for text in self._texts()
            ):
                given = self.call.texts[0].shape[:2] if self.call.texts else (0, 0)
                raise CaptureError(
                    f"attends with {length} text tokens of {self.call.batch} images, the denoiser is given {given[1]} of "
                    f"{given[0]}"
                )
            elif kind == OTHER:
                self._leave_out("are neither the image's nor the text's: in no block", f" ({length} tokens)")
            found += [(kind, length - rest), (OTHER, rest)] if rest else [(kind, length)]
        return tuple(found)

    def _image(self, tokens: int) -> Grid:
        """Rows and columns of the image in so many tokens, which may be followed by those of other pictures."""
        sampling, call = self.recorder.sampling, self.call
        tiles = [
            each.image for each in (sampling.plan.query_tiles, sampling.plan.key_tiles) if each is not None
        ]
        if call.pictures:
            grid, *others = call.pictures
            whole = grid.tokens + sum(other.tokens for other in others)
            if tokens != whole:
                raise CaptureError(
                    f"attends with {tokens} image tokens, the pictures it is given have {whole}"
                )
        elif call.latents is not None:
            grid, others = Grid.fitting(tokens, call.latents), []
            if grid is None:
                raise CaptureError(
                    f"attends with {tokens} image tokens, which show no image of the size of this one"
                )
        else:
            grid, others = next((each for each in tiles if each.tokens == tokens), None), []
            if grid is None:
                raise CaptureError(f"attends with {tokens} image tokens: {UNSAID}")
        if any(Grid.fitting(grid.tokens, each) != grid for each in tiles):
            raise CaptureError(
                f"attends with {grid.tokens} image tokens, which show no image of the size of this one"
            )
        run = sampling.run
        self.grids[grid.tokens] = grid
        run.image = run.image or (tiles[0] if tiles else call.latents or grid)
        for number, other in enumerate(others, 2):
            name = f"picture {number} of {len(others) + 1}"
            size = f"{other.height} x {other.width} tokens"
            self.recorder.sampling.left_out.setdefault(
                name, f"its {size} are in no block; maps show the first picture"
            )
        return grid

    def _check_before(self) -> None:
        """Sums that go on are of the same blocks."""
        self.partitions = self._made()
        before = self.records.get(self.name)
        if before is not None and (before.query_side, before.key_side) != (self.query_side, self.key_side):
            del self.records[self.name]
            raise CaptureError(
                "attends to an image of another size, or to another text, than before in one mean; capture with "
                "steps='all'"
            )

    def _kinds_of(self, length: int, inputs: list[tuple[Origin, set[int]]]) -> Origin | None:
        """Kinds of so many tokens: those of an input, or of what was put together since."""
        for origin, lengths in inputs:
            if length in lengths:
                return ((origin[0][0], length),) if len(origin) == 1 else origin
        return self.recorder.origins.joined.get(length)

    def _asked(self) -> frozenset[str]:
        plan = self.recorder.sampling.plan
        return plan.queries | plan.keys

    def _texts(self) -> list[TextRow]:
        return [self.recorder.sampling.run.texts[number] for number, _ in self.recorder.rows]

    def _partitions(self, q_len: int, kv_len: int) -> tuple[Partition, Partition]:
        return self.partitions

    def _made(self) -> tuple[Partition, Partition]:
        sampling = self.recorder.sampling
        query, self.query_side = self._side(self.segments[0], sampling.plan.queries, QUERY_TILES)
        key, self.key_side = self._side(self.segments[1], sampling.plan.keys, KEY_TILES)
        return query, key

    def _side(self, segments: Origin, kinds: frozenset[str], most: int) -> tuple[Partition, Side]:
        sampling = self.recorder.sampling
        texts = self._texts()
        has_text = TEXT in kinds and any(kind == TEXT for kind, _ in segments)
        side = Side(has_text, max(len(text.labels) for text in texts) if has_text else 0)
        pieces, count = [], side.words
        for kind, length in segments:
            piece = torch.full((self.call.batch, length), -1)
            if kind == TEXT and has_text:
                piece = torch.stack([text.assignment for text in texts])
            elif kind == IMAGE and IMAGE in kinds:
                side.grid = self.grids[length]
                tiles = tiles_of(sampling, sampling.run, most)
                cells = tiles.cells(side.grid)
                count = side.words + int(cells.max()) + 1
                piece = (side.words + cells).repeat(self.call.batch, 1)
            pieces.append(piece)
        assignment = torch.cat(pieces, 1)
        sizes = torch.stack([torch.bincount(row[row >= 0], minlength=count) for row in assignment])
        return Partition(assignment, sizes, sizes, sizes, ((),) * self.call.batch), side

    def _open(self, q_len: int, kv_len: int, num_heads: int) -> None:
        query, key = self._partitions(q_len, kv_len)
        self.place(query, key, kv_len, 0)
        record = self.empty(query, key, num_heads)
        self.before = old = self.records.get(self.name)
        if old is not None:
            record.sums[..., :-1] += old.sums[..., :-1]
            record.counts += old.counts
        self.record = ImageRecord(**vars(record), query_side=self.query_side, key_side=self.key_side)
        self.records[self.name] = self.record
