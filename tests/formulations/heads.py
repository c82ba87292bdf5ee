"""Heads that are mixed, subtracted or gated, and keys that are nobody's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .table import HEADS, WIDTH, Projected, formulation, normal, sequence


@formulation("talking heads", "Shazeer et al. 2020", share=False)
class TalkingHeads(Projected):
    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def forward(self, x):
        q, k, v = self.qkv(x)
        scores = q * self.scale @ k.transpose(-2, -1)
        scores = self.before(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = self.after(scores.softmax(dim=-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.join(weights @ v)


@formulation("talking heads by einsum", "Shazeer et al. 2020", share=False)
class TalkingEinsum(Projected):
    def __init__(self):
        super().__init__()
        self.before, self.after = (nn.Parameter(torch.randn(HEADS, HEADS)) for _ in range(2))

    def forward(self, x):
        q, k, v = self.qkv(x)
        scores = torch.einsum("b h i d, b h j d -> b h i j", q, k) * self.scale
        weights = torch.einsum("b h i j, h g -> b g i j", scores, self.before).softmax(-1)
        return self.join(torch.einsum("b h i j, h g -> b g i j", weights, self.after) @ v)


@formulation("re-attention", "Zhou et al. 2021 (DeepViT)", share=False)
class ReAttention(Projected):
    def __init__(self):
        super().__init__()
        self.mix, self.norm = nn.Conv2d(HEADS, HEADS, 1), nn.BatchNorm2d(HEADS)

    def forward(self, x):
        q, k, v = self.qkv(x)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
        return self.join(self.norm(self.mix(weights)) @ v)


@formulation("difference of two softmaxes", "Ye et al. 2024 (differential)", share=False)
class DifferentialAttention(Projected):
    def __init__(self):
        super().__init__(heads=4)
        self.share = nn.Parameter(torch.tensor(0.4))
        self.norm = nn.RMSNorm(2 * self.dim)

    def forward(self, x):
        q, k, v = self.qkv(x)
        weights = F.softmax(q @ k.transpose(-1, -2) * self.scale, dim=-1)
        weights = weights.view(x.shape[0], 2, 2, *weights.shape[-2:])
        weights = weights[:, :, 0] - self.share * weights[:, :, 1]
        mixed = self.norm(weights @ v.unflatten(1, (2, 2)).transpose(2, 3).flatten(3))
        return self.out(mixed.transpose(1, 2).flatten(2) * 0.6)


@formulation("normed queries and keys", "Dehghani et al. 2023 (ViT-22B)", plain=True)
class NormedAttention(Projected):
    def __init__(self):
        super().__init__()
        self.q_norm, self.k_norm = nn.LayerNorm(self.dim), nn.LayerNorm(self.dim)

    def forward(self, x):
        q, k, v = self.qkv(x)
        return self.join((self.q_norm(q) @ self.k_norm(k).mT * self.scale).softmax(-1) @ v)


@formulation("cosine similarity, learned scale", "Henry et al. 2020 (QKNorm)", plain=True)
class CosineAttention(Projected):
    def __init__(self):
        super().__init__()
        self.g = nn.Parameter(torch.tensor(8.0))

    def forward(self, x):
        q, k, v = self.qkv(x)
        scores = torch.matmul(F.normalize(q, p=2, dim=-1), F.normalize(k, p=2, dim=-1).transpose(-1, -2))
        return self.join(torch.matmul(F.softmax(self.g * scores, dim=-1), v))


@formulation("memory and null keys", "Sukhbaatar et al. 2019; classifier-free guidance")
class MemoryAttention(Projected):
    def __init__(self):
        super().__init__()
        self.keys, self.values = (nn.Parameter(torch.randn(HEADS, 3, self.dim)) for _ in range(2))

    def forward(self, x):
        q, k, v = self.qkv(x)
        k, v = (
            torch.cat([m.expand(x.shape[0], -1, -1, -1), t], dim=-2)
            for m, t in ((self.keys, k), (self.values, v))
        )
        mask = F.pad(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(), (3, 0), value=True)
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
        scores = scores.masked_fill(~mask, -torch.finfo(scores.dtype).max)
        return self.join(torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v))


@formulation("sinks", "gpt-oss 2025; Xiao et al. 2023", share=False)
class SinkAttention(Projected):
    def __init__(self):
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(self, x):
        q, k, v = self.qkv(x)
        scores = q @ k.transpose(2, 3) * self.scale
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
        scores = torch.cat([scores, sinks], dim=-1)
        scores = scores - scores.max(dim=-1, keepdim=True).values
        return self.join(F.softmax(scores, dim=-1)[..., :-1] @ v)


@formulation("soft-capped", "Gemma 2 2024", plain=True)
class SoftCapped(Projected):
    def forward(self, x):
        q, k, v = self.qkv(x)
        scores = torch.tanh(q @ k.transpose(2, 3) * self.scale / 5.0) * 5.0
        mask = torch.full((x.shape[1], x.shape[1]), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)
        return self.join(F.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype) @ v)


@formulation("gates on the result", "Qiu et al. 2025 (gated attention)", plain=True)
class GatedResult(Projected):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x)
        mixed = (q @ k.mT * self.scale).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2) * torch.sigmoid(self.gate(x)))


@formulation("triangles with a gate", "Jumper et al. 2021 (Evoformer)", plain=True, longer=128, length=20,
             inputs=lambda n: {"x": normal(n, n, WIDTH)})  # fmt: skip
class TriangleAttention(Projected):
    def __init__(self):
        super().__init__()
        self.pair, self.gate = nn.Linear(WIDTH, HEADS, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x)
        scores = torch.einsum("ihqc,ihkc->ihqk", q * self.scale, k)
        scores += self.pair(x).permute(2, 0, 1).unsqueeze(0)
        mixed = torch.einsum("ihqk,ihkc->iqhc", scores.softmax(-1), v).flatten(2)
        return self.out(mixed * self.gate(x).sigmoid())


@formulation("edges multiply scores", "Dwivedi and Bresson 2020 (graph transformer)", inputs=lambda n: {
    **sequence(n), "edges": normal(2, n, n, HEADS, seed=5)})  # fmt: skip
class EdgeAttention(Projected):
    def forward(self, x, edges):
        q, k, v = self.qkv(x)
        scores = (q @ k.mT * self.scale) * edges.permute(0, 3, 1, 2)
        weights = scores.clamp(-5, 5).softmax(-1)
        return self.join(weights @ v), scores


@formulation("convolved scores", "Golovneva et al. 2025 (multi-token)", whole="rows are mixed")
class MultiTokenAttention(Projected):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(HEADS, HEADS, (3, 5), padding=(1, 2), groups=HEADS)

    def forward(self, x):
        q, k, v = self.qkv(x)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = (q @ k.mT * self.scale).masked_fill(hidden, 0.0)
        return self.join(self.conv(scores).masked_fill(hidden, float("-inf")).softmax(-1) @ v)


@formulation("selective", "Leviathan et al. 2024", whole="rows are summed along queries")
class SelectiveAttention(Projected):
    def forward(self, x):
        q, k, v = self.qkv(x)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = (q @ k.mT * self.scale).masked_fill(hidden, -1e4)
        chosen = F.relu(scores[:, 0]).clone()
        chosen[..., 0] = 0
        chosen = chosen.masked_fill(torch.eye(x.shape[1], dtype=torch.bool), 0)
        chosen = torch.roll(chosen, 1, dims=-2)
        chosen[..., 0, :] = 0
        return self.join((scores - chosen.cumsum(dim=-2)[:, None]).softmax(-1) @ v)


@formulation("the scores of the layer before", "He et al. 2021 (RealFormer)", plain=False)
class ResidualScores(Projected):
    def forward(self, x):
        before = None
        for _ in range(2):
            q, k, v = self.qkv(x)
            scores = q @ k.transpose(-1, -2) * self.scale
            scores = scores if before is None else scores + before
            x, before = x + self.join(scores.softmax(-1) @ v), scores
        return x
