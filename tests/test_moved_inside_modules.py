"""Tokens that an attention module returns in another order: the modules after it are in no map, whatever has moved them."""

import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_known_facts import captured, tokens
from test_moved_tokens import InARow, SelfAttention, is_mapped
from torch import nn


class EagerAttention(SelfAttention):
    def forward(self, x):
        q, k, v = self.split(x)
        return ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


def returns(base, out):
    """A module whose result is ``out`` of its input and of what attention has made of it."""

    class Returns(base):
        def forward(self, x):
            return out(x, super().forward(x))

    return Returns()


def order_of(x):
    return torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))


def index_of(x):
    return order_of(x)[None, :, None].expand(x.shape)


def matrix_of(x):
    return torch.eye(x.shape[1])[order_of(x)]


def by_columns(x):
    return x.unflatten(1, (2, x.shape[1] // 2)).transpose(1, 2).flatten(1, 2)


def written(x):
    y = torch.empty_like(x)
    y[:, order_of(x)] = x
    return y


def in_pieces(x):
    half, y = x.shape[1] // 2, torch.empty_like(x)
    y[:, :half] = x[:, half:]
    y[:, half:] = x[:, :half]
    return y


def by_strides(x):
    batch, count, width = x.shape
    return x.as_strided((batch, 2, count // 2, width), (count * width, width, 2 * width, 1)).reshape(x.shape)


@torch.jit.script
def scripted(x):
    return x.flip(1)


def over_itself(x):
    return x.copy_(x.flip(1))


MOVES = {
    "backwards": lambda x: x.flip(1),
    "shifted": lambda x: x.roll(3, 1),
    "picked": lambda x: x[:, order_of(x)],
    "gathered": lambda x: x.gather(1, index_of(x)),
    "sorted": lambda x: x.gather(1, x.sum(-1).argsort(1)[..., None].expand_as(x)),
    "the largest first": lambda x: x.gather(1, x.sum(-1).topk(x.shape[1])[1][..., None].expand_as(x)),
    "by columns": by_columns,
    "by strides": by_strides,
    "joined": lambda x: torch.cat([x[:, 3:], x[:, :3]], 1),
    "stacked": lambda x: torch.stack(x.unbind(1)[::-1], 1),
    "halves": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "one by one": lambda x: torch.cat(x.split(1, 1)[::-1], 1),
    "padded and cut": lambda x: F.pad(x, (0, 0, 3, 0))[:, : x.shape[1]],
    "padded with its end": lambda x: F.pad(x.mT, (3, 0), mode="circular")[..., : x.shape[1]].mT,
    "a product": lambda x: matrix_of(x) @ x,
    "a sum over labels": lambda x: torch.einsum("ij,bjc->bic", matrix_of(x), x),
    "a layer along tokens": lambda x: F.linear(x.mT, nn.Parameter(matrix_of(x))).mT,
    "written at an index": written,
    "written in pieces": in_pieces,
    "copied": lambda x: torch.empty_like(x).copy_(x.flip(1)),
    "over itself": over_itself,
    "index_copy_": lambda x: torch.zeros_like(x).index_copy_(1, order_of(x), x),
    "scatter": lambda x: torch.zeros_like(x).scatter(1, index_of(x), x),
    "scatter_": lambda x: torch.zeros_like(x).scatter_(1, index_of(x), x),
    "by numpy": lambda x: torch.from_numpy(x.numpy()[:, ::-1].copy()),
    "scripted": scripted,
    "a view of what is scripted": lambda x: scripted(x).reshape(x.shape).mul(1),
    "a piece that is scripted": lambda x: torch.cat([scripted(x[:, :6]), x[:, 6:]], 1),
    "sequences in another order": lambda x: x.flip(0),
    "sequences joined": lambda x: torch.cat([x[1:], x[:1]]),
    "sequences and tokens": lambda x: x.transpose(0, 1).reshape(x.shape),
    "channels and tokens": lambda x: x.mT.reshape(x.shape),
    "beside what is hidden": lambda x: x * 0 + by_columns(x),
    "beside what is hidden, written": lambda x: x * 0 + written(x),
    "beside what is hidden, scripted": lambda x: x * 0 + scripted(x),
    "beside what is hidden, in place": lambda x: (x * 0).add_(by_columns(x)),
}
KINDS = {"sdpa": SelfAttention, "eager": EagerAttention}


def left_out(model, ids, **asked):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return captured(model, lambda: model(ids), **asked).left_out


def two(count):
    return torch.cat([tokens(count), tokens(count, 2)])


@pytest.mark.parametrize("count", [24, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MOVES)
@torch.no_grad()
def test_tokens_that_a_module_moves_after_attention(name, kind, count):
    move, ids = MOVES[name], two(count)
    numbers = torch.arange(1.0, 2 * count + 1).view(2, count, 1).repeat(1, 1, 32)
    assert name == "sorted" or not torch.equal(move(numbers.clone()), numbers)
    model = InARow().eval()
    model.layers[0] = returns(KINDS[kind], lambda x, a: move(x + a))
    model.layers[1] = KINDS[kind]()
    reasons = left_out(model, ids)
    assert list(reasons) == ["layers.1"]
    assert "not known which of the model's tokens" in reasons["layers.1"]


IN_ORDER = {
    "added": lambda x, a: x + a,
    "alone": lambda x, a: a,
    "gated": lambda x, a: a * x.sigmoid(),
    "normed": lambda x, a: F.layer_norm(x + a, (32,)),
    "turned twice": lambda x, a: (x + a).mT.contiguous().mT,
    "filtered": lambda x, a: F.conv1d((x + a).mT, torch.ones(32, 1, 3) / 3, padding=1, groups=32).mT,
    "flat, and back": lambda x, a: (x + a).flatten(0, 1).unflatten(0, x.shape[:2]),
    "cut and joined again": lambda x, a: torch.cat((x + a).split([3, x.shape[1] - 3], 1), 1),
    "in place": lambda x, a: x.add_(a),
    "moved beside a residual": lambda x, a: x + a.flip(1),
    "written in its places": lambda x, a: torch.empty_like(x).copy_(x + a),
    "by columns and back": lambda x, a: (x + a).unflatten(1, (2, -1)).mT.mT.flatten(1, 2),
    "scripted, beside a residual": lambda x, a: x + scripted(a),
}


@pytest.mark.parametrize("count", [24, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", IN_ORDER)
@torch.no_grad()
def test_tokens_that_stay_in_order(name, kind, count):
    model = InARow().eval()
    model.layers[0] = returns(KINDS[kind], IN_ORDER[name])
    model.layers[1] = KINDS[kind]()
    is_mapped(model, two(count))


# ------------------------------------------------------------------------------------------- calls that repeat others


class Sometimes(SelfAttention):
    moves = False

    def forward(self, x):
        found = x + super().forward(x)
        return by_columns(found) if self.moves else found


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_call_that_moves_tokens_after_calls_like_it_that_do_not(mode):
    model = InARow().eval()
    model.layers[0] = Sometimes()

    def run(moving):
        for i in range(5):
            model.layers[0].moves = i == moving
            model(two(8))

    with mode():
        assert not captured(model, lambda: run(None)).left_out
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert list(captured(model, lambda: run(4)).left_out) == ["layers.1"]


class Unseen(SelfAttention):
    moves = False

    def forward(self, x):
        found = x + super().forward(x)
        if self.moves:
            found.numpy()[:] = found.numpy()[:, ::-1].copy()
        return found


@torch.no_grad()
def test_a_call_whose_result_is_overwritten_unseen_after_calls_like_it():
    model = InARow().eval()
    model.layers[0] = Unseen()

    def run():
        for i in range(5):
            model.layers[0].moves = i == 4
            model(two(8))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert list(captured(model, run).left_out) == ["layers.1"]


# ---------------------------------------------------------------------------------------------- modules around modules


@pytest.mark.parametrize("count", [24, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["by columns", "joined", "scatter", "over itself", "scripted"])
@torch.no_grad()
def test_a_module_that_is_in_no_map_itself(name, kind, count):
    model = InARow().eval()
    model.layers[0] = returns(KINDS[kind], lambda x, a: MOVES[name](x + a))
    assert list(left_out(model, two(count), layers=[1])) == ["layers.1"]
    model.layers[0] = KINDS[kind]()
    assert not left_out(model, two(count), layers=[1])


class OuterAttention(nn.Module):
    def __init__(self, kind, before=lambda x: x, after=lambda x: x):
        super().__init__()
        self.inner, self.before, self.after = kind(), before, after

    def forward(self, x):
        x = self.before(x)
        return self.after(x + self.inner(x))


FEW = ["backwards", "by columns", "joined", "a product", "scatter_", "over itself", "scripted", "by numpy"]


@pytest.mark.parametrize("count", [24, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_a_module_around_another_one(name, kind, count):
    model, move = InARow().eval(), MOVES[name]
    model.layers[0] = OuterAttention(KINDS[kind], after=move)
    assert list(left_out(model, two(count))) == ["layers.1"]
    model.layers[0] = OuterAttention(KINDS[kind], before=move)
    assert sorted(left_out(model, two(count))) == ["layers.0.inner", "layers.1"]
    model.layers[0] = OuterAttention(KINDS[kind])
    assert not left_out(model, two(count))


def with_hook(part):
    layer = OuterAttention(SelfAttention)
    (layer if part == "module" else layer.inner).register_forward_hook(lambda *given: by_columns(given[-1]))
    return layer


@pytest.mark.parametrize("part", ["module", "part"])
@torch.no_grad()
def test_a_hook_that_moves_tokens(part):
    """A residual around the part shows its tokens in order."""
    model = InARow().eval()
    model.layers[0] = with_hook(part)
    assert list(left_out(model, two(24))) == (["layers.1"] if part == "module" else [])


# ------------------------------------------------------------------------------------------------- several results


@dataclasses.dataclass
class Output:
    first: torch.Tensor
    second: torch.Tensor


FORMS = {
    "tuple": (lambda a, b: (a, b), lambda found: found[1]),
    "dict": (lambda a, b: {"first": a, "second": b}, lambda found: found["second"]),
    "in a dict": (lambda a, b: {"all": [a, (b,)]}, lambda found: found["all"][1][0]),
    "dataclass": (Output, lambda found: found.second),
}


class SecondOf(InARow):
    second = None

    def forward(self, ids):
        x = self.layers[0](self.embed(ids))
        return self.layers[1](self.second(x))


@pytest.mark.parametrize("name", ["by columns", "joined", "scatter", "scripted"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_second_result_in_another_order(form, name):
    made, second = FORMS[form]
    model = SecondOf().eval()
    model.second = second
    model.layers[0] = returns(SelfAttention, lambda x, a: made(x + a, MOVES[name](x + a)))
    assert list(left_out(model, two(24))) == ["layers.1"]
    model.layers[0] = returns(SelfAttention, lambda x, a: made(MOVES[name](x + a), x + a))
    # Tensors in an object of any class are not looked for, so they count as unknown.
    assert list(left_out(model, two(24))) == (["layers.1"] if form == "dataclass" else [])


# -------------------------------------------------------------------------------------------------- equal lengths


@pytest.mark.parametrize("is_inside", [True, False], ids=["inside", "between"])
@torch.no_grad()
def test_as_many_tokens_as_channels(is_inside):
    model = InARow(before=lambda x: x).eval()
    if is_inside:
        model.layers[0] = returns(SelfAttention, lambda x, a: (x + a).mT)
    else:
        model.layers[0].register_forward_hook(lambda *given: given[-1].mT)
    assert list(left_out(model, two(32))) == ["layers.1"]
    model.layers[0] = SelfAttention()
    assert not left_out(model, two(32))


@pytest.mark.parametrize("is_inside", [True, False], ids=["inside", "between"])
@torch.no_grad()
def test_as_many_sequences_as_tokens(is_inside):
    model, ids = InARow().eval(), torch.cat([tokens(8, seed) for seed in range(8)])
    if is_inside:
        model.layers[0] = returns(SelfAttention, lambda x, a: (x + a).transpose(0, 1))
    else:
        model.layers[0].register_forward_hook(lambda *given: given[-1].transpose(0, 1))
    assert list(left_out(model, ids)) == ["layers.1"]
    model.layers[0] = SelfAttention()
    assert not left_out(model, ids)


# ------------------------------------------------------------------------------------------------ modules of torch's own


class OfTorch(nn.Module):
    """``nn.MultiheadAttention`` with a residual, batch first or tokens first."""

    def __init__(self, batch_first=True, out=lambda x: x):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=batch_first)
        self.batch_first, self.out = batch_first, out

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.out(x if self.batch_first else x.transpose(0, 1))


@pytest.mark.parametrize("batch_first", [True, False])
@torch.no_grad()
def test_attention_of_torch(batch_first):
    model = InARow().eval()
    model.layers = nn.ModuleList([OfTorch(batch_first), OfTorch(batch_first)])
    assert not left_out(model.eval(), two(24))
    model.layers[0].out = by_columns
    assert list(left_out(model, two(24))) == ["layers.1.attention"]
