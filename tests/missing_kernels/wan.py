"""Built as Wan 2.1's attention: either flash-attn, imported if it is there, over packed sequences."""

import torch
import torch.nn.functional as F
from torch import nn

try:
    import flash_attn_interface

    HAS_3 = True
except ModuleNotFoundError:
    HAS_3 = False
try:
    import flash_attn

    HAS_2 = True
except ModuleNotFoundError:
    HAS_2 = False


def starts(lengths):
    return F.pad(lengths, (1, 0)).cumsum(0, dtype=torch.int32)


def attend(q, k, v, k_lens=None, window_size=(-1, -1)):
    batch, q_len, kv_len = len(q), q.shape[1], k.shape[1]
    q_lens = torch.full((batch,), q_len, dtype=torch.int32)
    if k_lens is None:
        k_lens = torch.full((batch,), kv_len, dtype=torch.int32)
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    else:
        k, v = (torch.cat([one[:n] for one, n in zip(x, k_lens, strict=True)]) for x in (k, v))
    packed = {
        "q": q.flatten(0, 1),
        "k": k,
        "v": v,
        "cu_seqlens_q": starts(q_lens),
        "cu_seqlens_k": starts(k_lens),
    }
    most = {"max_seqlen_q": q_len, "max_seqlen_k": kv_len, "causal": False, "deterministic": False}
    if HAS_3:
        out = flash_attn_interface.flash_attn_varlen_func(**packed, **most, seqused_q=None, seqused_k=None)[0]
    else:
        assert HAS_2
        out = flash_attn.flash_attn_varlen_func(
            **packed, **most, dropout_p=0.0, softmax_scale=None, window_size=window_size
        )
    return out.unflatten(0, (batch, q_len))


class SelfAttention(nn.Module):
    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, context=None, lengths=None):
        context = x if context is None else context
        q, k, v = (
            one(y).unflatten(2, (self.heads, -1))
            for one, y in ((self.q, x), (self.k, context), (self.v, context))
        )
        return self.o(attend(q, k, v, lengths).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.cross_attn = SelfAttention(), SelfAttention()

    def forward(self, x, context, lengths):
        x = x + self.self_attn(x)
        return x + self.cross_attn(x, context, lengths)


def reference(block, x, context, lengths):
    def own(attention, x, context, lengths):
        q, k, v = (
            one(y).unflatten(2, (4, -1)).transpose(1, 2)
            for one, y in ((attention.q, x), (attention.k, context), (attention.v, context))
        )
        mask = torch.arange(k.shape[2])[None, None, None] < lengths[:, None, None, None]
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
        return attention.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    x = x + own(block.self_attn, x, x, torch.full((len(x),), x.shape[1]))
    return x + own(block.cross_attn, x, context, lengths)


torch.manual_seed(0)
block = Block()
x, context, lengths = torch.randn(2, 48, 32), torch.randn(2, 12, 32), torch.tensor([12, 5], dtype=torch.int32)
x.requires_grad_()
out = block(x, context, lengths)
(grad,) = torch.autograd.grad(out.square().sum(), x)
double = x.detach().double().requires_grad_()
expected = reference(block.double(), double, context.double(), lengths)
(expected_grad,) = torch.autograd.grad(expected.square().sum(), double)
print(
    "wrong by",
    float((out - expected).abs().max()),
    float((grad - expected_grad).abs().max() / expected_grad.abs().max()),
)
