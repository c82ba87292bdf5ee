"""The passes over a conversation: its pieces, its blocks, and the model's calls."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from attnpatch import compat
from attnpatch.blocks.spec import Blocks
from attnpatch.capturing.maps import Maps
from attnpatch.conversations.tokenized_chat import NEXT, TokenizedChat
from attnpatch.errors import AnalysisError, CaptureError
from attnpatch.hosts.transformers import caches
from attnpatch.hosts.transformers.loading import ENCODER_DECODER
from attnpatch.maps.block_map import BlockMap
from attnpatch.memory.free import free_bytes
from attnpatch.recording.layers import count_layers


def check_model(model: nn.Module) -> None:
    """Check that a model takes a conversation as one sequence of tokens.

    Raises:
        AnalysisError: It has both an encoder and a decoder, or takes no token ids.
    """
    parameters = inspect.signature(model.forward).parameters
    of_both = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    # An encoder or a decoder taken out of such a model has the same configuration, but takes input_ids.
    if "decoder_input_ids" in parameters or (of_both and "input_ids" not in parameters):
        raise AnalysisError(ENCODER_DECODER.format(type(model).__name__))
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    is_of_text = getattr(model, "main_input_name", "input_ids") == "input_ids"
    if "input_ids" not in parameters and not (takes_any and is_of_text):
        raise AnalysisError(
            f"{type(model).__name__} takes no input_ids, so it cannot read a conversation; give a language model, or "
            "use attnpatch.capture(model, blocks=...)"
        )


def main_sites(maps: Any) -> str:
    """The kind of attention that most layers have."""
    return max(maps.keys(), key=lambda sites: len(maps[sites].layers))


def map_of_text(model: nn.Module, maps: Maps, method: str) -> tuple[str, BlockMap]:
    """The kind of site that most layers have, and its map with the number of all layers of the model.

    Raises:
        AnalysisError: No site has a gradient.
    """
    try:
        sites = main_sites(maps)
    except CaptureError as error:
        if method != "gradient":
            raise
        raise AnalysisError(
            "weighting='gradient' works only with F.scaled_dot_product_attention, which this model does not use; load "
            "it with attn_implementation='sdpa'"
        ) from error
    found = maps[sites]
    layers = count_layers(model, sites, found.metadata["num_layers"])
    return sites, dataclasses.replace(found, metadata={**found.metadata, "num_layers": layers})


def left_out_note(left_out: Mapping[str, str]) -> list[str]:
    """One line that names attention missing from the map and why; empty if none is missing."""
    if not left_out:
        return []
    name, reason = next(iter(left_out.items()))
    more = f" (and {len(left_out) - 1} more)" if len(left_out) > 1 else ""
    return [f"left out of the map: {name}: {reason}{more}"]


def pieces(method: str, rendered: TokenizedChat, chunk_size: int) -> Iterator[tuple[int, int]]:
    """Yields the first token of each pass, and one past its last."""
    if method == "sequential":
        yield from rendered.spans
    elif method == "chunked":
        for start in range(0, len(rendered.ids), chunk_size):
            yield start, min(start + chunk_size, len(rendered.ids))
    else:
        yield 0, len(rendered.ids)


@torch.inference_mode()
def feed(model: nn.Module, ids: torch.Tensor, pieces: Iterator[tuple[int, int]]) -> None:
    """Pass the pieces of a sequence through a model, with a cache if there are several."""
    spans = list(pieces)
    names = inspect.signature(model.forward).parameters
    # The logits are not needed, and for 32k tokens they would take more memory than anything else.
    more: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
    cache, name = None, caches.parameter_of(model)
    if len(spans) > 1:
        if name is None:
            raise AnalysisError(
                f"{type(model).__name__} has no KV cache; analyze it in a single pass, with analyze_conversation"
            )
        cache = caches.new_cache(model, offloaded=is_offloaded(model, ids.numel(), ids.device))
    for start, end in spans:
        mask = torch.ones(1, end, dtype=torch.long, device=ids.device)
        if cache is None or name is None:
            model(input_ids=ids[:, start:end], attention_mask=mask, use_cache=False, **more)
        else:
            handed = {name: cache}
            model(input_ids=ids[:, start:end], attention_mask=mask, use_cache=True, **handed, **more)


def is_offloaded(model: nn.Module, tokens: int, device: torch.device) -> bool:
    """True if a cache of some tokens waits in the host's memory, because it would take half of what a GPU has free.

    Moving a layer there and back takes time in every pass.
    """
    if device.type != "cuda":
        return False
    need = caches.bytes_of(model, tokens)
    return need is None or 2 * need > free_bytes(device)


def blocks_of(kind: str | int, rendered: TokenizedChat, grows: bool) -> tuple[Blocks, list[str]]:
    """The blocks of a conversation, and the text of each.

    Args:
        kind: ``"messages"``, ``"words"`` or a number of tokens.
        rendered: The conversation.
        grows: Whether an answer is generated after it. The answer is the last block; if ``kind`` is a number of tokens,
            the answer is divided into blocks of that size.
    """
    after = NEXT if grows else ""
    if kind == "messages":
        if grows and rendered.labels[-1] == NEXT:
            return Blocks.spans(rendered.spans, rendered.labels, grows=True, ahead=True), list(rendered.texts)
        return Blocks.spans(rendered.spans, rendered.labels, ahead=True, after=after), list(rendered.texts)
    if kind == "words":
        spans, labels = words_of(rendered)
        return Blocks.spans(spans, labels, ahead=True, after=after), list(labels)
    size = int(kind)
    return Blocks.fixed(size), ["".join(piece) for piece in in_pieces(rendered.tokens, size)]


def in_pieces(tokens: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Lists of ``size`` tokens; the last one may be shorter."""
    return [tokens[i : i + size] for i in range(0, len(tokens), size)]


def words_of(rendered: TokenizedChat) -> tuple[list[tuple[int, int]], list[str]]:
    """The token spans of words, and the words. A word begins at a token with leading white space, or at a block."""
    starts = {start for start, _ in rendered.spans}
    spans: list[tuple[int, int]] = []
    texts: list[str] = []
    for place, piece in enumerate(rendered.tokens):
        if not spans or place in starts or (piece[:1].isspace() and texts[-1].strip()):
            spans.append((place, place + 1))
            texts.append(piece)
        else:
            spans[-1] = (spans[-1][0], place + 1)
            texts[-1] += piece
    return spans, [text.strip() or "\u2423" for text in texts]


def text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    get = getattr(config, "get_text_config", None)
    return get() if get is not None else config


def input_device(model: nn.Module) -> torch.device:
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    first = next((embeddings if embeddings is not None else model).parameters(), None)
    hook = getattr(embeddings, compat.ACCELERATE_HOOK, None)
    if hook is not None and getattr(hook, "execution_device", None) is not None:
        return torch.device(hook.execution_device)
    return first.device if first is not None else torch.device("cpu")
