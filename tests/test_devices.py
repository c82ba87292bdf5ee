"""What kernels of devices that are not here would be given: operators are seen and not run, devices are fake."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import attnpatch
from attnpatch.ledger import Shapes
from attnpatch.policy import Policy
from attnpatch.recording import block_sums
from attnpatch.recording.statistics import MEASURES, Measures, TileRows
from attnpatch.rows import torch_graphs
from attnpatch.rows.evaluate.tiled import TiledEvaluation
from attnpatch.rows.sdpa import as_graph, dense, kernel_choice, logsumexp
from attnpatch.sdpa_call import SdpaCall


class Seen(TorchDispatchMode):
    """Takes the place of fused operators: keeps what they are given, and returns the query and a logsumexp of zeros."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" not in func.__name__:
            return func(*args, **(kwargs or {}))
        self.args = args
        query, nothing = args[0], torch.empty(0)
        rest = (nothing, nothing, 0, 0, nothing, nothing, nothing) if "efficient" not in func.__name__ else ()
        return query.clone(), query.new_zeros(query.shape[:-1]).float(), *(rest or (nothing, nothing))


def given(kernel, call):
    with Seen() as seen:
        logsumexp.OPERATORS["cuda", kernel](call)
    return seen.args


def a_call(width=64, kv_len=40, heads=4, kv_heads=4, q_len=40, mask=None, dtype=torch.float32, **more):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads, q_len, width, generator=generator).to(dtype)
    key, value = (torch.randn(2, kv_heads, kv_len, width, generator=generator).to(dtype) for _ in "kv")
    return SdpaCall(query, key, value, mask, enable_gqa=heads != kv_heads, **more)


# ------------------------------------------------------------------------------------------ operators and their masks


def test_cudnn_is_given_the_number_that_sdpa_gives_it_for_hidden_keys():
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
    mask[0, :, :, :7] = False
    bias = given(3, a_call(mask=mask))[3]
    assert torch.equal(bias == 0, mask) and torch.equal(bias == -65504.0, ~mask)
    # The memory-efficient kernel takes infinities.
    assert torch.equal(given(2, a_call(mask=mask))[3] == -math.inf, (~mask).expand(2, 4, 40, 40))


@pytest.mark.parametrize("width", [36, 64])
def test_flash_is_given_the_tensors_themselves_where_their_width_fits(width):
    call = a_call(width)
    for tensor, own in zip(given(1, call), (call.query, call.key, call.value), strict=False):
        assert tensor.shape[-1] % 8 == 0
        assert (tensor.data_ptr() == own.data_ptr()) == (width % 8 == 0)
        assert torch.equal(tensor[..., :width], own)


@pytest.mark.parametrize("kv_len", [40, 41, 48])
@pytest.mark.parametrize("room", [0, 3, 8])
@pytest.mark.parametrize("kind", ["rows", "heads", "transposed", "broadcast"])
def test_efficient_is_given_masks_whose_rows_are_aligned(kind, room, kv_len):
    """Also those cut from a longer buffer; and what is aligned is not copied."""
    length = kv_len + room
    whole = {
        "rows": lambda: torch.randn(1, 1, 40, length),
        "heads": lambda: torch.randn(2, 4, 40, length),
        "transposed": lambda: torch.randn(1, 1, length, 40).transpose(-2, -1),
        "broadcast": lambda: torch.randn(1, 1, 1, length).expand(1, 1, 40, length),
    }[kind]()
    mask = whole[..., :kv_len]
    found = given(2, a_call(kv_len=kv_len, mask=mask))[3]
    assert torch.equal(found, mask.expand(2, 4, 40, kv_len))
    assert found.stride(-1) == 1 and all(stride % 8 == 0 for stride in found.stride()[:-1])
    fits = kind != "transposed" and length % 8 == 0
    assert (found.data_ptr() == mask.data_ptr()) == fits


class Window(nn.Module):
    """Attention by hand that sees the last 21 keys."""

    def forward(self, x):
        query = x.unflatten(-1, (4, 16)).transpose(1, 2)
        scores = query @ query.transpose(-2, -1) / 4
        places = torch.arange(x.shape[1])
        distance = places[:, None] - places
        scores = scores.masked_fill((distance < 0) | (distance > 20), -math.inf)
        return (scores.softmax(-1) @ query).transpose(1, 2).flatten(2)


