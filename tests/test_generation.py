"""Ways to generate: every cache and every way of decoding, forced by rows, gives the same tokens and the same scores."""

import copy
import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import nn

import attnpatch
from attnpatch import Blocks

PROMPT = zoo.text_inputs("left", 33)


def snapshot(model: nn.Module) -> list:
    return [(type(module), dict(vars(module))) for module in model.modules()]


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to generate.

    Attributes:
        name: What the test is called.
        options: Arguments of ``generate``, or a function that makes them from the model.
        model: Name of the model in the zoo.
        implementation: Of its attention.
        inputs: What it is prompted with.
        needs_cuda: Whether transformers' cache waits for CUDA streams.
    """

    name: str
    options: dict[str, Any] | Callable[[nn.Module], dict[str, Any]]
    model: str = "llama"
    implementation: str = "eager"
    inputs: dict[str, torch.Tensor] = dataclasses.field(default_factory=lambda: PROMPT)
    needs_cuda: bool = False


def quantised(**config: Any) -> dict[str, Any]:
    return {"cache_implementation": "quantized", "cache_config": config}


def user_cache(model: nn.Module) -> dict[str, Any]:
    """A cache of one's own that holds the beginning of the prompt already."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**{key: value[:, :20] for key, value in PROMPT.items()}, past_key_values=cache)
    return {"past_key_values": cache}


def moving_cache(model: nn.Module) -> dict[str, Any]:
    """An offloaded cache without CUDA streams: the layer before is moved away while the next one runs."""
    from transformers import DynamicCache

    class Moving(DynamicCache):
        def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs):
            found = super().update(keys, values, layer_idx, *args, **kwargs)
            before = self.layers[layer_idx - 1]
            if before.is_initialized:
                before.keys, before.values = before.keys.clone(), before.values.clone()
            return found

    return {"past_key_values": Moving(config=model.config)}


HQQ = {"backend": "hqq", "nbits": 4, "q_group_size": 16, "residual_length": 16}
ONE = {"input_ids": zoo.tokens(33)}

WAYS = [
    Way("dynamic", {}),
    Way("dynamic_sdpa", {}, implementation="sdpa"),
    Way("static", {"cache_implementation": "static"}),
    Way("no_cache", {"use_cache": False}),
    # Windows of 9 tokens: much shorter than the prompt.
    Way("sliding", {}, "mistral"),
    Way("sliding_static", {"cache_implementation": "static"}, "mistral"),
    Way("sliding_and_full", {}, "gemma3"),
    Way("sliding_and_full_static", {"cache_implementation": "static"}, "gemma3", "sdpa"),
    Way("offloaded", {"cache_implementation": "offloaded"}, needs_cuda=True),
    Way("offloaded_static", {"cache_implementation": "offloaded_static"}, needs_cuda=True),
    Way("offloaded_by_hand", moving_cache),
    Way("quantised_hqq", quantised(**HQQ)),
    Way("quantised_fp8", quantised(backend="fp8")),
    Way("cache_of_ones_own", user_cache),
    Way("chunked_prefill", {"prefill_chunk_size": 13}),
    Way("beam_search", {"num_beams": 3, "num_return_sequences": 2}),
    Way("beam_search_static", {"num_beams": 3, "cache_implementation": "static"}),
    Way("beam_search_quantised", {"num_beams": 3, **quantised(**HQQ)}),
    Way("beam_search_t5", {"num_beams": 3}, "t5"),
    Way("sampling", {"do_sample": True, "top_k": 5}),
    Way("prompt_lookup", {"prompt_lookup_num_tokens": 3}, inputs=ONE),
]


def generate(model: nn.Module, way: Way, **more: Any) -> dict[str, torch.Tensor]:
    options = way.options(model) if callable(way.options) else way.options
    inputs = zoo.BY_NAME[way.model].inputs("left") if way.model == "t5" else way.inputs
    inputs = {key: value for key, value in inputs.items() if not key.startswith("decoder")}
    torch.manual_seed(0)
    output = model.generate(
        **inputs,
        **{"do_sample": False, "max_new_tokens": 6, **options, **more},
        output_scores=True,
        return_dict_in_generate=True,
    )
    return {"sequences": output.sequences, **zoo.flatten(output.scores, "scores")}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert zoo.equal_with_nan(got[name], tensor), f"{name} differs"


