"""The table that formulations are put into."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

WIDTH, HEADS = 32, 2
FILES = (
    "eager",
    "positions",
    "shifts",
    "windows",
    "images",
    "heads",
    "normalisers",
    "sparse",
    "matching",
    "torch_ways",
)


@dataclasses.dataclass(frozen=True)
class Formulation:
    """One way to compute attention.

    Attributes:
        name: What it is called in the table.
        source: The paper, or who does it so.
        make: Builds the module.
        inputs: ``inputs(n)`` gives the arguments of a call with about ``n`` tokens.
        plain: Its probabilities are those of one softmax along keys, so that a map can be compared with them.
        share: A row of its probabilities sums to 1.
        length: Tokens at which results are compared.
        longer: Tokens at which the largest tensor is looked for.
        whole: Why a tensor of rows x keys is there whatever is done; empty: there need be none.
    """

    name: str
    source: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    plain: bool = False
    share: bool = True
    length: int = 60
    longer: int = 768
    whole: str = ""


FORMULATIONS: list[Formulation] = []


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers from a fixed seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sequence(n: int) -> dict[str, Any]:
    """Two sequences of ``n`` tokens."""
    return {"x": normal(2, n, WIDTH)}


def sequences(n: int) -> dict[str, Any]:
    """Queries, and as many and five more tokens that they look at."""
    return {"x": normal(2, n, WIDTH), "context": normal(2, n + 5, WIDTH, seed=1)}


def picture(n: int) -> dict[str, Any]:
    """A picture of about ``n`` places, channels first."""
    side = max(2, round(n**0.5))
    return {"x": normal(2, WIDTH, side, side)}


def formulation(
    name: str, source: str, inputs: Callable[[int], dict[str, Any]] = sequence, **more: Any
) -> Callable:
    """Put a module class into the table."""

    def put(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        FORMULATIONS.append(Formulation(name, source, make, inputs, **more))
        return make

    return put


def all_of_them() -> list[Formulation]:
    """The table, with every file read."""
    for name in FILES:
        importlib.import_module(f"{__package__}.{name}")
    return FORMULATIONS


class Projected(nn.Module):
    """Projections to heads and back, which most formulations share."""

    def __init__(self, heads: int = HEADS, key_heads: int | None = None, width: int = WIDTH) -> None:
        super().__init__()
        self.heads, self.dim = heads, width // heads
        self.key_heads = key_heads or heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, self.dim * self.key_heads)
        self.to_v = nn.Linear(width, self.dim * self.key_heads)
        self.out = nn.Linear(width, width)
        self.scale = self.dim**-0.5

    def qkv(self, x: torch.Tensor, context: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """``[batch, heads, tokens, dim]`` each."""
        context = x if context is None else context
        return (
            self.to_q(x).unflatten(-1, (self.heads, self.dim)).transpose(1, 2),
            self.to_k(context).unflatten(-1, (self.key_heads, self.dim)).transpose(1, 2),
            self.to_v(context).unflatten(-1, (self.key_heads, self.dim)).transpose(1, 2),
        )

    def join(self, y: torch.Tensor) -> torch.Tensor:
        """``[batch, heads, tokens, dim]`` to ``[batch, tokens, width]``."""
        return self.out(y.transpose(1, 2).flatten(2))
