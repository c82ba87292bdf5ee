"""Two sides that look at each other, pointers, alignments, memories."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .table import HEADS, WIDTH, Projected, formulation, normal, sequences


@formulation("both sides of one matrix", "Lindenberger et al. 2023 (LightGlue)", sequences)
class BothSides(Projected):
    def forward(self, x, context):
        q, _, v = self.qkv(x)
        other, _, other_v = self.qkv(context)
        scores = torch.einsum("bhid,bhjd->bhij", q, other) * self.scale
        to_other = F.softmax(scores, dim=-1)
        to_own = F.softmax(scores.transpose(-2, -1).contiguous(), dim=-1)
        mixed = torch.einsum("bhij,bhjd->bhid", to_other, other_v)
        other_mixed = torch.einsum("bhji,bhjd->bhid", to_own.transpose(-2, -1), v)
        return self.join(mixed), self.join(other_mixed)


@formulation("dual softmax", "Sun et al. 2021 (LoFTR)", sequences, share=False, whole="it is the result")
class DualSoftmax(nn.Module):
    def forward(self, x, context):
        scores = torch.einsum("nlc,nsc->nls", x / WIDTH**0.5, context / WIDTH**0.5) / 0.1
        sure = F.softmax(scores, 1) * F.softmax(scores, 2)
        return sure, sure.max(2).values, sure @ context


@formulation("soft argmax of a grid", "Xu et al. 2022 (GMFlow)", lambda n: {
    "x": normal(2, WIDTH, round(n**0.5), round(n**0.5)), "other": normal(2, WIDTH, round(n**0.5), round(n**0.5), seed=1)})  # fmt: skip
class SoftMatching(nn.Module):
    def forward(self, x, other):
        b, c, h, w = x.shape
        y, z = torch.meshgrid(torch.arange(h, dtype=x.dtype), torch.arange(w, dtype=x.dtype), indexing="ij")
        grid = torch.stack([z, y])[None].expand(b, -1, -1, -1)
        correlation = torch.matmul(x.view(b, c, -1).permute(0, 2, 1), other.view(b, c, -1)) / (c**0.5)
        correlation = correlation.view(b, h, w, h, w).view(b, h * w, h * w)
        probability = F.softmax(correlation, dim=-1)
        found = (
            torch.matmul(probability, grid.view(b, 2, -1).permute(0, 2, 1))
            .view(b, h, w, 2)
            .permute(0, 3, 1, 2)
        )
        return found - grid


@formulation("correlations in four dimensions", "Teed and Deng 2020 (RAFT), with softmax", lambda n: {
    "x": normal(2, WIDTH, round(n**0.5), round(n**0.5)), "other": normal(2, WIDTH, round(n**0.5), round(n**0.5), seed=1)})  # fmt: skip
class CorrelationVolume(nn.Module):
    def forward(self, x, other):
        _b, c, h, w = x.shape
        volume = torch.einsum("bchw,bcij->bhwij", x, other) / c**0.5
        peak = volume.flatten(3).softmax(-1).view_as(volume)
        along_x = (peak.sum(3) * torch.arange(w, dtype=x.dtype)).sum(-1)
        along_y = (peak.sum(4) * torch.arange(h, dtype=x.dtype)).sum(-1)
        return torch.stack([along_x, along_y], 1)


@formulation(
    "optimal transport with a dustbin", "Sarlin et al. 2020 (SuperGlue)", sequences, whole="it is the result"
)
class SinkhornMatching(nn.Module):
    def __init__(self):
        super().__init__()
        self.bin = nn.Parameter(torch.tensor(1.0))

    def forward(self, x, context):
        scores = torch.einsum("bnd,bmd->bnm", x, context) / WIDTH**0.5
        b, m, n = scores.shape
        scores = torch.cat(
            [torch.cat([scores, self.bin.expand(b, m, 1)], -1), self.bin.expand(b, 1, n + 1)], 1
        )
        u, v = torch.zeros_like(scores[:, :, 0]), torch.zeros_like(scores[:, 0])
        for _ in range(3):
            u = -torch.logsumexp(scores + v.unsqueeze(1), dim=2)
            v = -torch.logsumexp(scores + u.unsqueeze(2), dim=1)
        return scores + u.unsqueeze(2) + v.unsqueeze(1)


@formulation("pointers", "Vinyals et al. 2015", sequences, whole="it is the result")
class PointerNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.of_key, self.of_query = nn.Linear(WIDTH, 16, bias=False), nn.Linear(WIDTH, 16, bias=False)
        self.v = nn.Linear(16, 1, bias=False)

    def forward(self, x, context):
        pairs = torch.tanh(self.of_key(context).unsqueeze(1) + self.of_query(x).unsqueeze(2))
        return F.log_softmax(self.v(pairs).squeeze(-1), dim=-1)


@formulation("additive", "Bahdanau et al. 2015", sequences)
class AdditiveAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.u, self.v = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16), nn.Linear(16, 1, bias=False)

    def forward(self, x, context):
        energy = self.v(torch.tanh(self.w(x)[:, :, None] + self.u(context)[:, None])).squeeze(-1)
        weights = torch.softmax(energy, dim=-1)
        return torch.bmm(weights, context), weights


@formulation("general, decoder over encoder", "Luong et al. 2015", sequences, plain=True)
class LuongAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.out = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x, context):
        scores = torch.bmm(x, self.w(context).transpose(1, 2))
        context = torch.bmm(F.softmax(scores, dim=2), context)
        return torch.tanh(self.out(torch.cat((context, x), dim=2)))


@formulation("co-attention", "Lu et al. 2016; Seo et al. 2017 (BiDAF)", sequences)
class CoAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 1), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x, context):
        similar = self.a(x) + self.b(context).transpose(1, 2) + (x * self.c) @ context.transpose(1, 2)
        to_query = F.softmax(similar, dim=2) @ context
        most = F.softmax(similar.max(dim=2).values, dim=1)
        to_context = torch.bmm(most.unsqueeze(1), x).expand(-1, x.shape[1], -1)
        return torch.cat([x, to_query, x * to_query, x * to_context], dim=-1)


@formulation("decomposable, both sides", "Parikh et al. 2016", sequences)
class DecomposableAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())

    def forward(self, x, context):
        e = torch.matmul(self.f(x), self.f(context).transpose(1, 2))
        beta = torch.matmul(F.softmax(e, dim=2), context)
        alpha = torch.matmul(F.softmax(e, dim=1).transpose(1, 2), x)
        return beta, alpha


@formulation("memory read", "Oh et al. 2019 (STM)", lambda n: {
    "x": normal(2, 8, round(n**0.5), round(n**0.5)), "keys": normal(2, 8, 3, round(n**0.5), round(n**0.5), seed=1),
    "values": normal(2, WIDTH, 3, round(n**0.5), round(n**0.5), seed=2)})  # fmt: skip
class MemoryRead(nn.Module):
    def forward(self, x, keys, values):
        b, d, t, h, w = values.shape
        p = torch.bmm(keys.flatten(2).transpose(1, 2), x.flatten(2)) / x.shape[1] ** 0.5
        p = F.softmax(p, dim=1)
        return torch.bmm(values.reshape(b, d, t * h * w), p).view(b, d, h, w)


@formulation("hops over a memory", "Sukhbaatar et al. 2015", sequences)
class MemoryNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, context):
        for _ in range(3):
            p = torch.softmax(torch.einsum("bqd,bmd->bqm", x, self.a(context)), -1)
            x = x + torch.einsum("bqm,bmd->bqd", p, self.c(context))
        return x


@formulation(
    "attention pooling over frames",
    "Okabe et al. 2018 (attentive statistics)",
    lambda n: {"x": normal(2, WIDTH, n)},
    share=False,
)
class AttentiveStatistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.Sequential(
            nn.Conv1d(WIDTH, 8, 1), nn.Tanh(), nn.Conv1d(8, WIDTH, 1), nn.Softmax(dim=2)
        )

    def forward(self, x):
        w = self.attention(x)
        mean = torch.sum(x * w, dim=2)
        return torch.cat((mean, torch.sqrt((torch.sum(x**2 * w, dim=2) - mean**2).clamp(min=1e-4))), 1)


@formulation("graph attention over all pairs", "Velickovic et al. 2018 (GAT, dense)", lambda n: {
    "x": normal(n, WIDTH), "adjacency": (torch.rand(n, n, generator=torch.Generator().manual_seed(1)) > 0.7) | torch.eye(n).bool()})  # fmt: skip
class GraphAttentionLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.a = nn.Linear(WIDTH, 16, bias=False), nn.Parameter(torch.randn(32, 1))

    def forward(self, x, adjacency):
        h = self.w(x)
        e = F.leaky_relu(torch.matmul(h, self.a[:16]) + torch.matmul(h, self.a[16:]).T, 0.2)
        attention = torch.where(adjacency, e, -9e15 * torch.ones_like(e))
        return F.elu(torch.matmul(F.softmax(attention, dim=1), h))


@formulation(
    "similarity of windows in time",
    "Zhu et al. 2017 (flow-guided aggregation)",
    lambda n: {"x": normal(5, WIDTH, round(n**0.5), round(n**0.5))},
    share=False,
)
class FrameAggregation(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(WIDTH, WIDTH * HEADS, 1)

    def forward(self, x):
        e = F.normalize(self.embed(x), dim=1)
        weights = (e[2:3] * e).sum(1, keepdim=True).softmax(0)
        return (weights * x).sum(0)
