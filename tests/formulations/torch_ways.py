"""The same attention through other parts of torch: its modules, autograd Functions, scripts, hooks, checkpoints, vmap."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .table import HEADS, WIDTH, Projected, formulation, normal, sequence, sequences


@formulation("nn.MultiheadAttention, both masks", "torch", inputs=lambda n: {
    **sequence(n), "padding": torch.arange(n).expand(2, n) >= torch.tensor([[n], [n - 9]])})  # fmt: skip
class MaskedMultihead(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x, padding):
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.attend(x, x, x, key_padding_mask=padding, attn_mask=causal, average_attn_weights=False)


@formulation("nn.MultiheadAttention, no weights", "torch", share=False, inputs=lambda n: {
    **sequence(n), "padding": torch.arange(n).expand(2, n) >= torch.tensor([[n], [n - 9]])})  # fmt: skip
class SilentMultihead(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, add_zero_attn=True, bias=False)

    def forward(self, x, padding):
        return self.attend(x, x, x, key_padding_mask=padding, need_weights=False)[0]


@formulation("nn.TransformerDecoderLayer", "torch", sequences)
class DecoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(
            WIDTH, HEADS, 48, dropout=0.0, batch_first=True, norm_first=True
        )

    def forward(self, x, context):
        return self.layer(
            x, context, tgt_mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        )


class MaskedSoftmax(torch.autograd.Function):
    """He et al.'s XSoftmax: hidden keys are zero, the backward pass is softmax's own."""

    @staticmethod
    def forward(ctx, scores, mask, dim):
        ctx.dim = dim
        hidden = ~mask.to(torch.bool)
        output = torch.softmax(scores.masked_fill(hidden, torch.finfo(scores.dtype).min), ctx.dim)
        output.masked_fill_(hidden, 0)
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx, grad):
        (output,) = ctx.saved_tensors
        return torch._softmax_backward_data(grad, output, ctx.dim, output.dtype), None, None


@formulation("softmax as a Function", "He et al. 2021 (XSoftmax)", plain=False)
class FunctionAttention(Projected):
    def forward(self, x):
        q, k, v = self.qkv(x)
        mask = torch.ones(x.shape[1], x.shape[1]).tril()[None, None].byte()
        return self.join(MaskedSoftmax.apply(q @ k.transpose(-1, -2) * self.scale, mask, -1) @ v)


class ScaledUpperTriangle(torch.autograd.Function):
    """Megatron's fused scale, mask and softmax, in Python."""

    @staticmethod
    def forward(ctx, scores, scale):
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        result = torch.softmax((scores * scale).masked_fill(hidden, -10000.0), dim=-1)
        ctx.scale = scale
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx, grad):
        (result,) = ctx.saved_tensors
        return ctx.scale * result * (grad - (grad * result).sum(-1, keepdim=True)), None


@formulation("fused scale, mask and softmax", "Shoeybi et al. 2019 (Megatron)", plain=False)
class MegatronAttention(Projected):
    def forward(self, x):
        q, k, v = (t.flatten(0, 1) for t in self.qkv(x))
        scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0.0, alpha=1.0)
        weights = ScaledUpperTriangle.apply(
            scores.view(x.shape[0], self.heads, *scores.shape[1:]), self.scale
        )
        mixed = torch.bmm(weights.view(scores.shape), v)
        return self.join(mixed.view(x.shape[0], self.heads, *mixed.shape[1:]))


class WholeFunction(torch.autograd.Function):
    """Attention forward and backward by hand."""

    @staticmethod
    def forward(ctx, q, k, v, scale):
        weights = (q @ k.transpose(-1, -2) * scale).softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale = scale
        return weights @ v

    @staticmethod
    def backward(ctx, grad):
        q, k, v, weights = ctx.saved_tensors
        of_weights = grad @ v.transpose(-1, -2)
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * ctx.scale
        return of_scores @ k, of_scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad, None


@formulation("all of it as a Function", "research kernels in Python", plain=True)
class WholeFunctionAttention(Projected):
    def forward(self, x):
        return self.join(WholeFunction.apply(*self.qkv(x), self.scale))


class WeightsFunction(torch.autograd.Function):
    """Probabilities in float32 from queries and keys, with a backward pass of its own."""

    @staticmethod
    def forward(ctx, q, k):
        w = torch.einsum("ncq,nck->nqk", q.to(torch.float32), (k / k.shape[1] ** 0.5).to(torch.float32))
        w = w.softmax(dim=2).to(q.dtype)
        ctx.save_for_backward(q, k, w)
        return w

    @staticmethod
    def backward(ctx, grad):
        q, k, w = ctx.saved_tensors
        inner = torch._softmax_backward_data(grad.float(), w.float(), 2, torch.float32)
        dq = torch.einsum("nck,nqk->ncq", k.float(), inner) / k.shape[1] ** 0.5
        dk = torch.einsum("ncq,nqk->nck", q.float(), inner) / k.shape[1] ** 0.5
        return dq.to(q.dtype), dk.to(k.dtype)


