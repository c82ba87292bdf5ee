"""Which tokens a kernel's queries and keys are: caches, pages, sequences without padding. Otherwise there is no map."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attnpatch
from tests.kernel_cases import (
    BLOCK,
    HEADS,
    TOKENS,
    WIDTH,
    blocks_of,
    cumulative,
    function,
    installed,
)

BLOCKS = attnpatch.Blocks.fixed(BLOCK)
TABLE = torch.tensor([[3, 1, 4, 7, 9, 2, 6, 0], [10, 11, 12, 15, 20, 13, 22, 17]], dtype=torch.int32)


@pytest.fixture(autouse=True, scope="module")
def _installed():
    with installed():
        yield


class Model(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attn = attention

    def forward(self, *args, **kwargs):
        return self.attn(*args, **kwargs)


class Attention(nn.Module):
    """Calls ``call(q, k, v, self, *others)``."""

    def __init__(self, call) -> None:
        super().__init__()
        self.call = call
        self.q, self.k, self.v = (nn.Linear(HEADS * WIDTH, HEADS * WIDTH) for _ in range(3))
        cache, pages = (2, 40, HEADS, WIDTH), (24, 4, HEADS, WIDTH)
        self.keys, self.values = torch.zeros(cache).double(), torch.zeros(cache).double()
        self.key_pages, self.value_pages = torch.zeros(pages).double(), torch.zeros(pages).double()

    def parts(self, x, of_keys=None):
        own = x if of_keys is None else of_keys
        inputs = ((self.q, x), (self.k, own), (self.v, own))
        return [layer(given).unflatten(-1, (HEADS, WIDTH)) for layer, given in inputs]

    def forward(self, x, *others, of_keys=None):
        return self.call(*self.parts(x, of_keys), self, *others).flatten(-2)


def with_cache(q, k, v, site):
    attend = function("flash_attn.flash_attn_with_kvcache")
    return attend(q, site.keys, site.values, k, v, cache_seqlens=0, causal=True)


def with_pages(q, k, v, site):
    attend = function("flash_attn.flash_attn_with_kvcache")
    used = torch.zeros(2, dtype=torch.int32)
    return attend(
        q, site.key_pages, site.value_pages, k, v, cache_seqlens=used, block_table=TABLE, causal=True
    )


def own_cache(q, k, v, site):
    """The module writes its keys itself."""
    n = q.shape[1]
    site.keys[:, :n] = k
    site.values[:, :n] = v
    attend = function("flash_attn.flash_attn_with_kvcache")
    return attend(q, site.keys, site.values, cache_seqlens=n, causal=True)


def _write_pages(k, v, site):
    for row in range(len(k)):
        places = torch.arange(k.shape[1])
        page, slot = TABLE[row][places // 4].long(), places % 4
        site.key_pages[page, slot] = k[row]
        site.value_pages[page, slot] = v[row]


def own_pages(q, k, v, site):
    _write_pages(k, v, site)
    attend = function("flash_attn.flash_attn_with_kvcache")
    used = torch.full((2,), q.shape[1], dtype=torch.int32)
    return attend(q, site.key_pages, site.value_pages, cache_seqlens=used, block_table=TABLE, causal=True)


def packed_pages(q, k, v, site):
    """As servers call it."""
    _write_pages(k, v, site)
    cu = cumulative((TOKENS, TOKENS))
    attend = function("flash_attn.flash_attn_varlen_func")
    out = attend(
        q.flatten(0, 1),
        site.key_pages,
        site.value_pages,
        cu,
        cu,
        TOKENS,
        TOKENS,
        causal=True,
        block_table=TABLE[:, :6],
    )
    return out.unflatten(0, (2, TOKENS))


def probabilities(model, x, causal=True, real=None, of_keys=None, real_keys=None):
    """Float64 by plain loops; ``real``: which tokens are no padding."""
    from dense_attention import probabilities as of_one

    q, k, _ = model.attn.parts(x, of_keys)
    found = x.new_zeros(len(x), HEADS, x.shape[1], k.shape[1])
    for b in range(len(x)):
        rows = torch.arange(x.shape[1]) if real is None else real[b].nonzero().flatten()
        keys = rows if real_keys is None else real_keys[b].nonzero().flatten()
        own, _ = of_one(q[b, rows], k[b, keys], causal, -1, -1, True, 0.0, WIDTH**-0.5)
        for i, row in enumerate(rows):
            found[b, :, row, keys] = own[:, i]
    return found


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("call", [with_cache, with_pages, own_cache, own_pages, packed_pages])
def test_the_first_call_with_a_cache(call, replace):
    """The keys are those of the call, wherever they were written."""
    torch.manual_seed(0)
    model, x = Model(Attention(call)).double(), torch.randn(2, TOKENS, HEADS * WIDTH).double()
    patched = attnpatch.patched(model, replace_kernels=replace)
    with patched, torch.no_grad(), attnpatch.capture(model, blocks=BLOCKS) as maps:
        model(x)
    assert not maps.left_out
    wanted = blocks_of(probabilities(model, x))
    assert (maps["attn"].mass.squeeze(1).double() - wanted).abs().max() < 1e-6


def in_another_order(q, k, v, site):
    return own_pages(q, k.flip(1), v.flip(1), site)


def from_before(q, k, v, site):
    """Six keys of an earlier call, then its own."""
    attend = function("flash_attn.flash_attn_with_kvcache")
    return attend(q, site.keys, site.values, k, v, cache_seqlens=6, causal=True)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (in_another_order, "come from an operation that attnpatch cannot follow"),
        (from_before, "the module keeps its first 6 keys itself"),
    ],
)
def test_other_keys_are_in_no_map(call, reason):
    torch.manual_seed(0)
    model, x = Model(Attention(call)).double(), torch.randn(2, TOKENS, HEADS * WIDTH).double()
    with torch.no_grad(), attnpatch.capture(model, blocks=BLOCKS) as maps:
        model(x)
    assert reason in maps.left_out["attn"]


def without_padding(q, k, v, site, mask):
    """As transformers and flash-attn's own ``unpad_input`` do it."""
    at = mask.flatten().nonzero().flatten()
    cu, most = cumulative(tuple(mask.sum(1).tolist())), int(mask.sum(1).max())
    attend = function("flash_attn.flash_attn_varlen_func")
    flat = (one.flatten(0, 1)[at] for one in (q, k, v))
    out = attend(*flat, cu, cu, most, most, causal=True)
    whole = q.new_zeros(q.shape).flatten(0, 1)
    whole[at] = out
    return whole.view(q.shape)


