"""The matmul path, attention written by hand, against float64, in every spelling that hypothesis puts together.

A spelling is one choice for each step between the product of query and key and the product with the values.
The same module evaluated in float64 without attnpatch is the reference.
"""

import dataclasses
import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
import zoo
from hypothesis import assume, currently_in_test_context, event, example, given
from torch import nn
from zoo import by_rows

from attnpatch.rows.evaluate import step_memory
from attnpatch.rows.evaluate.evaluator import Evaluator

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PRODUCTS = {
    # [B, H, N, D] each
    "matmul": lambda q, k: torch.matmul(q, k.transpose(-1, -2)),
    "operator": lambda q, k: q @ k.mT,
    "method": lambda q, k: q.matmul(k.transpose(2, 3)),
    "einsum": lambda q, k: torch.einsum("bhid,bhjd->bhij", q, k),
    "einsum_sequence_first": lambda q, k: torch.einsum(
        "ibnd,jbnd->bnij", q.permute(2, 0, 1, 3), k.permute(2, 0, 1, 3)
    ),
    "einsum_heads_last": lambda q, k: torch.einsum("bihd,bjhd->bhij", q.transpose(1, 2), k.transpose(1, 2)),
    "einsum_ellipsis": lambda q, k: torch.einsum("... i d, ... j d -> ... i j", q, k),
    "bmm": lambda q, k: torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)),
    "baddbmm": lambda q, k: torch.baddbmm(
        torch.empty(q.shape[0] * q.shape[1], q.shape[2], k.shape[2], dtype=q.dtype),
        q.flatten(0, 1),
        k.flatten(0, 1).transpose(1, 2),
        beta=0,
        alpha=0.5,
    ),
    "baddbmm_bias": lambda q, k: torch.full((1, 1, k.shape[2]), 0.25, dtype=q.dtype).baddbmm(
        batch1=q.flatten(0, 1), batch2=k.flatten(0, 1).mT, beta=1.0, alpha=1.0
    ),
    "einsum_folded": lambda q, k: torch.einsum("b i d, b j d -> b i j", q.flatten(0, 1), k.flatten(0, 1)),
    "key_by_query": lambda q, k: torch.matmul(k, q.transpose(-1, -2)).transpose(-1, -2),
}
VALUES = {
    "matmul": lambda p, v: torch.matmul(p, v),
    "operator": lambda p, v: p @ v,
    "einsum": lambda p, v: torch.einsum("bhij,bhjd->bhid", p, v),
    "einsum_heads_last": lambda p, v: torch.einsum("bhij,bjhd->bihd", p, v.transpose(1, 2)).transpose(1, 2),
    "bmm": lambda p, v: torch.bmm(p.reshape(-1, *p.shape[-2:]), v.flatten(0, 1)).unflatten(0, p.shape[:2]),
    "bmm_view": lambda p, v: torch.bmm(p.view(-1, p.size(-2), p.size(-1)), v.flatten(0, 1)).view(
        *p.size()[:3], v.size(-1)
    ),
    "transposed": lambda p, v: (v.transpose(-1, -2) @ p.transpose(-1, -2)).transpose(-1, -2),
}
SCALES = {
    "none": lambda s: s,
    "multiply": lambda s: s * 0.4,
    "number_first": lambda s: 0.4 * s,
    "divide": lambda s: s / math.sqrt(6.0),
    "tensor": lambda s: s * torch.tensor(0.4, dtype=s.dtype),
    "in_place": lambda s: s.mul_(0.4),
    "augmented": lambda s: s.__imul__(0.4),
    "softcap": lambda s: torch.tanh(s / 3.0) * 3.0,
    "clamp": lambda s: s.clamp(-2.0, 2.0),
}
MASKS = {
    # bias is additive with -inf where keep is false
    "none": lambda s, bias, keep: s,
    "add": lambda s, bias, keep: s + bias,
    "add_first": lambda s, bias, keep: bias + s,
    "add_function": lambda s, bias, keep: torch.add(s, bias, alpha=1.0),
    "augmented": lambda s, bias, keep: s.__iadd__(bias),
    "add_in_place": lambda s, bias, keep: s.add_(bias),
    "masked_fill": lambda s, bias, keep: s.masked_fill(~keep, float("-inf")),
    "masked_fill_least": lambda s, bias, keep: s.masked_fill(~keep, torch.finfo(s.dtype).min),
    "masked_fill_in_place": lambda s, bias, keep: s.masked_fill_(keep.logical_not(), float("-inf")),
    "where": lambda s, bias, keep: torch.where(keep, s, torch.full([], float("-inf"), dtype=s.dtype)),
    "where_bias": lambda s, bias, keep: torch.where(keep, s, bias),
    "minus": lambda s, bias, keep: s - 1e4 * (~keep).to(s.dtype),
}