@formulation(
    "weights as a Function",
    "Karras et al. 2022 (EDM)",
    plain=True,
    inputs=lambda n: {"x": normal(2, WIDTH, n)},
)
class WeightsFunctionBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Conv1d(WIDTH, 3 * WIDTH, 1), nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(x.shape[0] * HEADS, WIDTH // HEADS, 3, -1).unbind(2)
        w = WeightsFunction.apply(q, k)
        return x + self.out(torch.einsum("nqk,nck->ncq", w, v).reshape(x.shape))


@torch.jit.script
def scripted_softmax(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores = scores.masked_fill(mask, -1e4)
    return torch.softmax(scores, dim=-1)


@formulation("scripted softmax", "fused masks in TorchScript", plain=False)
class ScriptedAttention(Projected):
    def forward(self, x):
        q, k, v = self.qkv(x)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.join(scripted_softmax(q @ k.mT * self.scale, hidden) @ v)


@formulation("a checkpointed core", "Chen et al. 2016, non-reentrant", plain=True)
class CheckpointedAttention(Projected):
    reentrant = False

    def core(self, q, k, v):
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * self.scale
        return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)

    def forward(self, x):
        q, k, v = self.qkv(x)
        return self.join(checkpoint(self.core, q, k, v, use_reentrant=self.reentrant))


@formulation("a reentrant checkpoint of the core", "Chen et al. 2016, reentrant", plain=True)
class ReentrantAttention(CheckpointedAttention):
    reentrant = True


@formulation("a checkpoint of the weights", "Chen et al. 2016", plain=True)
class CheckpointedWeights(Projected):
    def weights(self, q, k):
        return (q @ k.transpose(-1, -2) * self.scale).softmax(dim=-1)

    def forward(self, x):
        q, k, v = self.qkv(x)
        return self.join(checkpoint(self.weights, q, k, use_reentrant=True) @ v)


@formulation("softmax in a Sequential", "vision models by hand", plain=False)
class SequentialSoftmax(Projected):
    def __init__(self):
        super().__init__()
        self.attend = nn.Sequential(nn.Softmax(dim=-1), nn.Dropout(0.0))

    def forward(self, x):
        q, k, v = self.qkv(x)
        return self.join(torch.matmul(self.attend(torch.matmul(q, k.transpose(-1, -2)) * self.scale), v))


@formulation("hooks on weights", "Chefer et al. 2021", plain=True)
class HookedAttention(Projected):
    def __init__(self):
        super().__init__()
        self.gradients = None
        self.drop = nn.Dropout(0.0)
        self.drop.register_full_backward_hook(lambda module, before, after: None)

    def keep(self, gradient):
        self.gradients = gradient

    def forward(self, x):
        q, k, v = self.qkv(x)
        weights = (torch.einsum("bhid,bhjd->bhij", q, k) * self.scale).softmax(dim=-1)
        if weights.requires_grad:
            weights.register_hook(self.keep)
        weights = self.drop(weights)
        return self.join(torch.einsum("bhij,bhjd->bhid", weights, v))


@formulation("vmap over heads", "torch.func")
class MappedAttention(Projected):
    @staticmethod
    def one(q, k, v):
        return torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v

    def forward(self, x):
        return self.join(torch.vmap(torch.vmap(self.one))(*self.qkv(x)))


@formulation(
    "weights returned and used again", "attention rollout, Abnar and Zuidema 2020", whole="it is the result"
)
class RolledOutAttention(Projected):
    def forward(self, x):
        rollout = torch.eye(x.shape[1], dtype=x.dtype)
        for _ in range(2):
            q, k, v = self.qkv(x)
            weights = (q @ k.mT * self.scale).softmax(-1)
            x = x + self.join(weights @ v)
            rollout = (0.5 * weights.mean(1) + 0.5 * torch.eye(x.shape[1], dtype=x.dtype)) @ rollout
        return x, rollout


@formulation("a log line", "entropy written to a log in no_grad", plain=True)
class LoggedAttention(Projected):
    def forward(self, x):
        q, k, v = self.qkv(x)
        weights = (q @ k.mT * self.scale).softmax(-1)
        with torch.no_grad():
            self.entropy = -(weights * weights.clamp_min(1e-9).log()).sum(-1).mean().item()
        return self.join(weights @ v)


@formulation("scores written in place", "Megatron-LM style buffers", plain=True)
class InPlaceAttention(Projected):
    def forward(self, x):
        q, k, v = self.qkv(x)
        scores = q @ k.mT
        scores *= self.scale
        scores += torch.zeros(x.shape[1]).to(x.dtype)
        scores.masked_fill_(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu_(1), -1e4)
        return self.join(F.softmax(scores, dim=-1, dtype=torch.float32).type_as(x) @ v)
