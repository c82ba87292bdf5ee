"""Calls between attention modules that are left alone after a glance: none of them would have been deferred."""

import itertools
import math

import pytest
import torch

import attnpatch
from attnpatch.memory.free import FreeMemoryCache
from attnpatch.patching.counters import SiteCounters
from attnpatch.rows.attention_call import AttentionCall
from attnpatch.rows.creation import positions

SHAPES = [
    (64,),
    (1, 64),
    (64, 1),
    (64, 64),
    (2, 1, 1, 64),
    (2, 1, 64, 1),
    (2, 1, 64, 64),
    (1,),
    (2, 64, 8),
    (8,),
]
VALUES = {
    "positions": lambda shape: torch.arange(math.prod(shape)).view(shape),
    "masks": lambda shape: torch.ones(shape, dtype=torch.bool),
    "numbers": torch.zeros,
}


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("other", VALUES)
def test_what_is_left_alone_at_once_is_never_deferred(kind, other):
    policy = attnpatch.Policy(mode="always")
    call = AttentionCall(policy, FreeMemoryCache(), SiteCounters(), is_of_masks=True)
    answers = {}
    for func in [torch.sub, torch.Tensor.__lt__, torch.mul, torch.Tensor.__or__, torch.Tensor.__getitem__]:
        for shapes in itertools.product(SHAPES, repeat=2):
            given = VALUES[kind](shapes[0]), VALUES[other](shapes[1])
            try:
                deferred = positions.OF_POSITIONS[func](func, given, {}, call)
            except RuntimeError:  # of torch: these two cannot be combined
                continue
            answers[func, shapes] = (
                deferred is not NotImplemented,
                positions._makes_nothing_larger(func, given),
            )
    assert not any(is_deferred and is_left for is_deferred, is_left in answers.values())
    assert any(is_left for _, is_left in answers.values())
    if kind == other != "numbers":
        assert any(is_deferred for is_deferred, _ in answers.values())
