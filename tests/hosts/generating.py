"""Ways of generating, on every model that can: the tokens, scores and weights of a plain run are those of a patched one.

A test writes down what came out, and ``run.py`` compares what two runs wrote.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

import torch

TOKENS = 5


class GenerationChecks:
    """Mixin beside the hosts' ``ModelTesterMixin``."""

    def write_down(self, **found: Any) -> None:
        """Tensors, and lists of them, by name."""
        folder = os.environ.get("HOST_TESTS_FOUND")
        if folder:
            path = pathlib.Path(folder) / f"{type(self).__name__}.{self._testMethodName}.pt"
            kept = torch.load(path) if path.exists() else []
            torch.save([*kept, {name: _plain(value) for name, value in found.items()}], path)

    def _each(self, **options: Any) -> None:
        for kind in self.all_generative_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_generate()
            # Weights only where the host has them: by rows there would be some under SDPA too.
            wanted = {"attn_implementation": "eager"} if options.get("output_attentions") else {}
            model = kind._from_config(config, **wanted).eval()
            self._generate(model, inputs, **options)

    def _generate(self, model: torch.nn.Module, inputs: dict[str, Any], **options: Any) -> Any:
        torch.manual_seed(0)
        output = model.generate(
            **inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, return_dict_in_generate=True, **options
        )
        found = {"sequences": output.sequences}
        for name in (
            "scores",
            "logits",
            "attentions",
            "decoder_attentions",
            "cross_attentions",
            "hidden_states",
        ):
            if getattr(output, name, None) is not None:
                found[name] = getattr(output, name)
        self.write_down(**found)
        return output

    def test_generating_greedily(self) -> None:
        self._each(do_sample=False, output_scores=True, output_logits=True)

    def test_generating_by_sampling(self) -> None:
        self._each(do_sample=True, top_k=7, output_scores=True)

    def test_generating_with_beams(self) -> None:
        self._each(do_sample=False, num_beams=3, num_return_sequences=2, output_scores=True)

    def test_generating_sampled_beams(self) -> None:
        self._each(do_sample=True, num_beams=2, output_scores=True)

    def test_generating_without_a_cache(self) -> None:
        self._each(do_sample=False, use_cache=False, output_logits=True)

    def test_generating_with_weights_and_hidden_states(self) -> None:
        self._each(do_sample=False, output_attentions=True, output_hidden_states=True)

    def test_generating_with_weights_and_beams(self) -> None:
        self._each(do_sample=False, num_beams=2, output_attentions=True)

    def test_generating_with_a_static_cache(self) -> None:
        if not all(kind._can_compile_fullgraph for kind in self.all_generative_model_classes):
            self.skipTest("no static cache for this model")
        self._each(do_sample=False, cache_implementation="static", disable_compile=True, output_logits=True)

    def test_generating_by_looking_up_the_prompt(self) -> None:
        if any(kind._is_stateful for kind in self.all_generative_model_classes) or self.is_encoder_decoder:
            self.skipTest("no candidates for this model")
        for kind in self.all_generative_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_generate()
            model = kind(config).eval()
            first = {name: value[:1] if hasattr(value, "shape") else value for name, value in inputs.items()}
            self._generate(model, first, do_sample=False, use_cache=True, prompt_lookup_num_tokens=2)

    def test_generating_in_training_mode_leaves_gradients_alone(self) -> None:
        for kind in self.all_generative_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_generate()
            model = kind(config).train()
            # Whatever comes out: dropout by rows draws other numbers.
            model.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
            assert all(parameter.grad is None for parameter in model.parameters())

    def test_generating_from_a_cache_of_before(self) -> None:
        """Tokens that were generated are the beginning of what is generated next."""
        for kind in self.all_generative_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_generate()
            model = kind(config).eval()
            if self.is_encoder_decoder or not hasattr(model.config, "use_cache") or "input_ids" not in inputs:
                self.skipTest("no cache to go on with")
            output = self._generate(model, inputs, do_sample=False)
            cache = getattr(output, "past_key_values", None)
            if cache is None:
                self.skipTest("no cache to go on with")
            rest = {"input_ids": output.sequences, "attention_mask": torch.ones_like(output.sequences)}
            self._generate(model, rest, do_sample=False, past_key_values=cache)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        # Weights that are computed when they are read have to be computed before they are saved.
        return value.detach().clone() + 0 if value.is_floating_point() else value.detach().clone()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
