"""Pictures whose places are told apart by tables: windows, grids, two axes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .table import HEADS, WIDTH, Projected, formulation, normal, picture

SIDE = 6


def windows(n: int) -> dict:
    """Windows of ``SIDE`` x ``SIDE`` places, batch and windows together."""
    side = SIDE if n < 100 else 24
    return {"x": normal(4 if n < 100 else 2, side * side, WIDTH)}


def grid_index(side: int) -> torch.Tensor:
    """``[places, places]``: where a table of ``(2 side - 1) ** 2`` distances has each pair."""
    places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
    apart = (places[:, :, None] - places[:, None, :]).permute(1, 2, 0) + side - 1
    return apart[..., 0] * (2 * side - 1) + apart[..., 1]


class _Sized(Projected):
    """Tables for windows of two sizes: the one that is compared, and the longer one."""

    def sized(self, n: int) -> tuple[int, torch.Tensor]:
        side = math.isqrt(n)
        return side, grid_index(side)


@formulation("shifted windows", "Liu et al. 2021 (Swin)", windows, plain=True, longer=576)
class WindowAttention(_Sized):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(47 * 47, HEADS) * 0.3)

    def forward(self, x):
        q, k, v = self.qkv(x)
        b, h, n, _ = q.shape
        side, index = self.sized(n)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.table[index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        scores = scores + bias.unsqueeze(0)
        region = (torch.arange(side) >= side // 2).long()
        region = (region[:, None] * 2 + region).flatten()
        mask = torch.stack(
            [(region[:, None] != region[None]).to(x.dtype) * -100.0, torch.zeros(n, n, dtype=x.dtype)]
        )
        scores = scores.view(b // 2, 2, h, n, n) + mask.unsqueeze(1).unsqueeze(0)
        return self.join(scores.view(-1, h, n, n).softmax(dim=-1) @ v)


@formulation("cosine, log-spaced table", "Liu et al. 2022 (Swin V2)", windows, plain=True, longer=576)
class WindowAttentionV2(_Sized):
    def __init__(self):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(HEADS, 1, 1)))
        self.mlp = nn.Sequential(nn.Linear(2, 16), nn.ReLU(inplace=True), nn.Linear(16, HEADS, bias=False))

    def forward(self, x):
        q, k, v = self.qkv(x)
        n = x.shape[1]
        side, index = self.sized(n)
        steps = torch.arange(-(side - 1), side, dtype=x.dtype)
        table = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1) / (side - 1) * 8
        table = torch.sign(table) * torch.log2(table.abs() + 1.0) / math.log2(8)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * torch.clamp(self.logit_scale, max=math.log(1.0 / 0.01)).exp()
        bias = self.mlp(table).view(-1, HEADS)[index.view(-1)].view(n, n, HEADS).permute(2, 0, 1).contiguous()
        scores = scores + 16 * torch.sigmoid(bias).unsqueeze(0)
        return self.join(F.softmax(scores, dim=-1) @ v)


@formulation("index table with a class token", "Bao et al. 2021 (BEiT)", plain=True, longer=577,
             inputs=lambda n: {"x": normal(2, (36 if n < 100 else 576) + 1, WIDTH)})  # fmt: skip
class ClassTokenTable(_Sized):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(47 * 47 + 3, HEADS) * 0.3)

    def forward(self, x):
        q, k, v = self.qkv(x)
        n = x.shape[1]
        last = self.table.shape[0]
        _, inner = self.sized(n - 1)
        index = torch.zeros((n, n), dtype=inner.dtype)
        index[1:, 1:] = inner
        index[0, :], index[:, 0], index[0, 0] = last - 3, last - 2, last - 1
        scores = (q * self.scale) @ k.transpose(-2, -1)
        scores = scores + self.table[index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        return self.join(scores.softmax(dim=-1) @ v)


@formulation("fewer queries, table of offsets", "Graham et al. 2021 (LeViT)", plain=True, longer=576,
             inputs=lambda n: {"x": normal(2, 36 if n < 100 else 1024, WIDTH)})  # fmt: skip
class SubsampledAttention(Projected):
    def __init__(self):
        super().__init__()
        self.biases = nn.Parameter(torch.randn(HEADS, 64 * 64) * 0.3)

    def forward(self, x):
        _b, n, _ = x.shape
        side = math.isqrt(n)
        rows = [(i, j) for i in range(side) for j in range(side)]
        offsets: dict[tuple[int, int], int] = {}
        fewer = rows if n > 100 else rows[::2]
        index = torch.tensor(
            [[offsets.setdefault((abs(i - k), abs(j - m)), len(offsets)) for k, m in rows] for i, j in fewer]
        )
        _, k, v = self.qkv(x)
        q = self.to_q(x if n > 100 else x[:, ::2]).unflatten(-1, (self.heads, self.dim)).transpose(1, 2)
        scores = q @ k.transpose(-2, -1) * self.scale + self.biases[:, index]
        return self.join(scores.softmax(dim=-1) @ v)


@formulation("rows and columns apart", "Srinivas et al. 2021 (BoTNet)", picture, plain=True)
class BottleneckAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Conv2d(WIDTH, 3 * WIDTH, 1, bias=False)
        self.dim = WIDTH // HEADS
        self.tall, self.wide = (nn.Parameter(torch.randn(2 * 32 - 1, self.dim) * 0.3) for _ in range(2))

    @staticmethod
    def absolute(s):
        b, h, rows, width = s.shape
        flat = F.pad(
            torch.cat([s, s.new_zeros(b, h, rows, 1)], 3).reshape(b, h, rows * (width + 1)), (0, width - rows)
        )
        return flat.reshape(b, h, rows + 1, width)[:, :, :rows, rows - 1 :]

    def along(self, q, table):
        b, h, first, second, _ = q.shape
        scores = torch.einsum("bhxyd,rd->bhxyr", q, table[32 - second : 31 + second])
        scores = self.absolute(scores.reshape(b, h * first, second, 2 * second - 1))
        return scores.reshape(b, h, first, 1, second, second).expand(-1, -1, -1, first, -1, -1)

    def forward(self, x):
        b, _, height, width = x.shape
        q, k, v = self.qkv(x).view(b, 3 * HEADS, self.dim, height * width).transpose(2, 3).chunk(3, dim=1)
        q = q * self.dim**-0.5
        grid = q.reshape(b, HEADS, height, width, self.dim)
        by_column = self.along(grid, self.wide).permute(0, 1, 2, 4, 3, 5)
        by_row = self.along(grid.transpose(2, 3), self.tall).permute(0, 1, 4, 2, 5, 3)
        scores = q @ k.transpose(-1, -2) + (by_column + by_row).reshape(b, HEADS, height * width, -1)
        return (scores.softmax(dim=-1) @ v).transpose(2, 3).reshape(b, WIDTH, height, width)


@formulation("decomposed positions", "Li et al. 2022 (MViT v2, SAM)", plain=True,
             inputs=lambda n: {"x": normal(2, round(n**0.5) ** 2, WIDTH)})  # fmt: skip
class DecomposedAttention(Projected):
    def __init__(self):
        super().__init__()
        self.tall, self.wide = (nn.Parameter(torch.randn(2 * 64 - 1, self.dim) * 0.3) for _ in range(2))

    def forward(self, x):
        b, n, _ = x.shape
        side = math.isqrt(n)
        q, k, v = (t.reshape(b * self.heads, n, self.dim) for t in self.qkv(x))
        index = torch.arange(side)[:, None] - torch.arange(side)[None, :] + 63
        grid = q.reshape(b * self.heads, side, side, self.dim)
        by_row = torch.einsum("bhwc,hkc->bhwk", grid, self.tall[index])
        by_column = torch.einsum("bhwc,wkc->bhwk", grid, self.wide[index])
        scores = (q * self.scale) @ k.transpose(-2, -1)
        scores = scores.view(-1, side, side, side, side) + by_row[..., :, None] + by_column[..., None, :]
        mixed = scores.view(-1, n, n).softmax(dim=-1) @ v
        return self.join(mixed.view(b, self.heads, n, self.dim))


@formulation("table by one-hot products", "Dai et al. 2021 (CoAtNet)", plain=True,
             inputs=lambda n: {"x": normal(2, round(n**0.5) ** 2, WIDTH)})  # fmt: skip
class OneHotTable(Projected):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(HEADS, 2 * 32 - 1, 2 * 32 - 1) * 0.3)

    def forward(self, x):
        q, k, v = self.qkv(x)
        _b, h, n, _d = q.shape
        side = math.isqrt(n)
        apart = torch.arange(side)[None, :] - torch.arange(side)[:, None] + 31
        picked = F.one_hot(apart, 63).to(x.dtype)
        bias = torch.einsum("nhw,ixh->nixw", self.table, picked)
        bias = torch.einsum("nixw,jyw->nijxy", bias, picked).reshape(h, n, n)
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale + bias
        return self.join(torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v))


@formulation("axes one after the other", "Ho et al. 2019 (axial)", picture)
class AxialAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.dim = nn.Conv2d(WIDTH, 3 * WIDTH, 1), WIDTH // HEADS

    def forward(self, x):
        for _ in range(2):
            q, k, v = self.qkv(x).unflatten(1, (3, HEADS, self.dim)).unbind(1)
            scores = torch.einsum("bncij,bncik->bnijk", q, k) * self.dim**-0.5
            x = x + torch.einsum("bnijk,bncik->bncij", scores.softmax(-1), v).flatten(1, 2)
            x = x.transpose(2, 3)
        return x
