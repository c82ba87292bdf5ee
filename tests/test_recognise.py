"""Attention that nobody named or registered is found, and what is no attention is left alone."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
import zoo
from einops import rearrange
from test_block_maps_dense import assert_same, dense_map, select, token_blocks
from test_exact import snapshot
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import attnpatch
from attnpatch.errors import PatchError
from attnpatch.patching.patch import patch_of


def attend(q, k, v, scale):
    """A function of a research file that its modules call."""
    return torch.softmax(q @ k.transpose(-2, -1) * scale, dim=-1) @ v


class Mixer(nn.Module):
    """Attention written out, under a name that does not say so."""

    def __init__(self, dim: int = 64, heads: int = 4):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def split(self, x):
        return (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in self.qkv(x).chunk(3, -1))

    def join(self, x):
        return self.out(rearrange(x, "b h n d -> b n (h d)"))

    def forward(self, x):
        q, k, v = self.split(x)
        weights = (torch.einsum("bhid,bhjd->bhij", q, k) * self.scale).softmax(-1)
        return self.join(torch.einsum("bhij,bhjd->bhid", weights, v))


class CallsAFunction(Mixer):
    def forward(self, x):
        return self.join(attend(*self.split(x), self.scale))


class CastsWeights(Mixer):
    """As ComfyUI's and many norms: a weight in the dtype of the input is no product with it."""

    def split(self, x):
        weight, bias = self.qkv.weight.to(x), self.qkv.bias.type_as(x)
        rows = F.linear(x, weight, bias).chunk(3, -1)
        return (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in rows)


class HoldsSoftmax(Mixer):
    """As in vision models by hand: ``self.attend = nn.Softmax(dim=-1)``."""

    def __init__(self):
        super().__init__()
        self.normalise = nn.Softmax(dim=-1)
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        q, k, v = self.split(x)
        return self.join(self.drop(self.normalise(torch.matmul(q, k.mT) * self.scale)).matmul(v))


class ByHand(Mixer):
    """Softmax from ``exp`` and ``sum``, in a method."""

    def weigh(self, scores):
        powers = (scores - scores.amax(-1, keepdim=True)).exp()
        return powers / powers.sum(-1, keepdim=True)

    def forward(self, x):
        q, k, v = self.split(x)
        return self.join(self.weigh(q @ k.mT * self.scale) @ v)


class Fused(Mixer):
    def forward(self, x):
        return self.join(F.scaled_dot_product_attention(*self.split(x)))


class Talking(Mixer):
    """Heads are mixed before and after softmax."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Parameter(torch.eye(4)), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        q, k, v = self.split(x)
        scores = torch.einsum("bhij,hg->bgij", q @ k.mT * self.scale, self.before)
        return self.join(self.after(scores.softmax(-1)) @ v)


class Layer(nn.Module):
    """A whole layer in one forward: nothing in it is attention alone."""

    def __init__(self):
        super().__init__()
        self.norm, self.core, self.wide = nn.LayerNorm(64), Mixer(), nn.Linear(64, 64)

    def forward(self, x):
        q, k, v = self.core.split(self.norm(x))
        x = x + self.core.join(attend(q, k, v, self.core.scale))
        return x + self.wide(x).relu()


class Head(nn.Module):
    """A classifier: softmax of a layer, and then a product."""

    def __init__(self):
        super().__init__()
        self.classes, self.prototypes = nn.Linear(64, 7), nn.Parameter(torch.randn(7, 64))

    def forward(self, x):
        return self.classes(x).softmax(-1) @ self.prototypes


class Router(nn.Module):
    """Experts, and what each of them says in the share that softmax gives it."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(64, 5), nn.ModuleList(nn.Linear(64, 64) for _ in range(5))

    def forward(self, x):
        shares = F.softmax(self.gate(x), dim=-1)
        said = torch.stack([expert(x) for expert in self.experts], -2)
        return torch.einsum("bne,bned->bnd", shares, said)


class Recurrent(nn.Module):
    """An LSTM whose states are weighed by a layer: softmax over time, a product, no product before."""

    def __init__(self):
        super().__init__()
        self.cell, self.weight = nn.LSTM(64, 64, batch_first=True), nn.Linear(64, 1)

    def forward(self, x):
        states, _ = self.cell(x)
        return x + torch.bmm(self.weight(states).softmax(1).transpose(1, 2), states)


class Kernelised(Mixer):
    """Linear attention: softmax of features, products of values; no matrix of queries and keys."""

    def forward(self, x):
        q, k, v = self.split(x)
        return self.join(q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v))


