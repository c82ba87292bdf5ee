"""``Blocks``: how tokens are grouped, specified before the length of the sequence is known."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from attnpatch.blocks.chat.messages import NEXT, Span, message_spans
from attnpatch.blocks.checks import (
    TEMPLATE_OPTIONS,
    check_labels,
    check_spans,
    check_spelling,
    is_nested,
    whole,
)
from attnpatch.blocks.partition import Partition
from attnpatch.blocks.resolving import description, resolved
from attnpatch.blocks.words import text_spans
from attnpatch.errors import BlockError


@dataclass(frozen=True, repr=False)
class Blocks:
    """How the tokens of a sequence are grouped. Make one with ``fixed``, ``spans``, ``messages``, ``texts``, ``words``,
    ``tokens``, ``tiles`` or ``images``.

    Blocks count the tokens of the unpadded sequence, so one object works with any padding. While a sequence grows, the
    blocks of earlier tokens do not change.
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
    texts_by_sequence: tuple[tuple[str, ...], ...] = ()
    block_of_token: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def fixed(cls, size: int) -> "Blocks":
        """Blocks of ``size`` tokens, beginning at the first real token; the last one may be shorter.

        Args:
            size: Tokens per block, at least 1.

        Raises:
            BlockError: ``size`` is not a positive whole number.
        """
        size = whole(size, "the size of a block")
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
            spans: ``[(start, end), ...]``, sorted, without overlap; tokens in gaps belong to no block. For a batch of
                different sequences, a list of such lists, one per sequence.
            labels: One label per span, nested like ``spans``; ``"start:end"`` by default.
            grows: The last block contains all tokens from its start on, also those that are generated later.
            ahead: The sequence is passed in pieces through a cache, so a span may lie beyond its current end.
            after: Label of an additional block for all tokens after the last span. It exists as soon as there are any.

        Raises:
            BlockError: Spans are empty, negative, unsorted or overlap; labels do not match them; or both ``grows`` and
                ``after`` were given.
        """
        per_sequence = is_nested(spans)
        by_sequence = tuple(check_spans(s) for s in (spans if per_sequence else [spans]))
        if labels is None:
            named = tuple(tuple(f"{start}:{end}" for start, end in s) for s in by_sequence)
        else:
            named = check_labels(labels if per_sequence else [labels], by_sequence)
        if not isinstance(after, str) or (grows and after):
            raise BlockError(
                f"after={after!r} with grows={grows!r}; accepted is one of them: a label for the tokens after "
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

        The conversation is rendered with the tokenizer's chat template, like
        ``tokenizer.apply_chat_template(messages)``, and a second time with sentinels that show where each message is.
        Character offsets give its tokens (``attnpatch.blocks.chat.segmentation`` has the method). Text that the
        template writes before the first message belongs to the first block.

        Args:
            tokenizer: A fast tokenizer of transformers with a chat template.
            messages: ``[{"role": ..., "content": ...}, ...]``, or a list of such lists for a batch.
            add_generation_prompt: The prompt ends with the opening of the assistant's next message. It becomes the last
                block, ``"assistant (next)"``, which also contains the generated tokens. Without it, this block exists
                as soon as the sequence is longer than the conversation. With ``continue_final_message=True`` the last
                message's block contains the generated tokens instead.
            **template_options: Passed to ``apply_chat_template`` (``tools=...``, ``enable_thinking=...``).

        Raises:
            BlockError: There is no chat template, the tokenizer has no character offsets, or the template drops,
                merges or moves messages, so that a message has no text of its own.
        """
        if isinstance(messages, Mapping | str) or not isinstance(messages, Sequence) or not messages:
            raise BlockError("messages is empty or not a list; accepted is a list of {'role', 'content'}.")
        check_spelling(template_options, TEMPLATE_OPTIONS)
        per_sequence = not isinstance(messages[0], Mapping)
        spans, labels, ends, texts = [], [], [], []
        conversations = cast("Sequence[Sequence[Mapping]]", messages if per_sequence else [messages])
        for conversation in conversations:
            if not isinstance(conversation, Sequence):
                raise BlockError(
                    f"messages has {conversation!r:.60}; accepted is a list of {{'role', 'content'}}."
                )
            found = message_spans(tokenizer, list(conversation), add_generation_prompt, template_options)
            ends.append(found.end)
            texts.append(found.texts)
            names = [f"{i} {message.get('role', '?')}" for i, message in enumerate(conversation)]
            spans.append(check_spans(found.spans))
            labels.append((*names, NEXT) if add_generation_prompt else tuple(names))
        # The generated answer continues the opened message, or the last message if that is left open.
        grows = bool(add_generation_prompt or template_options.get("continue_final_message"))
        more: dict[str, Any] = {"grows": True} if grows else {"after": NEXT, "after_from": tuple(ends)}
        more["texts_by_sequence"] = tuple(texts)
        return cls("messages", None, tuple(spans), tuple(labels), per_sequence, **more)

    @classmethod
    def texts(
        cls,
        tokenizer: Any,
        prompt: Any,
        texts: Sequence[str] | Sequence[Sequence[str]],
        *,
        labels: Sequence[str] | Sequence[Sequence[str]] | None = None,
        rest: str = "question",
        after: str = "answer",
        **options: Any,
    ) -> "Blocks":
        """One block per given text of a prompt, such as the documents of a RAG prompt.

        Each contiguous part of the prompt that is in no text is a block, too. The part after the last text has the
        label ``rest``, and other parts are ``"question, before doc 1"``. Generated tokens are the block ``after``.
        Blocks are in the order of the prompt, whatever the order of ``texts``.

        Args:
            tokenizer: A fast tokenizer of transformers.
            prompt: A string, chat messages (rendered with the chat template) or token ids; a list of them for a batch.
            texts: The texts, each of them once in the prompt, without overlap; nested for a batch. White space around
                a text may be missing in the prompt. A text that is given twice is there twice.
            labels: One label per text, nested like ``texts``; ``"doc 1"``, ``"doc 2"``, ... by default.
            rest: Label of the part after the last text.
            after: Label of the block of all tokens after the prompt.
            **options: The options that the prompt is tokenized with, such as ``add_special_tokens=False``; for
                messages, options of ``apply_chat_template``, such as ``add_generation_prompt=True``.

        Raises:
            BlockError: A text is not in the prompt, is there more often than given, overlaps another, or begins or ends
                inside a word or has no token of its own; or the tokenizer has no character offsets.
        """
        from attnpatch.blocks.texts import checked_texts, text_parts

        check_spelling(options, ("labels", "rest", "after", *TEMPLATE_OPTIONS))
        if not all(isinstance(name, str) and name for name in (rest, after)):
            raise BlockError(f"rest={rest!r}, after={after!r}; accepted is a label for each.")
        per_sequence = isinstance(texts, list | tuple) and bool(texts) and isinstance(texts[0], list | tuple)
        prompts: Any = prompt if per_sequence else [prompt]
        every: Any = texts if per_sequence else [texts]
        names: Any = labels if per_sequence else [labels]
        names = [None] * len(every) if names is None else names
        if isinstance(prompts, str) or not len(prompts) == len(every) == len(names):
            raise BlockError(
                "prompts, texts and labels of a batch differ in number; give one list per prompt."
            )
        found = [
            text_parts(tokenizer, each, *checked_texts(*given), rest, options)
            for each, given in zip(prompts, zip(every, names, strict=True), strict=True)
        ]
        spans, labelled = tuple(one.spans for one in found), tuple(one.labels for one in found)
        cut = tuple(one.texts for one in found)
        return cls("texts", None, spans, labelled, per_sequence, after=after, texts_by_sequence=cut)

    @classmethod
    def words(cls, tokenizer: Any, prompt: str | Sequence[str], **tokenizer_options: Any) -> "Blocks":
        """One block per word of a text, labelled with the word. Words are separated by white space.

        Special tokens and padding belong to no block.

        Args:
            tokenizer: A fast tokenizer of transformers.
            prompt: The text, or a list of texts for a batch. A text may be empty (a negative prompt), but not all.
            **tokenizer_options: The options that the model's text is tokenized with, such as ``truncation=True,
                max_length=77``. A word that is cut off has no block.

        Raises:
            BlockError: The tokenizer has no character offsets, or no text has a word.
        """
        return cls._of_text("words", tokenizer, prompt, tokenizer_options)

    @classmethod
    def tokens(cls, tokenizer: Any, prompt: str | Sequence[str], **tokenizer_options: Any) -> "Blocks":
        """One block per token of a text, labelled with its characters; otherwise like ``words``."""
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
        return cls(kind, None, spans, labels, per_sequence, texts_by_sequence=labels)

    @classmethod
    def tiles(cls, height: int, width: int, tile: int, *, start: int = 0, frames: int = 1) -> "Blocks":
        """Square tiles of an image whose tokens are in row order; labelled ``"r0c0"``, ``"r0c1"``, ...

        Other tokens of the sequence belong to no block. In a diffusers model the tiles divide the image, not a
        sequence: sites of any resolution are resampled to this grid.

        Args:
            height, width: Size of the image in tokens (size of the latents divided by the patch size; not pixels).
            tile: Edge of a tile in tokens; tiles at the right and the bottom may be smaller.
            start: Number of tokens before the image, such as 1 for a class token, or the text if it comes first.
            frames: Number of frames of a video, one after the other; with several, labels are ``"f0r0c0"``, ...

        Raises:
            BlockError: A number is not whole, or too small.
        """
        image = (
            whole(height, "the height of the image"),
            whole(width, "the width of the image"),
            whole(tile, "the edge of a tile"),
            whole(start, "the start of the image"),
            whole(frames, "the number of frames"),
        )
        if min(*image[:3], image[4]) < 1 or image[3] < 0:
            raise BlockError(
                f"an image of {height} x {width} tokens in tiles of {tile} from token {start} on; accepted are at "
                "least 1 token each, a start of 0 or more, and 1 frame or more."
            )
        return cls("tiles", image=image)

    @classmethod
    def images(
        cls,
        processor: Any,
        inputs: Mapping[str, Any],
        *,
        tile: int | None = None,
        rest: str = "text",
        after: str = "answer",
        images: Any = None,
    ) -> "Blocks":
        """Tiles of each picture in the prompt of a vision-language model, and a block for each part of text.

        Labels are ``"image 1 r0c0"``, ..., ``"video 1 f0 r0c0"``, ...; ``"image 1 other"`` for tokens of a picture that
        show no place in it (the ends of its rows); ``"text, before image 1"``; ``"text"`` after the last picture; and
        ``"answer"`` for generated tokens. A picture that the model sees at two resolutions has a second grid,
        ``"image 1 whole r0c0"``, .... Only the language model's attention is captured with these blocks.

        Args:
            processor: The model's processor. Rows and columns are read from its settings and from ``inputs``, never
                guessed from the number of tokens. Known are LLaVA, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL, 2.5-VL and
                3-VL, InternVL, PaliGemma, Gemma 3, Idefics 2 and 3, SmolVLM, Pixtral, Mistral 3 and Kimi K2.5.
            inputs: What the processor returned, with ``input_ids``; a batch has blocks for each sequence.
            tile: Edge of a tile in tokens; ``None``: at most 16 tiles along the longer edge of each picture.
            rest: Label of the text after the last picture.
            after: Label of the block of all tokens after the prompt.
            images: The pictures as the processor was given them, in order. Only pictures that InternVL's processor cut into
                pieces need them.

        Raises:
            BlockError: The layout of the processor's pictures is not known, a fact is missing, or the facts contradict
                each other.
        """
        from attnpatch.blocks.pictures import picture_blocks

        tile = None if tile is None else whole(tile, "the edge of a tile")
        if tile is not None and tile < 1:
            raise BlockError(f"the edge of a tile is {tile}; accepted is 1 token or more.")
        # By name, because what a processor's output means is a host's matter, and hosts/ stands above blocks/.
        reader = importlib.import_module("attnpatch.hosts.transformers.picture_layouts")
        found = [
            picture_blocks(one, tile, rest) for one in reader.prompts_with_pictures(processor, inputs, images)
        ]
        return cls(
            "images",
            labels_by_sequence=tuple(one.labels for one in found),
            per_sequence=len(found) > 1,
            after=after,
            texts_by_sequence=tuple(one.texts for one in found),
            block_of_token=tuple(one.block_of_token for one in found),
        )

    def resolve(self, valid: Tensor) -> Partition:
        """Find the block of every position of a batch.

        Args:
            valid: ``[batch, total]`` bool, True for real tokens, False for padding, in any position. With a cache,
                call it again with the longer mask; the blocks of earlier tokens do not change.

        Raises:
            BlockError: A span ends after the real tokens of its sequence, or spans were given for another number of
                sequences.
        """
        if not isinstance(valid, Tensor) or valid.dtype != torch.bool or valid.ndim != 2:
            given = f"{valid.dtype} {list(valid.shape)}" if isinstance(valid, Tensor) else repr(type(valid))
            raise BlockError(f"valid is {given}; accepted is a bool tensor [batch, total].")
        return resolved(self, valid.detach().cpu())

    def __repr__(self) -> str:
        return description(self)
