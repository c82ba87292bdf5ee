"""Steps that keep query rows apart: the same bits as natively, no score matrix made, and gradients to rounding."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import attnpatch

N, HEADS = 96, 4


class Largest(TorchDispatchMode):
    """The most elements that the memory of any one result has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else [result]:
            if type(part) is torch.Tensor:
                storage = part.untyped_storage().nbytes() // part.element_size()
                self.elements = max(self.elements, storage)
        return result


class Attention(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def forward(self, query, key, value):
        return self.step(query @ key.transpose(-1, -2)).softmax(-1) @ value


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, HEADS, N, 16, generator=generator).to(dtype) for _ in range(3)]


def gradients(step, tensors):
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    result = Attention(step)(*tensors)
    weights = torch.linspace(-1.0, 1.0, result.numel(), dtype=result.dtype).sin().view_as(result)
    return torch.autograd.grad(result, tensors, weights)


def by_rows(step, tensors):
    """The result of ``step`` inside attention by rows, what was materialised, and the most elements of a tensor."""
    module = Attention(step)
    with torch.no_grad(), attnpatch.patched(module, mode="always", rows=16), Largest() as largest:
        result = module(*tensors)
        report = attnpatch.report(module)
    assert report.totals["by_rows"]
    # What the report says is the largest is about what was: also where rows go by another name.
    # (Places that are sorted are of 8 bytes.)
    assert report.totals["largest"] <= largest.elements * 8
    return result, dict(report.sites[0].materialised_by), largest.elements


def check(step, dtype):
    tensors = inputs(dtype)
    with torch.no_grad():
        expected = Attention(step)(*tensors)
    result, materialised, largest = by_rows(step, tensors)
    assert not materialised
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    # All scores have 2 x HEADS x N x N elements; steps of 16 rows a sixth of that, and two of them side by side a third.
    assert largest <= 2 * HEADS * N * N // 3


def check_gradients(step):
    tensors = [tensor.double() for tensor in inputs()]
    try:
        expected = gradients(step, tensors)
    except RuntimeError as error:
        if "is not implemented" in str(error):
            pytest.skip(f"torch itself cannot: {error}")
        raise
    module = Attention(step)
    with attnpatch.patched(module, mode="always", rows=16):
        copies = [tensor.clone().requires_grad_() for tensor in tensors]
        result = module(*copies)
        weights = torch.linspace(-1.0, 1.0, result.numel(), dtype=result.dtype).sin().view_as(result)
        found = torch.autograd.grad(result, copies, weights)
    for mine, native in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, native, rtol=1e-9, atol=1e-11)


ASKS = {
    "new_tensor": lambda a: a.new_tensor(0.5),
    "new_zeros": lambda a: a.new_zeros(1),
    "new_ones": lambda a: a.new_ones((1,)),
    "new_full": lambda a: a.new_full((1,), 0.5),
    "new_empty": lambda a: a.new_empty(1).zero_(),
    "new_zeros of all": lambda a: a.new_zeros(a.shape),
    "new_full of all": lambda a: a.new_full(a.size(), 0.25),
    "zeros_like": lambda a: torch.zeros_like(a, memory_format=torch.preserve_format, layout=torch.strided),
    "ones_like": lambda a: torch.ones_like(a, device=a.device, requires_grad=False),
    "full_like": lambda a: torch.full_like(a, fill_value=0.5, dtype=torch.float32),
    "type()": lambda a: torch.ones(1).type(a.type()),
    "type of one's own": lambda a: torch.ones(1) * (a.type() == "torch.FloatTensor"),
    "type_as": lambda a: torch.ones(1).type_as(a),
    "result_type": lambda a: torch.ones(1, dtype=torch.result_type(a, 1.0)),
    "is_floating_point": lambda a: torch.ones(1) * torch.is_floating_point(a) * a.is_floating_point(),
    "is_complex, is_signed": lambda a: torch.ones(1) * (a.is_complex() + a.is_signed()),
    "is_pinned, is_shared, is_conj": lambda a: torch.ones(1) * (a.is_pinned() + a.is_shared() + a.is_conj()),
    "is_tensor": lambda a: torch.ones(1) * torch.is_tensor(a),
    "finfo": lambda a: torch.ones(1) * torch.finfo(a.dtype).eps,
    "promote_types": lambda a: torch.ones(1, dtype=torch.promote_types(a.dtype, torch.float16)),
    "numel": lambda a: torch.ones(1) / torch.numel(a),
    "hash": lambda a: torch.ones(1) * (hash(a) == hash(a)) * (id(a) == id(a)),
    "get_device": lambda a: torch.ones(1) * a.get_device(),
    "dim_order": lambda a: torch.ones(1) * len(a.dim_order()),
}


