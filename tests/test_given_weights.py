"""``BlockMap.from_attentions`` refuses weights of other tokens than its blocks, and weights that are no probabilities."""

import pytest
import torch
from torch.nn.functional import pad

from attnpatch import BlockMap, Blocks
from attnpatch.errors import CaptureError

SIZE = Blocks.fixed(4)


def call(queries=10, keys=10, *, visible=None, others=0):
    """Causal weights of two layers; the second one has ``others`` more keys."""
    torch.manual_seed(7)
    visible = torch.arange(keys - queries, keys) if visible is None else torch.as_tensor(visible)
    scores = torch.randn(2, 2, 4, queries, keys)
    layers = scores.masked_fill(torch.arange(keys) > visible[:, None], -torch.inf).softmax(-1)
    return [layers[0], pad(layers[1], (0, others)) if others >= 0 else layers[1][..., -others:]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([call(7, 7), call(1, 8, others=-3)], "layer 1 has weights on 5 keys where 8 tokens"),  # one slides
        ([call(7, 7), call(1, 5)], "layer 0 has weights on 5 keys where 8 tokens"),
        ([call(7, 12), call(1, 12)], "layer 0 has weights on 12 keys where 13 tokens"),  # a static cache
        (call(8, 8, others=1), "layer 1 has weights on 9 keys where 8"),
        ([call(8, 8)[0], call(6, 8)[1]], "layer 1 has weights of"),
        (call(6, 12, visible=range(6)), "no token of a call attends to itself"),  # a static cache
        (
            [call(7, 7), call(1, 8, visible=[0])],
            "no token of a call attends to itself",
        ),  # rows of other tokens
        ([one.clamp(1e-9).log() for one in call()], "a row of the weights sums to -"),
        ([one * 1.5 for one in call()], "a row of the weights sums to 1.5"),
        ([one * float("nan") for one in call()], "a row of the weights sums to nan"),
        ([torch.ones(2, 4, 0, 8)], "which is empty"),
    ],
)
def test_weights_whose_keys_or_sums_are_others(given, message):
    with pytest.raises(CaptureError, match=message):
        BlockMap.from_attentions(given, SIZE)


def test_a_pair_of_blocks_does_not_hide_a_sliding_window():
    with pytest.raises(CaptureError, match="layer 0 has weights on 5 keys where 8 tokens"):
        BlockMap.from_attentions([call(7, 7), call(1, 5)], (SIZE, SIZE))
    static = BlockMap.from_attentions([call(7, 12), call(1, 12)], (SIZE, SIZE))
    assert static.query_sizes.sum(-1).tolist() == [8, 8] and static.key_sizes.sum(-1).tolist() == [12, 12]


@pytest.mark.parametrize("blocks", [[4, 4], None, (SIZE,), (1, 2)])
def test_blocks_that_are_none(blocks):
    with pytest.raises(CaptureError, match=r"accepted is attnpatch\.Blocks"):
        BlockMap.from_attentions(call(), blocks)


@pytest.mark.parametrize("mask", ["x", [[1], [1, 1]]])
def test_masks_that_are_none(mask):
    with pytest.raises(CaptureError, match="attention_mask is"):
        BlockMap.from_attentions(call(), SIZE, attention_mask=mask)


def test_rows_of_padding_may_be_nan():
    mask = torch.ones(2, 10)
    mask[:, :3] = 0
    broken = call()
    for one in broken:
        one[:, :, :3] = float("nan")
    found = BlockMap.from_attentions(broken, SIZE, attention_mask=mask)
    assert found == BlockMap.from_attentions(call(), SIZE, attention_mask=mask)


def test_bfloat16_weights_are_probabilities():
    given = [one.bfloat16() for one in call(600, 600)]
    assert BlockMap.from_attentions(given, Blocks.fixed(100)).mass.sum(-1).allclose(torch.ones(()), atol=0.01)
