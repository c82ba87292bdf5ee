"""The steps that programs consist of, as lines of Python.

``s`` is the tensor that a step works on: scores ``[batch, heads, rows, keys]`` at first, in some layout. ``full`` is
that shape. A word in capitals after the lines says where a step can stand: ``FOUR`` dimensions, ``KEYS`` as many as at
first, ``LEADS`` at least one dimension before the rows. ``{x}`` stands for a number.
"""

from __future__ import annotations

NUMBERS = (0.5, 2.0, 0.25, -0.75, 1.5, 0.1)

POINTWISE = [
    "s = s * {x}", "s = s / 1.7", "s = s + {x}", "s = {x} - s", "s = -s", "s = (s / 3.0).tanh() * 3.0",
    "s = s.clamp(-2.1, 2.3)", "s = s.clamp(max=2.0).exp()", "s = s.abs()", "s = s.square() * 0.1", "s = s.relu()",
    "s = torch.where(s > 0.111, s, s * 0.5)", "s = torch.where(s > 0.111, s, torch.tensor(-1.0, dtype=s.dtype))",
    "s = F.gelu(s)", "s = F.silu(s)", "s = F.softplus(s)", "s = F.leaky_relu(s, 0.2)", "s = s.sigmoid()", "s = s.pow(2)",
    "s = torch.maximum(s, s * 0.3)", "s = torch.lerp(s, s * 2, 0.25)", "s = torch.addcmul(s, s, s, value=0.1)",
    "s = s.nan_to_num()", "s = torch.logaddexp(s, s * 0.5)", "s = s.masked_fill(s < -1.37, -9.0)", "s = s.erf()",
    "s = s.atan()", "s = s.abs().add(1.0).log()", "s = s.abs().add(0.5).rsqrt()", "s = s.sin()", "s = s * s",
    "s = s + s", "s = s - s * 0.5", "s = s * (s > 0.111)", "s = s * (s > 0.111).to(s.dtype)", "s = torch.mul(s, {x})",
    "s = torch.add(s, s, alpha={x})", "s = torch.sub({x}, s)", "s = 1.0 / (s.abs() + 1.0)", "s = s.float() * {x}",
    "s = s * torch.tensor({x})", "s = s * torch.tensor([{x}])", "s = s.copysign(-s)", "s = torch.hypot(s, s + 1.0)",
    "s = F.hardtanh(s)", "s = F.elu(s)", "s = F.threshold(s, -1.37, -5.0)", "s = s.clip(min=-1.1)", "s = s.trunc() + s",
    "s = s.frac()", "s = F.dropout(s, 0.0)", "s = F.dropout(s, 0.5, training=False)", "s = s.clone()", "s = +s",
]  # fmt: skip

IN_PLACE = [
    "s *= {x}", "s += {x}", "s -= 0.3", "s /= 1.7", "s.mul_({x})", "s.add_({x})", "s.div_(2.0)", "s.neg_()", "s.tanh_()",
    "s.clamp_(-2.1, 2.3)", "s.relu_()", "s.exp_()", "s.masked_fill_(s < -1.37, -9.0)", "torch.relu_(s)", "s.zero_()",
    "s.fill_({x})", "s.copy_(s * {x})", "s.copy_(s.transpose(-1, -2).clone() if s.shape[-1] == s.shape[-2] else s + 1.0)",
    "s.sub_(s * 0.5)", "s.lerp_(s * 2, 0.25)", "s.addcmul_(s, s, value=0.1)", "s.nan_to_num_()", "s.add_(s)",
    "s.mul_(s)", "s.clamp_max_(2.0)", "with torch.no_grad(): torch.mul(s, {x}, out=s)", "s.detach().mul_({x})", "s.data.mul_({x})",
    "s.detach_()", "F.dropout(s, 0.0, inplace=True)", "F.relu(s, inplace=True)", "s.requires_grad_()",
    "s.data = s.data * {x}", "s.squeeze_(0).unsqueeze_(0) if s.shape[0] == 1 else s", "s.resize_as_(s)",
]  # fmt: skip

