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


MOVED = {
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
}


def filtered(x):
    return nn.functional.conv1d(x.mT, FILTER.flip(2), padding=1, groups=32).mT


IN_ORDER = {
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


@pytest.mark.parametrize("name", IN_ORDER)
@torch.no_grad()
def test_tokens_that_are_in_order_again(name):
    model, ids, seen = IN_ORDER[name].eval(), torch.cat([tokens(24), tokens(24, 2)]), []

    def look(layer, given):
        q, k, _ = layer.split(given[0])
        seen.append((q @ k.mT / 8**0.5).softmax(-1))

    hooks = [layer.register_forward_pre_hook(look) for layer in model.layers]
    model(ids)
    for hook in hooks:
        hook.remove()
    maps = captured(model, lambda: model(ids))
    assert not maps.left_out
    for b in range(2):
        same(maps.block_map.mass[b], torch.stack([reduced(p[b], cuts(24), cuts(24)) for p in seen]))


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
