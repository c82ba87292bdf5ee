"""A cache is known by its type, whatever the argument is called and wherever it stands."""

import inspect
import warnings

import pytest
import torch
import zoo
from torch import nn

import attnpatch
from attnpatch import Blocks
from attnpatch.hosts.transformers import caches, calls

IDS = zoo.tokens(40)
# transformers 5.24 renamed it.
PARAMETERS = inspect.signature(zoo.BY_NAME["llama"].build("sdpa").forward).parameters
NAME = "cache" if "cache" in PARAMETERS else "past_key_values"


class KeysAndValues:
    """A cache of one's own, without a base class; ``__slots__`` leave no room for a weak reference."""

    __slots__ = ("kept",)

    def __init__(self):
        self.kept = []

    def get_seq_length(self):
        return self.kept[0].shape[-2] if self.kept else 0

    def update(self, key, value):
        new = [key, value]
        self.kept = [torch.cat(pair, -2) for pair in zip(self.kept, new, strict=True)] if self.kept else new
        return self.kept


class ToyAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = zoo.randomise(nn.Linear(8, 24))

    def forward(self, x, remembered=None):
        query, key, value = self.qkv(x).chunk(3, -1)
        if remembered is not None:
            key, value = remembered.update(key, value)
        scores = query @ key.mT
        ahead = torch.ones_like(scores, dtype=torch.bool).triu(1 + key.shape[1] - query.shape[1])
        return torch.softmax(scores.masked_fill(ahead, float("-inf")), -1) @ value


class TwoTowers(nn.Module):
    """Text goes on while another image or more sound comes in."""

    def __init__(self):
        super().__init__()
        self.listening, self.reading = ToyAttention(), ToyAttention()

    def forward(self, text, sound=None, words=None, noises=None):
        heard = 0 if sound is None else self.listening(sound, noises).mean()
        return self.reading(text, words) + heard


class Holder(nn.Module):
    """A model around a model, which hands the cache on under a name of its own."""

    def __init__(self, model, hand_on):
        super().__init__()
        self.model, self.hand_on = model, hand_on

    def forward(self, ids, memory):
        return self.model(ids, **{NAME: self.hand_on(memory)})


def by_name(model):
    return model, lambda ids, cache: model(ids, **{NAME: cache})


def by_position(model):
    before = list(inspect.signature(model.forward).parameters).index(NAME)
    return model, lambda ids, cache: model(ids, *[None] * (before - 1), cache)


def by_another_name(model):
    outer = Holder(model, lambda cache: cache)
    return outer, lambda ids, cache: outer(ids, memory=cache)


def in_a_dict(model):
    outer = Holder(model, lambda inputs: inputs["state"])
    return outer, lambda ids, cache: outer(ids, {"state": cache})


@pytest.mark.parametrize("way", [by_name, by_position, by_another_name, in_a_dict])
def test_pieces_are_one_map_however_the_cache_is_handed(way):
    from transformers import DynamicCache

    model = zoo.BY_NAME["llama"].build("sdpa")
    outer, call = way(model)
    with torch.no_grad():
        with attnpatch.capture(outer, blocks=Blocks.fixed(8)) as whole:
            call(IDS, DynamicCache(config=model.config))
        cache = DynamicCache(config=model.config)
        with attnpatch.capture(outer, blocks=Blocks.fixed(8)) as pieces:
            for piece in IDS.split([17, 1, 22], 1):
                call(piece, cache)
    assert len(pieces.sequences) == 1
    torch.testing.assert_close(pieces.block_map.mass, whole.block_map.mass, atol=1e-6, rtol=0)


def test_generate_adds_to_one_map():
    """The prompt's blocks and those of the tokens that came after it."""
    model = zoo.BY_NAME["llama"].build("sdpa")
    with attnpatch.capture(model, blocks=Blocks.fixed(8)) as maps:
        whole = model.generate(IDS, max_new_tokens=8, do_sample=False)
    with attnpatch.capture(model, blocks=Blocks.fixed(8)) as dense, torch.no_grad():
        model(whole[:, :-1])
    assert maps.block_map.mass.shape[1:] == (6, 6)
    torch.testing.assert_close(maps.block_map.mass, dense.block_map.mass, atol=1e-5, rtol=0)


