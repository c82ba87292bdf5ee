"""Adds the attention of one call of a denoiser's site to its sums, or says why it is in no map."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attnpatch import compat
from attnpatch.blocks.partition import Partition
from attnpatch.blocks.tiles import Grid
from attnpatch.errors import CaptureError
from attnpatch.observing import INPUT, PART, Layout, TileInfo
from attnpatch.recording.accumulator import SiteObserver
from attnpatch.recording.call_facts import FAILED, NOT_SEEN, Unknown, check_sums, is_refusal
from attnpatch.recording.diffusion.denoiser_call import TextRow
from attnpatch.recording.diffusion.denoising import KEY_TILES, QUERY_TILES, ImageRecord, Side, tiles_of
from attnpatch.recording.diffusion.token_provenance import IMAGE, OF_NO_BLOCK, OTHER, TEXT, UNKNOWN, Kinds

UNSAID = (
    "the call does not say in which rows and columns they lie (no img_ids, img_shapes, or height and width); give "
    "blocks=Blocks.tiles(height, width, tile) with the rows and columns of its tokens"
)
NO_SHAPE = "which fit no image of this one's shape"


class ImageObserver(SiteObserver):
    """Adds the tiles of one call of one site to its record, if all facts that the map depends on are known.

    Args:
        recorder: The recorder of the denoiser.
        name: The site's name.
        call: The denoiser's call.
        records: The sums of this step, by site.
        inputs: For each tensor that the site is called with: the kinds of its tokens (``None``: not known), and the
            pieces that its tokens were concatenated from (``DenoiserReading.sides_of``).
        is_again: True if the site was called before in this call of the denoiser.
        may_be_none: Tells, when the call ends, if the site may be no attention.
    """

    def __init__(
        self,
        recorder: Any,
        name: str,
        call: Any,
        records: dict[str, Any],
        inputs: list[tuple[Kinds | None, list[tuple[int, list[int]]]]],
        is_again: bool = False,
        may_be_none: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(recorder, name)  # type: ignore[arg-type]
        self.recorder: Any = recorder
        self.call, self.records, self.inputs, self.is_again = call, records, inputs, is_again
        self.may_be_none = may_be_none
        self.before: Any = None
        # Whether some tiles are still to come; whether some rows see no key.
        self.is_open = self.has_closed = False
        # By the number of image tokens: their grid; and the lengths of the dimensions that were merged into them.
        self.grids: dict[int | None, Grid] = {}
        self.sides: dict[int, list[list[int]]] = {}

    def begin(self, layout: Layout, opened: Any) -> bool:
        """True if an attention of the site is to be shown."""
        if self.layout is not None:
            # A second attention inside the module (an image prompt's) would be mixed with the first.
            if self.is_shown:
                keys = f"{layout.kv_len} keys"
                self._leave_out(f"its second attention, to {keys}, is in no map", f" ({keys})")
            return False
        self.layout = layout
        if self.name in self.recorder.sampling.run.refused:
            return False
        try:
            if self.is_again:
                raise Unknown(
                    "it is called several times in one call of the denoiser, so it is not known which call a map shows"
                )
            with compat.DisableTorchFunction(), torch.no_grad():
                self.is_shown = self.is_open = self._begin(layout)
        except Exception as error:
            self._refuse(str(error) if is_refusal(error) else FAILED)
            if not is_refusal(error):
                raise
        return self.is_shown

    def _begin(self, layout: Layout) -> bool:
        """Determine which tokens queries and keys are; True if the capture asks for them."""
        count, batch = layout.batch * layout.heads, self.call.batch
        whole = batch * self.recorder.num_heads.get(self.name, 0)
        if (whole and count != whole) or count % batch:
            # The attention covers only some batch rows (perturbed attention guidance), only some heads, or rows that
            # are not images.
            wanted = f"the denoiser has {whole}" if whole else f"the denoiser's batch is {batch}"
            raise Unknown(f"it attends in {count} pieces (sequences x heads), but {wanted}")
        if layout.why_not:
            raise Unknown(layout.why_not)
        if layout.batch != batch:
            raise Unknown(f"it attends in {layout.batch} sequences, and the denoiser is given {batch}")
        queries = self._kinds_of(layout.queries, "queries", layout.q_len)
        keys = self._kinds_of(layout.keys, "keys", layout.kv_len)
        plan = self.recorder.sampling.plan
        for side, kinds, asked in (("queries", queries, plan.queries), ("keys", keys, plan.keys)):
            if not {kind for kind, _ in kinds} & asked:
                self._check_known(kinds, side)
                return False
        if layout.is_mixed:
            self._leave_out(
                "its weights are mixed after softmax, so rows of its map need not sum to 1", " (weights)"
            )
        self.segments = self._segments(queries), self._segments(keys)
        self.kept_heads(layout.heads)
        self._check_before()
        self._open()
        return True

    def _check_known(self, kinds: Kinds, side: str) -> None:
        """Raise ``Unknown`` if some queries or keys are not known, so that they may be those that are asked for."""
        count = sum(length or 0 for kind, length in kinds if kind == OTHER)
        if count:
            raise Unknown(f"it attends with {count} {side} {UNKNOWN}")

    def _kinds_of(self, pieces: Sequence[Any], side: str, count: int) -> Kinds:
        """The kinds of tokens of the queries or of the keys, in order, each with its length.

        Raises:
            Unknown: Some are not known.
        """
        found: list[tuple[str, int | None]] = []
        for piece in pieces:
            if piece.kind == PART:
                raise Unknown(
                    f"its {side} are only {piece.length} of {piece.of} tokens, and it is not known which part of the image"
                )
            own_kinds = self.inputs[piece.number][0] if piece.kind == INPUT else None
            if own_kinds is not None and len(own_kinds) > 1:
                if sum(length or 0 for _, length in own_kinds) != piece.length:
                    raise Unknown(f"its {side} are only a part of the tokens, and it is not known which part")
                found += own_kinds
            else:
                found.append((OTHER if own_kinds is None else own_kinds[0][0], piece.length))
                own_kinds = (found[-1],)
            if piece.kind == INPUT:
                self._note_sides(own_kinds, self.inputs[piece.number][1])
        kinds = {kind for kind, _ in found}
        if kinds <= {OTHER, *OF_NO_BLOCK}:
            what = OF_NO_BLOCK.get(next(iter(kinds)) if len(kinds) == 1 else OTHER, UNKNOWN)
            raise Unknown(f"it attends with {count} {side} {what}")
        return tuple(found)

    def _note_sides(self, kinds: Kinds, sides: list[tuple[int, list[int]]]) -> None:
        """Note the dimensions that were merged into the image tokens among some tokens of these kinds."""
        pieces = dict(zip(itertools.accumulate((size for size, _ in sides), initial=0), sides, strict=False))
        place = 0
        for kind, length in kinds:
            size, merged = pieces.get(place, (0, []))
            if kind == IMAGE and size == length and merged:
                self.sides.setdefault(size, []).append(merged)
            place += length or 0

    def add_sequence(
        self, b: int, numbers: list[int], tile: torch.Tensor, weights: torch.Tensor | None, passing: TileInfo
    ) -> None:
        """See ``SiteObserver.add_sequence``."""
        self.has_closed |= weights is not None and bool((weights == 0).any())
        if 0 in numbers:
            self.count(b, *passing.rows)
        for place, chosen in self.places(numbers, self.layout.heads):
            some = None if weights is None else weights[chosen]
            self.add(b, place, tile[chosen], some, *passing.rows)

    def cannot_show(self, reason: str) -> None:
        """An attention of the site cannot be shown: leave the site out."""
        self._refuse(reason)

    def restart(self) -> None:
        """Forget the tiles of this call."""
        if self.record is not None:
            self._open()

    def end(self) -> None:
        """All tiles were shown: check that every row sums to 1, except rows that see no key."""
        record, layout = self.record, self.layout
        if record is not None and layout is not None and not layout.is_mixed:
            share = layout.heads if self.recorder.heads == "mean" else 1
            may_lack = self.has_closed or layout.drops_keys
            try:
                check_sums(record.sums, record.counts[:, None] * share, self.off, may_lack)
            except Unknown as reason:
                self._refuse(str(reason))
        self.is_open = False

    def finish(self) -> None:
        """Called when the site's call has ended."""
        if self.is_open:
            self._refuse(FAILED)
        elif self.layout is None and not self.may_be_none():
            self._refuse(NOT_SEEN)

    def _refuse(self, reason: str) -> None:
        self._leave_out(reason)
        run = self.recorder.sampling.run
        run.refused.add(self.name)
        # A mean over only the earlier calls would be incomplete, whichever rows they had.
        for records in run.records.values():
            records.pop(self.name, None)

    def _leave_out(self, reason: str, part: str = "") -> None:
        self.recorder.sampling.left_out.setdefault(self.name + part, reason)

    def _segments(self, side: Kinds) -> Kinds:
        """The kinds of tokens with their lengths; of several pictures only the first counts as the image.

        Raises:
            CaptureError: The tokens cannot be mapped.
        """
        found: list[tuple[str, int | None]] = []
        for kind, length in side:
            if kind in (each for each, _ in found if each not in (OTHER, *OF_NO_BLOCK)):
                raise CaptureError(f"its sequence holds tokens of the {kind} in several places")
            rest = 0
            if kind == IMAGE:
                image = self._image(length)
                rest = length - image.tokens
            elif kind == TEXT in self._asked() and any(
                len(text.assignment) != length for text in self._texts()
            ):
                given = self.call.texts[0].shape[:2] if self.call.texts else (0, 0)
                raise CaptureError(
                    f"it attends with {length} text tokens of {self.call.batch} images, and the denoiser is given {given[1]} "
                    f"of {given[0]}"
                )
            elif kind == OTHER or kind in OF_NO_BLOCK:
                what = OF_NO_BLOCK.get(kind, "not known to be the image's or the text's")
                self._leave_out(f"these tokens are {what}; they are in no block", f" ({length} tokens)")
            found += [(kind, length - rest), (OTHER, rest)] if rest else [(kind, length)]
        return tuple(found)

    def _image(self, tokens: int) -> Grid:
        """The grid of the image within ``tokens`` image tokens, which may include further pictures behind it."""
        sampling, call = self.recorder.sampling, self.call
        if [0] in self.sides.get(tokens, ()):
            raise Unknown(
                "it attends with image tokens whose rows, columns or frames were cut, padded or joined, so it is not known "
                "which part of the image each of them shows"
            )
        tiles = [
            each.image for each in (sampling.plan.query_tiles, sampling.plan.key_tiles) if each is not None
        ]
        if call.pictures:
            grid, *others = call.pictures
            whole = grid.tokens + sum(other.tokens for other in others)
            if tokens != whole:
                raise CaptureError(
                    f"it attends with {tokens} image tokens, and the pictures that it is given have {whole}"
                )
        elif call.latents is not None:
            grid, others = self._resolution(tokens, call.latents), []
        else:
            grid, others = next((each for each in tiles if each.tokens == tokens), None), []
            if grid is None:
                raise CaptureError(f"it attends with {tokens} image tokens, and {UNSAID}")
        if any(grid not in Grid.resolutions(grid.tokens, each) for each in tiles):
            raise CaptureError(f"it attends with {grid.tokens} image tokens, {NO_SHAPE}")
        for sides in self.sides.get(tokens, ()):
            if tokens == grid.tokens and not grid.is_merged_from(sides):
                raise Unknown(
                    f"it attends with image tokens in {' x '.join(map(str, sides))}, but the image has {grid.height} x "
                    f"{grid.width}, so it is not known which part of the image each of them shows"
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

    def _resolution(self, tokens: int, latents: Grid) -> Grid:
        """The grid of ``tokens`` image tokens at this site; raises if none fits, or several do."""
        found: Sequence[Grid] = Grid.resolutions(tokens, latents)
        for sides in self.sides.get(tokens, ()):
            found = [grid for grid in found if grid.is_merged_from(sides)] or found
        if len(found) == 1:
            return found[0]
        shown = " or ".join(f"{grid.frames} x {grid.height} x {grid.width}" for grid in found)
        said = (
            f"which may be {shown} frames, rows and columns, and it is not known which" if found else NO_SHAPE
        )
        raise CaptureError(f"it attends with {tokens} image tokens, {said}")

    def _check_before(self) -> None:
        """Check that sums of earlier calls, which this call adds to, have the same blocks."""
        plan = self.recorder.sampling.plan
        query, self.query_side = self._side(self.segments[0], plan.queries, QUERY_TILES)
        key, self.key_side = self._side(self.segments[1], plan.keys, KEY_TILES)
        self.partitions = query, key
        self.before = before = self.records.get(self.name)
        if before is not None and (before.query_side, before.key_side) != (self.query_side, self.key_side):
            raise CaptureError(
                "it attends to an image of another size, or to another text, than at an earlier step of the same mean; "
                "capture with steps='all'"
            )

    def _asked(self) -> frozenset[str]:
        plan = self.recorder.sampling.plan
        return plan.queries | plan.keys

    def _texts(self) -> list[TextRow]:
        return [self.recorder.sampling.run.texts[number] for number, _ in self.recorder.rows]

    def _side(self, segments: Kinds, kinds: frozenset[str], most: int) -> tuple[Partition, Side]:
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

    def _open(self) -> None:
        """Make the sums that this call is added to."""
        query, key = self.partitions
        self.place(key, self.layout.kv_len, 0)
        record = self.empty(query, key, self.layout.heads)
        old = self.before
        if old is not None:
            record.sums += old.sums
            record.counts += old.counts
        self.record = ImageRecord(**vars(record), query_side=self.query_side, key_side=self.key_side)
        self.records[self.name] = self.record
