"""A conversation as token ids, and the message that each token belongs to."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from attnpatch.blocks.chat.closing_patterns import Special
from attnpatch.blocks.chat.message_texts import said, text_of, with_calls
from attnpatch.blocks.chat.messages import NEXT, Span, template_of, token_counts
from attnpatch.blocks.chat.segmentation import Division, Segment, divide
from attnpatch.errors import AnalysisError, BlockError

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Truncated:
    """What was cut off a conversation that was too long.

    Attributes:
        side: The end that was cut off; ``"left"`` is the beginning.
        tokens: Number of tokens that are missing.
        messages: Number of messages that are missing completely.
    """

    side: Side
    tokens: int
    messages: int


@dataclass(frozen=True)
class TokenizedChat:
    """A conversation in tokens, divided into blocks.

    Attributes:
        ids: Token ids for the model.
        spans: The span of each block in tokens; sorted, not empty, without gaps or overlaps, from 0 to ``len(ids)``.
        labels: The label of each block: ``"0 system"``, ``"0 system + 1 user"`` if the template joins messages,
            ``"assistant (next)"`` for the generation prompt.
        texts: The text of each block: its messages' content as rendered, and tool calls.
        members: The indices of each block's messages.
        tokens: The text of each token. A character of several tokens is in the text of the first one.
        template: ``"chat template"``, or ``"plain"`` if the tokenizer has none.
        notes: One line for each thing that a reader may not expect.
        truncated: What was cut off; None if nothing was.
    """

    ids: list[int]
    spans: tuple[Span, ...]
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    tokens: tuple[str, ...]
    template: Literal["chat template", "plain"]
    notes: tuple[str, ...] = ()
    truncated: Truncated | None = None


def render(
    tokenizer: Any,
    messages: Sequence[Mapping],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping] | None = None,
    max_tokens: int | None = None,
    truncate: Side | None = None,
    **template_options: Any,
) -> TokenizedChat:
    """Render a conversation with the tokenizer's chat template and find each message's tokens.

    The whole conversation is rendered, and character offsets give the tokens of each message; no text is searched for
    (``attnpatch.blocks.chat.segmentation`` has the method). A block begins where the previous block ends, and ends
    where its last message closes, so role headers and end-of-turn tokens belong to their message. A token belongs to
    the block in which it begins.

    If the template joins a message with the next one (a system message inside the first user turn), both are one block.
    If the template renders nothing of a message, it has no block. Notes report both, and reasoning that the template
    leaves out. Without a chat template each message is ``"role: content"`` on lines of its own, with the special tokens
    that the tokenizer adds.

    Args:
        tokenizer: A fast tokenizer of transformers.
        messages: ``{"role", "content"}``, as ``read_conversations`` gives them.
        add_generation_prompt: Add the opening of the assistant's next message as a last block, if the template has one.
        tools: Passed to the chat template.
        max_tokens: A longer conversation is refused, unless ``truncate`` is given.
        truncate: ``"left"`` drops the beginning (with a beginning-of-sequence token), ``"right"`` drops the end.
        **template_options: Passed to ``apply_chat_template`` (``enable_thinking=...``).

    Raises:
        BlockError: The template refuses, moves or repeats messages, or the tokenizer has no character offsets.
        AnalysisError: The conversation is longer than ``max_tokens``.
    """
    if not isinstance(messages, Sequence) or not all(isinstance(each, Mapping) for each in messages):
        raise AnalysisError(
            f"messages={messages!r:.60} is not accepted; give a list of {{'role': ..., 'content': ...}}"
        )
    messages = list(messages)
    _check(tokenizer, messages, max_tokens, truncate)
    options = dict(template_options)
    if tools:
        options["tools"] = list(tools)
    if getattr(tokenizer, "chat_template", None) or options.get("chat_template"):
        rendered = _by_template(tokenizer, messages, add_generation_prompt, options)
    else:
        rendered = _plain(tokenizer, messages, add_generation_prompt, options)
    return _fitted(rendered, len(messages), max_tokens, truncate)


def _check(tokenizer: Any, messages: list[Any], max_tokens: Any, truncate: Any) -> None:
    if not messages or not all(isinstance(message, Mapping) and "role" in message for message in messages):
        raise BlockError(
            "a conversation is empty, or an element is no {'role', 'content'}; give a list of such messages."
        )
    odd = next((message["role"] for message in messages if not isinstance(message["role"], str)), "")
    if not isinstance(odd, str):
        raise BlockError(f"a message has the role {odd!r:.60}; accepted is text, such as 'user'.")
    if not getattr(tokenizer, "is_fast", False):
        raise BlockError(
            "the tokenizer has no character offsets, so messages cannot be found in its tokens; load a fast one "
            "(AutoTokenizer.from_pretrained(..., use_fast=True) where a tokenizer.json is)."
        )
    if not (truncate is None or (isinstance(truncate, str) and truncate in ("left", "right"))):
        raise AnalysisError(f"truncate is {truncate!r}; accepted are 'left', 'right' and None.")
    if max_tokens is not None and (
        isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1
    ):
        raise AnalysisError(
            f"max_tokens is {max_tokens!r}; accepted is a whole number of at least 1, or None."
        )


def _by_template(tokenizer: Any, messages: list[Mapping], prompt: bool, options: dict) -> TokenizedChat:
    template = template_of(tokenizer, options)
    notes = []
    how: dict[str, Any] = {"prompt": prompt, "special": Special.of(tokenizer)}
    try:
        division = divide(template, messages, options, **how)
    except BlockError:
        # Some templates convert arguments to JSON themselves; others concatenate them as text, which fails on a dict.
        messages, changed = _with_arguments_as_text(messages)
        if not changed:
            raise
        division = divide(template, messages, options, **how)
        notes.append("the arguments of tool calls are passed to the chat template as text")
    notes += division.notes
    if prompt and not division.opening:
        notes.append("the chat template has no opening for the assistant's next message, so it has no block")
    return _in_tokens(tokenizer, messages, replace(division, notes=tuple(notes)), "chat template")


def _with_arguments_as_text(messages: list[Mapping]) -> tuple[list[Mapping], bool]:
    """The messages with the arguments of tool calls as JSON text, and whether that changed any."""
    changed = []
    for message in messages:
        calls = [dict(call) for call in message.get("tool_calls") or () if isinstance(call, Mapping)]
        for call in calls:
            function = call.get("function")
            if isinstance(function, Mapping) and isinstance(function.get("arguments"), Mapping):
                text = json.dumps(function["arguments"], ensure_ascii=False)
                call["function"] = {**function, "arguments": text}
        changed.append({**message, "tool_calls": calls} if calls else message)
    return changed, changed != messages


def _plain(tokenizer: Any, messages: list[Mapping], prompt: bool, options: dict) -> TokenizedChat:
    notes = [
        "the tokenizer has no chat template: each message is 'role: content' on lines of its own (plain)"
    ]
    if options:
        notes.append(f"there is no chat template, so these options are ignored: {', '.join(sorted(options))}")
    pieces = []
    contents = [text_of(message) for message in messages]
    lines = [
        f"{message['role']}: {with_calls(message, content)}\n"
        for message, content in zip(messages, contents, strict=True)
    ]
    end = 0
    for index, line in enumerate(lines):
        end += len(line)
        pieces.append(Segment((index,), end))
    opening = "assistant:" if prompt else ""
    text = "".join([*lines, opening])
    division = Division(text, tuple(pieces), tuple(contents), tuple(notes), opening)
    return _in_tokens(tokenizer, messages, division, "plain")


def _in_tokens(tokenizer: Any, messages: list[Mapping], division: Division, template: Any) -> TokenizedChat:
    """Tokenize a divided text."""
    text = division.text
    try:
        encoded = tokenizer(text, add_special_tokens=template == "plain", return_offsets_mapping=True)
    except (UnicodeEncodeError, TypeError) as error:  # depends on the version of tokenizers
        if not _has_surrogate(text):
            raise
        raise BlockError(
            "a message has a lone surrogate (half of a character); correct the message."
        ) from error
    ids = list(encoded["input_ids"])
    if not ids:
        raise BlockError("the tokenizer gives no tokens for this conversation; use another tokenizer.")
    members = [piece.messages for piece in division.pieces]
    ends = [piece.end for piece in division.pieces]
    if division.opening:
        members.append(())
        ends.append(len(text))
    counts = token_counts(encoded["offset_mapping"], ends)
    labels = [_label(messages, who) for who in members]
    texts = [said(messages, who, division.contents) for who in members]
    notes = list(division.notes)
    spans, kept, begin = [], [], 0
    waiting: list[int] = []
    for block, count in enumerate(counts):
        if count == 0 and not spans:
            waiting.append(block)  # its text is in the first token of the next block
        elif count == 0:
            kept[-1].append(block)
        else:
            spans.append((begin, begin + count))
            kept.append([*waiting, block])
            waiting = []
        if count == 0:
            notes.append(
                f"{labels[block]}: it has no token of its own, so it is part of its neighbour's block"
            )
        begin += count
    return TokenizedChat(
        ids,
        tuple(spans),
        tuple(" + ".join(labels[block] for block in group) for group in kept),
        tuple("\n".join(texts[block] for block in group) for group in kept),
        tuple(tuple(index for block in group for index in members[block]) for group in kept),
        _texts_of_tokens(tokenizer, text, ids, encoded["offset_mapping"]),
        template,
        tuple(notes),
    )


def _texts_of_tokens(
    tokenizer: Any, text: str, ids: Sequence[int], offsets: Sequence[Span]
) -> tuple[str, ...]:
    """The text of each token, by offsets; a token that is part of a character cannot be decoded alone."""
    special, found, begin = {*tokenizer.all_special_ids}, [], 0
    for token, (start, end) in zip(ids, offsets, strict=True):
        if start == end and token in special and not text[begin:end]:
            found.append(tokenizer.convert_ids_to_tokens(token))  # put there by the tokenizer
            continue
        found.append(text[begin:end])
        begin = max(begin, end)
    return tuple(found)


def _label(messages: list[Mapping], who: tuple[int, ...]) -> str:
    return " + ".join(f"{index} {messages[index]['role']}" for index in who) or NEXT


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


def _fitted(rendered: TokenizedChat, count: int, max_tokens: int | None, side: Side | None) -> TokenizedChat:
    """The conversation, truncated if it is too long; a note says what is missing."""
    total = len(rendered.ids)
    if max_tokens is None or total <= max_tokens:
        return rendered
    if side is None:
        raise AnalysisError(
            f"the conversation has {total} tokens, the limit is {max_tokens}; raise the limit, or give truncate='left' "
            "or 'right'."
        )
    first = total - max_tokens if side == "left" else 0
    kept = [
        (block, (max(start - first, 0), min(end - first, max_tokens)))
        for block, (start, end) in enumerate(rendered.spans)
        if end > first and start < first + max_tokens
    ]
    blocks = [block for block, _ in kept]
    cut = blocks[0] if side == "left" else blocks[-1]
    start, end = rendered.spans[cut]
    before = sum(len(who) for who in rendered.members)
    gone = before - sum(len(rendered.members[block]) for block in blocks)
    lost = total - max_tokens
    note = f"truncated from the {side}: {lost} of {total} tokens and {gone} of {count} messages are left out"
    remaining = kept[0 if side == "left" else -1][1]
    if remaining[1] - remaining[0] < end - start:
        note += (
            f", {rendered.labels[cut]} is cut to {remaining[1] - remaining[0]} of its {end - start} tokens"
        )
    return replace(
        rendered,
        ids=rendered.ids[first : first + max_tokens],
        tokens=rendered.tokens[first : first + max_tokens],
        spans=tuple(span for _, span in kept),
        labels=tuple(rendered.labels[block] for block in blocks),
        texts=tuple(rendered.texts[block] for block in blocks),
        members=tuple(rendered.members[block] for block in blocks),
        notes=(*rendered.notes, note),
        truncated=Truncated(side, lost, gone),
    )
