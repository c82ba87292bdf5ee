"""Finds the prompt's words among a denoiser's text tokens, by finding the text encoders' outputs in its inputs.

Pipelines cut templates off, drop padding, and put several encoders' tokens one after another or side by side. The
values stay the same, so they tell which token each row is (``token_matching.py``), and the token ids tell the words
(``prompt_rows.py``).
"""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from attnpatch.hosts.diffusers.prompt_rows import Placed, Word, placed, row_of
from attnpatch.hosts.diffusers.token_matching import Encoded, pieces_of
from attnpatch.hosts.transformers.calls import parameter_names
from attnpatch.recording.diffusion.denoiser_call import TextRow
from attnpatch.rows.provenance.tensors import tensors_in

# Number of latest calls whose encodings are kept per encoder: a prompt may be encoded in several, and a text encoder
# that generates (prompt enhancement) is called for every token.
_MOST = 16


class Prompts:
    """Watches the text encoders of a pipeline.

    Args:
        parts: The pipeline's modules by name.
        tokenizers: Its tokenizers by name: ``tokenizer_2`` belongs to ``text_encoder_2``.
    """

    def __init__(self, parts: dict[str, nn.Module], tokenizers: dict[str, Any]) -> None:
        self.encoders = {
            part: tokenizers.get(name.replace("text_encoder", "tokenizer"))
            for name, part in parts.items()
            if name.startswith("text_encoder") and "input_ids" in parameter_names(type(part))
        }
        self.texts: list[tuple[str, str]] = []
        self.encoded: dict[nn.Module, list[Encoded]] = {part: [] for part in self.encoders}
        # The number of rows of each encoder's latest calls.
        self._rows: dict[nn.Module, collections.deque[int]] = {}
        self._is_called = False
        self._running: set[nn.Module] = set()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record the encoders' outputs inside the block."""
        handles = []
        for part in self.encoders:
            handles.append(part.register_forward_pre_hook(lambda part, _: self._running.add(part)))
            handles.append(part.register_forward_hook(self._returned, with_kwargs=True))
            for name, norm in part.named_modules():
                if name.endswith("final_layer_norm"):
                    normed = functools.partial(self._normed, part)
                    handles.append(norm.register_forward_hook(normed))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.encoded = {part: [] for part in self.encoders}

    def begin(self, texts: list[tuple[str, str]]) -> None:
        """A pipeline is called with these texts and roles. Earlier encodings are kept, because they may be passed to
        the call.
        """
        self.texts, self._is_called = texts, True

    def end(self) -> None:
        """The call has ended: drop encodings made in it; earlier ones are kept for the next call."""
        self._is_called = False
        self.encoded = {part: [e for e in kept if not e.is_own] for part, kept in self.encoded.items()}

    def _normed(self, part: nn.Module, norm: nn.Module, args: Any, output: Any) -> None:
        """Record the final norm of an earlier layer's states, because a pipeline with ``clip_skip`` calls that norm."""
        if part in self._running or not args or not isinstance(output, torch.Tensor):
            return
        for row, state in zip(args[0].detach(), output.detach(), strict=True):
            for encoded in self.encoded[part]:
                if any(each.shape == row.shape and torch.equal(each, row) for each in encoded.states):
                    encoded.states.append(state.clone())

    def _returned(self, part: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self._running.discard(part)
        given = {**dict(zip(parameter_names(type(part)), args, strict=False)), **kwargs}
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
            return
        states = [state for state in tensors_in(output) if state.dim() == 3 and state.shape[:2] == ids.shape]
        kept = self.encoded[part]
        for row, each in enumerate(ids.tolist()):
            is_masked = isinstance(mask, torch.Tensor) and mask.shape == ids.shape
            real = int((mask[row] != 0).sum()) if is_masked else len(each)
            # They are copies, since a caller may change the returned tensors in place.
            rows = [state[row].detach().clone() for state in states]
            kept.append(Encoded(self.encoders[part], each, real, rows, self._is_called))
        rows = self._rows.setdefault(part, collections.deque(maxlen=_MOST))
        rows.append(len(ids))
        del kept[: -sum(rows)]

    def find(self, text: torch.Tensor) -> list[TextRow | None]:
        """The text of each batch row of a denoiser's text input ``[batch, tokens, width]``; ``None``: not found."""
        return [self._row(row) for row in text.detach()]

    def _row(self, given: torch.Tensor) -> TextRow | None:
        found: list[Placed] = []
        words: dict[tuple[str, int], Word] = {}
        before = 0
        for encodings in self.encoded.values():
            width = max((state.shape[1] for encoded in encodings for state in encoded.states), default=0)
            # The features of several encoders may be concatenated, in the order of the encoders.
            pieces = pieces_of(given, encodings, tuple(dict.fromkeys([0, before])))
            before += width
            if pieces:
                found.append(placed(pieces, self.texts, words))
        return row_of(found, words, len(given)) if found else None
