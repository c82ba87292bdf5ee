"""The SDPA path, ``F.scaled_dot_product_attention``, against dense float64, for whatever hypothesis draws."""

import dataclasses
import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
import zoo
from hypothesis import currently_in_test_context, event, example, given
from zoo import by_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MASKS = ["none", "boolean", "additive", "causal", "additive_and_causal"]
KEYS = ["same", "same", "batch_of_one", "fewer_dimensions"]
LAYOUTS = ["contiguous", "sequence_before_heads", "strided", "expanded", "reversed_storage"]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of ``F.scaled_dot_product_attention`` and the tile it is forced into."""

    batch: int = 2
    heads: int = 4
    group: int = 1  # query heads per key head
    q_len: int = 13
    kv_len: int = 13
    head_dim: int = 8
    value_dim: int = 8
    dimensions: int = 4
    dtype: torch.dtype = torch.float32
    mask: str = "none"
    broadcast: tuple[bool, bool, bool] = (False, False, False)  # batch, heads, rows
    masked_rows: bool = False
    scale: float | None = None
    layout: str = "contiguous"
    keys: str = "same"  # leading dimensions of key and value broadcast against those of query
    rows: int | None = 5
    tile_heads: int | None = None
    seed: int = 0

    def tensors(self):
        """Query, key, value and the keyword arguments of the call."""
        generator = torch.Generator().manual_seed(self.seed)
        query = self._tensor(generator, self.heads, self.q_len, self.head_dim)
        key = self._tensor(generator, self.heads // self.group, self.kv_len, self.head_dim)
        value = self._tensor(generator, self.heads // self.group, self.kv_len, self.value_dim)
        if self.keys == "batch_of_one" and self.dimensions == 4:
            key, value = key[:1], value[:1]
        elif self.keys == "fewer_dimensions" and self.dimensions == 4 and self.group == 1:
            key, value = key[0], value[0]
        kwargs = {"scale": self.scale, "enable_gqa": self.group > 1, "is_causal": "causal" in self.mask}
        if self.mask not in ("none", "causal"):
            kwargs["attn_mask"] = self._mask(generator)
        return query, key, value, kwargs

    def _tensor(self, generator, heads, length, dim):
        shape = (self.batch, heads, length, dim)[4 - self.dimensions :]
        if self.layout == "sequence_before_heads" and self.dimensions > 2:
            swapped = (*shape[:-3], shape[-2], shape[-3], shape[-1])
            tensor = torch.randn(swapped, generator=generator).to(self.dtype).transpose(-3, -2)
        elif self.layout == "strided":
            tensor = torch.randn(*shape[:-2], 2 * length, 2 * dim, generator=generator).to(self.dtype)
            tensor = tensor[..., ::2, 1::2]
        elif self.layout == "expanded" and self.dimensions > 2:
            tensor = torch.randn(1, *shape[1:], generator=generator).to(self.dtype).expand(shape)
        elif self.layout == "reversed_storage":
            tensor = torch.randn(*shape[:-2], dim, length, generator=generator).to(self.dtype).mT
        else:
            tensor = torch.randn(shape, generator=generator).to(self.dtype)
        assert tensor.shape == shape
        return tensor

    def _mask(self, generator):
        shape = [self.batch, self.heads, self.q_len, self.kv_len][4 - self.dimensions :]
        for axis, broadcast in zip((-4, -3, -2), self.broadcast, strict=True):
            if broadcast and len(shape) >= -axis:
                shape[axis] = 1
        keep = torch.rand(shape, generator=generator) < 0.7
        keep[..., 0] = True
        if self.masked_rows:
            keep[..., ::3, :] = False  # rows that see nothing at all
        if self.mask == "boolean":
            return keep
        bias = torch.randn(shape, generator=generator)
        return bias.masked_fill(~keep, float("-inf")).to(self.dtype)


def dense_float64(query, key, value, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    """The specification: softmax of all the scores, in float64. A row with nothing to see is NaN."""
    query, key, value = query.double(), key.double(), value.double()
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        # torch aligns the triangle at the top left: row i sees keys 0 to i.
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~keep, float("-inf"))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask.double()
    return scores.softmax(-1) @ value, scores


def rounding(scores, value, dtype):
    """How far two equally good evaluations may be apart.

    A probability moves by its share of the rounding of its score, ``eps * |score|``, in the dtype that scores
    are held in (torch holds those of half precision in float32), and the output is rounded to ``dtype``.
    """
    largest = scores.masked_fill(scores.isinf(), 0).abs().max().item()
    held = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return (2 * torch.finfo(dtype).eps + 4 * held * (1 + largest)) * value.abs().max().item()


@st.composite
def calls(draw):
    """Any call that torch accepts."""
    dimensions = draw(st.sampled_from([4, 4, 4, 3, 2]))
    group = draw(st.sampled_from([1, 1, 2, 3])) if dimensions == 4 else 1
    heads = group * draw(st.integers(1, 3))
    # torch's fused CPU kernel is cut only at multiples of 32 rows, of 64 from 192 rows on.
    q_len = draw(st.one_of(st.integers(1, 40), st.integers(65, 260)))
    head_dim = draw(st.sampled_from([1, 4, 5, 8, 16]))
    return Call(
        batch=draw(st.integers(1, 3)),
        heads=heads,
        group=group,
        q_len=q_len,
        kv_len=draw(st.one_of(st.just(q_len), st.integers(1, 260))),
        head_dim=head_dim,
        value_dim=draw(st.sampled_from([head_dim, head_dim, 3])),
        dimensions=dimensions,
        dtype=draw(st.sampled_from(DTYPES)),
        mask=draw(st.sampled_from(MASKS)),
        broadcast=draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
        masked_rows=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 1.0, 0.3])),
        layout=draw(st.sampled_from(LAYOUTS)),
        keys=draw(st.sampled_from(KEYS)),
        rows=draw(st.one_of(st.none(), st.integers(1, q_len + 5))),
        tile_heads=draw(st.one_of(st.none(), st.integers(1, heads + 1))),
        seed=draw(st.integers(0, 1000)),
    )


def check(call: Call) -> None:
    """By rows: no farther from float64 than the native call, and NaN where it is NaN."""
    import attnpatch

    query, key, value, kwargs = call.tensors()
    model = zoo.SdpaCall()
    with by_rows(model, zoo.SDPA_CALL, rows=call.rows, heads=call.tile_heads):
        try:
            native = F.scaled_dot_product_attention(query, key, value, **kwargs)
        except RuntimeError:
            # torch takes a mask together with is_causal only where a fused kernel serves the call. By rows
            # another kernel may serve it: no harm, if the result is right.
            assert call.mask == "additive_and_causal"
            native = None
        try:
            got = model(query, key, value, **kwargs)
        except RuntimeError:
            assert native is None
            return
        totals = attnpatch.report(model).totals
    exact, scores = dense_float64(query, key, value, **kwargs)
    native = exact.to(query.dtype) if native is None else native

    assert got.shape == native.shape and got.dtype == native.dtype
    assert torch.equal(got.isnan(), native.isnan()), "other rows are NaN"
    hidden = exact.isnan()
    assert torch.equal(got[hidden].nan_to_num(), native[hidden].nan_to_num()), "rows that see nothing differ"
    if not hidden.all():
        error = (got.double() - exact)[~hidden].abs().max().item()
        native_error = (native.double() - exact)[~hidden].abs().max().item()
        assert error <= native_error + rounding(scores, value, call.dtype), (error, native_error)
    assert totals["materialised"] == 0
    if call.q_len > 1 and call.mask != "additive_and_causal":  # which may be left to the native call
        assert totals["by_rows"] == 1, totals
    if currently_in_test_context():
        event(f"bits {'equal' if zoo.equal_with_nan(got, native) else 'differ'}")


@given(calls())
@example(Call(q_len=97, kv_len=97, mask="causal", rows=96))
@example(Call(q_len=197, kv_len=33, mask="causal", rows=32))
@example(Call(q_len=65, kv_len=197, mask="causal", rows=32))
@example(Call(q_len=5, kv_len=40, mask="causal", rows=2))
@example(Call(q_len=40, kv_len=5, mask="causal", rows=7))
@example(Call(mask="boolean", masked_rows=True, broadcast=(True, True, False)))
@example(Call(mask="additive", masked_rows=True, broadcast=(False, True, True)))
@example(Call(heads=6, group=3, tile_heads=2, mask="additive"))
@example(Call(heads=6, group=3, tile_heads=4, mask="boolean", broadcast=(False, False, True)))
@example(Call(dimensions=3, mask="boolean", broadcast=(False, True, False)))
@example(Call(dimensions=2, mask="causal"))
@example(Call(value_dim=3, dtype=torch.bfloat16, mask="additive"))
@example(Call(layout="expanded", mask="additive", broadcast=(True, False, True)))
@example(Call(q_len=1, kv_len=40, rows=1))
@example(Call(keys="batch_of_one", mask="additive", tile_heads=2))
@example(Call(keys="fewer_dimensions", mask="causal"))
@example(Call(mask="additive_and_causal", broadcast=(True, True, False), q_len=9, kv_len=17))
def test_any_call(call):
    check(call)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=[str(d)[6:] for d in DTYPES])
@pytest.mark.parametrize("rows", [1, 2, 7, 36, 100, 101, 300])
def test_every_dtype_and_mask(dtype, mask, rows):
    """The full cross that a random search might miss: dtype by mask by number of rows."""
    check(Call(q_len=101, kv_len=101, dtype=dtype, mask=mask, rows=rows, heads=4, group=2))


@given(calls())
def test_mask_of_fewer_dimensions(call):
    """A mask of ``[q_len, kv_len]`` or ``[kv_len]`` broadcasts to all the rest, as torch has it."""
    query, key, value, kwargs = call.tensors()
    if "attn_mask" not in kwargs:
        kwargs["attn_mask"] = torch.ones(call.q_len, call.kv_len, dtype=torch.bool).tril()
    while kwargs["attn_mask"].dim() > 2:
        kwargs["attn_mask"] = kwargs["attn_mask"][0]
    kwargs["is_causal"] = False
    native = F.scaled_dot_product_attention(query, key, value, **kwargs)
    model = zoo.SdpaCall()
    with by_rows(model, zoo.SDPA_CALL, rows=call.rows, heads=call.tile_heads):
        got = model(query, key, value, **kwargs)
    exact, scores = dense_float64(query, key, value, **kwargs)
    hidden = exact.isnan()
    assert torch.equal(got.isnan(), native.isnan())
    error = (got.double() - exact)[~hidden].abs()
    native_error = (native.double() - exact)[~hidden].abs()
    if error.numel():
        assert error.max() <= native_error.max() + rounding(scores, value, call.dtype)


def test_errors_stay_torchs():
    """A call that torch refuses is refused with torch's words."""
    query = torch.randn(1, 2, 9, 4)
    model = zoo.SdpaCall()
    cases = [
        ((query, torch.randn(1, 2, 9, 5), query), {}),
        ((query, query, query), {"attn_mask": torch.zeros(7, 7)}),
        ((query, query, query), {"attn_mask": torch.zeros(9, 9, dtype=torch.int64)}),
        ((query, torch.randn(1, 3, 9, 4), torch.randn(1, 3, 9, 4)), {"enable_gqa": True}),
        ((query, query.double(), query), {}),
        ((query, query), {}),
        ((query, query, query), {"is_casual": True}),
        ((query, query, query), {"query": query}),
        ((query, query, query, None, 0.0, False, 0.5), {}),
    ]
    for args, kwargs in cases:
        with pytest.raises((RuntimeError, TypeError)) as native:
            F.scaled_dot_product_attention(*args, **kwargs)
        with by_rows(model, zoo.SDPA_CALL, rows=4), pytest.raises(native.type) as mine:
            model(*args, **kwargs)
        assert str(mine.value).splitlines()[0] == str(native.value).splitlines()[0]