MASKS = [
    "s = s.masked_fill(~fit(keep, s, full), float('-inf'))  # KEYS",
    "s = s.masked_fill(~fit(keep, s, full), -5.0)  # KEYS",
    "s = s.masked_fill(fit(keep, s, full).logical_not(), torch.finfo(s.dtype).min)  # KEYS",
    "s.masked_fill_(~fit(keep, s, full), -5.0)  # KEYS",
    "s = torch.where(fit(keep, s, full), s, torch.full_like(s, -3.0))  # KEYS",
    "s = torch.where(fit(keep, s, full), s, -3.0)  # KEYS",
    "s = s + torch.zeros_like(s).masked_fill(~fit(keep, s, full), -7.0)  # KEYS",
    "s = s * fit(keep, s, full)  # KEYS",
    "s = s.tril()", "s = s.triu(1)", "s = s + torch.full_like(s, -4.0).triu(1)",
    "s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -6.0)",
    "s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), float('-inf'))",
    "s = s.masked_fill(torch.arange(s.shape[-1]) > torch.arange(s.shape[-2])[:, None], float('-inf'))",
    "s = s + ramp(s.shape[-1], like=s)", "s = s + ramp(s.shape[-2], 1, like=s)", "s = s * ramp(*s.shape[-2:], like=s)",
    "s = s + ramp(*s.shape, like=s)", "s = s + fit(bias, s, full)  # KEYS", "s += fit(bias, s, full)  # KEYS",
    "s = torch.add(s, fit(bias, s, full), alpha=0.5)  # KEYS", "s.add_(fit(bias, s, full))  # KEYS",
    "s = fit(bias, s, full) - s  # KEYS", "s = s * fit(bias, s, full)  # KEYS",
    "b = fit(bias, s, full) * 1.0; s = s + b; b.mul_(0.0)  # KEYS",
    "b = ramp(s.shape[-1], like=s); s = s + b; b.zero_()",
    "b = torch.zeros_like(s); b = b + fit(bias, s, full); s = s + b  # KEYS",
    "b = s.new_zeros(s.shape); b += fit(bias, s, full); s = s + b  # KEYS",
    "b = s.new_full(s.shape[-2:], -2.0).triu(1); s = s + b",
    "b = (torch.arange(s.shape[-1])[None] - torch.arange(s.shape[-2])[:, None]).to(s.dtype); s = s - 0.1 * b.abs()",
    "b = ramp(64, like=s)[torch.arange(s.shape[-2])[:, None] - torch.arange(s.shape[-1]) + 16]; s = s + b",
]  # fmt: skip

WRITES = [
    "s[..., 0] = 0.5", "s[..., 0, :] = -0.5", "s[..., :, 1:] += 0.5", "s[..., 1:, :] *= 2.0", "s[..., -1:] = s[..., :1]",
    "s[s > 1.37] = 1.0", "s[..., ::2, :] = ramp(s.shape[-1], like=s)", "s[0] = 0.25", "s[-1:] *= {x}",
    "s[fit(keep, s, full).expand_as(s)] = -2.0  # KEYS", "s[..., torch.arange(s.shape[-1]) % 2 == 0] = 0.125",
    "s[..., [0, -1]] = 0.75", "s[..., range(min(s.shape[-2:])), range(min(s.shape[-2:]))] = -3.0",
    "s.diagonal(dim1=-2, dim2=-1).fill_(-3.0)", "s.diagonal(dim1=-2, dim2=-1).mul_({x})",
    "s[..., 1:, :].mul_({x})", "s[..., 0].zero_()", "s.narrow(-1, 0, 1).add_(1.0)", "s.select(-1, 0).sub_(0.5)",
    "s.index_fill_(-1, torch.tensor([0]), -1.0)", "s = s.index_fill(-2, torch.tensor([0]), -1.0)",
    "s = s.scatter(-1, torch.zeros(*s.shape[:-1], 1, dtype=torch.long), -2.0)",
    "s = s.scatter(-1, s.detach().topk(1, -1).indices, 2.0)",
    "s = torch.full_like(s, -8.0).scatter(-1, s.topk(2, -1).indices, s.topk(2, -1).values)",
    "s = s.index_add(-1, torch.tensor([0]), ramp(*s.shape[:-1], 1, like=s))", "s = s.fill_diagonal_(0.5) if s.dim() == 2 else s",
    "s = s.masked_scatter(s > 1.37, torch.zeros_like(s))", "s = s.index_select(-1, torch.arange(s.shape[-1]))",
    "s = s.index_copy(-1, torch.tensor([0]), ramp(*s.shape[:-1], 1, like=s))",
    "s = torch.select_scatter(s, s[..., 0] * 2, -1, 0)", "s = torch.slice_scatter(s, s[..., 1:] * 2, -1, 1)",
    "s = torch.diagonal_scatter(s, torch.zeros_like(s.diagonal(dim1=-2, dim2=-1)), dim1=-2, dim2=-1)",
]  # fmt: skip