@pytest.mark.parametrize("name", ASKS)
def test_asking_computes_nothing(name):
    check(lambda a: a + ASKS[name](a), torch.float32)


WITHIN = {
    "layer_norm": lambda a: F.layer_norm(a, (N,), torch.linspace(0.5, 2, N).to(a), torch.ones(N).to(a)),
    "layer_norm over heads": lambda a: F.layer_norm(a.permute(0, 2, 3, 1), (HEADS,)).permute(0, 3, 1, 2),
    "nn.LayerNorm": lambda a: nn.LayerNorm(N, dtype=a.dtype)(a),
    "rms_norm": lambda a: F.rms_norm(a, [N]),
    "std": lambda a: a / a.std(-1, keepdim=True),
    "std over heads": lambda a: a / a.std(1, keepdim=True),
    "var_mean": lambda a: (
        (a - torch.var_mean(a, -1, keepdim=True)[1]) / torch.var_mean(a, -1, keepdim=True)[0]
    ),
    "std_mean": lambda a: a / torch.std_mean(a, dim=3, keepdim=True, correction=0)[0],
    "normalize": lambda a: F.normalize(a, dim=-1),
    "normalize over heads": lambda a: F.normalize(a, 1.0),
    "norm": lambda a: a / a.norm(dim=-1, keepdim=True),
    "vector_norm": lambda a: a / torch.linalg.vector_norm(a, 1, dim=-1).unsqueeze(-1),
    "linalg.norm": lambda a: a / torch.linalg.norm(a, dim=-1, keepdim=True),
    "flip": lambda a: a.flip(-1),
    "flip of heads and keys": lambda a: torch.flip(a, dims=(1, -1)),
    "roll": lambda a: a.roll(1, -1),
    "roll of heads and keys": lambda a: torch.roll(a, (1, 2), dims=(1, 3)),
    "aminmax": lambda a: a - torch.aminmax(a, dim=-1, keepdim=True).min,
    "median": lambda a: a - a.median(-1, keepdim=True).values,
    "kthvalue": lambda a: a.masked_fill(a < a.kthvalue(40, -1, True).values, -1e9),
    "quantile": lambda a: a.masked_fill(a < a.float().quantile(0.5, -1, keepdim=True), -1e9),
    "mode": lambda a: a - a.round().mode(-1, True)[0],
    "cummax": lambda a: a.cummax(-1)[0],
    "cumprod": lambda a: a.sigmoid().cumprod(-1),
    "logcumsumexp": lambda a: a.logcumsumexp(-1),
    "diff": lambda a: F.pad(a.diff(dim=-1), (0, 1)),
    "argsort": lambda a: a * (a.argsort(-1) < 20),
    "nanmean": lambda a: a - a.nanmean(-1, keepdim=True),
    "count_nonzero": lambda a: a / a.count_nonzero(-1).unsqueeze(-1),
}


PLACES = torch.arange(N)
LATER = torch.ones(N, N).triu(1).bool()
PADDED = PLACES > 80


def put(a, index, value=-1e9):
    a = a.clone()
    a[index] = value
    return a


def add_to(a, index, value=1.0):
    a[index] += value
    return a


