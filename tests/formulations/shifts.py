"""Relative positions by a shift: scores by distance, padded and reshaped until they lie by key."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .table import HEADS, WIDTH, Projected, formulation, normal


@formulation(
    "Transformer-XL's shift", "Dai et al. 2019", plain=True, inputs=lambda n: {"x": normal(n, 2, WIDTH)}
)
class TransformerXLAttention(Projected):
    def __init__(self):
        super().__init__()
        self.r = nn.Linear(WIDTH, WIDTH, bias=False)
        self.u, self.w = (nn.Parameter(torch.randn(HEADS, self.dim) * 0.3) for _ in range(2))

    @staticmethod
    def shifted(scores):
        padding = torch.zeros((scores.size(0), 1, *scores.size()[2:]), dtype=scores.dtype)
        padded = torch.cat([padding, scores], dim=1)
        padded = padded.view(scores.size(1) + 1, scores.size(0), *scores.size()[2:])
        return padded[1:].view_as(scores)

    def forward(self, x):
        n = x.shape[0]
        q, k, v = (f(x).view(n, x.shape[1], self.heads, self.dim) for f in (self.to_q, self.to_k, self.to_v))
        back = torch.arange(n - 1, -1, -1.0, dtype=x.dtype)
        waves = torch.einsum("i,j->ij", back, 10000 ** (-torch.arange(0, WIDTH, 2, dtype=x.dtype) / WIDTH))
        r = self.r(torch.cat([waves.sin(), waves.cos()], dim=-1)).view(n, self.heads, self.dim)
        content = torch.einsum("ibnd,jbnd->ijbn", q + self.u, k)
        place = self.shifted(torch.einsum("ibnd,jnd->ijbn", q + self.w, r))
        scores = (content + place).mul_(self.scale)
        hidden = torch.triu(torch.ones(n, n, dtype=torch.uint8), diagonal=1).bool()[:, :, None, None]
        weights = F.softmax(scores.masked_fill(hidden, -1e30), dim=1)
        return self.out(torch.einsum("ijbn,jbnd->ibnd", weights, v).reshape(n, x.shape[1], WIDTH))


@formulation("skewing", "Huang et al. 2018 (Music Transformer)", plain=True)
class MusicAttention(Projected):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1024, self.dim) * 0.3)

    def forward(self, x):
        q, k, v = self.qkv(x)
        n = x.shape[1]
        by_distance = torch.einsum("bhld,md->bhlm", q, self.table[-n:])
        padded = F.pad(by_distance, (1, 0))
        skewed = padded.reshape(*padded.shape[:2], n + 1, n)[:, :, 1:, :]
        scores = (q @ k.mT + skewed) / math.sqrt(self.dim)
        scores = scores + torch.full((n, n), -1e9, dtype=x.dtype).triu(1)
        return self.join(scores.softmax(-1) @ v)


@formulation("Conformer", "Gulati et al. 2020", plain=True)
class ConformerAttention(Projected):
    def __init__(self):
        super().__init__()
        self.place = nn.Linear(WIDTH, WIDTH, bias=False)
        self.u, self.w = (nn.Parameter(torch.randn(HEADS, self.dim) * 0.3) for _ in range(2))

    @staticmethod
    def shifted(scores):
        b, h, rows, width = scores.shape
        padded = torch.cat([torch.zeros((b, h, rows, 1), dtype=scores.dtype), scores], dim=-1)
        padded = padded.view(b, h, width + 1, rows)
        return padded[:, :, 1:].view_as(scores)[:, :, :, : width // 2 + 1]

    def forward(self, x):
        q, k, v = self.qkv(x)
        n = x.shape[1]
        along = torch.arange(n - 1, -n, -1, dtype=x.dtype)[:, None]
        waves = along * 10000 ** (-torch.arange(0, WIDTH, 2, dtype=x.dtype) / WIDTH)
        p = self.place(torch.stack([waves.sin(), waves.cos()], -1).flatten(1)[None])
        p = p.view(1, -1, self.heads, self.dim).transpose(1, 2)
        by_content = torch.matmul(q + self.u[:, None], k.transpose(-2, -1))
        by_place = self.shifted(torch.matmul(q + self.w[:, None], p.transpose(-2, -1)))
        return self.join(torch.softmax((by_content + by_place) * self.scale, dim=-1) @ v)


@formulation(
    "a window of distances", "Kim et al. 2021 (VITS)", plain=True, inputs=lambda n: {"x": normal(2, WIDTH, n)}
)
class WindowedRelative(nn.Module):
    window = 4

    def __init__(self):
        super().__init__()
        self.dim = WIDTH // HEADS
        self.conv_q, self.conv_k, self.conv_v = (nn.Conv1d(WIDTH, WIDTH, 1) for _ in range(3))
        self.near_keys, self.near_values = (
            nn.Parameter(torch.randn(1, 2 * self.window + 1, self.dim) * 0.3) for _ in range(2)
        )

    def near(self, table, n):
        pad, start = max(n - self.window - 1, 0), max(self.window + 1 - n, 0)
        table = F.pad(table, (0, 0, pad, pad))
        return table[:, start : start + 2 * n - 1]

    @staticmethod
    def to_keys(s):
        b, h, n, _ = s.shape
        flat = F.pad(s, (0, 1)).view(b, h, n * 2 * n)
        return F.pad(flat, (0, n - 1)).view(b, h, n + 1, 2 * n - 1)[:, :, :n, n - 1 :]

    @staticmethod
    def to_distances(p):
        b, h, n, _ = p.shape
        flat = F.pad(p, (0, n - 1)).view(b, h, n**2 + n * (n - 1))
        return F.pad(flat, (n, 0)).view(b, h, n, 2 * n)[:, :, :, 1:]

    def forward(self, x):
        b, _, n = x.shape
        q, k, v = (
            f(x).view(b, HEADS, self.dim, n).transpose(2, 3) for f in (self.conv_q, self.conv_k, self.conv_v)
        )
        scores = torch.matmul(q / math.sqrt(self.dim), k.transpose(-2, -1))
        relative = torch.matmul(
            q / math.sqrt(self.dim), self.near(self.near_keys, n).unsqueeze(0).transpose(-2, -1)
        )
        weights = F.softmax(scores + self.to_keys(relative), dim=-1)
        mixed = weights @ v + torch.matmul(
            self.to_distances(weights), self.near(self.near_values, n).unsqueeze(0)
        )
        return mixed.transpose(2, 3).reshape(b, WIDTH, n)


@formulation("bases of distance", "Avsec et al. 2021 (Enformer)", plain=True)
class EnformerAttention(Projected):
    def __init__(self):
        super().__init__()
        self.to_rel = nn.Linear(6, WIDTH, bias=False)
        self.content, self.relative = (
            nn.Parameter(torch.randn(1, HEADS, 1, self.dim) * 0.3) for _ in range(2)
        )

    def forward(self, x):
        q, k, v = self.qkv(x)
        n = x.shape[1]
        q = q * self.scale
        distance = torch.arange(-n + 1, n, dtype=x.dtype)
        half = 2.0 ** torch.linspace(1, math.log2(n), 3, dtype=x.dtype)
        bases = torch.exp(-math.log(2.0) / half * distance.abs()[:, None])
        bases = torch.cat([bases, distance.sign()[:, None] * bases], -1)
        r = self.to_rel(bases).view(-1, self.heads, self.dim).transpose(0, 1)
        content = torch.einsum("bhid,bhjd->bhij", q + self.content, k)
        by_distance = torch.einsum("bhid,hjd->bhij", q + self.relative, r)
        padded = torch.cat((torch.zeros_like(by_distance[..., :1]), by_distance), dim=-1)
        _, h, t1, t2 = padded.shape
        shifted = padded.reshape(-1, h, t2, t1)[:, :, 1:, :].reshape(-1, h, t1, t2 - 1)[..., : (t2 + 1) // 2]
        return self.join(torch.einsum("bhij,bhjd->bhid", (content + shifted).softmax(dim=-1), v))


@formulation("shift by as_strided", "relative attention libraries", plain=True)
class StridedShift(Projected):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(2 * 1024 - 1, self.dim) * 0.3)

    def forward(self, x):
        q, k, v = self.qkv(x)
        n = x.shape[1]
        by_distance = (q @ self.table[1024 - n : 1023 + n].t()).contiguous()
        width = 2 * n - 1
        shifted = by_distance.as_strided(
            (*q.shape[:2], n, n), (self.heads * n * width, n * width, width - 1, 1), n - 1
        )
        return self.join(((q @ k.mT + shifted) * self.scale).softmax(-1) @ v)