@pytest.mark.parametrize("takes", ["keyword", "position"])
def test_two_caches_of_two_lengths(takes):
    """Each site goes on where its own cache ends."""
    model = TwoTowers()
    text, sound = zoo.floats(1, 24, 8), zoo.floats(1, 40, 8, seed=3)
    with attnpatch.capture(model, blocks=Blocks.fixed(8)) as whole:
        model(text, sound)
    words, noises = KeysAndValues(), KeysAndValues()
    with attnpatch.capture(model, blocks=Blocks.fixed(8)) as pieces:
        for some, more in zip(text.split([8, 16], 1), sound.split([24, 16], 1), strict=True):
            if takes == "position":
                model(some, more, words, noises)
            else:
                model(some, noises=noises, words=words, sound=more)
    assert len(pieces.sequences) == 1
    for site in ("listening", "reading"):
        found, wanted = pieces[site].mass, whole[site].mass
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_another_image_while_the_text_goes_on():
    """What has no part in the cache begins at its own first token each time."""
    model = TwoTowers()
    text, image = zoo.floats(1, 24, 8), zoo.floats(1, 16, 8, seed=3)
    with attnpatch.capture(model, blocks=Blocks.fixed(8)) as whole:
        model(text, image)
    words = KeysAndValues()
    with attnpatch.capture(model, blocks=Blocks.fixed(8)) as pieces:
        model(text[:, :8], words=words)
        model(text[:, 8:], image, words=words)
    for site in ("listening", "reading"):
        torch.testing.assert_close(pieces[site].mass, whole[site].mass, atol=1e-6, rtol=0)


@pytest.mark.parametrize("raises", [True, False])
def test_a_cache_that_counts_nothing_is_no_past(raises):
    """One of linear attention only raises when it is asked how long it is; one of hashed buckets says nothing."""

    class States:
        def get_seq_length(self):
            if raises:
                raise ValueError("only linear attention here")

        def update(self, state):
            return state

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = ToyAttention()

        def forward(self, x, states):
            return self.attention(x)

    model = Model()
    with warnings.catch_warnings(), attnpatch.capture(model, blocks=Blocks.fixed(8)) as maps:
        warnings.simplefilter("error")
        model(zoo.floats(1, 16, 8), states=States())
    assert maps.block_map.mass.shape[1:] == (2, 2)


def annotated(self, input_ids, memory: "Cache | None" = None, **more):  # noqa: F821
    """A name that is nowhere to be found, as in a file of a model repository."""


def plain(self, input_ids, past_key_values=None):
    """As models were written for years."""


def without(self, input_ids, use_cache=False, cache_position: torch.Tensor | None = None):
    """Names that begin alike."""


@pytest.mark.parametrize(
    ("forward", "name"), [(annotated, "memory"), (plain, "past_key_values"), (without, None)]
)
def test_the_parameter_for_a_cache(forward, name):
    model = type("Model", (nn.Module,), {"forward": forward})()
    assert caches.parameter_of(model) == name


def test_the_parameter_for_a_cache_of_transformers():
    model = zoo.BY_NAME["llama"].build("sdpa")
    assert caches.parameter_of(model) == NAME
    with attnpatch.patched(model):
        assert caches.parameter_of(model) == NAME


def test_the_parameter_for_a_cache_behind_an_adapter():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        zoo.BY_NAME["llama"].build("sdpa"), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    assert caches.parameter_of(model) == NAME


ONE, SOME = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 7, dtype=torch.long)
CALLS = {
    "a step": ({"input_ids": ONE}, True),
    "a step with a padding mask": ({"input_ids": ONE, "attention_mask": SOME, "position_ids": ONE}, True),
    "an embedded step": ({"inputs_embeds": torch.zeros(1, 1, 8)}, True),
    "a prompt": ({"input_ids": SOME}, False),
    "two sequences": ({"input_ids": ONE.expand(2, 1)}, False),
    "beside a picture of one colour": ({"input_ids": ONE, "pixel_values": torch.zeros(1, 1, 8, 8)}, False),
    "a sound of one channel": ({"input_values": torch.zeros(1, 1, 50)}, False),
    "beside an encoder's states": ({"input_ids": ONE, "encoder_outputs": (torch.zeros(1, 9, 8),)}, False),
    "nothing": ({}, False),
}


@pytest.mark.parametrize("name", CALLS)
def test_which_call_is_of_one_token(name):
    """Only there no token can lie in another's place: elsewhere functions between attention modules are looked at."""
    given, is_single = CALLS[name]
    assert calls.read_call(None, (), given).is_single == is_single
    assert calls.read_call(None, tuple(given.values()), {}).is_single == (is_single and name == "a step")


def test_a_prompt_that_was_turned_is_left_out_when_tokens_follow_one_by_one():
    model = zoo.BY_NAME["llama"].build("sdpa", torch.float32).eval()
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(lambda module, given: (given[0].flip(1), *given[1:]))
    ids = torch.arange(9)[None]
    with (
        torch.no_grad(),
        pytest.warns(Warning, match="another order"),
        attnpatch.capture(model, Blocks.fixed(3)) as maps,
    ):
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert maps.block_map.layers == (0,) and len(maps.left_out) == 1