CASTS = [
    "s = s.float()", "s = s.to(torch.bfloat16)", "s = s.bfloat16().float()", "s = s.type(torch.float32)",
    "s = s.type_as(q)", "s = s.to(q)", "s = s.to(q.dtype)", "s = s.double()", "s = s.to(v.device)", "s = s.to(dtype=torch.float32)",
    "s = s.float().type_as(s)", "s = s.to(torch.float32, copy=True)", "s = s.cpu()", "s = s.half().float()", "s = s.type(s.dtype)",
]  # fmt: skip

REDUCTIONS = [
    "s = s - s.amax(-1, keepdim=True)", "s = s - s.max(-1, keepdim=True).values", "s = s - s.mean(-1, keepdim=True)",
    "s = s / (s.std(-1, keepdim=True) + 1.0)", "s = s / (s.var(-1, keepdim=True) + 1.0)",
    "s = s - s.logsumexp(-1, keepdim=True)", "s = s / (s.abs().sum(-1, keepdim=True) + 1.0)",
    "s = s / (s.norm(dim=-1, keepdim=True) + 1.0)", "s = F.normalize(s, dim=-1)", "s = F.layer_norm(s, s.shape[-1:])",
    "s = F.rms_norm(s, s.shape[-1:])", "s = s.cumsum(-1) * 0.25", "s = s.flip(-1).cumsum(-1).flip(-1) * 0.25",
    "s = s.sort(-1).values", "s = s.masked_fill(s < s.topk(2, -1).values[..., -1:], -9.0)", "s = s - s.amin(-1, keepdim=True)",
    "s = s - s.median(-1, keepdim=True).values", "s = s.cummax(-1).values", "s = s.cumprod(-1)",
    "s = s - s.sum(-1).unsqueeze(-1) * 0.1", "s = s - torch.amax(s, -1)[..., None]", "s = s - s.amax(-2, keepdim=True)",
    "s = s - s.mean(-2, keepdim=True)", "s = s - s.mean()", "s = s / (s.norm() + 1.0)", "s = s - s.amax()",
    "s = s.cumsum(-2) * 0.25", "s = F.normalize(s, dim=-2)", "s = s - s.mean((-2, -1), keepdim=True)",
    "s = s - s.mean(0, keepdim=True)", "s = s + s.sum(-1, keepdim=True).softmax(-2)", "s = s / s.abs().sum(-1, True).clamp_min(1.0)",
    "s = F.avg_pool1d(s.flatten(0, -3), 3, 1, 1).reshape(s.shape)  # LEADS",
    "s = torch.var_mean(s, -1, keepdim=True)[0] + s", "s = F.layer_norm(s, s.shape[-1:], ramp(s.shape[-1], like=s), ramp(s.shape[-1], like=s))",
    "s = F.glu(torch.cat([s, s], -1), -1)", "s = torch.renorm(s, 2, 0, 2.0)", "s = s - s.argmax(-1, keepdim=True) * 0.1",
    "s = (s - s.mean(-1, True)) * (s.var(-1, unbiased=False, keepdim=True) + 1e-3).rsqrt()",
]  # fmt: skip

