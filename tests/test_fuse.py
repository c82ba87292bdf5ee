"""Recipes handed to the fused kernel: no farther from float64 than the host's own run, and what was not is named."""

import copy
import dataclasses
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import test_matmul_properties as spelled
import torch
import torch.nn.functional as F
import zoo
from hypothesis import example, given, settings
from test_gradients import gradients
from torch import nn
from zoo import by_rows

import attnpatch
from attnpatch.rows.fusion import flex

# Two evaluations that are equally good differ a little: over the cases below the root mean square of the fused run's
# error came to 0.97 to 1.09 of the native one's in float32, and to 0.77 to 0.98 in bfloat16.
SLACK = {torch.float32: 1.15, torch.bfloat16: 1.0}


def obstacles(model: nn.Module) -> dict[str, int]:
    """What kept recipes from the fused kernel, over all sites."""
    found: dict[str, int] = {}
    for site in attnpatch.report(model).sites:
        for step, count in site.not_fused.items():
            found[step] = found.get(step, 0) + count
    return found


def error(found: dict, exact: dict) -> float:
    """Root mean square distance over all tensors; both have to be NaN in the same places."""
    squares, count = 0.0, 0
    for name, tensor in exact.items():
        if tensor.is_floating_point():
            known = ~(tensor.isnan() | found[name].isnan())
            distance = (found[name].double() - tensor.double())[known]
            squares, count = squares + distance.square().sum().item(), count + distance.numel()
    return math.sqrt(squares / max(1, count))


def run_beside(name: str, padding: str, dtype: torch.dtype = torch.float32, **policy):
    """A case natively, fused, and in float64; the fused run's report totals and obstacles."""
    case = zoo.BY_NAME[name]
    model = case.build(dtype=dtype)
    native = case.run(model, case.inputs(padding, dtype))
    exact = case.run(copy.deepcopy(model).double(), case.inputs(padding, torch.float64))
    with by_rows(model, case, fuse=True, **policy):
        got = case.run(model, case.inputs(padding, dtype))
        totals, steps = attnpatch.report(model).totals, obstacles(model)
    for key, tensor in native.items():
        assert torch.equal(tensor.isnan(), got[key].isnan()), key
    return native, got, exact, totals, steps


# Case, padding, and the step that stands in the way.
CASES = [
    ("llama", "none", None),
    ("llama", "left", None),
    ("mistral", "right", None),
    ("gemma2", "right", "tanh (softcap)"),
    ("gpt_oss", "left", None),
    ("gptj", "left", None),
    ("gpt2", "none", None),
    ("bloom", "right", None),
    ("mpt", "left", None),
    ("opt", "none", None),
    ("bert", "right", None),
    ("deberta_v2", "right", None),
    ("deberta", "left", None),
    ("xlnet", "none", None),
    ("t5", "right", None),
    ("whisper", "none", None),
    ("einsum", "cross", None),
    ("rows_last", "left", None),
    ("talking_heads", "none", "einsum"),
    ("manual_softmax", "none", "div"),
    ("sigmoid", "none", "sigmoid"),
    ("multihead_bias_kv", "left", None),
]


@pytest.mark.parametrize(("name", "padding", "step"), CASES)
def test_models(name, padding, step):
    native, got, exact, totals, steps = run_beside(name, padding)
    assert error(got, exact) <= SLACK[torch.float32] * error(native, exact)
    if step is None:
        assert totals["fused"] > 0 and totals["by_rows"] == 0 and not steps, (totals, steps)
    else:
        assert totals["fused"] == 0 and totals["by_rows"] > 0 and set(steps) == {step}, (totals, steps)
        # What is not recognised is as it was: the same to the last bit.
        assert all(zoo.equal_with_nan(got[key], native[key]) for key in native)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "bloom", "t5", "deberta_v2", "gptj"])
def test_bfloat16(name):
    native, got, exact, totals, _ = run_beside(name, "left", torch.bfloat16)
    assert totals["fused"] > 0 and totals["by_rows"] == 0, totals
    assert error(got, exact) <= SLACK[torch.bfloat16] * error(native, exact)


@pytest.mark.parametrize("rows", [64, 40])
@pytest.mark.parametrize("name", ["bloom", "gpt_oss", "mistral"])
def test_steps(name, rows):
    """The mask comes in steps, and the steps are of one result."""
    _, whole, _, totals, _ = run_beside(name, "left")
    _, got, *_ = run_beside(name, "left", rows=rows, heads=2)
    assert totals["fused"] > 0
    for key, tensor in whole.items():
        torch.testing.assert_close(got[key], tensor, atol=2e-5, rtol=1e-4, equal_nan=True)


# ------------------------------------------------------------------------------------- every spelling

READ = {
    "scale": sorted(set(spelled.SCALES) - {"softcap", "clamp"}),
    "mask": sorted(set(spelled.MASKS) - {"where_bias"}),
    "softmax": ["method", "function", "functional", "float32", "upcast", "sinks"],
    "after": ["none", "dropout", "dropout_module", "contiguous"],
}


