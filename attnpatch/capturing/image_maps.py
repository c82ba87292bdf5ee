"""ImageMaps, the result of capturing a sampler: block maps by kind of attention, and heat maps of words."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attnpatch.capturing.by_kind import ByKind
from attnpatch.errors import CaptureError
from attnpatch.maps.block_map import BlockMap
from attnpatch.plotting import map_figure, overlay
from attnpatch.recording.diffusion.assemble import Reading, kind_of
from attnpatch.recording.diffusion.denoiser_call import TextRow
from attnpatch.recording.diffusion.denoising import Run, Sampling
from attnpatch.recording.diffusion.words import listed, places, plain, why_missing
from attnpatch.recording.options import CaptureOptions

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ImageMaps(ByKind):
    """Block maps of the images that were sampled inside a ``with`` block; by default methods use the last image.

    Args:
        sampling: The collected sums.
        options: The options of the capture.
        model_name: The model's name for the metadata.
    """

    def __init__(self, sampling: Sampling, options: CaptureOptions, model_name: str) -> None:
        self._sampling, self._model_name = sampling, model_name
        self._heads, self._steps = options.heads, options.steps

    @property
    def left_out(self) -> dict[str, str]:
        """For each site that is in no map, the reason."""
        return dict(self._sampling.left_out)

    @property
    def num_runs(self) -> int:
        """Number of runs of the sampler that were captured."""
        return sum(any(run.records.values()) for run in self._sampling.runs)

    @property
    def sites(self) -> dict[str, str]:
        """For each captured site its kind of attention."""
        return {name: kind for kind, names in self._kinds(self._run(-1)).items() for name in names}

    def keys(self) -> list[str]:
        """Kinds of attention that were captured: ``"cross"`` (image to text), ``"self"``, ``"joint"``, ..."""
        return list(self._kinds(self._run(-1)))

    def __getitem__(self, sites: str) -> BlockMap:
        """The map of one kind of attention, or of the sites that match a pattern; see ``map``."""
        return self.map(sites)

    def map(self, sites: str, *, own_grid: bool = False, run: int = -1) -> BlockMap:
        """The block map of some sites; layers have the sites' names.

        Args:
            sites: A kind as ``keys()`` gives it, or a pattern of site names such as ``"*.mid_block.*"``, all of one
                kind.
            own_grid: False brings sites of different resolution to one grid of tiles, by area. True keeps each site's
                own cells (single tokens if these are larger than tiles); then all sites must have the same resolution.
            run: Which run of the sampler, if there were several.

        Returns:
            ``BlockMap``: words first, then tiles (``"r0c0"``, ...). Sequences are the prompts' images in order, then
            those with another text (guidance); ``metadata["sequences"]`` says which is which.

        Raises:
            CaptureError: There is no such site, or they do not fit one map.
        """
        chosen = self._run(run)
        kinds = self._kinds(chosen)
        names = kinds.get(sites)
        if names is None:
            found = {kind: [n for n in each if fnmatch.fnmatchcase(n, sites)] for kind, each in kinds.items()}
            matching = [kind for kind, each in found.items() if each]
            if len(matching) != 1:
                what = "sites of several kinds match" if matching else "nothing was captured at"
                raise CaptureError(
                    f"{what} {sites!r}; there are: {', '.join(map(repr, matching or kinds))}, and their sites"
                )
            names = found[matching[0]]
        return Reading(self._sampling, chosen, self._heads, own_grid).block_map(
            names, self._chosen_steps(chosen), {"model": self._model_name, "sites": sites}
        )

    def heat_map(
        self,
        word: str | int | Sequence[str | int],
        *,
        sequence: int | None = None,
        step: Any = "mean",
        head: Any = "mean",
        sites: str | None = None,
        size: tuple[int, int] | None = None,
        run: int = -1,
    ) -> np.ndarray:
        """Where an image attends to a word: for each tile, the probability that its tokens put on the word's tokens.

        It is the mean over layers of cross-attention, or of joint attention from the image to the text.

        Args:
            word: A word of the prompt, ignoring case and punctuation (all its occurrences), or its number among the
                words. For several words, the mean of their heat maps.
            sequence: Which of the map's sequences; the first image of the prompt when left out.
            step: A step of the sampler if steps were kept separate, or ``"mean"``.
            head: A head's number, if heads were kept separate.
            sites: Pattern of the sites to average; all when left out.
            size: Height and width to which the map is enlarged by linear interpolation.
            run: Which run of the sampler, if there were several.

        Returns:
            float32 ``[rows, columns]`` of tiles; for a video ``[frames, rows, columns]``.

        Raises:
            CaptureError: The word is not in the prompt, or no attention from an image to text was captured.
        """
        return self._heat(self._showing(sites, run), self._run(run), word, sequence, step, head, size)

    def _heat(
        self, maps: list[BlockMap], run: Run, word: Any, sequence: int | None, step: Any, head: Any, size: Any
    ) -> np.ndarray:
        place = self._sequence(maps[0], sequence)
        text = _text_of(maps[0], place, run)
        layers = []
        for one in maps:
            chosen = one.select(sequence=place, step=step, head=head, layer="mean")
            frames, rows, columns = one.metadata["query_tiles"]
            part = chosen.mass.flatten(0, -3).mean(0)[-frames * rows * columns :]
            each = []
            for one_word in listed(word, [label for label, _ in text.words]):
                blocks = [list(text.words[number][1]) for number in places(one_word, text)]
                each.append(torch.stack([part[:, some].sum(1) for some in blocks]).mean(0))
            layers.append(len(one.layers) * torch.stack(each).mean(0).reshape(frames, rows, columns))
        heat = (torch.stack(layers).sum(0) / sum(len(one.layers) for one in maps)).numpy()
        if size is not None:
            heat = np.stack([overlay.resized(frame, *size) for frame in heat])
        return heat[0] if len(heat) == 1 else heat

    def _heats(self, wanted: Sequence[tuple[Any, Any]], options: dict[str, Any]) -> list[np.ndarray]:
        """Heat maps for pairs of word and step, with the options of ``heat_map``; the block maps are made only once."""
        options = {"sequence": None, "step": "mean", "head": "mean", "size": None, **options}
        which = options.pop("run", -1)
        maps, run = self._showing(options.pop("sites", None), which), self._run(which)
        unknown = set(options) - {"sequence", "step", "head", "size"}
        if unknown:
            raise CaptureError(
                f"unknown option {unknown.pop()!r}; there are sequence, step, head, sites, size and run"
            )
        return [self._heat(maps, run, word, **{**options, "step": step}) for word, step in wanted]

    def words(self, *, sequence: int | None = None, run: int = -1) -> list[str]:
        """The words of the prompt for which there is a heat map, each once, in order."""
        one = self._showing(None, run)[0]
        text = _text_of(one, self._sequence(one, sequence), self._run(run))
        labels = (label for label, _ in text.words if plain(label) and not why_missing(label, text))
        return list(dict.fromkeys(labels))

    def plot_overlay(
        self,
        image: Any,
        words: str | Sequence[str] | None = None,
        path: str | os.PathLike | None = None,
        **heat_map: Any,
    ) -> Figure | Path | list[Path]:
        """Draw the heat maps of words over the image.

        Args:
            image: The sampled image: PIL, numpy or torch; for a video a list of frames.
            words: The words; all of the prompt when left out.
            path: ``.png``, ``.svg`` or ``.pdf``: a grid with all words is written there. A folder: one PNG per word.
            **heat_map: Options of ``heat_map``.

        Returns:
            The path, the paths in the folder, or a matplotlib ``Figure`` without a path.

        Raises:
            CaptureError: As ``heat_map``, or the image or the path cannot be used.
            MissingExtraError: matplotlib is not installed.
        """
        if words is None:
            words = self.words(**{name: heat_map[name] for name in ("sequence", "run") if name in heat_map})
        asked = listed(words, ())
        step = heat_map.get("step", "mean")
        found = self._heats([(word, step) for word in asked], heat_map)
        heats = {str(word): heat for word, heat in zip(asked, found, strict=True)}
        if any(heat.ndim == 3 for heat in heats.values()):
            if len(heats) > 1:
                raise CaptureError(
                    f"a video is drawn with one word at a time; give one of {', '.join(heats)}"
                )
            ((word, heat),) = heats.items()
            figure = overlay.frames(image, heat, title=word)
        elif path is not None and not Path(path).suffix:
            return overlay.write_overlays(image, heats, Path(path))
        else:
            figure = overlay.overlay(image, heats)
        return map_figure.write(figure, path)

    def plot_steps(
        self, image: Any, word: str | int, path: str | os.PathLike | None = None, **heat_map: Any
    ) -> Figure | Path:
        """Draw how the heat map of a word forms over the steps of the sampler.

        Args:
            image: The sampled image.
            word, **heat_map: As for ``heat_map``.
            path: ``.png``, ``.svg`` or ``.pdf`` to write; when left out the figure is returned.

        Raises:
            CaptureError: Steps were not kept separate; otherwise as ``heat_map``.
            MissingExtraError: matplotlib is not installed.
        """
        run = self._run(heat_map.get("run", -1))
        if not self._sampling.is_per_step:
            raise CaptureError("steps were averaged; capture with steps='all'")
        steps = self._chosen_steps(run)
        heats = self._heats([(word, step) for step in steps], heat_map)
        if heats[0].ndim == 3:
            raise CaptureError("steps of a video are not drawn; draw one with heat_map(word, step=...)")
        labels = [f"step {step}" for step in steps]
        figure = overlay.steps(image, heats, labels, title=str(word))
        return map_figure.write(figure, path)

    def __repr__(self) -> str:
        said = "nothing captured yet"
        if self.num_runs:
            kinds = ", ".join(f"{kind} at {len(n)} sites" for kind, n in self._kinds(self._run(-1)).items())
            said = f"{self.num_runs} sampled; {kinds}; {len(self.left_out)} left out"
        return "\n".join([f"ImageMaps({said})", *_reasons(self.left_out)])

    # --------------------------------------------------------------------------------------------------------- inside

    def _by_sequence(self) -> list[dict[str, BlockMap]]:
        return [
            {kind: self.map(kind, run=number) for kind in self._kinds(self._run(number))}
            for number in range(self.num_runs)
        ]

    def _run(self, which: int) -> Run:
        runs = [run for run in self._sampling.runs if any(run.records.values())]
        last = self._sampling.runs[-1] if self._sampling.runs else None
        if which == -1 and runs and last is not runs[-1] and last is not None and last.refused:
            # The maps of an earlier image would be taken for this one's.
            out = next((name for name in self.left_out if name in last.refused), "")
            raise CaptureError(
                f"the last image has no map; run={len(runs) - 1} is an earlier one. {out}: {self.left_out.get(out, '')}"
            )
        if not runs:
            left_out = "".join(f"; {site}: {why}" for site, why in list(self.left_out.items())[:3])
            raise CaptureError(
                "nothing was captured: call the pipeline or its denoiser inside the with block, and uncompiled; "
                f"attnpatch.report() says what its attention sites did{left_out}"
            )
        try:
            return runs[which]
        except IndexError:
            raise CaptureError(
                f"run={which}: {len(runs)} runs were captured; give a number below that"
            ) from None

    def _kinds(self, run: Run) -> dict[str, list[str]]:
        kinds: dict[str, list[str]] = {}
        for records in run.records.values():
            for name, record in records.items():
                names = kinds.setdefault(kind_of(record), [])
                if name not in names:
                    names.append(name)
        return kinds

    def _chosen_steps(self, run: Run) -> list[int]:
        count = len(run.timesteps)
        if isinstance(self._steps, str):
            return list(range(count)) if self._steps == "all" else []
        outside = [step for step in self._steps if not -count <= step < count]
        if outside:
            raise CaptureError(
                f"steps={list(self._steps)!r}: there were {count} steps; give numbers below {count}"
            )
        return [step % count for step in self._steps]

    def _showing(self, sites: str | None, run: int) -> list[BlockMap]:
        """Block maps of attention from the image to the text."""
        names = [
            name
            for kind, n in self._kinds(self._run(run)).items()
            if kind in ("cross", "joint")
            or ("image" in kind.split(" to ")[0] and "text" in kind.split(" to ")[-1])
            for name in n
        ]
        names = [name for name in names if sites is None or fnmatch.fnmatchcase(name, sites)]
        if not names:
            raise CaptureError(
                f"no attention of an image to text was captured{f' at {sites!r}' if sites else ''}; there are: "
                f"{', '.join(self.keys())}"
            )
        chosen = self._run(run)
        kinds = {kind: [n for n in each if n in names] for kind, each in self._kinds(chosen).items()}
        reading = Reading(self._sampling, chosen, self._heads, False)
        return [reading.block_map(each, self._chosen_steps(chosen), {}) for each in kinds.values() if each]

    def _sequence(self, one: BlockMap, sequence: int | None) -> int:
        known = one.metadata["sequences"]
        if sequence is None:
            if known[0]["role"] != "prompt" and len({entry["text_number"] for entry in known}) > 1:
                raise CaptureError(
                    f"{len(known)} sequences with different texts were captured, and it is not known which is the prompt's; "
                    "give sequence=... (with guidance the last half is usually the prompt's)"
                )
            return 0
        if not 0 <= sequence < len(known):
            raise CaptureError(
                f"sequence={sequence}: there are {len(known)} sequences; give a number below that"
            )
        return sequence


def _text_of(one: BlockMap, place: int, run: Run) -> TextRow:
    return run.texts[one.metadata["sequences"][place]["text_number"]]


def _reasons(left_out: dict[str, str]) -> list[str]:
    """One line for each reason, with the first sites that it left out."""
    names: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        names.setdefault(reason, []).append(name)
    shown = (
        (", ".join(each[:2]) + (f" and {len(each) - 2} more" if each[2:] else ""), why)
        for why, each in names.items()
    )
    return [f"  left out: {each}: {why}" for each, why in shown]
