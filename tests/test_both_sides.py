"""One score matrix that is used along both sides, or normalised along both: it is not held."""

import pytest
import torch
from held import Attention, check
from live import Live

import attnpatch

BATCH, HERE, THERE, WIDTH = 2, 150, 140, 16


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scores(x, y):
    return (x @ y.mT).mul(0.3)


def transport(x, y, rounds=3):
    """Sinkhorn's iterations in logarithms, with a constant mass on either side."""
    s = scores(x, y)
    u, v = torch.zeros(()), torch.zeros(())
    for _ in range(rounds):
        u = -torch.logsumexp(s + v, dim=2, keepdim=True)
        v = -torch.logsumexp(s + u, dim=1, keepdim=True)
    return (s + u + v).exp()


# Each softmax has its own use, along its own side: the same bits.
EXACT = {
    "there and back": lambda x, y: (scores(x, y).softmax(-1) @ y).sum(1)
    + (scores(x, y).mT.softmax(-1) @ x).sum(1),
    "back first": lambda x, y: (
        lambda s, back: torch.cat([s.softmax(-1) @ y, back @ x], 1)
    )(*(lambda s: (s, s.transpose(1, 2).softmax(-1)))(scores(x, y))),
    "copied": lambda x, y: torch.einsum(
        "bij,bid->bjd", scores(x, y).mT.contiguous().softmax(-1).transpose(-2, -1), x
    ),
    "the smaller side": lambda x, y: scores(x, y).mT.softmax(-1) @ x,
}  # fmt: skip
# The other side in front: a matrix library rounds what it reads by columns by their number.
ROUNDED_BY_COLUMNS = {
    "softmax of columns": lambda x, y: torch.einsum("bij,bid->bjd", scores(x, y).softmax(1), x),
    "one matrix": lambda x, y: (
        lambda s: torch.cat([s.softmax(-1) @ y, torch.einsum("bij,bid->bjd", s.softmax(1), x)], 1)
    )(scores(x, y)),
}  # fmt: skip
# What one side needs is computed before the other is cut: the same up to rounding.
ROUNDED = {
    "both softmaxes": lambda x, y: (scores(x, y).softmax(1) * scores(x, y).softmax(2)) @ y,
    "of one matrix": lambda x, y: (lambda s: (s.softmax(1) * s.softmax(2)).mT @ x)(scores(x, y)),
    "softmax, then the sums of columns": lambda x, y: (
        lambda p: x.mT @ (p / (1e-9 + p.sum(dim=1, keepdim=True)))
    )(scores(x, y).softmax(-1)),
    "log_softmax": lambda x, y: (
        (scores(x, y).log_softmax(1) + scores(x, y).log_softmax(2)).exp() @ y
    ),
    "softmax over columns, values over rows": lambda x, y: x.mT @ scores(x, y).softmax(-1),
    "by hand": lambda x, y: (
        lambda e: (e / e.sum(1, keepdim=True) / e.sum(2, keepdim=True)) @ y
    )((lambda s: (s - s.max(dim=1, keepdim=True).values).exp())(scores(x, y))),
    "twice": lambda x, y: scores(x, y).softmax(1).softmax(2).softmax(1) @ y,
    "optimal transport": lambda x, y: transport(x, y) @ y,
    "rows cut off afterwards": lambda x, y: (
        lambda s: (s.softmax(1) * s.softmax(2) / s.exp().sum(1, keepdim=True))[:, 7:-9] @ y
    )(scores(x, y)),
    "rows cut off between": lambda x, y: scores(x, y).softmax(1)[:, 7:].softmax(2).softmax(1) @ y,
    "heads that share weights": lambda x, y: (
        lambda p: (p.unsqueeze(1) * torch.arange(1.0, 5.0, dtype=p.dtype).view(4, 1, 1)).softmax(-1)
        @ (y.unsqueeze(1) * torch.arange(1.0, 5.0, dtype=p.dtype).view(4, 1, 1))
    )(scores(x, y).softmax(1) * HERE),
    "columns that are read twice": lambda x, y: (
        lambda p: (
            torch.cat([p[..., :100], p[..., 60:] * 2], -1).softmax(-1) @ torch.cat([y[:, :100], y[:, 60:]], 1)
        )
    )(scores(x, y).softmax(1) * HERE),
    "means of columns": lambda x, y: (
        lambda p: (p - p.mean(1, keepdim=True) + p.mean(1).unsqueeze(1) * 0.5).softmax(2) @ y
    )(scores(x, y).softmax(-1)),
    "sums of columns without them": lambda x, y: (lambda p: (p / p.sum(1).log1p().unsqueeze(1)) @ y)(
        scores(x, y).softmax(-1)
    ),
    "of all sequences": lambda x, y: (lambda s: (s - s.logsumexp((0, 1), keepdim=True)).exp().softmax(2) @ y)(
        scores(x, y)
    ),
    "the gradient stops": lambda x, y: (
        lambda s: (s.softmax(1).detach() * s.softmax(2) / (s.sigmoid().sum(1, keepdim=True).detach() + s.sigmoid().sum(1, keepdim=True))) @ y
    )(scores(x, y)),
}  # fmt: skip


