"""Steps that keep query rows apart: the same bits as natively, no score matrix made, and gradients to rounding."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import attnpatch

N, HEADS = 96, 4


class Largest(TorchDispatchMode):
    """The most elements that the memory of any one result has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else [result]:
            if type(part) is torch.Tensor:
                storage = part.untyped_storage().nbytes() // part.element_size()
                self.elements = max(self.elements, storage)
        return result


class Attention(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def forward(self, query, key, value):
        return self.step(query @ key.transpose(-1, -2)).softmax(-1) @ value


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, HEADS, N, 16, generator=generator).to(dtype) for _ in range(3)]


def gradients(step, tensors):
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    result = Attention(step)(*tensors)
    weights = torch.linspace(-1.0, 1.0, result.numel(), dtype=result.dtype).sin().view_as(result)
    return torch.autograd.grad(result, tensors, weights)


def by_rows(step, tensors):
    """The result of ``step`` inside attention by rows, what was materialised, and the most elements of a tensor."""
    module = Attention(step)
    with torch.no_grad(), attnpatch.patched(module, mode="always", rows=16), Largest() as largest:
        result = module(*tensors)
        report = attnpatch.report(module)
    assert report.totals["by_rows"]
    return result, dict(report.sites[0].materialised_by), largest.elements


def check(step, dtype):
    tensors = inputs(dtype)
    with torch.no_grad():
        expected = Attention(step)(*tensors)
    result, materialised, largest = by_rows(step, tensors)
    assert not materialised
    assert result.dtype == expected.dtype
    assert torch.equal(result, expected)
    # All scores have 2 x HEADS x N x N elements; steps of 16 rows a sixth of that.
    assert largest <= 2 * HEADS * N * N // 4


def check_gradients(step):
    tensors = [tensor.double() for tensor in inputs()]
    expected = gradients(step, tensors)
    module = Attention(step)
    with attnpatch.patched(module, mode="always", rows=16):
        copies = [tensor.clone().requires_grad_() for tensor in tensors]
        result = module(*copies)
        weights = torch.linspace(-1.0, 1.0, result.numel(), dtype=result.dtype).sin().view_as(result)
        found = torch.autograd.grad(result, copies, weights)
    for mine, native in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, native, rtol=1e-9, atol=1e-11)


ASKS = {
    "new_tensor": lambda a: a.new_tensor(0.5),
    "new_zeros": lambda a: a.new_zeros(1),
    "new_ones": lambda a: a.new_ones((1,)),
    "new_full": lambda a: a.new_full((1,), 0.5),
    "new_empty": lambda a: a.new_empty(1).zero_(),
    "new_zeros of all": lambda a: a.new_zeros(a.shape),
    "new_full of all": lambda a: a.new_full(a.size(), 0.25),
    "zeros_like": lambda a: torch.zeros_like(a, memory_format=torch.preserve_format, layout=torch.strided),
    "ones_like": lambda a: torch.ones_like(a, device=a.device, requires_grad=False),
    "full_like": lambda a: torch.full_like(a, fill_value=0.5, dtype=torch.float32),
    "type()": lambda a: torch.ones(1).type(a.type()),
    "type of one's own": lambda a: torch.ones(1) * (a.type() == "torch.FloatTensor"),
    "type_as": lambda a: torch.ones(1).type_as(a),
    "result_type": lambda a: torch.ones(1, dtype=torch.result_type(a, 1.0)),
    "is_floating_point": lambda a: torch.ones(1) * torch.is_floating_point(a) * a.is_floating_point(),
    "is_complex, is_signed": lambda a: torch.ones(1) * (a.is_complex() + a.is_signed()),
    "is_pinned, is_shared, is_conj": lambda a: torch.ones(1) * (a.is_pinned() + a.is_shared() + a.is_conj()),
    "is_tensor": lambda a: torch.ones(1) * torch.is_tensor(a),
    "finfo": lambda a: torch.ones(1) * torch.finfo(a.dtype).eps,
    "promote_types": lambda a: torch.ones(1, dtype=torch.promote_types(a.dtype, torch.float16)),
    "numel": lambda a: torch.ones(1) / torch.numel(a),
    "hash": lambda a: torch.ones(1) * (hash(a) == hash(a)) * (id(a) == id(a)),
    "get_device": lambda a: torch.ones(1) * a.get_device(),
    "dim_order": lambda a: torch.ones(1) * len(a.dim_order()),
}


