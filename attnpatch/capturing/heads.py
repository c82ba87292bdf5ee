"""``heads``: which heads of a model retrieve, copy, look back or sink."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from attnpatch.capturing.capture import WHOLE, only_model, text_recorder
from attnpatch.capturing.capture_patch import warn_of
from attnpatch.capturing.head_scores import HeadScores
from attnpatch.capturing.probes import Probe, Probes
from attnpatch.errors import CaptureError
from attnpatch.hosts.transformers.calls import parameter_names
from attnpatch.recording.options import CaptureOptions
from attnpatch.recording.text.gathered import nothing, records_by_kind
from attnpatch.recording.text.head_sums import SCORES, HeadSums, Wanted
from attnpatch.recording.text.recorder import Recorder


def heads(
    model: Any,
    probes: Probes | Iterable[Probe | Sequence[int] | torch.Tensor],
    *,
    local: int = 8,
    layers: str | Sequence[int] | None = None,
    sites: str | None = None,
) -> HeadScores:
    """Score every head of a causal language model by what it attends to in sequences whose tokens are known.

    The model runs on one sequence after the other. No N x N matrix is held. Every score is from 0 to 1, a mean over the
    rows that are named below and then over the sequences that have such rows:

    * ``"retrieval"`` (Wu et al. 2024, *Retrieval Head Mechanistically Explains Long-Context Factuality*): the share of
      the answer's tokens that the head copies from the fact. A token is copied if, in the row that predicts it, the
      key with the most attention lies in the fact and is the same token. Only tokens of the answer that occur in the
      fact count. Wu et al. let the model generate; here the right answer is given.
    * ``"induction"`` (Olsson et al. 2022, *In-context Learning and Induction Heads*; their prefix matching score): the
      attention to the token after the earlier occurrence of the row's token, in the second half of repeated random
      tokens.
    * ``"previous"`` (Olsson et al. 2022): the attention to the token before the row's own; all rows but the first.
    * ``"sink"`` (Xiao et al. 2023, *Efficient Streaming Language Models with Attention Sinks*): the attention to the
      first token of the sequence; all rows but the first.
    * ``"local"`` (the recent tokens that Xiao et al. 2023 keep beside the sink): the attention to the last ``local``
      tokens, the row's own included; all rows that have more than these.

    Args:
        model: A causal language model that is called with token ids, in evaluation mode, patched or not.
        probes: ``Probes``, or a list of sequences of token ids.
        local: Number of tokens that are near.
        layers, sites: As in ``capture``.

    Returns:
        ``HeadScores``; prints as a table of the strongest heads.

    Raises:
        CaptureError: The model is in training mode, an option does not fit it, or no head can be scored. A module for
            which a needed fact is not known is in ``scores.left_out`` with the reason, and one ``AttnpatchWarning``
            says so.
        PatchError: As ``apply``.
    """
    if type(local) is not int or local < 1:
        raise CaptureError(
            f"local={local!r} is not accepted; give the number of tokens that are near, 1 or more"
        )
    given = probes if isinstance(probes, Probes) else Probes(probes)
    part = only_model(model, "heads")
    if part.training:
        raise CaptureError(
            "the model is in training mode, where dropout changes what it attends to; call model.eval()"
        )
    current: list[Wanted] = []

    def sums(batch: int, num_heads: int, tokens: int, key_heads: int | None) -> HeadSums:
        return HeadSums.empty(current[-1], num_heads)

    options = CaptureOptions(WHOLE, heads="all", layers=layers, sites=sites, statistics=sums)
    with text_recorder(part, options) as recorder:
        for probe in given:
            current.append(_wanted(probe, local))
            _run(part, probe)
        recorder.finish()
    scores = _gathered(recorder)
    warn_of(scores.left_out, -1, result="scores")
    return scores


def _wanted(probe: Probe, local: int) -> Wanted:
    tokens = len(probe.ids)
    induction = torch.full((tokens,), -1)
    for row, key in probe.induction:
        induction[row] = key
    answers = torch.zeros(tokens, dtype=torch.bool)
    answers[[token - 1 for token in probe.answer]] = True
    return Wanted(torch.tensor(probe.ids), induction, probe.needle, answers, local)


@torch.no_grad()
def _run(part: nn.Module, probe: Probe) -> None:
    weight = next(part.parameters(), None)
    ids = torch.tensor([probe.ids], device=None if weight is None else weight.device)
    # The logits of all tokens would take much more memory than the rest, and nothing reads them.
    known = {"use_cache": False, "logits_to_keep": 1}
    part(ids, **{name: value for name, value in known.items() if name in parameter_names(type(part))})


def _gathered(recorder: Recorder) -> HeadScores:
    """The mean over sequences of each score."""
    left_out = dict(recorder.left_out)
    found: dict[str, list[HeadSums]] = {}
    kinds: list[str] = []
    for sequence in recorder.sequences:
        for number, calls in enumerate(sequence.calls):
            for kind, records in records_by_kind(recorder, calls).items():
                kinds.append(kind)
                for name, record in records.items():
                    found.setdefault(name, []).append(record.measures)
                    if number:
                        left_out[name] = "it is called several times in one call of the model"
                    elif record.notes:
                        left_out[name] = f"{record.notes[0]}; no scores are given for such weights"
                    elif bool((record.measures.later > 1e-4).any()):
                        left_out[name] = "it attends to later tokens, and scores are for causal attention"
    if len(set(kinds)) > 1:
        named = ", ".join(map(repr, dict.fromkeys(kinds)))
        raise CaptureError(f"several kinds of attention ran: {named}; choose one with heads(..., sites=...)")
    found = {name: sums for name, sums in found.items() if name not in left_out}
    if not found:
        if left_out:
            name, reason = next(iter(left_out.items()))
            raise CaptureError(f"no head can be scored. {name or '(model)'}: {reason}")
        raise nothing(recorder)
    most = max(sums[0].sums.shape[1] for sums in found.values())
    tables: dict[str, torch.Tensor] = {}
    for number, name in enumerate(SCORES):
        rows = []
        for sums in found.values():
            means = [one.sums[number] / one.counts[number] for one in sums if bool(one.counts[number].any())]
            mean = torch.stack(means).mean(0) if means else torch.zeros(0)
            rows.append(torch.nn.functional.pad(mean, (0, most - len(mean)), value=torch.nan))
        table = torch.stack(rows).float()
        if not bool(table.isnan().all()):
            tables[name] = table
    return HeadScores(tables, [recorder.place_of(name)[1] for name in found], left_out)
