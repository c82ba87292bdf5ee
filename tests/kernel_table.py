"""The table of kernels and of what they can be called with; see ``kernel_cases.Case``."""

from __future__ import annotations

import torch

from tests.kernel_cases import (
    BATCH,
    EACH_SLOPES,
    HEADS,
    PACKED,
    SINKS,
    SLOPES,
    TOKENS,
    Case,
    batch_packed,
    bias_class,
    by_heads,
    grouped,
    in_one,
    keys_in_one,
    one_head,
    packed,
    plain,
    with_bias,
)

torch.manual_seed(1)
BIAS = torch.randn(BATCH, HEADS, TOKENS, TOKENS, dtype=torch.float64)
TWO, FOUR = "flash_attn.", "flash_attn.cute."
THREE, SAGE, X = "flash_attn_interface.", "sageattention.", "xformers.ops."
_CAUSAL = {"causal": True}

FLASH_2 = {
    "plain": Case(TWO + "flash_attn_func", plain()),
    "causal": Case(TWO + "flash_attn_func", plain(causal=True), **_CAUSAL),
    "scale": Case(TWO + "flash_attn_func", plain(softmax_scale=0.5), scale=0.5),
    "window": Case(TWO + "flash_attn_func", plain(window_size=(5, 3)), left=5, right=3),
    "causal window": Case(TWO + "flash_attn_func", plain(causal=True, window_size=(4, 0)), True, 4, 0),
    "softcap": Case(TWO + "flash_attn_func", plain(softcap=2.0, causal=True), softcap=2.0, **_CAUSAL),
    "alibi": Case(TWO + "flash_attn_func", plain(alibi_slopes=SLOPES, causal=True), slopes=SLOPES, **_CAUSAL),
    "alibi of each": Case(TWO + "flash_attn_func", plain(alibi_slopes=EACH_SLOPES), slopes=EACH_SLOPES),
    "shared keys": Case(TWO + "flash_attn_func", plain(causal=True), key_heads=2, **_CAUSAL),
    "one key head": Case(TWO + "flash_attn_func", plain(), key_heads=1),
    "lse": Case(TWO + "flash_attn_func", plain(return_attn_probs=True, causal=True), **_CAUSAL),
    "qkv": Case(TWO + "flash_attn_qkvpacked_func", in_one(causal=True), **_CAUSAL),
    "kv": Case(TWO + "flash_attn_kvpacked_func", keys_in_one(causal=True), key_heads=2, **_CAUSAL),
    "varlen": Case(TWO + "flash_attn_varlen_func", packed(), lengths=PACKED),
    "varlen causal": Case(
        TWO + "flash_attn_varlen_func", packed(causal=True, window_size=(3, 0)), True, 3, 0, lengths=PACKED
    ),
    "varlen softcap": Case(TWO + "flash_attn_varlen_func", packed(softcap=2.0), softcap=2.0, lengths=PACKED),
    "varlen alibi": Case(
        TWO + "flash_attn_varlen_func",
        packed((10, 14), alibi_slopes=EACH_SLOPES),
        slopes=EACH_SLOPES,
        lengths=(10, 14),
    ),
    "varlen alike": Case(TWO + "flash_attn_varlen_func", packed((12, 12)), lengths=(12, 12)),
    "varlen single": Case(
        TWO + "flash_attn_varlen_func", packed((24,), causal=True), lengths=(24,), **_CAUSAL
    ),
    "varlen of one token": Case(TWO + "flash_attn_varlen_func", packed((1, 22, 1)), lengths=(1, 22, 1)),
    "varlen with none": Case(TWO + "flash_attn_varlen_func", packed((14, 0, 10)), lengths=(14, 0, 10)),
    "varlen lse": Case(TWO + "flash_attn_varlen_func", packed(return_attn_probs=True), lengths=PACKED),
    "varlen of a batch": Case(TWO + "flash_attn_varlen_func", batch_packed(causal=True), **_CAUSAL),
    "varlen qkv": Case(TWO + "flash_attn_varlen_qkvpacked_func", packed(how="qkv"), lengths=PACKED),
    "varlen kv": Case(
        TWO + "flash_attn_varlen_kvpacked_func", packed(how="q kv"), key_heads=2, lengths=PACKED
    ),
}
FLASH_3 = {
    "plain": Case(THREE + "flash_attn_func", plain()),
    "causal": Case(THREE + "flash_attn_func", plain(causal=True), **_CAUSAL),
    "window": Case(THREE + "flash_attn_func", plain(window_size=(5, 3)), left=5, right=3),
    "softcap": Case(THREE + "flash_attn_func", plain(softcap=2.0), softcap=2.0),
    "lse": Case(THREE + "flash_attn_func", plain(return_attn_probs=True), key_heads=2),
    "qkv": Case(THREE + "flash_attn_qkvpacked_func", in_one(causal=True), **_CAUSAL),
    "qkv of shared keys": Case(
        THREE + "flash_attn_qkvpacked_func",
        lambda function, q, k, v: function(torch.cat([q, k, v], 2), num_heads_q=HEADS),
        key_heads=2,
    ),
    "varlen": Case(THREE + "flash_attn_varlen_func", packed(causal=True), lengths=PACKED, **_CAUSAL),
    "varlen lse": Case(THREE + "flash_attn_varlen_func", packed(return_attn_probs=True), lengths=PACKED),
}
FLASH_4 = {
    "plain": Case(FOUR + "flash_attn_func", plain()),
    "causal": Case(FOUR + "flash_attn_func", plain(causal=True), **_CAUSAL),
    "window": Case(FOUR + "flash_attn_func", plain(window_size=(5, None)), left=5),
    "no window": Case(FOUR + "flash_attn_func", plain(window_size=(-1, -1))),
    "softcap": Case(FOUR + "flash_attn_func", plain(softcap=2.0, causal=True), softcap=2.0, **_CAUSAL),
    "sinks": Case(FOUR + "flash_attn_func", plain(learnable_sink=SINKS, causal=True), sinks=SINKS, **_CAUSAL),
    "lse": Case(FOUR + "flash_attn_func", plain(return_lse=True), key_heads=2),
    "varlen": Case(
        FOUR + "flash_attn_varlen_func", packed(how="named", causal=True), lengths=PACKED, **_CAUSAL
    ),
    "varlen sinks": Case(
        FOUR + "flash_attn_varlen_func",
        packed(how="named", learnable_sink=SINKS),
        sinks=SINKS,
        lengths=PACKED,
    ),
    "varlen in batches": Case(FOUR + "flash_attn_varlen_func", plain(causal=True), **_CAUSAL),
}
# What rounding to 8 bits does to the results.
_ROUNDED = {"tolerance": 0.1}
SAGES = {
    "plain": Case(SAGE + "sageattn", by_heads(), **_ROUNDED),
    "causal": Case(SAGE + "sageattn", by_heads(is_causal=True), **_CAUSAL, **_ROUNDED),
    "NHD": Case(SAGE + "sageattn", plain(tensor_layout="NHD"), key_heads=2, **_ROUNDED),
    "scale": Case(SAGE + "sageattn", by_heads(sm_scale=0.5), scale=0.5, **_ROUNDED),
    "lse": Case(SAGE + "sageattn", by_heads(return_lse=True), **_ROUNDED),
    "triton": Case(
        SAGE + "sageattn_qk_int8_pv_fp16_triton", by_heads(attn_mask=BIAS.float()), bias=BIAS, **_ROUNDED
    ),
    "cuda": Case(SAGE + "sageattn_qk_int8_pv_fp16_cuda", plain(tensor_layout="NHD"), **_ROUNDED),
    "fp8": Case(SAGE + "sageattn_qk_int8_pv_fp8_cuda", by_heads(), **_ROUNDED),
    "sm90": Case(SAGE + "sageattn_qk_int8_pv_fp8_cuda_sm90", by_heads(is_causal=True), **_CAUSAL, **_ROUNDED),
    "varlen": Case(SAGE + "sageattn_varlen", packed(is_causal=True), lengths=PACKED, **_CAUSAL, **_ROUNDED),
}
_FUNCTION = X + "memory_efficient_attention"


