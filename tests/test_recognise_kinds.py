"""Wherever a module keeps its softmax, its product and its weights, its attention is found and goes by rows."""

import functools
import sys
import types

import einops
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import matmul as times
from torch import nn
from torch import softmax as normalise
from torch.nn.functional import softmax as shares

import attnpatch


class Base(nn.Module):
    """Query, key and value of one input; what weighs the values is a subclass's."""

    is_exact = True

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(64, 3 * 64)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.weigh(q @ k.mT * 0.125) @ v


class InSequential(Base):
    def __init__(self):
        super().__init__()
        self.weigh = nn.Sequential(nn.Softmax(-1), nn.Dropout(0.0))


class InModuleList(Base):
    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleList([nn.Identity(), nn.Softmax(-1)])

    def weigh(self, scores):
        return functools.reduce(lambda value, step: step(value), self.steps, scores)


class InModuleDict(Base):
    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleDict({"rows": nn.Sequential(nn.Sequential(nn.Softmax(-1)))})

    def weigh(self, scores):
        return self.steps["rows"](scores)


class InList(Base):
    def __init__(self):
        super().__init__()
        self.steps = [F.softmax]

    def weigh(self, scores):
        return self.steps[0](scores, -1)


class ModuleInList(Base):
    def __init__(self):
        super().__init__()
        self.steps = [nn.Softmax(-1)]

    def weigh(self, scores):
        return self.steps[0](scores)


class InPrivateDict(Base):
    def __init__(self):
        super().__init__()
        self._steps = {"rows": functools.partial(torch.softmax, dim=-1)}

    def weigh(self, scores):
        return self._steps["rows"](scores)


STEPS = {"rows": {"exact": torch.softmax}}


class InGlobalDict(Base):
    def weigh(self, scores):
        return STEPS["rows"]["exact"](scores, -1)


class InPartial(Base):
    def __init__(self):
        super().__init__()
        self.weigh = functools.partial(functools.partial(F.softmax), dim=-1)


def in_float(func):
    @functools.wraps(func)
    def wrapped(scores):
        return func(scores.float()).to(scores.dtype)

    return wrapped


@in_float
def _wrapped(scores):
    return F.softmax(scores, -1)


class Wrapped(Base):
    def weigh(self, scores):
        return _wrapped(scores)


class WrappedAround(Base):
    """The softmax is the decorator's own."""

    def weigh(self, scores):
        return _capped(scores)


def then_softmax(func):
    @functools.wraps(func)
    def wrapped(scores):
        return torch.softmax(func(scores), -1)

    return wrapped


@then_softmax
def _capped(scores):
    return scores.clamp(max=20)


class Renamed(Base):
    def weigh(self, scores):
        return normalise(scores, -1)


class RenamedFunctional(Base):
    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return times(shares(times(q, k.mT), dim=-1), v)


class Special(Base):
    def weigh(self, scores):
        return torch.special.softmax(scores, -1)


class Softmin(Base):
    def weigh(self, scores):
        return F.softmin(-scores, -1)


class SoftminModule(Base):
    def __init__(self):
        super().__init__()
        self.least = nn.Softmin(-1)

    def weigh(self, scores):
        return self.least(-scores)


class Softmax2d(Base):
    """Softmax over channels, which are the keys: torch rounds it by where rows lie."""

    is_exact = False

    def __init__(self):
        super().__init__()
        self.across = nn.Softmax2d()

    def weigh(self, scores):
        return self.across(scores.mT.unsqueeze(-1)).squeeze(-1).mT


class Logarithm(Base):
    def weigh(self, scores):
        return scores.log_softmax(-1).exp()


class Logsumexp(Base):
    def weigh(self, scores):
        return torch.exp(scores - scores.logsumexp(-1, keepdim=True))


class PowersAndSum(Base):
    def weigh(self, scores):
        powers = torch.exp(scores - scores.max(-1, keepdim=True).values)
        return powers * powers.sum(-1, keepdim=True).reciprocal()


class Subclass(nn.Softmax):
    pass


class OfSubclass(Base):
    def __init__(self):
        super().__init__()
        self.weigh = Subclass(-1)


class Bounded(nn.Module):
    """A helper with a parameter."""

    def __init__(self):
        super().__init__()
        self.bound = nn.Parameter(torch.tensor(9.0))

    def forward(self, scores):
        return (scores.tanh() * self.bound).softmax(-1)


