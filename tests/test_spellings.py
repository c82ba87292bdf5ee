"""However a module spells its products, they are by rows: the same bits, and no scores held."""

import pytest
import torch
from held import Attention, check
from live import Live
from torch.nn import functional as F

import attnpatch
from attnpatch.releases import tested

TOKENS, WIDTH = 200, 16


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def alike(p, v):
    """Two functions do not ask autocast for operands of one dtype."""
    return p, v.to(p.dtype)


BATCHED = {
    "einsum without an arrow": lambda q, k, v: torch.einsum(
        "...ij,...jz", torch.einsum("...id,...jd", q, k).softmax(-1), v
    ),
    "einsum by numbers": lambda q, k, v: torch.einsum(
        torch.einsum(q, [0, 1, 3], k, [0, 2, 3], [0, 1, 2]).softmax(-1),
        [..., 1, 2],
        v,
        [..., 2, 3],
        [..., 1, 3],
    ),
    "einsum by numbers, no result": lambda q, k, v: (
        torch.einsum(q, [..., 0, 2], k, [..., 1, 2]).softmax(-1) @ v
    ),
    "einsum of three": lambda q, k, v: torch.einsum(
        "bij,bjd,d->bid", torch.einsum("bid,bjd,d->bij", q, k, q[0, 0]).softmax(-1), v, v[0, 0]
    ),
    "einsum of three, the weights first": lambda q, k, v: (
        torch.einsum("d,bid,bjd->bij", q[0, 0], q, k).softmax(-1) @ v
    ),
    "einsum of four": lambda q, k, v: (
        torch.einsum("bid,d,bjd,b->bij", q, q[0, 0], k, k[:, 0, 0]).softmax(-1) @ v
    ),
    "einsum of the keys first": lambda q, k, v: torch.einsum("bjd,bid->bij", k, q).softmax(-1) @ v,
    "linalg.matmul": lambda q, k, v: torch.linalg.matmul(torch.linalg.matmul(q, k.mT).softmax(-1), v),
    "linalg.vecdot": lambda q, k, v: torch.linalg.vecdot(q[:, :, None], k[:, None]).softmax(-1) @ v,
    "reflected operator": lambda q, k, v: k.mT.__rmatmul__(q).softmax(-1) @ v,
    "baddbmm onto a mask": lambda q, k, v: (
        torch.baddbmm(q.new_zeros(1, 1, TOKENS), q, k.mT, alpha=0.5).softmax(-1) @ v
    ),
    "distances": lambda q, k, v: torch.cdist(q, k).neg().softmax(-1) @ v,
    "squared distances": lambda q, k, v: (-torch.cdist(q, k, p=2.0).square()).softmax(-1) @ v,
    "distances, p=1": lambda q, k, v: torch.cdist(q, k, p=1).neg().softmax(-1) @ v,
}
ALONE = {
    "mm": lambda q, k, v: torch.mm(q.mm(k.t()).softmax(-1), v),
    "addmm": lambda q, k, v: torch.addmm(q[:, :1], q, k.t(), beta=0.5, alpha=2.0).softmax(-1).mm(v),
    "tensordot": lambda q, k, v: torch.tensordot(
        *alike(torch.tensordot(q, k, dims=[[1], [1]]).softmax(-1), v), dims=1
    ),
    "tensordot by a number": lambda q, k, v: torch.tensordot(q, k.t(), 1).softmax(-1) @ v,
    "inner": lambda q, k, v: torch.inner(*alike(torch.inner(q, k).softmax(-1), v.t())),
}
HEADS = {
    "addbmm": lambda q, k, v: torch.addbmm(q[0, :, :1], q, k.mT).softmax(-1) @ v[0],
    "tensordot over two": lambda q, k, v: torch.tensordot(q, k, dims=([0, 2], [0, 2])).softmax(-1) @ v[0],
}


@pytest.mark.parametrize("name", [*BATCHED, *ALONE, *HEADS])
def test_products(name):
    formula = {**BATCHED, **ALONE, **HEADS}[name]
    lead = () if name in ALONE else (2,)
    query, key, value = (tensor(*lead, TOKENS, WIDTH, seed=i) for i in range(3))
    # Until torch 2.8, such an einsum is a product of the keys with all queries, whose number chooses the kernel.
    is_exact = name != "einsum of the keys first" or tested.is_at_least("torch", "2.9")
    check(formula, query, key, value, pairs=TOKENS**2, is_exact=is_exact)


@pytest.mark.parametrize("name", [*BATCHED, *ALONE, *HEADS, "a table"])
def test_under_autocast(name):
    """A product has the dtype that autocast gives it, before it is computed and after."""
    table = tensor(TOKENS, WIDTH, seed=3)
    tables = {"a table": lambda q, k, v: (torch.einsum("bid,jd->bij", q, table) + q @ k.mT).softmax(-1) @ v}
    formula = {**BATCHED, **ALONE, **HEADS, **tables}[name]
    lead = () if name in ALONE else (2,)
    tensors = [tensor(*lead, TOKENS, WIDTH, seed=i) for i in range(3)]
    model = Attention(formula)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        native = model(*tensors)
        with attnpatch.patched(model, mode="always", rows=32):
            got = model(*tensors)
            report = attnpatch.report(model)
    assert got.dtype == native.dtype and torch.equal(got, native)
    assert report.totals["materialised"] == 0 and report.totals["by_rows"] > 0, report


