"""Which sequence a call belongs to: every map of a capture is that of one pass over the tokens of its sequence."""

import contextlib
import copy

import pytest
import torch
import transformers

import attnpatch
from attnpatch import Blocks

WIDTH = 4


def build(name, implementation):
    torch.manual_seed(0)
    layers, window = {"one layer": (1, None), "two layers": (2, None), "windows": (2, 5)}[name]
    model = transformers.MistralForCausalLM(transformers.MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=window, attn_implementation=implementation,
    )).eval()  # fmt: skip
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.mul_(8 if "q_proj" in path or "k_proj" in path else 1)
    return model


MODELS = ("one layer", "two layers", "windows")


def tokens(count, seed=1, batch=1):
    return torch.randint(3, 64, (batch, count), generator=torch.Generator().manual_seed(seed))


def joined(*parts):
    return torch.cat(parts, 1)


def reduced(probabilities):
    """``[heads, tokens, tokens]`` as a plain loop reduces them."""
    mean, count = probabilities.double().mean(0), probabilities.shape[-1]
    blocks = [range(start, min(start + WIDTH, count)) for start in range(0, count, WIDTH)]
    return torch.tensor(
        [[sum(mean[i, j].item() for i in q for j in k) / len(q) for k in blocks] for q in blocks],
        dtype=torch.float64,
    )


def dense(name, ids):
    """``[batch, layers, blocks, blocks]`` of the eager model's own probabilities."""
    with torch.no_grad():
        seen = build(name, "eager")(ids, output_attentions=True, use_cache=False).attentions
    return torch.stack([torch.stack([reduced(layer[b]) for layer in seen]) for b in range(len(ids))])


def cache_of(model):
    return transformers.DynamicCache(config=model.config)


# ------------------------------------------------------------------------------- runs: the sequences that they have


def base_then_head(model):
    """Hidden states of one text, then logits of another: both calls make caches of their own."""
    model.model(tokens(12))
    model(tokens(15, 2))
    return [tokens(12), tokens(15, 2)]


def base_twice(model):
    model.model(tokens(12))
    model.model(tokens(15, 2))
    return [tokens(12), tokens(15, 2)]


def base_and_head_with_new_caches(model):
    """Each call fills a new cache, and both caches go on."""
    one, two = cache_of(model), cache_of(model)
    model.model(tokens(12), past_key_values=one)
    model(tokens(12, 2), past_key_values=two)
    model(tokens(3, 3), past_key_values=one)
    model(tokens(5, 4), past_key_values=two)
    return [joined(tokens(12), tokens(3, 3)), joined(tokens(12, 2), tokens(5, 4))]


def base_that_goes_on_in_the_head(model):
    cache = cache_of(model)
    model.model(tokens(12), past_key_values=cache)
    model(tokens(5, 2), past_key_values=cache)
    return [joined(tokens(12), tokens(5, 2))]


def ends_alike(model):
    """Two texts with one ending; a copy of the first one's cache goes on."""
    end = tokens(1, 9)
    one, two = joined(tokens(12, 2), end), joined(tokens(12, 3), end)
    first, _ = model(one).past_key_values, model(two)
    model(tokens(5, 4), past_key_values=copy.deepcopy(first))
    return [one, two, joined(one, tokens(5, 4))]


def of_another_text(model):
    """A cache gets the keys of another text."""
    cache, other = cache_of(model), cache_of(model)
    model(tokens(13, 2), past_key_values=cache)
    model(tokens(13, 3), past_key_values=other)
    for mine, its in zip(cache.layers, other.layers, strict=True):
        mine.keys, mine.values = its.keys.clone(), its.values.clone()
    model(tokens(5, 4), past_key_values=cache)
    return [tokens(13, 2), tokens(13, 3), joined(tokens(13, 3), tokens(5, 4))]


