"""Watches the calls of a denoiser: where each tile of its attention belongs, and what is in no map and why."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attnpatch.capture.grid import Grid
from attnpatch.capture.heads import Heads, checked_heads, chosen_heads
from attnpatch.capture.observer import Passing, Record, SiteFacts, SiteObserver
from attnpatch.capture.origins import IMAGE, TEXT, Origin, Origins
from attnpatch.capture.partition import Partition
from attnpatch.capture.sampling import (
    KEY_TILES,
    QUERY_TILES,
    DenoiserCall,
    ImageRecord,
    Sampling,
    Side,
    tiles_of,
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
        site_call: Says what is known of a call of a site.
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
        site_call: Callable[[Any, Any], SiteFacts],
        num_heads: dict[str, int],
    ) -> None:
        self.sampling, self.prefix, self.heads = sampling, prefix, checked_heads(heads)
        self.num_heads = {prefix + name: count for name, count in num_heads.items()}
        self.read_call, self.site_call = read_call, site_call
        self.wanted = {name for name in names if sites is None or fnmatch.fnmatchcase(prefix + name, sites)}
        self.call: DenoiserCall | None = None
        self._stack = contextlib.ExitStack()

    def begin_call(self, args: Any, kwargs: Any) -> None:
        """The denoiser is about to run."""
        sampling = self.sampling
        self.call = call = self.read_call(args, kwargs)
        step = sampling.run.step_of(call.timestep)
        self.rows = sampling.rows_of(call)
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
        facts = self.site_call(args, kwargs)
        return ImageObserver(self, self.prefix + site.name, self.call, facts, self.records, inputs)


def _lengths(tensor: torch.Tensor) -> set[int]:
    """How many tokens a tensor may hold; images may come with channels first or last."""
    if tensor.dim() == 4:
        height, width, *_ = tensor.shape[1:]
        return {height * width, tensor.shape[2] * tensor.shape[3]}
    return {tensor.shape[1]} if tensor.dim() == 3 else set()


class ImageObserver(SiteObserver):
    """Adds the tiles of one call of one site of a denoiser to its record."""

    def __init__(self, *args: Any) -> None:
        *rest, self.inputs = args
        super().__init__(*rest)
        self.lengths: tuple[int, int] | None = None
        self.is_out = False

    def observe(self, probabilities: torch.Tensor, passing: Passing) -> None:
        """Add ``[leads, rows, kv_len]`` probabilities, which are nobody's tokens."""
        with torch._C.DisableTorchFunction():
            super().observe(probabilities, passing)

    def _observe(self, probabilities: torch.Tensor, passing: Passing) -> None:
        if self._is_shown(passing.lead_count, passing.q_len, passing.kv_len):
            super()._observe(probabilities, passing)

    def rows(self, lead_count: int, q_len: int, kv_len: int) -> torch.Tensor | None:
        """All rows, or none of an attention that is in no map."""
        return None if self._is_shown(lead_count, q_len, kv_len) else torch.zeros(0, dtype=torch.int64)

    def _is_shown(self, lead_count: int, q_len: int, kv_len: int) -> bool:
        """Whether this attention of the site goes into a map; which is found out at its first tile."""
        if self.lengths is None:
            self.lengths = (q_len, kv_len)
            whole = self.call.batch * self.recorder.num_heads.get(self.name, 0)
            if whole and lead_count != whole:
                # Some rows of the batch only (perturbed attention guidance), some heads, or other rows than images.
                self._refuse(f"attends in {lead_count} pieces, not in the {whole} of its batch and heads")
            else:
                self._place(q_len, kv_len)
        elif self.lengths != (q_len, kv_len):
            # A second attention inside the module, as an image prompt's: shown it would be mixed with the first.
            self._leave_out(f"attends a second time, to {kv_len} keys", f" ({kv_len} keys)")
            return False
        return not self.is_out

    def _refuse(self, reason: str) -> None:
        self._leave_out(reason)
        self.is_out = True

    def _leave_out(self, reason: str, part: str = "") -> None:
        self.recorder.sampling.left_out.setdefault(self.name + part, reason)

    def _place(self, q_len: int, kv_len: int) -> None:
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
        self.segments = queries, keys
        for kind, length in (*queries, *keys):
            if kind == IMAGE and self._grid(length) is None:
                self._refuse(
                    f"attends with {length} image tokens, which show no image of the size of this one"
                )
            elif kind == TEXT and length != self._text_tokens():
                self._refuse(
                    f"attends with {length} text tokens, the denoiser is given {self._text_tokens()}"
                )

    def _kinds_of(self, length: int, inputs: list[tuple[Origin, set[int]]]) -> Origin | None:
        """Kinds of so many tokens: those of an input, or of what was put together since."""
        for origin, lengths in inputs:
            if length in lengths:
                return ((origin[0][0], length),) if len(origin) == 1 else origin
        return self.recorder.origins.joined.get(length)

    def _text_tokens(self) -> int:
        texts = self.call.texts
        return texts[0].shape[1] if texts else 0

    def _grid(self, tokens: int) -> Grid | None:
        run, plan = self.recorder.sampling.run, self.recorder.sampling.plan
        asked = [tiles.image for tiles in (plan.query_tiles, plan.key_tiles) if tiles is not None]
        for image in [run.image] if run.image is not None else (asked or self.call.grids):
            found = Grid.fitting(tokens, image)
            if found is not None:
                run.image = image
                return found
        return None

    def _partitions(self, q_len: int, kv_len: int) -> tuple[Partition, Partition]:
        sampling = self.recorder.sampling
        query, self.query_side = self._side(self.segments[0], sampling.plan.queries, QUERY_TILES)
        key, self.key_side = self._side(self.segments[1], sampling.plan.keys, KEY_TILES)
        return query, key

    def _side(self, segments: Origin, kinds: frozenset[str], most: int) -> tuple[Partition, Side]:
        sampling = self.recorder.sampling
        texts = [sampling.run.texts[number] for number, _ in self.recorder.rows]
        has_text = TEXT in kinds and any(kind == TEXT for kind, _ in segments)
        side = Side(has_text, max(len(text.labels) for text in texts) if has_text else 0)
        pieces, count = [], side.words
        for kind, length in segments:
            piece = torch.full((self.call.batch, length), -1)
            if kind == TEXT and has_text:
                piece = torch.stack([text.assignment for text in texts])
            elif kind == IMAGE and IMAGE in kinds:
                side.grid = self._grid(length)
                tiles = tiles_of(sampling, sampling.run, most)
                cells = tiles.cells(side.grid)
                count = side.words + int(cells.max()) + 1
                piece = (side.words + cells).repeat(self.call.batch, 1)
            pieces.append(piece)
        assignment = torch.cat(pieces, 1)
        sizes = torch.stack([torch.bincount(row[row >= 0], minlength=count) for row in assignment])
        return Partition(assignment, sizes, sizes, sizes, ((),) * self.call.batch), side

    def _open(self, q_len: int, kv_len: int, num_heads: int) -> Record:
        record = super()._open(q_len, kv_len, num_heads)
        found = ImageRecord(**vars(record), query_side=self.query_side, key_side=self.key_side)
        self.records[self.name] = found
        return found
