"""Modules in the structure of published research code: the map is that of their own probabilities, or there is none."""

import pytest
import torch
from test_known_facts import reduced
from torch import nn

import attnpatch
from attnpatch import Blocks

WIDTH, HEADS, TOKENS, BLOCK = 16, 2, 21, 4


def numbers(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padding(kind):
    """``[2, tokens]``: True for real tokens."""
    found = torch.ones(2, TOKENS, dtype=torch.bool)
    if kind == "right":
        found[0, -6:] = found[1, -2:] = False
    elif kind == "left":
        found[0, :6] = found[1, :2] = False
    elif kind == "holes":
        found[0, 3:6] = found[0, 12] = found[1, 7:9] = False
    return found


def blocks_of(mask):
    """The positions of each block of one sequence: real tokens are counted, padding is not."""
    real = mask.nonzero().flatten().tolist()
    return [real[start : start + BLOCK] for start in range(0, len(real), BLOCK)]


def captured(model, *given):
    with torch.no_grad(), attnpatch.capture(model, blocks=Blocks.fixed(BLOCK)) as maps:
        model.eval()(*given)
    return maps


class Model(nn.Module):
    """Calls its attention, whose input may be prepared."""

    def __init__(self, attention, prepare=lambda x: x):
        super().__init__()
        self.attention, self.prepare = attention, prepare

    def forward(self, x, *rest):
        return self.attention(self.prepare(x), *rest)


class TalkingHeads(nn.Module):
    """Heads are mixed before softmax, after it, or both (CaiT)."""

    def __init__(self, before, after):
        super().__init__()
        torch.manual_seed(0)
        self.project, self.mask_value = nn.Linear(WIDTH, 3 * WIDTH), float("-inf")
        self.before = nn.Linear(HEADS, HEADS) if before else None
        self.after = nn.Linear(HEADS, HEADS) if after else None

    def mixed(self, by, scores):
        return scores if by is None else by(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def weights(self, query, key, mask):
        scores = self.mixed(self.before, query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1))
        scores = scores.masked_fill(~mask[:, None, None], self.mask_value)
        return self.mixed(self.after, scores.softmax(-1))

    def projected(self, x):
        return self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x, mask):
        query, key, value = self.projected(x)
        return (self.weights(query, key, mask) @ value).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("kind", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("value", [float("-inf"), torch.finfo(torch.float32).min])
@pytest.mark.parametrize("before", [False, True])
def test_padding_of_heads_that_are_mixed_after_softmax(before, value, kind):
    attention, x, mask = TalkingHeads(before, True), numbers(2, TOKENS, WIDTH), padding(kind)
    attention.mask_value = value
    maps = captured(Model(attention), x, mask)
    with torch.no_grad():
        query, key, _ = attention.projected(x)
        weights = attention.weights(query, key, mask)
    assert not maps.left_out
    for row, probabilities, real in zip(maps.block_map.mass, weights, mask, strict=True):
        expected = reduced(probabilities, blocks_of(real), blocks_of(real)).double()
        found = row[0, : len(expected), : len(expected)].double()
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(WIDTH, 3 * WIDTH)

    def weights(self, x):
        query, key, value = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1), value

    def forward(self, x):
        weights, value = self.weights(x)
        return (weights @ value).transpose(1, 2).flatten(2)


class OfPieces(Model):
    """Calls its attention with pieces of its input: windows, chunks, rows or columns of a picture, frames."""

    def __init__(self, prepare):
        super().__init__(Attention(), prepare)
        self.patches, self.first = nn.Conv2d(3, WIDTH, 1), nn.Parameter(torch.ones(1, 1, WIDTH))

    def forward(self, x):
        return self.attention(self.prepare(self, x))


def windows(model, x):
    """SAM's, three by three, of a picture of 3 x 9 patches."""
    x = model.patches(x).permute(0, 2, 3, 1)
    x = x.view(len(x), 1, 3, 3, 3, WIDTH).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, 9, WIDTH)


def windows_in_order(model, x):
    x = model.patches(x).permute(0, 2, 3, 1)
    return x.reshape(-1, 9, WIDTH)


def chunks(model, x):
    return x.reshape(-1, 2, WIDTH)


def chunks_behind_a_token(model, x):
    return torch.cat([model.first.expand(len(x), -1, -1), x], 1).reshape(-1, 2, WIDTH)


def columns(model, x):
    return x.transpose(1, 2).flatten(0, 1)


def patches_over_frames(model, x):
    """TimeSformer's attention over time: a patch of every frame is a sequence."""
    patches = model.patches(x.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, x.shape[:2])
    return patches.transpose(1, 2).flatten(0, 1)