class Contrast(nn.Module):
    """Similarities of all pairs, compared and not attended with."""

    def forward(self, x):
        similar = (x @ x.transpose(-1, -2)).softmax(-1)
        return x * similar.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)


class Bilinear(nn.Module):
    """Bilinear pooling: a product of inputs, then a classifier, whose softmax weighs prototypes."""

    def __init__(self):
        super().__init__()
        self.classes, self.prototypes = nn.Linear(64 * 64, 7), nn.Linear(7, 64)

    def forward(self, x):
        mixed = torch.matmul(x.transpose(1, 2), x)
        shares = self.classes(mixed.flatten(1)).softmax(-1)
        return x + torch.matmul(shares.unsqueeze(1), self.prototypes.weight.t())


FOUND = [Mixer, CallsAFunction, CastsWeights, HoldsSoftmax, ByHand, Fused, Talking, Layer]
NOT = [Head, Router, Recurrent, Kernelised, Contrast, Bilinear]


def stack(*kinds) -> nn.Sequential:
    torch.manual_seed(0)
    return zoo.randomise(nn.Sequential(*(kind() for kind in kinds))).eval()


def x(batch: int = 2) -> torch.Tensor:
    return zoo.floats(batch, zoo.TEXT_LEN, 64)


def run(model, *args):
    with torch.no_grad():
        return model(*args)


@pytest.mark.parametrize("kind", FOUND)
def test_found(kind):
    """From its first call on it goes by rows, to the last bit, and the report says why it is a site."""
    model = stack(kind, kind)
    before, native = snapshot(model), run(model, x())
    with attnpatch.patched(model, mode="always", rows=7):
        for calls in (1, 2):
            assert torch.equal(run(model, x()), native)
            report = attnpatch.report(model)
            assert [site.name for site in report.sites] == ["0", "1"], report
            assert {site.why for site in report.sites} == {"recognised: softmax of a product"}
            assert report.totals["by_rows"] == 2 * calls and report.totals["materialised"] == 0, report
    assert snapshot(model) == before


@pytest.mark.parametrize("kind", NOT)
def test_left_alone(kind):
    """The same result, no site in the report, and after the first call no trace on the module."""
    model = stack(Mixer, kind)
    before, native = snapshot(model), run(model, x())
    attnpatch.apply(model, mode="always", rows=7)
    for _ in range(2):
        assert torch.equal(run(model, x()), native)
        report = attnpatch.report(model)
        assert [site.name for site in report.sites] == ["0"], report
    assert snapshot(model)["1"] == before["1"]
    assert report.left_alone in ((), ("1",)) and ("left alone: 1" in str(report)) == bool(report.left_alone)
    attnpatch.remove(model)
    assert snapshot(model) == before


class Elementwise(Mixer):
    """No product at all, so it is left alone; what it makes goes by rows all the same in its first call."""

    def forward(self, x):
        q, k, v = self.split(x)
        scores = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) * self.scale
        return self.join(scores.softmax(-1) @ v)


@pytest.mark.parametrize("steps", [1, 2], ids=["one pass", "two passes before the backward passes"])
@pytest.mark.parametrize("kind", [*NOT, Elementwise])
def test_left_alone_after_a_first_call_in_a_checkpoint(kind, steps):
    """It runs again in the backward pass as it ran, and leaves no trace afterwards."""

    def gradients(model):
        given = [x().requires_grad_() for _ in range(steps)]
        results = [checkpoint(model, each, use_reentrant=False) for each in given]
        for result in results:
            result.square().sum().backward()
        return [each.grad for each in given] + [p.grad for p in model.parameters() if p.grad is not None]

    native, model = gradients(stack(Mixer, kind)), stack(Mixer, kind)
    before = snapshot(model)
    attnpatch.apply(model, mode="always", rows=7)
    for got, expected in zip(gradients(model), native, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max() + 1))
    run(model, x())
    assert [site.name for site in attnpatch.report(model).sites] == ["0"]
    assert snapshot(model)["1"] == before["1"]


def test_nothing_there():
    """A model whose code names no attention is refused at once; one that only might have some says what it saw."""
    with pytest.raises(attnpatch.errors.PatchError, match="no attention module"):
        attnpatch.apply(stack(lambda: nn.Linear(64, 64)))
    model = attnpatch.apply(stack(Head), mode="always")
    run(model, x())
    assert attnpatch.report(model).left_alone == ("0",) and not attnpatch.report(model).sites


