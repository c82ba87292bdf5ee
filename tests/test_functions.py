"""``by_rows``: a free function that computes attention, with the blog's own code."""

import copy
import pickle

import pytest
import torch
import zoo
from torch import nn

import attnpatch
from attnpatch.errors import PatchError, PolicyError

Q, K, V = (zoo.floats(6, 100, 16, seed=seed) for seed in range(3))


def plain(q, k, v, scale):
    """The blog's code, as its author had it before it was cut into chunks by hand."""
    sim = torch.einsum("b i c, b j c -> b i j", q, k) * scale
    attn = sim.softmax(dim=-1)
    return torch.einsum("b i j, b j c -> b i c", attn, v)


@attnpatch.by_rows(mode="always", min_tokens=16)
def decorated(q, k, v, scale):
    sim = torch.einsum("b i c, b j c -> b i j", q, k) * scale
    attn = sim.softmax(dim=-1)
    return torch.einsum("b i j, b j c -> b i c", attn, v)


class Helpers:
    @attnpatch.by_rows(mode="always")
    def attend(self, q, k, v):
        return plain(q, k, v, self.scale)

    scale = 0.25


def test_the_same_bits_and_by_rows():
    native = plain(Q, K, V, 0.25)
    assert torch.equal(decorated(Q, K, V, scale=0.25), native)
    assert attnpatch.report(decorated).totals["by_rows"] == 1
    mine = attnpatch.by_rows(plain, mode="always", rows=32)
    assert torch.equal(mine(Q, K, V, 0.25), native)
    (site,) = attnpatch.report(mine).sites
    assert site.counts["by_rows"] == 1 and 0 < site.counts["largest"] <= 6 * 32 * 100 * 4
    assert str(attnpatch.report(mine)).startswith("plain: Policy(mode='always'")
    assert (mine.__name__, mine.__doc__, mine.__wrapped__) == ("plain", plain.__doc__, plain)


def test_gradients():
    given = [t.clone().requires_grad_() for t in (Q, K, V)]
    results = []
    for function in (plain, decorated):
        out = function(*given, 0.25)
        results.append(torch.autograd.grad(out.square().sum(), given))
    for native, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, native)


def test_short_calls_stay_native():
    mine = attnpatch.by_rows(plain, min_free="900GB")
    mine(Q, K, V, 0.25)  # 600 rows at most
    assert attnpatch.report(mine).totals["native"] == 1
    mine(*(zoo.floats(1, 2000, 16, seed=seed) for seed in range(3)), 0.25)
    assert attnpatch.report(mine).totals["by_rows"] == 1


def test_methods_and_modules():
    helpers = Helpers()
    assert torch.equal(helpers.attend(Q, K, V), plain(Q, K, V, 0.25))

    class Layer(nn.Module):
        def forward(self, x):
            return decorated(x, x, x, 0.25)

    layer = Layer()
    native = plain(Q, Q, Q, 0.25)
    assert torch.equal(layer(Q), native)
    with attnpatch.patched(layer, mode="always"):
        assert torch.equal(layer(Q), native)


def test_copies_and_pickles():
    mine = attnpatch.by_rows(plain, mode="always")
    assert pickle.loads(pickle.dumps(decorated)) is decorated and copy.deepcopy(decorated) is decorated
    assert pickle.loads(pickle.dumps(Helpers.attend)) is vars(Helpers)["attend"]
    other = pickle.loads(pickle.dumps(mine))
    assert torch.equal(other(Q, K, V, 0.25), mine(Q, K, V, 0.25))
    assert attnpatch.report(other).totals["by_rows"] == attnpatch.report(mine).totals["by_rows"] == 1
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(attnpatch.by_rows(lambda q, k, v: plain(q, k, v, 1)))


def test_compiled_it_is_the_function_itself():
    compiled = torch.compile(lambda *args: decorated(*args) + 1, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(Q, K, V, 0.25), plain(Q, K, V, 0.25) + 1)


def test_what_is_refused():
    with pytest.raises(PolicyError, match=r"unknown policy field 'min_fre'; did you mean 'min_free'\?"):
        attnpatch.by_rows(min_fre="8GB")
    for wrong in (nn.Linear(2, 2), nn.Linear, 3):
        with pytest.raises(
            PatchError, match=r"by_rows\(\) takes a function, not .*; attnpatch.apply\(\) patches"
        ):
            attnpatch.by_rows(wrong)
