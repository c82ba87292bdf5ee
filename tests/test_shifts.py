"""Relative positions by shifting: scores by distance that are read in rows of another length are by rows too.

Each shift is checked against a look-up of the distance, and the module that uses it against itself.
"""

import hypothesis.strategies as st
import pytest
import torch
from held import Attention, check
from hypothesis import given
from torch.nn import functional as F

import attnpatch

BATCH, HEADS, TOKENS, WIDTH = 2, 2, 96, 8


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def zeros(like, *shape):
    return torch.zeros(*shape, dtype=like.dtype)


def by_column_before(scores):
    """A column of zeros before, the two last dimensions swapped in name, and the first row left out."""
    b, h, n, m = scores.shape
    padded = torch.cat([zeros(scores, b, h, n, 1), scores], dim=-1)
    return padded.view(b, h, m + 1, n)[:, :, 1:].view_as(scores)


def by_padding(scores):
    b, h, n, m = scores.shape
    return F.pad(scores, (1, 0)).reshape(b, h, m + 1, n)[:, :, 1:, :].reshape(b, h, n, m)


def by_flat_slice(scores):
    b, h, n, m = scores.shape
    return F.pad(scores, (1, 0)).view(b, h, -1)[:, :, n:].view(b, h, n, m)


def by_stride(scores):
    b, h, n, m = scores.shape
    padded = F.pad(scores, (1, 0))
    return padded.as_strided((b, h, n, m), (h * n * (m + 1), n * (m + 1), m, 1), n)


def by_stride_of_all(scores):
    b, h, n, m = scores.shape
    padded = F.pad(scores, (1, 0)).flatten(0, 1)
    return padded.as_strided((b * h, n, m), (n * (m + 1), m, 1), n).view(b, h, n, m)


def folded(scores):
    b, h, n, m = scores.shape
    padded = F.pad(scores.flatten(0, 1), [1, 0, 0, 0])
    return padded.view(b, h, m + 1, n).narrow(2, 1, m).reshape(b, h, n, m)


def twice_as_many_kept(scores):
    """2n - 1 distances, of which each row keeps n, all of them in the end: the shift above, and half of it."""
    return by_column_before(scores)[..., : scores.shape[-2]]


def twice_as_many_flat(scores):
    """2n - 1 distances: padded to 2n, laid end to end, padded once more and read in rows of 2n - 1."""
    b, h, n, _ = scores.shape
    flat = F.pad(scores, [0, 1, 0, 0, 0, 0]).view(b, h, 2 * n * n)
    return F.pad(flat, [0, n - 1, 0, 0]).view(b, h, n + 1, 2 * n - 1)[:, :, :n, n - 1 :]


def twice_as_many_joined(scores):
    """The same with tensors of zeros put at the end."""
    b, h, n, _ = scores.shape
    wide = torch.cat([scores, zeros(scores, b, h, n, 1)], dim=3)
    flat = torch.cat([wide.flatten(2), zeros(scores, b, h, n - 1)], dim=2)
    return flat.reshape(b, h, n + 1, 2 * n - 1)[:, :, :n, (n - 1) :]


def rows_first(scores):
    """Rows in front, sequences and heads behind; the keys that are wanted are picked by number."""
    s = scores.permute(2, 3, 0, 1)
    n, m = s.shape[:2]
    s = torch.cat([zeros(s, n, 1, *s.shape[2:]), s], dim=1).view(m + 1, n, *s.shape[2:])[1:]
    s = s.reshape(n, m, *s.shape[2:])
    return torch.index_select(s, 1, torch.arange(m)).permute(2, 3, 0, 1)


def row_dropped(scores):
    """Nothing is padded: the matrix is read in rows of another length, of which the first is left out."""
    b, h, n, m = scores.shape
    return scores.reshape(b, h, m, n)[:, :, 1:].reshape(b, h, n, m - 1)[..., : n - 1]


# As many distances as keys: what wraps around is masked by the host.
AS_MANY = [by_column_before, by_padding, by_flat_slice, by_stride, by_stride_of_all, folded]
SHIFTS = {
    **{f.__name__: (f, TOKENS) for f in AS_MANY},
    "rows_first": (rows_first, TOKENS),
    "as many, twice shifted": (lambda s: by_padding(by_padding(s)), TOKENS),
    "twice_as_many_kept": (twice_as_many_kept, 2 * TOKENS - 1),
    "twice_as_many_flat": (twice_as_many_flat, 2 * TOKENS - 1),
    "twice_as_many_joined": (twice_as_many_joined, 2 * TOKENS - 1),
    "row_dropped": (row_dropped, 2 * TOKENS),
}
QUERY, KEY, VALUE = (tensor(BATCH, HEADS, TOKENS, WIDTH, seed=i) for i in range(3))


@pytest.mark.parametrize("name", SHIFTS)
def test_what_it_shifts(name):
    """Row i of the result begins so many places after row i of the source, or the test would show something else."""
    shift, distances = SHIFTS[name]
    places = torch.arange(TOKENS * distances, dtype=torch.float32).view(1, 1, TOKENS, distances) + 1
    found = shift(places)[0, 0]
    assert (found[:, 1:] - found[:, :-1] == 1).float().mean() > 0.95
    assert not torch.equal(found, places[0, 0, :, : found.shape[1]])