def test_innermost():
    """A layer that calls a function and holds a module that attends: each is its own site."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.router = Mixer(), Mixer(), Router()

        def forward(self, x):
            q, k, v = self.second.split(self.first(x))
            return self.router(self.second.join(attend(q, k, v, 0.25)))

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Mixer()

        def forward(self, x):
            return self.inner(x) @ torch.eye(64) + 0 * x.softmax(-1)

    model = stack(Both, Wrapper)
    native = run(model, x())
    with attnpatch.patched(model, mode="always", rows=7):
        assert torch.equal(run(model, x()), native)
        report = attnpatch.report(model)
    assert {site.name: site.counts["by_rows"] for site in report.sites} == {
        "0": 1,
        "0.first": 1,
        "1.inner": 1,
    }
    # "0.second" is a candidate whose own forward was never called.
    assert set(report.left_alone) == {"0.router", "1"}


def test_modules_around_attention():
    """A module around a candidate is no longer around attention once the candidate's first call says that it is none."""
    model = nn.Sequential(nn.Sequential(Router()), nn.Sequential(Mixer()))
    with attnpatch.patched(model):
        assert patch_of(model).around == {"", "0", "1"}
        run(model, x())
        assert "0.0" in attnpatch.report(model).left_alone
        assert patch_of(model).around == {"", "1"}


class Symmetric(Mixer):
    """Its scores are a sum of two products, which is in no map."""

    def forward(self, x):
        q, k, v = self.split(x)
        scores = q @ k.mT
        return self.join((scores + scores.mT).softmax(-1) @ v)


@pytest.mark.parametrize(
    ("kind", "is_named"), [(Symmetric, [True, True]), (Mixer, [False] * 2), (Router, [False])]
)
def test_the_first_call_is_in_a_map_or_named(kind, is_named):
    """Of attention that is recognised in its first call, the first call is left out for the same reason as the second."""
    model = nn.Sequential(kind())
    with warnings.catch_warnings(), attnpatch.patched(model):
        warnings.simplefilter("ignore")
        for named in is_named:
            with attnpatch.capture(model, blocks=attnpatch.Blocks.fixed(4)) as maps:
                run(model, x())
            assert list(maps.left_out) == ["0"] * named


@pytest.mark.parametrize("is_model_outer", [True, False])
def test_a_capture_inside_a_capture_of_another_part(is_model_outer):
    """What the error advises works: the outer capture ends, then the inner one begins."""
    model = nn.Sequential(nn.Sequential(Mixer()))
    outer, inner = (model, model[0]) if is_model_outer else (model[0], model)
    blocks = attnpatch.Blocks.fixed(4)
    with attnpatch.capture(outer, blocks=blocks):
        with (
            pytest.raises(PatchError, match="end that capture first") as raised,
            attnpatch.capture(inner, blocks=blocks),
        ):
            pass
        assert "remove()" not in str(raised.value)
    with attnpatch.capture(inner, blocks=blocks):
        run(model, x())


def test_the_model_itself():
    """A model that attends in its own forward is a site, and root."""
    model = stack(Mixer)[0]
    native = run(model, x())
    with attnpatch.patched(model, mode="always", rows=7):
        assert torch.equal(run(model, x()), native)
        assert [(s.name, s.counts["by_rows"]) for s in attnpatch.report(model).sites] == [("(model)", 1)]


def test_named_sites_are_enough():
    """Around and inside a module whose name says attention nothing is looked for."""

    class SelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.core = Mixer()

        def forward(self, x):
            return self.core(x)

    model = stack(SelfAttention, Mixer)
    with attnpatch.patched(model, mode="always"):
        run(model, x())
        whys = {site.name: site.why for site in attnpatch.report(model).sites}
    assert whys == {"0": "name", "1": "recognised: softmax of a product"}


def test_registered_only(monkeypatch):
    """``sites="registered"`` takes classes and predicates that were registered, and nothing else."""
    from attnpatch.patching import registry

    monkeypatch.setattr(registry, "_registered", [])
    model = stack(Mixer, Fused, HoldsSoftmax)
    with pytest.raises(attnpatch.errors.PatchError, match="register"):
        attnpatch.apply(model, sites="registered")
    attnpatch.register(Fused)
    attnpatch.register(lambda module: hasattr(module, "normalise"))
    with attnpatch.patched(model, sites="registered", mode="always"):
        run(model, x())
        sites = {site.name: site.why for site in attnpatch.report(model).sites}
    assert sites == {"1": "registered", "2": "registered"}


