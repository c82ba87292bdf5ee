"""Positions that are added to scores, looked up in tables, or turned into queries and keys."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .table import HEADS, WIDTH, Projected, formulation, sequence


def distances(n: int) -> torch.Tensor:
    return torch.arange(n)[None, :] - torch.arange(n)[:, None]


@formulation("ALiBi", "Press et al. 2022", plain=True)
class AlibiAttention(Projected):
    def __init__(self):
        super().__init__()
        slopes = torch.tensor([2.0 ** (-8 * (i + 1) / HEADS) for i in range(HEADS)])
        self.register_buffer("slopes", slopes.view(1, -1, 1, 1))

    def forward(self, x):
        q, k, v = self.qkv(x)
        n = x.shape[1]
        bias = self.slopes * torch.arange(n, dtype=x.dtype).view(1, 1, 1, n)
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
        scores = q @ k.mT * self.scale + bias
        scores = scores.masked_fill(hidden, torch.finfo(x.dtype).min)
        return self.join(scores.softmax(-1) @ v)


@formulation("T5's buckets", "Raffel et al. 2020", plain=True)
class BucketAttention(Projected):
    def __init__(self):
        super().__init__()
        self.bias = nn.Embedding(32, HEADS)

    @staticmethod
    def buckets(distance):
        result = (distance > 0).long() * 16
        distance = distance.abs()
        far = 8 + (torch.log(distance.float() / 8) / math.log(128 / 8) * 8).long()
        return result + torch.where(distance < 8, distance, far.clamp(max=15))

    def forward(self, x):
        q, k, v = self.qkv(x)
        scores = q @ k.transpose(3, 2)
        scores += self.bias(self.buckets(distances(x.shape[1]))).permute(2, 0, 1).unsqueeze(0)
        return self.join(F.softmax(scores.float(), dim=-1).type_as(scores) @ v)


@formulation("disentangled", "He et al. 2021 (DeBERTa)", plain=True)
class DisentangledAttention(Projected):
    span = 8

    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.randn(2 * self.span, WIDTH) * 0.3)

    def forward(self, x):
        q, k, v = self.qkv(x)
        place_q, place_k, _ = self.qkv(self.places[None])
        index = (-distances(x.shape[1]) + self.span).clamp(0, 2 * self.span - 1)
        index = index.expand(x.shape[0], self.heads, -1, -1)
        content = q @ k.transpose(-1, -2)
        content_to_place = torch.gather(q @ place_k.transpose(-1, -2), -1, index)
        place_to_content = torch.gather(k @ place_q.transpose(-1, -2), -1, index).transpose(-1, -2)
        scores = (content + content_to_place + place_to_content) / math.sqrt(3 * self.dim)
        return self.join(scores.softmax(-1) @ v)


@formulation("relative keys and values", "Shaw et al. 2018", plain=True)
class ShawAttention(Projected):
    most = 6

    def __init__(self):
        super().__init__()
        self.key_table = nn.Embedding(2 * self.most + 1, self.dim)
        self.value_table = nn.Embedding(2 * self.most + 1, self.dim)

    def forward(self, x):
        q, k, v = self.qkv(x)
        index = distances(x.shape[1]).clamp(-self.most, self.most) + self.most
        scores = q @ k.transpose(-1, -2) + torch.einsum("bhid,ijd->bhij", q, self.key_table(index))
        weights = (scores * self.scale).softmax(-1)
        return self.join(weights @ v + torch.einsum("bhij,ijd->bhid", weights, self.value_table(index)))


@formulation("relative keys by a gather", "Shaw et al. 2018, after Huang et al. 2018", plain=True)
class GatheredKeys(Projected):
    most = 6

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(2 * self.most + 1, self.dim) * 0.3)

    def forward(self, x):
        q, k, v = self.qkv(x)
        index = distances(x.shape[1]).clamp(-self.most, self.most) + self.most
        relative = (q @ self.table.t()).gather(-1, index.expand(*q.shape[:2], -1, -1))
        return self.join(((q @ k.mT + relative) * self.scale).softmax(-1) @ v)


@formulation("relative position in queries too", "Huang et al. 2020 (method 4)", plain=True)
class KeyQueryRelative(Projected):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(2 * 1024 - 1, self.dim)

    def forward(self, x):
        q, k, v = self.qkv(x)
        places = self.table(distances(x.shape[1]) + 1023).to(q.dtype)
        by_query = torch.einsum("bhld,lrd->bhlr", q, places)
        by_key = torch.einsum("bhrd,lrd->bhlr", k, places)
        scores = (q @ k.mT + by_query + by_key) / math.sqrt(self.dim)
        return self.join(nn.functional.softmax(scores, dim=-1) @ v)


@formulation("rotary", "Su et al. 2021", plain=True)
class RotaryAttention(Projected):
    def turned(self, t):
        angles = torch.arange(t.shape[-2])[:, None] * 10000 ** (-torch.arange(0, self.dim, 2) / self.dim)
        angles = torch.cat([angles, angles], -1)
        first, second = t.chunk(2, dim=-1)
        return t * angles.cos().to(t.dtype) + torch.cat([-second, first], -1) * angles.sin().to(t.dtype)

    def forward(self, x):
        q, k, v = self.qkv(x)
        scores = self.turned(q) @ self.turned(k).transpose(-1, -2) * self.scale
        return self.join(scores.softmax(-1) @ v)


@formulation("functional interpolation", "Li et al. 2024 (FIRE)", plain=True)
class FireAttention(Projected):
    def __init__(self):
        super().__init__()
        self.curve = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, HEADS))

    def forward(self, x):
        q, k, v = self.qkv(x)
        n = x.shape[1]
        places = torch.arange(n, dtype=x.dtype)
        apart = (places[:, None] - places[None, :]).abs()
        relative = torch.log(apart + 1) / torch.log(places[:, None] + 2)
        bias = self.curve(relative.unsqueeze(-1)).permute(2, 0, 1)
        scores = (q @ k.mT * self.scale + bias).masked_fill(distances(n) > 0, -1e4)
        return self.join(scores.softmax(-1) @ v)


@formulation("kernels of distance", "Chi et al. 2022 (KERPLE)", plain=True)
class KernelAttention(Projected):
    def __init__(self):
        super().__init__()
        self.p, self.a = nn.Parameter(torch.ones(HEADS, 1, 1)), nn.Parameter(torch.ones(HEADS, 1, 1))

    def forward(self, x):
        q, k, v = self.qkv(x)
        apart = distances(x.shape[1]).abs().to(x.dtype)
        scores = q @ k.mT * self.scale - self.p.clamp(min=0.01) * torch.log1p(self.a.clamp(min=0.01) * apart)
        return self.join(scores.softmax(-1) @ v)


@formulation("contextual positions", "Golovneva et al. 2024 (CoPE)", plain=True)
class ContextualPositions(Projected):
    most = 12

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, self.dim, self.most) * 0.3)

    def forward(self, x):
        q, k, v = self.qkv(x)
        n = x.shape[1]
        scores = (q @ k.mT * self.scale).masked_fill(distances(n) > 0, -1e4)
        gates = torch.sigmoid(scores)
        places = gates.flip(-1).cumsum(dim=-1).flip(-1).clamp(max=self.most - 1)
        above, below = places.ceil().long(), places.floor().long()
        logits = torch.matmul(q, self.table)
        high, low = logits.gather(-1, above), logits.gather(-1, below)
        share = places - below
        return self.join((scores + high * share + low * (1 - share)).softmax(-1) @ v)


@formulation("time intervals", "Li et al. 2020 (TiSASRec)", plain=True, inputs=lambda n: {
    **sequence(n), "times": torch.randint(0, 3, (2, n), generator=torch.Generator().manual_seed(3)).cumsum(1)})  # fmt: skip
class TimeIntervalAttention(Projected):
    def __init__(self):
        super().__init__()
        self.keys, self.values = nn.Embedding(17, self.dim), nn.Embedding(17, self.dim)

    def forward(self, x, times):
        q, k, v = self.qkv(x)
        apart = (times[:, :, None] - times[:, None, :]).abs().clamp(max=16)
        scores = q @ k.mT + (self.keys(apart)[:, None] @ q.unsqueeze(-1)).squeeze(-1)
        hidden = ~torch.tril(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool))
        scores = torch.where(hidden, torch.ones_like(scores) * (-(2**32) + 1), scores * self.scale)
        weights = scores.softmax(-1)
        return self.join(weights @ v + (weights.unsqueeze(-2) @ self.values(apart)[:, None]).squeeze(-2))


@formulation("forget gates", "Lin et al. 2025 (Forgetting Transformer)", plain=True)
class ForgettingAttention(Projected):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, HEADS)

    def forward(self, x):
        q, k, v = self.qkv(x)
        lived = F.logsigmoid(self.gate(x).float()).transpose(1, 2).cumsum(-1)
        decay = lived[..., :, None] - lived[..., None, :]
        scores = q @ k.mT * self.scale + decay.to(q.dtype)
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        return self.join(scores.masked_fill_(hidden, float("-inf")).softmax(-1) @ v)


@formulation("edges of a graph", "Ying et al. 2021 (Graphormer)", plain=True, inputs=lambda n: {
    **sequence(n), "hops": torch.randint(0, 5, (2, n, n), generator=torch.Generator().manual_seed(4))})  # fmt: skip
class GraphAttention(Projected):
    def __init__(self):
        super().__init__()
        self.spatial = nn.Embedding(5, HEADS)

    def forward(self, x, hops):
        q, k, v = self.qkv(x)
        scores = (q * self.scale) @ k.transpose(2, 3) + self.spatial(hops).permute(0, 3, 1, 2)
        return self.join(torch.softmax(scores, dim=3).matmul(v))
