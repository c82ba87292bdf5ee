"""Runs a model's own forward pass on shapes: no values, no memory, and the model is unchanged afterwards."""

from __future__ import annotations

import contextlib
import functools
import math
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from attnpatch import compat
from attnpatch.compat import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    is_traceable_wrapper_subclass,
    tree_leaves,
    tree_map,
)
from attnpatch.dry_run.mode import RehearsalMode
from attnpatch.dry_run.seen import Seen
from attnpatch.ledger import Ledger, Shapes, Span
from attnpatch.memory.free import FreeMemoryCache
from attnpatch.patching.calls import calls_here, most_rows
from attnpatch.patching.patch import Patch, patch_of
from attnpatch.patching.recognition import candidates
from attnpatch.patching.registry import is_attention
from attnpatch.patching.selection import AUTO
from attnpatch.patching.site import Site
from attnpatch.policy import NativeNeed, Policy
from attnpatch.recording.layers import is_inside
from attnpatch.rows.attention_call import AttentionCall
from attnpatch.rows.evaluate.evaluator import Evaluator
from attnpatch.rows.evaluate.tile_plan import TilePlan
from attnpatch.rows.evaluate.tiled import Look, TiledEvaluation
from attnpatch.rows.graph.axes import KEY, Tile, all_leaves, extent
from attnpatch.rows.graph.nodes import InputNode, Node


class _FewTiles(TiledEvaluation):
    """Runs only the first and the last row step of the first heads; no other step holds more."""

    step: tuple[int, int] | None = None

    def _steps(self, run: Evaluator) -> TilePlan:
        steps = super()._steps(run)
        rows = steps.rows if len(steps.rows) < 3 else [steps.rows[0], steps.rows[-1]]
        if self.step is None:
            high = max((stop - start for start, stop in steps.rows), default=1)
            self.step = high, max(self._heads(tile, steps) for tile in steps.lead)
        # At least two tiles, if there are two, because the result exists already while the second tile is computed.
        count = 1 if len(rows) > 1 else min(2, len(steps.lead))
        return TilePlan(steps.lead[:1] * count, steps.row, rows)

    def _heads(self, tile: Tile, steps: TilePlan) -> int:
        """Batch x heads of a tile: the extent of the axes that result and scores share."""
        node = self.node
        scores = [all_leaves(child.dims) for child in node.children if not isinstance(child, InputNode)]
        own = all_leaves(node.dims[:-2]) if not scores else all_leaves(node.dims)
        shared = [axis for axis in own if not scores or axis in scores[0]]
        return math.prod(
            extent((axis,), tile) for axis in shared if axis is not steps.row and axis.kind != KEY
        )


class _Call(AttentionCall):
    """A site's call that records the policy's decisions and reasons."""

    counters: _Site

    def by_rows(self, q_len: int, need: NativeNeed, device: torch.device) -> bool:
        """The policy's decision; its reason is recorded."""
        free, limit = self.room.free(device), self.room.limit(device)
        seen = self.counters.seen
        seen.asked_rows = max(seen.asked_rows, q_len)
        seen.reason = self.policy.reason(q_len, need, free, limit)
        return self.policy.by_rows(q_len, need, free, limit)

    @property
    def answers_shortage(self) -> bool:
        """False: a rehearsal takes no memory, so it cannot run out."""
        return False

    def replay(self, node: Node, watched: tuple[Node, Look] | None = None) -> torch.Tensor:
        """Run a few tiles of a graph, which take as much memory as all tiles would."""
        free = None if node.device.type == "cpu" else self.room.free(node.device)
        replay = _FewTiles(node, self.policy, free=free)
        result = replay()
        self.counters.seen.step = replay.step
        return result


