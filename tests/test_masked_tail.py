"""Keys that a mask hides from all rows of a step are left out: the same bits, less work, and the same maps."""

import pytest
import torch
import transformers
from torch import nn

import attnpatch
from attnpatch import Blocks
from attnpatch.rows.evaluate import key_units, masked_tail

LENGTH = 1536
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip
GPT2 = {"n_layer": 1, "n_head": 4, "n_embd": 32, "n_positions": 4096, "vocab_size": 97}


@pytest.fixture
def steps(monkeypatch):
    """For each step whose keys were looked at: the number of keys that it was computed with."""
    seen = []
    original = masked_tail.MaskedTail.value

    def value(self, run, tile):
        result, own = original(self, run, tile)
        seen.append(own.get(self.keys, (0, self.keys.size))[1])
        return result, own

    monkeypatch.setattr(masked_tail.MaskedTail, "value", value)
    monkeypatch.setattr(masked_tail, "_same", {})
    return seen


def model_of(name, **options):
    torch.manual_seed(0)
    options = (GPT2 if name == "GPT2" else SIZES) | options
    config = getattr(transformers, f"{name}Config")(**options, attn_implementation="eager")
    return getattr(transformers, f"{name}Model")(config).eval()


def ids_of(batch=1):
    return torch.randint(2, 97, (batch, LENGTH), generator=torch.Generator().manual_seed(1))


def padding(kind):
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if kind == "left":
        mask[0, :700] = 0
    elif kind == "right":
        mask[1, -900:] = 0
    return None if kind is None else mask


CASES = {
    "Llama": {},
    "Mistral": {"sliding_window": 300},
    "Gemma2": {"sliding_window": 512, "head_dim": 8, "num_hidden_layers": 2},
    "GPT2": {},
    "Qwen2": {},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", [None, "left", pytest.param("right", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "name",
    ["Llama", "Gemma2", "GPT2", *(pytest.param(one, marks=pytest.mark.long) for one in ("Mistral", "Qwen2"))],
)
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)],
    ids=["float32", "bfloat16"],
)
def test_bits(name, dtype, kind, steps):
    model, mask = model_of(name, **CASES[name]).to(dtype), padding(kind)
    ids = ids_of(1 if mask is None else 2)
    native = model(ids, attention_mask=mask)[0]
    attnpatch.apply(model, mode="always")
    assert torch.equal(model(ids, attention_mask=mask)[0], native)
    # The second time, no step is computed both ways.
    steps.clear()
    assert torch.equal(model(ids, attention_mask=mask)[0], native)
    if dtype is torch.bfloat16:
        assert not steps
        return
    assert steps, "the masked tail of this model was not found"
    if all(masked_tail._same.values()):
        assert sum(steps) < 0.85 * LENGTH * len(steps)


class Attention(nn.Module):
    """Attention with a mask in some spelling."""

    def __init__(self, masked, dtype=torch.float32):
        super().__init__()
        self.masked = masked

    def forward(self, q, k, v):
        return self.masked(q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v


CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
ADDED = torch.zeros(LENGTH, LENGTH).masked_fill(~CAUSAL, -torch.inf)
WEAK = torch.zeros(LENGTH, LENGTH).masked_fill(~CAUSAL, -20.0)
# Rows 100 to 200 see nothing.
BLIND = CAUSAL.clone()
BLIND[100:200] = False
LEAST = torch.finfo(torch.float32).min
ADDED_LEAST = torch.zeros(LENGTH, LENGTH).masked_fill(~CAUSAL, LEAST)
LEFT = torch.zeros(2, 1, 1, LENGTH)
LEFT[0, ..., :700] = LEAST
SPELLINGS = {
    "added": (lambda s: s + ADDED, True),
    "added in place": (lambda s: s.add_(ADDED), True),
    "filled": (lambda s: s.masked_fill(~CAUSAL, -torch.inf), True),
    "filled with the least number": (lambda s: s.masked_fill(~CAUSAL, torch.finfo(torch.float32).min), True),
    "where": (lambda s: torch.where(CAUSAL, s, torch.tensor(-1e30)), True),
    "scaled after": (lambda s: (s + ADDED) / 2, True),
    "two masks": (lambda s: s.masked_fill(~CAUSAL, -torch.inf) + ADDED, True),
    "a bias": (lambda s: s + WEAK, None),
    # In both masks every row sees a key, but together some rows see none: they are means of hidden keys.
    "blind in two masks": (lambda s: torch.where(CAUSAL, s, torch.tensor(LEAST)) + LEFT, True),
    "blind in two fills": (lambda s: s.masked_fill(~CAUSAL, LEAST).masked_fill(LEFT < 0, LEAST), True),
    "blind below a bound": (
        lambda s: torch.nan_to_num(s.masked_fill(LEFT < 0, -torch.inf)) + ADDED_LEAST,
        False,
    ),
    "a mask below a bound": (lambda s: (torch.tanh(s) * 3).masked_fill(~CAUSAL, -torch.inf), True),
    "a weak fill": (lambda s: s.masked_fill(~CAUSAL, -20.0), False),
    "blind rows": (lambda s: s.masked_fill(~BLIND, -1e30), True),
    "a factor that undoes it": (lambda s: (s + ADDED.clamp(min=-1e9)) * 1e-8, False),
    "a function after": (lambda s: torch.tanh(s + ADDED), False),
}


@torch.no_grad()
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling, steps):
    masked, is_cut = SPELLINGS[spelling]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, LENGTH, 16, generator=generator) for _ in range(3))
    module = Attention(masked)
    native = module(q, k, v)
    for _ in range(2):
        with attnpatch.patched(module, sites=[""], mode="always"):
            assert torch.equal(module(q, k, v), native)
    if is_cut is None:  # it was looked at, and hides nothing
        assert set(steps) == {LENGTH}
    elif is_cut and all(masked_tail._same.values()):
        assert min(steps) < LENGTH
    elif not is_cut:
        assert not steps