@pytest.mark.parametrize("name", [*EXACT, *ROUNDED_BY_COLUMNS, *ROUNDED])
def test_both_sides(name):
    formula = {**EXACT, **ROUNDED_BY_COLUMNS, **ROUNDED}[name]
    x, y = tensor(BATCH, HERE, WIDTH), tensor(BATCH, THERE, WIDTH, seed=1)
    check(formula, x, y, pairs=HERE * THERE, is_exact=name in EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow(dtype):
    """Maxima and sums are kept in float32, so the result is as near as the native one."""
    x, y = (tensor(BATCH, n, WIDTH, seed=n).to(dtype) * 4 for n in (HERE, THERE))
    model = Attention(ROUNDED["both softmaxes"])
    native, exact = model(x, y), model(x.double(), y.double())
    with attnpatch.patched(model, mode="always", rows=32):
        got = model(x, y)
    error, own = ((t.double() - exact).abs().max() for t in (got, native))
    assert error <= 1.5 * own


def softmaxes(steps, last=1):
    """A softmax of a softmax, along one side and the other."""

    def formula(q, k, v):
        s = scores(q, k)
        for i in range(steps):
            s = s.softmax(last if (steps - i) % 2 else 3 - last)
        return s @ v

    return formula


def sinkhorn(steps):
    def formula(q, k, v):
        p = scores(q, k).softmax(-1)
        for _ in range(steps):
            p = p / p.sum(1, keepdim=True)
            p = p / p.sum(2, keepdim=True)
        return p @ v

    return formula


def sinkhorn_of_logarithms(steps):
    def formula(q, k, v):
        s = scores(q, k)
        for _ in range(steps):
            s = s.log_softmax(1).log_softmax(2)
        return s.exp() @ v

    return formula


NESTED = {
    "softmaxes": softmaxes,
    "softmaxes, keys last": lambda steps: softmaxes(steps, last=2),
    "sinkhorn": sinkhorn,
    "sinkhorn of logarithms": sinkhorn_of_logarithms,
    "transport": lambda steps: lambda q, k, v: transport(q, k, steps) @ v,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("name", NESTED)
def test_gradients_of_what_is_normalised_again(name, steps, dtype):
    """They are as near float64 as the native ones, where what the gradients of a line have in common is most of them."""
    model = Attention(NESTED[name](steps))
    errors = torch.zeros(2, 2, dtype=torch.float64)
    for seed in range(3):
        q, k, v = (
            (tensor(1, n, WIDTH, seed=3 * seed + i) + (i == 2)).to(dtype)
            for i, n in enumerate((HERE, THERE, THERE))
        )
        weights = tensor(1, HERE, WIDTH, seed=seed) + 1

        def gradients(*tensors, weights=weights):
            leaves = [t.detach().requires_grad_() for t in tensors]
            return torch.autograd.grad((model(*leaves) * weights.to(leaves[0].dtype)).sum(), leaves[:2])

        exact, native = gradients(q.double(), k.double(), v.double()), gradients(q, k, v)
        with attnpatch.patched(model, mode="always", rows=32):
            got = gradients(q, k, v)
            assert attnpatch.report(model).totals["materialised"] == 0
        for i, found in enumerate((got, native)):
            errors[i] += torch.stack(
                [
                    (g.double() - e).square().sum() / e.square().sum()
                    for g, e in zip(found, exact, strict=True)
                ]
            )
    assert (errors[0].sqrt() <= 1.1 * errors[1].sqrt()).all(), (errors[0] / errors[1]).sqrt()


def test_gradients_of_gradients_of_what_is_normalised_again():
    x, y = tensor(1, 40, WIDTH), tensor(1, 36, WIDTH, seed=1)
    model = Attention(NESTED["sinkhorn"](1))

    def penalty():
        q, k = x.clone().requires_grad_(), y.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(q, k, y).square().sum(), q, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [q, k])

    native = penalty()
    with attnpatch.patched(model, mode="always", rows=8):
        got = penalty()
    torch.testing.assert_close(got, native)


def test_what_needs_everything_is_counted():
    """A running sum along one side of what is normalised along the other holds all of it, and the report says so."""
    model = Attention(lambda x, y: scores(x, y).softmax(2).cumsum(1) @ y)
    x, y = tensor(BATCH, HERE, WIDTH), tensor(BATCH, THERE, WIDTH, seed=1)
    native = model(x, y)
    with attnpatch.patched(model, mode="always", rows=32), torch.no_grad(), Live() as live:
        got = model(x, y)
        report = attnpatch.report(model)
    torch.testing.assert_close(got, native)
    assert live.largest >= HERE * THERE * 4
    assert report.totals["materialised"] == 1 and report.totals["by_rows"] == 0, report


def mutual(s, keep):
    """Elements that are the largest of their row and of their column (mutual nearest neighbours), as ``keep`` says."""
    return s * keep(s, s.amax(-2, keepdim=True)).to(s.dtype) * (s == s.max(-1, keepdim=True).values)


# A column's own element, computed by steps that are cut along the other side, is another one in the last bit.
COMPARED = {
    "eq": lambda s: mutual(s, lambda a, most: a == most),
    "ge": lambda s: mutual(s, lambda a, most: a >= most),
    "lt": lambda s: mutual(s, lambda a, most: ~(a < most)),
    "difference": lambda s: mutual(s, lambda a, most: (a - most).eq(0)),
    "sign": lambda s: mutual(s, lambda a, most: (a - most).sign() + 1),
    "cast": lambda s: mutual(s, lambda a, most: ~(a - most).bool()),
    "cast by to": lambda s: mutual(s, lambda a, most: ~(a - most).to(torch.bool)),
    "the three largest": lambda s: s * (s >= s.topk(3, dim=-2).values[:, -1:]),
    "of a transpose": lambda s: s * (s.mT == s.mT.max(-1, keepdim=True).values).mT,
}


@pytest.mark.parametrize("dual", [False, True], ids=["scores", "dual softmax"])
@pytest.mark.parametrize("name", COMPARED)
def test_what_a_column_is_compared_with_is_its_own(name, dual):
    def chosen(x, y):
        s = scores(x, y).abs()
        return COMPARED[name](s.softmax(-1) * s.softmax(-2) if dual else s).softmax(-1) @ y

    x, y = tensor(1, HERE, WIDTH), tensor(1, THERE, WIDTH, seed=1)
    module = Attention(chosen)
    native = module(x, y)
    with attnpatch.patched(module, mode="always", min_tokens=0, rows=16):
        got = module(x, y)
        report = attnpatch.report(module)
    # Many of them are found, and a single one that is lost shows.
    torch.testing.assert_close(got, native, rtol=1e-5, atol=1e-6)
    assert report.totals["materialised"] == 1, report
