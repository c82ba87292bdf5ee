"""Attention modules around other attention modules: the tokens of the inner ones are followed through both."""

import warnings

import pytest
import torch
from test_known_facts import captured, tokens
from test_moved_tokens import BY_KEYWORD, IN_ORDER, LOST, MOVED, Model, SelfAttention, is_mapped
from torch import nn

import attnpatch
from attnpatch import Blocks


class BlockAttention(nn.Module):
    """As ``BertAttention`` or CLIP's ``ResidualAttentionBlock``: an attention by name that calls another one."""

    def __init__(self, inside=lambda x: x, after=lambda x: x):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(32), SelfAttention()
        self.inside, self.after = inside, after

    def forward(self, x):
        return self.after(self.attention(self.inside(self.norm(x))))


def model_of(before=lambda x: x, inside=lambda x: x, after=lambda x: x):
    model = Model(before)
    torch.manual_seed(1)
    model.layers = nn.ModuleList([BlockAttention(inside, after) for _ in range(2)])
    return model.eval()


WAYS = {
    **{f"lost, {name}": before for name, (before, _) in LOST.items()},
    **{f"by keyword, {name}": before for name, before in BY_KEYWORD.items()},
    **{f"moved, {name}": model.before for name, model in MOVED.items() if not name.startswith("ids")},
}


@pytest.mark.parametrize("where", ["before", "inside"])
@pytest.mark.parametrize("name", WAYS)
@torch.no_grad()
def test_moved_tokens(name, where):
    model, ids = model_of(**{where: WAYS[name]}), torch.cat([tokens(24), tokens(24, 2)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maps = captured(model, lambda: model(ids))
    assert sorted(maps.left_out) == ["layers.0.attention", "layers.1.attention"]
    words = "another order", "come from", "another input"
    assert all(any(word in why for word in words) for why in maps.left_out.values()), maps.left_out


def test_tokens_that_the_first_one_returns_in_another_order():
    model = model_of(after=lambda x: x.flip(1))

    def forward(ids):
        x = model.embed(ids)
        for layer in model.layers:
            x = layer(x)
        return x

    model.forward = forward
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maps = captured(model, lambda: model(tokens(24)))
    assert list(maps.left_out) == ["layers.1.attention"]
    assert maps.block_map.layers == (0,)


@pytest.mark.parametrize("where", ["before", "inside"])
@pytest.mark.parametrize("name", [name for name in IN_ORDER if "attention" not in name])
def test_tokens_that_are_in_order(name, where):
    model = model_of(**{where: IN_ORDER[name].before})
    is_mapped(model, torch.cat([tokens(24), tokens(24, 2)]), [layer.attention for layer in model.layers])


class Alone(BlockAttention):
    """The model itself is an attention by name; the attention inside it is the only one."""


class AloneAttention(Alone):
    pass


@pytest.mark.parametrize("kind", [Alone, AloneAttention])
def test_a_model_that_is_called_an_attention(kind):
    """There is nothing to say of a module whose attention is another module's."""
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(1, 24, 32)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", attnpatch.errors.AttnpatchWarning)
        with attnpatch.capture(model, Blocks.fixed(8)) as maps:
            model(x)
    assert not maps.left_out and list(maps) == ["attention"]
