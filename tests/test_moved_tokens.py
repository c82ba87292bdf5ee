"""Tokens that a model puts into another order between its attention modules are none that blocks know."""

import warnings

import pytest
import torch
from test_known_facts import captured, cuts, reduced, same, tokens
from torch import nn

ORDER = torch.randperm(24, generator=torch.Generator().manual_seed(0))
BACK = ORDER.argsort()
FILTER = torch.tensor([1.0, 2.0, 3.0]).expand(32, 1, 3)


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(32, 96)

    def split(self, x):
        return self.project(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        q, k, v = self.split(x)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Two layers with residuals; what comes before and after a layer's attention is the test's."""

    def __init__(self, before=lambda x: x, after=lambda x: x, of_ids=lambda ids: ids):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after, self.of_ids = before, after, of_ids
        self.embed, self.norm = nn.Embedding(97, 32), nn.LayerNorm(32)
        self.layers = nn.ModuleList([SelfAttention() for _ in range(2)])

    def forward(self, ids):
        x = self.embed(self.of_ids(ids))
        for layer in self.layers:
            x = x + self.after(layer(self.before(self.norm(x))))
        return x


class InARow(Model):
    """Layers without anything between them."""

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def by_sums(x):
    return x.gather(1, x.sum(-1).argsort(1)[..., None].expand_as(x))


def by_columns(x):
    return x.unflatten(1, (4, 6)).transpose(1, 2).flatten(1, 2)


def by_rows(x):
    return x.unflatten(1, (6, 4)).transpose(1, 2).flatten(1, 2)


def in_squares(x):
    return x.unflatten(1, (2, 2, 2, 3)).transpose(2, 3).flatten(1, 4)


def odd_last(x):
    return torch.cat([x[:, ::2], x[:, 1::2]], 1)


def halves_swapped(x):
    return torch.cat(x.chunk(2, 1)[::-1], 1)


SQUARE = torch.eye(24)[ORDER]


def written(x):
    """Pieces in other places of a new tensor."""
    y = torch.empty_like(x)
    y[:, :12] = x[:, 12:]
    y[:, 12:].copy_(x[:, :12])
    return y


def one_by_one(x):
    y = torch.zeros_like(x)
    for place in range(24):
        y[:, 23 - place] = x[:, place]
    return y


def at_index(x):
    y = torch.empty_like(x)
    y[:, ORDER] = x
    return y


def shifted_and_cut(x):
    return nn.functional.pad(x, (0, 0, 4, 0))[:, :24]


def between_batch_and_tokens(x):
    return x.transpose(0, 1).reshape(x.shape)


@torch.jit.script
def scripted(x):
    return x.flip(1)


def in_patches(x):
    """Pixels of a square that were put among the channels, as tokens of their own."""
    patches = nn.functional.pixel_unshuffle(x.mT.unflatten(2, (4, 6)), 2)
    return patches.unflatten(1, (32, 4)).permute(0, 3, 4, 2, 1).flatten(1, 3)


INDEX = ORDER[None, :, None].expand(2, 24, 32)


# Each is another way to put tokens into another order, or to have others in their places. The word is in the reason.
def with_neighbours(x):
    """Along channels, as MobileBERT has them."""
    after, before = x[:, 1:], x[:, :-1]
    pad = nn.functional.pad
    return torch.cat([pad(after, [0, 0, 0, 1, 0, 0]), x, pad(before, [0, 0, 1, 0, 0, 0])], 2)


def set_as_data(x):
    y = x.clone()
    y.data = x.flip(1)
    return y


LOST = {
    "stacked in another order": (lambda x: torch.stack(x.unbind(1)[::-1], 1), "stack"),
    "one by one, joined": (lambda x: torch.cat(x.split(1, 1)[::-1], 1), "cat"),
    "the first one last": (lambda x: torch.cat([x[:, 1:], x[:, :1]], 1), "views"),
    "the batch's first one last": (lambda x: torch.cat([x[1:], x[:1]]), "cat"),
    "by hstack": (lambda x: torch.hstack([x[:, 12:], x[:, :12]]), "hstack"),
    "a product with an order": (lambda x: SQUARE @ x, "code that"),
    "a sum over labels": (lambda x: torch.einsum("ij,bjc->bic", SQUARE, x), "code that"),
    "a layer along tokens": (lambda x: nn.functional.linear(x.mT, nn.Parameter(SQUARE)).mT, "linear"),
    "einsum that turns": (
        lambda x: torch.einsum("bhwc->bwhc", x.unflatten(1, (4, 6))).flatten(1, 2),
        "einsum",
    ),
    "lerp": (lambda x: torch.lerp(x, x.flip(1), 1.0), "flip"),
    "set as data": (set_as_data, "flip"),
    "where": (lambda x: torch.where(torch.ones(2, 24, 32, dtype=torch.bool), x.flip(1), x), "flip"),
    "random numbers added": (lambda x: x.flip(1) + torch.randn(2, 24, 32), "flip"),
    "zeros added": (lambda x: x.flip(1) + torch.zeros_like(x), "flip"),
    "written by pieces": (written, "copy_"),
    "written one by one": (one_by_one, "writ"),
    "written at an index": (at_index, "writ"),
    "put at an index": (
        lambda x: torch.zeros_like(x).index_put_((torch.arange(2),), by_columns(x), False),
        "index_put_",
    ),
    "scattered": (lambda x: torch.zeros_like(x).scatter(1, INDEX, x), "scatter"),
    "index_add": (lambda x: torch.zeros_like(x).index_add(1, ORDER, x), "index_add"),
    "a slice over a slice": (lambda x: torch.slice_scatter(x, x[:, 12:], 1, 0, 12), "slice_scatter"),
    "looked up": (lambda x: torch.stack([nn.functional.embedding(ORDER, one) for one in x]), "embedding"),
    "taken": (lambda x: x.take(torch.arange(x.numel()).view(x.shape).flip(1)), "take"),
    "channels and tokens in one view": (lambda x: x.mT.reshape(x.shape), "reshape"),
    "strides": (lambda x: x.as_strided((2, 4, 6, 32), (768, 32, 128, 1)).reshape(x.shape), "views"),
    "shuffled channels": (lambda x: nn.functional.channel_shuffle(x, 4), "channel_shuffle"),
    "in patches": (in_patches, "pixel_unshuffle"),
    "shifted and cut": (shifted_and_cut, "views"),
    "padded with its own end": (
        lambda x: nn.functional.pad(x.mT, (4, 0), mode="circular")[..., :24].mT,
        "pad",
    ),
    "between batch and tokens": (between_batch_and_tokens, "views"),
    "half of them twice": (lambda x: x[:, :12].repeat_interleave(2, 1), "repeat_interleave"),
    "one for all": (lambda x: x[:, :1].expand(-1, 24, -1), "expand"),
    "numpy": (lambda x: torch.from_numpy(x.numpy()[:, ::-1].copy()), "code that attnpatch cannot follow"),
    "lists": (lambda x: torch.tensor([row[::-1] for row in x.tolist()]), "tensor"),
    "scripted": (scripted, "code that attnpatch cannot follow"),
    "an operator by its overload": (lambda x: torch.ops.aten.flip.default(x, [1]), "flip"),
    "vmap": (lambda x: torch.vmap(lambda one: one[ORDER])(x), "code that attnpatch cannot follow"),
    "by keyword, joined": (lambda x: torch.cat(tensors=[x[:, 12:], x[:, :12]], dim=1), "views"),
    "by keyword, stacked": (lambda x: torch.stack(tensors=x.unbind(dim=1)[::-1], dim=1), "stack"),
    "by keyword, a product": (lambda x: torch.matmul(input=SQUARE, other=x), "code that"),
    "by keyword, a layer": (
        lambda x: nn.functional.linear(input=x.mT, weight=nn.Parameter(SQUARE)).mT,
        "linear",
    ),
    "by keyword, scattered": (
        lambda x: torch.scatter(input=torch.zeros_like(input=x), dim=1, index=INDEX, src=x),
        "scatter",
    ),
    "by keyword, repeated": (
        lambda x: torch.repeat_interleave(input=x[:, :12], repeats=2, dim=1),
        "repeat_interleave",
    ),
    "by keyword, zeros added": (lambda x: torch.add(input=x.flip(1), other=torch.zeros_like(x)), "flip"),
    "slices stacked": (lambda x: torch.stack([x[:, :12], x[:, 12:]], 2).flatten(1, 2), "stack"),
}


@pytest.mark.parametrize("name", LOST)
@torch.no_grad()
def test_tokens_that_are_lost_sight_of_before_attention(name):
    before, word = LOST[name]
    numbers = torch.arange(1.0, 49).view(2, 24, 1).expand(2, 24, 32)
    assert name == "random numbers added" or not torch.equal(before(numbers.clone()), numbers)
    model, ids = Model(before).eval(), torch.cat([tokens(24), tokens(24, 2)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maps = captured(model, lambda: model(ids))
    assert sorted(maps.left_out) == ["layers.0", "layers.1"]
    assert all(word in why for why in maps.left_out.values()), maps.left_out


def copied_backwards(x):
    return torch.empty_like(x).copy_(x.flip(1))


def written_over(x):
    made = x.flip(1)
    return made.copy_(x)


BY_KEYWORD = {
    "backwards": lambda x: torch.flip(input=x, dims=(1,)),
    "shifted": lambda x: torch.roll(input=x, shifts=3, dims=1),
    "shifted, by a method": lambda x: x.roll(shifts=3, dims=1),
    "selected": lambda x: torch.index_select(input=x, dim=1, index=ORDER),
    "gathered": lambda x: torch.gather(input=x, dim=1, index=INDEX[: len(x)]),
    "by columns": lambda x: torch.flatten(
        input=torch.transpose(input=torch.unflatten(input=x, dim=1, sizes=(4, 6)), dim0=1, dim1=2),
        start_dim=1,
        end_dim=2,
    ),
}
MOVED = {
    "copied backwards": Model(copied_backwards),
    "copied backwards, not waiting": Model(lambda x: torch.empty_like(x).copy_(x.flip(1), True)),
    "copied by columns, not waiting": Model(lambda x: torch.empty_like(x).copy_(by_columns(x), True)),
    "copied backwards, by keyword": Model(lambda x: torch.empty_like(x).copy_(other=x.flip(1))),
    "by columns": Model(by_columns, by_rows),
    "in squares": Model(in_squares),
    "halves swapped": Model(halves_swapped, halves_swapped),
    "odd ones last": Model(odd_last),
    "ids by columns": Model(of_ids=by_columns),
    "backwards": Model(lambda x: x.flip(1), lambda x: x.flip(1)),
    "shifted": Model(lambda x: x.roll(3, 1), lambda x: x.roll(-3, 1)),
    "picked": Model(lambda x: x[:, ORDER], lambda x: x[:, BACK]),
    "selected": Model(lambda x: x.index_select(1, ORDER), lambda x: x.index_select(1, BACK)),
    "sorted": Model(by_sums),
    "the batch in another order": Model(lambda x: x[[1, 0]], lambda x: x[[1, 0]]),
    "ids backwards": Model(of_ids=lambda ids: ids.flip(1)),
    **{f"by keyword, {name}": Model(change) for name, change in BY_KEYWORD.items()},
}


def filtered(x):
    return nn.functional.conv1d(x.mT, FILTER.flip(2), padding=1, groups=32).mT


def put_together(x):
    """Rows and columns in halves, put together from their pieces."""
    y = torch.empty_like(x)
    y[:, :12] = x[:, :12]
    y[:, 12:] = x[:, 12:]
    return y


def marked(x):
    """Some tokens are hidden behind a learned one, as in training by masks."""
    y = x.clone()
    y[torch.arange(48).view(2, 24) % 5 == 0] = nn.Parameter(torch.ones(32))
    return y


IN_ORDER = {
    "written over by tokens in order": Model(written_over),
    "written in their places": Model(put_together),
    "padded at the end and cut": Model(lambda x: nn.functional.pad(x, (0, 0, 0, 4))[:, :24]),
    "some hidden": Model(marked),
    "through windows": Model(lambda x: x + in_squares(x)),
    "mixed over tokens": Model(lambda x: x + nn.functional.linear(x.mT, SQUARE).mT),
    "a running sum": Model(lambda x: x.cumsum(1) / 24),
    "a mask that takes all": Model(lambda x: x[torch.ones(2, 24, dtype=torch.bool)].view(x.shape)),
    "without their mean": Model(lambda x: x - x.mean(1, keepdim=True)),
    "pooled, the length kept": Model(lambda x: nn.functional.avg_pool1d(x.mT, 3, 1, 1).mT),
    "through a filter that was turned": Model(filtered),
    "there and back": Model(lambda x: x[:, ORDER][:, BACK]),
    "by an index that says nothing": Model(lambda x: x[:, torch.arange(24)]),
    "by columns and back": Model(lambda x: by_rows(by_columns(x))),
    "swapped and back": Model(lambda x: halves_swapped(halves_swapped(x))),
    "cut and joined again": Model(lambda x: torch.cat(x.split([5, 12, 7], 1), 1)),
    "by columns after attention": Model(after=by_columns),
    "turned twice": Model(lambda x: x.flip(1).flip(1)),
    "moved after attention": Model(after=lambda x: x.flip(1)),
    "added to tokens in order": Model(lambda x: x + x.flip(1)),
    "neighbours beside them": Model(lambda x: with_neighbours(x) @ torch.ones(96, 32) / 96),
}


@pytest.mark.parametrize("name", MOVED)
def test_tokens_that_were_moved_before_attention(name):
    model, ids = MOVED[name].eval(), torch.cat([tokens(24), tokens(24, 2)])
    with torch.no_grad():
        native = model(ids)
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maps = captured(model, lambda: results.append(model(ids)))
    assert sorted(maps.left_out) == ["layers.0", "layers.1"]
    assert all("another order" in why for why in maps.left_out.values())
    assert torch.allclose(results[0], native, atol=1e-6)


def is_mapped(model, ids, attentions=None):
    """Each map is what a loop makes of the softmax of the query and key that each attention computes.

    ``attentions`` are the model's layers, unless others are given.
    """
    seen, places = [], cuts(ids.shape[1])

    def look(layer, given):
        # By the class: the call of another ``split`` would be a second attention. A copy: looking is no use of a tensor.
        q, k, _ = type(layer).split(layer, given[0].clone())
        seen.append((q @ k.mT / 8**0.5).softmax(-1))

    hooks = [each.register_forward_pre_hook(look) for each in attentions or model.layers]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    maps = captured(model, lambda: model(ids))
    assert not maps.left_out, maps.left_out
    for b in range(len(ids)):
        same(maps.block_map.mass[b], torch.stack([reduced(p[b], places, places) for p in seen]))


@pytest.mark.parametrize("name", IN_ORDER)
@torch.no_grad()
def test_tokens_that_are_in_order_again(name):
    is_mapped(IN_ORDER[name].eval(), torch.cat([tokens(24), tokens(24, 2)]))


def test_only_what_was_moved_is_left_out():
    """A second layer that reads the text backwards."""

    class Backwards(Model):
        def forward(self, ids):
            x = self.embed(ids)
            x = (x + self.layers[0](x)).flip(1)
            return (x + self.layers[1](x)).flip(1)

    model = Backwards().eval()
    with pytest.warns(Warning, match="another order"):
        maps = captured(model, lambda: model(tokens(24)))
    assert list(maps.left_out) == ["layers.1"]
    assert maps.block_map.layers == (0,)


class MovedInside(SelfAttention):
    def __init__(self, move):
        super().__init__()
        self.move = move

    def split(self, x):
        return super().split(self.move(x))


INSIDE = {
    "lerp": lambda x: torch.lerp(x, x.flip(1), 1.0),
    "lerp from the moved": lambda x: torch.lerp(x.roll(3, 1), x, 0.0),
    "lerp_": lambda x: (x * 1).lerp_(x.flip(1), 1.0),
    "where": lambda x: torch.where(torch.ones(24, 1, dtype=torch.bool), x.flip(1), x),
    "where, the other": lambda x: torch.where(torch.zeros(24, 1, dtype=torch.bool), x, x[:, ORDER]),
    **{f"by keyword, {name}": change for name, change in BY_KEYWORD.items()},
}


@pytest.mark.parametrize("name", INSIDE)
def test_tokens_that_were_moved_or_chosen_inside(name):
    model = Model().eval()
    model.layers[1] = MovedInside(INSIDE[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maps = captured(model, lambda: model(tokens(24)))
    assert list(maps.left_out) == ["layers.1"]
    assert maps.block_map.layers == (0,)
