"""Attention that does not look everywhere: windows, blocks, buckets, landmarks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .table import HEADS, WIDTH, Projected, formulation, normal


def multiple(of: int):
    """Sequences whose length is a multiple of something."""
    return lambda n: {"x": normal(2, n // of * of, WIDTH)}


@formulation("sliding window by a mask", "Beltagy et al. 2020", plain=True)
class WindowMaskAttention(Projected):
    def forward(self, x):
        q, k, v = self.qkv(x)
        n = x.shape[1]
        seen = torch.ones(n, n, dtype=torch.bool).tril(5).triu(-5)
        scores = (q @ k.mT * self.scale).masked_fill(~seen, float("-inf"))
        return self.join(scores.softmax(-1) @ v)


@formulation("sliding chunks", "Beltagy et al. 2020 (Longformer)", multiple(12))
class SlidingChunks(Projected):
    window = 6

    def forward(self, x):
        q, k, v = (t.flatten(0, 1) for t in self.qkv(x))
        w, (b, n, d) = self.window, q.shape
        chunks = n // w - 1

        def overlapping(t):
            return t.as_strided((b, chunks, 2 * w, d), (n * d, w * d, d, 1))

        scores = torch.einsum("bcxd,bcyd->bcxy", overlapping(q.contiguous()), overlapping(k.contiguous()))
        scores = F.pad(scores, (0, 0, 0, 1)).view(b, chunks, 2 * w, 2 * w + 1)
        band = scores.new_zeros((b, chunks + 1, w, 2 * w + 1))
        band[:, :-1, :, w:] = scores[:, :, :w, : w + 1]
        band[:, -1, :, w:] = scores[:, -1, w:, : w + 1]
        band[:, 1:, :, :w] = scores[:, :, -(w + 1) : -1, w + 1 :]
        band[:, 0, 1:, 1:w] = scores[:, 0, : w - 1, 1 - w :]
        band = band.view(b, n, 2 * w + 1)
        key = torch.arange(n)[:, None] + torch.arange(-w, w + 1)
        band = band.masked_fill((key < 0) | (key >= n), float("-inf"))
        weights = (band * self.scale).softmax(-1)
        picked = F.pad(v, (0, 0, w, w)).unfold(1, 2 * w + 1, 1)
        mixed = torch.einsum("bnk,bndk->bnd", weights, picked)
        return self.join(mixed.view(x.shape[0], self.heads, n, d))


@formulation("blocks and their neighbours", "local attention", multiple(12))
class NeighbourBlocks(Projected):
    size = 12

    def forward(self, x):
        q, k, v = (t.unflatten(2, (-1, self.size)) for t in self.qkv(x))
        k, v = (torch.cat([F.pad(t, (0, 0, 0, 0, 1, 0))[:, :, :-1], t], dim=3) for t in (k, v))
        places = torch.arange(2 * self.size) - self.size
        hidden = places[None, :] > torch.arange(self.size)[:, None]
        first = torch.zeros(q.shape[2], 1, 2 * self.size, dtype=torch.bool)
        first[0, :, : self.size] = True
        scores = torch.einsum("bhwid,bhwjd->bhwij", q, k) * self.scale
        scores = scores.masked_fill(hidden | first, torch.finfo(scores.dtype).min)
        return self.join(torch.einsum("bhwij,bhwjd->bhwid", scores.softmax(-1), v).flatten(2, 3))


@formulation("blocks drawn at random", "Zaheer et al. 2020 (BigBird)", multiple(12))
class RandomBlocks(Projected):
    size = 12

    def forward(self, x):
        q, k, v = (t.unflatten(2, (-1, self.size)) for t in self.qkv(x))
        count = q.shape[2]
        whole = torch.arange(count)
        chosen = torch.stack(
            [whole * 0, (whole - 1) % count, whole, (whole + 1) % count, (whole * 5 + 2) % count], 1
        )
        near_k, near_v = (t[:, :, chosen].flatten(3, 4) for t in (k, v))
        repeated = (chosen[:, :, None] == chosen[:, None, :]).triu(1).any(1).repeat_interleave(self.size, 1)
        scores = torch.einsum("bhnqd,bhnkd->bhnqk", q, near_k) * self.scale
        scores = scores.masked_fill(repeated[:, None, :], -1e4)
        mixed = torch.einsum("bhnqk,bhnkd->bhnqd", scores.softmax(-1), near_v).flatten(2, 3)
        everything = (q[:, :, 0] @ k.flatten(2, 3).mT * self.scale).softmax(-1) @ v.flatten(2, 3)
        return self.join(torch.cat([everything, mixed[:, :, self.size :]], 2))


@formulation("a layout of blocks as a mask", "Child et al. 2019 (strided)", plain=True)
class StridedAttention(Projected):
    def forward(self, x):
        q, k, v = self.qkv(x)
        at = torch.arange(x.shape[1])
        behind = at[:, None] - at[None, :]
        seen = (behind >= 0) & ((behind < 8) | (behind % 8 == 0))
        scores = torch.where(seen, q @ k.mT * self.scale, torch.tensor(-1e9, dtype=q.dtype))
        return self.join(scores.softmax(-1) @ v)


@formulation("queries are keys, in buckets", "Kitaev et al. 2020 (Reformer)", multiple(12))
class HashedAttention(Projected):
    size = 12

    def __init__(self):
        super().__init__()
        self.register_buffer("rotations", normal(self.dim, 4, seed=9))

    def forward(self, x):
        q, _, v = self.qkv(x)
        turned = q.detach().float() @ self.rotations.float()
        buckets = torch.cat([turned, -turned], -1).argmax(-1)
        n = q.shape[2]
        order = (buckets * n + torch.arange(n)).argsort(-1)
        place = order.unsqueeze(-1).expand_as(q)
        sorted_q, sorted_v = q.gather(2, place), v.gather(2, place)
        sorted_k = F.normalize(sorted_q, dim=-1)
        parts = [t.unflatten(2, (-1, self.size)) for t in (sorted_q, sorted_k, sorted_v, order)]
        queries, keys, values, at = parts
        keys, values, key_at = (torch.cat([t.roll(1, 2), t], 3) for t in (keys, values, at))
        scores = queries @ keys.transpose(-1, -2) * self.scale
        own = at.unsqueeze(-1) == key_at.unsqueeze(-2)
        scores = scores.masked_fill(own, -1e5)
        logits = torch.logsumexp(scores, dim=-1, keepdim=True)
        mixed = (torch.exp(scores - logits) @ values).flatten(2, 3)
        return self.join(mixed.gather(2, order.argsort(-1).unsqueeze(-1).expand_as(q)))


@formulation("queries are keys, diagonal hidden", "Kitaev et al. 2020, without buckets", plain=True)
class SharedQueryKey(Projected):
    def forward(self, x):
        q, _, v = self.qkv(x)
        scores = torch.einsum("bhie,bhje->bhij", q, F.normalize(q, 2, dim=-1).type(q.type())) * self.scale
        diagonal = torch.arange(x.shape[1])
        scores[:, :, diagonal, diagonal] = -5e4
        hidden = torch.ones_like(scores, dtype=torch.bool).triu_(1)
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        return self.join(scores.softmax(dim=-1) @ v)


@formulation("the most telling queries", "Zhou et al. 2021 (Informer)")
class ProbSparse(Projected):
    def forward(self, x):
        q, k, v = self.qkv(x)
        n = x.shape[1]
        sample = k[:, :, torch.arange(0, n, 4)]
        sampled = q @ sample.transpose(-2, -1)
        telling = sampled.max(-1)[0] - sampled.sum(-1) / n
        top = telling.topk(min(n, 24), sorted=False).indices
        rows = torch.arange(x.shape[0])[:, None, None], torch.arange(HEADS)[None, :, None], top
        scores = torch.matmul(q[rows], k.transpose(-2, -1)) * self.scale
        mixed = v.mean(dim=-2, keepdim=True).expand(-1, -1, n, -1).clone()
        mixed[rows] = torch.matmul(torch.softmax(scores, dim=-1), v).type_as(mixed)
        return self.join(mixed)


@formulation("keys projected to few", "Wang et al. 2020 (Linformer)")
class ProjectedKeys(Projected):
    def __init__(self):
        super().__init__()
        self.fewer = nn.Parameter(normal(1024, 24, seed=6) / 8)

    def forward(self, x):
        q, k, v = self.qkv(x)
        k, v = (torch.einsum("bhnd,nk->bhkd", t, self.fewer[: x.shape[1]]) for t in (k, v))
        scores = torch.einsum("bhnd,bhkd->bhnk", q, k) * self.scale
        return self.join(torch.einsum("bhnk,bhkd->bhnd", scores.softmax(-1), v))


@formulation("landmarks", "Xiong et al. 2021 (Nystroemformer)", multiple(12))
class LandmarkAttention(Projected):
    def forward(self, x):
        q, k, v = self.qkv(x)
        q, k = q * self.dim**-0.25, k * self.dim**-0.25
        few_q, few_k = (t.unflatten(2, (12, -1)).mean(3) for t in (q, k))
        left = F.softmax(q @ few_k.transpose(-1, -2), dim=-1)
        middle = F.softmax(few_q @ few_k.transpose(-1, -2), dim=-1)
        right = F.softmax(few_q @ k.transpose(-1, -2), dim=-1)
        inverse = middle.mT / (middle.sum(-2).max() * middle.sum(-1).max())
        eye = torch.eye(12, dtype=x.dtype)
        for _ in range(3):
            step = middle @ inverse
            inverse = 0.25 * inverse @ (13 * eye - step @ (15 * eye - step @ (7 * eye - step)))
        return self.join((left @ inverse) @ (right @ v))


@formulation("linear attention", "Katharopoulos et al. 2020", share=False)
class LinearAttention(Projected):
    def forward(self, x):
        q, k, v = self.qkv(x)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        summed = torch.einsum("nhld,nhlm->nhmd", k, v)
        norm = 1 / (torch.einsum("nhld,nhd->nhl", q, k.sum(dim=2)) + 1e-6)
        return self.join(torch.einsum("nhld,nhmd,nhl->nhlm", q, summed, norm))


@formulation("efficient attention", "Shen et al. 2021", share=False)
class EfficientAttention(Projected):
    def forward(self, x):
        q, k, v = self.qkv(x)
        return self.join(q.softmax(dim=-1) @ (k.softmax(dim=-2).transpose(-1, -2) @ v))


@formulation("retention", "Sun et al. 2023 (RetNet)", share=False)
class Retention(Projected):
    def forward(self, x):
        q, k, v = self.qkv(x)
        at = torch.arange(x.shape[1], dtype=x.dtype)
        gamma = 1 - 2.0 ** (-5 - torch.arange(HEADS, dtype=x.dtype))
        decay = (gamma[:, None, None] ** (at[:, None] - at[None, :])) * (at[:, None] >= at[None, :])
        return self.join((q @ k.transpose(-1, -2) * self.scale * decay) @ v / math.sqrt(self.dim))
