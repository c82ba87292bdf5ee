"""Whose tokens a tensor holds, followed through the functions of torch."""

import torch
import torch.nn.functional as F

from attnpatch.capture.origins import IMAGE, TEXT, Origins


def test_joined_and_taken_apart_again():
    image, text = torch.randn(2, 9, 8), torch.randn(2, 5, 8)
    with Origins() as origins:
        origins.mark(image, IMAGE)
        origins.mark(text, TEXT)
        joint = torch.cat([F.linear(text, torch.randn(8, 8)), image * 2], 1)
        heads = joint.unflatten(-1, (2, 4)).transpose(1, 2)
        scores = heads @ heads.mT
        first, last = joint[:, :5], joint[:, 5:]
        alone = F.scaled_dot_product_attention(image, text, text)
    assert origins.of(joint) == origins.of(heads) == origins.of(scores) == ((TEXT, 5), (IMAGE, 9))
    assert origins.joined == {14: ((TEXT, 5), (IMAGE, 9))}
    assert origins.of(first) == ((TEXT, None),) and origins.of(last) == ((IMAGE, None),)
    assert origins.of(alone) == ((IMAGE, None),)


def test_as_many_tokens_of_either_kind():
    """Their length does not tell them apart: where a view begins does, and what is no view is not known."""
    image, text = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    with Origins() as origins:
        origins.mark(image, IMAGE)
        origins.mark(text, TEXT)
        joint = torch.cat([image, text], 1)
        first, last = joint.split(6, 1)
        copied = joint[:, torch.arange(6)]
    assert origins.of(first) == ((IMAGE, None),)
    assert origins.of(last) == ((TEXT, None),)
    assert origins.of(copied) is None


def test_nothing_is_known_of_others():
    with Origins() as origins:
        image = torch.randn(1, 4, 8)
        origins.mark(image, IMAGE)
        other = torch.randn(1, 4, 8) + 1
        mixed = torch.cat([image, other], 1)
    assert origins.of(other) is None
    assert origins.of(mixed) == ((IMAGE, 4), ("other", 4))
