"""Sequences of tokens on which heads are scored: what a head should attend to is known for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch

from attnpatch.blocks.spec import Blocks
from attnpatch.errors import CaptureError


@dataclasses.dataclass(frozen=True)
class Probe:
    """One sequence of tokens.

    Attributes:
        ids: Its token ids.
        induction: Pairs of a row and the key that an induction head attends to: the token after an earlier occurrence
            of the row's token.
        needle: First token of the fact that is to be retrieved, and one past its last.
        answer: Positions of the tokens of the answer that occur in the fact.
    """

    ids: tuple[int, ...]
    induction: tuple[tuple[int, int], ...] = ()
    needle: tuple[int, int] = (0, 0)
    answer: tuple[int, ...] = ()


class Probes:
    """A list of sequences for ``attnpatch.heads``; two lists are joined by ``+``.

    Args:
        probes: Sequences of token ids (lists, or tensors ``[tokens]``). They measure previous-token, sink and local
            scores. ``Probes.repeated`` makes sequences for induction as well, ``Probes.needles`` and
            ``Probes.conversations`` for retrieval.

    Raises:
        CaptureError: There is no sequence, or one has fewer than two tokens.
    """

    def __init__(self, probes: Iterable[Probe | Sequence[int] | torch.Tensor]) -> None:
        if not isinstance(probes, Iterable) or isinstance(probes, (str, bytes)):
            raise CaptureError(
                f"probes={probes!r:.60} is not accepted; give a list of sequences of token ids"
            )
        self._probes = tuple(map(_probe, probes))
        if not self._probes:
            raise CaptureError("there are no probes; give at least one sequence of token ids")

    @classmethod
    def repeated(cls, vocabulary: Any, count: int = 4, length: int = 64, seed: int = 0) -> Probes:
        """Random tokens, twice in a row (Olsson et al. 2022): only induction tells the second half.

        Args:
            vocabulary: A tokenizer, or a list of token ids. A tokenizer gives its ordinary tokens, and its
                beginning-of-sequence token, if it has one, comes first.
            count: Number of sequences.
            length: Number of tokens that are repeated; all different.
            seed: Seed of the draw.

        Raises:
            CaptureError: There are fewer than ``length`` different tokens, or a number is below 1.
        """
        first: tuple[int, ...] = ()
        if hasattr(vocabulary, "get_vocab"):
            special = {*vocabulary.all_special_ids, *getattr(vocabulary, "added_tokens_decoder", ())}
            begin = getattr(vocabulary, "bos_token_id", None)
            first = () if begin is None else (begin,)
            vocabulary = set(vocabulary.get_vocab().values()) - special
        tokens = set(vocabulary) if isinstance(vocabulary, Iterable) else set()
        if not tokens or not all(isinstance(token, Integral) for token in tokens):
            raise CaptureError(
                f"vocabulary={vocabulary!r:.60} is not accepted; give a tokenizer, or a list of token ids"
            )
        known = torch.tensor(sorted(map(int, tokens)))
        whole = all(type(number) is int for number in (count, length, seed))
        if not whole or count < 1 or not 2 <= length <= len(known):
            raise CaptureError(
                f"count={count}, length={length} are not accepted; give 1 sequence or more, and a length from 2 to "
                f"{len(known)}, the number of tokens"
            )
        generator = torch.Generator().manual_seed(seed)
        found = []
        for _ in range(count):
            drawn = known[torch.randperm(len(known), generator=generator)[:length]].tolist()
            start = len(first)
            pairs = tuple((start + length + i, start + i + 1) for i in range(length))
            found.append(Probe((*first, *drawn, *drawn), pairs))
        return cls(found)

    @classmethod
    def needles(
        cls, tokenizer: Any, pairs: Iterable[tuple[str, tuple[int, int]]], separator: str = " "
    ) -> Probes:
        """Texts that state a fact and end with a question, or with the beginning of the answer.

        Args:
            tokenizer: A tokenizer that tells the characters of each token (a "fast" one).
            pairs: A text, and where it states the answer: first character, and one past the last. The answer is
                appended to the text, and a head retrieves if it copies it from there.
            separator: What stands between the text and the answer.

        Raises:
            CaptureError: A span is not in its text, or no token of the answer occurs in it.
        """
        found = []
        for text, (start, stop) in pairs:
            if not 0 <= start < stop <= len(text):
                raise CaptureError(
                    f"span ({start}, {stop}) is not in a text of {len(text)} characters; give the first character of the "
                    "answer and one past its last"
                )
            begin = len(text) + len(separator)
            whole = text + separator + text[start:stop]
            ids, places = _tokens(tokenizer, whole, True)
            needle = _inside(places, start, stop)
            answer = _inside(places, begin, len(whole))
            found.append(_needle(ids, (needle[0], needle[-1] + 1), answer))
        return cls(found)

    @classmethod
    def conversations(
        cls, tokenizer: Any, conversations: Iterable[tuple[Sequence[Mapping[str, str]], int, str]]
    ) -> Probes:
        """Conversations in which one known message states a fact that the last message asks for.

        Args:
            tokenizer: A "fast" tokenizer with a chat template.
            conversations: The messages (dicts with ``role`` and ``content``), the index of the message with the fact,
                and the answer, which is appended as the assistant's message.

        Raises:
            CaptureError: There is no such message, or no token of the answer occurs in it.
            BlockError: Messages cannot be found in the tokens, as for ``Blocks.messages``.
        """
        found = []
        for messages, fact, answer in conversations:
            if not 0 <= fact < len(messages):
                raise CaptureError(
                    f"there is no message {fact}; the conversation has {len(messages)}, from 0 on"
                )
            whole = [*map(dict, messages), {"role": "assistant", "content": answer}]
            spans = Blocks.messages(tokenizer, whole).spans_by_sequence[0]
            text = tokenizer.apply_chat_template(whole, tokenize=False)
            ids, places = _tokens(tokenizer, text, False)
            templated = tokenizer.apply_chat_template(whole, return_dict=True)["input_ids"]
            begin = text.rfind(answer.strip())
            if begin < 0 or list(templated) != ids:
                raise CaptureError(
                    "the answer cannot be found in the tokens of the conversation: its chat template changes it, or "
                    "tokenizes other text than it returns; use Probes.needles"
                )
            said = [t for t in _inside(places, begin, begin + len(answer.strip())) if t >= spans[-1][0]]
            found.append(_needle(ids, spans[fact], said))
        return cls(found)

    def __add__(self, other: Probes) -> Probes:
        return Probes([*self, *other])

    def __len__(self) -> int:
        return len(self._probes)

    def __iter__(self) -> Iterator[Probe]:
        return iter(self._probes)

    def __repr__(self) -> str:
        lengths = [len(probe.ids) for probe in self]
        induction = sum(bool(probe.induction) for probe in self)
        retrieval = sum(bool(probe.answer) for probe in self)
        return (
            f"Probes({len(self)} sequences of {min(lengths)} to {max(lengths)} tokens; {induction} for induction, "
            f"{retrieval} for retrieval)"
        )


def _probe(value: Any) -> Probe:
    if isinstance(value, Probe):
        return value
    ids = value.tolist() if hasattr(value, "tolist") else value
    ids = list(ids) if isinstance(ids, Iterable) else []
    if len(ids) < 2 or not all(type(token) is int for token in ids):
        raise CaptureError(
            f"a probe is {value!r:.60}; give a list of at least two token ids, or a tensor of them with one dimension"
        )
    return Probe(tuple(ids))


def _tokens(tokenizer: Any, text: str, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text, and for each its first character and one past its last."""
    if not getattr(tokenizer, "is_fast", False):
        raise CaptureError(
            "the tokenizer does not tell the characters of each token; load it with use_fast=True"
        )
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    return list(found["input_ids"]), [(start, stop) for start, stop in found["offset_mapping"]]


def _inside(places: Sequence[tuple[int, int]], start: int, stop: int) -> list[int]:
    """The tokens that have characters of a span."""
    return [token for token, (first, end) in enumerate(places) if max(first, start) < min(end, stop)]


def _needle(ids: list[int], needle: tuple[int, int], answer: list[int]) -> Probe:
    fact = set(ids[needle[0] : needle[1]])
    kept = tuple(token for token in answer if ids[token] in fact)
    if not kept:
        raise CaptureError("no token of the answer occurs in the fact, so no head could copy it from there")
    return Probe(tuple(ids), (), needle, kept)
