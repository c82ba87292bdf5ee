"""Collects block sums while an image is sampled: over steps, told apart by whose text a row of the batch is given."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import hashlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from attnpatch.capture.blocks import Blocks
from attnpatch.capture.grid import Grid, Tiles
from attnpatch.capture.heads import Heads, checked_heads, chosen_heads
from attnpatch.capture.observer import Passing, Record, SiteFacts, SiteObserver
from attnpatch.capture.origins import IMAGE, TEXT, Origin, Origins
from attnpatch.capture.partition import Partition
from attnpatch.errors import CaptureError

# Tiles along either edge of an image where nobody says how many, as queries and as keys.
QUERY_TILES, KEY_TILES = 32, 16


@dataclasses.dataclass
class TextRow:
    """The text of one row of a batch (``attnpatch.hosts`` finds it).

    Attributes:
        labels: One per word.
        assignment: int64 ``[tokens]``, the word of each text token the denoiser is given, -1 for none.
        text: As it was given; ``None``: not known.
        role: ``"prompt"``, ``"negative"``, or ``""``: not known.
    """

    labels: tuple[str, ...]
    assignment: torch.Tensor
    text: str | None = None
    role: str = ""


class DenoiserCall(Protocol):
    """What is known of a call of a denoiser (``attnpatch.hosts`` reads it).

    Attributes:
        batch: Rows of its batch.
        images, texts: What it is given of either.
        text_mask: Bool ``[batch, tokens]`` of the text, or ``None``.
        timestep: Of the sampler, ``None`` if it has none.
        grids: Shapes that the image may have, the likeliest first.
    """

    batch: int
    past: int
    images: list[torch.Tensor]
    texts: list[torch.Tensor]
    text_mask: torch.Tensor | None
    timestep: float | None
    grids: list[Grid]


# A row of a batch: which text it was given, and the how manyth row with that text it is.
Row = tuple[int, int]


@dataclasses.dataclass
class Plan:
    """What of an image to show.

    Attributes:
        query_tiles, key_tiles: How the image is cut; ``None``: as its size suggests.
        text: Blocks of the text; ``None``: its words.
        queries, keys: Kinds of tokens on either side.
    """

    query_tiles: Tiles | None = None
    key_tiles: Tiles | None = None
    text: Blocks | None = None
    queries: frozenset[str] = frozenset({IMAGE, TEXT})
    keys: frozenset[str] = frozenset({IMAGE, TEXT})

    @classmethod
    def of(cls, blocks: Blocks | tuple[Blocks, Blocks] | None) -> Plan:
        """As ``capture`` is given it.

        Raises:
            CaptureError: These are no blocks of an image.
        """
        if blocks is None:
            return cls()
        pair = blocks if isinstance(blocks, tuple) else (blocks, blocks)
        tiled = [isinstance(side, Blocks) and side.image is not None for side in pair]
        if len(pair) != 2 or not all(isinstance(side, Blocks) for side in pair) or not any(tiled):
            raise CaptureError(
                f"blocks={blocks!r} is not accepted for an image; give Blocks.tiles(height, width, tile), a pair of "
                "blocks for queries and keys such as (Blocks.tiles(...), Blocks.words(...)), or None: tiles and words"
            )
        tiles = [Tiles.of_blocks(side.image) if side.image else None for side in pair]
        if any(side.image and side.image[3] for side in pair):
            raise CaptureError(
                "where the image begins in a sequence of text and image is found; leave start out"
            )
        text = next((side for side in pair if side.image is None), None)
        kinds = [frozenset({IMAGE if is_tiled else TEXT}) for is_tiled in tiled]
        return cls(tiles[0], tiles[1], text, *kinds)


@dataclasses.dataclass
class Side:
    """The blocks on one side of a site: words first, then the image's cells.

    Attributes:
        has_text: Whether there are words.
        words: Blocks of words, as many as the row with most of them has.
        grid: The image's tokens at this site, if it has any.
    """

    has_text: bool = False
    words: int = 0
    grid: Grid | None = None

    def of_row(self, words: int, count: int) -> torch.Tensor:
        """Which of ``count`` blocks a row with so many words has."""
        own = words if self.has_text else 0
        return torch.cat([torch.arange(own), torch.arange(self.words, count)])


@dataclasses.dataclass
class ImageRecord(Record):
    """Sums of one site, and what its blocks are."""

    query_side: Side = dataclasses.field(default_factory=Side)
    key_side: Side = dataclasses.field(default_factory=Side)


class Run:
    """One sampling: an image, or a batch of them.

    Attributes:
        timesteps: In order; a sampler's step may call the denoiser several times.
        texts: Every text that rows were given.
        rows: Every row there was.
        image: The shape of the image; known when the first site has run.
        records: By step and rows of the batch, then by site.
    """

    def __init__(self, hint: Grid | None = None) -> None:
        self.hint = hint
        self.timesteps: list[float | None] = []
        self.texts: list[TextRow] = []
        self.rows: dict[Row, None] = {}
        self.image: Grid | None = None
        self.records: dict[tuple[int, tuple[Row, ...]], dict[str, ImageRecord]] = {}

    def step_of(self, timestep: float | None) -> int:
        """Number of the step: a new one for each timestep that differs from the one before."""
        if not self.timesteps or timestep is None or self.timesteps[-1] != timestep:
            self.timesteps.append(timestep)
        return len(self.timesteps) - 1


class Sampling:
    """All runs of a capture, which several denoisers of one pipeline may share.

    Args:
        plan: What to show.
        is_kept_apart: Whether steps are.
        find_texts: Says whose text each row of a text is; ``None``: nobody knows.
    """

    def __init__(
        self,
        plan: Plan,
        is_kept_apart: bool = False,
        find_texts: Callable[[torch.Tensor], list[TextRow | None]] | None = None,
    ) -> None:
        self.plan, self.is_kept_apart, self.find_texts = plan, is_kept_apart, find_texts
        self.runs: list[Run] = []
        self.left_out: dict[str, str] = {}
        self._is_open = False
        self._known: dict[bytes, int] = {}
        self._last: tuple[Any, int, tuple[Row, ...]] | None = None

    def begin_run(self, hint: Grid | None = None) -> None:
        self.runs.append(Run(hint))
        self._is_open = True
        self._known, self._last = {}, None

    def end_run(self) -> None:
        self._is_open = False
        if self.runs and not self.runs[-1].records:
            self.runs.pop()

    @property
    def run(self) -> Run:
        """The run that goes on; without a pipeline that says where it begins, all calls are one."""
        if not self.runs:
            self.begin_run()
        return self.runs[-1]

    def rows_of(self, call: DenoiserCall) -> tuple[Row, ...]:
        """Which rows a batch holds: those with one and the same text are one image after the other."""
        run, text = self.run, call.texts[0] if call.texts else None
        if text is None or text.shape[0] != call.batch:
            numbers = [self._number(b"", None)] * call.batch
        else:
            if self._last is not None and self._last[0]() is text and self._last[1] == text._version:
                return self._last[2]
            numbers = self._numbers(text, call.text_mask)
        rows = tuple((number, numbers[:place].count(number)) for place, number in enumerate(numbers))
        run.rows.update(dict.fromkeys(rows))
        self._last = None if text is None else (weakref.ref(text), text._version, rows)
        return rows

    def _numbers(self, text: torch.Tensor, mask: torch.Tensor | None) -> list[int]:
        given = text.detach().float().cpu().contiguous()
        keys = [hashlib.blake2b(row.numpy().tobytes()).digest() for row in given]
        if any(key not in self._known for key in keys):
            for key, row in zip(keys, self._texts(text, mask), strict=True):
                self._number(key, row)
        return [self._known[key] for key in keys]

    def _texts(self, text: torch.Tensor, mask: torch.Tensor | None) -> list[TextRow]:
        """The text of each row, in the blocks asked for, else in its words, else in its tokens by number."""
        tokens = text.shape[1]
        found = [TextRow(tuple(map(str, range(tokens))), torch.arange(tokens)) for _ in text]
        if self.find_texts is not None:
            found = [row or numbered for row, numbered in zip(self.find_texts(text), found, strict=True)]
        if self.plan.text is not None:
            self._name(found, torch.ones(text.shape[:2], dtype=torch.bool) if mask is None else mask)
        return found

    def _name(self, found: list[TextRow], valid: torch.Tensor) -> None:
        """Take the blocks asked for. Those of a prompt are not guidance's, which keeps its own words."""
        blocks, chosen = self.plan.text, list(range(len(found)))
        prompts = [place for place in chosen if found[place].role != "negative"]
        for_all = blocks.per_sequence and len(blocks.spans_by_sequence) == len(found) and prompts
        if blocks.kind in ("words", "tokens") and not for_all:
            chosen = prompts
        if chosen:
            asked = blocks.resolve(valid[chosen])
            for place, labels, assignment in zip(chosen, asked.labels, asked.assignment, strict=True):
                found[place].labels, found[place].assignment = labels, assignment

    def _number(self, key: bytes, row: TextRow | None) -> int:
        if key not in self._known:
            self._known[key] = len(self.run.texts)
            self.run.texts.append(row or TextRow((), torch.zeros(0, dtype=torch.int64)))
        return self._known[key]


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
        lengths = (passing.q_len, passing.kv_len)
        if self.lengths is None:
            self.lengths = lengths
            whole = self.call.batch * self.recorder.num_heads.get(self.name, 0)
            if whole and passing.lead_count != whole:
                # Some rows of the batch only (perturbed attention guidance), some heads, or other rows than images.
                self._refuse(
                    f"attends in {passing.lead_count} pieces, not in the {whole} of its batch and heads"
                )
            else:
                self._place(*lengths)
        elif self.lengths != lengths:
            # A second attention inside the module, as an image prompt's: shown it would be mixed with the first.
            self._leave_out(f"attends a second time, to {passing.kv_len} keys", f" ({passing.kv_len} keys)")
            return
        if not self.is_out:
            super()._observe(probabilities, passing)

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


def tiles_of(sampling: Sampling, run: Run, most: int) -> Tiles:
    """How the image of a run is cut, as queries or as keys."""
    asked = sampling.plan.query_tiles if most == QUERY_TILES else sampling.plan.key_tiles
    return asked if asked is not None else Tiles.of(run.image, most)