# There, and back (``t``; the shape of ``s`` is still known).
VIEWS = [
    ("s.transpose(-1, -2)", "t.transpose(-1, -2)"), ("s.clone()", "t"), ("s.contiguous()", "t"), ("s.detach()", "t"),
    ("s.transpose(-1, -2).contiguous()", "t.transpose(-1, -2)"), ("s.reshape(-1, *s.shape[-2:])", "t.reshape(s.shape)"),
    ("s.view(-1, *s.shape[-2:])", "t.view(s.shape)"), ("s.flatten(0, -2)", "t.view(s.shape)"), ("s.unsqueeze(0)", "t.squeeze(0)"),
    ("s[None]", "t[0]"), ("s.unsqueeze(-3)", "t.squeeze(-3)"), ("s.data", "t"), ("s.movedim(-1, 0)", "t.movedim(0, -1)"),
    ("s.mT", "t.mT"), ("s.flip(-1)", "t.flip(-1)"), ("s.flip(-2)", "t.flip(-2)"), ("s.roll(1, -1)", "t.roll(-1, -1)"),
    ("s.roll(1, -2)", "t.roll(-1, -2)"), ("s.view_as(s)", "t"), ("s.expand_as(s)", "t"), ("s.expand(2, *s.shape)", "t[1]"),
    ("torch.stack(s.unbind(0))", "t"), ("torch.stack(s.unbind(-1), -1)", "t"), ("torch.cat(s.chunk(2, -1), -1)", "t"),
    ("torch.cat(s.split(3, -2), -2)", "t"), ("s.narrow(-2, 0, s.shape[-2])", "t"), ("s.swapaxes(-1, -2)", "t.swapaxes(-1, -2)"),
    ("s.view(*s.shape[:-2], -1)", "t.view(s.shape)"), ("s.flatten(-2)", "t.unflatten(-1, s.shape[-2:])"),
    ("s.flatten()", "t.reshape(s.shape)"), ("s.transpose(0, -2)", "t.transpose(0, -2)"), ("s.transpose(0, -2).contiguous()", "t.transpose(0, -2)"),
    ("s[...]", "t"), ("s[:]", "t"), ("s[..., :, :]", "t"), ("s.alias() if hasattr(s, 'alias') else s", "t"),
    ("s.view(s.shape)", "t"), ("s.reshape(s.shape)", "t"), ("s.to(s.dtype)", "t"), ("s.type(s.dtype)", "t"), ("s.squeeze()", "t.reshape(s.shape)"),
    ("s.permute(*range(s.dim() - 2), -1, -2)", "t.permute(*range(s.dim() - 2), -1, -2)"), ("s.T if s.dim() == 2 else s", "t.T if s.dim() == 2 else t"),
    ("s.swapdims(0, -1)", "t.swapdims(0, -1)"), ("torch.atleast_3d(s)", "t.reshape(s.shape)"), ("s.repeat(2, *[1] * (s.dim() - 1))", "t[: s.shape[0]]"),
    ("s.repeat_interleave(2, 0)", "t[::2]"), ("s.repeat_interleave(2, -2)", "t[..., ::2, :]"), ("s.as_strided(s.shape, s.stride())", "t"),
    ("torch.cat([s, s], -1)", "t[..., : s.shape[-1]]"), ("torch.cat([s, s], -2)", "t[..., s.shape[-2] :, :]"), ("torch.cat([s, s])", "t[: s.shape[0]]"),
    ("F.pad(s, (1, 2))", "t[..., 1:-2]"), ("F.pad(s, (0, 0, 1, 0))", "t[..., 1:, :]"), ("F.pad(s, (0, 1), value=-1.0)", "t[..., :-1]"),
    ("s.swapaxes(-1, -2).clone()", "t.mT"), ("torch.stack([s, s * 2.0])", "t[0]"), ("torch.stack([s, s], -1)", "t.sum(-1)"),
    ("s.unfold(-1, s.shape[-1], 1).squeeze(-2)", "t"), ("s.tile(2)", "t[..., : s.shape[-1]]"), ("torch.broadcast_to(s, s.shape)", "t"),
    ("s.transpose(0, 1)", "t.transpose(0, 1)"), ("s.split([1, s.shape[-1] - 1], -1)[1]", "torch.cat([s[..., :1], t], -1)"),
    ("s.tensor_split(2, -2)[0]", "torch.cat([t, s[..., t.shape[-2] :, :]], -2)"), ("s.index_select(-1, torch.arange(s.shape[-1]))", "t"),
]  # fmt: skip
INNER = ["t = t * {x}", "t.mul_({x})", "t += 0.3", "t.add_(t)", "t = t.tanh()", "t.clamp_(-1.1, 1.3)", "pass", "t[..., 0] = 0.25",
         "t.copy_(t * {x})", "t.zero_()", "s.mul_({x})", "s += 0.3", "s[..., 0] = 0.25", "t = t.softmax(-1)", "t -= t.amax(-1, keepdim=True)"]  # fmt: skip
