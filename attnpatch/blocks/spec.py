"""What a block is: how tokens are grouped, said before the length of the sequence is known."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from attnpatch.blocks.chat.messages import NEXT, Span, message_spans
from attnpatch.blocks.growing import grown, say_what_is_left_out
from attnpatch.blocks.partition import Partition, blocks_of_tokens, tiled
from attnpatch.blocks.words import text_spans
from attnpatch.errors import BlockError


@dataclass(frozen=True, repr=False)
class Blocks:
    """How the tokens of a sequence are grouped. Make one with ``fixed``, ``spans``, ``messages``, ``words``,
    ``tokens`` or ``tiles``.

    Blocks are counted in tokens of the unpadded sequence, so the same object serves any padding, and the
    blocks of earlier tokens stay what they are while a sequence grows.
    """

    kind: str
    size: int | None = None
    spans_by_sequence: tuple[tuple[Span, ...], ...] = ()
    labels_by_sequence: tuple[tuple[str, ...], ...] = ()
    per_sequence: bool = False
    image: tuple[int, int, int, int, int] | None = None
    grows: bool = False
    ahead: bool = False
    after: str = ""
    after_from: tuple[int, ...] = ()

    @classmethod
    def fixed(cls, size: int) -> "Blocks":
        """Blocks of ``size`` tokens, counted from the first real token; the last one may be shorter.

        Args:
            size: Tokens per block, at least 1.

        Raises:
            BlockError: ``size`` is not a positive whole number.
        """
        size = _whole(size, "the size of a block")
        if size < 1:
            raise BlockError(f"the size of a block is {size}; accepted is 1 token or more.")
        return cls("fixed", size=size)

    @classmethod
    def spans(
        cls,
        spans: Sequence[Span] | Sequence[Sequence[Span]],
        labels: Sequence[str] | Sequence[Sequence[str]] | None = None,
        *,
        grows: bool = False,
        ahead: bool = False,
        after: str = "",
    ) -> "Blocks":
        """Blocks given as half-open spans ``(start, end)`` in tokens of the unpadded sequence.

        Args:
            spans: ``[(start, end), ...]``, sorted, without overlap; a gap belongs to no block. For a batch of
                different sequences a list of such lists, one per sequence.
            labels: One per span, nested like ``spans``; ``"start:end"`` when left out.
            grows: The last block takes all tokens from its first one on, those generated later too.
            ahead: The sequence comes in pieces through a cache: blocks that it has not reached yet are no mistake.
            after: Label of one block more, of all tokens behind the last span, which is there once the sequence is longer.

        Raises:
            BlockError: Spans are empty, negative, unsorted or overlap, labels do not match them, or ``grows`` and
                ``after`` were both given.
        """
        per_sequence = _is_nested(spans)
        by_sequence = tuple(_check_spans(s) for s in (spans if per_sequence else [spans]))
        if labels is None:
            named = tuple(tuple(f"{start}:{end}" for start, end in s) for s in by_sequence)
        else:
            named = _check_labels(labels if per_sequence else [labels], by_sequence)
        if not isinstance(after, str) or (grows and after):
            raise BlockError(
                f"after={after!r} with grows={grows!r}; accepted is one of them: a label for the tokens that come after "
                "the last span, or grows=True to put them into its block."
            )
        return cls("spans", None, by_sequence, named, per_sequence, grows=grows, ahead=ahead, after=after)

    @classmethod
    def messages(
        cls,
        tokenizer: Any,
        messages: Sequence[Mapping] | Sequence[Sequence[Mapping]],
        *,
        add_generation_prompt: bool = False,
        **template_options: Any,
    ) -> "Blocks":
        """One block per chat message, labelled ``"0 system"``, ``"1 user"``, ...

        The conversation is rendered with the tokenizer's chat template, as
        ``tokenizer.apply_chat_template(messages)`` does, and once more with marks that say where each message
        came out; where the conversation cut off after a message ends, that message ends, and character offsets
        say which tokens that is (``attnpatch.blocks.chat.segmentation`` tells how). What the template puts before the
        first message belongs to the first block.

        Args:
            tokenizer: A fast tokenizer of transformers with a chat template.
            messages: ``[{"role": ..., "content": ...}, ...]``, or a list of such lists for a batch.
            add_generation_prompt: The prompt ends with the opening of the assistant's next message, which
                becomes a last block ``"assistant (next)"``, which grows with the tokens that are generated. Without it
                there is such a block once the sequence is longer than the conversation. With
                ``continue_final_message=True`` the last message's block grows.
            **template_options: Handed to ``apply_chat_template`` (``tools=...``, ``enable_thinking=...``).

        Raises:
            BlockError: There is no chat template, the tokenizer gives no offsets, or the template drops,
                merges or moves messages so that a message has no text of its own.
        """
        if isinstance(messages, Mapping | str) or not messages:
            raise BlockError("messages is empty or not a list; accepted is a list of {'role', 'content'}.")
        per_sequence = not isinstance(messages[0], Mapping)
        spans, labels, ends = [], [], []
        conversations = cast("Sequence[Sequence[Mapping]]", messages if per_sequence else [messages])
        for conversation in conversations:
            found, end = message_spans(tokenizer, list(conversation), add_generation_prompt, template_options)
            ends.append(end)
            names = [f"{i} {message.get('role', '?')}" for i, message in enumerate(conversation)]
            spans.append(_check_spans(found))
            labels.append((*names, NEXT) if add_generation_prompt else tuple(names))
        # The answer is the opened message, or one that was left open for it.
        grows = bool(add_generation_prompt or template_options.get("continue_final_message"))
        more = {"grows": True} if grows else {"after": NEXT, "after_from": tuple(ends)}
        return cls("messages", None, tuple(spans), tuple(labels), per_sequence, **more)

    @classmethod
    def words(cls, tokenizer: Any, prompt: str | Sequence[str], **tokenizer_options: Any) -> "Blocks":
        """One block per word of a text, labelled with it; a word is what stands between spaces, as written.

        Special tokens belong to no block, nor does padding.

        Args:
            tokenizer: A fast tokenizer of transformers.
            prompt: The text, or a list of texts for a batch (one of them may be empty, as a negative prompt is).
            **tokenizer_options: As the model's text is tokenized, such as ``truncation=True, max_length=77``. A word
                that is cut off has no block.

        Raises:
            BlockError: The tokenizer gives no offsets, or no text has a word.
        """
        return cls._of_text("words", tokenizer, prompt, tokenizer_options)

    @classmethod
    def tokens(cls, tokenizer: Any, prompt: str | Sequence[str], **tokenizer_options: Any) -> "Blocks":
        """One block per token of a text, labelled with its characters; otherwise as ``words``."""
        return cls._of_text("tokens", tokenizer, prompt, tokenizer_options)

    @classmethod
    def _of_text(cls, kind: str, tokenizer: Any, prompt: Any, options: dict[str, Any]) -> "Blocks":
        per_sequence = not isinstance(prompt, str)
        if per_sequence and not isinstance(prompt, list | tuple):
            raise BlockError(f"prompt is {prompt!r}; accepted is a string, or a list of them for a batch.")
        texts = prompt if per_sequence else [prompt]
        found = [text_spans(tokenizer, text, options, kind == "words") for text in texts]
        if not any(spans for spans, _ in found):
            raise BlockError(f"the prompt {prompt!r} has no {kind}; give a text that has.")
        spans, labels = zip(*found, strict=True)
        return cls(kind, None, spans, labels, per_sequence)

    @classmethod
    def tiles(cls, height: int, width: int, tile: int, *, start: int = 0, frames: int = 1) -> "Blocks":
        """Square tiles of an image whose tokens come row by row; labelled ``"r0c0"``, ``"r0c1"``, ...

        Tokens of the sequence beside the image belong to no block. For a model of diffusers these are parts of the
        image, not of a sequence: sites of any resolution are brought to this grid.

        Args:
            height, width: Of the image, in tokens (of the latents divided by the patch, not pixels).
            tile: Edge of a tile, in tokens; tiles at the right and the bottom may be smaller.
            start: Tokens before the image: 1 with a class token, the text's where it comes first.
            frames: Of a video, one after the other; labelled ``"f0r0c0"``, ... if there are several.

        Raises:
            BlockError: A number is not whole, or too small.
        """
        image = (
            _whole(height, "the height of the image"),
            _whole(width, "the width of the image"),
            _whole(tile, "the edge of a tile"),
            _whole(start, "the start of the image"),
            _whole(frames, "the number of frames"),
        )
        if min(*image[:3], image[4]) < 1 or image[3] < 0:
            raise BlockError(
                f"an image of {height} x {width} tokens in tiles of {tile} from token {start} on; accepted are at "
                "least 1 token each, a start of 0 or more, and 1 frame or more."
            )
        return cls("tiles", image=image)

    def resolve(self, valid: Tensor) -> Partition:
        """Find the block of every position of a batch.

        Args:
            valid: ``[batch, total]`` bool, True for real tokens, False for padding, anywhere. With a cache,
                call it again with the longer mask: the blocks of earlier tokens do not change.

        Raises:
            BlockError: A span reaches past the real tokens of its sequence, or spans were given for another
                number of sequences.
        """
        if not isinstance(valid, Tensor) or valid.dtype != torch.bool or valid.ndim != 2:
            given = f"{valid.dtype} {list(valid.shape)}" if isinstance(valid, Tensor) else repr(type(valid))
            raise BlockError(f"valid is {given}; accepted is a bool tensor [batch, total].")
        valid = valid.detach().cpu()
        if self.image is not None:
            return tiled(self.image, valid)
        lengths = valid.sum(1).tolist()
        say_what_is_left_out(self, lengths)
        spans, labels = self._spans_for(lengths)
        num_blocks = max([1, *(len(s) for s in spans)])
        starts = torch.zeros(len(spans), num_blocks, dtype=torch.int64)
        ends = torch.zeros_like(starts)
        assignment = torch.full(valid.shape, -1, dtype=torch.int64)
        for row, sequence in enumerate(spans):
            if sequence:
                bounds = torch.tensor(sequence, dtype=torch.int64)
                starts[row, : len(sequence)], ends[row, : len(sequence)] = bounds.T
                of_token = blocks_of_tokens(bounds, lengths[row])
                assignment[row, valid[row]] = of_token
        return Partition(assignment, ends - starts, starts, ends, labels)

    def _spans_for(
        self, lengths: Sequence[int]
    ) -> tuple[list[tuple[Span, ...]], tuple[tuple[str, ...], ...]]:
        if self.kind == "fixed":
            size = self.size
            assert size is not None
            spans = [tuple((i, min(i + size, n)) for i in range(0, n, size)) for n in lengths]
            return spans, tuple(tuple(f"{start}:{end}" for start, end in s) for s in spans)
        given = len(self.spans_by_sequence)
        if self.per_sequence and given != len(lengths):
            raise BlockError(
                f"blocks were given for {given} sequences, the batch has {len(lengths)}; give one list of "
                "spans or messages per sequence, or a single one for all."
            )
        rows = range(given) if self.per_sequence else [0] * len(lengths)
        found = [
            grown(self, row, place, length)
            for place, (row, length) in enumerate(zip(rows, lengths, strict=True))
        ]
        return [spans for spans, _ in found], tuple(labels for _, labels in found)

    def __repr__(self) -> str:
        if self.kind == "fixed":
            return f"Blocks.fixed({self.size})"
        if self.image is not None:
            height, width, tile, start, frames = self.image
            more = f", start={start}" * (start > 0) + f", frames={frames}" * (frames > 1)
            return f"Blocks.tiles({height}, {width}, {tile}{more})"
        shown = []
        for sequence, labels in zip(self.spans_by_sequence, self.labels_by_sequence, strict=True):
            names = [f"{label!r}" for label in labels]
            if len(names) > 6:
                names = [*names[:3], "...", *names[-2:]]
            end = sequence[-1][1] if sequence else 0
            shown.append(f"{len(sequence)} blocks to token {end}: {', '.join(names)}")
        if len(shown) > 3:
            shown = [*shown[:2], f"... {len(shown)} sequences"]
        return f"Blocks.{self.kind}({'; '.join(shown)})"


def _whole(value: Any, what: str) -> int:
    """``value`` as an int; unlike ``int()`` it refuses bools, floats and strings instead of rounding them."""
    try:
        if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool:
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise BlockError(f"{what} is {value!r}; accepted is a whole number of tokens.") from None


def _is_nested(spans: Any) -> bool:
    try:
        first = spans[0]
        return isinstance(first[0], Sequence) and not isinstance(first[0], str)
    except (TypeError, IndexError, KeyError):
        return False


def _check_spans(spans: Any) -> tuple[Span, ...]:
    try:
        pairs = [tuple(pair) for pair in spans]
    except TypeError:
        raise BlockError(f"spans is {spans!r}; accepted is a list of (start, end) in tokens.") from None
    if not pairs:
        raise BlockError("there are no spans; give at least one (start, end) per sequence.")
    checked = []
    for pair in pairs:
        if len(pair) != 2:
            raise BlockError(f"span {pair!r} has {len(pair)} numbers; accepted is (start, end) in tokens.")
        start, end = (_whole(edge, f"an edge of span {pair!r}") for edge in pair)
        if start < 0 or end <= start:
            raise BlockError(f"span ({start}, {end}) is empty or negative; accepted is 0 <= start < end.")
        checked.append((start, end))
    for before, after in pairwise(checked):
        if after[0] < before[1]:
            problem = "overlap" if after[1] > before[0] else "are not sorted"
            raise BlockError(f"spans {before} and {after} {problem}; give them in order, without overlap.")
    return tuple(checked)


def _check_labels(labels: Any, spans: tuple[tuple[Span, ...], ...]) -> tuple[tuple[str, ...], ...]:
    counts = [len(s) for s in spans]
    fits = (
        isinstance(labels, Sequence)
        and [
            len(s)
            for s in labels
            if isinstance(s, list | tuple) and all(isinstance(label, str) for label in s)
        ]
        == counts
    )
    if not fits or len(labels) != len(counts):
        raise BlockError(f"labels do not match the {counts} spans; give one string per span, nested alike.")
    return tuple(tuple(sequence) for sequence in labels)