class OfHelper(Base):
    def __init__(self):
        super().__init__()
        self.weigh = Bounded()


class MadeInForward(Base):
    def weigh(self, scores):
        return nn.Softmax(dim=-1)(scores)


class ClassAttribute(Base):
    weigh_rows = staticmethod(F.softmax)

    def weigh(self, scores):
        return self.weigh_rows(scores, -1)


class Lambda(Base):
    def __init__(self):
        super().__init__()
        self.weigh = lambda scores: scores.softmax(-1)


class Closure(Base):
    def __init__(self):
        super().__init__()
        steps = [lambda scores: scores.softmax(-1)]

        def weigh(scores):
            return steps[0](scores)

        self.weigh = weigh


class DefaultArgument(Base):
    def weigh(self, scores, *, rows=F.softmax):
        return rows(scores, -1)


class Property(Base):
    @property
    def weigh(self):
        return lambda scores: scores.softmax(-1)


class FromBase(InPartial):
    def forward(self, x):
        return x + super().forward(x)


class Product(nn.Module):
    def forward(self, a, b):
        return a @ b


class ProductIsAModule(Base):
    """As in code that is quantised: every operation is a module."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.weigh = Product(), Product(), nn.Softmax(-1)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.second(self.weigh(self.first(q, k.mT)), v)


class EinopsEinsum(Base):
    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = einops.einsum(q, k, "b i d, b j d -> b i j").softmax(-1)
        return einops.einsum(weights, v, "b i j, b j d -> b i d")


class HeldEinsum(Base):
    def __init__(self):
        super().__init__()
        self.multiply = {"scores": functools.partial(torch.einsum, "bid,bjd->bij")}

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.einsum("bij,bjd->bid", self.multiply["scores"](q, k).softmax(-1), v)


class Processor:
    def __call__(self, module, x):
        q, k, v = module.qkv(x).chunk(3, -1)
        return (q @ k.mT).softmax(-1) @ v


class WithProcessor(Base):
    def __init__(self):
        super().__init__()
        self.processor = Processor()

    def forward(self, x):
        return self.processor(self, x)


class ProcessorInDict(Base):
    def __init__(self):
        super().__init__()
        self._processors = {"plain": [Processor()]}

    def forward(self, x):
        return self._processors["plain"][0](self, x)


class Holding:
    """A processor that keeps its softmax in a list, and the module that it serves."""

    def __init__(self, owner):
        self.owner, self.steps = owner, [nn.Softmax(-1)]

    def __call__(self, x):
        q, k, v = self.owner.qkv(x).chunk(3, -1)
        return torch.matmul(self.steps[0](q @ k.mT), v)


class WithHoldingProcessor(Base):
    def __init__(self):
        super().__init__()
        self.processors = {"plain": functools.partial(Holding(self))}

    def forward(self, x):
        return self.processors["plain"](x)


class MadeProcessor(Base):
    def forward(self, x):
        return Processor()(self, x)


class Strategy:
    def attend(self, q, k, v):
        return self._weights(q, k) @ v

    def _weights(self, q, k):
        return (q @ k.mT).softmax(-1)


class WithStrategy(Base):
    def __init__(self):
        super().__init__()
        self.strategy = Strategy()

    def forward(self, x):
        return self.strategy.attend(*self.qkv(x).chunk(3, -1))


class BoundMethod(Base):
    def __init__(self):
        super().__init__()
        self.run = Strategy().attend

    def forward(self, x):
        return self.run(*self.qkv(x).chunk(3, -1))


class Op(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k):
        weights = torch.einsum("bqc,bkc->bqk", q, k).softmax(-1)
        ctx.save_for_backward(q, k, weights)
        return weights


class InFunction(Base):
    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return Op.apply(q, k) @ v


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 3 * 64), nn.Linear(64, 64)


class SelfAttention(Holder):
    """Holds weights; nobody calls it."""

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.mT).softmax(-1) @ v)


class OfHolder(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = SelfAttention()

    def forward(self, x):
        q, k, v = self.attn.qkv(x).chunk(3, -1)
        return self.attn.out((q @ k.mT).softmax(-1) @ v)


class OfHolders(nn.Module):
    def __init__(self):
        super().__init__()
        self.streams = nn.ModuleDict({"text": nn.Sequential(SelfAttention())})

    def forward(self, x):
        held = self.streams["text"][0]
        q, k, v = held.qkv(x).chunk(3, -1)
        return held.out((q @ k.mT).softmax(-1) @ v)


class OfMethod(nn.Module):
    """A part without a forward: its owner calls a method."""

    def __init__(self):
        super().__init__()
        self.core = WithMethod()

    def forward(self, x):
        return self.core.mix(x)


class WithMethod(Holder):
    def mix(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.mT).softmax(-1) @ v)


class SoftArgmax(Base):
    """Matching: the values are places, no input."""

    def forward(self, x):
        q, k, _ = self.qkv(x).chunk(3, -1)
        places = torch.linspace(0, 1, x.shape[1])[:, None].expand(x.shape[0], -1, 2)
        return x + (q @ k.mT).softmax(-1).matmul(places).sum(-1, keepdim=True)


class Grid(Base):
    """The same from a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("grid", torch.linspace(0, 1, 2 * zoo.TEXT_LEN).view(zoo.TEXT_LEN, 2))

    def forward(self, x):
        q, k, _ = self.qkv(x).chunk(3, -1)
        return x + torch.einsum("bij,jc->bic", (q @ k.mT).softmax(-1), self.grid).sum(-1, keepdim=True)