LATER = [
    "s = {back}",
    "s = s + {back}",
    "s = s * 1.0",
    "s = {back}; s = s * 1.0",
    "s = {back} + 0.0; s.add_(0.5)",
]

# What changes the layout for good.
LAYOUTS = [
    "s = s.reshape(-1, *s.shape[-2:])  # LEADS", "s = s.flatten(0, 1)  # FOUR", "s = s.view(-1, *s.shape[-2:])  # FOUR",
    "s = s.view(*full[:2], *s.shape[-2:])  # THREE", "s = s.unflatten(0, full[:2])  # THREE", "s = s[..., 1:, :]  # ROWS",
    "s = s[..., -1:, :]  # ROWS", "s = s.narrow(-2, 1, s.shape[-2] - 1)  # ROWS", "s = s[0] if s.shape[0] == 1 and s.dim() == 3 else s",
]  # fmt: skip

# A sink, or another key, before softmax; taken away afterwards.
SINKS = [
    ("s = torch.cat([s, sink.view(1, -1, 1, 1).expand(*s.shape[:-1], 1).to(s.dtype)], -1)", "s = s[..., :-1]"),
    ("s = torch.cat([sink.view(1, -1, 1, 1).expand(*s.shape[:-1], 1).to(s.dtype), s], -1)", "s = s[..., 1:]"),
    ("s = F.pad(s, (1, 0))", "s = s[..., 1:]"), ("s = F.pad(s, (0, 2), value=-1.0)", "s = s[..., :-2]"),
    ("s = torch.cat([s, torch.zeros_like(s[..., :1])], -1)", "s = s.narrow(-1, 0, s.shape[-1] - 1)"),
    ("s = torch.cat([s, s.new_zeros(*s.shape[:-1], 3)], -1)", "s = s.split([s.shape[-1] - 3, 3], -1)[0]"),
    ("s = torch.cat([s, s * 0.5], -1)", "s = s.chunk(2, -1)[1]"),
]  # fmt: skip