def _float32_softmax(s):
    return F.softmax(s, dim=-1, dtype=torch.promote_types(s.dtype, torch.float32)).to(s.dtype)


def _manual_softmax(s):
    weights = torch.exp(s - s.max(dim=-1, keepdim=True).values)
    return weights / weights.sum(-1, keepdim=True)


def _sink_softmax(s):
    """As gpt-oss: one more column that takes mass and is dropped."""
    sinks = torch.linspace(-1.0, 1.0, s.shape[1], dtype=s.dtype).reshape(1, -1, 1, 1)
    combined = torch.cat([s, sinks.expand(s.shape[0], -1, s.shape[-2], -1)], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    return F.softmax(combined, dim=-1, dtype=combined.dtype)[..., :-1]


SOFTMAXES = {
    "method": lambda s: s.softmax(-1),
    "function": lambda s: torch.softmax(s, dim=-1),
    "functional": lambda s: F.softmax(s, dim=3),
    "float32": _float32_softmax,
    "upcast": lambda s: s.to(torch.promote_types(s.dtype, torch.float32)).softmax(-1).type_as(s),
    "manual": _manual_softmax,
    "logsumexp": lambda s: torch.exp(s - torch.logsumexp(s, -1, keepdim=True)),
    "log_softmax": lambda s: F.log_softmax(s, dim=-1).exp(),
    "sinks": _sink_softmax,
}
AFTERS = {
    "none": lambda p: p,
    "dropout": lambda p: F.dropout(p, p=0.0, training=True),
    "dropout_module": nn.Dropout(0.3).eval(),
    "nan_to_num": lambda p: torch.nan_to_num(p, 0.0),
    "head_scale": lambda p: p * torch.linspace(0.5, 1.5, p.shape[1], dtype=p.dtype).view(1, -1, 1, 1),
    "renormalise": lambda p: p / p.sum(dim=-1, keepdim=True),
    "contiguous": lambda p: p.contiguous(),
}
LAYOUTS = ["contiguous", "sequence_before_heads", "strided", "expanded", "reversed_storage"]


@dataclasses.dataclass(frozen=True)
class Spelling:
    """One way to write attention, its shapes, and the tile it is forced into."""

    product: str = "matmul"
    values: str = "matmul"
    scale: str = "multiply"
    scale_query: bool = False
    mask: str = "none"
    broadcast: tuple[bool, bool, bool] = (False, True, False)  # batch, heads, rows
    masked_rows: bool = False
    softmax: str = "method"
    after: str = "none"
    batch: int = 2
    heads: int = 4
    group: int = 1
    q_len: int = 13
    kv_len: int = 13
    head_dim: int = 8
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    rows: int | None = 5
    tile_heads: int | None = None
    seed: int = 0

    def tensors(self) -> dict:
        """The arguments of the module."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = [1 if flag else size for flag, size in zip(self.broadcast, self._mask_shape(), strict=True)]
        keep = torch.rand(*shape, self.kv_len, generator=generator) < 0.7
        keep[..., 0] = True
        if self.masked_rows:
            keep[..., ::3, :] = False
        bias = torch.randn(keep.shape, generator=generator).masked_fill(~keep, float("-inf")).to(self.dtype)
        return {
            "query": self._tensor(generator, self.heads, self.q_len),
            "key": self._tensor(generator, self.heads // self.group, self.kv_len),
            "value": self._tensor(generator, self.heads // self.group, self.kv_len),
            "bias": bias,
            "keep": keep,
        }

    def _mask_shape(self):
        return self.batch, self.heads, self.q_len

    def _tensor(self, generator, heads, length):
        shape = (self.batch, heads, length, self.head_dim)
        if self.layout == "sequence_before_heads":
            swapped = (self.batch, length, heads, self.head_dim)
            return torch.randn(swapped, generator=generator).to(self.dtype).transpose(1, 2)
        if self.layout == "strided":
            wide = torch.randn(*shape[:2], 2 * length, 2 * self.head_dim, generator=generator)
            return wide.to(self.dtype)[..., ::2, 1::2]
        if self.layout == "expanded":
            return torch.randn(1, *shape[1:], generator=generator).to(self.dtype).expand(shape)
        if self.layout == "reversed_storage":
            return torch.randn(*shape[:2], self.head_dim, length, generator=generator).to(self.dtype).mT
        return torch.randn(shape, generator=generator).to(self.dtype)


class HandWritten(nn.Module):
    """Attention as a spelling has it."""

    def __init__(self, spelling: Spelling):
        super().__init__()
        self.spelling = spelling

    def forward(self, query, key, value, bias, keep):
        spelling = self.spelling
        if spelling.group > 1:
            key, value = (
                x[:, :, None].expand(-1, -1, spelling.group, -1, -1).flatten(1, 2) for x in (key, value)
            )
        if spelling.scale_query:
            query = query * 0.5
        scores = PRODUCTS[spelling.product](query, key)
        if scores.dim() == 3:
            scores = scores.view(spelling.batch, spelling.heads, scores.shape[-2], scores.shape[-1])
        scores = SCALES[spelling.scale](scores)
        scores = MASKS[spelling.mask](scores, bias, keep)
        probabilities = SOFTMAXES[spelling.softmax](scores)
        probabilities = AFTERS[spelling.after](probabilities)
        return VALUES[spelling.values](probabilities, value)


class Holder(nn.Module):
    """A model with one site."""

    def __init__(self, spelling: Spelling):
        super().__init__()
        self.attention = HandWritten(spelling)

    def forward(self, **kwargs):
        return self.attention(**kwargs)


CASE = zoo.Case("hand_written", lambda implementation: nn.Identity(), register=(HandWritten,))


def rounding(tensors: dict, dtype: torch.dtype) -> float:
    """How far two equally good evaluations may be apart.

    To first order a probability moves by its share of the rounding of its score, ``eps * |score|``, once when
    the product is taken and once in each of at most four steps on it; the output is rounded itself.
    """
    score = (tensors["query"].double().norm(dim=-1).max() * tensors["key"].double().norm(dim=-1).max()).item()
    return 4 * torch.finfo(dtype).eps * (1 + score) * tensors["value"].double().abs().max().item()


def check(spelling: Spelling, **policy):
    """By rows: no farther from float64 than the module itself, NaN where it is NaN, nothing materialised."""
    import attnpatch

    model = Holder(spelling)

    def run():
        # Fresh tensors every time: a spelling may work in place.
        return model(**spelling.tensors())

    try:
        native = run()
    except RuntimeError as error:
        # torch lays the result of einsum out as it likes, and some of those no view can fold.
        assert "view size is not compatible" in str(error)
        return None
    # With one key, or one row on the right, the product with the values looks like scores; with the keys in
    # front, only what normalises them tells rows from keys. Then the result may be deferred in its turn.
    usual = spelling.kv_len > 1 and spelling.product != "key_by_query"
    usual = usual and (spelling.q_len > 1 or spelling.values != "transposed")
    double = {k: v.double() if v.is_floating_point() else v for k, v in spelling.tensors().items()}
    exact = model(**double)
    with by_rows(model, CASE, rows=spelling.rows, heads=spelling.tile_heads, **policy):
        got = run()
        report = attnpatch.report(model)
        totals = report.totals
        assert totals["materialised"] == 0, f"{totals}\n{report}"
        if usual and spelling.q_len > 1:
            assert totals["by_rows"] + totals["fused"] > 0, totals

    if usual:
        assert type(got) is torch.Tensor
    assert got.shape == native.shape and got.dtype == native.dtype
    assert torch.equal(got.isnan(), native.isnan()), "other rows are NaN"
    # In float64 a row may be NaN that is a number in half precision, and the reverse: compare what both know.
    known = ~(exact.isnan() | native.isnan())
    if known.any():
        error = (got.double() - exact)[known].abs().max().item()
        native_error = (native.double() - exact)[known].abs().max().item()
        assert error <= native_error + rounding(double, spelling.dtype), (error, native_error)
    if currently_in_test_context():
        event(f"bits {'equal' if zoo.equal_with_nan(got, native) else 'differ'}")
    return report


@st.composite
def spellings(draw):
    """Any combination of steps that runs natively."""
    group = draw(st.sampled_from([1, 1, 2]))
    heads = group * draw(st.integers(1, 3))
    q_len = draw(st.integers(1, 33))
    return Spelling(
        product=draw(st.sampled_from(sorted(PRODUCTS))),
        values=draw(st.sampled_from(sorted(VALUES))),
        scale=draw(st.sampled_from(sorted(SCALES))),
        scale_query=draw(st.booleans()),
        mask=draw(st.sampled_from(sorted(MASKS))),
        broadcast=draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
        masked_rows=draw(st.sampled_from([False, False, True])),
        softmax=draw(st.sampled_from(sorted(SOFTMAXES))),
        after=draw(st.sampled_from(sorted(AFTERS))),
        batch=draw(st.integers(1, 3)),
        heads=heads,
        group=group,
        q_len=q_len,
        kv_len=draw(st.one_of(st.just(q_len), st.integers(1, 33))),
        head_dim=draw(st.sampled_from([2, 5, 8, 16])),
        dtype=draw(st.sampled_from(DTYPES)),
        layout=draw(st.sampled_from(LAYOUTS)),
        rows=draw(st.one_of(st.none(), st.integers(1, q_len + 5))),
        tile_heads=draw(st.one_of(st.none(), st.integers(1, heads + 1))),
        seed=draw(st.integers(0, 1000)),
    )


@given(spellings())
@example(Spelling(mask="augmented", scale="augmented", rows=12))
@example(Spelling(mask="masked_fill", masked_rows=True))
@example(Spelling(mask="add", masked_rows=True, after="nan_to_num", broadcast=(True, True, False)))
@example(Spelling(mask="add", broadcast=(True, True, True), rows=1))
@example(Spelling(product="key_by_query", values="transposed"))
@example(Spelling(product="bmm", values="bmm_view", mask="where"))
@example(Spelling(softmax="sinks", scale="softcap", mask="add", group=2))
@example(Spelling(q_len=1, kv_len=33, rows=1))
@example(Spelling(q_len=33, kv_len=1, rows=32))
def test_any_spelling(spelling):
    check(spelling)


@pytest.mark.parametrize(
    ("step", "choice"),
    [
        (step, choice)
        for step, table in {
            "product": PRODUCTS,
            "values": VALUES,
            "scale": SCALES,
            "mask": MASKS,
            "softmax": SOFTMAXES,
            "after": AFTERS,
        }.items()
        for choice in table
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=[str(d)[6:] for d in DTYPES])
def test_each_choice(step, choice, dtype):
    """Each spelling of each step, one at a time, in each dtype and with rows that leave one over."""
    for rows, heads in [(5, None), (4, 2), (12, 3), (100, None)]:
        check(Spelling(**{step: choice}, dtype=dtype, rows=rows, tile_heads=heads, kv_len=17))
    if step == "mask":
        for broadcast in [
            (False, False, False),
            (True, True, False),
            (False, True, True),
            (True, True, True),
        ]:
            check(Spelling(**{step: choice}, dtype=dtype, broadcast=broadcast, tile_heads=2))
    if step == "product":
        for layout in LAYOUTS:
            check(Spelling(**{step: choice}, dtype=dtype, layout=layout, tile_heads=2))


@given(
    spelling=spellings(),
    q_len=st.integers(17, 70),
    kv_len=st.integers(17, 70),
    head_dim=st.sampled_from([8, 16, 32]),
    rows=st.integers(7, 75),
    tile_heads=st.sampled_from([None, 2, 3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_bits(spelling, q_len, kv_len, head_dim, rows, tile_heads, dtype):
    """Shapes as models have them, two heads at least: the very bits of the module itself.

    Outside of these a matrix product may take another kernel for a tile than for the whole: torch has one of
    its own for fewer than 400 multiplications, and a query that is read by columns, or that is the right
    operand, is packed by its number of rows.
    """
    spelling = dataclasses.replace(
        spelling, q_len=q_len, kv_len=kv_len, head_dim=head_dim, rows=rows, tile_heads=tile_heads, dtype=dtype
    )
    assume(spelling.heads > 1)
    assume(spelling.layout != "reversed_storage")
    assume(spelling.product != "key_by_query" and spelling.values != "transposed")
    model = Holder(spelling)
    try:
        native = model(**spelling.tensors())
    except RuntimeError as error:
        assert "view size is not compatible" in str(error)
        return
    with by_rows(model, CASE, rows=rows, heads=tile_heads):
        got = model(**spelling.tensors())
    assert zoo.equal_with_nan(got, native), f"differs by at most {(got - native).abs().max()}"


@given(spellings())
def test_rows_of_scores_that_lie_apart(spelling):
    """As those of long sequences do, in every spelling: what lies between them is in no result."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(step_memory, "_LONG_ROWS", 2)
        check(spelling)


@pytest.mark.parametrize("kv_len", [8193, 8196, 8448, 9003])
@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"mask": "add", "masked_rows": True},
        {"product": "bmm", "values": "bmm_view"},
        {"softmax": "float32"},
    ],
    ids=str,
)
def test_bits_of_long_rows(choice, kv_len, monkeypatch):
    """Lengths at which rows of scores are laid apart in memory, beside the same steps with rows end to end."""
    spelling = Spelling(**choice, heads=2, q_len=40, kv_len=kv_len, head_dim=16, rows=16)
    model, seen = Holder(spelling), []
    native = model(**spelling.tensors())
    padded = Evaluator.padded
    monkeypatch.setattr(Evaluator, "padded", lambda self, value: seen.append(padded(self, value)) or seen[-1])
    with by_rows(model, CASE, rows=16), torch.no_grad():
        assert zoo.equal_with_nan(model(**spelling.tensors()), native)
    assert seen and all(rows.shape[-1] % 16 == 0 and rows.shape[-1] % 256 for rows in seen)


