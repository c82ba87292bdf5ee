"""Attention weights that a patched model returns compute the rows that are asked for, under eager and under SDPA."""

import copy
import gc
import io
import pickle

import numpy
import pytest
import torch
from live import Live
from test_masks import config_of, inputs_of, model_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attnpatch
from attnpatch.rows.deferred.handle import pending
from attnpatch.rows.deferred.tensor import DeferredTensor, is_pending
from attnpatch.rows.sdpa import deferred_weights

KINDS = ["Llama", "Mistral", "Bert", "T5"]


def pair_of(kind: str) -> tuple[nn.Module, nn.Module]:
    """The same model with eager attention and with SDPA."""
    eager, sdpa = model_of(kind, "eager"), model_of(kind, "sdpa")
    sdpa.load_state_dict(eager.state_dict())
    return eager, sdpa


@torch.no_grad()
def weights_of(model: nn.Module, inputs: dict, **more) -> dict[str, tuple[torch.Tensor, ...]]:
    output = model(**inputs, output_attentions=True, **more)
    return {key: value for key, value in output.items() if "attentions" in key and value}


def sees_something(native: torch.Tensor, inputs: dict) -> torch.Tensor:
    """Rows of real tokens: one of padding is spread over everything by eager, and is nothing to SDPA."""
    real = inputs["attention_mask"].bool()
    return real if native.shape[-2] == real.shape[1] else torch.ones(native.shape[0], native.shape[-2]).bool()


