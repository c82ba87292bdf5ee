"""Built as FramePack's attention: SageAttention, flash-attn or xFormers, whatever is there, none of them needed."""

import sys

import torch
from torch import nn

try:
    from xformers.ops import memory_efficient_attention as xformers_attention
except Exception:
    xformers_attention = None
try:
    from flash_attn import flash_attn_func, flash_attn_varlen_func
except Exception:
    flash_attn_func = flash_attn_varlen_func = None
try:
    from sageattention import sageattn, sageattn_varlen
except Exception:
    sageattn = sageattn_varlen = None

chosen = sys.argv[1]


def attend(q, k, v, starts=None, longest=None):
    if starts is None:
        if chosen == "sage":
            return sageattn(q, k, v, tensor_layout="NHD")
        if chosen == "flash":
            return flash_attn_func(q, k, v)
        return xformers_attention(q, k, v)
    batch, length = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    varlen = sageattn_varlen if chosen == "sage" else flash_attn_varlen_func
    return varlen(q, k, v, starts, starts, longest, longest).unflatten(0, (batch, length))


class Processor:
    def __call__(self, attn, x, starts):
        q, k, v = attn.qkv(x).unflatten(2, (3, 4, -1)).unbind(2)
        return attn.out(attend(q, k, v, *starts).flatten(2))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.processor = nn.Linear(32, 96), nn.Linear(32, 32), Processor()

    def forward(self, x, starts=()):
        return self.processor(self, x, starts)


torch.manual_seed(0)
model, x = Attention(), torch.randn(2, 40, 32)
ends = torch.tensor([0, 30, 40, 65, 80], dtype=torch.int32)
packed = (ends, 40) if chosen != "xformers" else ()
with torch.no_grad():
    found = model(x), model(x, packed)
    q, k, v = model.double().qkv(x.double()).unflatten(2, (3, 4, -1)).transpose(1, 3).unbind(2)
    weights = q @ k.transpose(-1, -2) / 8**0.5
    parts = torch.bucketize(torch.arange(80), ends[1:].long(), right=True).view(2, 40)
    same = (
        parts[:, None, :, None] == parts[:, None, None, :]
        if packed
        else torch.ones(1, 1, 40, 40, dtype=torch.bool)
    )
    masks = torch.ones_like(same), same
    expected = [
        model.out((weights.masked_fill(~one, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2))
        for one in masks
    ]
print("wrong by", max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)))
