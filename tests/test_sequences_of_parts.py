"""Which sequence a call of a part belongs to: an encoder that runs on its own, layers that are called one by one."""

import copy

import pytest
import torch
import transformers
from test_sequences import WIDTH, build, cache_of, dense, joined, tokens
from transformers.modeling_outputs import BaseModelOutput

import attnpatch
from attnpatch import Blocks


def t5(implementation="sdpa"):
    """One layer: keys of the decoder's own tokens do not depend on the encoder's text."""
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, dropout_rate=0.0, initializer_factor=3.0,
        decoder_start_token_id=1, attn_implementation=implementation,
    )).eval()  # fmt: skip


def reduced(probabilities):
    """``[heads, rows, keys]`` as a plain loop reduces them."""
    mean = probabilities.double().mean(0)
    queries, keys = (
        [range(start, min(start + WIDTH, count)) for start in range(0, count, WIDTH)] for count in mean.shape
    )
    found = [[sum(mean[i, j].item() for i in q for j in k) / len(q) for k in keys] for q in queries]
    return torch.tensor([found], dtype=torch.float64)


def expected_of(text, answer):
    """The maps of the encoder, the decoder and between them."""
    with torch.no_grad():
        out = t5("eager")(
            input_ids=text,
            decoder_input_ids=tokens(3) if answer is None else answer,
            output_attentions=True,
            use_cache=False,
        )
    found = {"encoder.block": reduced(out.encoder_attentions[0][0])}
    if answer is not None:
        found["layer.0"] = reduced(out.decoder_attentions[0][0])
        found["layer.1"] = reduced(out.cross_attentions[0][0])
    return found


FIRST, SECOND, PREFIX = tokens(12), tokens(12, 2), tokens(3, 5)


def encoded_first(model):
    """Both texts are encoded before one of them is decoded."""
    one, _ = model.get_encoder()(FIRST), model.get_encoder()(SECOND)
    model(encoder_outputs=one, decoder_input_ids=PREFIX)
    return [(FIRST, None), (SECOND, None), (FIRST, PREFIX)]


def encoded_and_another(model):
    model.get_encoder()(FIRST)
    model(input_ids=SECOND, decoder_input_ids=PREFIX)
    return [(FIRST, None), (SECOND, PREFIX)]


def encoded_and_decoded(model):
    one = model.get_encoder()(FIRST)
    model(encoder_outputs=one, decoder_input_ids=PREFIX)
    return [(FIRST, PREFIX)]


def copy_of_one_of_two(model):
    """Two texts have one beginning of an answer; a copy of the first one's cache goes on."""
    one, _ = (model(input_ids=text, decoder_input_ids=PREFIX) for text in (FIRST, SECOND))
    encoded = BaseModelOutput(last_hidden_state=one.encoder_last_hidden_state)
    model(
        encoder_outputs=encoded,
        decoder_input_ids=tokens(2, 7),
        past_key_values=copy.deepcopy(one.past_key_values),
    )
    return [(FIRST, PREFIX), (SECOND, PREFIX), (FIRST, joined(PREFIX, tokens(2, 7)))]


@pytest.mark.parametrize("run", [encoded_first, encoded_and_another, encoded_and_decoded, copy_of_one_of_two])
def test_no_sequence_has_maps_of_two_texts(run):
    model = t5()
    with torch.no_grad(), attnpatch.capture(model, Blocks.fixed(WIDTH)) as maps:
        expected = run(model)
    assert not maps.left_out
    assert len(maps.sequences) == len(expected)
    for (text, answer), found in zip(expected, maps.sequences, strict=True):
        wanted = expected_of(text, answer)
        for kind, one in found.items():
            part = next(name for name in wanted if name in kind)
            torch.testing.assert_close(one.mass.double(), wanted[part], atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------- layers, one by one


def through(model, layers, hidden, cache, start=0):
    """Some layers, called as scripts do that hold one layer at a time."""
    length = hidden.shape[1]
    places = model.model.rotary_emb(hidden, torch.arange(start, start + length)[None])
    mask = torch.full((length, start + length), -1e9).triu(1 + start)[None, None]
    for layer in layers:
        hidden = layer(hidden, position_embeddings=places, attention_mask=mask, past_key_values=cache)
    return hidden


def by_layers(run, asked=None):
    model = build("two layers", "sdpa")
    with torch.no_grad(), attnpatch.capture(model, Blocks.fixed(WIDTH), layers=asked) as maps:
        run(model, model.model.layers, model.model.embed_tokens)
    return maps


def test_layers_that_fill_a_cache_have_the_tokens_of_the_first_one():
    """After the first layer, the cache counts tokens that the next layer does not have yet."""
    maps = by_layers(lambda model, layers, embed: through(model, layers, embed(tokens(12)), cache_of(model)))
    torch.testing.assert_close(
        maps.block_map.mass.double(), dense("two layers", tokens(12))[0], atol=1e-5, rtol=0
    )


@pytest.mark.filterwarnings("ignore::attnpatch.errors.AttnpatchWarning")
def test_without_the_first_layer_it_is_not_known_which_tokens_a_layer_has():
    run = lambda model, layers, embed: through(model, layers, embed(tokens(12)), cache_of(model))
    assert "capture all layers" in by_layers(run, asked=[1]).left_out["model.layers.1.self_attn"]


def test_two_texts_layer_by_layer():
    """Each layer runs on both texts before the next one does: no map has layers of both."""

    def run(model, layers, embed):
        states = [embed(tokens(12)), embed(tokens(12, 2))]
        for layer in layers:
            states = [through(model, [layer], state, None) for state in states]

    texts = [dense("two layers", tokens(12))[0], dense("two layers", tokens(12, 2))[0]]
    for number, found in enumerate(by_layers(run).sequences):
        (one,) = found.values()
        assert one.layers == (number // 2,)
        torch.testing.assert_close(one.mass[0].double(), texts[number % 2][number // 2], atol=1e-5, rtol=0)
