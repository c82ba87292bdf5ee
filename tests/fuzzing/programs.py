"""A program: how attention is computed in one case, as lines of Python, and how such lines are drawn."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from . import helpers, products, steps

# Rows and heads per step that a case may ask for.
POLICIES = ({"rows": 4}, {}, {"rows": 1, "heads": 1}, {"rows": 3, "heads": 2}, {"rows": 100})
_LOWEST = torch.finfo(torch.float32).min
_WIDER = (
    ("torch.float32", "torch.float64"), ("torch.bfloat16", "torch.float64"), (".float()", ".double()"),
    # The lowest number of float64 would swallow others than that of a narrower dtype, and overflow where it does.
    ("torch.finfo(s.dtype).min", f"{_LOWEST}"),
    ("nan_to_num()", f"nan_to_num(posinf={-_LOWEST}, neginf={_LOWEST})"), ("nan_to_num_()", f"nan_to_num_(posinf={-_LOWEST}, neginf={_LOWEST})"),
    (".bfloat16()", ".double()"), (".half()", ".double()"), ("torch.autocast('cpu', torch.bfloat16)", "torch.autocast('cpu', enabled=False)"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Program:
    """One case.

    Attributes:
        lines: The body of a forward, a step a line, from ``q, k, v, bias, sink, keep`` to ``out`` and ``more``.
        shape: Batch, heads, query rows, keys.
        shared: Query heads for each head of keys.
        dim: Of a head.
        grads: Inputs that require a gradient.
        around: A checkpoint around the module: ``reentrant``, ``other`` or none.
        grid: Inputs are small multiples of a quarter, so that products are exact.
        policy: Of ``POLICIES``.
    """

    lines: tuple[str, ...]
    shape: tuple[int, int, int, int] = (1, 2, 5, 5)
    shared: int = 1
    dim: int = 4
    dtype: str = "float32"
    autocast: bool = False
    grads: tuple[str, ...] = ("q", "k", "v", "bias", "sink")
    around: str = ""
    grid: bool = True
    policy: int = 0
    seed: int = 0

    def source(self, wide: bool = False) -> str:
        """The forward; ``wide``: with every dtype named in it float64."""
        body = "\n".join(self.lines)
        if wide:
            for narrow, replaced in _WIDER:
                body = body.replace(narrow, replaced)
        body = "\n".join("    " + line for line in body.split("\n"))
        return f"def forward(parts, q, k, v, bias, sink, keep, full, notes):\n    more = []\n{body}\n    return [out, *more]\n"

    def __str__(self) -> str:
        fields = [f"    {f.name}={getattr(self, f.name)!r}," for f in dataclasses.fields(self)[1:]]
        lines = [f"        {line!r}," for line in self.lines]
        return "\n".join(["Program(", "    lines=(", *lines, "    ),", *fields, ")"])


@functools.lru_cache(8)
def compiled(program: Program, wide: bool) -> Callable[..., list[torch.Tensor]]:
    names: dict[str, Any] = dict(helpers.NAMES)
    exec(compile(program.source(wide), "<program>", "exec"), names)  # what is drawn is the fuzzer's own
    return names["forward"]


def inputs(program: Program, dtype: torch.dtype) -> dict[str, Any]:
    """``q, k, v, bias, sink, keep`` of a case, the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(program.seed)
    batch, heads, rows, keys = program.shape
    own = getattr(torch, program.dtype)

    def floats(*shape: int) -> torch.Tensor:
        if program.grid:
            return torch.randint(-5, 6, shape, generator=generator).div(4).to(dtype)
        return torch.randn(shape, generator=generator).to(own).to(dtype)

    broadcast = [1 if (program.seed >> i) % 3 == 0 else size for i, size in enumerate((batch, heads))]
    swapped = program.seed % 2  # queries that come from a projection, heads after tokens
    found = {
        "q": floats(batch, rows, heads, program.dim).transpose(1, 2) if swapped else floats(batch, heads, rows, program.dim),
        "k": floats(batch, heads // program.shared, keys, program.dim),
        "v": floats(batch, heads // program.shared, keys, program.dim),
        "bias": floats(*broadcast, rows, keys),
        "sink": floats(heads),
    }  # fmt: skip
    for name in program.grads:
        found[name].requires_grad_()
    keep = torch.rand(*broadcast, rows, keys, generator=generator) > 0.4
    keep[..., 0] |= program.seed % 5 > 0  # now and then a row in which nothing is seen
    return {**found, "keep": keep}


class _Drawing:
    """The lines so far, and what is known of ``s``: dimensions, and whether it has the keys it began with."""

    def __init__(self, draw: Callable[..., Any]) -> None:
        self._draw = draw
        self.dims, self.has_keys = 4, True

    def pick(self, options: Any) -> Any:
        return self._draw(_choices(tuple(options)))

    def count(self, most: int) -> int:
        return self._draw(st.integers(0, most))

    def step(self, options: Any) -> str:
        """A line of a table that can stand here."""
        line, _, needs = self.pick(options).partition("  # ")
        if needs and not {"KEYS": self.has_keys, "LEADS": self.dims > 2, "FOUR": self.dims == 4, "THREE": self.dims == 3,
                          "TWO": self.dims == 2, "ROWS": True}[needs]:  # fmt: skip
            return "pass"
        return line.replace("{x}", str(self.pick(steps.NUMBERS)))

    def view(self) -> str:
        there, back = self.pick(steps.VIEWS)
        inner = self.pick(steps.INNER).replace("{x}", str(self.pick(steps.NUMBERS)))
        return f"t = {there}; {inner}; {self.pick(steps.LATER).format(back=back)}"

    def layout(self) -> str:
        line = self.step(steps.LAYOUTS)
        if "s.view(*full" in line or "s.unflatten" in line:
            self.dims = 4
        elif line != "pass" and "narrow" not in line and "..., " not in line and "s[0]" not in line:
            self.dims = 3
        return line


@functools.lru_cache(256)
def _choices(options: tuple) -> st.SearchStrategy:
    return st.sampled_from(options)


_KINDS = (
    ["pointwise"] * 6 + ["views"] * 4 + ["masks"] * 4 + ["in place"] * 3 + ["writes"] * 2 + ["casts"] * 2
    + ["reductions"] * 3 + ["autograd"] * 3 + ["reads"] * 2 + ["layout"]
)  # fmt: skip
_TABLES = {
    "pointwise": steps.POINTWISE, "masks": steps.MASKS, "in place": steps.IN_PLACE, "writes": steps.WRITES, "casts": steps.CASTS,
    "reductions": steps.REDUCTIONS, "autograd": steps.AUTOGRAD, "reads": steps.READS,
}  # fmt: skip


def _chain(drawing: _Drawing, most: int) -> list[str]:
    lines = []
    for _ in range(drawing.count(most)):
        kind = drawing.pick(_KINDS)
        special = {"views": drawing.view, "layout": drawing.layout}.get(kind)
        lines.append(special() if special else drawing.step(_TABLES[kind]))
    return lines


def _product(drawing: _Drawing, shared: int) -> list[str]:
    if shared > 1 and drawing.count(2) == 2:
        return [drawing.pick(products.GROUPED)]
    drawing.dims = drawing.pick((4, 4, 4, 3, 3, 2))
    line = drawing.pick({4: products.FOUR, 3: products.THREE, 2: products.TWO}[drawing.dims])
    return [drawing.pick(products.GROUPS), line] if shared > 1 else [line]


def _checkpointed(lines: list[str], first: int, last: int, reentrant: bool) -> list[str]:
    """The lines from ``first`` to before ``last`` inside a checkpoint."""
    part = [line for text in lines[first:last] for line in text.split("\n")]
    given = "q, k, v, bias, sink" if first == 0 else "s, q, k, v, bias, sink"
    body = "\n".join("    " + line for line in part)
    whole = (
        f"def part({given}):\n{body}\n    return s\ns = checkpoint(part, {given}, use_reentrant={reentrant})"
    )
    return [*lines[:first], whole, *lines[last:]]


@st.composite
def programs(draw: Callable[..., Any]) -> Program:
    """Any program of the tables."""
    drawing = _Drawing(draw)
    shared = drawing.pick((1, 1, 1, 2))
    heads = shared * (1 + drawing.count(2))
    lines = _product(drawing, shared)
    lines += _chain(drawing, 4)
    after = ""
    if drawing.dims == 4 and drawing.count(7) == 7:
        before, after = drawing.pick(steps.SINKS)
        lines.append(before)
        drawing.has_keys = False
    if drawing.count(11):
        lines.append(drawing.pick(steps.SOFTMAXES))
    if after:
        lines.append(after)
        drawing.has_keys = True
    lines += _chain(drawing, 4)
    if drawing.count(5) == 5:
        first = drawing.count(len(lines) - 1)
        last = first + 1 + drawing.count(len(lines) - 1 - first)
        # Keys are given out repeated before anything else needs them.
        lines = _checkpointed(lines, 0 if first < 2 else first, last, drawing.pick((True, False)))
    lines.append("vv = keys_of(v, s.shape, full).to(s.dtype)")
    lines.append(drawing.step(products.VALUES).replace("pass", "out = s @ vv"))
    for _ in range(drawing.pick((0, 0, 0, 1, 2))):
        lines.append(drawing.pick(products.AGAIN))
    rows = drawing.pick((5, 1, 4, 7, 9, 13, 17))
    return Program(
        lines=tuple(line for line in lines if line != "pass"),
        shape=(1 + drawing.count(1), heads, rows, drawing.pick((rows, rows, 6, 1, 11))),
        shared=shared,
        dim=drawing.pick((4, 2, 8, 3)),
        dtype=drawing.pick(("float32", "float32", "float32", "bfloat16")),
        autocast=drawing.count(7) == 7,
        grads=drawing.pick((("q", "k", "v", "bias", "sink"), ("q", "k", "v", "bias", "sink"), (), ("v",), ("q",), ("bias",), ("k", "sink"))),
        around=drawing.pick(("", "", "", "", "", "reentrant", "other")),
        grid=drawing.pick((True, True, False)),
        policy=drawing.pick(range(len(POLICIES))),
        seed=drawing.count(999),
    )  # fmt: skip