@settings(max_examples=150)
@given(
    spelled.spellings(), st.fixed_dictionaries({key: st.sampled_from(values) for key, values in READ.items()})
)
@example(spelled.Spelling(masked_rows=True), {"mask": "masked_fill_least"})
@example(spelled.Spelling(masked_rows=True, dtype=torch.float16), {"mask": "masked_fill_least"})
@example(spelled.Spelling(masked_rows=True), {"mask": "add"})
@example(spelled.Spelling(masked_rows=True, product="baddbmm_bias", values="bmm_view"), {"softmax": "sinks"})
def test_any_spelling(spelling, choice):
    """No farther from float64 than the module itself; rows in which nothing is seen are what they are natively."""
    spelling = dataclasses.replace(spelling, **choice)
    if spelling.mask == "minus":
        # Off all keys of a row it leaves three decimals of a score, in whatever order it is added.
        spelling = dataclasses.replace(spelling, masked_rows=False)
    report = spelled.check(spelling, fuse=True)
    usual = min(spelling.q_len, spelling.kv_len) > 1 and spelling.product != "key_by_query"
    if report is not None and usual:
        assert report.totals["fused"] == 1 and report.totals["by_rows"] == 0, report


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lowest", [True, False])
def test_rows_that_see_nothing(dtype, lowest):
    """Uniform where the mask that is added is finite and swallows the scores, not a number where it is infinite."""
    mask = torch.zeros(70, 70, dtype=dtype)
    mask[:, 50:] = mask[:9] = torch.finfo(dtype).min if lowest else -math.inf
    model, inputs = Model(lambda scores: scores + mask), [tensor.to(dtype) for tensor in operands()]
    native = model(*inputs)
    with attnpatch.patched(model, mode="always", fuse=True):
        got = model(*inputs)
        assert attnpatch.report(model).totals["fused"] == 1
    if lowest:
        mean = inputs[2].double().mean(-2, keepdim=True).expand(-1, -1, 9, -1)
        torch.testing.assert_close(got[..., :9, :].double(), mean, atol=torch.finfo(dtype).eps, rtol=0.01)
    torch.testing.assert_close(got, native, atol=8 * torch.finfo(dtype).eps, rtol=0.01, equal_nan=True)


# ---------------------------------------------------------------------------------- what stands in the way


class Written(nn.Module):
    """Attention with one step given: ``before`` on scores, ``after`` on probabilities."""

    def __init__(self, before=None, after=None):
        super().__init__()
        self.before, self.after = before or (lambda scores: scores), after or (lambda weights: weights)

    def forward(self, query, key, value):
        scores = self.before(query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]))
        return self.after(scores.softmax(-1)) @ value


class Model(nn.Module):
    """A model with one site."""

    def __init__(self, *steps):
        super().__init__()
        self.attention = Written(*steps)

    def forward(self, *args):
        return self.attention(*args)


attnpatch.register(Written)


def operands(length: int = 70, heads: int = 3, width: int = 16) -> list[torch.Tensor]:
    return [zoo.floats(2, heads, length, width, seed=seed) for seed in (1, 2, 3)]


LEARNED = nn.Parameter(torch.zeros(70, 70))


def _softcap(scores):
    return torch.tanh(scores / 5) * 5


def _no_grad(scores):
    with torch.no_grad():
        return scores * 2.0


STEPS = {
    "tanh (softcap)": (_softcap, None),
    "dropout": (None, lambda weights: F.dropout(weights, 0.1)),
    "mul": (lambda scores: scores * zoo.floats(70, 70), None),
    "masked_fill with -5": (lambda scores: scores.masked_fill(zoo.floats(70, 70) > 0, -5.0), None),
    "clamp": (lambda scores: scores.clamp(-1, 1), None),
    "nan_to_num": (None, lambda weights: weights.nan_to_num(0.0)),
    "topk": (lambda scores: scores.masked_fill(scores < scores.topk(5).values[..., -1:], -math.inf), None),
    "a bias that needs a gradient": (lambda scores: scores + LEARNED, None),
    "mul (under no_grad)": (_no_grad, None),
    "a bias that mixes rows or heads": (lambda scores: scores + (scores * 0).mean(1, keepdim=True), None),
}


@pytest.mark.parametrize("step", STEPS)
def test_what_is_not_recognised_is_named(step):
    model, inputs = Model(*STEPS[step]), operands()
    inputs[0].requires_grad_()
    torch.manual_seed(0)
    with attnpatch.patched(model, mode="always"):
        expected = model(*inputs)
    torch.manual_seed(0)
    with attnpatch.patched(model, mode="always", fuse=True):
        got = model(*inputs)
        report = attnpatch.report(model)
    assert torch.equal(got, expected)
    assert report.totals["fused"] == 0 and report.totals["by_rows"] == 1
    (found,) = report.sites[0].not_fused
    assert found == step or step in ("topk", "a bias that mixes rows or heads")
    assert f"by rows, not fused, because of: {found} x1" in str(report)


