"""What torch computes instead of a kernel, against the kernel: lengths, caches, pages, biases, all that it returns."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import attnpatch
from tests.kernel_cases import SLOPES, bias_class, cumulative, function, installed

HEADS, WIDTH = 4, 8
TWO, THREE, FOUR = "flash_attn.", "flash_attn_interface.", "flash_attn.cute."
X, SAGE = "xformers.ops.", "sageattention."


@pytest.fixture(autouse=True, scope="module")
def _installed():
    with installed():
        yield


class Attention(nn.Module):
    """Calls a kernel with what it is given."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, *args, **kwargs):
        return function(self.path)(*args, **kwargs)


class Model(nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.attn = Attention(path)

    def forward(self, *args, **kwargs):
        return self.attn(*args, **kwargs)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def batch(n, m, heads=HEADS, key_heads=HEADS, size=2):
    """Query, key and value ``[batch, length, heads, width]``."""
    return randn(size, n, heads, WIDTH), randn(size, m, key_heads, WIDTH), randn(size, m, key_heads, WIDTH)


def flat(n, m, **kwargs):
    """The same, packed."""
    return tuple(one[0] for one in batch(n, m, size=1, **kwargs))


def results(value):
    """The tensors that a function has returned."""
    return [one for one in (value if isinstance(value, tuple) else (value,)) if one is not None]


def check(path, args, kwargs=None, mode="auto", tolerance=1e-6):
    """What torch computes is what the kernel computes, in all that it returns and writes."""
    from dense_attention import calls

    kwargs = kwargs or {}
    model = Model(path)
    native_args, native_kwargs = copy.deepcopy((args, kwargs))
    native = model(*native_args, **native_kwargs)
    calls.clear()
    with attnpatch.patched(model, replace_kernels=True, mode=mode):
        found = model(*args, **kwargs)
    assert not calls
    assert type(found) is type(native)
    for one, other in zip(results(found), results(native), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)
    for one, other in zip((*args, *kwargs.values()), (*native_args, *native_kwargs.values()), strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)


CU_Q, CU_K = cumulative((3, 0, 6)), cumulative((5, 4, 2))
PLACES = (CU_Q, CU_K, 6, 5)
CALLS = {
    **{
        f"{kernel}{n} x {m}: {kwargs}": (kernel + "flash_attn_func", batch(n, m, key_heads=2), kwargs)
        for kernel in (TWO, THREE, FOUR)
        for n, m in ((5, 9), (9, 5), (1, 7), (7, 1), (1, 1))
        for kwargs in ({"causal": True}, {"window_size": (2, 1)}, {"causal": True, "softcap": 1.5}, {})
    },
    "lse": (TWO + "flash_attn_func", batch(9, 5), {"causal": True, "return_attn_probs": True}),
    "lse of 3": (THREE + "flash_attn_func", batch(9, 5), {"causal": True, "return_attn_probs": True}),
    "lse of 4": (FOUR + "flash_attn_func", batch(9, 5), {"causal": True, "return_lse": True}),
    "lse with sinks": (
        FOUR + "flash_attn_func",
        batch(9, 5),
        {"causal": True, "return_lse": True, "learnable_sink": randn(HEADS)},
    ),
    "one query with alibi": (TWO + "flash_attn_func", batch(1, 5), {"causal": True, "alibi_slopes": SLOPES}),
    "packed": (TWO + "flash_attn_varlen_func", (*flat(9, 11), *PLACES), {"return_attn_probs": True}),
    "packed causal": (
        TWO + "flash_attn_varlen_func",
        (*flat(9, 11, key_heads=2), *PLACES),
        {
            "causal": True,
            "return_attn_probs": True,
            "alibi_slopes": torch.stack([SLOPES, 2 * SLOPES, 3 * SLOPES]),
        },
    ),
    "packed alike": (
        TWO + "flash_attn_varlen_func",
        (*flat(8, 12, key_heads=2), cumulative((4, 4)), cumulative((6, 6)), 4, 6),
        {"causal": True, "return_attn_probs": True, "alibi_slopes": torch.stack([SLOPES, 2 * SLOPES])},
    ),
    "packed alike, some keys used": (
        THREE + "flash_attn_varlen_func",
        (*flat(9, 12), cumulative((4, 4)), cumulative((6, 6)), 4, 6),
        {"causal": True, "seqused_k": torch.tensor([5, 5])},
    ),
    "packed, rest": (TWO + "flash_attn_varlen_func", (*flat(12, 13), *PLACES), {}),
    "packed of 3": (THREE + "flash_attn_varlen_func", (*flat(9, 11), *PLACES), {"return_attn_probs": True}),
    "packed, some keys used": (
        THREE + "flash_attn_varlen_func",
        (*flat(9, 11), *PLACES),
        {"seqused_k": torch.tensor([4, 1, 2]), "causal": True},
    ),
    "packed of 4": (
        FOUR + "flash_attn_varlen_func",
        flat(9, 11),
        {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, "return_lse": True, "learnable_sink": randn(HEADS)},
    ),
    "packed queries of 4": (
        FOUR + "flash_attn_varlen_func",
        (flat(9, 1)[0], *batch(1, 4, size=3)[1:]),
        {"cu_seqlens_q": CU_Q, "seqused_k": torch.tensor([4, 1, 2]), "causal": True, "return_lse": True},
    ),
    "keys used in batches": (
        FOUR + "flash_attn_varlen_func",
        batch(3, 6),
        {"seqused_k": torch.tensor([4, 6]), "causal": True, "return_lse": True},
    ),
    "sage": (SAGE + "sageattn", tuple(one.transpose(1, 2) for one in batch(5, 5)), {"return_lse": True}),
    "sage NHD": (
        SAGE + "sageattn_qk_int8_pv_fp8_cuda",
        batch(5, 9, key_heads=2),
        {"return_lse": True, "tensor_layout": "NHD", "sm_scale": 0.3},
    ),
    "sage mask": (
        SAGE + "sageattn_qk_int8_pv_fp16_triton",
        batch(5, 9),
        {"tensor_layout": "NHD", "attn_mask": torch.rand(2, 1, 5, 9) < 0.8},
    ),
    "sage packed": (SAGE + "sageattn_varlen", (*flat(9, 11), *PLACES), {}),
}


@pytest.mark.parametrize("mode", ["auto", "always", "never"])
@pytest.mark.parametrize("name", CALLS)
def test_torch_computes_what_the_kernel_computes(name, mode):
    path, args, kwargs = CALLS[name]
    if path.startswith(SAGE):
        import sageattention.core

        sageattention.core.quantises["on"] = False
    check(path, args, kwargs, mode)


def paged(tensor, table, size):
    """A cache of pages that holds ``[batch, slots, heads, width]``."""
    cache = randn(int(table.max()) + 2, size, *tensor.shape[2:])
    for b, row in enumerate(table.tolist()):
        for i, page in enumerate(row):
            cache[page] = tensor[b, i * size : (i + 1) * size]
    return cache


TABLE = torch.tensor([[3, 0, 5], [1, 4, 2]], dtype=torch.int32)
NEW = {"k": batch(1, 3, key_heads=2)[1], "v": batch(1, 3, key_heads=2)[2]}
CACHES = {
    "whole": {},
    "some": {"cache_seqlens": 7},
    "each": {"cache_seqlens": torch.tensor([7, 4], dtype=torch.int32)},
    "new": {"cache_seqlens": 5, **NEW},
    "new in each": {"cache_seqlens": torch.tensor([2, 6], dtype=torch.int32), **NEW},
    "first": {"cache_seqlens": 0, **NEW},
    "rows": {"cache_seqlens": 5, "cache_batch_idx": torch.tensor([3, 1], dtype=torch.int32), **NEW},
    "left": {
        "cache_seqlens": torch.tensor([7, 9], dtype=torch.int32),
        "cache_leftpad": torch.tensor([2, 0], dtype=torch.int32),
    },
    "lse": {"cache_seqlens": torch.tensor([7, 1], dtype=torch.int32), "return_softmax_lse": True},
    "window": {"cache_seqlens": torch.tensor([7, 12], dtype=torch.int32), "window_size": (3, 0)},
    "softcap": {"cache_seqlens": 7, "softcap": 1.5},
    "pages": {"block_table": TABLE, "cache_seqlens": torch.tensor([7, 4], dtype=torch.int32)},
    "new in pages": {"block_table": TABLE, "cache_seqlens": torch.tensor([3, 9], dtype=torch.int32), **NEW},
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("path", [TWO, THREE])
@pytest.mark.parametrize("name", CACHES)
def test_a_cache_is_read_and_written_as_the_kernel_does(name, path, n, causal):
    torch.manual_seed(0)
    kwargs = {"causal": causal, **CACHES[name]}
    q = randn(2, n, HEADS, WIDTH)
    keys, values = randn(4, 12, 2, WIDTH), randn(4, 12, 2, WIDTH)
    if "block_table" in kwargs:
        keys, values = paged(keys, TABLE, 4), paged(values, TABLE, 4)
        if path == THREE:
            kwargs["page_table"] = kwargs.pop("block_table")
    check(path + "flash_attn_with_kvcache", (q, keys, values), kwargs)


def test_packed_sequences_read_their_keys_through_a_table():
    torch.manual_seed(0)
    keys, values = randn(2, 12, HEADS, WIDTH), randn(2, 12, HEADS, WIDTH)
    args = (flat(7, 1)[0], paged(keys, TABLE, 4), paged(values, TABLE, 4))
    cu = cumulative((3, 4)), cumulative((11, 6))
    check(TWO + "flash_attn_varlen_func", (*args, *cu, 4, 11), {"causal": True, "block_table": TABLE})


PAGES = TABLE[:, :3]
BIASES = {
    "BlockDiagonalMask.from_seqlens": (((3, 4), (5, 2)), 7, 7),
    "BlockDiagonalCausalMask.from_seqlens": (((3, 4), (5, 2)), 7, 7),
    "BlockDiagonalCausalFromBottomRightMask.from_seqlens": (((3, 4), (5, 6)), 7, 11),
    "BlockDiagonalPaddedKeysMask.from_seqlens": (((3, 4), 6, (4, 6)), 7, 12),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens": (((3, 4), 6, (4, 6)), 7, 12),
    "BlockDiagonalLocalAttentionPaddedKeysMask.from_seqlens_local": (((3, 4), 6, (4, 6), 2, 1), 7, 12),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local": (((3, 4), 6, (4, 6), 2), 7, 12),
    "BlockDiagonalGappyKeysMask.from_seqlens": (((3, 4), [1, 7, 12], (4, 5)), 7, 12),
    "BlockDiagonalCausalWithOffsetGappyKeysMask.from_seqlens": (((3, 4), [1, 7, 12], (4, 5)), 7, 12),
    "BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask.from_seqlens_local_gappy": (
        ((3, 4), [1, 7, 12], (4, 5), 2, 1),
        7,
        12,
    ),
    "PagedBlockDiagonalPaddedKeysMask.from_seqlens": (((3, 4), (5, 6), PAGES, 2), 7, 12),
    "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens": (((3, 4), (5, 6), PAGES, 2), 7, 12),
    "PagedBlockDiagonalCausalLocalPaddedKeysMask.from_seqlens_local": (
        ((3, 4), (5, 6), PAGES, 2, 2),
        7,
        12,
    ),
    "PagedBlockDiagonalGappyKeysMask.from_seqlens": (((3, 4), [1, 0], (4, 5), PAGES, 2), 7, 12),
    "PagedBlockDiagonalCausalWithOffsetGappyKeysMask.from_seqlens": (
        ((3, 4), [1, 0], (4, 5), PAGES, 2),
        7,
        12,
    ),
    "LowerTriangularMask": ((), 5, 9),
    "LowerTriangularMask ": ((), 9, 5),
    "LowerTriangularFromBottomRightMask": ((), 5, 9),
    "LowerTriangularFromBottomRightLocalAttentionMask": ((3,), 5, 9),
    "LocalAttentionFromBottomRightMask": ((2, 1), 5, 9),
    "LowerTriangularMaskWithTensorBias": ((randn(1, HEADS, 9, 5),), 9, 5),
}


@pytest.mark.parametrize("mode", ["auto", "always"])
@pytest.mark.parametrize("name", BIASES)
def test_a_bias_class_means_what_the_package_says(name, mode):
    given, n, m = BIASES[name]
    bias = bias_class(name.strip(), *given)()
    path = "xformers.ops.fmha.memory_efficient_attention_forward_requires_grad"
    check(path, batch(n, m, size=1), {"attn_bias": bias}, mode)


def test_local_blocks():
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    bias = BlockDiagonalMask.from_seqlens((3, 4), (5, 6))
    for one in (bias.make_local_attention(2), bias.make_local_attention_from_bottomright(2)):
        check(X + "memory_efficient_attention", batch(7, 11, size=1), {"attn_bias": one})


def test_what_a_call_cannot_express_is_left_to_the_kernel():
    """The kernel runs, and the report says why."""
    from dense_attention import calls

    class Unknown:
        def materialize(self, shape):
            return torch.zeros(shape, dtype=torch.float64)

    refused = [
        (X + "memory_efficient_attention", batch(5, 5), {"attn_bias": Unknown()}, "bias of class Unknown"),
        ("xformers.ops.fmha.memory_efficient_attention_partial", batch(5, 5), {}, "some of the keys only"),
        (THREE + "flash_attn_func", batch(5, 5), {"attention_chunk": 4}, "attention_chunk"),
        (THREE + "flash_attn_func", batch(5, 5), {"q_descale": randn(1)}, "q_descale"),
        (THREE + "flash_attn_func", batch(5, 5), {"qv": randn(1), "k_descale": randn(1)}, "qv and k_descale"),
        (FOUR + "flash_attn_func", batch(5, 5), {"score_mod": lambda *a: a[0]}, "score_mod"),
        (FOUR + "flash_attn_func", batch(5, 5), {"mask_mod": lambda *a: True}, "mask_mod"),
        (
            SAGE + "sageattn",
            tuple(one.transpose(1, 2) for one in batch(5, 9)),
            {"is_causal": True},
            "as many",
        ),
        (
            TWO + "flash_attn_with_kvcache",
            (*batch(1, 9),),
            {"rotary_cos": randn(9, 4), "rotary_sin": randn(9, 4)},
            "rotary_cos and rotary_sin",
        ),
    ]
    for path, args, kwargs, reason in refused:
        calls.clear()
        model = Model(path)
        native = results(model(*args, **kwargs))
        calls.clear()
        with attnpatch.patched(model, replace_kernels=True):
            found = results(model(*args, **kwargs))
            report = str(attnpatch.report(model))
        assert calls and all(map(torch.equal, found, native))
        assert "arguments that attnpatch cannot express" in report
        with attnpatch.capture(model, blocks=attnpatch.Blocks.fixed(2)) as maps, torch.no_grad():
            model(*args, **kwargs)
        assert reason in maps.left_out["attn"]


VARLEN = {
    "plain": {},
    "causal": {"window_size": (-1, 0)},
    "window": {"window_size": (2, 1), "scale": 0.3},
    "shared keys": {"enable_gqa": True, "key_heads": 2, "window_size": (3, 0)},
    "keys used": {"seqused_k": torch.tensor([4, 1, 2], dtype=torch.int32), "window_size": (-1, 0)},
}


@pytest.mark.parametrize("name", VARLEN)
def test_varlen_attention_of_torch(name):
    """It has no kernel for the CPU, where torch's functions compute the same."""
    from dense_attention import probabilities
    from torch.nn.attention.varlen import AuxRequest

    kwargs = {**VARLEN[name], "return_aux": AuxRequest(lse=True)}
    q, k, v = flat(9, 11, key_heads=kwargs.pop("key_heads", HEADS))
    model = Model("torch.nn.attention.varlen.varlen_attn")
    with attnpatch.patched(model, replace_kernels=True):
        out, lse = model(q, k, v, *PLACES, **kwargs)
    left, right = kwargs.get("window_size", (-1, -1))
    used = [4, 1, 2] if "seqused_k" in kwargs else [5, 4, 2]
    low = start = 0
    for n, m, own in zip((3, 0, 6), (5, 4, 2), used, strict=True):
        at, keys = slice(low, low + n), slice(start, start + own)
        places = (q[at], k[keys], right == 0, left, right, True, 0.0, kwargs.get("scale", WIDTH**-0.5))
        p, its = probabilities(*places)
        values = v[keys].repeat_interleave(HEADS // v.shape[1], 1)
        assert (out[at] - torch.einsum("hij,jhd->ihd", p, values)).abs().sum() < 1e-5
        torch.testing.assert_close(lse[:, at], its.float(), atol=1e-6, rtol=1e-6)
        low, start = low + n, start + m