def test_asked_for():
    """Paths choose; a wrong one is answered with those that are near."""
    model = nn.ModuleDict({"encoder": stack(Mixer, Mixer), "decoder": stack(Mixer)})
    model.forward = lambda x: model["decoder"](model["encoder"](x))
    native = run(model, x())
    with attnpatch.patched(model, sites=["encoder.1"], mode="always", rows=7):
        assert torch.equal(run(model, x()), native)
        report = attnpatch.report(model)
    assert [(site.name, site.why) for site in report.sites] == [("encoder.1", "asked for")]
    with pytest.raises(attnpatch.errors.PatchError, match=r"no module 'encodr\.1'.*'encoder\.1'"):
        attnpatch.apply(model, sites=["encodr.1"])
    for wrong in ("", [], [1], 3):
        with pytest.raises(attnpatch.errors.PatchError, match="not accepted"):
            attnpatch.apply(model, sites=wrong)


def test_applied_again():
    """Other sites replace the patch, the same ones (or none said) only its policy."""
    model = stack(Mixer, Mixer)
    before = snapshot(model)
    attnpatch.apply(model, sites=["0"], mode="always")
    run(model, x())
    attnpatch.apply(model, mode="always", rows=9)
    assert attnpatch.report(model).totals["by_rows"] == 1
    with pytest.raises(attnpatch.errors.PatchError, match="no module"):
        attnpatch.apply(model, sites=["7"])
    attnpatch.apply(model, sites="auto", mode="always")
    run(model, x())
    assert attnpatch.report(model).totals["by_rows"] == 2
    with (
        pytest.raises(attnpatch.errors.PatchError, match="leave sites and layers out"),
        attnpatch.patched(model, sites=["0"]),
    ):
        pass
    attnpatch.remove(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("called", [False, True])
def test_copies(how, called):
    """A copy recognises for itself, before and after the first call."""
    model = stack(Mixer, Head)
    native = run(model, x())
    attnpatch.apply(model, mode="always", rows=7)
    if called:
        run(model, x())
    twin = how(model)
    assert torch.equal(run(twin, x()), native)
    assert [site.name for site in attnpatch.report(twin).sites] == ["0"]
    assert torch.equal(run(attnpatch.remove(twin), x()), native)
    attnpatch.remove(model)


def test_an_error_decides_nothing():
    """A first call that fails leaves candidates for the next."""
    model = attnpatch.apply(stack(Mixer, Head), mode="always")
    with pytest.raises(RuntimeError):
        run(model, torch.randn(2, 5, 63))
    run(model, x())
    report = attnpatch.report(model)
    assert [site.name for site in report.sites] == ["0"] and report.left_alone == ("1",)
    attnpatch.remove(model)


def test_gradients():
    """A first call with gradients: those of the model unpatched."""
    native, model = stack(Talking, Head), stack(Talking, Head)
    native(x()).square().sum().backward()
    with attnpatch.patched(model, mode="always", rows=7):
        model(x()).square().sum().backward()
    for mine, other in zip(model.parameters(), native.parameters(), strict=True):
        assert torch.allclose(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


class _Softmaxes(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "softmax" and result.dim() == 4:
            self.found.append(result)
        return result


@pytest.mark.parametrize("way", ["never", "always"])
def test_captured(way):
    """Recognised while it is captured for the first time."""
    model = stack(Mixer, Router, CallsAFunction, Head)
    with _Softmaxes() as dense:
        run(copy.deepcopy(model).double(), x(1).double())
    with (
        attnpatch.patched(model, mode=way),
        attnpatch.capture(model, attnpatch.Blocks.fixed(8), heads="all") as maps,
    ):
        run(model, x(1))
    blocks = token_blocks(None, zoo.TEXT_LEN, size=8)
    expected = dense_map(dense.found, blocks, blocks)
    got = [maps[name] for name in maps.keys()]  # noqa: SIM118
    if len(got) == 1:
        assert_same(got[0], select(expected, "all", None))
    else:
        for layer, each in enumerate(got):
            assert_same(each, select(expected, "all", [layer]))


def test_explained():
    """``explain`` finds the same sites without a call of the model."""
    model = stack(Mixer, Head)
    said = attnpatch.explain(model, inputs=x(), mode="always")
    assert [group.count for group in said.groups] == [1] and "Mixer" in str(said), said
    assert all("_attnpatch" not in vars(module) for module in model.modules())
