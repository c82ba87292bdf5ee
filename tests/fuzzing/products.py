"""How programs make scores from ``q`` and ``k``, use probabilities with ``v``, and use them again.

Here ``q``, ``k`` and ``v`` are ``[batch, heads, tokens, dim]``; ``vv`` has the leading dimensions of ``s``.
"""

from __future__ import annotations

# Where keys and values have fewer heads than queries.
GROUPS = [
    "k = k.repeat_interleave(full[1] // k.shape[1], 1)",
    "k = k[:, :, None].expand(-1, -1, full[1] // k.shape[1], -1, -1).reshape(full[0], full[1], *k.shape[-2:])",
    "k = torch.repeat_interleave(k, dim=1, repeats=full[1] // k.shape[1])",
]
GROUPED = [
    "s = (q.unflatten(1, (k.shape[1], -1)) @ k.unsqueeze(2).mT).flatten(1, 2)",
    "s = torch.einsum('bghid,bgjd->bghij', q.unflatten(1, (k.shape[1], -1)), k).reshape(full)",
    "s = torch.einsum('bghid,bgjd->bghij', q.unflatten(1, (k.shape[1], -1)), k).view(full)",
    "s = (q.reshape(full[0], k.shape[1], -1, q.shape[-1]) @ k.mT).reshape(full)",
]

FOUR = [
    "s = q @ k.transpose(-1, -2)", "s = torch.matmul(q, k.mT)", "s = q.matmul(k.transpose(2, 3))", "s = torch.einsum('bhid,bhjd->bhij', q, k)",
    "s = torch.einsum('bhjd,bhid->bhij', k, q)", "s = (k @ q.mT).transpose(-1, -2)", "s = (q * 0.5) @ k.mT",
    "s = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).view(full)", "s = torch.einsum('bhid,bhjd,h->bhij', q, k, sink)",
    "s = torch.einsum('bihd,bjhd->bhij', q.transpose(1, 2), k.transpose(1, 2))", "s = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1)",
    "s = torch.einsum(q, [0, 1, 2, 3], k, [0, 1, 4, 3], [0, 1, 2, 4])", "s = torch.einsum('...id,...jd->...ij', q, k)", "s = torch.einsum('bhid,bhjd->bhij', [q, k])",
    "s = q.__matmul__(k.mT)", "s = -torch.cdist(q, k)", "s = torch.einsum('bhid,bhjd->hbij', q, k).transpose(0, 1)", "s = torch.einsum('bhid,bhjd->bijh', q, k).permute(0, 3, 1, 2)",
    "s = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT", "s = q @ k.mT + (q * 0.5) @ (k + 0.25).mT", "s = torch.einsum('bhid,bhjd->bhij', q, k) - (q @ k.mT) * 0.25",
    "s = torch.stack([a @ b.mT for a, b in zip(q.unbind(1), k.unbind(1))], 1)", "s = torch.cat([q[:, :1] @ k[:, :1].mT, q[:, 1:] @ k[:, 1:].mT], 1)", "s = k.mT.__rmatmul__(q)",
]  # fmt: skip
THREE = [
    "s = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))", "s = q.flatten(0, 1) @ k.flatten(0, 1).mT", "s = q.flatten(0, 1).bmm(k.flatten(0, 1).mT)",
    "s = torch.baddbmm(q.new_zeros(1, 1, 1), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=0.5)", "s = torch.einsum('nid,njd->nij', q.flatten(0, 1), k.flatten(0, 1))",
    "s = torch.baddbmm(bias.expand(full).reshape(-1, *full[2:]), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.5)",
    "s = torch.baddbmm(torch.empty(full[0] * full[1], *full[2:], dtype=q.dtype), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=0.5)",
    "s = bias.expand(full).reshape(-1, *full[2:]).baddbmm(q.flatten(0, 1), k.flatten(0, 1).mT, alpha=0.25)",
]  # fmt: skip
TWO = [
    "s = q[0, 0] @ k[0, 0].T", "s = torch.mm(q[0, 0], k[0, 0].t())", "s = F.linear(q[0, 0], k[0, 0])", "s = torch.inner(q[0, 0], k[0, 0])",
    "s = torch.einsum('id,jd->ij', q[0, 0], k[0, 0])", "s = torch.einsum('id,jd', q[0, 0], k[0, 0])", "s = torch.addmm(bias[0, 0], q[0, 0], k[0, 0].t())", "s = q[0, 0].mm(k[0, 0].t())",
]  # fmt: skip

