"""``token_scores``: how much attention each key token receives, and ``TokenScores``, what it yields."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from attnpatch.capturing.capture import WHOLE, only_model, text_recorder
from attnpatch.capturing.capture_patch import warn_of
from attnpatch.errors import CaptureError
from attnpatch.hosts.transformers import caches
from attnpatch.recording.accumulator import SiteSums
from attnpatch.recording.options import CaptureOptions
from attnpatch.recording.statistics import Measures, Statistics
from attnpatch.recording.text.gathered import nothing, records_by_kind
from attnpatch.recording.text.last_rows import LastRows
from attnpatch.recording.text.recorder import Recorder

PER = ("kv_head", "head", "mean")


@contextlib.contextmanager
def token_scores(
    model: Any,
    window: int | None = 64,
    per: str = "kv_head",
    *,
    layers: str | Sequence[int] | None = None,
    sites: str | None = None,
) -> Iterator[TokenScores]:
    """Sum the attention that each key token receives, while a model runs inside the ``with`` block.

    These are the scores by which tokens are evicted from a KV cache or pruned: the column sums of the attention
    matrix, exactly, with no N x N matrix held. H2O sums all query rows (``window=None``; Zhang et al. 2023, *H2O:
    Heavy-Hitter Oracle*). SnapKV sums the last rows of the prompt (``window=64``; Li et al. 2024, *SnapKV: LLM Knows
    What You are Looking for Before Generation*). FastV takes the row of the last token, averaged over heads
    (``window=1, per="mean"``; Chen et al. 2024, *An Image is Worth 1/2 Tokens After Layer 2*).

    A fused kernel stays in use. Beside it, the probabilities of the rows that are summed are computed once more, a few
    rows at a time.

    Args:
        model: A model, patched or not; afterwards it is as it was before.
        window: Sum only the last ``window`` query rows of each sequence, padding not counted. The rows may be in
            several calls that continue a cache: after a prompt and ten generated tokens, ``window=64`` is 54 rows of
            the prompt and ten others. ``None``: all query rows.
        per: ``"kv_head"``: a score for each head of keys, the mean over the query heads that share it; ``"head"``: one
            for each query head; ``"mean"``: one for all, the mean over heads.
        layers, sites: As in ``capture``.

    Yields:
        ``TokenScores``: ``scores[layer]`` is float32 ``[batch, kv_heads, keys]``, for the last sequence (or batch) that
        began. A call that continues a cache adds to its sequence. While a ``window`` is used, the latest rows are held
        one by one in the host's memory, ``4 * window`` bytes per layer, key and head.

    Raises:
        CaptureError: An option does not fit the model. A layer for which a needed fact is not known has no scores:
            ``scores.left_out`` has the reason, ``scores[layer]`` raises it, and one ``AttnpatchWarning`` says so.
        PatchError: As ``apply``.
    """
    if window is not None and (type(window) is not int or window < 1):
        raise CaptureError(
            f"window={window!r} is not accepted; give the number of query rows to sum, 1 or more, or None for all"
        )
    if not isinstance(per, str) or per not in PER:
        raise CaptureError(f"per={per!r} is not accepted; give 'kv_head', 'head' or 'mean'")
    part = only_model(model, "token_scores")

    def last_rows(batch: int, heads: int, tokens: int, key_heads: int | None) -> Statistics:
        places = {"head": heads, "mean": 1, "kv_head": key_heads or heads}[per]
        return LastRows.empty(window or 1, batch, heads, places, tokens)

    options = CaptureOptions(
        WHOLE,
        heads="mean" if per == "mean" else "all",
        layers=layers,
        sites=sites,
        measures=("received",) if window is None else (),
        window=window,
        statistics=None if window is None else last_rows,
    )
    with text_recorder(part, options) as recorder:
        _read_key_heads(recorder, part)
        scores = TokenScores(recorder, window, per)
        try:
            yield scores
        finally:
            recorder.finish()
            scores.end()
    warn_of(scores.left_out, result="scores")


def _read_key_heads(recorder: Recorder, part: nn.Module) -> None:
    modules, site_call = dict(part.named_modules()), recorder.site_call

    def read(call: Any, name: str, args: Any, kwargs: Any) -> Any:
        facts = site_call(call, name, args, kwargs)
        facts.key_heads_of = lambda heads: caches.key_heads(modules[name], facts.cache, heads)
        return facts

    recorder.site_call = read


class TokenScores:
    """The attention that each key token receives, by layer: filled while the model runs, read afterwards.

    ``scores[layer]`` is float32 ``[batch, heads, keys]`` on the CPU; ``heads`` are those of ``per``, 1 for ``"mean"``.
    Keys are numbered by position in the sequence, padding included, which has the score 0. ``scores.layers`` are the
    layers, ``len(scores)`` is their number, and iterating gives their tensors.

    Args:
        recorder: Collects the sums.
        window: The number of query rows that are summed; ``None``: all.
        per: As in ``token_scores``.
    """

    def __init__(self, recorder: Recorder, window: int | None, per: str) -> None:
        self._recorder, self.window, self.per = recorder, window, per
        self._made: tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]] | None = None
        self._has_ended = False

    def end(self) -> None:
        """Called when the ``with`` block has ended: from now on scores are made once."""
        self._has_ended = True

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers that have scores, the model's own.

        Raises:
            CaptureError: There are no scores, or layers of several kinds of attention.
        """
        return list(self._scores()[0])

    @property
    def left_out(self) -> dict[str, str]:
        """Attention modules without scores, each with the fact that is not known."""
        found = dict(self._recorder.left_out)
        for records in self._records().values():
            reasons = ((name, self._why_not(each)) for name, each in records.items())
            found |= {name: reason for name, reason in reasons if reason is not None}
        return found

    @property
    def real(self) -> torch.Tensor:
        """Bool ``[batch, keys]``: the keys that are no padding.

        Raises:
            CaptureError: As ``layers``.
        """
        return next(iter(self._scores()[1].values()))  # all layers have the same keys: they are of one kind

    def __getitem__(self, layer: int) -> torch.Tensor:
        """The scores of a layer, float32 ``[batch, heads, keys]``; negative numbers count layers from the last.

        Raises:
            CaptureError: It has no scores; the message says why.
        """
        found = self._scores()[0]
        known = list(found)
        number = known[layer] if -len(known) <= layer < 0 else layer
        if number not in found:
            raise CaptureError(f"layer {layer} has no scores; there are: {known}{self._reason_for(layer)}")
        return found[number]

    def __len__(self) -> int:
        return len(self._scores()[0])

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self._scores()[0].values())

    def top(self, k: int, recent: int = 0) -> dict[int, torch.Tensor]:
        """The positions of the ``k`` keys with the highest scores, for each layer.

        Args:
            k: Number of keys. Padding is not among them.
            recent: The last ``recent`` real keys of each sequence are among them, whatever their scores.

        Returns:
            int64 ``[batch, heads, k]`` by layer; recent keys first, then by falling score.

        Raises:
            CaptureError: A sequence has fewer than ``k`` real keys; or as ``layers``.
        """
        scores, real = self._scores()
        least = min(int(each.sum(-1).min()) for each in real.values())
        if type(k) is not int or type(recent) is not int or not 0 <= recent <= k <= least or not k:
            raise CaptureError(
                f"top({k!r}, recent={recent!r}) is not accepted; give k from 1 to {least}, the number of keys of the "
                "shortest sequence, and recent up to k"
            )
        found = {}
        for layer, values in scores.items():
            own = real[layer]
            after = own.flip(-1).cumsum(-1).flip(-1)  # real keys from this one on
            values = values.masked_fill(~own[:, None], -torch.inf)
            values = values.masked_fill((own & (after <= recent))[:, None], torch.inf)
            found[layer] = values.topk(k).indices
        return found

    def __repr__(self) -> str:
        left_out = self.left_out
        try:
            tensors = self._scores()[0]
        except CaptureError as error:
            return f"TokenScores({error})"
        batch, _, keys = next(iter(tensors.values())).shape
        heads = sorted({values.shape[1] for values in tensors.values()})
        rows = "all query rows" if self.window is None else f"the last {self.window} query rows"
        named = {"kv_head": "KV heads", "head": "heads", "mean": "mean over heads"}[self.per]
        number = "" if self.per == "mean" else f"{' or '.join(map(str, heads))} "
        first = f"TokenScores({len(tensors)} layers, batch of {batch}, {number}{named}, {keys} keys; sums of {rows})"
        return "\n".join([first, *(f"  left out: {name}: {reason}" for name, reason in left_out.items())])

    # --------------------------------------------------------------------------------------------------------- inside

    def _scores(self) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
        """The scores by layer, and by layer which keys are real."""
        if self._made is not None:
            return self._made
        kinds = self._records()
        if not kinds:
            raise nothing(self._recorder)
        if len(kinds) > 1:
            raise CaptureError(
                f"several kinds of attention ran: {', '.join(map(repr, kinds))}; choose one with token_scores(..., sites=...)"
            )
        (records,) = kinds.values()
        known = {name: each[0] for name, each in records.items() if self._why_not(each) is None}
        if not known:
            name, reason = next(iter(self.left_out.items()))
            raise CaptureError(f"there are no scores. {name}: {reason}")
        place = self._recorder.place_of
        made = (
            {place(name)[1]: self._of(record) for name, record in known.items()},
            {place(name)[1]: record.key.assignment >= 0 for name, record in known.items()},
        )
        self._made = made if self._has_ended else None
        return made

    def _records(self) -> dict[str, dict[str, list[SiteSums]]]:
        """The records of the last sequence, by kind of site and site: one for each time that it is called in a call."""
        found: dict[str, dict[str, list[SiteSums]]] = {}
        for sequence in self._recorder.sequences[-1:]:
            for calls in sequence.calls:
                for kind, records in records_by_kind(self._recorder, calls).items():
                    for name, record in records.items():
                        found.setdefault(kind, {}).setdefault(name, []).append(record)
        return found

    def _why_not(self, each: list[SiteSums]) -> str | None:
        record = each[0]
        if len(each) > 1:
            return f"it is called {len(each)} times in one call of the model, so its layer has several scores"
        if record.notes:
            return f"{record.notes[0]}; no scores are given for such weights"
        if self.per == "kv_head" and record.key_heads is None:
            return "it is not known which heads share a head of keys; choose per='head' or per='mean'"
        return None

    def _of(self, record: SiteSums) -> torch.Tensor:
        """Scores of a layer, float32 ``[batch, heads, keys]``."""
        measures = record.measures
        if isinstance(measures, LastRows):
            summed = measures.received()
        else:
            assert isinstance(measures, Measures)
            summed = measures.received
        heads = {"head": record.num_heads, "mean": 1, "kv_head": record.key_heads}[self.per]
        assert heads is not None
        summed = summed.unflatten(1, (heads, -1)).sum(2) / (record.num_heads // heads)
        return summed[..., : record.key.assignment.shape[1]].float()

    def _reason_for(self, layer: int) -> str:
        places = self._recorder.places
        reasons = (why for name, why in self.left_out.items() if name in places and places[name][1] == layer)
        return "".join(f". It is left out: {reason}" for reason in list(reasons)[:1])