def write_to_views(a):
    """Writes to views of the scores and to the scores under views, in turn."""
    part, folded = a[:, :, 1:], a.flatten(0, 1)
    part += 1
    a.transpose(-1, -2)[..., 3:] *= 2
    folded[:, 5:, 5:] = 0
    part.mul_(0.5)
    a[0] -= 1
    return folded.masked_fill_(LATER, -1e9).view_as(a)


def fill_blocks(a):
    blocks = torch.full_like(a, -1e9)
    for start in range(0, N, 32):
        blocks[..., start : start + 32, start : start + 32] = a[..., start : start + 32, start : start + 32]
    return blocks


def fill_empty(a):
    mask = torch.empty_like(a).zero_()
    mask[..., PADDED] = -1e9
    mask[:, :, :, 0].fill_(1.0)
    return a + mask


def degrees(a):
    return a.sigmoid().sum(-1)


def top(a):
    return a.topk(8, -1)


def top_only(a):
    values, places = top(a)
    return torch.full_like(a, -1e9).scatter(-1, places, values)


def top_kept(a):
    return a.masked_fill(~torch.zeros_like(a, dtype=torch.bool).scatter_(-1, top(a)[1], True), -1e9)


def like(a, *shape):
    return torch.linspace(-1, 1, 7).repeat(2000)[: torch.Size(shape).numel()].view(shape).to(a.dtype)


WRITES = {
    "mask": lambda a: put(a, (slice(None), slice(None), LATER)),
    "mask of keys": lambda a: put(a, (..., PADDED)),
    "mask of rows": lambda a: put(a, (slice(None), slice(None), PADDED)),
    "mask of scores": lambda a: put(a, a > 0.3, torch.tensor(0.25)),
    "mask in a slice": lambda a: put(a, (0, slice(None), LATER)),
    "mask of heads": lambda a: put(a, (slice(None), torch.tensor([True, False, True, False]))),
    "values where a mask says": lambda a: put(a, (..., LATER), like(a, int(LATER.sum()))),
    "diagonal": lambda a: put(a, (slice(None), slice(None), PLACES, PLACES)),
    "values on the diagonal": lambda a: put(a, (..., PLACES, PLACES), like(a, HEADS, N)),
    "values beside the diagonal": lambda a: put(a, (1, ..., PLACES[1:], PLACES[:-1]), like(a, HEADS, 1)),
    "list of heads": lambda a: put(a, (slice(None), [0, 2]), 0.0),
    "negative indices": lambda a: put(a, (..., torch.tensor([-1, 0]))),
    "one key": lambda a: put(a, (..., 0)),
    "one row": lambda a: put(a, (slice(None), slice(None), torch.tensor(0))),
    "one row, some keys": lambda a: put(a, (slice(None), slice(None), -1, slice(5, 9))),
    "one head": lambda a: put(a, (slice(None), 2), like(a, N)),
    "part of scores": lambda a: put(a, (..., slice(1, None), slice(1, None)), a[:, :, 1:, 1:] + 1),
    "bias": lambda a: put(a, (..., slice(1, None), slice(1, None)), like(a, N - 1, N - 1)),
    "every other key": lambda a: put(a, (..., slice(None, None, 2))),
    "every third row": lambda a: put(a, (slice(None), slice(None), slice(1, None, 3)), like(a, N)),
    "folded heads": lambda a: put(a.reshape(-1, N, N), (slice(2, 4), slice(3, None)), 0.0).view_as(a),
    "keys by rows": lambda a: put(a.mT, (..., slice(2, None), 0)).mT,
    "augmented": lambda a: add_to(a, (..., slice(1, None), slice(1, None))),
    "augmented row": lambda a: add_to(a, (slice(None), slice(None), 3), like(a, N)),
    "views": write_to_views,
    "blocks": fill_blocks,
    "empty": fill_empty,
    "nothing": lambda a: put(a, (..., slice(5, 5))),
    "index_fill": lambda a: a.index_fill(-1, PLACES[:5], -1e9),
    "index_fill_": lambda a: a.index_fill_(2, PLACES[:5], -1.0),
    "index_copy": lambda a: a.index_copy(-1, PLACES[:5], like(a, 2, HEADS, N, 5)),
    "index_add": lambda a: a.index_add(-1, torch.tensor([1, 1, 2]), like(a, 2, HEADS, N, 3)),
    "index_put": lambda a: a.index_put((torch.tensor(0),), like(a, 1)[0]),
    "select_scatter": lambda a: a.select_scatter(like(a, 2, HEADS, N), -1, 0),
    "slice_scatter": lambda a: torch.slice_scatter(a, a[..., 1:] + 1, -1, 1),
    "diagonal_scatter": lambda a: torch.diagonal_scatter(a, like(a, 2, HEADS, N - 1), 1, -2, -1),
    "fill_diagonal_": lambda a: a + torch.zeros_like(a[0, 0]).fill_diagonal_(-1e9),
    "copy_": lambda a: torch.empty_like(a).copy_(a),
    "iand": lambda a: a.masked_fill((a > 0).__iand__(a < 1), -5),
    "hardtanh_": lambda a: F.hardtanh_(a),
    "scatter of the largest": top_only,
    "scatter_ of the largest": top_kept,
    "scatter_add": lambda a: a.scatter_add(-1, top(a)[1], top(a)[0]),
    "scatter in a tensor": lambda a: a.scatter(index=top(a)[1], dim=3, value=-1.0),
    "tril": lambda a: a.exp().tril() + 1e-9,
    "triu_": lambda a: a.triu_(1),
    "triu of ones": lambda a: a.masked_fill(torch.ones_like(a, dtype=torch.bool).triu(1), -1e9),
    "tril of keys by rows": lambda a: torch.tril(a.mT, diagonal=-3).mT,
    "tril of folded heads": lambda a: a.flatten(0, 1).tril(2).view_as(a),
    "without the diagonal": lambda a: a - torch.diag_embed(a.diagonal(dim1=2, dim2=3)),
    "diagonal by rows": lambda a: a / (a.diagonal(dim1=-2, dim2=-1).abs() + 1).unsqueeze(-1),
    "diagonal by keys": lambda a: a / (a.diagonal(0, -2, -1).abs() + 1).unsqueeze(-2),
    "degrees of rows and keys": lambda a: a / (degrees(a).unsqueeze(-1) * degrees(a).unsqueeze(-2)).sqrt(),
    "degree of the last row": lambda a: a / degrees(a).amax(-1)[..., None, None],
}