OUT = {
    "of the scores": lambda q, k, v: (
        torch.matmul(q, k.mT, out=torch.empty(2, TOKENS, TOKENS, dtype=q.dtype)).softmax(-1) @ v
    ),
    "read by its own name": lambda q, k, v: (
        lambda out: (torch.bmm(q, k.mT, out=out), out.mul_(0.5), torch.softmax(out, -1, out=out) @ v)[2]
    )(torch.empty(2, TOKENS, TOKENS, dtype=q.dtype)),
    "of steps": lambda q, k, v: (
        lambda s: torch.softmax(torch.add(s, 1.0, out=s), -1, out=s) @ v
    )(torch.bmm(q, k.mT)),
    "of the result": lambda q, k, v: torch.matmul((q @ k.mT).softmax(-1), v, out=torch.empty(2, TOKENS, WIDTH, dtype=q.dtype)),
}  # fmt: skip


@pytest.mark.parametrize("name", OUT)
def test_out(name):
    query, key, value = (tensor(2, TOKENS, WIDTH, seed=i) for i in range(3))
    check(OUT[name], query, key, value, pairs=TOKENS**2, gradients=False)


@pytest.mark.parametrize("shape", [(TOKENS, TOKENS), (1, 1)], ids=["fits", "another size"])
def test_out_that_is_there(shape):
    """Memory that the host has made is written to, and is what the host reads later."""
    out = torch.zeros(2, *shape)

    def formula(q, k, v):
        found = torch.matmul(q, k.mT, out=out)
        assert found is out
        return out.softmax(-1) @ v

    query, key, value = (tensor(2, TOKENS, WIDTH, seed=i) for i in range(3))
    model = Attention(formula)
    native, scores = model(query, key, value), out.clone()
    out.zero_()
    with attnpatch.patched(model, mode="always", rows=32):
        got = model(query, key, value)
    assert torch.equal(got, native) and torch.equal(out, scores)


def test_out_under_gradients():
    """torch does not differentiate through ``out=``, and says so."""
    model = Attention(
        lambda q, k, v: (
            torch.matmul(q, k.mT, out=torch.empty(2, TOKENS, TOKENS, dtype=q.dtype)).softmax(-1) @ v
        )
    )
    tensors = [tensor(2, TOKENS, WIDTH, seed=i).requires_grad_() for i in range(3)]
    with attnpatch.patched(model, mode="always"), pytest.raises(RuntimeError, match="out="):
        model(*tensors)


TABLES = {
    "einsum": lambda q, k, v, t: (q @ k.mT + torch.einsum("bid,jd->bij", q, t)).softmax(-1) @ v,
    "transposed": lambda q, k, v, t: (q @ t.T + q @ k.mT).softmax(-1) @ v,
    "slice": lambda q, k, v, t: (q @ k.mT + q @ t[:TOKENS].T).softmax(-1) @ v,
    "alone": lambda q, k, v, t: (q @ t.T).softmax(-1) @ v,
    "queries": lambda q, k, v, t: (q @ k.mT + torch.einsum("id,bjd->bij", t, k)).softmax(-1) @ v,
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_positions(name):
    query, key, value = (tensor(2, TOKENS, WIDTH, seed=i) for i in range(3))
    check(TABLES[name], query, key, value, tables=(tensor(TOKENS, WIDTH, seed=3),), pairs=TOKENS**2)


@pytest.mark.parametrize("width", [TOKENS, 2 * TOKENS, 64])
@pytest.mark.parametrize("way", ["matmul", "einsum", "addmm", "mm"])
def test_a_layer_is_no_table(way, width):
    """A layer that is written as a product is as it is natively, also where it is as wide as the sequence is long."""
    ways = {
        "matmul": lambda x, w: x @ w,
        "einsum": lambda x, w: torch.einsum("bid,dj->bij", x, w),
        "addmm": lambda x, w: torch.addmm(w[0], x.flatten(0, 1), w).unflatten(0, x.shape[:2]),
        "mm": lambda x, w: torch.mm(x.flatten(0, 1), w).unflatten(0, x.shape[:2]),
    }

    def formula(x, *weights):
        q, k, v = (ways[way](x, w) for w in weights)
        return F.gelu((q @ k.mT).div(10).softmax(-1) @ v)

    x, weights = tensor(2, TOKENS, WIDTH), tuple(tensor(WIDTH, width, seed=i) for i in range(1, 4))
    model = Attention(formula, *weights)
    with torch.no_grad():
        native = model(x)
        with attnpatch.patched(model, mode="always", rows=32, workspace=2**19), Live() as live:
            got = model(x)
    assert torch.equal(got, native)
    assert live.largest < 2 * TOKENS * max(TOKENS, width) * 4 or width != 64, live.what


def test_order_of_contraction():
    """Parts are contracted in the order that opt_einsum chooses for the whole operands, of which it knows the sizes."""
    pytest.importorskip("opt_einsum")

    def formula(q, k, v, narrow):
        scores = torch.einsum("bid,de,bje->bij", q, narrow, k)
        return scores.softmax(-1) @ v

    for width in (2, 64):
        query, key, value, narrow = (
            tensor(*s, seed=i)
            for i, s in enumerate([(2, 2 * TOKENS, width), (2, TOKENS, 8), (2, TOKENS, WIDTH), (width, 8)])
        )
        check(formula, query, key, value, narrow, pairs=2 * TOKENS**2)