def test_windows_of_masks_begin_at_aligned_addresses():
    model, x = Window(), torch.randn(1, 200, 64)
    native, calls = model(x), []
    with attnpatch.patched(model, sites=[""], mode="always", min_tokens=4, rows=32, fuse=True):
        with zoo.watched_sdpa(lambda args, kwargs: calls.append(kwargs)), torch.no_grad():
            got = model(x)
        assert attnpatch.report(model).totals["fused"] == 1
    torch.testing.assert_close(got, native)
    places = [call["key"].storage_offset() // call["key"].stride(-2) for call in calls]
    assert max(places) > 0 and all(place % 16 == 0 for place in places)
    assert all(call["attn_mask"].storage_offset() % 8 == 0 for call in calls)


def wrong(operator):
    def run(call):
        result, found = operator(call)
        return result, found * math.log(2)

    return run


def test_a_sink_does_not_use_a_wrong_logsumexp(monkeypatch):
    class Sink(nn.Module):
        def forward(self, x):
            query = x.unflatten(-1, (4, 16)).transpose(1, 2)
            scores = query @ query.transpose(-2, -1) / 4
            sinks = torch.arange(4.0)[None, :, None, None].expand(*scores.shape[:-1], 1)
            weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
            return (weights @ query).transpose(1, 2).flatten(2)

    model, x = Sink(), torch.randn(1, 64, 64)
    monkeypatch.setattr(logsumexp, "_is_right", {})
    with torch.no_grad():
        native = model(x)
        for is_right in (True, False):
            if not is_right:
                monkeypatch.setattr(logsumexp, "_is_right", {})
                monkeypatch.setitem(logsumexp.OPERATORS, ("cpu", 1), wrong(logsumexp.OPERATORS["cpu", 1]))
            with attnpatch.patched(model, sites=[""], mode="always", min_tokens=4, fuse=True):
                torch.testing.assert_close(model(x), native)
                totals = attnpatch.report(model).totals
            assert (totals["fused"], totals["by_rows"]) == ((1, 0) if is_right else (0, 1))


# ------------------------------------------------------------------------------------------------------ dense on CUDA


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("what", ["plain", "boolean", "additive", "causal", "blind"])
@pytest.mark.parametrize("lengths", [(40, 40), (40, 23), (23, 40)])
def test_dense_of_shared_and_causal_heads(lengths, what, kv_heads, monkeypatch):
    """As CUDA has it, where torch serves float32 heads that share keys in dense math."""
    monkeypatch.setattr(dense, "is_simple", lambda call: True)
    monkeypatch.setattr(as_graph, "fused_choice", lambda call: kernel_choice.MATH_KERNEL)
    q_len, kv_len = lengths
    generator = torch.Generator().manual_seed(1)
    seen = torch.rand(2, 1, q_len, kv_len, generator=generator) > 0.3
    if what == "blind":
        seen[:, :, 3] = False
    mask = {
        "additive": torch.randn(1, 4, q_len, kv_len, generator=generator),
        "plain": None,
        "causal": None,
    }.get(what, seen)
    call = a_call(
        heads=4, kv_heads=kv_heads, q_len=q_len, kv_len=kv_len, mask=mask, is_causal=what == "causal"
    )
    monkeypatch.setattr(as_graph, "is_simple", dense.is_simple)
    with torch.no_grad():
        node = as_graph.graph(call)
        assert isinstance(node, dense.Dense)
        with sdpa_kernel(SDPBackend.MATH):
            native = F.scaled_dot_product_attention(**call.arguments())
        for rows, heads in ((None, None), (7, None), (16, 2)):
            got = TiledEvaluation(node, Policy(mode="always", rows=rows, heads=heads))()
            torch.testing.assert_close(got, native)


def test_dense_serves_float32_heads_that_share_keys_on_cuda():
    with Shapes(), torch.no_grad():
        call = a_call_on("cuda", heads=4, kv_heads=2)
        assert dense.is_simple(call) and dense.is_simple(dataclasses.replace(call, is_causal=True))
    assert not dense.is_simple(a_call(heads=4, kv_heads=2))


def a_call_on(device, heads=4, kv_heads=4, q_len=64, dtype=torch.float32, **more):
    query = torch.empty(1, heads, q_len, 32, device=device, dtype=dtype)
    key = torch.empty(1, kv_heads, q_len, 32, device=device, dtype=dtype)
    return SdpaCall(query, key, key, enable_gqa=heads != kv_heads, **more)


# --------------------------------------------------------------------------------------------------- what is asked of


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_mps_is_not_asked_for_its_kernel():
    """It has no such function, and holds the scores."""
    with FakeTensorMode():
        call = a_call_on("mps")
        with Names() as names:
            assert kernel_choice.fused_choice(call) == kernel_choice.MATH_KERNEL
    assert not names.seen
    call = a_call()
    with Names() as names:
        assert kernel_choice.fused_choice(call) != kernel_choice.MATH_KERNEL
    assert names.seen == ["_fused_sdp_choice.default"]


class CudnnAllowed(TorchFunctionMode):
    """Notes for each call of SDPA whether torch may choose cuDNN."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return func(*args, **(kwargs or {}))


def test_cudnn_is_left_out_of_the_steps_of_a_causal_call():
    """It would build a plan for each number of keys."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    for is_causal in (True, False):
        call = a_call(q_len=96, kv_len=96, is_causal=is_causal)
        node = as_graph.graph(call)
        assert isinstance(node, as_graph.Attend)
        # Its tensors stay where they are.
        node.device, node.merges = torch.device("cuda"), False
        with torch.no_grad(), CudnnAllowed() as allowed:
            got = TiledEvaluation(node, Policy(mode="always", rows=32))()
        assert len(allowed.seen) == 3 and set(allowed.seen) == {before and not is_causal}
        torch.testing.assert_close(got, F.scaled_dot_product_attention(**call.arguments()))
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), kernel_choice.without_cudnn():
        assert torch.backends.cuda.cudnn_sdp_enabled()