JOINS = {
    "cat of keys": lambda a: torch.cat([like(a, 2, HEADS, N, 1), a], -1).softmax(-1)[..., 1:],
    "cat of rows": lambda a: torch.cat([a[:, :, 48:], a[:, :, :48]], 2),
    "cat of rows and a tensor": lambda a: torch.cat([like(a, 2, HEADS, 4, N), a], 2)[:, :, 4:],
    "cat of heads": lambda a: torch.cat((a[:, 2:], a[:, :2]), dim=1),
    "cat of sequences": lambda a: torch.concat((a, a * 2), axis=0)[1:3],
    "stack": lambda a: torch.stack([a, a * 2]).sum(0),
    "stack of heads": lambda a: torch.stack([a[:, head] * head for head in range(HEADS)], 1),
    "hstack": lambda a: torch.hstack([a[:, 1:], a[:, :1]]),
    "vstack": lambda a: torch.vstack((a, a))[:2],
    "pad of keys": lambda a: F.pad(a, (2, 3), value=1.0)[..., 2:-3],
    "pad of rows": lambda a: F.pad(a, (0, 0, 1, 2), value=-1.0)[:, :, :-3],
    "pad of both": lambda a: F.pad(a, (1, 0, 1, 0))[:, :, :-1, :-1],
    "pad by less": lambda a: F.pad(a, (-1, 1, -2, 2)),
    "pad of heads": lambda a: F.pad(a, (0, 0, 0, 0, 0, 1))[:, 1:],
    "repeat of sequences": lambda a: a[:1].repeat(2, 1, 1, 1),
    "repeat of heads": lambda a: a[:, :2].repeat(1, 2, 1, 1),
    "repeat of keys": lambda a: a[..., :32].repeat(1, 1, 1, 3),
    "repeat of rows": lambda a: a[:, :, :48].repeat(1, 1, 2, 1),
    "tile": lambda a: a[:, :2].tile((2, 1, 1)),
    "repeat_interleave of heads": lambda a: a[:, :2].repeat_interleave(2, 1),
    "repeat_interleave of rows": lambda a: a[:, :, :48].repeat_interleave(2, dim=2),
    "repeat_interleave of keys": lambda a: torch.repeat_interleave(a[..., :48], 2, -1),
    "roll of rows": lambda a: a.roll(5, 2),
    "roll of rows and keys": lambda a: torch.roll(a, (1, -3), (2, 3)),
    "flip of rows": lambda a: a.flip(2),
    "flip of rows and keys": lambda a: a.flip(-1, -2),
    "broadcast_tensors": lambda a: torch.broadcast_tensors(a.amax(-1, keepdim=True), a)[0] + a,
}


