"""What the hosts' mixins ask of a model's tester, and how a test class is made of a config, inputs and classes."""

from __future__ import annotations

import dataclasses
import unittest
import zlib
from collections.abc import Callable
from typing import Any

import common
import generating
import torch
import transformers

BATCH, LENGTH, WIDTH, LAYERS, HEADS, VOCAB = 3, 11, 32, 2, 4, 101


@dataclasses.dataclass
class Setup:
    """A small model.

    Attributes:
        name: Of the test class.
        config: Makes a config.
        inputs: Makes inputs of a config.
        classes: Names of the classes that are tested, the base model first.
        facts: What else the mixins read from the tester.
        options: Attributes of the test class.
        generates: Makes inputs for ``generate``; ``None``: the same.
        targets: Tokens of a target, where the mixins know of none for a class.
    """

    name: str
    config: Callable[[], Any]
    inputs: Callable[[Any], dict[str, Any]]
    classes: tuple[str, ...]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    generates: Callable[[Any], dict[str, Any]] | None = None
    targets: int | None = None


class Tester:
    """Sizes, a config and inputs."""

    def __init__(self, setup: Setup) -> None:
        sizes = {
            "batch_size": BATCH, "seq_length": LENGTH, "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS, "is_training": True, "num_choices": 2,
        }  # fmt: skip
        vars(self).update(sizes | setup.facts)
        self.setup = setup

    def get_config(self) -> Any:
        return self.setup.config()

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        config = self.get_config()
        return config, self.setup.inputs(config)

    def prepare_config_and_inputs_for_generate(self) -> tuple[Any, dict[str, Any]]:
        config = self.get_config()
        return config, (self.setup.generates or self.setup.inputs)(config)


def made(setup: Setup) -> type[unittest.TestCase]:
    """The hosts' common tests on a small model."""
    kinds = tuple(getattr(transformers, name) for name in setup.classes)
    bases = [common.ModelTesterMixin]
    if any(kind.can_generate() for kind in kinds):
        bases.append(generating.GenerationChecks)
    if any(kind.__name__.endswith("ForCausalLM") for kind in kinds):
        bases.append(common.TrainingTesterMixin)

    def set_up(self: unittest.TestCase) -> None:
        transformers.set_seed(zlib.crc32(self.id().encode()))
        self.model_tester = Tester(setup)

    def prepared(
        self: unittest.TestCase, inputs: Any, kind: Any, return_labels: bool = False
    ) -> dict[str, Any]:
        found = common.ModelTesterMixin._prepare_for_class(self, inputs, kind, return_labels)
        if return_labels and setup.targets:
            found.setdefault("labels", ids(BATCH, setup.targets))
        return found

    facts = {
        "_prepare_for_class": prepared,
        "all_model_classes": kinds,
        "setUp": set_up,
        "model_tester": None,
        **setup.options,
    }
    # The mixin that trains takes it from the tester.
    setup.facts.setdefault(
        "causal_lm_class", next((kind for kind in kinds if kind.__name__.endswith("ForCausalLM")), None)
    )
    return type(setup.name, (*bases, unittest.TestCase), facts)


def ids(*shape: int, low: int = 3, high: int = VOCAB) -> torch.Tensor:
    return torch.randint(low, high, shape)


def real(*shape: int) -> torch.Tensor:
    """A padding mask: some tokens at the beginning of the last sequence are padding."""
    mask = torch.ones(shape, dtype=torch.long)
    mask[-1, :3] = 0
    return mask