def of_another_text_with_one_end(model, in_place=False):
    """The last token's keys of one layer are those of both texts."""
    (one, two), caches = (
        (joined(tokens(12, seed), tokens(1, 9)) for seed in (2, 3)),
        (cache_of(model), cache_of(model)),
    )
    for text, cache in zip((one, two), caches, strict=True):
        model(text, past_key_values=cache)
    for mine, its in zip(*(cache.layers for cache in caches), strict=True):
        if in_place:
            mine.keys.copy_(its.keys), mine.values.copy_(its.values)
        else:
            mine.keys, mine.values = its.keys.clone(), its.values.clone()
    model(tokens(5, 4), past_key_values=caches[0])
    return [one, two, joined(two, tokens(5, 4))]


def of_another_text_in_place(model):
    return of_another_text_with_one_end(model, in_place=True)


def one_of_rows_that_end_alike(model):
    ids, cache = joined(tokens(12, 2, 3), tokens(1, 9).expand(3, 1)), cache_of(model)
    model(ids, past_key_values=cache)
    cache.batch_select_indices(torch.tensor([2]))
    model(tokens(3, 4), past_key_values=cache)
    return [joined(ids[2:], tokens(3, 4))]


def equal_rows(model):
    ids, cache = tokens(13, 2).expand(3, -1), cache_of(model)
    model(ids, past_key_values=cache)
    model(tokens(1, 4).expand(3, -1), past_key_values=cache)
    model(tokens(4, 5, 3), past_key_values=cache)
    return [joined(ids, tokens(1, 4).expand(3, -1), tokens(4, 5, 3))]


def failing(model, call):
    """A call whose last feed-forward layer raises an exception."""

    def stop(*_):
        raise KeyError("stop")

    hook = model.model.layers[-1].mlp.register_forward_pre_hook(stop)
    with contextlib.suppress(KeyError):
        call()
    hook.remove()


def a_step_that_fails(model):
    cache = cache_of(model)
    model(tokens(12), past_key_values=cache)
    model(tokens(1, 2), past_key_values=cache)
    failing(model, lambda: model(tokens(3, 3), past_key_values=cache))
    return [joined(tokens(12), tokens(1, 2))]


RUNS = [base_then_head, base_twice, base_and_head_with_new_caches, base_that_goes_on_in_the_head, ends_alike,
        of_another_text, of_another_text_with_one_end, of_another_text_in_place, one_of_rows_that_end_alike, equal_rows,
        a_step_that_fails]  # fmt: skip


def captured(name, run):
    model = build(name, "sdpa")
    with torch.no_grad(), attnpatch.capture(model, Blocks.fixed(WIDTH)) as maps:
        expected = run(model)
    return expected, maps


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("run", RUNS)
def test_every_map_is_of_one_pass(run, name):
    if run is of_another_text and name == "windows":
        pytest.skip("its cache counts the tokens apart from its keys")
    expected, maps = captured(name, run)
    assert not maps.left_out
    assert len(maps.sequences) == len(expected)
    for ids, found in zip(expected, maps.sequences, strict=True):
        (one,) = found.values()
        seen = (
            torch.as_tensor(one.to_numpy()).double().reshape(len(ids), len(one.layers), *one.mass.shape[-2:])
        )
        torch.testing.assert_close(seen, dense(name, ids), atol=1e-5, rtol=0)
    assert maps.block_map.mass.shape == one.mass.shape


# ------------------------------------------------------------------------------------- what is not known, and why


