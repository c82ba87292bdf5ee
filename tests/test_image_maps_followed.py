"""What a denoiser's attention does to the tokens that it is given: followed, or left out, never told by counts."""

import contextlib
import warnings

import pytest
import torch
from image_denoisers import numbers, recording_of
from torch import nn

import attnpatch
from attnpatch import Blocks, errors

HEIGHT, WIDTH, CHANNELS, HEADS = 4, 6, 16, 2
TOKENS = HEIGHT * WIDTH


class Attention(nn.Module):
    """Calls a function with itself and the tokens. It does not say how many heads it has."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.to_q, self.to_k = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def heads(self, layer, tokens):
        return layer(tokens).unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def attend(self, queries, keys):
        query, key = self.heads(self.to_q, queries), self.heads(self.to_k, keys)
        return nn.functional.scaled_dot_product_attention(query, key, key).transpose(1, 2).flatten(2)

    def forward(self, tokens):
        return self.function(self, tokens)


class Denoiser(nn.Module):
    def __init__(self, function, through=lambda attention, tokens: attention(tokens)):
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.attention, self.through = nn.Conv2d(4, CHANNELS, 1), Attention(function), through

    def forward(self, sample, timestep):
        return self.through(self.attention, self.patch(sample).flatten(2).mT)


def captured(denoiser, **options):
    given = numbers(1, 2, 4, HEIGHT, WIDTH), 5
    with torch.no_grad(), recording_of(denoiser) as probabilities:
        native = denoiser(*given)
    with torch.no_grad(), attnpatch.capture(denoiser, **options) as maps:
        assert torch.equal(denoiser(*given), native)
    return probabilities, maps


def heads_before_batch(attention, x, keys=None):
    pairs = ((attention.to_q, x), (attention.to_k, x if keys is None else keys))
    query, key = (attention.heads(*pair).transpose(0, 1).flatten(0, 1) for pair in pairs)
    out = (query @ key.mT / 8**0.5).softmax(-1) @ key
    return out.unflatten(0, (HEADS, -1)).permute(1, 2, 0, 3).flatten(2)


def test_heads_before_the_batch():
    """The pieces are those of one head of both images, then those of the next."""
    denoiser = Denoiser(heads_before_batch)
    _, maps = captured(denoiser, heads="all")
    with torch.no_grad():
        x = denoiser.patch(numbers(1, 2, 4, HEIGHT, WIDTH)).flatten(2).mT
        query, key = (
            denoiser.attention.heads(f, x) for f in (denoiser.attention.to_q, denoiser.attention.to_k)
        )
        dense = (query.double() @ key.double().mT / 8**0.5).softmax(-1)
    assert (maps.block_map.mass[:, 0].double() - dense).abs().max() < 1e-6


def tiled(x):
    """Rows and columns in squares of 2 x 2, as attention that is sparse by tiles wants them."""
    return x.view(-1, HEIGHT // 2, 2, WIDTH // 2, 2, CHANNELS).transpose(2, 3).reshape(-1, TOKENS, CHANNELS)


INDEX = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))
OTHERS = "its keys are of other sequences or windows than its queries"
FUNCTIONS = {
    "in squares": (lambda a, x: a.attend(tiled(x), tiled(x)), "its queries are computed inside it"),
    "in another order": (lambda a, x: a.attend(x[:, INDEX], x[:, INDEX]), "its queries are not all tokens"),
    "keys moved": (lambda a, x: a.attend(x, x.roll(3, 1)), "its keys are computed inside it"),
    "keys of the first image": (lambda a, x: a.attend(x, x[:1].expand(2, -1, -1)), OTHERS),
    "keys of the first image by an index": (lambda a, x: a.attend(x, x[[0, 0]]), OTHERS),
    "keys of the other image": (lambda a, x: a.attend(x, x.flip(0)), OTHERS),
    "heads before the batch, keys of the other image": (
        lambda a, x: heads_before_batch(a, x, x.flip(0)),
        OTHERS,
    ),
    "of one image only": (
        lambda a, x: torch.cat([a.attend(*[x.chunk(2)[0]] * 2), x[1:]]),
        "it moves, picks, joins or pools sequences",
    ),
    "no probabilities": (
        lambda a, x: (2 * (x @ x.mT).softmax(-1)) @ x,
        "its rows sum to 2 to 2",
    ),
    "no softmax": (lambda a, x: a.to_q(x) @ (a.to_k(x).mT @ x), "attnpatch did not see its probabilities"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_left_out(name):
    function, said = FUNCTIONS[name]
    with pytest.warns(errors.AttnpatchWarning):
        _, maps = captured(Denoiser(function))
    assert list(maps.left_out) == ["attention"]
    assert maps.left_out["attention"].startswith(said)
    assert maps.num_runs == 0 and said in repr(maps)


def rows_apart(attention, tokens):
    """One row of the image after the other, as sequences of their own."""
    return attention(tokens.reshape(2 * HEIGHT, WIDTH, CHANNELS)).view(2, TOKENS, CHANNELS)


def by_columns(attention, tokens):
    return attention(tokens.unflatten(1, (HEIGHT, WIDTH)).transpose(1, 2).flatten(1, 2))


def in_squares(attention, tokens):
    return attention(tokens.unflatten(1, (2, 2, 3, 2)).transpose(2, 3).flatten(1, 4))


THROUGH = {
    "columns before rows": (by_columns, "its tokens or sequences were put into another order (views)"),
    "squares one after the other": (
        in_squares,
        "its tokens or sequences were put into another order (views)",
    ),
    "rows of the image": (rows_apart, "it attends in 8 sequences, and the denoiser is given 2"),
    "two of a row as one": (
        lambda attention, tokens: attention(tokens.unflatten(1, (-1, 2)).mean(2)),
        "it attends with 12 queries that are not known",
    ),
    "two of a row as one, by views": (
        lambda attention, tokens: attention(tokens.unflatten(1, (-1, 2)).flatten(2)[..., :CHANNELS]),
        "it attends with image tokens in 4 x 3, but the image has 3 x 4",
    ),
    "a row more": (
        lambda attention, tokens: attention(nn.functional.pad(tokens, (0, 0, 0, 4))),
        "it attends with 28 queries that are not known",
    ),
    "stacked in another order": (
        lambda attention, tokens: attention(torch.stack(tokens.unbind(1)[::-1], 1)),
        "its tokens or sequences come from stack",
    ),
    "twice": (
        lambda attention, tokens: attention(attention(tokens)),
        "it is called several times in one call",
    ),
    "one image after the other": (
        lambda attention, tokens: torch.cat([attention(one) for one in tokens.split(1)]),
        "it attends in 1 sequences, and the denoiser is given 2",
    ),
}


@pytest.mark.parametrize("name", THROUGH)
def test_called_with_other_sequences(name):
    through, said = THROUGH[name]
    with pytest.warns(errors.AttnpatchWarning):
        _, maps = captured(Denoiser(lambda a, x: a.attend(x, x), through))
    assert maps.left_out["attention"].startswith(said)
    assert maps.num_runs == 0


def test_plain():
    """What the cases above are changes of."""
    probabilities, maps = captured(Denoiser(lambda a, x: a.attend(x, x)))
    assert (maps.block_map.mass[:, 0].numpy() - probabilities[0].mean(1)).__abs__().max() < 1e-6
    assert not maps.left_out


class Patches(Denoiser):
    """Cuts its image into patches of 2 x 2 by views, columns first or rows first."""

    def __init__(self, order):
        super().__init__(lambda a, x: a.attend(x, x))
        self.order, self.patch = order, nn.Linear(16, CHANNELS)

    def forward(self, sample, timestep):
        cut = sample.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        return self.attention(self.patch(cut.permute(self.order).flatten(3).flatten(1, 2)))


@pytest.mark.parametrize("order", [(0, 2, 4, 1, 3, 5), (0, 4, 2, 1, 3, 5)])
def test_patches_of_an_image(order):
    is_by_rows = order[1] < order[2]
    blocks = attnpatch.Blocks.tiles(HEIGHT // 2, WIDTH // 2, 1)
    with contextlib.nullcontext() if is_by_rows else pytest.warns(errors.AttnpatchWarning, match="views"):
        probabilities, maps = captured(Patches(order), blocks=blocks)
    if not is_by_rows:
        assert list(maps.left_out) == ["attention"]
        return
    mass = maps.block_map.mass[:, 0].numpy()
    assert abs(mass - probabilities[0].mean(1)).max() < 1e-6


class Frames(nn.Module):
    """Makes tokens of features ``[batch, channels, (frames,) rows, columns]`` by a function."""

    def __init__(self, function, shape):
        super().__init__()
        torch.manual_seed(0)
        self.patch = (nn.Conv3d if len(shape) == 5 else nn.Conv2d)(4, CHANNELS, 1)
        self.function, self.attention = function, Attention(lambda a, x: a.attend(x, x))

    def forward(self, sample, timestep):
        return self.attention(self.function(self.patch(sample)))


def by_token(features):
    return features.flatten(2).mT


def of_both_images(features):
    """As many frames as images: those of both images are put into one sequence."""
    return features.permute(2, 0, 3, 4, 1).reshape(2, -1, CHANNELS)


def written(into, count=None):
    """Tokens that are written into a new tensor, as HiDream has them; ``count``: of more tokens."""

    def function(features):
        x = by_token(features)
        y = x.new_zeros(len(x), count or x.shape[1], x.shape[2])
        into(y, x)
        return y

    return function


def into_places(y, x):
    y[:, : x.shape[1]] = x


IMAGE, VIDEO, CUT = (
    (2, 4, 8, 8),
    (2, 4, 2, 4, 6),
    "it attends with image tokens whose rows, columns or frames were cut",
)
ORDER = "its tokens or sequences were put into another order (views)"
SHAPES = {
    "a corner": (lambda x: by_token(x[:, :, :2, :3]), (2, 4, 4, 6), CUT),
    "padded": (lambda x: by_token(nn.functional.pad(x, (0, 2, 0, 2))), IMAGE, CUT),
    "four times": (lambda x: by_token(torch.cat([torch.cat([x, x], 3)] * 2, 2)), IMAGE, CUT),
    "columns first": (lambda x: by_token(x.mT), IMAGE, ORDER),
    "every other": (lambda x: by_token(x[:, :, 1::2, 1::2]), IMAGE, ORDER),
    "half as high": (
        lambda x: by_token(nn.functional.avg_pool2d(x, (2, 1))),
        (2, 4, 4, 6),
        "it attends with image tokens in 2 x 6",
    ),
    "some frames": (lambda x: by_token(x[:, :, :2]), (2, 4, 4, 4, 6), CUT),
    "frames last": (lambda x: by_token(x.permute(0, 1, 3, 4, 2)), VIDEO, ORDER),
    "frames for images": (lambda x: by_token(x.transpose(0, 2)), VIDEO, ORDER),
    "of both images": (of_both_images, VIDEO, ORDER),
    "written into more": (written(into_places, 80), IMAGE, "its tokens or sequences come from a write"),
    "written backwards": (
        written(lambda y, x: y.copy_(x.flip(1))),
        IMAGE,
        "its tokens or sequences were put into another order (flip)",
    ),
    "written at an index": (
        written(lambda y, x: y.__setitem__((slice(None), torch.arange(63, -1, -1)), x)),
        IMAGE,
        "",
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_tokens_that_show_something_else_than_the_image(name):
    function, shape, said = SHAPES[name]
    denoiser = Frames(function, shape)
    with pytest.warns(errors.AttnpatchWarning), torch.no_grad(), attnpatch.capture(denoiser) as maps:
        denoiser(numbers(1, *shape), 5)
    assert list(maps.left_out) == ["attention"] and maps.left_out["attention"].startswith(said)
    assert maps.num_runs == 0


WHOLE = {
    "half as large": (lambda x: by_token(nn.functional.avg_pool2d(x, 2)), IMAGE),
    "twice as large": (lambda x: by_token(nn.functional.interpolate(x, scale_factor=2)), IMAGE),
    "padded and cut again": (
        lambda x: by_token(nn.functional.pad(x, (0, 2, 0, 2))[..., :8, :8]),
        IMAGE,
    ),
    "a video": (by_token, VIDEO),
    "written into new ones": (written(into_places), IMAGE),
    "copied": (written(lambda y, x: y.copy_(x)), IMAGE),
}


@pytest.mark.parametrize("name", WHOLE)
def test_tokens_that_show_all_of_the_image(name):
    function, shape = WHOLE[name]
    denoiser = Frames(function, shape)
    with torch.no_grad(), attnpatch.capture(denoiser) as maps:
        denoiser(numbers(1, *shape), 5)
    assert not maps.left_out and maps.num_runs == 1


class Joint(nn.Module):
    """Attends from image and text together; ``into`` makes the image's tokens."""

    def __init__(self, into):
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.into = nn.Conv2d(4, CHANNELS, 1), into
        self.attention = Attention(lambda a, x: a.attend(x, x))

    def forward(self, sample, timestep, encoder_hidden_states):
        return self.attention(torch.cat([self.into(self.patch(sample)), encoder_hidden_states], 1))


def padded(features):
    return nn.functional.pad(by_token(features), (0, 0, 0, 16))


@pytest.mark.parametrize("into", [written(into_places), padded])
def test_image_tokens_beside_a_text(into):
    """The text is no part of what is asked for; tokens that are not known may be, so they are not passed over."""
    denoiser, is_known = Joint(into), into is not padded
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        with attnpatch.capture(denoiser, blocks=Blocks.tiles(8, 8, 2)) as maps:
            denoiser(numbers(1, *IMAGE), 5, numbers(2, 2, 7, CHANNELS))
    assert maps.num_runs == is_known
    assert ("80 queries that are not known" in maps.left_out.get("attention", "")) is not is_known