class _Site(Site):
    """An attention module whose calls are measured on shapes."""

    call_class = _Call
    mode_class = RehearsalMode
    patch: RehearsalPatch

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen = Seen()

    def serve(self, *args: Any, **kwargs: Any) -> Any:
        """Serve a call as ``Site`` does; short calls are watched too."""
        calls_here.is_calm = False
        return super().serve(*args, **kwargs)

    def _stays_native(self, args: Any, kwargs: dict[str, Any]) -> None:
        """None: every call is watched, so that its kernel is seen and the policy is asked."""

    def attend(
        self, forward: Callable[..., Any], module: nn.Module, first: Any, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        ledger, seen = self.patch.ledger, self.seen
        seen.calls += 1
        seen.most_rows = max(seen.most_rows, most_rows(args, kwargs))
        with ledger.span() as span:
            result = super().attend(forward, module, first, args, kwargs)
        # Attention weights that the module returns beside its output count as temporaries.
        extra = sum(ledger.size_of(item) for item in tree_leaves(result)[1:])
        kept = max(0, span.exit - span.entry - extra)
        seen.temporaries = max(seen.temporaries, span.peak - span.entry - kept)
        self._note_kernel(span)
        return result

    def reason(self) -> str:
        """Why the site ran natively, by rows or fused, in words."""
        policy = self.patch.policy
        if self.counts["fused"] and self.replaced is not None:
            return f"torch's fused kernel in the place of {self.replaced}"
        if self.counts["fused"]:
            return f"{'a kernel outside torch' if self.kernels else 'fused kernel'}: nothing to save"
        if self.obstacles:
            return f"not fused, because of {', '.join(self.obstacles)}"
        if self.seen.reason is not None:
            reason = self.seen.reason
        elif policy.mode != "auto":
            reason = f"mode is {policy.mode!r}"
        elif self.seen.most_rows <= policy.min_tokens:
            reason = policy.reason(self.seen.most_rows, NativeNeed(0, 0), 0)
        else:
            reason = "attnpatch saw no product of queries and keys"
        if self.replaced is not None:
            reason = f"in the place of {self.replaced}; {reason}"
        whole = ", ".join(self.operations)
        return f"{reason}; {whole} needs the whole matrix" if whole else reason

    @property
    def replaced(self) -> str | None:
        """The kernel outside torch whose calls torch's functions compute."""
        return next((name.partition(" ")[0] for name in self.kernels if name.endswith("(replaced)")), None)

    def _note_kernel(self, span: Span) -> None:
        if self.replaced is None:
            self.seen.outside = next(iter(self.kernels), None)
        self.seen.fused = self.seen.fused or span.fused_kernel()
        self.seen.is_dense |= "_safe_softmax.default" in span.operators
        self.seen.is_product |= any("mm" in name for name in span.operators)


class _Room(FreeMemoryCache):
    """Free bytes at the first site's call: those at the start, less what the model holds by then."""

    def __init__(self, ledger: Ledger, free: int, is_fixed: bool) -> None:
        super().__init__()
        self._ledger, self._before, self._is_fixed = ledger, free, is_fixed
        self._asked: int | None = None

    def free(self, device: torch.device, need: int = 0) -> int:
        """Free bytes."""
        if self._asked is None:
            self._asked = self._before if self._is_fixed else max(0, self._before - self._ledger.live)
        return self._asked


class RehearsalPatch(Patch):
    """A patch for one rehearsal, on top of an existing patch.

    Args:
        model: The model.
        policy: The policy.
        ledger: Counts bytes.
        free: Free bytes before the model is called.
        is_fixed: Whether ``ATTNPATCH_FREE_MEMORY`` gives ``free``, so that the model's own memory is not subtracted.
    """

    site_class = _Site
    sites: list[_Site]  # type: ignore[assignment]

    def __init__(self, model: nn.Module, policy: Policy, ledger: Ledger, free: int, is_fixed: bool) -> None:
        self.ledger, self._room = ledger, _Room(ledger, free, is_fixed)
        patch = patch_of(model)
        chosen = AUTO if patch is None else patch.chosen
        super().__init__(model, policy, on_top=True, chosen=chosen)

    def innermost(self) -> list[_Site]:
        """The attention sites that were called, without those that wrap another one."""
        called = [site for site in self.sites if site.is_attention and site.seen.calls]
        names = [site.name for site in called]
        return [
            site for site in called
            if not any(is_inside(name, site.name) for name in names)
        ]  # fmt: skip

    def room(self) -> FreeMemoryCache:
        """Free memory, the same for every call of the rehearsal."""
        return self._room


@contextlib.contextmanager
def on_shapes(model: nn.Module, shapes: Shapes, device: torch.device) -> Iterator[Counter[str]]:
    """Give a model fake parameters and buffers on ``device``; at the end every attribute is restored.

    That includes attributes that a forward pass writes, because whatever it caches here has no data. Hooks of
    accelerate are bypassed, because they would load weights. If a module without attention branches on values (experts
    that look up which of them are needed), it is assumed to return a tensor shaped like its input.

    Yields:
        The classes of such modules, and how often they were called.
    """
    assumed: Counter[str] = Counter()
    modules = list(model.modules())
    tables = {id(table): table for module in modules for table in _tables(module)}.values()
    before = [(table, table.copy()) for table in tables]
    guesses = candidates(model)
    made: dict[int, torch.Tensor] = {}
    try:
        with shapes, torch.no_grad():
            for module in modules:
                values = vars(module)
                values["training"] = False
                if compat.ACCELERATE_FORWARD in values:
                    values["forward"] = values.pop(compat.ACCELERATE_FORWARD)
                if not any(is_attention(part) or part in guesses for part in module.modules()):
                    values["forward"] = _assuming(module.forward, type(module).__name__, assumed)
                for name in ("_parameters", "_buffers"):
                    table = values[name]
                    for key, tensor in table.items():
                        if tensor is not None:
                            if id(tensor) not in made:
                                made[id(tensor)] = _fake(tensor, shapes, device)
                            table[key] = made[id(tensor)]
        yield assumed
    finally:
        for table, copy in before:
            table.clear()
            table.update(copy) if isinstance(table, dict) else table.extend(copy)


def _assuming(forward: Callable[..., Any], kind: str, assumed: Counter[str]) -> Callable[..., Any]:
    """A forward that returns a tensor shaped like its first input if it cannot run on shapes."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            tensors = [item for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)]
            if not tensors or not tensors[0].is_floating_point():
                raise
            assumed[kind] += 1
            return torch.empty_like(tensors[0])

    return run


def _tables(module: nn.Module) -> list[Any]:
    """The dicts and lists a forward pass may write to: a module's attributes, those of its objects and parameters."""
    values = vars(module)
    owned = [tensor for name in ("_parameters", "_buffers") for tensor in values[name].values()]
    return [values, *_inside([*values.values(), *(vars(t) for t in owned if t is not None)], 3)]


def _inside(values: Iterable[Any], depth: int) -> Iterator[Any]:
    """The dicts, lists and attribute dicts among some values, and those inside them (a quantised weight's state)."""
    for value in values:
        table = value if type(value) in (dict, list) else getattr(value, "__dict__", None)
        # Modules are visited separately; attributes of classes do not belong to the model.
        if type(table) not in (dict, list) or isinstance(value, (nn.Module, type, types.FunctionType)):
            continue
        yield table
        if depth and len(table) < 100:
            yield from _inside(table.values() if isinstance(table, dict) else table, depth - 1)


def _fake(tensor: torch.Tensor, shapes: Shapes, device: torch.device) -> torch.Tensor:
    if tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor):
        return shapes.from_tensor(tensor)
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if isinstance(tensor, nn.Parameter):
        fake = nn.Parameter(fake, requires_grad=False)
    # Quantised weights have their quantisation state as attributes.
    fake.__dict__.update(vars(tensor))
    return fake


def fake_inputs(inputs: Any, shapes: Shapes, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call, every tensor replaced by a fake one on ``device``."""

    def change(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)

    with shapes:
        inputs = tree_map(change, inputs)
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}