@torch.no_grad()
@pytest.mark.parametrize("unit", [384, 500, 512, 640])
def test_bits_in_any_unit(unit, steps, monkeypatch):
    """If the unit is not this processor's, steps are computed whole; the first rows see too few keys to show it."""
    monkeypatch.setattr(key_units, "unit_of", lambda device: unit)
    model, ids = model_of("Llama"), ids_of()
    native = model(ids)[0]
    attnpatch.apply(model, mode="always")
    for _ in range(2):
        assert torch.equal(model(ids)[0], native)
    assert steps


@pytest.mark.parametrize(
    "around",
    [torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode()],
    ids=["default device", "autocast", "inference mode"],
)
def test_the_unit_is_that_of_the_processor_in_any_context(around):
    found, state = key_units._unit_here.__wrapped__(), torch.get_rng_state()
    with around:
        assert key_units._unit_here.__wrapped__() == found
    assert torch.equal(torch.get_rng_state(), state)


def test_a_default_device_of_the_users(steps):
    """What is compared lies where the keys do: the same steps are cut."""
    module = Attention(lambda scores: scores + ADDED)
    q, k, v = (torch.randn(1, 2, LENGTH, 16) for _ in range(3))
    native, cut = module(q, k, v), []
    for around in (torch.device("cpu"), torch.device("meta")):
        masked_tail._same.clear()
        with attnpatch.patched(module, sites=[""], mode="always"), around:
            assert torch.equal(module(q, k, v), native)
            totals = attnpatch.report(module).totals
        assert steps and totals["by_rows"] and not totals["failed"]
        cut.append(dict(masked_tail._same))
    assert cut[0] == cut[1]


@torch.no_grad()
def test_maps(steps, monkeypatch):
    """An observer gets tiles without the last keys."""
    ids, mask = ids_of(2), padding("left")
    maps = []
    for is_cut in (True, False):
        model = model_of("Llama")
        if not is_cut:
            monkeypatch.setattr(key_units, "unit_of", lambda device: LENGTH)
        with attnpatch.capture(model, Blocks.fixed(100)) as found:
            model(ids, attention_mask=mask)
        maps.append(found["layers.*.self_attn"].mass)
    assert min(steps) < LENGTH
    torch.testing.assert_close(maps[0], maps[1], atol=1e-7, rtol=0, equal_nan=True)


@torch.no_grad()
def test_other_bits_are_not_taken(steps, monkeypatch):
    """If a step differs without its hidden keys, it is computed whole."""
    model, ids = model_of("Llama"), ids_of()
    native = model(ids)[0]
    original = masked_tail.MaskedTail._cut_value
    monkeypatch.setattr(masked_tail.MaskedTail, "_cut_value", lambda *a: original(*a) + 1e-3)
    attnpatch.apply(model, mode="always")
    for _ in range(2):
        assert torch.equal(model(ids)[0], native)
    assert masked_tail._same and not any(masked_tail._same.values())


def test_gradients(steps):
    ids = ids_of()
    grads = []
    for mode in ("never", "always"):
        model = model_of("Llama")
        attnpatch.apply(model, mode=mode)
        model(ids)[0].square().sum().backward()
        grads.append(model.layers[0].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-5, rtol=1e-4)
