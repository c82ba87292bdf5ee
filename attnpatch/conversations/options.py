"""The options of an analysis."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from attnpatch.errors import AnalysisError, CaptureError, warn_deprecated
from attnpatch.maps.block_map import BlockMap
from attnpatch.maps.fields import NORMALIZATIONS
from attnpatch.recording.layers import layer_numbers, listed_numbers
from attnpatch.recording.options import CaptureOptions, Steps

# Tokens per chunk by default.
CHUNK = 2048
# Rows that sum to 1 but for this are the same under the normalisations "none" and "row".
_ROUNDING = 1e-3

CHECKPOINTING_NOTE = (
    "gradient checkpointing saves nothing here, because a pass without gradients keeps nothing for a backward pass; it "
    "matters for weighting='gradient'"
)


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of an analysis. Every ``analyze_...`` method takes them by name; they override the analyzer's.

    Attributes:
        blocks: ``"messages"``, a number of tokens per block, or ``"words"``.
        layers: ``None`` or ``"all"``: all layers; ``"last"``; or numbers, negative ones from the last layer.
        heads: ``"mean"``, ``"all"`` or numbers.
        measures: Further measures: any of ``"received"``, ``"entropy"``, ``"sink"``.
        sample_rows: Measure only this many query rows of each block; ``None``: all rows.
        seed: Seed of the sample.
        weighting: ``"probability"``, or ``"gradient"``: probability times the gradient of the log-probability of
            ``target`` (single pass only).
        target: ``"answer"`` (the assistant's last message), or positions of tokens.
        max_tokens: The largest number of tokens that a conversation may have; ``None``: the model's limit.
        truncate: Which end of a longer conversation is cut off, ``"left"`` or ``"right"``; ``None``: it is refused.
        chunk_size: Tokens per chunk of ``analyze_conversation_chunked``.
        template_options: Arguments for the chat template.
    """

    blocks: str | int = "messages"
    layers: str | Sequence[int] | None = None
    heads: str | Sequence[int] = "mean"
    measures: Sequence[str] = ()
    sample_rows: int | None = None
    seed: int = 0
    weighting: str = "probability"
    target: str | Sequence[int] = "answer"
    max_tokens: int | None = None
    truncate: str | None = None
    chunk_size: int = CHUNK
    template_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def changed(self, given: Mapping[str, Any]) -> Options:
        """The options with some of them replaced.

        Raises:
            AnalysisError: An option is unknown or its value is invalid.
        """
        known = {f.name for f in dataclasses.fields(self)}
        unknown = sorted(set(given) - known)
        if unknown:
            raise AnalysisError(f"unknown option {unknown[0]!r}; there are {', '.join(sorted(known))}")
        found = dataclasses.replace(self, **given)
        is_size = type(found.blocks) is int and found.blocks > 0
        if not is_size and not (isinstance(found.blocks, str) and found.blocks in ("messages", "words")):
            raise AnalysisError(
                f"blocks={found.blocks!r} is not accepted; give 'messages', 'words' or a number of tokens"
            )
        if type(found.chunk_size) is not int or found.chunk_size < 1:
            raise AnalysisError(f"chunk_size={found.chunk_size!r} is not accepted; give 1 token or more")
        if not isinstance(found.template_options, Mapping):
            raise AnalysisError(
                f"template_options={found.template_options!r} is not accepted; give a dict of arguments for the chat template"
            )
        numbers = None if isinstance(found.target, str) else listed_numbers(found.target)
        if found.target != "answer" if isinstance(found.target, str) else numbers is None:
            raise AnalysisError(
                f"target={found.target!r} is not accepted; give 'answer' or positions of tokens such as [5, 9]"
            )
        try:
            layer_numbers(found.layers)
            measures = CaptureOptions(**found.of_capture).measures
        except (CaptureError, ValueError) as error:
            raise AnalysisError(str(error)) from None
        return dataclasses.replace(found, measures=measures)

    @property
    def of_capture(self) -> dict[str, Any]:
        """The options that are passed to ``capture``, in its form."""
        return {
            "heads": self.heads,
            "layers": self.layers,
            "measures": self.measures,
            "sample_rows": self.sample_rows,
            "seed": self.seed,
            "weighting": self.weighting,
        }