class Linalg(Base):
    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.linalg.matmul(torch.linalg.matmul(q, k.mT).softmax(-1), v)


class Unbatched(Base):
    def forward(self, x):
        q, k, v = self.qkv(x[0]).chunk(3, -1)
        return torch.mm(torch.softmax(torch.mm(q, k.t()), -1), v)[None]


class ByElement(Base):
    """A soft argmax without a second product."""

    def forward(self, x):
        q, k, _ = self.qkv(x).chunk(3, -1)
        return (
            ((q @ k.mT).softmax(-1) * torch.linspace(0, 1, x.shape[1]))
            .sum(-1, keepdim=True)
            .expand(-1, -1, 64)
        )


class LearnedQuery(nn.Module):
    """Pooling: the queries are a parameter."""

    def __init__(self):
        super().__init__()
        self.queries, self.kv = nn.Parameter(torch.randn(9, 64)), nn.Linear(64, 128)

    def forward(self, x):
        k, v = self.kv(x).chunk(2, -1)
        return torch.einsum("qd,bkd->bqk", self.queries, k).softmax(-1) @ v


class OfObject(Base):
    """What comes in is an object with tensors."""

    def forward(self, graph):
        q, k, v = self.qkv(graph.nodes["x"]).chunk(3, -1)
        return (q @ k.mT).softmax(-1) @ v


NOT_SITES = (Base, Subclass, Bounded, Product, Holder, SelfAttention, WithMethod, LearnedQuery, OfObject)
FOUND = [
    kind
    for kind in list(globals().values())
    if isinstance(kind, type)
    and issubclass(kind, nn.Module)
    and kind.__module__ == __name__
    and kind not in NOT_SITES
]


def x():
    return zoo.floats(2, zoo.TEXT_LEN, 64)


def check(model, *args, site="(model)", is_exact=True):
    zoo.randomise(model).eval()
    with torch.no_grad():
        native = model(*args)
        with attnpatch.patched(model, mode="always", rows=7):
            for _ in range(2):
                got = model(*args)
                assert torch.equal(got, native) if is_exact else torch.allclose(got, native, atol=1e-6)
            report = attnpatch.report(model)
    did = {each.name: each.counts["by_rows"] for each in report.sites if each.counts["by_rows"]}
    assert did == {site: 2}, report
    assert report.totals["materialised"] == report.totals["native"] == 0, report


@pytest.mark.parametrize("kind", FOUND, ids=lambda kind: kind.__name__)
def test_found(kind):
    """As a model of its own, and inside one."""
    is_exact = getattr(kind, "is_exact", True)
    check(kind(), x(), is_exact=is_exact)
    check(nn.Sequential(nn.Sequential(kind()), nn.Linear(64, 64)), x(), site="0.0", is_exact=is_exact)


def test_what_comes_in_is_an_object():
    check(OfObject(), types.SimpleNamespace(nodes={"x": x()}))


def recognised(model, *args):
    """Why each site of a model is one, after a call with whatever memory there is."""
    with torch.no_grad(), attnpatch.patched(model):
        model(*args)
        report = attnpatch.report(model)
    return {site.name: site.why for site in report.sites}, report.left_alone


