"""BlockAttentionAnalyzer: loads a model, runs a conversation, and returns a map of which message attends to which."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnpatch.api import capture, patched, report
from attnpatch.conversations.answers import answer_of
from attnpatch.conversations.gradient import attributed, target_positions
from attnpatch.conversations.options import (
    CHECKPOINTING_NOTE,
    Options,
    check_given,
    check_normalization,
    chosen_steps,
    of_generate,
    warn_of_default,
)
from attnpatch.conversations.passes import (
    blocks_of,
    check_model,
    feed,
    input_device,
    left_out_note,
    map_of_text,
    pieces,
    text_config,
)
from attnpatch.conversations.result import Analysis
from attnpatch.conversations.results_folder import made_for
from attnpatch.conversations.single_pass_check import SINGLE_PASS, tokens_to_try, why_single_pass
from attnpatch.conversations.tokenized_chat import TokenizedChat, render
from attnpatch.errors import AnalysisError
from attnpatch.hosts.transformers.loading import load_model, load_tokenizer
from attnpatch.memory.peak import PeakMeter
from attnpatch.patching.counters import counted_apart
from attnpatch.patching.patch import patch_of
from attnpatch.recording.options import Steps


class BlockAttentionAnalyzer:
    """Maps of which message of a conversation attends to which.

    Args:
        model_name_or_path: A folder or a name on the hub. Leave it out to give ``model`` and ``tokenizer``.
        device_map, torch_dtype, load_in_4bit, load_in_8bit, max_memory: How the model is loaded; see
            ``attnpatch.hosts.transformers.loading.load_model``. Maps are those of the model as loaded, quantised
            weights included.
        use_gradient_checkpointing: Save memory in the backward pass of ``weighting="gradient"`` by computing layers
            again. Without a backward pass it saves nothing, and the result's notes say so.
        model, tokenizer: A loaded model, which is unchanged afterwards, and its tokenizer.
        head_chunk_size: Heads per step when attention runs by rows; ``None`` chooses.
        policy: Fields of ``attnpatch.Policy``, such as ``{"min_free": "8GB"}``.
        **options: Fields of ``Options``.

    Raises:
        AnalysisError: The model cannot be loaded, has both an encoder and a decoder, or takes no tokens; or an option
            is invalid.
        MissingExtraError: transformers, accelerate or bitsandbytes is needed and not installed.
    """

    def __init__(
        self,
        model_name_or_path: str | os.PathLike | None = None,
        device_map: Any = None,
        torch_dtype: Any = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        use_gradient_checkpointing: bool = False,
        max_memory: dict[Any, Any] | None = None,
        *,
        model: nn.Module | None = None,
        tokenizer: Any = None,
        head_chunk_size: int | None = None,
        policy: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.options = Options().changed(options)
        loading = {
            "device_map": device_map, "torch_dtype": torch_dtype, "load_in_4bit": load_in_4bit,
            "load_in_8bit": load_in_8bit, "max_memory": max_memory,
        }  # fmt: skip
        given = {**loading, "use_gradient_checkpointing": use_gradient_checkpointing}
        check_given(given, model, tokenizer, policy)
        if (model is None) == (model_name_or_path is None):
            raise AnalysisError("give model_name_or_path, or a model and its tokenizer")
        if not isinstance(model_name_or_path, (str, os.PathLike, type(None))):
            raise AnalysisError(
                f"model_name_or_path is {type(model_name_or_path).__name__}; give a folder or a name on the hub, and a loaded "
                "model as model=..., tokenizer=..."
            )
        name = None if model_name_or_path is None else os.fspath(model_name_or_path)
        if tokenizer is None and name is None:
            raise AnalysisError("a model was given without its tokenizer; give tokenizer=...")
        self.tokenizer = load_tokenizer(name) if tokenizer is None else tokenizer
        self.model = load_model(name, dtype=loading.pop("torch_dtype"), **loading) if model is None else model
        check_model(self.model)
        self.name = Path(name).name if name is not None else type(self.model).__name__
        self.use_gradient_checkpointing = use_gradient_checkpointing
        self._tried: dict[int, str | None] = {}
        self.policy = {**(policy or {}), **({} if head_chunk_size is None else {"heads": head_chunk_size})}

    def analyze(
        self,
        messages: Sequence[Mapping],
        method: str = "single",
        *,
        normalize: str | None = None,
        **options: Any,
    ) -> Analysis:
        """Analyse a conversation, by the method that is named.

        Args:
            messages: As ``analyze_conversation``.
            method: ``"single"``: one pass (``analyze_conversation``). ``"sequential"``: message by message through the
                KV cache. ``"chunked"``: in chunks of tokens. ``"generation"``: the last block is generated.
            normalize, **options: Those of the method.

        Returns:
            ``Analysis``. ``print(result)`` tells what the last block attends to; ``result.top()`` lists it.

        Raises:
            AnalysisError: There is no such method; or as ``analyze_conversation``.
        """
        ways: dict[str, Any] = {
            "single": self.analyze_conversation,
            "sequential": self.analyze_conversation_sequential,
            "chunked": self.analyze_conversation_chunked,
            "generation": self.analyze_generation,
        }
        if not isinstance(method, str) or method not in ways:
            raise AnalysisError(f"method={method!r} is not accepted; give {', '.join(map(repr, ways))}")
        given = {} if normalize is None else {"normalize": normalize}
        return ways[method](messages, **given, **options)

    def analyze_conversation(
        self, messages: Sequence[Mapping], normalize: str | None = None, **options: Any
    ) -> Analysis:
        """Analyse a conversation in one pass.

        Args:
            messages: ``[{"role": ..., "content": ...}, ...]``.
            normalize: Normalisation of the map: ``"none"`` (what ``None`` means, as everywhere), ``"row"``, ``"density"``
                or ``"column"``; see ``BlockMap.normalize``.
            **options: Fields of ``Options``, for this conversation only.

        Returns:
            ``Analysis``.

        Raises:
            AnalysisError, BlockError, CaptureError: An argument, the conversation or the model cannot be used. The
                message is one line with the reason and a way out.
        """
        chosen = self._options(options, normalize)
        rendered = self._rendered(messages, chosen)
        if chosen.weighting == "gradient":
            return self._run(rendered, chosen, normalize, "gradient", messages)
        return self._run(rendered, chosen, normalize, "single pass")

    def analyze_conversation_sequential(
        self, messages: Sequence[Mapping], normalize: str | None = None, **options: Any
    ) -> Analysis:
        """Analyse a conversation message by message through the KV cache.

        The map is the same as in one pass, and memory depends on the longest message. Whether that holds for the model
        is tested with a short text. If the map would differ (the model attends to later tokens, or cannot continue from
        its cache), the conversation is run in a single pass, and the notes say why.

        Args, Returns, Raises: As ``analyze_conversation``.
        """
        chosen = self._options(options, normalize)
        return self._run(self._rendered(messages, chosen), chosen, normalize, "sequential")

    def analyze_conversation_chunked(
        self, messages: Sequence[Mapping], normalize: str | None = None, **options: Any
    ) -> Analysis:
        """Analyse a conversation in chunks of ``chunk_size`` tokens through the KV cache.

        Use it if a single message is already too long. On CUDA the cache is offloaded to the host's memory if it would
        take half of what is free. The conversation is run in a single pass for the same reasons as in
        ``analyze_conversation_sequential``.

        Args, Returns, Raises: As ``analyze_conversation``.
        """
        chosen = self._options(options, normalize)
        return self._run(self._rendered(messages, chosen), chosen, normalize, "chunked")

    def analyze_generation(
        self,
        messages: Sequence[Mapping],
        normalize: str | None = None,
        *,
        max_new_tokens: int = 64,
        steps: Steps = "mean",
        generate: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Analysis:
        """Analyse an answer while the model generates it. Each generated token is a query row of the answer's block.

        Args:
            messages: The conversation so far.
            normalize, **options: As ``analyze_conversation``.
            max_new_tokens: The largest number of tokens to generate.
            steps: As in ``capture``: ``"all"`` keeps a map for every step; the first one is of the prompt.
            generate: More arguments for the model's ``generate``.

        Returns:
            ``Analysis``; ``block_map.metadata["answer"]`` is the generated text. The last generated token was never
            fed to the model, so it has no row.

        Raises:
            As ``analyze_conversation``.
        """
        chosen = self._options(options, normalize)
        more = of_generate(self.model, max_new_tokens, generate)
        rendered = self._rendered(messages, chosen, add_generation_prompt=True)
        return self._run(rendered, chosen, normalize, "generation", steps=chosen_steps(steps), generate=more)

    def visualize_results(
        self, result: Analysis, save_dir: str | os.PathLike = "./attention_maps"
    ) -> list[Path]:
        """Write a result's pictures, its page and its numbers into a folder.

        Returns:
            The paths written: ``block_map.png``, ``layers.png``, ``last_message.png``, ``memory.png`` (if the run was
            long enough to measure), ``page.html`` and ``analysis.safetensors``.
        """
        from attnpatch.viewing.page import write_page

        if not isinstance(result, Analysis):
            raise AnalysisError(f"result is {type(result).__name__}; give what analyze(...) returned")
        folder = Path(save_dir)
        with made_for(folder):
            written = [result.plot(folder / "block_map.png"), result.plot_layers(folder / "layers.png")]
            written.append(result.plot_row(-1, folder / "last_message.png"))
            if len(result.memory) > 1:
                written.append(result.plot_memory(folder / "memory.png"))
            written.append(write_page({self.name: result.block_map}, folder / "page.html"))
            written.append(result.save(folder / "analysis.safetensors"))
        return [Path(str(path)) for path in written]

    def why_single_pass(self, tokens: int = 0) -> str | None:
        """Why a conversation of ``tokens`` tokens must be run in a single pass; ``None`` if pieces give the same map.

        It is tested once with a short text, and again with a longer text if the conversation exceeds an attention
        window of the model.
        """
        count = tokens_to_try(self.model, tokens)
        if count not in self._tried:
            self._tried[count] = why_single_pass(self.model, self.tokenizer, self.policy, count)
        return self._tried[count]

    # ------------------------------------------------------------------------------------------------------- inside

    def _options(self, options: Mapping[str, Any], normalize: str | None) -> Options:
        check_normalization(normalize)
        return self.options.changed(options)

    def _rendered(
        self, messages: Sequence[Mapping], options: Options, add_generation_prompt: bool = False
    ) -> TokenizedChat:
        limit = options.max_tokens
        if limit is None:
            limit = getattr(text_config(self.model), "max_position_embeddings", None)
            # XLNet has -1: no limit.
            limit = limit if isinstance(limit, int) and limit > 0 else None
        return render(
            self.tokenizer, messages, add_generation_prompt=add_generation_prompt, max_tokens=limit,
            truncate=options.truncate, **options.template_options,
        )  # fmt: skip

    def _run(
        self,
        rendered: TokenizedChat,
        options: Options,
        normalize: str | None,
        method: str,
        messages: Sequence[Mapping] = (),
        *,
        steps: Steps = "mean",
        generate: Mapping[str, Any] | None = None,
    ) -> Analysis:
        if options.weighting == "gradient" and method != "gradient":
            raise AnalysisError("weighting='gradient' needs a single pass; call analyze_conversation")
        notes = list(rendered.notes)
        if method in ("sequential", "chunked") and len([*pieces(method, rendered, options.chunk_size)]) > 1:
            why = self.why_single_pass(len(rendered.ids))
            if why is not None:
                method = "single pass"
                notes.append(f"{SINGLE_PASS}{why}")
        device = input_device(self.model)
        ids = torch.tensor([rendered.ids], device=device)
        blocks, texts = blocks_of(options.blocks, rendered, generate is not None)
        facts: dict[str, Any] = {"method": method, "template": rendered.template}
        if self.use_gradient_checkpointing and method != "gradient":
            notes.append(CHECKPOINTING_NOTE)
        with contextlib.ExitStack() as stack:
            stack.enter_context(patched(self.model, **self.policy))
            # If the model was patched before, its own counts must not include this run.
            patch = patch_of(self.model)
            assert patch is not None
            stack.enter_context(counted_apart(patch.sites))
            asked = capture(self.model, blocks, steps=steps, **options.of_capture)
            maps = stack.enter_context(asked)
            meter = stack.enter_context(PeakMeter(device, curve=True))
            start = time.perf_counter()
            if method == "gradient":
                positions = target_positions(options.target, rendered, messages)
                attributed(self.model, ids, positions, self.use_gradient_checkpointing)
                facts["target"] = f"log-probability of {len(positions)} tokens"
            elif generate is not None:
                with torch.inference_mode():
                    written = self.model.generate(ids, attention_mask=torch.ones_like(ids), **generate)
                answer = answer_of(self.tokenizer, written[0, ids.shape[1] :].tolist())
                facts["answer"], texts = answer.text, answer.texts_of_blocks(options.blocks, texts, rendered)
                notes += answer.notes
            else:
                feed(self.model, ids, pieces(method, rendered, options.chunk_size))
            seconds = time.perf_counter() - start
            counts = report(self.model).totals
        sites, found = map_of_text(self.model, maps, method)
        metadata = {**found.metadata, **facts, "model": self.name, "texts": texts, "attention": dict(counts)}
        block_map = dataclasses.replace(found, metadata=metadata).normalize(normalize or "none")
        if normalize is None:
            warn_of_default(block_map)
        measured = maps.measured(sites) if options.measures else {}
        notes += left_out_note(maps.left_out)
        return Analysis(
            block_map, **measured, seconds=seconds, peak_bytes=meter.peak, memory=meter.curve, notes=tuple(notes)
        )  # fmt: skip
