"""Functions of flash-attn outside any model: the peak of memory, short of memory and with much."""

import math
import resource
import sys

import torch
from flash_attn import flash_attn_func

rows = int(sys.argv[1])
q, k, v = (torch.randn(1, rows, 8, 64) for _ in range(3))
slopes = torch.full((8,), 0.5)
few = (x[:, :1100] for x in (q, k, v))
flash_attn_func(*few, causal=True, alibi_slopes=slopes, softcap=5.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad():
    out = flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes, softcap=5.0)
print("took", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3, "MB")
worst = 0.0
for row in (0, 1, rows // 2, rows - 1):
    one = q[0, row].double()[:, None] @ k[0].double().permute(1, 2, 0) / math.sqrt(64)
    one = 5 * torch.tanh(one / 5) - slopes[:, None, None] * (row - torch.arange(rows)).abs()
    one[..., row + 1 :] = -torch.inf
    worst = max(
        worst, float((one.softmax(-1) @ v[0].double().transpose(0, 1) - out[0, row][:, None]).abs().max())
    )
print("wrong by", worst)