def after(change):
    """A step that looks at the scores after they were overwritten."""

    def step(a):
        later = a[:, :, 1:]
        change(a)
        return torch.cat([a[:, :, :1], later], 2) * 2

    return step


def normed(a):
    heads = torch.linspace(0.5, 2.0, HEADS).to(a)
    return F.batch_norm(a, heads - 1, heads, heads, -heads)


POINTWISE = {
    **{
        name: lambda a, name=name: (getattr(F, name, None) or getattr(torch, name))(a)
        for name in "trunc frac sgn erfc digamma sinc hardshrink softshrink tanhshrink softsign hardswish".split()
    },
    "threshold": lambda a: F.threshold(a, 0.1, -5.0),
    "logit": lambda a: a.sigmoid().logit(1e-2),
    "xlogy": lambda a: torch.xlogy(a, a.abs() + 1),
    "special": lambda a: torch.special.expit(a) + torch.special.erfc(a) + torch.special.entr(a.sigmoid()),
    "special.softmax": lambda a: torch.special.softmax(a, -1),
    "softmin": lambda a: F.softmin(a, dim=-1),
    "fmod": lambda a: a.fmod(2.0) + a % 3,
    "lerp": lambda a: torch.lerp(a, a * 2, 0.3),
    "addcdiv": lambda a: a.addcdiv(a, a.abs() + 1, value=0.5),
    "isclose": lambda a: a.masked_fill(a.isclose(a.new_zeros(()), atol=0.1), -9.0),
    "hypot, atan2": lambda a: torch.hypot(a, a * 2) + torch.atan2(a, a + 1),
    "exclusive or": lambda a: a.masked_fill((a > 0) ^ (a < 1), 0.0),
    "bucketize": lambda a: a * torch.bucketize(a, torch.tensor([-1.0, 0.0, 1.0]).to(a)),
    "searchsorted": lambda a: a + torch.searchsorted(torch.tensor([-1.0, 0.0, 1.0]).to(a), a),
    "prelu of heads": lambda a: F.prelu(a, torch.linspace(0, 1, HEADS).to(a)),
    "prelu": lambda a: F.prelu(a, torch.tensor([0.3]).to(a)),
    "batch_norm": normed,
    "take_along_dim": lambda a: a.take_along_dim(a.argsort(-1), -1),
    "relu in place": after(lambda a: F.relu(a, inplace=True)),
    "hardtanh in place, by position": after(lambda a: F.hardtanh(a, -1.0, 1.0, True)),
    "relu6 in place, by position": after(lambda a: F.relu6(a, True)),
    "threshold in place": after(lambda a: F.threshold(a, 0.1, -1.0, True)),
}


