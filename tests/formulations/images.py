"""Attention inside networks for pictures, points and sets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .table import WIDTH, Projected, formulation, normal, picture, sequence, sequences


@formulation("keys from a smaller picture", "Wang et al. 2021 (PVT)", plain=True,
             inputs=lambda n: {"x": normal(2, (round(n**0.5) // 2 * 2) ** 2, WIDTH)})  # fmt: skip
class SubsampledKeys(Projected):
    def __init__(self):
        super().__init__()
        self.smaller, self.norm = nn.Conv2d(WIDTH, WIDTH, 2, stride=2), nn.LayerNorm(WIDTH)

    def forward(self, x):
        b, n, c = x.shape
        side = round(n**0.5)
        fewer = self.smaller(x.permute(0, 2, 1).reshape(b, c, side, side)).reshape(b, c, -1).permute(0, 2, 1)
        q, k, v = self.qkv(x, self.norm(fewer))
        return self.join((q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1) @ v)


@formulation("non-local block", "Wang et al. 2018", picture, plain=True)
class NonLocalBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(WIDTH, 16, 1) for _ in range(3))
        self.back = nn.Conv2d(16, WIDTH, 1)

    def forward(self, x):
        theta = self.theta(x).view(x.size(0), 16, -1).permute(0, 2, 1)
        phi = self.phi(x).view(x.size(0), 16, -1)
        g = self.g(x).view(x.size(0), 16, -1).permute(0, 2, 1)
        y = torch.matmul(F.softmax(torch.matmul(theta, phi), dim=-1), g)
        return x + self.back(y.permute(0, 2, 1).contiguous().view(x.size(0), 16, *x.shape[2:]))


@formulation("non-local block, divided by the count", "Wang et al. 2018 (dot product)", picture, share=False)
class NonLocalDot(nn.Module):
    def __init__(self):
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(WIDTH, 16, 1) for _ in range(3))
        self.back = nn.Conv2d(16, WIDTH, 1)

    def forward(self, x):
        theta, phi, g = (f(x).flatten(2) for f in (self.theta, self.phi, self.g))
        pairs = theta.transpose(1, 2) @ phi
        y = (pairs / pairs.size(-1)) @ g.transpose(1, 2)
        return x + self.back(y.transpose(1, 2).reshape(x.size(0), 16, *x.shape[2:]))


@formulation("SAGAN", "Zhang et al. 2019", picture)
class GeneratorAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Conv2d(WIDTH, 4, 1), nn.Conv2d(WIDTH, 4, 1)
        self.value, self.gamma = nn.Conv2d(WIDTH, WIDTH, 1), nn.Parameter(torch.tensor([0.5]))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x):
        b, c, height, width = x.size()
        energy = torch.bmm(
            self.query(x).view(b, -1, height * width).permute(0, 2, 1),
            self.key(x).view(b, -1, height * width),
        )
        attention = self.softmax(energy)
        out = torch.bmm(self.value(x).view(b, -1, height * width), attention.permute(0, 2, 1))
        return self.gamma * out.view(b, c, height, width) + x, attention.mean()


@formulation("channels attend", "Fu et al. 2019 (DANet)", picture)
class ChannelAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.tensor([0.5]))

    def forward(self, x):
        b, c, height, width = x.size()
        energy = torch.bmm(x.view(b, c, -1), x.view(b, c, -1).permute(0, 2, 1))
        energy = torch.max(energy, -1, keepdim=True)[0].expand_as(energy) - energy
        out = torch.bmm(F.softmax(energy, dim=-1), x.view(b, c, -1))
        return self.gamma * out.view(b, c, height, width) + x


@formulation("cross-covariance", "El-Nouby et al. 2021 (XCiT)")
class CrossCovariance(Projected):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(self.heads, 1, 1))

    def forward(self, x):
        q, k, v = (t.transpose(-2, -1) for t in self.qkv(x))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        return self.join((scores.softmax(dim=-1) @ v).transpose(-2, -1))


@formulation("middle of an autoencoder", "Esser et al. 2021 (VQGAN)", picture, plain=True)
class MiddleBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(4, WIDTH)
        self.q, self.k, self.v, self.out = (nn.Conv2d(WIDTH, WIDTH, 1) for _ in range(4))

    def forward(self, x):
        b, c, height, width = x.shape
        y = self.norm(x)
        q, k, v = self.q(y), self.k(y), self.v(y)
        q = q.reshape(b, c, height * width).permute(0, 2, 1)
        weights = torch.bmm(q, k.reshape(b, c, height * width)) * (int(c) ** (-0.5))
        weights = F.softmax(weights, dim=2).permute(0, 2, 1)
        return x + self.out(torch.bmm(v.reshape(b, c, height * width), weights).reshape(b, c, height, width))


@formulation(
    "latents ask the input",
    "Jaegle et al. 2021 (Perceiver)",
    inputs=lambda n: {"x": normal(2, 4 * n, WIDTH)},
    plain=True,
)
class LatentAttention(Projected):
    def __init__(self):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(40, WIDTH))

    def forward(self, x):
        q, k, v = self.qkv(self.latents.expand(x.shape[0], -1, -1), x)
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
        return self.join(torch.einsum("bhij,bhjd->bhid", scores.softmax(dim=-1), v))


@formulation("slots compete", "Locatello et al. 2020")
class SlotAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.slots = nn.Parameter(torch.randn(1, 7, WIDTH))
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.gru = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x):
        slots, k, v = self.slots.expand(len(x), -1, -1), self.to_k(x), self.to_v(x)
        for _ in range(2):
            before = slots
            dots = torch.einsum("bid,bjd->bij", self.to_q(slots), k) * WIDTH**-0.5
            attention = dots.softmax(dim=1) + 1e-8
            attention = attention / attention.sum(dim=-1, keepdim=True)
            updates = torch.einsum("bjd,bij->bid", v, attention)
            slots = self.gru(updates.reshape(-1, WIDTH), before.reshape(-1, WIDTH)).reshape(before.shape)
        return slots


@formulation(
    "offsets of points", "Guo et al. 2021 (PCT)", share=False, inputs=lambda n: {"x": normal(2, WIDTH, n)}
)
class OffsetAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.v, self.trans = (
            nn.Conv1d(WIDTH, 8, 1, bias=False),
            nn.Conv1d(WIDTH, WIDTH, 1),
            nn.Conv1d(WIDTH, WIDTH, 1),
        )

    def forward(self, x):
        energy = torch.bmm(self.shared(x).permute(0, 2, 1), self.shared(x))
        attention = torch.softmax(energy, dim=-1)
        attention = attention / (1e-9 + attention.sum(dim=1, keepdim=True))
        return x + F.relu(self.trans(x - torch.bmm(self.v(x), attention)))


@formulation("positions with queries and keys", "Carion et al. 2020 (DETR)", inputs=sequences)
class DetectionAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.at = nn.Parameter(torch.randn(1024, WIDTH))

    def forward(self, x, context):
        key = context + self.at[: context.shape[1]]
        return self.attend(x + self.at[: x.shape[1]], key, context, need_weights=True)


@formulation("squares of pictures, one head", "attention U-Nets", picture, plain=True)
class PictureAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Conv2d(WIDTH, 3 * WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x):
        b, c, height, width = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=1)
        scores = torch.einsum("bchw,bcij->bhwij", q, k) * c**-0.5
        weights = scores.flatten(3).softmax(-1).view(b, height, width, height, width)
        return x + self.out(torch.einsum("bhwij,bcij->bchw", weights, v))


@formulation("pooled queries", "Lee et al. 2019 (Set Transformer)", plain=True, inputs=sequence)
class PooledAttention(Projected):
    def __init__(self):
        super().__init__()
        self.seeds = nn.Parameter(torch.randn(1, 16, WIDTH))

    def forward(self, x):
        q, k, v = self.to_q(self.seeds.repeat(x.shape[0], 1, 1)), self.to_k(x), self.to_v(x)
        q, k, v = (torch.cat(t.split(self.dim, 2), 0) for t in (q, k, v))
        weights = torch.softmax(q.bmm(k.transpose(1, 2)) / WIDTH**0.5, 2)
        return torch.cat((q + weights.bmm(v)).split(x.shape[0], 0), 2)
