"""A call like one that stayed native runs at once; what is counted, and what happens when memory gets short, stays."""

import copy

import pytest
import torch
from test_known_facts import llama, tokens
from torch import nn

import attnpatch
from attnpatch import Blocks
from attnpatch.patching import known_calls
from attnpatch.rows.creation import positions
from attnpatch.rows.mode import RowsMode

LONG = 40


@pytest.fixture
def watched(monkeypatch):
    """The sites' calls that were watched."""
    seen = []
    original = RowsMode.__enter__

    def enter(self):
        seen.append(self.call.counters.name)
        return original(self)

    monkeypatch.setattr(RowsMode, "__enter__", enter)
    return seen


def patched(implementation="sdpa", **policy):
    return attnpatch.apply(llama(implementation), **{"min_tokens": 8, "min_free": "1MB"} | policy)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_second_call_is_not_watched(implementation, watched):
    model, ids = patched(implementation), tokens(LONG)
    native = llama(implementation)(ids).logits
    assert torch.equal(model(ids).logits, native) and len(watched) == 2
    one = copy.deepcopy(attnpatch.report(model).totals)
    assert torch.equal(model(ids).logits, native) and len(watched) == 2
    two = attnpatch.report(model).totals
    for name in ("native", "fused", "by_rows"):
        assert two[name] == 2 * one[name]
    assert str(attnpatch.report(model)).count("memory" if implementation == "eager" else "fused kernel") >= 1


@pytest.fixture
def models_watched(monkeypatch):
    """The model's calls whose masks and positions were watched."""
    seen = []
    original = positions.watched

    def watched(call):
        seen.append(call)
        return original(call)

    monkeypatch.setattr(positions, "watched", watched)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_second_call_of_a_model_is_not_watched(implementation, models_watched):
    model, ids = patched(implementation), tokens(LONG)
    first = model(ids).logits
    assert torch.equal(model(ids).logits, first) and len(models_watched) == 1
    model(tokens(LONG + 1))
    assert len(models_watched) == 2


@torch.no_grad()
def test_a_model_that_defers_its_masks_is_watched(monkeypatch, models_watched):
    model, ids = patched("eager"), tokens(LONG)
    monkeypatch.setenv("ATTNPATCH_FREE_MEMORY", "900KB")
    for _ in range(2):
        model(ids)
    assert len(models_watched) == 2 and attnpatch.report(model).totals["by_rows"] == 4


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_mask_in_the_shape_of_one_that_masked_nothing(implementation, monkeypatch, models_watched):
    """If it might not fit, the call is watched, so that the mask is made by rows."""
    model, ids = patched(implementation), tokens(1500)
    mask = torch.ones_like(ids)
    for free, times in (("1GB", 1), ("1GB", 1), ("30MB", 2)):
        monkeypatch.setenv("ATTNPATCH_FREE_MEMORY", free)
        model(ids, attention_mask=mask)
        mask = mask.index_fill(1, torch.tensor([0]), 0)
        assert len(models_watched) == times


@torch.no_grad()
def test_a_model_called_by_another_one_is_watched_under_its_own_policy(models_watched):
    """As long as the outer one is watched."""
    outer, inner, ids = patched(), patched(min_tokens=10), tokens(LONG)
    outer.model.layers[0].register_forward_pre_hook(lambda *_: inner(ids) and None)
    minima = []
    for _ in range(3):
        outer(ids)
        minima.append([call.policy.min_tokens for call in models_watched])
        models_watched.clear()
    assert minima == [[8, 10], [10], []]


CHANGES = {
    "a longer text": lambda model, ids: model(tokens(LONG + 1)),
    "another dtype": lambda model, ids: model.double()(ids),
    "training": lambda model, ids: model.train()(ids),
    "gradients": lambda model, ids: torch.enable_grad()(model)(ids),
    "a mask": lambda model, ids: model(
        ids, attention_mask=torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0)
    ),
    "weights": lambda model, ids: model(ids, output_attentions=True),
    "another implementation": lambda model, ids: (model.set_attn_implementation("eager"), model(ids)),
    "autocast": lambda model, ids: torch.autocast("cpu", torch.bfloat16)(model)(ids),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_other_calls_are_watched(change, watched):
    model, ids = patched(), tokens(LONG)
    model(ids), model(ids)
    assert len(watched) == 2
    CHANGES[change](model, ids)
    assert len(watched) > 2


@torch.no_grad()
def test_a_longer_cache_is_another_call(watched):
    model = patched()
    first = model(tokens(LONG)).past_key_values
    other = model(tokens(LONG + 20)).past_key_values
    before = len(watched)
    model(tokens(16), past_key_values=first)
    model(tokens(16), past_key_values=other)
    assert len(watched) - before == 4


