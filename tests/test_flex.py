"""torch's FlexAttention, the real one on the CPU: maps beside it, and by rows in its place, since uncompiled it holds all
scores."""

import warnings

import pytest
import torch
from test_known_facts import captured, same
from torch import nn
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attnpatch
from attnpatch import Blocks

LENGTH, HEADS, WIDTH = 200, 4, 40
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


class Attention(nn.Module):
    """What papers write around FlexAttention."""

    def __init__(self, groups=1, **options):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (
            nn.Linear(32, size) for size in (32, 32 // groups, 32 // groups, 32)
        )
        self.options = options | ({"enable_gqa": True} if groups > 1 else {})

    def split(self, x):
        return (each(x).unflatten(-1, (-1, 8)).transpose(1, 2) for each in (self.q, self.k, self.v))

    def forward(self, x):
        return self.o(flex_attention(*self.split(x), **self.options).transpose(1, 2).flatten(-2))


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attn = Attention(**options)

    def forward(self, x):
        return self.attn(x)


SLOPES = torch.tensor([0.1, 0.2, -0.3, 0.0])


def causal(batch, head, query, key):
    return query >= key


def near(batch, head, query, key):
    return (query >= key) & (query - key < 70 + 10 * head)


def far_rows_closed(batch, head, query, key):
    """The last rows of the first sequence have no key."""
    return (batch > 0) | (query < 150)


def capped(score, batch, head, query, key):
    return 2 * torch.tanh(score / 2) - SLOPES[head] * (query - key).abs()


def masks(function, batch=None, heads=None):
    return create_block_mask(function, batch, heads, LENGTH, LENGTH, device="cpu")


def blocks_only():
    """A mask of blocks that the function of the mask does not describe: some are full, some are left out."""
    counts = torch.tensor([[[1, 2]]], dtype=torch.int32)
    order = torch.tensor([[[[0, 1], [0, 1]]]], dtype=torch.int32)
    none = torch.zeros_like(counts)
    return flex.BlockMask.from_kv_blocks(none, order, counts, order, BLOCK_SIZE=100, mask_mod=causal)


def open_blocks(batch, head, query, key):
    return (query >= 100) | (key < 100)


# Options, the function of the mask, the function of the scores.
CASES = {
    "plain": ({}, None, None),
    "scale": ({"scale": 0.7}, None, None),
    "causal": ({"block_mask": masks(causal)}, causal, None),
    "heads": ({"block_mask": masks(near, heads=HEADS)}, near, None),
    "batch": ({"block_mask": masks(far_rows_closed, batch=2)}, far_rows_closed, None),
    "scores": ({"score_mod": capped}, None, capped),
    "both": ({"score_mod": capped, "block_mask": masks(near, heads=HEADS)}, near, capped),
    "grouped": ({"groups": 2, "block_mask": masks(causal)}, causal, None),
    # Uncompiled, and without a code generator, torch reads only the function of a mask.
    "blocks": ({"block_mask": blocks_only()}, causal, None),
}


def dense(attn, x, mask, change):
    """Probabilities and result in float64, from the definitions."""
    q, k, v = (each.double() for each in attn.split(x))
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v))
    scores = q @ k.transpose(-2, -1) * attn.options.get("scale", 8**-0.5)
    places = torch.meshgrid(*(torch.arange(size) for size in scores.shape), indexing="ij")
    if change is not None:
        scores = change(scores, *places)
    if mask is not None:
        scores = scores.masked_fill(~mask(*places), -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return weights, attn.o((weights @ v).float().transpose(1, 2).flatten(-2))


def reduced(weights):
    return weights.mean(1).unflatten(-1, (-1, WIDTH)).sum(-1).unflatten(-2, (-1, WIDTH)).mean(-2)


def inputs():
    return torch.randn(2, LENGTH, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["uncompiled", "compiled"])
def kind(request, monkeypatch):
    """Flex as a script has it: torch's function, or compiled under the same name (here without a code generator)."""
    if request.param == "compiled":
        original = flex.flex_attention
        native = getattr(original, "__wrapped__", original)
        monkeypatch.setitem(globals(), "flex_attention", torch.compile(native, backend="eager"))
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_maps(case, kind):
    options, mask, change = CASES[case]
    model, x = Model(**options).eval(), inputs()
    native = model(x)
    results = []
    maps = captured(model, lambda: results.append(model(x)), Blocks.fixed(WIDTH))
    assert torch.equal(results[0], native)
    if (case, kind) == ("blocks", "compiled"):
        # With a code generator the lists count, so they are what the arguments mean; this result is another one.
        assert "differs by" in maps.left_out["attn"]
        return
    assert not maps.left_out, maps.left_out
    weights, _ = dense(model.attn, x, mask, change)
    same(maps["attn"].mass.squeeze(1), reduced(weights))


@pytest.mark.parametrize("case", CASES)
def test_by_rows(case):
    """Results and gradients, which torch's own does not have on a CPU."""
    options, mask, change = CASES[case]
    model = Model(**options)
    found, wanted = inputs().requires_grad_(), inputs().requires_grad_()
    attnpatch.apply(model, mode="always", rows=32)
    result = model(found)
    assert attnpatch.report(model).totals["by_rows"] == 1
    _, expected = dense(model.attn, wanted, mask, change)
    torch.testing.assert_close(result, expected, atol=2e-6, rtol=1e-5)
    result.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(found.grad, wanted.grad, atol=1e-5, rtol=1e-4)


def test_gradients_of_a_learned_bias():
    """Of a table that only the function of the scores reads."""
    grads = []
    for is_ours in (True, False):
        table = nn.Parameter(torch.randn(HEADS, 2 * LENGTH, generator=torch.Generator().manual_seed(2)))

        def change(score, batch, head, query, key, table=table):
            return score + table[head, query - key + LENGTH]

        model, x = Model(score_mod=change), inputs()
        if is_ours:
            attnpatch.apply(model, mode="always", rows=32)
        result = model(x) if is_ours else dense(model.attn, x, None, change)[1]
        result.square().sum().backward()
        grads.append(table.grad)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_logsumexp_by_rows():
    model, x = Model(block_mask=masks(causal), return_aux=flex.AuxRequest(lse=True)).attn, inputs()
    q, k, v = model.split(x)
    lse = torch.where(
        torch.ones(LENGTH, LENGTH).tril().bool(), (q @ k.transpose(-2, -1)).double() * 8**-0.5, -torch.inf
    ).logsumexp(-1)

    class Asking(nn.Module):
        def forward(self, q, k, v):
            return flex_attention(q, k, v, **model.options)

    asking = Asking()
    attnpatch.apply(asking, mode="always")
    result, aux = asking(q, k, v)
    torch.testing.assert_close(aux.lse.double(), lse, atol=1e-5, rtol=0)
    assert result.shape == q.shape


def test_memory_decides():
    """Enough memory: the kernel runs. Little: by rows."""
    for min_free, by_rows in (0, 0), ("1000TB", 1):
        model = Model(block_mask=masks(causal)).eval()
        attnpatch.apply(model, min_tokens=100, min_free=min_free)
        with torch.no_grad():
            model(inputs())
        assert attnpatch.report(model).totals["by_rows"] == by_rows


@torch.no_grad()
def test_what_cannot_be_read():
    """A reason instead of a map, and the kernel's own result."""

    class Shared(Model):
        def forward(self, x):
            q, k, v = self.attn.split(x)
            return flex_attention(q, k[:1], v[:1], block_mask=masks(causal, batch=2))

    model, x = Shared().eval(), inputs()
    native = model(x)
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with attnpatch.capture(attnpatch.apply(model, sites=[""]), Blocks.fixed(WIDTH)) as maps:
            results.append(model(x))
    assert torch.equal(results[0], native)
    assert len(maps) == 0 and any("other batch sizes" in why for why in maps.left_out.values())


@torch.no_grad()
def test_outside_a_patched_model():
    """Another model's calls go straight to torch."""
    patched, other, x = Model().eval(), Model().eval(), inputs()
    native = other(x)
    attnpatch.apply(patched, mode="always")
    assert torch.equal(other(x), native)
    assert attnpatch.report(patched).totals["by_rows"] == 0


@torch.no_grad()
def test_compiled_whole():
    """A model that is compiled as a whole has flex in its graph."""
    model, x = Model(block_mask=masks(causal)).eval(), inputs()
    native = model(x)
    attnpatch.apply(model)
    found = torch.compile(model, backend="eager")(x)
    torch.testing.assert_close(found, native, atol=1e-6, rtol=0)
