"""Every softmax of a model's own run, and what a block map of each would be: by loops, without any code of a capture."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as modules
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_SOFTMAX = {aten._softmax.default, aten._safe_softmax.default, aten.softmax.int}
# Larger results are no attention of the small models that are run, and would fill memory.
_MOST = 64 * 2**20


class Softmaxes(TorchDispatchMode):
    """Keeps what softmax returns, under every module whose forward is running.

    Attributes:
        found: By the name of a module: results, their keys in the last dimension.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.running: list[str] = []
        self.found: dict[str, list[torch.Tensor]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _SOFTMAX and result.dim() > 1 and result.numel() <= _MOST:
            # A copy: what comes next may be done in place.
            kept = result.detach().movedim(args[1], -1).clone()
            for name in set(self.running):
                self.found[name].append(kept)
        return result

    def enter(self, module: nn.Module, args: Any) -> None:
        if module in self.names:
            self.running.append(self.names[module])

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if module in self.names:
            self.running.pop()


@contextlib.contextmanager
def softmaxes(model: nn.Module) -> Iterator[Softmaxes]:
    """Watch a model that nothing has changed. Fused attention is computed as its dense math, which has a softmax."""
    watch = Softmaxes(model)
    hooks = [
        modules.register_module_forward_pre_hook(watch.enter),
        modules.register_module_forward_hook(watch.leave, always_call=True),
    ]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), watch:
            yield watch
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for hook in hooks:
            hook.remove()


# -------------------------------------------------------------------------------------------------------- block maps


def reduced(probabilities: torch.Tensor, width: int, first: int = 0) -> torch.Tensor:
    """``[batch, heads, queries, keys]`` as ``[batch, query blocks, key blocks]``.

    ``first``: the place of the first query in its sequence, whose tokens before it were read earlier.
    """
    mean = probabilities.double().mean(1)
    columns = [mean[:, :, k : k + width].sum(2) for k in range(0, mean.shape[2], width)]
    keys = torch.stack(columns, 2)
    rows = []
    for start in range(0, first + keys.shape[1], width):
        own = keys[:, max(0, start - first) : max(0, start + width - first)]
        rows.append(own.mean(1) if own.shape[1] else torch.zeros_like(keys[:, 0]))
    return torch.stack(rows, 1)


def first_of(sizes: list[int], width: int) -> int:
    """The place of the first query, from the tokens of each query block."""
    empty = next((i for i, size in enumerate(sizes) if size), 0)
    is_cut = empty > 0 or (sizes[0] < width and any(sizes[1:]))
    return empty * width + width - sizes[empty] if is_cut else 0


def readings(softmax: torch.Tensor, batch: int, queries: int, keys: int) -> Iterator[torch.Tensor]:
    """What a result may be as ``[batch, heads, queries, keys]``: which of its dimensions are which is not told.

    Keys that come after the tokens (a sink, zeros) are in no block.
    """
    shape = softmax.shape[:-1]
    if softmax.shape[-1] < keys or math.prod(shape) % (batch * queries):
        return
    for count in range(len(shape) + 1):
        for own in itertools.combinations(range(len(shape)), count):
            if math.prod(shape[dim] for dim in own) != queries:
                continue
            others = [dim for dim in range(len(shape)) if dim not in own]
            rows = softmax.permute(*others, *own, len(shape))[..., :keys].reshape(-1, queries, keys)
            heads = len(rows) // batch
            yield rows.view(batch, heads, queries, keys)
            if batch > 1 and heads > 1:
                yield rows.view(heads, batch, queries, keys).transpose(0, 1)


def in_parts(found: Sequence[torch.Tensor], count: int) -> Iterator[torch.Tensor]:
    """Results of parts of one sequence, which attend to themselves, one after the other: as that of all its tokens."""
    parts: list[torch.Tensor] = []
    for softmax in found:
        if softmax.shape[-1] != softmax.shape[-2] or (parts and softmax.shape[:-2] != parts[0].shape[:-2]):
            parts = []
            continue
        parts.append(softmax)
        if sum(part.shape[-1] for part in parts) == count and len(parts) > 1:
            whole = softmax.new_zeros(*softmax.shape[:-2], count, count)
            start = 0
            for part in parts:
                stop = start + part.shape[-1]
                whole[..., start:stop, start:stop] = part
                start = stop
            yield whole
            parts = []


def without_closed(softmax: torch.Tensor, mass: torch.Tensor, width: int) -> float:
    """How far a map is off where a model pads its own tokens: those that no row looks at are in no block."""
    batch, count = len(mass), softmax.shape[-1]
    off = math.inf
    for rows in readings(softmax, batch, count, count):
        wanted = torch.zeros_like(mass, dtype=torch.float64)
        for one, found in zip(rows, wanted, strict=True):
            kept = one.sum((0, 1)) > 0
            blocks = reduced(one[None, :, kept][..., kept], width)[0]
            if blocks.shape[0] > found.shape[0] or blocks.shape[1] > found.shape[1]:
                return math.inf
            found[: blocks.shape[0], : blocks.shape[1]] = blocks
        off = min(off, float((wanted - mass.double()).abs().max()))
    return off


@dataclasses.dataclass
class Verdict:
    """What the oracle says of one map.

    Attributes:
        status: ``"equal"``, ``"WRONG"`` or ``"no oracle"``.
        difference: To the nearest of the softmax results.
        compared: Results of the same batch and number of keys.
        says: Shapes, where it is not equal.
    """

    status: str
    difference: float = math.inf
    compared: int = 0
    says: str = ""


