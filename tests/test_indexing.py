"""Attention weights that are computed on demand, indexed in every way that torch takes."""

import numpy
import pytest
import torch
import zoo
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attnpatch

HEADS, ROWS, KEYS = 4, 40, 24
_RANDOM = numpy.random.default_rng(0)
INDICES = {
    "integer": 1,
    "negative": -1,
    "numpy integer": numpy.int64(1),
    "small numpy integer": numpy.int8(-2),
    "integer tensor": torch.tensor(1),
    "integers": (1, -2, 3, 4),
    "numpy integers": (numpy.int32(0), numpy.int64(3), numpy.uint8(7)),
    "slice": slice(0, 1),
    "rows": (slice(None), slice(None), slice(10, 20)),
    "rows of numpy": (slice(None), slice(None), slice(numpy.int64(10), numpy.int64(20))),
    "rows of tensors": (..., slice(torch.tensor(3), torch.tensor(9)), slice(None)),
    "step": (..., slice(None, None, 3), slice(1, -1, 2)),
    "step and end": (slice(None), slice(3, 0, 1), slice(-30, None, 7)),
    "beyond the end": (..., slice(30, 400), slice(None, 1000)),
    "nothing": (..., slice(5, 5), slice(None)),
    "nothing by a list": (slice(None), slice(None), []),
    "none": None,
    "none between": (slice(None), None, 1, ..., None),
    "ellipsis": ...,
    "empty tuple": (),
    "list": [0, 1, 1],
    "list of rows": (slice(None), slice(None), [3, 30, 31]),
    "list of a head": (0, 3, [5, -1]),
    "list before an integer": (slice(None), [2, 0], 5),
    "integer before a list": (1, slice(None), [2, 0]),
    "tuple of places": (0, (1, 2)),
    "range": (slice(None), slice(None), range(3, 9)),
    "list of keys": (..., [23, 0, 0]),
    "list and none": (None, slice(None), [1, 2], None, slice(4, 9)),
    "numpy array": numpy.array([1, 0]),
    "numpy rows": (slice(None), slice(None), numpy.array([0, 39, -3])),
    "numpy rows of another width": (slice(None), slice(None), numpy.array([0, 39], dtype=numpy.int32)),
    "numpy mask": (slice(None), slice(None), _RANDOM.random(ROWS) < 0.3),
    "numpy matrix": (slice(None), slice(None), numpy.array([[0, 1], [2, 3]])),
    "tensor": torch.tensor([1, 0, 1]),
    "tensor of rows": (..., torch.tensor([39, 0, 5], dtype=torch.int32), slice(None)),
    "matrix of rows": (slice(None), slice(None), torch.tensor([[1, 2], [3, 4]])),
    "all rows, shuffled": (slice(None), slice(None), torch.from_numpy(_RANDOM.permutation(ROWS))),
    "two tensors": (slice(None), torch.tensor([0, 3]), torch.tensor([7, 8])),
    "two lists apart": (slice(None), [0, 1], slice(None), [2, 3]),
    "diagonal": (..., torch.arange(KEYS), torch.arange(KEYS)),
    "mask of sequences": torch.tensor([False, True]),
    "mask of heads": (slice(None), torch.tensor([True, False, False, True])),
    "list of booleans": (slice(None), [True, False, False, True]),
    "mask of rows and keys": (0, 1, torch.from_numpy(_RANDOM.random((ROWS, KEYS)) < 0.5)),
    "mask of nothing": (slice(None), torch.zeros(HEADS, dtype=torch.bool)),
    "true": True,
    "bytes": torch.tensor([0, 1], dtype=torch.uint8),
    "too far": (slice(None), 4),
    "too far in a list": (slice(None), [0, 4]),
    "too many": (0, 0, 0, 0, 0),
    "backwards": (..., slice(None, None, -1)),
    "two ellipses": (..., 0, ...),
    "float": 0.5,
    "floats": [0.5, 1.0],
    "mask of another length": (slice(None), torch.tensor([True, False])),
    "text": "rows",
}  # fmt: skip
# Computed whole: several index tensors, or one of several dimensions, are no row-wise step.
WHOLE = {
    "numpy matrix", "matrix of rows", "two tensors", "two lists apart", "diagonal", "mask of rows and keys", "true",
    "bytes", "text",
}  # fmt: skip


# What torch refuses; most of it is not known before.
REFUSED = {
    "too far", "too far in a list", "too many", "backwards", "two ellipses", "float", "floats", "mask of another length",
}  # fmt: skip


class Attention(nn.Module):
    def forward(self, query, key):
        return (query @ key.mT).softmax(-1)


CASE = zoo.Case("indexed", lambda implementation: nn.Identity(), register=(Attention,))


def tensors(needs_grad=False):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, HEADS, n, 8) for n in (ROWS, KEYS))
    return [torch.randn(shape, generator=generator).requires_grad_(needs_grad) for shape in shapes]


def indexed(module, index, needs_grad):
    query, key = tensors(needs_grad)
    try:
        found = module(query, key)[index]
        value = found.detach().clone()
        grads = []
        if needs_grad and value.numel():
            loss = (found * torch.linspace(-1, 1, value.numel()).reshape(value.shape)).sum()
            grads = list(torch.autograd.grad(loss, (query, key)))
        return [value, *grads]
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        return type(error), str(error)


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
@pytest.mark.parametrize("needs_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", INDICES)
def test_index(name, needs_grad):
    """The native elements to the last bit, with their gradients; or the native error."""
    module = Attention()
    native = indexed(module, INDICES[name], needs_grad)
    with zoo.by_rows(module, CASE, min_tokens=1):
        mine = indexed(module, INDICES[name], needs_grad)
    if isinstance(native, tuple):
        assert mine == native
        return
    assert torch.equal(mine[0], native[0])
    for got, want in zip(mine[1:], native[1:], strict=True):
        assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in INDICES if name not in WHOLE | REFUSED])
def test_only_what_is_asked_for(name):
    """Nothing is computed by indexing itself, and then the rows that are read, with at most three beside each run."""
    module, index = Attention(), INDICES[name]
    places = torch.arange(2 * HEADS * ROWS).reshape(2, HEADS, ROWS, 1).expand(2, HEADS, ROWS, KEYS)
    rows = len(torch.unique(places[index]))
    with zoo.by_rows(module, CASE, min_tokens=1):
        weights = module(*tensors())
        with FlopCounterMode(display=False) as flops:
            found = weights[index]
            assert flops.get_total_flops() == 0
            found.sum()
        assert attnpatch.report(module).totals["materialised"] == (rows > 0)
    # A row is computed with three others, another head and another sequence: alone it would round otherwise.
    assert flops.get_total_flops() <= 2 * KEYS * 8 * rows * 4 * 2 * 2


@pytest.mark.parametrize(
    "rows", [numpy.int64(17), [17, 18, 30], numpy.array([17, 30]), slice(17, 19)], ids=repr
)
def test_a_few_rows_of_long_weights(rows):
    """As many multiplications as a few rows take, of weights that nothing has computed."""
    module = Attention()
    query, key = (torch.randn(1, 2, 512, 8) for _ in range(2))
    native = module(query, key)[:, :, rows]
    with zoo.by_rows(module, CASE, min_tokens=1), FlopCounterMode(display=False) as flops:
        found = module(query, key)[:, :, rows].clone()
        found = found + 0
    assert torch.equal(found, native)
    assert flops.get_total_flops() <= 2 * 2 * 512 * 8 * 16
