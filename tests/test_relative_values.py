"""A table read by distance, as keys and as values: rows x keys x width is never held."""

import pytest
import torch
from held import check
from torch.nn import functional as F

BATCH, HEADS, TOKENS, WIDTH, FAR = 2, 2, 120, 8, 10


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distances(n=TOKENS, m=TOKENS):
    """Of each key from each query, as numbers of rows of a table."""
    return (torch.arange(m)[None] - torch.arange(n)[:, None]).clamp(-FAR, FAR) + FAR


def softmax(q, k):
    return (q @ k.transpose(-1, -2)).mul(0.3).softmax(-1)


READ = {
    "index": lambda table: table[distances()],
    "embedding": lambda table: F.embedding(distances(), table),
    "one distance after another": lambda table: table[torch.arange(TOKENS)[:, None] * 0 + distances()],
}
# [batch, tokens, width]
VALUES = {
    "einsum": lambda p, e: torch.einsum("bts,tsd->btd", p, e),
    "einsum, the table first": lambda p, e: torch.einsum("tsd,bts->btd", e, p),
    "matmul, rows first": lambda p, e: torch.matmul(p.transpose(0, 1), e).transpose(0, 1),
    "matmul of one row": lambda p, e: (p.unsqueeze(-2) @ e).squeeze(-2),
    "bmm": lambda p, e: torch.bmm(p.permute(1, 0, 2), e).permute(1, 0, 2),
}
KEYS = {
    "einsum": lambda q, e: torch.einsum("btd,tsd->bts", q, e),
    "einsum of the table first": lambda q, e: torch.einsum("tsd,btd->bts", e, q),
    "matmul, rows first": lambda q, e: torch.matmul(q.transpose(0, 1), e.transpose(1, 2)).transpose(0, 1),
    "bmm": lambda q, e: torch.bmm(q.permute(1, 0, 2), e.mT).permute(1, 0, 2),
}


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("name", VALUES)
def test_values(name, read):
    def formula(q, k, v, table):
        p = softmax(q, k)
        return p @ v + VALUES[name](p, READ[read](table))

    tensors = [tensor(BATCH, TOKENS, WIDTH, seed=i) for i in range(3)]
    check(formula, *tensors, tables=(tensor(2 * FAR + 1, WIDTH, seed=3),), pairs=TOKENS**2)


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("first", [False, True])
def test_keys(name, first):
    def formula(q, k, v, table):
        by_distance, content = KEYS[name](q, table[distances()]), q @ k.mT
        scores = by_distance + content if first else content + by_distance
        return scores.mul(0.3).softmax(-1) @ v

    tensors = [tensor(BATCH, TOKENS, WIDTH, seed=i) for i in range(3)]
    check(formula, *tensors, tables=(tensor(2 * FAR + 1, WIDTH, seed=3),), pairs=TOKENS**2)


def test_both_with_heads_folded():
    """As in tensor2tensor's translation models: heads beside sequences, rows in front."""

    def formula(q, k, v, key_table, value_table):
        n, d = q.shape[2:]
        places = distances()
        content = q @ k.mT
        rows = q.permute(2, 0, 1, 3).reshape(n, BATCH * HEADS, d)
        by_distance = torch.matmul(rows, key_table[places].transpose(-1, -2))
        scores = content + by_distance.view(n, BATCH, HEADS, n).permute(1, 2, 0, 3)
        p = scores.masked_fill(torch.arange(n) > torch.arange(n)[:, None], -1e9).softmax(-1)
        rows = p.permute(2, 0, 1, 3).reshape(n, BATCH * HEADS, n)
        values = torch.matmul(rows, value_table[places])
        return p @ v + values.view(n, BATCH, HEADS, d).permute(1, 2, 0, 3)

    tensors = [tensor(BATCH, HEADS, TOKENS, WIDTH, seed=i) for i in range(3)]
    tables = tensor(2 * FAR + 1, WIDTH, seed=3), tensor(2 * FAR + 1, WIDTH, seed=4)
    check(formula, *tensors, tables=tables, pairs=TOKENS**2)