@pytest.mark.parametrize("mode", ["auto", "always"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_sdpa_gives_what_eager_gives(kind, side, mode):
    """Every layer, self and cross: to 1e-6 where a token is real; sums of one; the output is untouched."""
    eager, sdpa = pair_of(kind)
    inputs = inputs_of(kind, 90, "left" if side == "none" else side)
    if side == "none":
        inputs["attention_mask"].fill_(1)
    native = weights_of(eager, inputs)
    before = sdpa(**inputs)[0]
    with attnpatch.patched(sdpa, mode=mode):
        got = weights_of(sdpa, inputs)
        report = attnpatch.report(sdpa)
        assert torch.allclose(sdpa(**inputs, output_attentions=True)[0], before, atol=1e-6)
    assert list(got) == list(native) and report.totals["materialised"] == 0, report
    for key, layers in native.items():
        assert len(got[key]) == len(layers)
        for mine, theirs in zip(got[key], layers, strict=True):
            assert is_pending(mine) and mine.shape == theirs.shape and mine.dtype == theirs.dtype
            real = sees_something(theirs, inputs)
            for b in range(2):
                assert torch.allclose(mine[b][:, real[b]], theirs[b][:, real[b]], atol=1e-6, rtol=0), key
            assert torch.allclose(mine[0, 3, -1].clone(), theirs[0, 3, -1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["rows", "one row", "one head", "keys"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_indexing_costs_what_is_asked_for(attention, name):
    """Multiplications of a product of so few rows, and no memory of the whole; what native eager holds, to the bit."""
    index, share = {
        "rows": ((..., slice(100, 110), slice(None)), 12 / 512),
        "one row": ((..., -1, slice(None)), 4 / 512),
        "one head": ((0, 3, -1), 4 / 8 * 4 / 512),  # two sequences and two heads
        "keys": ((..., slice(100, 110), slice(0, 5)), 12 / 512),
    }[name]
    model, inputs = model_of("Llama", attention), inputs_of("Llama", 512)
    with attnpatch.patched(model, mode="always"):
        got = weights_of(model, inputs)["attentions"][-1]
        with FlopCounterMode(display=False) as flops, Live() as live:
            some = got[index].cpu()
        totals = attnpatch.report(model).totals
    assert totals["materialised"] == 1  # of a slice: what was asked for
    whole = 2 * 2 * 4 * 512 * 512 * 8
    assert 0 < flops.get_total_flops() <= whole * share
    assert live.largest < got.nbytes * max(2 * share, 0.03), live.what
    if attention == "eager":
        assert torch.equal(some, weights_of(model, inputs)["attentions"][-1][index])


@pytest.mark.parametrize("length", [37, 512])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_leaves_as_values(attention, length):
    """``.cpu()``, arithmetic, NumPy, copies and files get all of the values."""
    model, inputs = model_of("Llama", attention), inputs_of("Llama", length)
    with attnpatch.patched(model, mode="always"):
        whole = weights_of(model, inputs)["attentions"][0] + 0
        ways = {
            "cpu": lambda w: w.cpu(),
            "sum": lambda w: w + w - w,
            "numpy": lambda w: torch.from_numpy(w.numpy()),
            "asarray": lambda w: torch.from_numpy(numpy.asarray(w)),
            "deepcopy": copy.deepcopy,
            "pickle": lambda w: pickle.loads(pickle.dumps(w)),
            "file": _through_a_file,
            "list": lambda w: torch.tensor(w.tolist()),
            "stack": lambda w: torch.stack([w, w])[1],
        }
        for name, way in ways.items():
            got = way(weights_of(model, inputs)["attentions"][0])
            assert torch.equal(got.clone() if isinstance(got, DeferredTensor) else got, whole), name
    if attention == "eager":
        assert torch.equal(whole, weights_of(model, inputs)["attentions"][0])


def _through_a_file(value: torch.Tensor) -> torch.Tensor:
    file = io.BytesIO()
    torch.save({"weights": value}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["weights"]
    assert type(loaded) is torch.Tensor
    return loaded


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_what_they_keep(attention, context):
    """Queries and keys of each layer, and no mask: far less than the weights."""
    model, inputs = model_of("Llama", attention), inputs_of("Llama")
    length, heads, width = 1024, 4, 8
    with attnpatch.patched(model, mode="always", workspace=2**20), Live() as live:
        with context():
            output = model(**inputs, output_attentions=True, use_cache=False)
        layers = output.attentions
        hidden = output.last_hidden_state.nbytes
    kept = live.live - hidden
    each = 2 * length * heads * width * 4
    assert layers[0].nbytes == 2 * heads * length**2 * 4
    # A query and a key for each layer, twice under inference mode for a moment, and paddings.
    assert kept <= len(layers) * 2 * each + 10**5, kept
    assert live.largest < length**2


@pytest.mark.parametrize("kind", ["Llama", "T5"])
def test_generation(kind):
    """Weights of the prompt and of every step, as eager attention returns them; those of a step are values."""
    from transformers import LlamaForCausalLM, T5ForConditionalGeneration

    make = {"Llama": LlamaForCausalLM, "T5": T5ForConditionalGeneration}[kind]
    torch.manual_seed(0)
    eager, sdpa = (make(config_of(kind, attention)).eval() for attention in ("eager", "sdpa"))
    sdpa.load_state_dict(eager.state_dict())
    inputs = {key: value[:1] for key, value in inputs_of(kind, 40).items() if "decoder" not in key}

    def generate(model):
        output = model.generate(
            **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, output_attentions=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        return {key: value for key, value in output.items() if "attentions" in key and value}

    native = generate(eager)
    with attnpatch.patched(sdpa):
        got = generate(sdpa)
    assert list(native) == list(got)
    for key, steps in native.items():
        flat = [layer for step in steps for layer in (step if isinstance(step, tuple) else (step,))]
        mine = [layer for step in got[key] for layer in (step if isinstance(step, tuple) else (step,))]
        assert [layer.shape for layer in mine] == [layer.shape for layer in flat]
        for ours, theirs in zip(mine, flat, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6, rtol=0), key
            if theirs.shape[-2] == 1:
                assert type(ours) is torch.Tensor


def test_costs_nothing_if_nobody_asks(monkeypatch):
    """No weights are made, deferred or not, and the host's modules return what they return."""
    model, inputs = model_of("Llama", "sdpa"), inputs_of("Llama", 60)
    made = []
    monkeypatch.setattr(deferred_weights, "of_call", lambda *args: made.append(args))
    returned = []
    hook = model.layers[0].self_attn.register_forward_hook(lambda m, a, result: returned.append(result))
    with attnpatch.patched(model, mode="always"), torch.no_grad():
        assert model(**inputs).attentions is None
        assert model(**inputs, output_hidden_states=True).attentions is None
    hook.remove()
    assert not made and [result[1] for result in returned] == [None, None]


def test_short_calls_and_other_modes():
    """The policy says native: eager weights are ordinary tensors. ``never``: the host is left alone."""
    for attention in ("eager", "sdpa"):
        model, inputs = model_of("Llama", attention), inputs_of("Llama", 60)
        with attnpatch.patched(model, mode="auto"):
            kinds = {type(w) for w in weights_of(model, inputs)["attentions"]}
        assert kinds == ({torch.Tensor} if attention == "eager" else {DeferredTensor})
        with attnpatch.patched(model, mode="never"):
            assert ("attentions" in weights_of(model, inputs)) == (attention == "eager")
    assert not weights_of(model, inputs), "the host has learned to return them: this feature can go"


def test_rows_that_see_nothing_are_zero():
    """As in torch's attention, not spread over all keys as eager attention spreads them."""
    model, inputs = model_of("Llama", "sdpa"), inputs_of("Llama", 60)
    with attnpatch.patched(model):
        got = weights_of(model, inputs)["attentions"][0]
    sums = got.sum(-1)
    assert torch.equal(sums[1, :, :9], torch.zeros(4, 9)) and torch.allclose(
        sums[0], torch.ones(()), atol=1e-6
    )


def test_beside_a_capture():
    """Maps and weights of one call say the same."""
    model, inputs = model_of("Llama", "sdpa"), inputs_of("Llama", 64)
    inputs["attention_mask"].fill_(1)
    with attnpatch.patched(model), attnpatch.capture(model, blocks=attnpatch.Blocks.fixed(16)) as maps:
        got = weights_of(model, inputs)["attentions"]
    blocks = torch.stack(
        [w.mean(1).unflatten(-1, (4, 16)).sum(-1).unflatten(1, (4, 16)).mean(2) for w in got], 1
    )
    assert torch.allclose(torch.as_tensor(maps.block_map.to_numpy()), blocks, atol=1e-6)


def test_other_modules_are_left_alone():
    """Only modules of transformers are given what they lack."""

    class Attention(nn.Module):
        def forward(self, x, output_attentions=False):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x), None

    model = Attention()
    with attnpatch.patched(model):
        assert model(torch.zeros(1, 2, 8, 4), output_attentions=True)[1] is None


def test_an_overwritten_key_is_said_aloud():
    """Weights that are computed from what is not there any more would be wrong."""
    from transformers import LlamaModel

    config = config_of("Llama", "sdpa")
    config.num_key_value_heads = config.num_attention_heads  # or the host repeats the cached keys
    model, inputs = LlamaModel(config).eval(), inputs_of("Llama", 60)
    with attnpatch.patched(model), torch.no_grad():
        output = model(**inputs, output_attentions=True, use_cache=True)
        output.past_key_values.layers[0].keys.zero_()
        with pytest.raises(attnpatch.errors.AttnpatchError, match="overwritten"):
            output.attentions[0].cpu()


@pytest.mark.parametrize("mode", ["auto", "always"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["Llama", "T5"])
@pytest.mark.parametrize("is_training", [False, True], ids=["inference", "training"])
def test_they_go_with_who_holds_them(kind, attention, mode, is_training):
    """Query and key of every layer are in them: not one may wait for the garbage collector."""
    model, inputs = model_of(kind, attention), inputs_of(kind, 37)
    policy = {"mode": "always"} if mode == "always" else {"min_tokens": 4, "min_free": "1000TB"}
    gc.collect()
    gc.disable()
    try:
        with attnpatch.patched(model, **policy), torch.set_grad_enabled(is_training):
            output = model(**inputs, output_attentions=True)
            assert pending()
            if is_training:
                output[0].float().sum().backward()
            del output
            assert not pending()
    finally:
        gc.enable()
