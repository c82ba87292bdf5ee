"""The functions of flash-attn 4, see https://github.com/Dao-AILab/flash-attention (flash_attn/cute/interface.py)."""

from dense_attention import lengths_of, of_batch, of_packed


def _sizes(window):
    return tuple(-1 if size is None else size for size in window)


def flash_attn_func(
    q,
    k,
    v,
    qv=None,
    gather_kv_indices=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    aux_tensors=None,
    aux_scalars=None,
    block_sparse_tensors=None,
    block_sparse_tensors_bwd=None,
    return_lse=False,
):
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    numbers = (causal, *_sizes(window_size), True, softcap, scale)
    out, lse = of_batch("flash_attn_func", q, k, v, numbers, None, learnable_sink)
    return out, lse if return_lse else None


def flash_attn_varlen_func(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    gather_kv_indices=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    block_sparse_tensors=None,
    aux_tensors=None,
    aux_scalars=None,
    return_lse=False,
    scheduler_metadata=None,
    seqlen_k_per_split=None,
    disable_scheduler_metadata=False,
):
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    numbers = (causal, *_sizes(window_size), True, softcap, scale)
    shape = q.shape
    if cu_seqlens_q is None:
        cu_seqlens_q = [i * q.shape[1] for i in range(q.shape[0] + 1)]
        q = q.flatten(0, 1)
    if cu_seqlens_k is None:
        cu_seqlens_k = [i * k.shape[1] for i in range(k.shape[0] + 1)]
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    starts, lengths = lengths_of(cu_seqlens_k)
    lengths = lengths if seqused_k is None else seqused_k
    out, lse = of_packed(
        "flash_attn_varlen_func", q, k, v, cu_seqlens_q, starts, lengths, numbers, None, learnable_sink
    )
    if len(shape) == 4:
        lse = lse.view(-1, *shape[:2]).transpose(0, 1)
    return out.view(*shape[:-1], -1), lse if return_lse else None
