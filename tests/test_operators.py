"""Operators of other libraries, whatever they are called, and every way to write to what scores are still to be made of."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnpatch
from attnpatch.errors import AttnpatchError


def _clear(key):
    key.zero_()


# Named as functions of torch that keep rows apart, and none of them does so.
_library = torch.library.Library("attnpatch_tests", "DEF")
_OPERATORS = {
    "softmax(Tensor s, int d) -> Tensor": lambda s, d: s.softmax(-2),
    "flip(Tensor s, int d) -> Tensor": lambda s, d: s.flip(-2),
    "relu(Tensor s) -> Tensor": lambda s: s.cumsum(-2),
    "mul(Tensor s, Tensor t) -> Tensor": lambda s, t: s @ t,
    "clone(Tensor s) -> Tensor": lambda s: s.flip(0) * 2.0,
    "clear(Tensor(a!) k) -> ()": _clear,
}
for _schema, _function in _OPERATORS.items():
    _library.define(_schema)
    _library.impl(_schema.partition("(")[0], _function, "CompositeImplicitAutograd")
own = torch.ops.attnpatch_tests


class MyAttention(nn.Module):
    """Attention, with something done to scores, and to query and key before these are read."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, query, key, value):
        return self.body(query, key, value)


def results(body, mode, needs_grad=False):
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(2, 2, 24, 8, generator=generator).requires_grad_(needs_grad) for _ in range(3)]
    module = MyAttention(body)
    with attnpatch.patched(module, mode=mode, min_tokens=4, rows=5, sites=[""]):
        torch.manual_seed(1)
        out = module(*operands)
        grads = torch.autograd.grad(out.square().sum(), operands) if needs_grad else ()
        return [out.detach(), *grads], attnpatch.report(module).totals


STEPS = {
    "softmax": lambda s: own.softmax(s, -1),
    "flip": lambda s: own.flip(s, -1),
    "relu": lambda s: own.relu(s),
    "mul": lambda s: own.mul(s, torch.ones(24, 24)),
    "clone": lambda s: own.clone(s),
    "one_overload": lambda s: own.flip.default(s, -1),
}


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_an_operator_of_another_library(name, needs_grad):
    """It is not the function of torch that has its name: it is given computed scores."""
    body = lambda q, k, v: STEPS[name](q @ k.mT).softmax(-1) @ v
    native, _ = results(body, "never", needs_grad)
    got, totals = results(body, "always", needs_grad)
    assert totals["materialised"] and not totals["failed"]
    for want, mine in zip(native, got, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


@torch.jit.script
def _scripted(scores: torch.Tensor) -> torch.Tensor:
    return torch.ops.attnpatch_tests.relu(scores)


def test_an_operator_of_another_library_in_a_scripted_function():
    body = lambda q, k, v: _scripted(q @ k.mT).softmax(-1) @ v
    torch.testing.assert_close(results(body, "always")[0][0], results(body, "never")[0][0])


def _by_numpy(key):
    key.numpy()[:] = 0.0


def _relu_then_more(key):
    F.relu(key, True)
    key.mul_(2.0)


WRITES = {
    "flag": lambda k: F.relu(k, inplace=True),
    "flag_of_a_module": nn.ReLU(inplace=True),
    "flag_by_keyword": lambda k: F.dropout(input=k, p=0.5, training=True, inplace=True),
    "flag_then_more": _relu_then_more,
    "keyword": lambda k: torch.fill_(input=k, value=0.0),
    "init": nn.init.zeros_,
    "init_by_keyword": lambda k: nn.init.constant_(tensor=k, val=0.5),
    "foreach": lambda k: torch._foreach_mul_([k], 2.0),
    "foreach_copy": lambda k: torch._foreach_copy_([k], [k * 2.0]),
    "operator": lambda k: torch.ops.aten.mul_(k, 2.0),
    "overload": lambda k: torch.ops.aten.zero_.default(k),
    "another_library": own.clear,
    "another_librarys_overload": own.clear.default,
    "numpy": _by_numpy,
    "storage": lambda k: k.untyped_storage().fill_(0),
    "out": lambda k: torch.add(k, 1.0, out=k),
    "index": lambda k: k.__setitem__((..., 0), 0.0),
    "attribute": lambda k: setattr(k, "data", torch.zeros_like(k)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
def test_a_write_to_a_key(name):
    """Scores are those of the key as it was when they were asked for."""

    def body(query, key, value):
        key = key.clone()
        scores = query @ key.mT
        WRITES[name](key)
        return scores.softmax(-1) @ value + key.mean(-2, keepdim=True)

    got, totals = results(body, "always")
    assert torch.equal(got[0], results(body, "never")[0][0])
    assert totals["by_rows"] and not totals["failed"]


@torch.jit.script
def _unseen(key: torch.Tensor) -> torch.Tensor:
    return key.zero_()


@pytest.mark.parametrize("needs_grad", [False, True])
def test_a_write_that_nobody_sees_is_refused_after_one_that_is_seen_too(needs_grad):
    def body(query, key, value):
        key = key * 1.0
        scores = (query @ key.mT).softmax(-1)
        if needs_grad:
            # Saved for the backward pass, which torch refuses.
            out = scores @ value
        with torch.no_grad():
            _unseen(key)
            key.add_(1.0)
        return out if needs_grad else scores @ value

    expected = (RuntimeError, "inplace operation") if needs_grad else (AttnpatchError, "overwritten in place")
    with pytest.raises(expected[0], match=expected[1]):
        results(body, "always", needs_grad)


def test_data_that_is_scores():
    def body(query, key, value):
        weights = torch.zeros(2, 2, 24, 24)
        weights.data = (query @ key.mT).softmax(-1)
        return weights @ value

    assert torch.equal(results(body, "always")[0][0], results(body, "never")[0][0])


def test_memory_of_scores_is_not_handed_out():
    """What reads the address of a tensor past Python gets the numbers (until torch 2.8) or an error, not nothing."""

    def body(query, key, value):
        scores = query @ key.mT
        return torch.utils.dlpack.from_dlpack(torch._C._to_dlpack(scores)).clone()

    native, _ = results(body, "never")
    try:
        got, _ = results(body, "always")
    except RuntimeError as error:
        assert "data pointer" in str(error)
        assert "attnpatch" in str([*error.args, *getattr(error, "__notes__", ())])
    else:
        assert torch.equal(got[0], native[0])


def test_a_step_without_a_gradient_is_no_failure():
    """The host's own error reaches the user, and nobody is asked to report it."""
    body = lambda q, k, v: torch.floor_divide(q @ k.mT, 0.5).softmax(-1) @ v
    with pytest.raises(RuntimeError) as native:
        results(body, "never", True)
    module = MyAttention(body)
    with attnpatch.patched(module, mode="always", min_tokens=4, sites=[""]):
        out = module(*torch.randn(3, 2, 2, 24, 8).requires_grad_().unbind())
        with pytest.raises(RuntimeError) as mine:
            out.sum().backward()
        assert not attnpatch.report(module).totals["failed"]
    assert str(mine.value) == str(native.value)