# ------------------------------------------------------------------------- gradients, capture, autocast, the rule


@pytest.mark.parametrize("name", ["llama", "bert", "gptj", "bloom", "einsum"])
def test_gradients(name):
    """No farther from float64 than the native backward pass."""
    case = zoo.BY_NAME[name]
    model, padding = case.build(), "right"
    exact = gradients(copy.deepcopy(model).double(), case.inputs(padding, torch.float64))
    native = gradients(model, case.inputs(padding))
    for policy in ({}, {"rows": 40, "heads": 2}):
        with by_rows(model, case, fuse=True, **policy):
            got = gradients(model, case.inputs(padding))
            totals = attnpatch.report(model).totals
        assert totals["fused"] > 0 and totals["by_rows"] == 0, totals
        assert list(got) == list(exact)
        assert error(got, exact) <= SLACK[torch.float32] * error(native, exact)


@pytest.mark.parametrize(
    ("name", "step"), [("t5", "a bias that needs a gradient"), ("gpt_oss", "a bias that needs a gradient")]
)
def test_gradients_that_no_kernel_gives(name, step):
    """Those of a bias and of a sink: by rows."""
    case = zoo.BY_NAME[name]
    model = case.build()
    exact = gradients(copy.deepcopy(model).double(), case.inputs("none", torch.float64))
    native = gradients(model, case.inputs())
    with by_rows(model, case, fuse=True):
        got = gradients(model, case.inputs())
        assert set(obstacles(model)) == {step}
    assert error(got, exact) <= SLACK[torch.float32] * error(native, exact)


@pytest.mark.parametrize(("name", "padding", "fused"), [("llama", "none", True), ("bert", "right", False)])
def test_captured(name, padding, fused):
    """Where the mask is causal or none the kernel's logsumexp serves, and elsewhere the recipe; the maps are the same."""
    case = zoo.BY_NAME[name]
    model, maps = case.build(), []
    for policy in ({"mode": "never"}, {"mode": "always", "fuse": True}):
        with (
            attnpatch.patched(model, **policy),
            attnpatch.capture(model, attnpatch.Blocks.fixed(16)) as captured,
        ):
            case.run(model, case.inputs(padding))
            totals = attnpatch.report(model).totals
        maps.append(captured.block_map.to_numpy())
    assert totals["captured"] == 2 and totals["fused" if fused else "by_rows"] == 2, totals
    np.testing.assert_allclose(maps[1], maps[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gptj", "bloom"])
def test_autocast(name):
    """What autocast makes of the products is what the kernel is given."""
    case = zoo.BY_NAME[name]
    model, inputs = case.build(), case.inputs("left")
    exact = case.run(copy.deepcopy(model).double(), case.inputs("left", torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        native = case.run(model, inputs)
        with by_rows(model, case, fuse=True):
            got = case.run(model, inputs)
            totals = attnpatch.report(model).totals
    assert totals["fused"] > 0 and totals["by_rows"] == 0
    assert {key: tensor.dtype for key, tensor in got.items()} == {
        key: tensor.dtype for key, tensor in native.items()
    }
    assert error(got, exact) <= SLACK[torch.bfloat16] * error(native, exact)


def test_when():
    """Whatever memory is free, but not below ``min_tokens`` nor under ``never``; without the field it stays native."""
    model, inputs = Model(), operands(70)
    expected = model(*inputs)
    for policy, count in (
        ({"min_tokens": 69, "fuse": True}, "fused"),
        ({"min_tokens": 70, "fuse": True}, "native"),
        ({"mode": "never", "fuse": True}, "native"),
        ({"min_tokens": 69}, None),
        ({"mode": "always"}, "by_rows"),
    ):
        with attnpatch.patched(model, **policy):
            got = model(*inputs)
            totals = attnpatch.report(model).totals
        assert count is None or totals[count] == 1, (policy, totals)
        assert not totals["fused"] or policy.get("fuse")
        if count != "fused":
            assert torch.equal(got, expected)
        torch.testing.assert_close(got, expected)


def test_values_of_another_width():
    """Columns of zeros make one width of two, which kernels ask for."""
    model, (query, key, _) = Model(), operands()
    for width in (1, 5, 24):
        value = zoo.floats(2, 3, 70, width, seed=4)
        with attnpatch.patched(model, mode="always", fuse=True):
            got = model(query, key, value)
            assert attnpatch.report(model).totals["fused"] == 1
        torch.testing.assert_close(got, model(query, key, value))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("padding", ["none", "left"])
def test_softcap_where_there_is_flex_attention(padding, monkeypatch):
    """On a device that has it; here it runs uncompiled, which holds all scores and computes the same."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(flex, "DEVICES", frozenset(["cpu"]))
    monkeypatch.setattr(flex, "compiled", lambda: flex_attention)
    native, got, exact, totals, _ = run_beside("gemma2", padding)
    assert totals["fused"] == 2 and totals["by_rows"] == 0, totals
    assert error(got, exact) <= SLACK[torch.float32] * error(native, exact)
