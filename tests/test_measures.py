"""Attention received per token, averaged over heads or of each of them, against the weights that eager attention returns."""

import pytest
import torch
import zoo

import attnpatch
from attnpatch import Blocks

LLAMA = zoo.BY_NAME["llama"]
HEADS = ["mean", "all", [3, 1], [-1]]
NUM_HEADS = 4


def weights_of(model, inputs):
    """float64 ``[batch, layers, heads, q_len, kv_len]``, rows of padding zero."""
    dense = LLAMA.build("eager")
    dense.load_state_dict(model.state_dict())
    with torch.no_grad():
        weights = torch.stack(dense(**inputs, output_attentions=True).attentions, 1).double()
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
    return weights if real is None else weights * real[:, None, None, :, None]


def expected(weights, heads):
    received = weights.sum(-2)
    if heads == "mean":
        return received.mean(2)
    return received[:, :, list(range(NUM_HEADS)) if heads == "all" else [head % NUM_HEADS for head in heads]]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize(
    ("implementation", "mode"), [("eager", "never"), ("eager", "always"), ("sdpa", "never")]
)
def test_received_of_each_head(implementation, mode, padding, heads):
    model, inputs = LLAMA.build(implementation), LLAMA.inputs(padding)
    weights = weights_of(model, inputs)
    with (
        torch.no_grad(),
        attnpatch.patched(model, mode=mode, rows=16),
        attnpatch.capture(model, blocks=Blocks.fixed(8), heads=heads, measures="received") as maps,
    ):
        model(**inputs)
    found, right = maps.measured()["received"], expected(weights, heads).float()
    torch.testing.assert_close(found, right if len(right) > 1 else right[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", ["mean", "all", [2]], ids=str)
@pytest.mark.parametrize("steps", ["mean", "all"])
def test_received_while_tokens_are_generated(steps, heads):
    model, ids = LLAMA.build("sdpa"), torch.arange(1, 12)[None]
    with (
        torch.no_grad(),
        attnpatch.capture(
            model, blocks=Blocks.fixed(4), heads=heads, steps=steps, measures="received"
        ) as maps,
    ):
        whole = model.generate(ids, max_new_tokens=4, do_sample=False)
    right = expected(weights_of(model, {"input_ids": whole[:, :-1]}), heads).float()[0]
    torch.testing.assert_close(maps.measured()["received"], right, atol=1e-5, rtol=1e-5)
