"""Small modules that call kernels of packages, and what their attention is, in float64 by plain loops.

The packages are the stand-ins in ``tests/kernel_packages``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

FOLDER = pathlib.Path(__file__).parent / "kernel_packages"
PACKAGES = ("flash_attn", "flash_attn_interface", "sageattention", "xformers")
BATCH, TOKENS, HEADS, WIDTH, BLOCK = 2, 24, 4, 8, 6


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """The stand-ins are imported inside the block, and are gone afterwards."""
    sys.path.insert(0, str(FOLDER))
    try:
        # Python's import hooks see a package once only, so it must not be imported by a test later.
        for name in (*PACKAGES, "flash_attn.cute", "xformers.ops"):
            importlib.import_module(name)
        yield
    finally:
        sys.path.remove(str(FOLDER))
        for name in [one for one in sys.modules if one.partition(".")[0] in PACKAGES]:
            del sys.modules[name]


def function(path: str) -> Callable[..., Any]:
    """The function of a package, as a module that is called now finds it."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to call a kernel.

    Attributes:
        path: Module and name of its function.
        call: Calls the function with ``q [batch, tokens, heads, width]``, ``k`` and ``v``; returns the same layout.
        causal, left, right, ends, softcap, scale, slopes, sinks: What this means; see ``dense_attention.probabilities``.
        bias: Added to the scores: ``[batch, heads, queries, keys]``.
        key_heads: Number of heads of keys.
        lengths: Packed sequences in the only sequence of the batch.
        tolerance: Of the result.
    """

    path: str
    call: Callable[..., torch.Tensor]
    causal: bool = False
    left: int = -1
    right: int = -1
    ends: bool = True
    softcap: float = 0.0
    scale: float = WIDTH**-0.5
    slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    key_heads: int = HEADS
    lengths: tuple[int, ...] | None = None
    tolerance: float = 1e-6


class Attention(nn.Module):
    """One attention module that calls a kernel."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.q = nn.Linear(HEADS * WIDTH, HEADS * WIDTH)
        self.k = nn.Linear(HEADS * WIDTH, case.key_heads * WIDTH)
        self.v = nn.Linear(HEADS * WIDTH, case.key_heads * WIDTH)
        self.o = nn.Linear(HEADS * WIDTH, HEADS * WIDTH)

    def parts(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x).unflatten(-1, (-1, WIDTH)) for layer in (self.q, self.k, self.v)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.case.call(function(self.case.path), *self.parts(x))
        return self.o(out.flatten(-2))


class Model(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.attn = Attention(case)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x)


def model_of(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Model, torch.Tensor]:
    """A model, and its input."""
    torch.manual_seed(0)
    model = Model(case).to(dtype).eval()
    # Sharp enough that every mistake shows.
    with torch.no_grad():
        model.attn.q.weight *= 4
    batch = 1 if case.lengths is not None else BATCH
    return model, torch.randn(batch, TOKENS, HEADS * WIDTH, dtype=dtype)


