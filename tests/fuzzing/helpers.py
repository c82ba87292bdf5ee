"""What a program of the fuzzer may call beside torch."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@functools.lru_cache(4096)
def _ramp(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    count = math.prod(shape)
    # Multiples of a sixteenth: exact in every dtype.
    return ((torch.arange(count) * 7 + 3) % 29 - 14).div(16).reshape(shape).to(dtype)


def ramp(*shape: int, like: torch.Tensor) -> torch.Tensor:
    """A fixed tensor of a shape, in the dtype of another."""
    return _ramp(shape, like.dtype).clone()


def fit(value: torch.Tensor, scores: torch.Tensor, full: tuple[int, int, int, int]) -> torch.Tensor:
    """``value``, broadcastable to ``[batch, heads, rows, keys]``, in the layout of scores and the rows they have left."""
    leads = scores.shape[:-2]
    if leads != full[:2]:
        value = value.expand(*full[:2], *value.shape[-2:])
        value = value[0, 0] if not leads else value.reshape(*leads, *value.shape[-2:])
    return value[..., -scores.shape[-2] :, :] if value.shape[-2] > 1 else value


def keys_of(value: torch.Tensor, scores_shape: torch.Size, full: tuple[int, int, int, int]) -> torch.Tensor:
    """``value`` ``[batch, shared heads, keys, dim]`` with the leading dimensions of scores."""
    value = value.repeat_interleave(full[1] // value.shape[1], dim=1)
    return value[0, 0] if len(scores_shape) == 2 else value.reshape(*scores_shape[:-2], *value.shape[-2:])


class Same(torch.autograd.Function):
    """Identity, seen by autograd alone."""

    @staticmethod
    def forward(ctx, a):
        return a.view_as(a)

    @staticmethod
    def backward(ctx, grad):
        return grad


class Halved(torch.autograd.Function):
    """A new tensor; the gradient is not that of the forward pass, so that an edge that was lost shows."""

    @staticmethod
    def forward(ctx, a):
        return a * 0.5

    @staticmethod
    def backward(ctx, grad):
        return grad * 3.0


class OwnSoftmax(torch.autograd.Function):
    """Softmax that keeps its result and writes its backward pass out."""

    @staticmethod
    def forward(ctx, a):
        result = a.softmax(-1)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx, grad):
        (result,) = ctx.saved_tensors
        return result * (grad - (grad * result).sum(-1, keepdim=True))


class Two(torch.autograd.Function):
    """Two results of two arguments, one of them a mask without a gradient."""

    @staticmethod
    def forward(ctx, a, keep):
        ctx.save_for_backward(keep)
        return a.masked_fill(~keep, -4.0), a * 0.25

    @staticmethod
    def backward(ctx, first, second):
        (keep,) = ctx.saved_tensors
        return first * keep + second * 0.25, None


class Saves(torch.autograd.Function):
    """Identity that saves its argument."""

    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return a.view_as(a)

    @staticmethod
    def backward(ctx, grad):
        (a,) = ctx.saved_tensors
        return grad + 0 * a


class Overwrites(torch.autograd.Function):
    """Works in place and says so."""

    @staticmethod
    def forward(ctx, a):
        a.mul_(0.5)
        ctx.mark_dirty(a)
        return a

    @staticmethod
    def backward(ctx, grad):
        return grad * 0.5


@torch.jit.script
def scripted(a: torch.Tensor) -> torch.Tensor:
    """A scripted softmax."""
    powers = torch.exp(a - torch.amax(a, dim=-1, keepdim=True))
    return powers / torch.sum(powers, dim=-1, keepdim=True)


@torch.jit.script
def scripted_step(a: torch.Tensor) -> torch.Tensor:
    """A scripted function of single elements."""
    return torch.tanh(a * 0.5) * 2.0


def sparsemax(a: torch.Tensor) -> torch.Tensor:
    """Martins and Astudillo 2016: the projection on the simplex, by sorting."""
    ordered = a.sort(dim=-1, descending=True).values
    ranks = torch.arange(1, a.shape[-1] + 1, dtype=a.dtype)
    sums = ordered.cumsum(-1) - 1
    size = (ranks * ordered > sums).sum(-1, keepdim=True)
    return (a - sums.gather(-1, size - 1) / size).clamp(min=0)


def quiet_softmax(a: torch.Tensor) -> torch.Tensor:
    """Softmax beside a score of zero that is no key."""
    most = a.amax(-1, keepdim=True).clamp(min=0)
    powers = (a - most).exp()
    return powers / (powers.sum(-1, keepdim=True) + (-most).exp())


class Parts(nn.Module):
    """Sub-modules that a program uses: with hooks, and without."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax, self.dropout = nn.Softmax(dim=-1), nn.Dropout(0.0)
        self.hooked = nn.Dropout(0.0)
        self.hooked.register_full_backward_hook(lambda module, before, after: (before[0] * 0.5,))
        self.seen = nn.Softmax(dim=-1)
        self.seen.register_forward_hook(lambda module, args, result: result * 1.0)