@pytest.mark.parametrize("name", SHIFTS)
def test_shifts(name):
    shift, distances = SHIFTS[name]
    table = tensor(HEADS, distances, WIDTH, seed=3)

    def formula(q, k, v, table):
        scores = shift(q @ table.transpose(-1, -2))
        count = scores.shape[-1]
        return ((q @ k.mT)[..., :count] + scores).mul(0.3).softmax(-1) @ v[..., :count, :]

    check(formula, QUERY, KEY, VALUE, tables=(table,), pairs=TOKENS**2)


@pytest.mark.parametrize("name", SHIFTS)
def test_shifts_first(name):
    """The shifted scores are what the others are added to, and their mask is the site's own."""
    shift, distances = SHIFTS[name]
    table = tensor(HEADS, distances, WIDTH, seed=3)

    def formula(q, k, v, table):
        scores = shift(torch.einsum("bhid,hjd->bhij", q, table))
        count = scores.shape[-1]
        hidden = torch.ones(TOKENS, count, dtype=torch.bool).triu(1)
        scores = (scores + (q @ k.mT)[..., :count]).masked_fill(hidden, -1e9)
        return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v[..., :count, :])

    check(formula, QUERY, KEY, VALUE, tables=(table,), pairs=TOKENS**2, gradients=False)


def back(probabilities):
    """Probabilities by key become probabilities by distance, for values by distance."""
    b, h, n, _ = probabilities.shape
    flat = F.pad(probabilities, [0, n - 1]).view(b, h, n * (2 * n - 1))
    return F.pad(flat, [n, 0]).view(b, h, n, 2 * n)[:, :, :, 1:]


def test_values_by_distance():
    table = tensor(HEADS, 2 * TOKENS - 1, WIDTH, seed=3)

    def formula(q, k, v, table):
        p = (twice_as_many_flat(q @ table.mT) + q @ k.mT).mul(0.3).softmax(-1)
        return p @ v + back(p) @ table

    check(formula, QUERY, KEY, VALUE, tables=(table,), pairs=TOKENS**2)


def test_transformer_xl():
    """Positions of a memory before the sequence: more keys than rows, and two terms with biases of their own."""
    memory = 40

    def formula(x, before, content_bias, position_bias, positions):
        keys = torch.cat([before, x], 0)
        content = torch.einsum("ibnd,jbnd->ijbn", x + content_bias, keys)
        by_distance = torch.einsum("ibnd,jnd->ijbn", x + position_bias, positions)
        pad = zeros(by_distance, by_distance.shape[0], 1, *by_distance.shape[2:])
        padded = torch.cat([pad, by_distance], dim=1)
        shifted = padded.view(by_distance.shape[1] + 1, by_distance.shape[0], *by_distance.shape[2:])[1:]
        scores = (content + shifted.view_as(by_distance)) * 0.3
        hidden = (torch.arange(TOKENS + memory) > torch.arange(memory, TOKENS + memory)[:, None])[
            ..., None, None
        ]
        p = scores.float().masked_fill(hidden, -1e30).type_as(scores).softmax(1)
        return torch.einsum("ijbn,jbnd->ibnd", p, keys)

    x, before = tensor(TOKENS, BATCH, HEADS, WIDTH), tensor(memory, BATCH, HEADS, WIDTH, seed=1)
    biases = tensor(HEADS, WIDTH, seed=2), tensor(HEADS, WIDTH, seed=3)
    positions = tensor(TOKENS + memory, HEADS, WIDTH, seed=4)
    check(formula, x, before, *biases, positions, pairs=TOKENS * (TOKENS + memory), gradients=False)


@given(
    n=st.integers(2, 13),
    m=st.integers(2, 27),
    columns=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    rows=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    cut=st.integers(0, 3),
    step=st.integers(4, 9),
    data=st.data(),
)
def test_any_reading(n, m, columns, rows, cut, step, data):
    """Padded anywhere, read in rows of any length, cut, and read again: what torch makes of it."""
    query, keys = tensor(2, n, 4), tensor(2, m, 4, seed=1)
    height, width = n + sum(rows), m + sum(columns)
    sizes = [size for size in range(1, height * width + 1) if height * width % size == 0]
    first = data.draw(st.sampled_from(sizes))
    kept = first - min(cut, first - 1)
    again = [
        size
        for size in range(1, kept * (height * width // first) + 1)
        if kept * (height * width // first) % size == 0
    ]
    second = data.draw(st.sampled_from(again))

    def formula(q, k):
        scores = F.pad(q @ k.mT, (*columns, *rows), value=0.5)
        read = scores.reshape(2, first, -1)[:, first - kept :].reshape(2, second, -1)
        return read.softmax(-1) @ torch.linspace(-1, 1, read.shape[-1] * 3).view(-1, 3)

    model = Attention(formula)
    native = model(query, keys)
    with attnpatch.patched(model, mode="always", rows=step):
        got = model(query, keys)
    torch.testing.assert_close(got, native)