SOFTMAXES = [
    "s = s.softmax(-1)", "s = F.softmax(s, dim=-1)", "s = torch.softmax(s, -1, dtype=torch.float32)", "s = F.softmax(s, -1, dtype=torch.float32).to(q.dtype)",
    "s = parts.softmax(s)", "s = parts.seen(s)", "s = s.log_softmax(-1).exp()", "s = (s - s.amax(-1, keepdim=True)).exp(); s = s / s.sum(-1, keepdim=True)",
    "s = OwnSoftmax.apply(s)", "s = scripted(s)", "s = sparsemax(s)", "s = quiet_softmax(s)", "s = s.sigmoid()", "s = s.relu(); s = s / (s.sum(-1, True) + 1.0)",
    "s = s.softmax(-2)", "s = s.softmax(-1) * s.softmax(-2)", "s = s.softmax(-1) - 0.3 * (s * 0.5).softmax(-1)", "s = (s - s.logsumexp(-1, True)).exp()",
    "m = s.detach().amax(-1, keepdim=True); s = (s - m).exp(); s /= s.sum(-1, keepdim=True)", "s = F.softmin(-s, -1)", "s = torch.exp(F.log_softmax(s, -1))",
    "s = s.flatten(-2).softmax(-1).view(s.shape)", "s = s / s.shape[-1]", "s = s.softmax(-1); s = s / (1e-3 + s.sum(-2, keepdim=True))",
    "torch.softmax(s.detach(), -1, out=s) if not s.requires_grad else s; s = s.softmax(-1)",
]  # fmt: skip

AUTOGRAD = [
    "s = Same.apply(s)", "s = Halved.apply(s)", "s, u = Two.apply(s, fit(keep, s, full)); s = s + u  # KEYS", "s = s * 1.0; s = Overwrites.apply(s)",
    "s = scripted_step(s)", "s = parts.hooked(s)", "s = parts.dropout(s)", "notes.keep(s)", "notes.hook(s)", "notes.hook(s, 0.5)", "notes.gradient(s, q)",
    "notes.gradient(s, k)", "s = s.detach()", "s = s.detach() + s * 0.5", "s = s + (s.round() - s).detach()", "u = s.detach().softmax(-1); s = s * u",
    "with torch.no_grad(): m = s.amax(-1, keepdim=True)\ns = s - m", "with torch.no_grad(): s = s * {x}", "with torch.no_grad(): s = s.clone()",
    "with torch.no_grad(): u = s * 2.0\ns = s + u", "with torch.no_grad(): s.mul_({x})", "with torch.enable_grad(): s = s * {x}",
    "with torch.no_grad(): u = s.softmax(-1)\nnotes.write(u)", "with torch.set_grad_enabled(True): u = s * 1.0\ns = u",
    "with torch.autocast('cpu', enabled=False): s = s * {x}", "with torch.autocast('cpu', torch.bfloat16): s = s * {x}",
]  # fmt: skip

READS = [
    "with torch.no_grad(): notes.write(s.mean())", "notes.write(s.sum())", "notes.write(float(s.mean()))", "notes.write(s.max().item())", "notes.write(s)",
    "with torch.no_grad(): notes.write(s * 1.0)", "notes.write(s[..., 0])", "notes.write(s.detach().numpy().copy())" , "notes.write(s.tolist())", "notes.write(str(s.dtype))",
    "notes.write(s.requires_grad)", "notes.write(bool((s > 0.111).any()))", "notes.write(s.isnan().any())", "notes.write(tuple(s.shape))", "notes.write(s.is_leaf)",
    "notes.write(s.std(-1))", "notes.write(s.argmax(-1))", "notes.write(torch.isfinite(s).all())", "notes.write(s.detach().float().norm())", "notes.write(len(repr(s)) > 0)",
    "with torch.no_grad(): notes.write(-(s * s.abs().clamp_min(1e-6).log()).sum(-1))", "notes.write(s.grad_fn is None)", "notes.write(s.nonzero())",
    "with torch.inference_mode(): notes.write(float(s.sum()))", "notes.write(torch.equal(s, s))", "notes.write(s.is_contiguous())", "notes.write(s[0].tolist())",
    "notes.write(torch.allclose(s, s))", "assert len(s) == s.shape[0]", "notes.write([float(row.sum()) for row in s])", "notes.write(s.unique().numel())",
]  # fmt: skip