@pytest.mark.parametrize("name", ASKS)
def test_asking_computes_nothing(name):
    check(lambda a: a + ASKS[name](a), torch.float32)


WITHIN = {
    "layer_norm": lambda a: F.layer_norm(a, (N,), torch.linspace(0.5, 2, N).to(a), torch.ones(N).to(a)),
    "layer_norm over heads": lambda a: F.layer_norm(a.permute(0, 2, 3, 1), (HEADS,)).permute(0, 3, 1, 2),
    "nn.LayerNorm": lambda a: nn.LayerNorm(N, dtype=a.dtype)(a),
    "rms_norm": lambda a: F.rms_norm(a, [N]),
    "std": lambda a: a / a.std(-1, keepdim=True),
    "std over heads": lambda a: a / a.std(1, keepdim=True),
    "var_mean": lambda a: (
        (a - torch.var_mean(a, -1, keepdim=True)[1]) / torch.var_mean(a, -1, keepdim=True)[0]
    ),
    "std_mean": lambda a: a / torch.std_mean(a, dim=3, keepdim=True, correction=0)[0],
    "normalize": lambda a: F.normalize(a, dim=-1),
    "normalize over heads": lambda a: F.normalize(a, 1.0),
    "norm": lambda a: a / a.norm(dim=-1, keepdim=True),
    "vector_norm": lambda a: a / torch.linalg.vector_norm(a, 1, dim=-1).unsqueeze(-1),
    "linalg.norm": lambda a: a / torch.linalg.norm(a, dim=-1, keepdim=True),
    "flip": lambda a: a.flip(-1),
    "flip of heads and keys": lambda a: torch.flip(a, dims=(1, -1)),
    "roll": lambda a: a.roll(1, -1),
    "roll of heads and keys": lambda a: torch.roll(a, (1, 2), dims=(1, 3)),
    "aminmax": lambda a: a - torch.aminmax(a, dim=-1, keepdim=True).min,
    "median": lambda a: a - a.median(-1, keepdim=True).values,
    "kthvalue": lambda a: a.masked_fill(a < a.kthvalue(40, -1, True).values, -1e9),
    "quantile": lambda a: a.masked_fill(a < a.float().quantile(0.5, -1, keepdim=True), -1e9),
    "mode": lambda a: a - a.round().mode(-1, True)[0],
    "cummax": lambda a: a.cummax(-1)[0],
    "cumprod": lambda a: a.sigmoid().cumprod(-1),
    "logcumsumexp": lambda a: a.logcumsumexp(-1),
    "diff": lambda a: F.pad(a.diff(dim=-1), (0, 1)),
    "argsort": lambda a: a * (a.argsort(-1) < 20),
    "nanmean": lambda a: a - a.nanmean(-1, keepdim=True),
    "count_nonzero": lambda a: a / a.count_nonzero(-1).unsqueeze(-1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", WITHIN)
def test_steps_along_keys_and_heads(name, dtype):
    check(WITHIN[name], dtype)


@pytest.mark.parametrize("name", WITHIN)
def test_gradients_of_steps_along_keys_and_heads(name):
    check_gradients(WITHIN[name])


@pytest.mark.parametrize("step", [lambda a: a / a.std(-2, keepdim=True), lambda a: a / a.norm()])
def test_what_mixes_rows_is_counted(step):
    tensors = inputs()
    module = Attention(step)
    expected = module(*tensors)
    with attnpatch.patched(module, mode="always"):
        assert torch.equal(module(*tensors), expected)
        assert attnpatch.report(module).sites[0].materialised_by