# There are as many of these as a model may have sequences: channels, frames or tokens of each element of its batch.
PIECES = {
    windows: (2, 3, 3, 9),
    windows_in_order: (2, 3, 9, 3),
    chunks: (2, 8, WIDTH),
    chunks_behind_a_token: (2, 7, WIDTH),
    columns: (2, 5, 5, WIDTH),
    patches_over_frames: (2, 6, 3, 2, 3),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("prepare", PIECES, ids=lambda prepare: prepare.__name__)
def test_pieces_that_are_as_many_as_sequences_could_be(prepare, batch):
    maps = captured(OfPieces(prepare), numbers(batch, *PIECES[prepare][1:]))
    assert list(maps.left_out) == ["attention"] and len(maps.sequences) == 0


def test_gradients_of_a_softmax_that_is_written_by_hand():
    """They are captured of torch's attention function alone, which must be said."""
    model = Model(Attention())
    with attnpatch.capture(model, blocks=Blocks.fixed(BLOCK), weighting="gradient") as maps:
        model(numbers(2, TOKENS, WIDTH)).sum().backward()
    assert "written by hand" in maps.left_out["attention"] and "sdpa" in maps.left_out["attention"]


def frames(model, x):
    return x.flatten(0, 1)


def frames_joined(model, x):
    return x.flatten(1, 2)


@pytest.mark.parametrize("prepare", [frames, frames_joined])
def test_pictures_of_a_batch_are_sequences(prepare):
    model, x = OfPieces(prepare), numbers(2, 3, 9, WIDTH)
    maps = captured(model, x)
    with torch.no_grad():
        weights, _ = model.attention.weights(prepare(model, x))
    assert not maps.left_out
    everything = torch.ones(weights.shape[-1])
    for row, probabilities in zip(maps.block_map.mass, weights, strict=True):
        expected = reduced(probabilities, blocks_of(everything), blocks_of(everything)).double()
        torch.testing.assert_close(row[0].double(), expected, atol=2e-6, rtol=0)


class StepsOfAttention(Attention):
    """Attention of several steps at once; with ``before``, the weights have met values already."""

    def __init__(self, steps, before=False):
        super().__init__()
        self.steps, self.before = steps, before

    def forward(self, x):
        weights, value = self.weights(x)
        first = weights @ value if self.before else 0
        return (self.steps(weights) @ value + first).transpose(1, 2).flatten(2)


STEPS = {
    "two": lambda p: p @ p,
    "three": lambda p: p @ p @ p,
    "one and two": lambda p: 0.5 * p + 0.5 * (p @ p),
    "einsum": lambda p: torch.einsum("bhij,bhjk->bhik", p, p),
    "there and back": lambda p: p @ p.mT,
}


@pytest.mark.parametrize("name", STEPS)
def test_weights_of_weights(name):
    """The softmax is not what values are multiplied with."""
    maps = captured(Model(StepsOfAttention(STEPS[name])), numbers(2, TOKENS, WIDTH))
    assert "multiplied with weights" in maps.left_out["attention"]
    assert "attention" not in [kind for maps_of in maps.sequences for kind in maps_of]


TABLE = torch.eye(TOKENS).roll(1, 0)
TABLES = {
    "a product": lambda p: p @ TABLE,
    "prompt-to-prompt's": lambda p: torch.einsum("bhij,bjk->bhik", p, TABLE.expand(len(p), -1, -1)),
    "made inside": lambda p: p @ torch.eye(TOKENS)[torch.arange(TOKENS).flip(0)],
    "learned": lambda p: nn.functional.linear(p, nn.Parameter(TABLE + 0.01)),
    "mixed with the weights": lambda p: 0.5 * p + 0.5 * (p @ TABLE),
}


@pytest.mark.parametrize("name", TABLES)
def test_weights_that_a_table_moves_from_key_to_key(name):
    maps = captured(Model(StepsOfAttention(TABLES[name])), numbers(2, TOKENS, WIDTH))
    assert "table of keys x keys" in maps.left_out["attention"]
    assert "attention" not in [kind for maps_of in maps.sequences for kind in maps_of]


def test_values_with_as_many_channels_as_there_are_keys():
    """They are made from the module's input, so the product with them is attention."""
    model, x = Model(Attention()), numbers(2, WIDTH // HEADS, WIDTH)
    maps = captured(model, x)
    with torch.no_grad():
        weights, _ = model.attention.weights(x)
    assert not maps.left_out
    spans = [range(4), range(4, 8)]
    for row, probabilities in zip(maps.block_map.mass, weights, strict=True):
        torch.testing.assert_close(
            row[0].double(), reduced(probabilities, spans, spans).double(), atol=2e-6, rtol=0
        )


def test_weights_that_are_multiplied_after_they_met_values():
    """The map is that of the product with values; what is done with the weights later changes nothing in it."""
    model, x = Model(StepsOfAttention(STEPS["two"], before=True)), numbers(2, TOKENS, WIDTH)
    maps = captured(model, x)
    with torch.no_grad():
        weights, _ = model.attention.weights(x)
    assert not maps.left_out
    for row, probabilities in zip(maps["attention"].mass, weights, strict=True):
        expected = reduced(probabilities, blocks_of(torch.ones(TOKENS)), blocks_of(torch.ones(TOKENS)))
        torch.testing.assert_close(row[0].double(), expected.double(), atol=2e-6, rtol=0)


class OtherScoresAttention(Attention):
    """Scores that are more than a product of a query and a key."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def forward(self, x):
        query, key, value = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return (self.scores(query, key).softmax(-1) @ value).transpose(1, 2).flatten(2)


def with_their_transpose(query, key):
    scores = query @ key.mT
    return scores + scores.mT


OTHERS = {
    "symmetric": with_their_transpose,
    "pooled": lambda q, k: nn.functional.avg_pool2d(q @ k.mT, (1, 3), 1, (0, 1)),
    "keys of their own for each query": lambda q, k: torch.einsum(
        "bhid,bhijd->bhij", q, k[:, :, None] + q[:, :, :, None]
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_reason_names_scores_that_are_not_seen(name):
    maps = captured(Model(OtherScoresAttention(OTHERS[name])), numbers(2, TOKENS, WIDTH))
    assert name.split()[0] in maps.left_out["attention"] and not maps.sequences
