"""Views and copies of scores, written to in place: what native torch shares is shared, and nothing else."""

import hypothesis.strategies as st
import pytest
import torch
import zoo
from hypothesis import given, settings
from torch import nn

import attnpatch
from attnpatch.releases import tested

PRODUCTS = {
    "matmul": lambda q, k: q @ k.mT,
    # torch lays these out as a permuted product.
    "einsum": lambda q, k: torch.einsum("blhd,bkhd->blhk", q.transpose(1, 2), k.transpose(1, 2)).transpose(
        1, 2
    ),
    "heads_inside": lambda q, k: torch.einsum("bhid,bhjd->bihj", q, k),
}
SHAPE = (2, 2, 6, 8)
STRIDE = 7
# Of a tensor of four dimensions; sizes as SHAPE has them, whatever their order.
FUNCTIONS = {
    "contiguous": lambda s: s.contiguous(),
    "contiguous_of_transposed": lambda s: s.transpose(1, 2).contiguous(),
    "contiguous_with_format": lambda s: s.mT.contiguous(memory_format=torch.contiguous_format),
    "clone": lambda s: s.clone(),
    "clone_contiguous": lambda s: s.mT.clone(memory_format=torch.contiguous_format),
    "reshape_same": lambda s: s.reshape(s.shape),
    "reshape_fold": lambda s: s.reshape(s.shape[0] * s.shape[1], *s.shape[2:]),
    "reshape_inner": lambda s: s.reshape(*s.shape[:2], -1),
    "reshape_transposed": lambda s: s.transpose(1, 2).reshape(s.shape[0], s.shape[2], -1),
    "torch_reshape": lambda s: torch.reshape(s, (-1, s.shape[-1])),
    "reshape_as": lambda s: s.reshape_as(torch.empty(s.shape[0], -(-s.numel() // s.shape[0]))),
    "flatten": lambda s: s.flatten(),
    "flatten_heads": lambda s: s.flatten(0, 1),
    "flatten_transposed": lambda s: s.transpose(0, 1).flatten(0, 1),
    "flatten_last": lambda s: torch.flatten(s, start_dim=2),
    "ravel": lambda s: s.ravel(),
    "expand": lambda s: s[:, :1].expand(-1, 3, -1, -1),
    "expand_lead": lambda s: s.expand(2, *s.shape),
    "expand_same": lambda s: s.expand(s.shape),
    "expand_as": lambda s: s.expand_as(torch.empty(s.shape)),
    "unflatten": lambda s: s.unflatten(-1, (2, -1)),
    "view": lambda s: s.view(s.shape[0], s.shape[1], -1),
    "view_split": lambda s: s.view(*s.shape[:3], 2, -1),
    "view_as": lambda s: s.view_as(torch.empty(s.shape)),
    "view_same": lambda s: s.view(*s.shape),
    "narrow": lambda s: s.narrow(2, 1, 3),
    "narrow_keys": lambda s: torch.narrow(s, -1, 2, 4),
    "chunk": lambda s: s.chunk(2, -1)[1],
    "chunk_uneven": lambda s: s.chunk(4, 2)[1],
    "split": lambda s: s.split(4, dim=-1)[0],
    "split_sizes": lambda s: torch.split(s, [s.shape[2] - 2, 2], 2)[1],
    "tensor_split": lambda s: s.tensor_split(4, -1)[1],
    "tensor_split_at": lambda s: torch.tensor_split(s, [1, 3], dim=2)[1],
    "unbind": lambda s: s.unbind(1)[1],
    "iterate": lambda s: list(s)[1],
    "select": lambda s: s.select(2, -1),
    "diagonal": lambda s: s.diagonal(dim1=-2, dim2=-1),
    "as_strided": lambda s: s.as_strided((2, 3), (3, 1), 4),
    "mT": lambda s: s.mT,
    "mH": lambda s: s.mH,
    "T": lambda s: s[0, 0].T,
    "t": lambda s: s[1, 0].t(),
    "H": lambda s: s[1, 1].H,
    "squeeze": lambda s: s[:, :1].squeeze(1),
    "squeeze_all": lambda s: torch.squeeze(s[:1, :, 1:2]),
    "unsqueeze": lambda s: s.unsqueeze(1),
    "unsqueeze_last": lambda s: s.unsqueeze(-1),
    "movedim": lambda s: s.movedim(1, 3),
    "movedim_two": lambda s: torch.movedim(s, (0, 1), (3, 0)),
    "swapaxes": lambda s: s.swapaxes(1, 2),
    "swapdims": lambda s: torch.swapdims(s, 0, -1),
    "transpose_names": lambda s: torch.transpose(s, dim0=2, dim1=1),
    "permute": lambda s: s.permute(3, 0, 2, 1),
    "detach": lambda s: s.detach(),
    "data": lambda s: s.data,
    "alias": lambda s: torch.ops.aten.alias(s),
    "unfold": lambda s: s.unfold(-1, 4, 2),
    "hsplit": lambda s: s.hsplit(2)[1],
    "vsplit": lambda s: torch.vsplit(s, [1])[0],
    "dsplit": lambda s: s.dsplit(2)[0],
    "slice": lambda s: s[:, :, 1:4],
    "slice_step": lambda s: s[:, :, ::2, 1::3],
    "slice_all": lambda s: s[:],
    "ellipsis": lambda s: s[...],
    "integer": lambda s: s[:, 1],
    "integers": lambda s: s[0, ..., -1],
    "new_dimension": lambda s: s[:, None, :, 1:2],
    "places": lambda s: s[:, :, [0, 1, -1]],
    "mask_of_rows": lambda s: s[:, :, torch.arange(s.shape[2]) % 2 == 0],
    "atleast_3d": lambda s: torch.atleast_3d(s),
    "real": lambda s: s.real,
    "positive": lambda s: s.positive(),
    "unary_plus": lambda s: +s,
    "to_same": lambda s: s.to(torch.float32),
    "to_copy": lambda s: s.to(torch.float32, copy=True),
    "to_like": lambda s: s.to(torch.empty(())),
    "to_device": lambda s: s.to("cpu"),
    "cpu": lambda s: s.cpu(),
    "float": lambda s: s.float(),
    "type_as": lambda s: s.type_as(torch.empty(())),
    "type": lambda s: s.type(torch.float32),
    "double": lambda s: s.double(),
    "broadcast_to": lambda s: s.broadcast_to(s.shape),
    "index_select": lambda s: s.index_select(2, torch.tensor([1, 0])),
    "scaled": lambda s: s * 0.5,
    "negated": lambda s: -s,
}  # fmt: skip


def _of_size(t: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1.0, 1.0, t.shape[-1], dtype=t.dtype)


def _setitem(t):
    t[..., 0] = -3.0


def _setitem_slice(t):
    t[:1] = _of_size(t)


def _augmented(t):
    t *= _of_size(t)


WRITES = {
    "add_": lambda t: t.add_(_of_size(t)),
    "augmented": _augmented,
    "masked_fill_": lambda t: t.masked_fill_(_of_size(t) > 0.5, -2.0),
    "setitem": _setitem,
    "setitem_slice": _setitem_slice,
    "copy_": lambda t: t.copy_(_of_size(t)),
    "zero_": lambda t: t.zero_(),
    "tanh_": lambda t: t.tanh_(),
    "index_fill_": lambda t: t.index_fill_(-1, torch.tensor([0]), 4.0),
    "relu": lambda t: nn.functional.relu(t, inplace=True),
    "hardtanh": lambda t: nn.functional.hardtanh(t, -0.5, 0.5, True),
    "out": lambda t: torch.add(t.detach(), 1.0, out=t.detach()),
}


class Attention(nn.Module):
    """Scores of a product, and whatever a test does to them."""

    def forward(self, query, key, product, body):
        return body(PRODUCTS[product](query, key))


# What autograd refuses natively because of what it has kept; by rows the values are there, and the gradients right.
REFUSED = ("needed for gradient computation has been modified", "returns multiple views")
CASE = zoo.Case("views", lambda implementation: nn.Identity(), register=(Attention,))


def outcome(module, product, body, needs_grad):
    """What a body makes of scores: values, strides, gradients; or its error."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 2, n, 4, generator=generator).requires_grad_(needs_grad) for n in SHAPE[2:])
    try:
        results = module(query, key, product, body)
        layouts = [(t.shape, t.stride(), t.is_contiguous()) for t in results]
        values = [t.detach().clone() for t in results]
        grads = []
        if needs_grad:
            loss = sum((t.double() * _weights(t)).square().sum() for t in results if t.requires_grad)
            grads = torch.autograd.grad(loss, (query, key), allow_unused=True)
        flags = [t.requires_grad for t in results]
    except RuntimeError as error:
        return error
    return layouts, values, grads, flags


def _weights(t):
    return torch.linspace(0.5, 1.5, t.numel(), dtype=torch.float64).reshape(t.shape)


def differs(native, mine, layout=True):
    """Where two outcomes differ, in words; ``None``: nowhere."""
    if isinstance(native, RuntimeError) and any(words in str(native) for words in REFUSED):
        return None
    if isinstance(native, RuntimeError) or isinstance(mine, RuntimeError):
        errors = [str(x) if isinstance(x, RuntimeError) else "fine" for x in (native, mine)]
        return None if errors[0] == errors[1] else f"native: {errors[0]}; by rows: {errors[1]}"
    for i, (want, got) in enumerate(zip(native[1], mine[1], strict=True)):
        if want.shape != got.shape or not torch.allclose(want, got, atol=1e-5):
            return f"values of result {i}"
    for i, (want, got) in enumerate(zip(native[2], mine[2], strict=True)):
        if (want is None) != (got is None) or (
            want is not None and not torch.allclose(want, got, rtol=1e-4, atol=1e-4)
        ):
            return f"gradient {i}"
    if native[3] != mine[3]:
        return f"requires_grad {native[3]}, not {mine[3]}"
    if layout and native[0] != mine[0]:
        return f"layout {native[0]}, not {mine[0]}"
    return None


def bodies(function, write):
    """A function and a write in every order: on the result, on the source, and both."""

    def on_result(s):
        r = function(s)
        write(r)
        return s, r

    def on_source(s):
        r = function(s)
        write(s)
        return s, r

    def on_both(s):
        r = function(s)
        write(r)
        write(s)
        write(r)
        return r, s

    def after_reading(s):
        r = function(s)
        (r + 0).sum().item(), s.max().item()
        write(s)
        write(r)
        return s, r

    def beside_another(s):
        other, r = s.transpose(0, 1), function(s)
        r.mean().item()
        write(r)
        write(other)
        return other, r, s

    return {f.__name__: f for f in (on_result, on_source, on_both, after_reading, beside_another)}


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_layout(name, product):
    """Strides and ``is_contiguous`` of what a function returns are the native ones, before anything is computed."""
    module = Attention()
    body = lambda s: (s, FUNCTIONS[name](s))
    native = outcome(module, product, body, False)
    with zoo.by_rows(module, CASE, min_tokens=1):
        assert differs(native, outcome(module, product, body, False)) is None


@pytest.mark.parametrize("needs_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_written_in_place(name, needs_grad):
    """Values and gradients of the source and of the result, whichever of them is written to."""
    native, mine = Attention(), Attention()
    cases = [
        (product, how, order, body)
        for product in PRODUCTS
        for how, write in WRITES.items()
        for order, body in bodies(FUNCTIONS[name], write).items()
    ]
    wrong = []
    with zoo.by_rows(mine, CASE, min_tokens=1):
        # Every fifth, beginning elsewhere for every function: all pairs of a write and an order, with some product.
        for product, how, order, body in cases[list(FUNCTIONS).index(name) % STRIDE :: STRIDE]:
            want = outcome(native, product, body, needs_grad)
            found = differs(want, outcome(mine, product, body, needs_grad), layout=False)
            if found is not None:
                wrong.append((product, how, order, found))
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("is_read", [False, True])
def test_detached_in_place(product, is_read):
    """What is computed without gradients is no view, which torch would not detach in place."""

    def body(s):
        s = (s.flatten(0, 1) * 0.5).reshape(s.shape).softmax(-1)
        if is_read:
            s.sum().item()
        t = s.detach()
        t -= 0.5
        t.detach_()
        s.detach_()
        s += 1.0
        return s, t

    module = Attention()
    native = outcome(module, product, body, False)
    with zoo.by_rows(module, CASE, min_tokens=1):
        assert differs(native, outcome(module, product, body, False)) is None


@pytest.mark.parametrize("view", ["contiguous", "flatten_heads", "alias"])
@pytest.mark.parametrize("write", ["setitem", "add_", "tanh_"])
def test_view_of_a_part_whose_layout_nobody_knows(view, write):
    """A part that was computed alone is forgotten with the next write; a native view of it is none of what is forgotten."""

    def body(s):
        part = s.mT.roll(1, 0)[1:]
        result = FUNCTIONS[view](part)
        WRITES[write](part)
        return part, result, part @ torch.ones(part.shape[-1], 2)

    module = Attention()
    native = outcome(module, "matmul", body, False)
    with zoo.by_rows(module, CASE, min_tokens=1):
        assert differs(native, outcome(module, "matmul", body, False), layout=False) is None


def test_layout_beside_a_mask_made_of_scores():
    """``ones_like`` in another dtype: how a mask lies that it becomes, and what is filled where the mask says so, is known."""
    module, found = Attention(), []

    def body(s):
        filled = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -6.0)
        found.append((filled.stride(), filled.is_contiguous()))
        return (filled.softmax(-1) @ torch.ones(s.shape[-1], 2),)

    body(PRODUCTS["einsum"](*(torch.zeros(2, 2, n, 4) for n in SHAPE[2:])))
    with zoo.by_rows(module, CASE, min_tokens=1):
        outcome(module, "einsum", body, False)
        assert not attnpatch.report(module).totals["materialised"]
    assert found[0] == found[1]


# One step of a chain, of a tensor of any number of dimensions; what does not fit leaves the tensor as it is.
STEPS = {
    "transpose": lambda t: t.transpose(0, -1),
    "mT": lambda t: t.mT if t.dim() > 1 else t,
    "contiguous": lambda t: t.contiguous(),
    "clone": lambda t: t.clone(),
    "flatten": lambda t: t.flatten(0, 1) if t.dim() > 1 else t,
    "reshape": lambda t: t.reshape(-1, t.shape[-1]),
    "unflatten": lambda t: t.unflatten(-1, (2, -1)) if t.shape[-1] % 2 == 0 and t.dim() < 6 else t,
    "permute": lambda t: t.permute(*range(1, t.dim()), 0),
    "unsqueeze": lambda t: t.unsqueeze(1) if t.dim() < 6 else t,
    "squeeze": lambda t: t.squeeze(),
    "slice": lambda t: t[1:] if t.shape[0] > 1 else t,
    "slice_step": lambda t: t[..., ::2],
    "integer": lambda t: t[-1] if t.dim() > 2 else t,
    "chunk": lambda t: t.chunk(2, -1)[0],
    "narrow": lambda t: t.narrow(-2, 0, 1) if t.dim() > 1 else t,
    "expand": lambda t: t[:1].expand(2, *t.shape[1:]),
    "places": lambda t: t[..., [0, -1]],
    "diagonal": lambda t: t.diagonal() if t.dim() > 2 else t,
    "unfold": lambda t: t.unfold(-1, 2, 1) if t.shape[-1] > 1 and t.dim() < 6 else t,
    "detach": lambda t: t.detach(),
    "positive": lambda t: +t,
    "double": lambda t: t * 2.0,
}
WRITTEN = {
    name: WRITES[name]
    for name in ("add_", "masked_fill_", "setitem", "copy_", "tanh_", "index_fill_", "hardtanh")
}


def chain(steps):
    """Tensors of a chain, each made from an earlier one or written to; all of them at the end."""

    def body(s):
        made = [s]
        for at, kind, name in steps:
            t = made[at % len(made)]
            if kind == "read":
                t.sum().item()
            elif kind == "write":
                WRITTEN[name](t)
            else:
                made.append(STEPS[name](t))
        return made

    return body


_at = st.integers(0, 5)
CHAINS = st.lists(
    st.one_of(
        st.tuples(_at, st.just("step"), st.sampled_from(sorted(STEPS))),
        st.tuples(_at, st.just("step"), st.sampled_from(sorted(STEPS))),
        st.tuples(_at, st.just("write"), st.sampled_from(sorted(WRITTEN))),
        st.tuples(_at, st.just("read"), st.just("")),
    ),
    min_size=2,
    max_size=8,
)  # fmt: skip


@given(steps=CHAINS, product=st.sampled_from(sorted(PRODUCTS)), needs_grad=st.booleans())
@settings(max_examples=300, deadline=None)
def test_chains(steps, product, needs_grad):
    """Views of views, copies of them and writes to any, in any order: values, layouts and gradients are native."""
    native = outcome(Attention(), product, chain(steps), needs_grad)
    mine = Attention()
    with zoo.by_rows(mine, CASE, min_tokens=1):
        got = outcome(mine, product, chain(steps), needs_grad)
    # Until torch 2.6, some functions on ``meta`` say another layout than that of their results on the CPU.
    assert differs(native, got, layout=tested.is_at_least("torch", "2.8")) is None