TABLES = {"within": WITHIN, "writes": WRITES, "joins": JOINS, "pointwise": POINTWISE}
STEPS = {f"{table}: {name}": step for table, steps in TABLES.items() for name, step in steps.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_steps(step, dtype):
    check(step, dtype)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_gradients_of_steps(step):
    check_gradients(step)


@pytest.mark.parametrize(
    "step",
    [
        lambda a: a - a.max(),
        lambda a: a - a.amin() + torch.max(a),
        lambda a: a if torch.isfinite(a).all() and not a.isnan().any() else a * 0,
    ],
)
def test_extremes_of_everything(step):
    check(step, torch.float32)


def masked_by(make):
    return lambda a: a.masked_fill(make(a), -1e9)


M = 160  # more rows than a head is wide


def started(a):
    mask = torch.zeros(M, M)
    mask[torch.arange(M), torch.arange(M)] = -1e9
    mask[:, 0] = 1.0
    mask += torch.ones(M, M).tril(-5)
    return a + mask


MASKS = {
    "ones().triu": masked_by(lambda a: torch.ones(M, M, dtype=torch.bool).triu(1)),
    "triu(ones)": masked_by(lambda a: torch.triu(torch.ones(M, M), diagonal=1).bool()),
    "full().triu": lambda a: a + torch.full((M, M), float("-inf")).triu(1),
    "new_full().triu_": lambda a: a + a.new_full((M, M), -1e4).triu_(1),
    "new_ones": masked_by(lambda a: ~torch.empty(1).new_ones(M, M, dtype=torch.bool).tril()),
    "tril, viewed": masked_by(lambda a: torch.tril(torch.ones(M, M)).view(1, 1, M, M) == 0),
    "eye": lambda a: a * (1 - torch.eye(M, dtype=a.dtype)[None]),
    "zeros": lambda a: a + torch.zeros(M, M),
    "zeros, written to": started,
    "whole numbers": lambda a: a + torch.full((M, M), 3),
    "truths": masked_by(lambda a: torch.full((M, M), True).triu(2)),
    "one minus": masked_by(lambda a: (1 - torch.tril(torch.ones(M, M))).bool()),
    "prefix": masked_by(lambda a: F.pad(torch.ones(M - 4, M - 4).triu(1), (4, 0, 4, 0)).bool()),
    "repeated": lambda a: (a.flatten(0, 1) + torch.full((M, M), -9.0).triu(1).repeat(8, 1, 1)).view_as(a),
    "band": masked_by(lambda a: ~(torch.ones(M, M).tril(3).bool() & torch.ones(M, M).triu(-3).bool())),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_made_inside(name):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, HEADS, M, 16, generator=generator) for _ in range(3)]
    expected = Attention(MASKS[name])(*tensors)
    result, materialised, largest = by_rows(MASKS[name], tensors)
    assert not materialised
    assert torch.equal(result, expected)
    # Of all heads, 16 rows; not one mask of rows by keys.
    assert largest < M * M


@pytest.mark.parametrize(
    "step",
    [
        lambda a: put(a, (..., N + 3)),
        lambda a: put(a, (..., LATER[:5])),
        lambda a: put(a, (..., PLACES + 1)),
        lambda a: put(a, (..., slice(0, 5)), torch.zeros(4)),
        lambda a: put(a, (..., PLACES, PLACES), torch.zeros(4)),
        lambda a: put(a, (..., PLACES, PLACES), torch.zeros(N, dtype=torch.float64)),
    ],
)
def test_writes_raise_as_natively(step):
    module = Attention(step)
    with pytest.raises((IndexError, RuntimeError)) as expected:
        module(*inputs())
    with attnpatch.patched(module, mode="always"), pytest.raises(expected.type) as found:
        module(*inputs())
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("step", [lambda a: a / a.std(-2, keepdim=True), lambda a: a / a.norm()])
def test_what_mixes_rows_is_counted(step):
    tensors = inputs()
    module = Attention(step)
    expected = module(*tensors)
    with attnpatch.patched(module, mode="always"):
        assert torch.equal(module(*tensors), expected)
        assert attnpatch.report(module).sites[0].materialised_by
