"""Whose tokens a tensor holds, followed through the functions of torch."""

import pytest
import torch
import torch.nn.functional as F

from attnpatch.recording.diffusion.token_provenance import IMAGE, TEXT, TokenKinds


def test_joined_and_taken_apart_again():
    image, text = torch.randn(2, 9, 8), torch.randn(2, 5, 8)
    with TokenKinds() as token_kinds:
        token_kinds.mark(image, IMAGE)
        token_kinds.mark(text, TEXT)
        joint = torch.cat([F.linear(text, torch.randn(8, 8)), image * 2], 1)
        heads = joint.unflatten(-1, (2, 4)).transpose(1, 2)
        scores = heads @ heads.mT
        first, last = joint[:, :5], joint[:, 5:]
        alone = F.scaled_dot_product_attention(image, text, text)
    assert token_kinds.of(joint) == token_kinds.of(heads) == token_kinds.of(scores) == ((TEXT, 5), (IMAGE, 9))
    assert token_kinds.joined == {14: ((TEXT, 5), (IMAGE, 9))}
    assert token_kinds.of(first) == ((TEXT, None),) and token_kinds.of(last) == ((IMAGE, None),)
    assert token_kinds.of(alone) == ((IMAGE, None),)


def test_as_many_tokens_of_either_kind():
    """Their length does not tell them apart: where a view begins does, and what is no view is not known."""
    image, text = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    with TokenKinds() as token_kinds:
        token_kinds.mark(image, IMAGE)
        token_kinds.mark(text, TEXT)
        joint = torch.cat([image, text], 1)
        first, last = joint.split(6, 1)
        copied = joint[:, torch.arange(6)]
    assert token_kinds.of(first) == ((IMAGE, None),)
    assert token_kinds.of(last) == ((TEXT, None),)
    assert token_kinds.of(copied) is None


def test_nothing_is_known_of_others():
    with TokenKinds() as token_kinds:
        image = torch.randn(1, 4, 8)
        token_kinds.mark(image, IMAGE)
        other = torch.randn(1, 4, 8) + 1
        mixed = torch.cat([image, other], 1)
    assert token_kinds.of(other) is None
    assert token_kinds.of(mixed) == ((IMAGE, 4), ("other", 4))


LOSES = {
    "gathered": lambda x: torch.gather(x, 1, torch.arange(4)[None, :, None].expand(2, 4, 8)),
    "indexed": lambda x: x[:, torch.arange(9).flip(0)],
    "a list": lambda x: x[:, [0, 2, 1]],
    "masked": lambda x: x[torch.ones(2, 9, dtype=torch.bool)],
    "every other": lambda x: x[:, ::2],
    "rolled": lambda x: x.roll(1, 1),
    "sorted": lambda x: x.sort(1).values,
    "the first": lambda x: x[:, :4],
    "chunks": lambda x: x.chunk(3, 1)[1],
    "narrowed": lambda x: x.narrow(1, 0, 4),
    "pooled": lambda x: F.avg_pool1d(x.mT, 3).mT,
    "convolved": lambda x: F.conv1d(x.mT, torch.ones(8, 8, 3), stride=3).mT,
    "taken together": lambda x: x.reshape(2, 3, 3, 8).mean(2),
}
KEEPS = {
    "features": lambda x: x[..., :4],
    "chunks of features": lambda x: x.chunk(2, -1)[1],
    "one of a batch": lambda x: x[:1],
    "a new axis": lambda x: x[:, None],
    "rows and columns": lambda x: F.avg_pool2d(x.mT.reshape(2, 8, 3, 3), 3).flatten(2).mT,
    "a mean of features": lambda x: x - x.mean(-1, keepdim=True),
    "as they are": lambda x: x[:, :],
}


@pytest.mark.parametrize("case", [*LOSES, *KEEPS])
def test_tokens_in_another_order(case):
    """Or some of them only: where they lie is not known, whatever their number would fit."""
    image = torch.randn(2, 9, 8)
    with TokenKinds() as token_kinds:
        token_kinds.mark(image, IMAGE)
        result = {**LOSES, **KEEPS}[case](image)
    assert token_kinds.of(result) == (None if case in LOSES else ((IMAGE, None),))


def test_what_takes_only_a_size_or_a_type():
    """Buffers and other tokens in an image's type are none of its tokens."""
    image, time = torch.randn(2, 9, 8), torch.randn(2, 1, 8)
    with TokenKinds() as token_kinds:
        token_kinds.mark(image, IMAGE)
        made = [torch.zeros_like(image), image.new_zeros(2, 12, 8), torch.randn_like(image), time.to(image)]
        made += [time.type_as(image), time.expand_as(image)]
        typed = image.to(time)
        joined = torch.cat([time.to(image), image], 1)
    assert [token_kinds.of(each) for each in made] == [None] * 6
    assert token_kinds.of(typed) == ((IMAGE, None),)
    assert token_kinds.of(joined) == (("other", 1), (IMAGE, 9))


def test_what_is_written_over():
    image, text, registers = torch.randn(2, 9, 8), torch.randn(2, 3, 8), torch.randn(2, 2, 8)
    with TokenKinds() as token_kinds:
        tensors = [image.clone() for _ in range(5)]
        for tensor in (image, *tensors):
            token_kinds.mark(tensor, IMAGE)
        token_kinds.mark(text, TEXT)
        tensors[0][:, :3] = text
        tensors[1][:, 2:4] = registers
        tensors[2][:, :3] = 0
        tensors[3].copy_(image)
        tensors[4][torch.zeros(2, 9, dtype=torch.bool)] = image[0, 0]
    known = [token_kinds.of(tensor) for tensor in tensors]
    assert known == [None, None, ((IMAGE, None),), ((IMAGE, None),), ((IMAGE, None),)]