class OnMps(torch.Tensor):
    """Elements on the CPU that say they are elsewhere, as on MPS: "meta" is the one other device of every torch."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device="meta"
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return pretended(func, args, kwargs or {})


class Mps(TorchDispatchMode):
    """What is moved there is there from then on."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return pretended(func, args, kwargs or {})


def pretended(func, args, kwargs):
    """An operator on elements that are on the CPU. MPS has no float64, and mixes with no other device."""
    device = kwargs.pop("device", None)
    tensors = [item for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)]
    there = [isinstance(tensor, OnMps) for tensor in tensors]
    is_there = any(there) if device is None else torch.device(device).type == "meta"
    mixed = [
        tensor for tensor, on_mps in zip(tensors, there, strict=True) if on_mps != is_there and tensor.dim()
    ]
    assert not mixed or func in COPIES, f"{func} of two devices"
    args, kwargs = tree_map_only(OnMps, lambda tensor: tensor.inner, (args, kwargs))
    result = func(*args, **kwargs)

    def put(tensor):
        assert tensor.dtype != torch.float64, f"{func} in float64"
        return OnMps(tensor)

    if any(there) and func is COPIES[0]:
        put(result)  # the dtype changes before the device does
    return tree_map_only(torch.Tensor, put, result) if is_there else result


COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


def test_sums_of_mps_become_float64_where_they_are_kept():
    tile = torch.rand(2, 12, 8)
    rows, keys = torch.arange(12) // 5, torch.arange(8) // 4
    found = []
    for inner in (tile, OnMps(tile)):
        sums, kept = (torch.zeros(*shape, dtype=torch.float64) for shape in ((1, 12, 3), (2, 12, 3)))
        with Mps():
            block_sums.add_tile(sums, inner, rows, keys)
            block_sums.add_tile(kept, inner, torch.arange(12), keys)
            found.append((sums, kept, block_sums.key_sums(sums, inner, keys)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_measures_of_mps_are_summed_on_the_cpu():
    tile, factors = torch.rand(2, 3, 8), torch.rand(2, 3)
    found = [Measures.empty(MEASURES, 1, 2, 8) for _ in range(2)]
    with Mps():
        for measures, wrap in zip(found, (lambda t: t, OnMps), strict=True):
            rows = TileRows(torch.ones(3, dtype=torch.float64), torch.arange(3), 0, 0)
            measures.add(0, [0, 1], wrap(tile), wrap(factors), rows)
    for name in MEASURES:
        torch.testing.assert_close(getattr(found[0], name), getattr(found[1], name))


def test_nothing_is_captured_of_what_a_cuda_graph_records(monkeypatch):
    case = zoo.BY_NAME["llama"]
    model = case.build("sdpa")
    attnpatch.apply(model)
    native = case.run(model, case.inputs("none"))
    with monkeypatch.context() as patched, attnpatch.capture(model, blocks=attnpatch.Blocks.fixed(8)) as maps:
        patched.setattr(torch_graphs, "is_recorded", lambda: True)
        got = case.run(model, case.inputs("none"))
    assert all(zoo.equal_with_nan(got[name], native[name]) for name in native)
    assert [site.summed_by for site in attnpatch.report(model).sites] == [
        {"nothing (a CUDA graph is recorded)": 1}
    ] * 2
    with pytest.raises(attnpatch.errors.CaptureError, match="nothing was captured"):
        _ = maps.block_map
    attnpatch.remove(model)
    assert not torch_graphs.is_recorded()