RIGHT = torch.arange(TOKENS) < torch.tensor([[TOKENS], [17]])
LEFT = torch.arange(TOKENS) >= torch.tensor([[5], [0]])
BOTH = torch.arange(TOKENS) >= torch.tensor([[7], [7]])


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("real", [RIGHT, LEFT, BOTH], ids=["right", "left", "both alike"])
def test_sequences_without_their_padding(real, replace):
    torch.manual_seed(0)
    model, x = Model(Attention(without_padding)).double(), torch.randn(2, TOKENS, HEADS * WIDTH).double()
    with torch.no_grad():
        native = model(x, real)
    patched = attnpatch.patched(model, replace_kernels=replace)
    with patched, torch.no_grad(), attnpatch.capture(model, blocks=BLOCKS) as maps:
        found = model(x, real)
    assert (found - native).abs().max() < 1e-9
    assert not maps.left_out
    p = probabilities(model, x, real=real)
    for b in range(2):
        at = real[b].nonzero().flatten()
        own = maps["attn"].mass[b, 0].double()
        # Blocks count real tokens only.
        wanted = torch.zeros_like(own)
        sizes = torch.zeros(len(own), dtype=torch.float64)
        for i, row in enumerate(at):
            sizes[i // BLOCK] += 1
            for j, key in enumerate(at):
                wanted[i // BLOCK, j // BLOCK] += p[b, :, row, key].mean()
        wanted = wanted / sizes[:, None].clamp(min=1)
        assert (own - wanted).abs().max() < 1e-6


def texts_without_padding(q, k, v, site, lengths):
    """Cross-attention from images to texts of different lengths, as video models call it."""
    cu_q, cu_k = cumulative((q.shape[1],) * len(q)), cumulative(lengths)
    own = [torch.cat([one[b, :n] for b, n in enumerate(lengths)]) for one in (k, v)]
    attend = function("flash_attn.flash_attn_varlen_func")
    return attend(q.flatten(0, 1), *own, cu_q, cu_k, q.shape[1], max(lengths)).view(q.shape)


@pytest.mark.parametrize("replace", [False, True])
def test_cross_attention_to_texts_without_their_padding(replace):
    torch.manual_seed(0)
    model = Model(Attention(texts_without_padding)).double()
    x, texts = torch.randn(2, 12, HEADS * WIDTH).double(), torch.randn(2, 18, HEADS * WIDTH).double()
    lengths = (18, 11)
    patched = attnpatch.patched(model, replace_kernels=replace)
    with patched, torch.no_grad(), attnpatch.capture(model, blocks=BLOCKS) as maps:
        model(x, lengths, of_keys=texts)
    assert not maps.left_out
    real = torch.arange(18) < torch.tensor(lengths)[:, None]
    p = probabilities(model, x, False, torch.ones(2, 12, dtype=torch.bool), texts, real)
    wanted = p.mean(1).unflatten(2, (3, BLOCK)).sum(-1).unflatten(1, (2, BLOCK)).mean(2)
    assert (maps["attn"].mass.squeeze(1).double() - wanted).abs().max() < 1e-6