KEYWORDS = [
    lambda s: torch.softmax(input=s, dim=-1),
    lambda s: torch.unsqueeze(input=s, dim=0)[0].softmax(dim=-1),
    lambda s: torch.transpose(input=s, dim0=-1, dim1=-2).mT.softmax(-1),
    lambda s: torch.squeeze(input=s[None], dim=0).softmax(-1),
    lambda s: torch.mul(input=s, other=2.0).softmax(-1),
    lambda s: torch.reshape(input=s, shape=s.shape).softmax(-1),
    lambda s: torch.permute(input=s, dims=(0, 1, 2, 3)).softmax(-1),
    lambda s: torch.narrow(input=s, dim=0, start=0, length=s.shape[0]).softmax(-1),
    lambda s: torch.flatten(input=s, start_dim=0, end_dim=1).unflatten(dim=0, sizes=s.shape[:2]).softmax(-1),
    lambda s: torch.cat(tensors=[s, s], dim=-1).softmax(-1)[..., : s.shape[-1]],
    lambda s: torch.where(condition=s > 0, input=s, other=s * 2).softmax(-1),
    lambda s: (s - torch.max(input=s, dim=-1, keepdim=True).values).softmax(-1),
    lambda s: (
        torch.arange(s.shape[0])[(s > -1e9).sum((1, 2, 3)).clamp(max=0)].reshape(-1, 1, 1, 1) + s.softmax(-1)
    ),
]