SITE = {"(model)": "recognised: softmax of a product"}


def test_learned_queries():
    assert recognised(LearnedQuery(), x()) == (SITE, ())


@torch.jit.script
def scripted(scores: torch.Tensor):
    return torch.softmax(scores * 2.0, dim=-1)


class Scripted(Base):
    def weigh(self, scores):
        return scripted(scores)


class Opaque(Base):
    """Scores leave torch's functions: an extension in C++ would do the same."""

    def __init__(self):
        super().__init__()
        self.fused_softmax = lambda scores: torch.from_numpy(scores.softmax(-1).numpy().copy())

    def weigh(self, scores):
        return self.fused_softmax(scores)


@pytest.mark.parametrize("kind", [Scripted, Opaque])
def test_what_cannot_be_watched(kind):
    """What it returns has the shape of scores, and is multiplied as probabilities are."""
    assert recognised(kind(), x()) == (SITE, ())


PROJECT = {
    "__init__.py": "",
    "ops/__init__.py": "from . import weights",
    "ops/weights.py": """
import torch
def contract(equation, *operands):
    return torch.einsum(equation, *operands)
def weigh(q, k):
    return _normalise(contract("bid,bjd->bij", q, k))
def _normalise(scores):
    return torch.softmax(scores, -1)
""",
    "model.py": """
from torch import nn
import other_project as other
class Late(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(64, 192)
    def forward(self, x):
        from .ops.weights import contract, weigh
        q, k, v = self.qkv(x).chunk(3, -1)
        return contract("bij,bjd->bid", weigh(q, k), v)
class Dotted(Late):
    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return other.ops.weights.contract("bij,bjd->bid", other.ops.weights.weigh(q, k), v)
""",
}


@pytest.mark.parametrize("kind", ["Late", "Dotted"])
def test_function_of_another_project(kind, tmp_path, monkeypatch):
    """Imported where it is called, or named by its modules; ``contract`` is how opt_einsum calls its product."""
    for name, text in PROJECT.items():
        path = tmp_path / "other_project" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        import other_project.model
        import other_project.ops

        check(getattr(other_project.model, kind)(), x())
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "other_project"]:
            del sys.modules[name]


class Called(nn.Module):
    """Holds an attention module and calls it; its own softmax and product are no attention."""

    def __init__(self):
        super().__init__()
        self.attn, self.gate = SelfAttention(), nn.Linear(64, 3)

    def forward(self, x):
        shares = self.gate(x).softmax(-1)
        return self.attn(x) + shares @ torch.ones(3, 64)


class Both(Called):
    """Calls it, and attends itself with its weights."""

    def forward(self, x):
        q, k, v = self.attn.qkv(self.attn(x)).chunk(3, -1)
        return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("tokens", [zoo.TEXT_LEN, 2000])
def test_around_a_site(tokens):
    """Who holds a site is one itself only if it attends itself, whatever the length of its first call."""
    x = zoo.floats(1, tokens, 64)
    assert recognised(Called(), x) == ({"attn": "name"}, ("(model)",))
    assert recognised(Both(), x) == ({**SITE, "attn": "name"}, ())
    assert recognised(OfHolder(), x) == ({**SITE, "attn": "name"}, ())


def test_models_of_hosts_are_left_alone():
    """Around the attention of transformers nothing is tried out."""
    for name in ("llama", "gpt2", "bert", "t5", "bart", "clip"):
        model = zoo.BY_NAME[name].build("eager")
        with attnpatch.patched(model):
            assert {site.why for site in attnpatch.report(model).sites} <= {"name", "masks"}, name


class Affinity(Base):
    """Unnormalised, and summed over rows."""

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.exp(-(q @ k.mT).square()) @ v


class Entropy(Base):
    """Probabilities that nothing is weighed by."""

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = (q @ k.mT).softmax(-1)
        return v * -torch.logsumexp(weights * 2, -1, keepdim=True)


class Classifier(Base):
    """One of its layers multiplies matrices, another is a classifier."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(64, 7), nn.Softmax(-1))

    def forward(self, x):
        return self.head(x @ torch.eye(64)) @ torch.ones(7, 64)


@pytest.mark.parametrize("kind", [Affinity, Entropy, Classifier])
def test_no_attention(kind):
    model = nn.Sequential(InPartial(), kind())
    whys, _ = recognised(model, x())
    assert whys == {"0": "recognised: softmax of a product"}
