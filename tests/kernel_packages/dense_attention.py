"""Attention in float64 by plain loops over sequences, heads and places: what the stand-ins of kernel packages compute.

It is one operator to torch, as a kernel is. It shares no code with attnpatch.
"""

from __future__ import annotations

import itertools
import math

import torch

# The names of the functions that were called, and a factor by which results are wrong.
calls: list[str] = []
broken = {"factor": 1.0}


def is_open(i: int, j: int, causal: bool, left: int, right: int) -> bool:
    """True if a query at place ``i`` sees the key at place ``j``; a side of the window below 0 is open."""
    if causal and j > i:
        return False
    return not (left >= 0 and j < i - left) and not (right >= 0 and j > i + right)


def probabilities(q, k, causal, left, right, ends, softcap, scale, slopes=None, sinks=None, bias=None):
    """Softmax of one sequence, float64 ``[heads, queries, keys]``, and its logsumexp ``[heads, queries]``.

    Args:
        q, k: ``[queries, heads, width]``, ``[keys, key heads, width]``.
        causal, left, right: Which keys a query sees.
        ends: True if the last query is at the place of the last key.
        softcap: 0: none.
        scale: The factor of the scores.
        slopes, sinks: ``[heads]`` or ``None``.
        bias: ``[heads, queries, keys]``, added, or ``None``.
    """
    n, heads, _ = q.shape
    m, key_heads, _ = k.shape
    shift = m - n if ends else 0
    k = k.double().repeat_interleave(heads // key_heads, 1)
    scores = torch.einsum("ihd,jhd->hij", q.double(), k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = torch.tensor(
        [[not is_open(i + shift, j, causal, left, right) for j in range(m)] for i in range(n)],
        dtype=torch.bool,
    ).reshape(n, m)
    distance = torch.tensor([[abs(i + shift - j) for j in range(m)] for i in range(n)], dtype=torch.float64)
    distance = distance.reshape(n, m)
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * distance
    if bias is not None:
        scores = scores + bias.double()
    scores = scores.masked_fill(hidden, -math.inf)
    lse = torch.logsumexp(scores, -1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.double()[:, None])
    found = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    return found, lse


def _each(q, k, v, places, numbers, slopes, sinks, bias):
    """The result and the logsumexp of packed sequences; arguments as for ``attend``."""
    cu_q, starts, lengths = places
    causal, left, right, ends = (int(one) for one in numbers[:4])
    out, all_lse = [], []
    for i, (low, high) in enumerate(itertools.pairwise(cu_q)):
        at = slice(starts[i], starts[i] + lengths[i])
        own = slopes[i] if slopes is not None and slopes.dim() == 2 else slopes
        its = None if bias is None else bias[i]
        found, lse = probabilities(
            q[low:high], k[at], bool(causal), left, right, bool(ends), *numbers[4:6], own, sinks, its
        )
        values = v[at].double().repeat_interleave(q.shape[1] // v.shape[1], 1)
        out.append(torch.einsum("hij,jhd->ihd", found, values))
        all_lse.append(lse)
    return torch.cat(out) * broken["factor"], torch.cat(all_lse, 1)


@torch.library.custom_op("dense_attention::attend", mutates_args=())
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: list[int],
    starts: list[int],
    lengths: list[int],
    numbers: list[float],
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of packed sequences.

    Args:
        q, k, v: ``[total, heads, width]``.
        cu_q: Where the queries of the sequences begin and end.
        starts, lengths: Where the keys of each begin, and how many there are.
        numbers: Causal, window left and right, aligned at the ends, softcap, scale.
        slopes, sinks: ``[heads]``, ``[sequences, heads]``.
        bias: ``[sequences, heads, queries, keys]``.
    """
    out, lse = _each(q, k, v, (cu_q, starts, lengths), numbers, slopes, sinks, bias)
    missing = q.shape[0] - out.shape[0]
    out = torch.cat([out, out.new_zeros(missing, *out.shape[1:])])
    return out.to(q.dtype), lse.float()


@attend.register_fake
def _(q, k, v, cu_q, starts, lengths, numbers, slopes, sinks, bias):
    return q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


def _save(ctx, inputs, output):
    q, k, v, cu_q, starts, lengths, numbers, slopes, sinks, bias = inputs
    ctx.save_for_backward(q, k, v, slopes, sinks, bias)
    ctx.rest = (cu_q, starts, lengths), numbers


def _backward(ctx, grad, _):
    q, k, v, slopes, sinks, bias = ctx.saved_tensors
    places, numbers = ctx.rest
    with torch.enable_grad():
        leaves = [None if one is None else one.detach().double().requires_grad_() for one in (q, k, v, sinks)]
        out, _ = _each(*leaves[:3], places, numbers, slopes, leaves[3], bias)
        given = [one for one in leaves if one is not None]
        found = iter(torch.autograd.grad(out, given, grad[: len(out)].double()))
    dq, dk, dv, dsinks = (
        None if one is None else next(found).to(old.dtype)
        for one, old in zip(leaves, (q, k, v, sinks), strict=True)
    )
    return dq, dk, dv, None, None, None, None, None, dsinks, None


attend.register_autograd(_backward, setup_context=_save)


def of_batch(name, q, k, v, numbers, slopes=None, sinks=None, bias=None):
    """Attention of ``[batch, length, heads, width]``: the result in the same layout, and ``[batch, heads, queries]``."""
    calls.append(name)
    batch, n, m = q.shape[0], q.shape[1], k.shape[1]
    out, lse = attend(
        *(one.reshape(-1, *one.shape[2:]) for one in (q, k, v)),
        [i * n for i in range(batch + 1)],
        [i * m for i in range(batch)],
        [m] * batch,
        [float(one) for one in numbers],
        slopes,
        sinks,
        bias,
    )
    return out.view(batch, n, *out.shape[1:]), lse.view(-1, batch, n).transpose(0, 1)


def of_packed(name, q, k, v, cu_q, starts, lengths, numbers, slopes=None, sinks=None):
    """Attention of packed ``[total, heads, width]``: the result, and ``[heads, total]``."""
    calls.append(name)
    places = ([int(one) for one in side] for side in (cu_q, starts, lengths))
    return attend(q, k, v, *places, [float(one) for one in numbers], slopes, sinks, None)


def lengths_of(cu):
    """Where sequences begin, and their lengths."""
    cu = [int(one) for one in cu]
    return cu[:-1], [b - a for a, b in itertools.pairwise(cu)]


def no_dropout(p):
    if p:
        raise NotImplementedError("this stand-in has no dropout")
