"""Which attention of a model is patched: patterns as ``explain`` prints them and as ``capture`` takes them, and layers."""

import pytest
import torch
import zoo
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import attnpatch
from attnpatch.errors import PatchError

IDS = zoo.tokens(40)


def llama():
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def by_rows(model, *args):
    """Paths of a patched model's sites that run by rows; the result is compared with the native one."""
    with torch.no_grad():
        attnpatch.apply(model, mode="never")
        native = [t for t in torch.utils._pytree.tree_leaves(model(*args)) if isinstance(t, torch.Tensor)]
        attnpatch.apply(model, mode="always")
        now = [t for t in torch.utils._pytree.tree_leaves(model(*args)) if isinstance(t, torch.Tensor)]
    assert all(map(torch.equal, native, now))
    sites = attnpatch.report(model).sites
    return [site.name for site in sites if site.counts["by_rows"] and site.why != "masks"]


class Mixer(nn.Module):
    """Attention that no name tells, and that ``softmax`` in its code does."""

    def forward(self, x):
        return torch.softmax(x @ x.mT, -1) @ x


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixer, self.norm = Mixer(), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + self.mixer(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


LAYERS = [f"model.layers.{i}.self_attn" for i in range(3)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, LAYERS),
        ({"sites": "model.layers.*.self_attn"}, LAYERS),
        ({"sites": "*.2.self_attn"}, LAYERS[2:]),
        ({"sites": "model.layers.[01]*"}, LAYERS[:2]),
        ({"sites": "model.layers.1.self_attn"}, LAYERS[1:2]),
        ({"sites": ["*.0.*", "model.layers.2.self_attn"]}, [LAYERS[0], LAYERS[2]]),
        ({"layers": [0, 1]}, LAYERS[:2]),
        ({"layers": (-1,)}, LAYERS[2:]),
        ({"layers": range(1, 3)}, LAYERS[1:]),
        ({"sites": "model.layers.[12].*", "layers": [1]}, LAYERS[1:2]),
    ],
)
def test_patterns_and_layers(options, expected):
    model = llama()
    attnpatch.apply(model, min_tokens=0, **options)
    assert by_rows(model, IDS) == expected
    with attnpatch.capture(model, attnpatch.Blocks.fixed(16)) as maps:
        model(IDS)
    assert list(maps.block_map.layers) == [int(name.split(".")[2]) for name in expected]


def test_a_pattern_is_what_explain_prints_and_what_capture_takes():
    model = llama()
    (group,) = attnpatch.explain(model, seq_len=40, min_tokens=0).groups
    attnpatch.apply(model, sites=group.sites)
    assert by_rows(model, IDS) == LAYERS
    with attnpatch.capture(model, attnpatch.Blocks.fixed(16), sites=group.sites) as maps:
        model(IDS)
    assert maps.block_map.layers == (0, 1, 2)


def test_modules_that_nothing_recognises_are_matched_part_by_part():
    class Quiet(nn.Module):
        """Its product is hidden from the code that looks for one."""

        def __init__(self):
            super().__init__()
            self.one = nn.Identity()

        def forward(self, x):
            return getattr(torch, "soft" + "max")(getattr(x, "mat" + "mul")(x.mT), -1) @ x

    model = Net()
    for block in model.blocks:
        block.mixer = Quiet()
    with pytest.raises(PatchError, match="has no attention module"):
        attnpatch.apply(model)
    attnpatch.apply(model, sites="blocks.*.mixer")
    assert by_rows(model, zoo.floats(1, 40, 8)) == [f"blocks.{i}.mixer" for i in range(3)]
    assert [site.why for site in attnpatch.report(model).sites] == ["asked for"] * 3


def test_candidates_that_match_are_still_tried():
    model = Net()
    attnpatch.apply(model, sites="blocks.*", layers=[0, 2])
    assert by_rows(model, zoo.floats(1, 40, 8)) == ["blocks.0.mixer", "blocks.2.mixer"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sites": "layers.*.attn"}, "no module of LlamaForCausalLM matches 'layers.*.attn'; its attention modules are: "
         "model.layers.*.self_attn"),
        ({"sites": "model.layers.7.self_attn"}, "has no module 'model.layers.7.self_attn'; near it: 'model.layers."),
        ({"layers": [7]}, "layers=[7]: the layers with attention are 0, 1, 2; give some of these numbers, or -1 to -3"),
        ({"layers": []}, "layers=[] is not accepted; give a list of numbers such as [0, -1]"),
        ({"layers": 3}, "layers=3 is not accepted"),
        ({"layers": "01"}, "layers='01' is not accepted"),
        ({"layers": [True]}, "layers=[True] is not accepted"),
        ({"sites": ""}, "sites='' is not accepted"),
        ({"sites": {"a": 1}}, "sites={'a': 1} is not accepted; give 'auto', 'registered', a pattern such as"),
    ],
)  # fmt: skip
def test_what_matches_nothing_is_refused_in_one_line(options, says):
    model = llama()
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(PatchError) as error:
        attnpatch.apply(model, **options)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert [dict(vars(module)) for module in model.modules()] == before


def test_other_layers_replace_the_sites_of_an_earlier_apply():
    model = llama()
    attnpatch.apply(model, layers=[0])
    attnpatch.apply(model, mode="always")
    assert by_rows(model, IDS) == LAYERS[:1]
    attnpatch.apply(model, layers=[1, 2])
    assert by_rows(model, IDS) == LAYERS[1:]
    with (
        pytest.raises(
            PatchError, match=r"patched with sites='auto', layers=\[1, 2\]; leave sites and layers out"
        ),
        attnpatch.patched(model, layers=[0]),
    ):
        pass
