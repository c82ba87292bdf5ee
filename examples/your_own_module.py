"""Your own module: its name does not say that it is attention, so it is recognised in its first call.

python examples/your_own_module.py
"""

import torch
from torch import nn

import attnpatch


class Mixer(nn.Module):
    """Attention as it is often written in research code."""

    def __init__(self, dim: int = 64, heads: int = 4):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        weights = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) * self.scale, dim=-1)
        return self.out(torch.einsum("bhij,bhjd->bhid", weights, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(64), Mixer()

    def forward(self, x):
        return x + self.mixer(self.norm(x))


torch.manual_seed(0)
model = nn.Sequential(Layer(), Layer()).eval()
x = torch.randn(1, 1500, 64)
with torch.no_grad():
    native = model(x)
    for sites in ("auto", ["1.mixer"]):
        with attnpatch.patched(model, sites=sites, mode="always"):
            print("same to the last bit:", torch.equal(native, model(x)))
            print(attnpatch.report(model))