def _bias(name, *args, how=plain, **fields):
    return Case(_FUNCTION, with_bias(bias_class(name, *args), how), **fields)


XFORMERS = {
    "plain": Case(_FUNCTION, plain()),
    "scale": Case(_FUNCTION, plain(scale=0.5), scale=0.5),
    "output_dtype": Case(_FUNCTION, plain(output_dtype=torch.float64)),
    "one head": Case(_FUNCTION, one_head()),
    "one head, bias": Case(_FUNCTION, one_head(attn_bias=BIAS.flatten(0, 1)), bias=BIAS),
    "groups": Case(_FUNCTION, grouped(), key_heads=2),
    "groups, bias": Case(_FUNCTION, grouped(attn_bias=BIAS.unflatten(1, (2, 2))), key_heads=2, bias=BIAS),
    "bias": Case(_FUNCTION, plain(attn_bias=BIAS), bias=BIAS),
    "forward": Case("xformers.ops.fmha.memory_efficient_attention_forward", plain()),
    "LowerTriangularMask": _bias("LowerTriangularMask", causal=True, ends=False),
    "one head, LowerTriangularMask": _bias("LowerTriangularMask", how=one_head, causal=True, ends=False),
    "LowerTriangularFromBottomRightMask": _bias("LowerTriangularFromBottomRightMask", causal=True),
    "LowerTriangularFromBottomRightLocalAttentionMask": _bias(
        "LowerTriangularFromBottomRightLocalAttentionMask", 5, causal=True, left=4
    ),
    "LocalAttentionFromBottomRightMask": _bias("LocalAttentionFromBottomRightMask", 4, 2, left=4, right=2),
    "LowerTriangularMaskWithTensorBias": _bias(
        "LowerTriangularMaskWithTensorBias", BIAS, causal=True, ends=False, bias=BIAS
    ),
    "BlockDiagonalMask": _bias("BlockDiagonalMask.from_seqlens", PACKED, lengths=PACKED),
    "BlockDiagonalCausalMask": _bias(
        "BlockDiagonalCausalMask.from_seqlens", PACKED, lengths=PACKED, causal=True, ends=False
    ),
    "BlockDiagonalCausalFromBottomRightMask": _bias(
        "BlockDiagonalCausalFromBottomRightMask.from_seqlens", PACKED, lengths=PACKED, causal=True
    ),
}
TABLE = {
    f"{kernel}: {what}": case
    for kernel, cases in {
        "flash-attn 2": FLASH_2,
        "flash-attn 3": FLASH_3,
        "flash-attn 4": FLASH_4,
        "SageAttention": SAGES,
        "xFormers": XFORMERS,
    }.items()
    for what, case in cases.items()
}