@torch.no_grad()
@pytest.mark.parametrize("free", ["900KB", "2MB"])
def test_memory_gets_short_for_a_module_without_masks(free, monkeypatch, watched):
    module, q = Switching(), torch.randn(1, 2, 200, 8)
    native = module(q, q, q)
    attnpatch.apply(module, sites=[""], min_tokens=8, min_free="1MB", headroom=0.02)
    monkeypatch.setenv("ATTNPATCH_FREE_MEMORY", "1GB")
    for _ in range(3):
        module(q, q, q)
    assert len(watched) == 1
    monkeypatch.setenv("ATTNPATCH_FREE_MEMORY", free)
    assert torch.equal(module(q, q, q), native)
    assert attnpatch.report(module).totals["by_rows"] == 1


@torch.no_grad()
@pytest.mark.parametrize("free", ["900KB", "2MB"])
def test_memory_gets_short(free, monkeypatch):
    """Below the floor, and too little for what the call took."""
    model, ids = patched("eager", headroom=0.02), tokens(200)
    native = llama("eager")(ids).logits
    monkeypatch.setenv("ATTNPATCH_FREE_MEMORY", "1GB")
    for _ in range(3):
        model(ids)
    assert attnpatch.report(model).totals["by_rows"] == 0
    monkeypatch.setenv("ATTNPATCH_FREE_MEMORY", free)
    assert torch.equal(model(ids).logits, native)
    assert attnpatch.report(model).totals["by_rows"] == 2


@torch.no_grad()
def test_a_mask_of_a_fused_kernel_counts(monkeypatch, watched):
    """The kernel converts it: without memory for that, the call is watched, so that by rows can answer."""
    model, ids = patched(headroom=0.02), tokens(200)
    mask = torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0)
    monkeypatch.setenv("ATTNPATCH_FREE_MEMORY", "1GB")
    model(ids, attention_mask=mask)
    before = len(watched)
    model(ids, attention_mask=mask)
    assert len(watched) == before
    monkeypatch.setenv("ATTNPATCH_FREE_MEMORY", "20MB")
    model(ids, attention_mask=mask)
    assert len(watched) > before


@torch.no_grad()
def test_another_policy():
    model, ids = patched("eager"), tokens(LONG)
    for _ in range(2):
        model(ids)
    attnpatch.apply(model, mode="always")
    model(ids)
    assert attnpatch.report(model).totals["by_rows"] == 2
    attnpatch.apply(model, fuse=True, min_tokens=8)
    model(ids)
    assert attnpatch.report(model).totals["fused"] == 2


@torch.no_grad()
def test_a_capture_sees_known_calls():
    model, ids = patched(), tokens(LONG)
    for _ in range(2):
        model(ids)
    with attnpatch.capture(model, Blocks.fixed(8)) as maps:
        model(ids)
    assert len(maps) == 1 and not maps.left_out


@torch.no_grad()
def test_now_and_then_a_known_call_is_watched(watched, monkeypatch):
    monkeypatch.setattr(known_calls, "AGAIN", 3)
    model, ids = patched(), tokens(LONG)
    for _ in range(12):
        model(ids)
    assert len(watched) == 2 * 3


class Switching(nn.Module):
    """Attention that becomes larger at some time, which its arguments do not show."""

    def __init__(self):
        super().__init__()
        self.is_large = False

    def forward(self, q, k, v):
        if self.is_large:
            k, v = k.repeat(1, 1, 50, 1), v.repeat(1, 1, 50, 1)
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v


@torch.no_grad()
def test_an_object_of_unknown_kind_is_watched(watched):
    class Box:
        pass

    class Attention(nn.Module):
        def forward(self, q, k, v, box=None):
            return (q @ k.transpose(-2, -1)).softmax(-1) @ v

    module = Attention()
    attnpatch.apply(module, sites=[""], min_tokens=8, min_free="1MB")
    q = torch.randn(1, 2, LONG, 8)
    for _ in range(3):
        module(q, q, q, box=Box())
    assert len(watched) == 3
    for _ in range(3):
        module(q, q, q, box=None)
    assert len(watched) == 4


@torch.no_grad()
def test_a_change_that_arguments_do_not_show(watched):
    """It is noticed after a number of calls; until then its own code runs, and the result is right."""
    module = Switching()
    attnpatch.apply(module, sites=[""], min_tokens=8, min_free="1MB", headroom=0.5)
    q = torch.randn(1, 2, LONG, 8)
    module(q, q, q)
    module.is_large = True
    wanted = Switching()
    wanted.is_large = True
    for _ in range(known_calls.AGAIN + 1):
        assert torch.equal(module(q, q, q), wanted(q, q, q))
    assert len(watched) == 2


def test_gradients():
    ids, grads = tokens(LONG), []
    for mode in ("never", "auto"):
        model = patched("eager", mode=mode)
        for _ in range(3):
            model.zero_grad()
            model(ids).logits.square().mean().backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert torch.equal(*grads)