@pytest.mark.parametrize("way", WAYS, ids=[way.name for way in WAYS])
def test_way(way):
    """Patched, patched again for a second turn, captured, and as it was afterwards."""
    if way.needs_cuda and not torch.cuda.is_available():
        pytest.skip("transformers' offloaded caches wait for CUDA streams")
    model = zoo.shared_model(way.model, way.implementation)
    if way.needs_cuda:
        model = copy.deepcopy(model).cuda()
        way = dataclasses.replace(way, inputs={key: value.cuda() for key, value in way.inputs.items()})
    native = generate(model, way)
    before = snapshot(model)
    with zoo.by_rows(model, rows=7):
        assert_same(generate(model, way), native)
        assert_same(generate(model, way), native)
        totals = attnpatch.report(model).totals
        assert totals["by_rows"] > 0
        assert totals["materialised"] == 0
    assert snapshot(model) == before
    # Both ways of decoding ask about one prompt several times, or about parts of it that are thrown away again.
    if "beam" not in way.name and way.name not in ("prompt_lookup", "no_cache"):
        with attnpatch.capture(model, Blocks.fixed(8)) as maps:
            assert_same(generate(model, way), native)
        mass = maps.block_map.to_numpy()
        sums = mass.sum(-1)
        assert (abs(sums - 1) < 1e-5).any()
    assert snapshot(model) == before
    assert_same(generate(model, way), native)


def assistant() -> nn.Module:
    return zoo.randomise(zoo.BY_NAME["llama"].build("eager"), seed=1)


@pytest.mark.parametrize("who", ["both", "model", "assistant"])
def test_assisted(who):
    """A small model drafts and a large one checks: either, or both, by rows."""
    model, helper = zoo.BY_NAME["llama"].build("eager"), assistant()
    way = Way("assisted", lambda model: {"assistant_model": helper}, inputs=ONE)
    native = generate(model, way)
    before = snapshot(model), snapshot(helper)
    chosen = {"both": [model, helper], "model": [model], "assistant": [helper]}[who]
    for number, each in enumerate(chosen):
        attnpatch.apply(each, mode="always", rows=7 + number)
    assert_same(generate(model, way), native)
    for each in chosen:
        assert attnpatch.report(each).totals["by_rows"] > 0
        attnpatch.remove(each)
    assert (snapshot(model), snapshot(helper)) == before


def streamed(model: nn.Module) -> list[str]:
    """The words that come out of a thread that generates, as a server reads them."""
    from transformers import PreTrainedTokenizerFast, TextIteratorStreamer

    words = {f"w{i}": i for i in range(zoo.VOCAB)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_level(words), eos_token="w2")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options = {**ONE, "max_new_tokens": 6, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=model.generate, kwargs=options)
    thread.start()
    pieces = list(streamer)
    thread.join()
    return pieces


def word_level(words: dict[str, int]):
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer


def test_streamer_in_a_thread():
    model = zoo.BY_NAME["llama"].build("eager")
    native = streamed(model)
    assert len(native) > 1
    before = snapshot(model)
    with zoo.by_rows(model, rows=7):
        assert streamed(model) == native
        assert attnpatch.report(model).totals["by_rows"] == 2
    assert snapshot(model) == before


def test_two_models_two_policies_two_threads():
    """Each goes as its own policy says, also while the other generates."""
    way = Way("dynamic", {})
    models = [zoo.BY_NAME["llama"].build("eager") for _ in range(3)]
    native = generate(models[0], way)
    before = [snapshot(model) for model in models]
    policies = [{"mode": "always", "rows": 7}, {"mode": "never"}, {"mode": "always", "rows": 16, "heads": 2}]
    for model, policy in zip(models, policies, strict=True):
        attnpatch.apply(model, **policy)
    barrier = threading.Barrier(len(models))
    found: dict[int, list] = {0: [], 1: [], 2: []}

    def work(number: int) -> None:
        for _ in range(4):
            barrier.wait(timeout=60)
            found[number].append(generate(models[number], way))

    threads = [threading.Thread(target=work, args=(number,)) for number in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, model in enumerate(models):
        assert len(found[number]) == 4
        for got in found[number]:
            assert_same(got, native)
        totals = attnpatch.report(model).totals
        assert totals["by_rows"] == (0 if number == 1 else 8)
        attnpatch.remove(model)
    assert [snapshot(model) for model in models] == before


def test_one_model_in_two_threads():
    """A server answers two requests with one model."""
    model = zoo.BY_NAME["llama"].build("eager")
    native = streamed(model)
    found: list[list[str]] = []
    with zoo.by_rows(model, rows=7):
        threads = [threading.Thread(target=lambda: found.append(streamed(model))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert attnpatch.report(model).totals["by_rows"] == 4
    assert found == [native, native]


def test_pipeline():
    """``pipeline("text-generation")`` on a patched model."""
    from transformers import PreTrainedTokenizerFast, pipeline

    words = {f"w{i}": i for i in range(zoo.VOCAB)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_level(words), eos_token="w2", pad_token="w0")
    model = zoo.BY_NAME["llama"].build("eager")
    prompt = " ".join(f"w{i}" for i in range(9, 42))
    run = functools.partial(pipeline("text-generation", model, tokenizer=tokenizer), prompt, max_new_tokens=5)
    native = run(do_sample=False)
    with zoo.by_rows(model, rows=7):
        assert run(do_sample=False) == native
        assert attnpatch.report(model).totals["by_rows"] == 2