@pytest.mark.parametrize("spelling", range(len(KEYWORDS)))
def test_arguments_by_keyword(spelling):
    """What torch takes by keyword is taken by keyword."""

    class Attention(torch.nn.Module):
        def forward(self, query, key, value):
            return KEYWORDS[spelling](query @ key.mT) @ value

    import attnpatch

    attnpatch.register(Attention)
    model = torch.nn.Sequential(Attention())
    query, key, value = (zoo.floats(2, 4, 19, 8, seed=i) for i in range(3))
    native = model[0](query, key, value)
    with attnpatch.patched(model, mode="always", rows=5):
        got = model[0](query, key, value)
    assert torch.equal(got, native)


ALIASES = [
    lambda s: (s.detach() * 2 + s).softmax(-1),
    lambda s: (s.positive().mul(3) + s).softmax(-1),
    lambda s: (s.to(s.dtype) * 2 + s.float()).softmax(-1),
    lambda s: (s.transpose(-1, -2).mul(2).transpose(-1, -2) - s).softmax(-1),
    lambda s: (s.view(-1, *s.shape[-2:]).exp().view(s.shape) + s).softmax(-1),
    lambda s: (s[..., 1:].mul(2) + s[..., :-1]).softmax(-1) @ torch.ones(s.shape[-1] - 1, s.shape[-1]),
    lambda s: s.softmax(-1) * s.detach().softmax(-1).mul(2),
]


