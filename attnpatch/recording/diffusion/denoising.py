"""Collects block sums while a sampler runs, by step and by the text that each batch row is given."""

from __future__ import annotations

import dataclasses
import hashlib
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attnpatch.blocks.spec import Blocks
from attnpatch.blocks.tiles import Grid, Tiles
from attnpatch.errors import CaptureError
from attnpatch.recording.accumulator import SiteSums
from attnpatch.recording.diffusion.denoiser_call import DenoiserCall, TextRow
from attnpatch.recording.diffusion.token_provenance import IMAGE, TEXT

# By default, at most this many tiles along either edge of an image, as queries and as keys.
QUERY_TILES, KEY_TILES = 32, 16
# A batch row: the number of its text, and its index among the batch rows with that text.
Row = tuple[int, int]
# The way out if a call of the denoiser may be of a part of the image.
_WITHOUT_PARTS = "; capture an image that the pipeline makes in one piece, without such guidance"


@dataclasses.dataclass
class Plan:
    """Which blocks a capture of an image has.

    Attributes:
        query_tiles, key_tiles: How the image is cut into tiles; ``None``: chosen by its size.
        text: Blocks of the text; ``None``: its words.
        queries, keys: Kinds of tokens that are captured as queries and as keys.
    """

    query_tiles: Tiles | None = None
    key_tiles: Tiles | None = None
    text: Blocks | None = None
    queries: frozenset[str] = frozenset({IMAGE, TEXT})
    keys: frozenset[str] = frozenset({IMAGE, TEXT})

    @classmethod
    def of(cls, blocks: Blocks | tuple[Blocks, Blocks] | None) -> Plan:
        """The plan for the argument ``blocks`` of ``capture``.

        Raises:
            CaptureError: These blocks are not for an image.
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
                "attnpatch finds where the image begins in a sequence of text and image; leave start out"
            )
        text = next((side for side in pair if side.image is None), None)
        kinds = [frozenset({IMAGE if is_tiled else TEXT}) for is_tiled in tiled]
        return cls(tiles[0], tiles[1], text, *kinds)


@dataclasses.dataclass
class Side:
    """The blocks on one side of a site: words first, then the image's cells.

    Attributes:
        has_text: True if there are words.
        words: Number of blocks for words: that of the batch row with most of them.
        grid: The grid of image tokens at this site, if it has any.
    """

    has_text: bool = False
    words: int = 0
    grid: Grid | None = None

    def of_row(self, words: int, count: int) -> torch.Tensor:
        """Indices of the blocks that a batch row has: its own ``words`` words, then all cells of the image.

        ``count`` is the number of blocks of the whole batch.
        """
        own = words if self.has_text else 0
        return torch.cat([torch.arange(own), torch.arange(self.words, count)])


@dataclasses.dataclass
class ImageRecord(SiteSums):
    """Sums of one site, with a description of its blocks."""

    query_side: Side = dataclasses.field(default_factory=Side)
    key_side: Side = dataclasses.field(default_factory=Side)


class Run:
    """One run of the sampler: an image, or a batch of them.

    Attributes:
        timesteps: The sampled image's timesteps, in order; one step may call the denoiser several times.
        texts: Every text that batch rows were given.
        rows: Every batch row, with its steps.
        duplicates: Rows that have the same text and latents as another row of their batch at every step, each with that
            other row.
        unclear: Texts for which several calls in one step cannot be told apart (parts of the image, or guidance), each
            with the reason.
        image: The grid of the image; known when the first site has run.
        refused: Sites that are in no map of this run.
        records: Sums by step and batch rows, then by site.
    """

    def __init__(self) -> None:
        self.timesteps: list[float | None] = []
        self.texts: list[TextRow] = []
        self.rows: dict[Row, set[int]] = {}
        self.duplicates: dict[Row, Row] = {}
        self.unclear: dict[int, str] = {}
        self.image: Grid | None = None
        self.refused: set[str] = set()
        self.records: dict[tuple[int, tuple[Row, ...]], dict[str, ImageRecord]] = {}
        self._given: frozenset[float] = frozenset()
        self._latents: dict[Row, list[bytes]] = {}
        self._distinct: set[Row] = set()

    def step_of(self, timesteps: frozenset[float]) -> int:
        """The number of the step; a timestep that differs from the previous one begins a new step.

        The sampled image has the highest timestep in a call. Calls for guidance may lack the reference images'
        timesteps.
        """
        latest = max(timesteps, default=None)
        goes_on = self.timesteps and latest is not None and self.timesteps[-1] == latest
        if not goes_on or not timesteps <= self._given:
            self.timesteps.append(latest)
            self._given, self._latents = timesteps, {}
        return len(self.timesteps) - 1

    def shown(self, rows: Sequence[Row], latents: Sequence[bytes], evaluations: int) -> tuple[Row, ...]:
        """Mark batch rows whose text and latents were seen in this step before: maps show only the first such call.

        Args:
            rows: The rows of the batch.
            latents: For each row a digest of its latents.
            evaluations: How often the sampler calls the denoiser per image in this step.

        Returns:
            The rows; rows that were seen before get an image number below 0.
        """
        found, first = [], {}
        for row, given in zip(rows, latents, strict=True):
            duplicate = first.setdefault((row[0], given), row)
            if duplicate == row or self.duplicates.get(row, duplicate) != duplicate:
                self._distinct.add(row)
            elif row not in self._distinct:
                self.duplicates[row] = duplicate
            before = self._latents.setdefault(row, [])
            found.append((row[0], -1 - row[1]) if given in before else row)
            if given not in before:
                before.append(given)
            if len(before) > evaluations:
                self.unclear[row[0]] = (
                    f"the denoiser is called with one image {len(before)} times in one step, each time with other latents, but "
                    f"the sampler asks for {evaluations}; it is not known whether they are parts of it, or another for "
                    f"guidance{_WITHOUT_PARTS}"
                )
        for row in self._distinct:
            self.duplicates.pop(row, None)
        return tuple(found)

    def of_parts(self, images: int) -> dict[int, str]:
        """The texts with more images in a batch than the pipeline has returned, each with the reason to leave it out."""
        counts = Counter(number for number, image in self.rows.keys() - self.duplicates.keys() if image >= 0)
        return {
            number: f"the denoiser is called with {count} images of it at once, and the pipeline returned {images}, so they "
            f"may be parts of an image (views of a panorama){_WITHOUT_PARTS}"
            for number, count in counts.items()
            if count > images
        }


class Sampling:
    """All runs of a capture, which several denoisers of one pipeline may share.

    Args:
        plan: Which blocks the capture has.
        is_per_step: True if steps are kept separate.
        find_texts: Finds the text of each batch row; ``None``: not known.
        evaluations: Maps a timestep to the number of times that the sampler calls the denoiser there; ``None``: not
            known, and every call counts as the sampler's.
    """

    def __init__(
        self,
        plan: Plan,
        is_per_step: bool = False,
        find_texts: Callable[[torch.Tensor], list[TextRow | None]] | None = None,
        evaluations: Callable[[float | None], int] | None = None,
    ) -> None:
        self.plan, self.is_per_step, self.find_texts = plan, is_per_step, find_texts
        self.evaluations = evaluations
        self.runs: list[Run] = []
        self.left_out: dict[str, str] = {}
        self._known: dict[bytes, int] = {}
        self._last: tuple[Any, int, list[int]] | None = None

    def begin_run(self) -> None:
        """Called when a pipeline's call begins."""
        self.runs.append(Run())
        self._known, self._last = {}, None

    def end_run(self, images: int | None = None) -> None:
        """Called when a pipeline's call has ended; if it never called its denoiser, it is not a run.

        Args:
            images: How many images the call has returned; ``None``: not known.
        """
        if self.runs and not self.runs[-1].records and not self.runs[-1].refused:
            self.runs.pop()
        elif self.runs and images:
            for number, reason in self.run.of_parts(images).items():
                self.left_out[f"images of text {number}"] = self.run.unclear.setdefault(number, reason)

    @property
    def run(self) -> Run:
        """The present run; without a pipeline, which tells where runs begin, all calls are one run."""
        if not self.runs:
            self.begin_run()
        return self.runs[-1]

    def rows_of(self, call: DenoiserCall) -> tuple[Row, ...]:
        """The rows of a batch; rows with the same text are numbered as successive images."""
        run, text = self.run, call.texts[0] if call.texts else None
        if text is None or text.shape[0] != call.batch:
            pooled = call.pooled if call.pooled is not None and len(call.pooled) == call.batch else None
            keys = [b""] * call.batch if pooled is None else [_digest([row]) for row in pooled]
            numbers = [self._number(key, None) for key in keys]
        elif self._last is not None and self._last[0]() is text and self._last[1] == text._version:
            numbers = self._last[2]
        else:
            numbers = self._numbers(text, call.text_mask)
            # An inference tensor has no version counter, so a write to it would go unnoticed.
            self._last = None if text.is_inference() else (weakref.ref(text), text._version, numbers)
        rows = tuple((number, numbers[:place].count(number)) for place, number in enumerate(numbers))
        step = len(run.timesteps) - 1
        for row in rows:
            run.rows.setdefault(row, set()).add(step)
        if self.evaluations is None or any(len(image) != call.batch for image in call.images):
            return rows
        latents = [_digest([image[place] for image in call.images]) for place in range(call.batch)]
        shown = run.shown(rows, latents, self.evaluations(run.timesteps[-1]))
        self._say_of(rows, shown)
        return shown

    def _say_of(self, rows: Sequence[Row], shown: Sequence[Row]) -> None:
        """Note in ``left_out`` which rows of a batch are in no map."""
        for (number, image), found in zip(rows, shown, strict=True):
            if number in self.run.unclear:
                self.left_out[f"images of text {number}"] = self.run.unclear[number]
            elif found[1] < 0:
                self.left_out.setdefault(
                    f"image {image} of text {number}",
                    "the denoiser is called with it again in one step, with the same text and latents (usually guidance by "
                    "a changed denoiser); maps show the first call",
                )

    def _numbers(self, text: torch.Tensor, mask: torch.Tensor | None) -> list[int]:
        keys = [_digest([row]) for row in text]
        new = {key: place for place, key in enumerate(keys) if key not in self._known}
        if new:
            # Blocks may be given per sequence, so with given blocks all batch rows are needed.
            places = list(range(len(keys))) if self.plan.text is not None else list(new.values())
            found = self._texts(text[places], None if mask is None else mask[places])
            texts = dict(zip(places, found, strict=True))
            used = {self._known[key] for key in keys if key in self._known}
            for key, place in new.items():
                used.add(self._number(key, texts[place], used))
        return [self._known[key] for key in keys]

    def _texts(self, text: torch.Tensor, mask: torch.Tensor | None) -> list[TextRow]:
        """The text of each batch row, in the blocks asked for, else in words, else with a number for each token."""
        tokens = text.shape[1]
        found = [TextRow(tuple(map(str, range(tokens))), torch.arange(tokens)) for _ in text]
        if self.find_texts is not None:
            found = [row or numbered for row, numbered in zip(self.find_texts(text), found, strict=True)]
        if self.plan.text is not None:
            self._name(found, torch.ones(text.shape[:2], dtype=torch.bool) if mask is None else mask)
        return found

    def _name(self, found: list[TextRow], valid: torch.Tensor) -> None:
        """Replace blocks by those asked for. Words of a prompt do not fit a negative prompt, which keeps its own."""
        blocks, chosen = self.plan.text, list(range(len(found)))
        prompts = [place for place in chosen if found[place].role != "negative"]
        for_all = blocks.per_sequence and len(blocks.spans_by_sequence) == len(found) and prompts
        if blocks.kind in ("words", "tokens") and not for_all:
            chosen = prompts
        if chosen:
            asked = blocks.resolve(valid[chosen])
            for place, labels, assignment in zip(chosen, asked.labels, asked.assignment, strict=True):
                before = found[place]
                if blocks.kind == "words" and before.text is not None:
                    before.check_words(labels, assignment)
                missing = {word: why for word, why in before.missing.items() if word in labels}
                found[place] = TextRow(labels, assignment, before.text, before.role, missing=missing)

    def _number(self, key: bytes, row: TextRow | None, used: set[int] = frozenset()) -> int:
        """The number of a text; the same as that of an earlier step's text with other embeddings of the same tokens."""
        if key not in self._known:
            texts, row = self.run.texts, row or TextRow((), torch.zeros(0, dtype=torch.int64))
            step = len(self.run.timesteps) - 1
            now = used | {number for (number, _), steps in self.run.rows.items() if step in steps}
            alike = [number for number, text in enumerate(texts) if number not in now and row.is_like(text)]
            self._known[key] = alike[0] if alike else len(texts)
            if not alike:
                texts.append(row)
                self._say(len(texts) - 1, row)
        return self._known[key]

    def _say(self, number: int, row: TextRow) -> None:
        """Note in ``left_out`` which words of a text are in no map."""
        for word, reason in row.missing.items():
            self.left_out.setdefault(f"word {word!r}", reason)
        if row.labels and row.text is None and self.find_texts is not None and self.plan.text is None:
            self.left_out.setdefault(
                f"words of text {number}",
                "no text encoder of the pipeline returned its embeddings inside the with block, so its tokens have "
                "numbers; encode the prompt inside it, or give blocks=(Blocks.tiles(...), Blocks.words(...))",
            )


def _digest(values: Sequence[torch.Tensor]) -> bytes:
    """A hash of the values of some tensors."""
    found = hashlib.blake2b()
    for each in values:
        found.update(each.detach().float().cpu().contiguous().numpy().tobytes())
    return found.digest()


def tiles_of(sampling: Sampling, run: Run, most: int) -> Tiles:
    """The tiles of a run's image, as queries or as keys."""
    asked = sampling.plan.query_tiles if most == QUERY_TILES else sampling.plan.key_tiles
    return asked if asked is not None else Tiles.of(run.image, most)