def expected(case: Case, model: Model, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The probabilities ``[batch, heads, queries, keys]``, float64, and the model's output, both differentiable."""
    from dense_attention import probabilities

    q, k, v = model.attn.parts(x)
    found = []
    for b in range(len(x)):
        weights = x.new_zeros(HEADS, TOKENS, TOKENS, dtype=torch.float64)
        low = 0
        for number, length in enumerate(case.lengths or (TOKENS,)):
            own = slice(low, low + length)
            slopes, place = case.slopes, b if case.lengths is None else number
            slopes = slopes[place] if slopes is not None and slopes.dim() > 1 else slopes
            bias = None if case.bias is None else case.bias[b][:, own, own]
            weights[:, own, own], _ = probabilities(
                q[b, own],
                k[b, own],
                case.causal,
                case.left,
                case.right,
                case.ends,
                case.softcap,
                case.scale,
                slopes,
                case.sinks,
                bias,
            )
            low += length
        found.append(weights)
    p = torch.stack(found)
    values = v.double().repeat_interleave(HEADS // case.key_heads, 2)
    out = torch.einsum("bhij,bjhd->bihd", p, values).flatten(-2).to(x.dtype)
    return p, model.attn.o(out)


def blocks_of(p: torch.Tensor) -> torch.Tensor:
    """The mean over heads of the mass between blocks: ``[batch, blocks, blocks]``."""
    ends = range(0, TOKENS, BLOCK)
    rows = [[p[:, :, i : i + BLOCK, j : j + BLOCK].sum((-2, -1)).mean(1) / BLOCK for j in ends] for i in ends]
    return torch.stack([torch.stack(row, -1) for row in rows], -2).double()


# ---------------------------------------------------------------------------------------------------- ways to call

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
EACH_SLOPES = torch.stack([SLOPES, 2 * SLOPES])
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
PACKED = (5, 9, 10)


def plain(**kwargs: Any) -> Callable[..., torch.Tensor]:
    def call(function, q, k, v):
        out = function(q, k, v, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    return call


def by_heads(**kwargs: Any) -> Callable[..., torch.Tensor]:
    def call(function, q, k, v):
        out = function(*(one.transpose(1, 2) for one in (q, k, v)), **kwargs)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


def in_one(dim: int = 2, **kwargs: Any) -> Callable[..., torch.Tensor]:
    return lambda function, q, k, v: function(torch.stack([q, k, v], dim), **kwargs)


def keys_in_one(**kwargs: Any) -> Callable[..., torch.Tensor]:
    return lambda function, q, k, v: function(q, torch.stack([k, v], 2), **kwargs)


def cumulative(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32)


def packed(
    lengths: tuple[int, ...] = PACKED, how: str = "q k v", **kwargs: Any
) -> Callable[..., torch.Tensor]:
    """Sequences of these lengths, one after the other in the only sequence of the batch."""
    cu, most = cumulative(lengths), max(lengths)

    def call(function, q, k, v):
        q, k, v = q[0], k[0], v[0]
        if how == "qkv":
            out = function(torch.stack([q, k, v], 1), cu, most, **kwargs)
        elif how == "q kv":
            out = function(q, torch.stack([k, v], 1), cu, cu, most, most, **kwargs)
        elif how == "named":
            out = function(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, **kwargs)
        else:
            out = function(q, k, v, cu, cu, most, most, **kwargs)
        return (out[0] if isinstance(out, tuple) else out)[None]

    return call


def batch_packed(**kwargs: Any) -> Callable[..., torch.Tensor]:
    """The sequences of the batch, packed (Wan, HunyuanVideo)."""
    cu = cumulative((TOKENS,) * BATCH)

    def call(function, q, k, v):
        flat = (one.flatten(0, 1) for one in (q, k, v))
        return function(*flat, cu, cu, TOKENS, TOKENS, **kwargs).unflatten(0, (BATCH, TOKENS))

    return call


def one_head(**kwargs: Any) -> Callable[..., torch.Tensor]:
    """``[batch * heads, tokens, width]`` (diffusers' xFormers processor)."""

    def call(function, q, k, v):
        flat = (one.transpose(1, 2).flatten(0, 1) for one in (q, k, v))
        return function(*flat, **kwargs).unflatten(0, (-1, HEADS)).transpose(1, 2)

    return call


def grouped(**kwargs: Any) -> Callable[..., torch.Tensor]:
    """``[batch, tokens, groups, heads per group, width]``."""

    def call(function, q, k, v):
        groups = k.shape[2]
        q = q.unflatten(2, (groups, -1))
        k, v = (one.unsqueeze(3).expand(*q.shape[:-1], -1) for one in (k, v))
        return function(q, k, v, **kwargs).flatten(2, 3)

    return call


def with_bias(
    bias: Callable[[], Any], how: Callable[..., Any] = plain, **kwargs: Any
) -> Callable[..., torch.Tensor]:
    """xFormers with a bias that is made when it is used."""
    return lambda function, q, k, v: how(attn_bias=bias(), **kwargs)(function, q, k, v)


def bias_class(name: str, *args: Any) -> Callable[[], Any]:
    def made() -> Any:
        module = importlib.import_module("xformers.ops.fmha.attn_bias")
        name_of, _, make = name.partition(".")
        found = getattr(module, name_of)
        return getattr(found, make)(*args) if make else found(*args)

    return made
