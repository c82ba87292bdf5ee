"""Something else than softmax, or softmax of another kind."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .table import WIDTH, Projected, formulation


class _Normalised(Projected):
    """Attention with a normaliser of its own."""

    def weigh(self, scores):
        raise NotImplementedError

    def forward(self, x):
        q, k, v = self.qkv(x)
        return self.join(self.weigh(q @ k.transpose(-2, -1) * self.scale) @ v)


class _ByHand(torch.autograd.Function):
    """Entmax by bisection (Peters et al. 2019) with its own backward pass."""

    @staticmethod
    def forward(ctx, scores, alpha):
        scores = scores * (alpha - 1)
        low = scores.max(dim=-1, keepdim=True).values - 1
        width = 1 - scores.shape[-1] ** (1 - alpha)
        for _ in range(30):
            width = width / 2
            middle = low + width
            total = torch.clamp(scores - middle, min=0) ** (1 / (alpha - 1))
            low = torch.where(total.sum(dim=-1, keepdim=True) >= 1, middle, low)
        weights = torch.clamp(scores - low, min=0) ** (1 / (alpha - 1))
        weights = weights / weights.sum(dim=-1, keepdim=True)
        ctx.alpha = alpha
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx, grad):
        (weights,) = ctx.saved_tensors
        slope = torch.where(weights > 0, weights ** (2 - ctx.alpha), weights.new_zeros(1))
        inner = grad * slope
        return inner - inner.sum(-1, keepdim=True) / slope.sum(-1, keepdim=True) * slope, None


@formulation("entmax by bisection", "Peters et al. 2019")
class EntmaxAttention(_Normalised):
    def weigh(self, scores):
        return _ByHand.apply(scores, 1.5)


@formulation("1.5-entmax by sorting", "Peters et al. 2019")
class SortedEntmaxAttention(_Normalised):
    def weigh(self, scores):
        scores = (scores - scores.max(dim=-1, keepdim=True).values) / 2
        ordered = torch.sort(scores, descending=True, dim=-1).values
        rank = torch.arange(1, ordered.size(-1) + 1, dtype=scores.dtype)
        mean, square = ordered.cumsum(-1) / rank, (ordered**2).cumsum(-1) / rank
        delta = (1 - rank * (square - mean**2)) / rank
        tau = mean - torch.sqrt(delta.clamp(min=1e-12))
        size = (tau <= ordered).sum(dim=-1, keepdim=True)
        return torch.clamp(scores - tau.gather(-1, size - 1), min=0) ** 2


@formulation("sparsemax", "Martins and Astudillo 2016")
class SparsemaxAttention(_Normalised):
    def weigh(self, scores):
        scores = scores - scores.amax(dim=-1, keepdim=True)
        ordered, _ = torch.sort(scores, dim=-1, descending=True)
        rank = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
        inside = 1 + rank * ordered > torch.cumsum(ordered, dim=-1)
        size = inside.sum(dim=-1, keepdim=True)
        tau = ((inside * ordered).sum(dim=-1, keepdim=True) - 1) / size
        return torch.max(torch.zeros_like(scores), scores - tau)


@formulation("the largest scores only", "Zhao et al. 2019 (explicit sparse)", plain=True)
class TopKAttention(_Normalised):
    def weigh(self, scores):
        least = torch.topk(scores, 8, dim=-1).values[..., -1:]
        return scores.masked_fill(scores < least, float("-inf")).softmax(-1)


@formulation("the largest scores, scattered", "Gupta et al. 2021", plain=True)
class ScatteredTopK(_Normalised):
    def weigh(self, scores):
        values, index = torch.topk(scores, 8, dim=-1)
        return torch.full_like(scores, float("-inf")).scatter_(-1, index, values).softmax(-1)


@formulation("softmax beside a zero", "Miller 2023 (softmax1)", share=False)
class QuietAttention(_Normalised):
    def weigh(self, scores):
        most = scores.max(dim=-1, keepdim=True).values.clamp(min=0)
        powers = torch.exp(scores - most)
        return powers / (torch.exp(-most) + powers.sum(dim=-1, keepdim=True))


@formulation("sigmoid", "Ramapuram et al. 2024", share=False)
class SigmoidAttention(_Normalised):
    def weigh(self, scores):
        return torch.sigmoid(scores - math.log(scores.shape[-1]))


@formulation("ReLU by the count", "Wortsman et al. 2023", share=False)
class ReluAttention(_Normalised):
    def weigh(self, scores):
        return F.relu(scores) / scores.shape[-1]


@formulation("squared ReLU, gated", "Hua et al. 2022 (GAU)", share=False)
class GatedAttentionUnit(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.u, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.gamma, self.beta = nn.Parameter(torch.randn(2, WIDTH)), nn.Parameter(torch.randn(2, WIDTH))

    def forward(self, x):
        q, k = (F.silu(self.shared(x)).unsqueeze(2) * self.gamma + self.beta).unbind(2)
        kernel = F.relu(torch.einsum("bnd,bmd->bnm", q, k) / x.shape[1]) ** 2
        return self.out(F.silu(self.u(x)) * torch.einsum("bnm,bme->bne", kernel, F.silu(self.v(x))))


@formulation("Laplace", "Ma et al. 2022 (MEGA)", share=False)
class LaplaceAttention(_Normalised):
    def weigh(self, scores):
        return 0.5 * (
            1.0 + torch.erf((scores - math.sqrt(0.5)) / (math.sqrt(0.25 / math.pi) * math.sqrt(2.0)))
        )


@formulation("MEGA with softmax and a moving average", "Ma et al. 2022", plain=True)
class MovingAverageAttention(Projected):
    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.zeros(WIDTH))
        self.bias = nn.Parameter(torch.randn(2 * 1024 - 1) * 0.3)

    def forward(self, x):
        share, n = torch.sigmoid(self.decay), x.shape[1]
        powers = share * (1 - share) ** torch.arange(n, dtype=x.dtype)[:, None]
        smooth = torch.fft.irfft(
            torch.fft.rfft(x.float(), 2 * n, 1) * torch.fft.rfft(powers.float(), 2 * n, 0), 2 * n, 1
        )
        q, k, _ = self.qkv(smooth[:, :n].to(x.dtype))
        _, _, v = self.qkv(x)
        toeplitz = F.pad(self.bias[1024 - n : 1023 + n], (0, n)).tile(n)[:-n].view(n, -1)
        bias = toeplitz[:, n - 1 : 2 * n - 1]
        return self.join(F.softmax(q @ k.mT * self.scale + bias, dim=-1) @ v)


@formulation("Gumbel noise", "Jang et al. 2017", plain=False)
class GumbelAttention(_Normalised):
    def weigh(self, scores):
        return F.gumbel_softmax(scores, tau=0.7, hard=False, dim=-1)


@formulation("straight through", "Jang et al. 2017, without noise")
class HardAttention(_Normalised):
    def weigh(self, scores):
        soft = scores.softmax(-1)
        hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
        return hard - soft.detach() + soft


@formulation("cosine of scores, normed by l1", "l1-normalised attention")
class NormalisedAttention(_Normalised):
    def weigh(self, scores):
        return F.normalize(scores.abs(), p=1, dim=-1)


@formulation("Sinkhorn", "Sander et al. 2022 (Sinkformer)", whole="columns are normalised too")
class SinkhornAttention(_Normalised):
    def weigh(self, scores):
        for _ in range(3):
            scores = scores - scores.logsumexp(dim=-1, keepdim=True)
            scores = scores - scores.logsumexp(dim=-2, keepdim=True)
        return (scores - scores.logsumexp(dim=-1, keepdim=True)).exp()


@formulation("distances instead of products", "Kim et al. 2021 (L2)", plain=True)
class DistanceAttention(Projected):
    def forward(self, x):
        q, k, v = self.qkv(x)
        scores = -(q.square().sum(-1, keepdim=True) - 2 * q @ k.mT + k.square().sum(-1).unsqueeze(-2))
        return self.join((scores * self.scale).softmax(-1) @ v)


@formulation("cdist", "Euclidean attention", plain=True)
class CdistAttention(Projected):
    def forward(self, x):
        q, k, v = self.qkv(x)
        return self.join(torch.softmax(-torch.cdist(q, k), dim=-1) @ v)


@formulation("dropout of whole keys", "DropKey, Li et al. 2022, in evaluation", plain=True)
class DroppedKeys(_Normalised):
    def weigh(self, scores):
        if self.training:
            scores = scores + torch.bernoulli(torch.full_like(scores, 0.1)) * -1e12
        return F.dropout(scores.softmax(dim=-1), 0.1, self.training)


@formulation("temperature by length", "Su 2021 (log n)", plain=True)
class LogLengthAttention(Projected):
    def forward(self, x):
        q, k, v = self.qkv(x)
        seen = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        scores = q @ k.mT * self.scale * (seen.log() / math.log(32)).clamp(min=1)
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(diagonal=1)
        return self.join(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v)