def swapped(model):
    """Rows with one ending change places; with one layer, the fingerprints of their last tokens are equal."""
    ids, cache = joined(tokens(12, 2, 2), tokens(1, 9).expand(2, 1)), cache_of(model)
    model(ids, past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    model(tokens(3, 4, 2), past_key_values=cache)


def alike_in_the_window(model):
    """The ending is longer than all that the cache holds of either text."""
    end = tokens(9, 9)
    first, _ = model(joined(tokens(8, 2), end)).past_key_values, model(joined(tokens(8, 3), end))
    model(tokens(5, 4), past_key_values=copy.deepcopy(first))


def after_a_step_that_fails(model):
    """Its tokens stay in the caches of the layers that it has reached."""
    cache = cache_of(model)
    model(tokens(12), past_key_values=cache)
    failing(model, lambda: model(tokens(3, 3), past_key_values=cache))
    model(tokens(2, 4), past_key_values=cache)


@pytest.mark.parametrize(
    ("run", "name", "words"),
    [
        *((swapped, name, "rows of the batch changed places") for name in MODELS),
        (alike_in_the_window, "windows", "fits several of the captured sequences"),
        *((after_a_step_that_fails, name, "ended with an exception") for name in MODELS),
    ],
)
def test_what_is_not_known_is_in_no_map(run, name, words):
    with pytest.warns(attnpatch.errors.AttnpatchWarning, match=words):
        _, maps = captured(name, run)
    with pytest.raises(attnpatch.errors.CaptureError, match=words):
        maps.block_map  # noqa: B018
    assert all(words in reason for reason in maps.left_out.values()) and words in repr(maps)


def test_modules_that_a_failed_call_has_not_reached_are_left_out():
    """Attention that has run is mapped; the next call is whole."""
    model = build("two layers", "sdpa")
    hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    told = pytest.warns(attnpatch.errors.AttnpatchWarning, match="ended with ZeroDivisionError")
    with told, torch.no_grad(), attnpatch.capture(model, Blocks.fixed(WIDTH)) as maps:
        with contextlib.suppress(ZeroDivisionError):
            model(tokens(12))
        hook.remove()
        model(tokens(9))
    assert set(maps.left_out) == {"model.layers.1.self_attn"}
    first, last = ({one.layers for one in found.values()} for found in maps.sequences)
    assert (first, last) == ({(0,)}, {(0, 1)})


@pytest.mark.parametrize("negative", [None, tokens(9, 7), tokens(12, 7)], ids=["none", "shorter", "equal"])
def test_guidance_in_generate(negative):
    """Its two prompts are two sequences, the prompt's first; ``block_map`` is that of the negative prompt, the last one."""
    model, prompt = build("two layers", "sdpa"), tokens(12, 6)
    options = {} if negative is None else {"negative_prompt_ids": negative}
    with attnpatch.capture(model, blocks=Blocks.fixed(WIDTH)) as maps:
        found = model.generate(
            prompt, guidance_scale=2.0, max_new_tokens=5, min_new_tokens=5, do_sample=False, **options
        )
    # The last token is returned, but not given to the model; without a negative prompt, the prompt's last token is one.
    texts = found[:, :-1], joined(prompt[:, -1:] if negative is None else negative, found[:, 12:-1])
    first, second = maps.sequences
    for text, one in zip(texts, (*first.values(), *second.values()), strict=True):
        torch.testing.assert_close(one.mass.double(), dense("two layers", text)[0], rtol=0, atol=1e-5)
    assert torch.equal(maps.block_map.mass, next(iter(second.values())).mass)


def test_an_output_of_the_encoder_from_before_the_capture():
    """It shares a sequence with the text that is encoded inside; each map is right by itself (``docs/limits.md``)."""
    torch.manual_seed(0)
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
        attn_implementation="eager",
    )).eval()  # fmt: skip
    text, other, answer = tokens(12, 2), tokens(12, 3), tokens(12, 4)
    with torch.no_grad():
        output = model.get_encoder()(text)
        with attnpatch.capture(model, blocks=Blocks.fixed(WIDTH)) as maps:
            model.get_encoder()(other)
            model(encoder_outputs=output, decoder_input_ids=answer)
        seen = model.get_encoder()(other, output_attentions=True).attentions
        crossed = model(
            encoder_outputs=output, decoder_input_ids=answer, output_attentions=True
        ).cross_attentions
    (found,) = maps.sequences
    for sites, one in (
        ("model.encoder.layers.*.self_attn", seen),
        ("model.decoder.layers.*.encoder_attn", crossed),
    ):
        torch.testing.assert_close(found[sites].mass[0].double(), reduced(one[0][0]), rtol=0, atol=1e-6)