def check_normalization(normalize: str | None) -> None:
    """Check the name of a normalisation; ``None`` is the default.

    Raises:
        AnalysisError: There is no such normalisation.
    """
    if normalize is not None and not (isinstance(normalize, str) and normalize in NORMALIZATIONS):
        raise AnalysisError(
            f"normalize={normalize!r} is not accepted; give {', '.join(map(repr, NORMALIZATIONS))}"
        )


def check_given(given: Mapping[str, Any], model: Any, tokenizer: Any, policy: Any) -> None:
    """Check the arguments of an analyzer that are no ``Options``.

    Args:
        given: How the model is loaded.
        model, tokenizer, policy: As the analyzer takes them.

    Raises:
        AnalysisError: One has another type, or the model is loaded already and ``given`` says how to load it.
    """
    for name in ("load_in_4bit", "load_in_8bit", "use_gradient_checkpointing"):
        if not isinstance(given[name], bool):
            raise AnalysisError(f"{name}={given[name]!r} is not accepted; give True or False")
    if policy is not None and not isinstance(policy, Mapping):
        raise AnalysisError(
            f"policy={policy!r} is not accepted; give a dict of fields of Policy, such as {{'min_free': '8GB'}}"
        )
    if tokenizer is not None and not callable(tokenizer):
        raise AnalysisError(f"tokenizer={tokenizer!r:.60} is not accepted; give a tokenizer of transformers")
    if model is None:
        return
    if not isinstance(model, nn.Module):
        raise AnalysisError(
            f"model is {type(model).__name__}, which is no model; give a torch.nn.Module, or model_name_or_path"
        )
    names = ("device_map", "torch_dtype", "load_in_4bit", "load_in_8bit", "max_memory")
    loading = [name for name in names if given[name] is not None and given[name] is not False]
    if loading:
        raise AnalysisError(
            f"{loading[0]} says how a model is loaded, and the given model is loaded already; leave it out, or give "
            "model_name_or_path"
        )


def of_generate(model: nn.Module, max_new_tokens: Any, more: Any) -> dict[str, Any]:
    """The arguments of the model's ``generate``.

    Raises:
        AnalysisError: The model has none, the number of tokens is not accepted, or ``more`` is no dict.
    """
    if not getattr(model, "can_generate", lambda: hasattr(model, "generate"))():
        raise AnalysisError(
            f"{type(model).__name__} cannot generate; analyse a given conversation with analyze_conversation"
        )
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise AnalysisError(
            f"max_new_tokens={max_new_tokens!r} is not accepted; give the number of tokens to generate, 1 or more"
        )
    if more is not None and not isinstance(more, Mapping):
        raise AnalysisError(
            f"generate={more!r} is not accepted; give a dict of arguments of the model's generate"
        )
    return {"max_new_tokens": max_new_tokens, "do_sample": False, **(more or {})}


def chosen_steps(steps: Steps | bool) -> Steps:
    """The option ``steps`` of ``capture``; truth values, which ``analyze_generation`` took before, still mean theirs."""
    if not isinstance(steps, bool):
        return steps
    meant = "all" if steps else "mean"
    warn_deprecated(f"steps={steps} is now steps={meant!r}")
    return meant


def warn_of_default(block_map: BlockMap) -> None:
    """Warn if the former default, ``"row"``, would give other numbers."""
    if block_map.is_signed:
        return
    elsewhere = block_map.unassigned_mass.max().item()
    if elsewhere > _ROUNDING:
        warn_deprecated(
            f"normalize is now 'none' by default; it was 'row', which differs here, because up to {elsewhere:.2g} of a "
            "row's attention is on no block. Give normalize='row' for shares, or normalize='none'"
        )