@pytest.mark.parametrize("spelling", range(len(ALIASES)))
def test_a_step_writes_over_nothing_that_is_still_needed(spelling):
    """Two names of one tensor in one graph: a step in place through one must not change the other."""

    class Attention(torch.nn.Module):
        def forward(self, query, key, value):
            scores = (query @ key.mT) * 0.5
            return ALIASES[spelling](scores) @ value

    import attnpatch

    attnpatch.register(Attention)
    model = torch.nn.Sequential(Attention())
    query, key, value = (zoo.floats(2, 4, 19, 8, seed=i) for i in range(3))
    with torch.no_grad():
        native = model[0](query, key, value)
        with attnpatch.patched(model, mode="always", rows=5):
            got = model[0](query, key, value)
    torch.testing.assert_close(got, native)


def test_a_learned_sink_scales_the_output():
    """granite_swa's: each row's output times a sigmoid of its logsumexp. The output that leaves is computed."""

    class Attention(torch.nn.Module):
        def forward(self, query, key, value):
            scores = (query @ key.mT) * 0.5
            share = (scores.logsumexp(-1) - torch.tensor([0.5, 1.0, -1.0, 2.0]).view(1, -1, 1)).sigmoid()
            return (scores.softmax(-1) @ value) * share.unsqueeze(-1)

    import attnpatch

    model = torch.nn.Sequential(Attention())
    query, key, value = (zoo.floats(2, 4, 101, 8, seed=i) for i in range(3))
    native = model[0](query, key, value)
    with attnpatch.patched(model, mode="always", rows=7):
        got = model[0](query, key, value)
        report = attnpatch.report(model)
    assert type(got) is torch.Tensor and torch.equal(got, native)
    assert report.totals["by_rows"] == 1 and report.totals["materialised"] == 0, report
