"""The backward pass of a gradient-weighted map: chooses what is differentiated, and runs it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from attnpatch.conversations.tokenized_chat import TokenizedChat
from attnpatch.errors import AnalysisError


def target_positions(
    target: str | Sequence[int], rendered: TokenizedChat, messages: Sequence[Mapping]
) -> list[int]:
    """The tokens whose log-probability is differentiated.

    Args:
        target: ``"answer"``, or positions of tokens.
        rendered: The conversation in tokens.
        messages: The conversation's messages.

    Raises:
        AnalysisError: There is no answer, or no token at a position.
    """
    count = len(rendered.ids)
    if isinstance(target, str):
        if target != "answer":
            raise AnalysisError(f"target={target!r} is not accepted; give 'answer' or positions of tokens")
        for (start, end), members in reversed(list(zip(rendered.spans, rendered.members, strict=True))):
            if any(messages[i].get("role") == "assistant" for i in members):
                return list(range(max(1, start), end))
        raise AnalysisError(
            "this conversation has no message of the assistant; give target=[positions of tokens]"
        )
    outside = [place for place in target if type(place) is not int or not 1 <= place < count]
    if outside or not target:
        raise AnalysisError(
            f"target={list(target)!r}: give positions from 1 to {count - 1} (the first token cannot be predicted)"
        )
    return sorted(set(target))


def attributed(model: nn.Module, ids: torch.Tensor, positions: list[int], checkpointing: bool) -> float:
    """Run a model forward and backward on the log-probability of some tokens, so that a capture receives the gradients.

    Args:
        model: A causal language model.
        ids: ``[1, tokens]``.
        positions: Positions of the tokens.
        checkpointing: Compute each layer again in the backward pass instead of keeping its activations.

    Returns:
        The summed log-probability.

    Raises:
        AnalysisError: The model has no logits, or no checkpointing.
    """
    before = torch.tensor(positions, device=ids.device) - 1
    more = (
        {"logits_to_keep": before} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(_frozen(model))
        if checkpointing:
            stack.enter_context(_checkpointing(model))
        stack.enter_context(torch.enable_grad())
        # The input embeddings require the gradient, so no weight has to.
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
        output = model(inputs_embeds=inputs, attention_mask=torch.ones_like(ids), use_cache=False, **more)
        if getattr(output, "logits", None) is None:
            raise AnalysisError(
                f"{type(model).__name__} has no logits, so an answer has no log-probability; load the model with its "
                "language model head, or leave out weighting='gradient'"
            )
        logits = output.logits[0] if more else output.logits[0, before]
        chosen = ids[0, before + 1].to(logits.device)
        log_probability = torch.log_softmax(logits.float(), -1).gather(1, chosen[:, None]).sum()
        log_probability.backward()
    return log_probability.item()


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside the block no parameter requires a gradient."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _checkpointing(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing of a model in evaluation mode; layers of transformers checkpoint only in training mode."""
    was_on = getattr(model, "is_gradient_checkpointing", False)
    if not hasattr(model, "gradient_checkpointing_enable") or not getattr(
        model, "supports_gradient_checkpointing", False
    ):
        raise AnalysisError(f"{type(model).__name__} has no gradient checkpointing; leave it out")
    if not was_on:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers = [m for m in model.modules() if hasattr(m, "gradient_checkpointing") and not m.training]
    for layer in layers:
        layer.training = True  # not train(): dropout inside stays off
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
        if not was_on:
            model.gradient_checkpointing_disable()
