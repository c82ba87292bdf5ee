"""Scaled dot-product attention, spelled in many ways."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .table import HEADS, WIDTH, Projected, formulation, normal, sequence, sequences


@formulation("eager", "Vaswani et al. 2017", plain=True)
class EagerAttention(Projected):
    def forward(self, x):
        q, k, v = self.qkv(x)
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(self.dim)
        return self.join(torch.matmul(F.softmax(scores, dim=-1), v))


@formulation("causal by a buffer", "minimal GPT implementations", plain=True)
class CausalSelfAttention(Projected):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.tril(torch.ones(1024, 1024)).view(1, 1, 1024, 1024))

    def forward(self, x):
        q, k, v = self.qkv(x)
        n = x.shape[1]
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.mask[:, :, :n, :n] == 0, float("-inf"))
        return self.join(F.softmax(scores, dim=-1) @ v)


@formulation("baddbmm into empty", "diffusers, GPT-2", plain=True)
class BaddbmmAttention(Projected):
    def forward(self, x):
        q, k, v = (t.flatten(0, 1) for t in self.qkv(x))
        blank = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
        scores = torch.baddbmm(blank, q, k.transpose(-1, -2), beta=0, alpha=self.scale)
        mixed = torch.bmm(scores.softmax(dim=-1), v)
        return self.join(mixed.view(x.shape[0], self.heads, *mixed.shape[1:]))


@formulation("bmm, padding as -1e9", "sequence-to-sequence toolkits", plain=True, inputs=lambda n: {
    **sequence(n), "padding": torch.arange(n).expand(2, n) >= torch.tensor([[n], [n - 7]])})  # fmt: skip
class PaddedAttention(Projected):
    def forward(self, x, padding):
        q, k, v = self.qkv(x)
        b, h, n, d = q.shape
        q = q * self.scale
        scores = torch.bmm(q.reshape(b * h, n, d), k.reshape(b * h, n, d).transpose(1, 2))
        scores = scores.view(b, h, n, n).masked_fill(padding[:, None, None, :], -1e9).view(b * h, n, n)
        return self.join(torch.bmm(scores.softmax(-1), v.reshape(b * h, n, d)).view(b, h, n, d))


@formulation("einsum", "einops style", plain=True)
class EinsumAttention(Projected):
    def forward(self, x):
        q, k, v = self.qkv(x)
        scores = torch.einsum("b h i d, b h j d -> b h i j", q, k) * self.scale
        return self.join(torch.einsum("b h i j, b h j d -> b h i d", scores.softmax(dim=-1), v))


@formulation("einsum, sequence first", "Transformer-XL layout, without its positions", plain=True,
             inputs=lambda n: {"x": normal(n, 2, WIDTH)})  # fmt: skip
class SequenceFirst(Projected):
    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (self.heads, self.dim)) for f in (self.to_q, self.to_k, self.to_v))
        scores = torch.einsum("ibnd,jbnd->ijbn", q, k).mul_(self.scale)
        return self.out(torch.einsum("ijbn,jbnd->ibnd", F.softmax(scores, dim=1), v).flatten(2))


@formulation("einsum of three operands", "scale as an operand", plain=True)
class ThreeOperands(Projected):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.full((HEADS,), 0.3))

    def forward(self, x):
        q, k, v = self.qkv(x)
        scores = torch.einsum("bhid,bhjd,h->bhij", q, k, self.temperature)
        return self.join(torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v))


@formulation("grouped queries, keys repeated", "Ainslie et al. 2023", plain=True)
class RepeatedKeys(Projected):
    def __init__(self):
        super().__init__(heads=4, key_heads=2)

    def forward(self, x):
        q, k, v = self.qkv(x)
        b, g, n, d = k.shape
        k, v = (t[:, :, None].expand(b, g, 2, n, d).reshape(b, g * 2, n, d) for t in (k, v))
        scores = q @ k.transpose(2, 3) * self.scale
        scores = scores + torch.full((n, n), float("-inf"), dtype=x.dtype).triu(1)
        return self.join(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v)


@formulation("grouped queries, five dimensions", "Ainslie et al. 2023", plain=True)
class FiveDimensions(Projected):
    def __init__(self):
        super().__init__(heads=4, key_heads=2)

    def forward(self, x):
        q, k, v = self.qkv(x)
        q = q.unflatten(1, (self.key_heads, -1))
        scores = torch.einsum("bghid,bgjd->bghij", q, k) * self.scale
        return self.join(torch.einsum("bghij,bgjd->bghid", scores.softmax(-1), v).flatten(1, 2))


@formulation("one head of keys", "Shazeer 2019", plain=True)
class MultiQuery(Projected):
    def __init__(self):
        super().__init__(key_heads=1)

    def forward(self, x):
        q, k, v = self.qkv(x)
        scores = torch.einsum("bhnd,bmd->bhnm", q, k.squeeze(1)) * self.scale
        return self.join(torch.einsum("bhnm,bmv->bhnv", torch.softmax(scores, dim=-1), v.squeeze(1)))


@formulation("heads folded into rows", "multi-query attention as one product")
class FoldedRows(Projected):
    def __init__(self):
        super().__init__(key_heads=1)

    def forward(self, x):
        q, k, v = self.qkv(x)
        scores = torch.bmm(q.flatten(1, 2), k.squeeze(1).transpose(1, 2)) * self.scale
        return self.join(torch.bmm(scores.softmax(-1), v.squeeze(1)).unflatten(1, (self.heads, -1)))


@formulation("one sequence, mm", "notebooks", plain=True, inputs=lambda n: {"x": normal(n, WIDTH)})
class OneSequence(Projected):
    def forward(self, x):
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        weights = torch.softmax(torch.mm(q, k.t()) / q.shape[-1] ** 0.5, dim=1)
        return self.out(torch.mm(weights, v))


@formulation("a loop over heads", "teaching code", plain=True)
class HeadByHead(Projected):
    def forward(self, x):
        q, k, v = self.qkv(x)
        mixed = []
        for head in range(self.heads):
            scores = q[:, head] @ k[:, head].transpose(1, 2) * self.scale
            mixed.append(scores.softmax(dim=-1) @ v[:, head])
        return self.out(torch.cat(mixed, dim=-1))


@formulation("exp and sum", "softmax written out")
class WrittenOut(Projected):
    def forward(self, x):
        q, k, v = self.qkv(x)
        scores = q @ k.mT * self.scale
        powers = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
        return self.join((powers @ v) / powers.sum(dim=-1, keepdim=True))


@formulation("log space", "log_softmax, exp")
class LogSpace(Projected):
    def forward(self, x):
        q, k, v = self.qkv(x)
        logits = F.log_softmax(q @ k.mT * self.scale, dim=-1)
        return self.join(logits.exp() @ v)


@formulation("softmax guarded from autocast", "OpenAI's UNet, GPT-2's upcast", plain=True)
class Guarded(Projected):
    def forward(self, x):
        q, k, v = self.qkv(x)
        with torch.autocast("cpu", enabled=False):
            scale = self.dim**-0.25
            scores = torch.einsum("bhid,bhjd->bhij", q.float() * scale, k.float() * scale)
            weights = torch.softmax(scores, dim=-1).type(v.dtype)
        return self.join(weights @ v)


@formulation("products and a sum", "no matrix product at all", plain=True, longer=512)
class Elementwise(Projected):
    def forward(self, x):
        q, k, v = self.qkv(x)
        scores = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) * self.scale
        return self.join(scores.softmax(-1) @ v)


@formulation("keys on the left", "scores transposed", plain=True)
class KeysFirst(Projected):
    def forward(self, x):
        q, k, v = self.qkv(x)
        scores = (k @ q.transpose(-1, -2) * self.scale).transpose(-1, -2)
        return self.join(scores.softmax(-1) @ v)


@formulation("softmax along the first side", "channels-first networks, v times weights", plain=False)
class ChannelsFirst(Projected):
    def forward(self, x):
        q, k, v = (t.transpose(-1, -2) for t in self.qkv(x))
        weights = (k.transpose(-1, -2) @ q * self.scale).softmax(dim=-2)
        return self.join((v @ weights).transpose(-1, -2))


@formulation("cross-attention", "Bahdanau's idea in Vaswani et al. 2017", inputs=sequences, plain=True)
class CrossAttention(Projected):
    def forward(self, x, context):
        q, k, v = self.qkv(x, context)
        return self.join(F.softmax(q @ k.transpose(-1, -2) * self.scale, -1) @ v)


@formulation("scaled_dot_product_attention", "torch", plain=False)
class FusedAttention(Projected):
    def forward(self, x):
        return self.join(F.scaled_dot_product_attention(*self.qkv(x), is_causal=True))


@formulation("in chunks by hand", "Rabe and Staats 2021", plain=False)
class ChunkedAttention(Projected):
    def forward(self, x):
        q, k, v = self.qkv(x)
        total, summed, most = 0.0, 0.0, torch.full((*q.shape[:-1], 1), float("-inf"), dtype=q.dtype)
        for keys, values in zip(k.split(32, -2), v.split(32, -2), strict=True):
            scores = q @ keys.mT * self.scale
            higher = torch.maximum(most, scores.amax(-1, keepdim=True).detach())
            powers, shrink = (scores - higher).exp(), (most - higher).exp()
            total = total * shrink + powers @ values
            summed = summed * shrink + powers.sum(-1, keepdim=True)
            most = higher
        return self.join(total / summed)


@formulation(
    "linear as a product", "F.linear(query, key)", plain=True, inputs=lambda n: {"x": normal(n, WIDTH)}
)
class LinearAsProduct(Projected):
    def forward(self, x):
        scores = F.linear(self.to_q(x), self.to_k(x)) * self.scale
        return self.out(F.softmax(scores, dim=-1).matmul(self.to_v(x)))