VALUES = [
    "out = s @ vv", "out = torch.matmul(s, vv)", "out = torch.einsum('...ij,...jd->...id', s, vv)", "out = (vv.mT @ s.mT).mT", "out = s.matmul(vv) * 2.0",
    "out = torch.bmm(s.flatten(0, -3), vv.flatten(0, -3))  # LEADS", "out = torch.einsum('bhij,bhjd->bihd', s, vv)  # FOUR", "out = (s.unsqueeze(-1) * vv.unsqueeze(-3)).sum(-2)",
    "out = torch.einsum('bhij,bhjd->bihd', s, vv).flatten(2)  # FOUR", "out = (s @ vv).transpose(1, 2).flatten(2)  # FOUR", "out = torch.einsum('nij,njd->nid', s, vv)  # THREE",
    "out = torch.baddbmm(vv[:, :1] * 0.5, s, vv)  # THREE", "out = torch.mm(s, vv)  # TWO", "out = F.linear(s, vv.mT)  # TWO", "out = s.to(v.dtype) @ vv.to(v.dtype)",
    "out = s[..., : s.shape[-1] // 2] @ vv[..., : s.shape[-1] // 2, :] + s[..., s.shape[-1] // 2 :] @ vv[..., s.shape[-1] // 2 :, :]", "out = s.detach() @ vv", "out = s @ vv.detach()",
    "out = torch.cat([s[..., :1, :] @ vv, s[..., 1:, :] @ vv], -2)", "out = s @ torch.cat([vv, torch.ones_like(vv[..., :1])], -1)", "out = torch.einsum('bhjd,bhij->bhid', vv, s)  # FOUR",
    "out = s.tril() @ vv", "out = torch.cat([s.unbind(0)[0][None] @ vv[:1], s[1:] @ vv[1:]])  # LEADS", "out = s.to_dense() @ vv", "out = s @ vv; out = out / (s.sum(-1, keepdim=True) + 1.0)",
    "out = s @ vv[..., :1]", "out = (s @ vv).softmax(-1)", "with torch.no_grad(): out = s @ vv", "out = s.sum(-1, keepdim=True) * vv.mean(-2, keepdim=True)", "out = s.contiguous().view(s.shape) @ vv",
]  # fmt: skip

# What is done with probabilities (or scores that a program kept) beside the product.
AGAIN = [
    "more.append(s)", "more.append(s.mean(0))", "more.append(s.sum(-2))", "more.append(s[..., 0])", "more.append(s.amax(-1))", "more.append(s.detach())", "more.append(s.softmax(-2).mT @ keys_of(q, s.shape, full)[..., -s.shape[-2] :, :].to(s.dtype))",
    "more.append((s * s.abs().clamp_min(1e-6).log()).sum(-1))", "more.append(s.mT @ (s @ vv))", "more.append(s @ s.mT)", "more.append(s.clone())", "more.append(s.transpose(-1, -2))", "more.append(s.float().mean())",
    "notes.write(s.detach())", "notes.keep(s)", "notes.hook(s)", "notes.gradient(s, q)", "notes.hook(out, 0.5)", "notes.keep(out)", "more.append(s[..., -1:, :])", "more.append(s.view(-1))", "more.append(s.max(-1).values)",
    "more.append(s.std(-1))", "more.append(s[0])", "s = s * 0.5; more.append(s)", "s.mul_(0.5)", "s.zero_()", "out.mul_(0.5)", "more.append(out.detach() * s.sum())", "more.append(s.chunk(2, -1)[0])", "q.detach().mul_(1.0)",
]  # fmt: skip