def _is_again() -> bool:
    """Whether a backward pass is going on, and a checkpoint runs again in it."""
    return torch._C._current_graph_task_id() != -1


class Notes:
    """What a program writes down while it runs, and tensors whose gradient it asks to be kept.

    Attributes:
        log: What is written in the forward pass. A checkpoint that runs again ends where it has seen enough, by rows
            earlier or later than natively, so what that writes is not kept.
        grads: What hooks write, and whether a part that runs again has made them.
        kept: Tensors whose gradient is to be kept, and whether by such a part.
        views: Views whose gradient is asked for, and their version then.
        histories: Of tensors that have a hook.
        is_hooked_twice: Whether a part that runs again gives a hook to a tensor of the first run: to an argument of it.
    """

    def __init__(self) -> None:
        self.log: list = []
        self.grads: list[tuple[torch.Tensor, bool]] = []
        self.kept: list[tuple[torch.Tensor, bool]] = []
        self.views: list[tuple[torch.Tensor, int]] = []
        self.histories: list = []
        self.is_hooked_twice = False

    def write(self, value) -> None:
        if not _is_again():
            self.log.append(value.detach().clone() if isinstance(value, torch.Tensor) else value)

    def keep(self, tensor: torch.Tensor) -> None:
        if tensor.requires_grad:
            self._look(tensor)
            tensor.retain_grad()
            self.kept.append((tensor, _is_again()))

    def hook(self, tensor: torch.Tensor, factor: float | None = None) -> None:
        if tensor.requires_grad:
            self._look(tensor)
            self.is_hooked_twice |= _is_again() and any(tensor.grad_fn is other for other in self.histories)
            self.histories.append(tensor.grad_fn)
            found, is_again = self.grads, _is_again()
            tensor.register_hook(
                lambda grad: (
                    found.append((grad.detach().clone(), is_again)) if factor is None else grad * factor
                )
            )

    def _look(self, tensor: torch.Tensor) -> None:
        # Without that, ``register_hook`` ends the process (torch 2.13) for a view of what another view was written to.
        assert tensor.grad_fn is not None or tensor.is_leaf
        if type(tensor) is torch.Tensor and tensor._is_view():
            self.views.append((tensor, tensor._version))

    def of_torch(self) -> str:
        """What torch itself has done with hooks that is an accident, if anything."""
        if any(tensor._version != version for tensor, version in self.views):
            return "a view was written to after its gradient was asked for: its history is another now"
        return "an argument of a checkpoint has a hook more for each time it runs" * self.is_hooked_twice

    def gradient(self, tensor: torch.Tensor, source: torch.Tensor) -> None:
        if tensor.requires_grad and source.requires_grad:
            (found,) = torch.autograd.grad(
                tensor.float().square().sum(), source, retain_graph=True, allow_unused=True
            )
            self.write(found if found is not None else "unused")


NAMES = {
    "torch": torch, "F": F, "math": math, "checkpoint": checkpoint, "ramp": ramp, "fit": fit, "keys_of": keys_of,
    "Same": Same, "Halved": Halved, "OwnSoftmax": OwnSoftmax, "Two": Two, "Overwrites": Overwrites, "Saves": Saves,
    "scripted": scripted, "scripted_step": scripted_step, "sparsemax": sparsemax, "quiet_softmax": quiet_softmax,
}  # fmt: skip