def judged(one: Any, layer: int, found: list[torch.Tensor], width: int, tolerance: float) -> Verdict:
    """A layer of a block map beside the softmax results of its site.

    Args:
        one: The ``BlockMap``, of ``Blocks.fixed(width)``.
        layer: Its place in the map.
        found: Results inside the site.
        width: Tokens of a block.
        tolerance: The largest absolute difference that is none.
    """
    mass = one.mass[:, layer] if one.is_batch else one.mass[layer][None]
    sizes = [each.view(len(mass), -1).sum(1) for each in (one.query_sizes, one.key_sizes)]
    queries, keys = (int(each.max()) for each in sizes)
    # Sequences with padding are looked at in the tests.
    whole = (sizes[0] == queries) & (sizes[1] == keys)
    first = first_of(one.query_sizes.view(len(mass), -1)[int(sizes[0].argmax())].tolist(), width)
    verdict = Verdict("no oracle")
    if not bool(whole.any()):
        return verdict
    for softmax in (*found, *(in_parts(found, keys) if queries == keys else ())):
        for rows in readings(softmax, len(mass), queries, keys):
            wanted = reduced(rows, width, first)
            if wanted.shape != mass.shape:
                continue
            verdict.compared += 1
            off = float((wanted - mass.double())[whole].abs().max())
            verdict.difference = min(verdict.difference, off)
        if not verdict.compared and softmax.shape[-1] > max(queries, keys):
            off = without_closed(softmax, mass, width)
            verdict.compared += off < math.inf
            verdict.difference = min(verdict.difference, off)
    if verdict.compared:
        verdict.status = "equal" if verdict.difference <= tolerance else "WRONG"
    elif found and len(mass) * queries * keys <= _MOST // 8:
        # Of larger ones the probabilities were not kept: what was is something else.
        verdict.status = "WRONG"
    return _said(verdict, found, f"{len(mass)} sequences, {queries} queries x {keys} keys")


def _said(verdict: Verdict, found: Sequence[torch.Tensor], what: str) -> Verdict:
    """A verdict, and what was compared where it is a bad one."""
    if verdict.status == "WRONG":
        shapes = ", ".join(sorted({str(list(each.shape)) for each in found}))
        verdict.says = (
            f"map of {what}; softmax results {shapes}; {verdict.compared} compared, "
            f"nearest {verdict.difference:.2g}"
        )
    return verdict


# ------------------------------------------------------------------------------------------------------------- images


def cells_of(tiles: list[int] | None, sizes: list[int]) -> tuple[list[int], int]:
    """The block of each text token and then of each image token, as a capture without a tokenizer makes them.

    Args:
        tiles: Frames, rows and columns of cells, which come last; ``None``: no image is there.
        sizes: Tokens of each block.

    Returns:
        Blocks in the order text, image; and how many of them are text tokens, which have one block each.
    """
    cells = math.prod(tiles) if tiles else 0
    words = len(sizes) - cells
    found = list(range(words))
    if tiles:
        # Cells of one size: squares of tokens of one frame.
        step = math.isqrt(sum(sizes[words:]) // cells)
        frames, rows, columns = tiles
        for frame in range(frames):
            for row in range(rows * step):
                for column in range(columns * step):
                    found.append(words + (frame * rows + row // step) * columns + column // step)
    return found, words


def orders(blocks: list[int], words: int, count: int) -> Iterator[tuple[int, ...]]:
    """What ``count`` tokens of a sequence may be, as blocks: text before or after the image, -1 for tokens of neither,
    which lie in two places at most: before, between or after the two."""
    rest, text, image = count - len(blocks), tuple(blocks[:words]), tuple(blocks[words:])
    splits = {
        each
        for one in range(rest + 1)
        for each in ((one, rest - one, 0), (one, 0, rest - one), (0, one, rest - one))
    }
    made = [
        (-1,) * before + first + (-1,) * between + second + (-1,) * after
        for before, between, after in sorted(splits)
        for first, second in ((text, image), (image, text))
    ]
    yield from dict.fromkeys(made)


def judged_image(one: Any, found: list[torch.Tensor], tolerance: float) -> Verdict:
    """A block map of one site on its own grid, of one image, beside the softmax results of the site."""
    sizes = [each.tolist() for each in (one.query_sizes, one.key_sizes)]
    (query, query_words), (key, key_words) = (
        cells_of(one.metadata[f"{side}_tiles"], each)
        for side, each in zip(("query", "key"), sizes, strict=True)
    )
    verdict, mass = Verdict("no oracle"), one.mass.flatten(0, -3).mean(0).double()
    for softmax in found:
        q_len, kv_len = softmax.shape[-2:]
        if q_len < len(query) or kv_len < len(key):
            continue
        mean = softmax.double().flatten(0, -3).mean(0)
        for rows in orders(query, query_words, q_len):
            # A sequence that attends to itself is of the same tokens on both sides.
            is_same = query == key and q_len == kv_len
            for columns in (rows,) if is_same else orders(key, key_words, kv_len):
                wanted = _summed(_summed(mean.mT, columns, mass.shape[1]).mT, rows, mass.shape[0])
                wanted /= torch.tensor(sizes[0])[:, None]
                verdict.compared += 1
                verdict.difference = min(verdict.difference, float((wanted - mass).abs().max()))
    if found:
        verdict.status = "equal" if verdict.difference <= tolerance else "WRONG"
    tokens = f"{len(query)} queries x {len(key)} keys ({query_words} and {key_words} of text)"
    return _said(verdict, found, tokens)


def _summed(values: torch.Tensor, blocks: Sequence[int], count: int) -> torch.Tensor:
    """Sums over the rows of each block."""
    index = torch.tensor(blocks)
    return values.new_zeros(count, values.shape[1]).index_add_(0, index[index >= 0], values[index >= 0])
