"""Scores of key tokens against the weights that eager attention returns, summed by plain loops."""

import pytest
import torch
import zoo

import attnpatch
from attnpatch.errors import AttnpatchWarning, CaptureError

PER = ("kv_head", "head", "mean")
# Name, implementation, padding, key heads.
MODELS = [
    ("llama", "eager", "left", 2),
    ("llama", "sdpa", "none", 2),
    ("llama", "sdpa", "right", 2),
    ("mistral", "sdpa", "left", 2),  # a sliding window of 9 keys
    ("gpt2", "sdpa", "none", 4),  # its modules do not say which heads share keys: the cache does
    ("falcon_alibi", "eager", "none", 1),  # one head of keys for all, which the cache tells
    ("gpt_oss", "eager", "none", 2),  # learned sinks take a share of each row
]


def weights_of(name, model, inputs):
    """Of each layer, ``[batch, heads, q_len, kv_len]``, as eager attention returns them."""
    dense = zoo.BY_NAME[name].build("eager")
    dense.load_state_dict(model.state_dict())
    with torch.no_grad():
        return dense(**inputs, output_attentions=True, use_cache=False).attentions


def summed(weights, real, window, groups):
    """float64 ``[batch, groups, keys]`` from one layer's weights; ``real``: which queries count."""
    batch, heads, q_len, keys = weights.shape
    found = torch.zeros(batch, groups, keys, dtype=torch.float64)
    for b in range(batch):
        rows = [row for row in range(q_len) if real[b, row]]
        for row in rows if window is None else rows[-window:]:
            for head in range(heads):
                share = heads // groups
                found[b, head // share] += weights[b, head, row].double() / share
    return found


def real_of(inputs):
    ids = inputs["input_ids"]
    return inputs.get("attention_mask", torch.ones_like(ids)).bool()


def check(scores, weights, real, window, groups):
    assert len(scores) == len(weights)
    for layer, own in zip(scores.layers, weights, strict=True):
        right = summed(own, real, window, groups)
        assert scores[layer].dtype == torch.float32
        torch.testing.assert_close(scores[layer].double(), right, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 64, 1000])
@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize(("name", "implementation", "padding", "key_heads"), MODELS)
def test_scores_of_one_call(name, implementation, padding, key_heads, per, window):
    case = zoo.BY_NAME[name]
    model, inputs = case.build(implementation), case.inputs(padding)
    with torch.no_grad(), attnpatch.token_scores(model, window, per) as scores:
        native = model(**inputs).logits
    groups = {"kv_head": key_heads, "head": 4, "mean": 1}[per]
    check(scores, weights_of(name, model, inputs), real_of(inputs), window, groups)
    assert torch.equal(scores.real, real_of(inputs))
    with torch.no_grad():
        torch.testing.assert_close(native, model(**inputs).logits, rtol=0, atol=0)


def test_scores_of_a_patched_model_by_rows():
    case = zoo.BY_NAME["llama"]
    model, inputs = case.build("eager"), case.inputs("left")
    with torch.no_grad(), attnpatch.patched(model, mode="always", rows=16):
        with attnpatch.token_scores(model, window=20) as scores:
            model(**inputs)
        served = attnpatch.report(model).totals["by_rows"]
    assert served > 0
    check(scores, weights_of("llama", model, inputs), real_of(inputs), 20, 2)


def test_the_fused_kernel_stays_in_use():
    case = zoo.BY_NAME["llama"]
    model, inputs = case.build("sdpa"), case.inputs()
    with torch.no_grad(), attnpatch.patched(model, mode="never"):
        with attnpatch.token_scores(model, window=4):
            model(**inputs)
        told = str(attnpatch.report(model))
    assert "beside fused attention" in told


@pytest.mark.parametrize("window", [None, 1, 8, 64])
@pytest.mark.parametrize(
    ("name", "key_heads", "cache"),
    [
        ("llama", 2, None),
        ("llama", 2, "static"),
        ("mistral", 2, None),
        ("mistral", 2, "static"),
        ("gpt2", 4, None),
    ],
)
def test_scores_of_a_generation(name, key_heads, cache, window):
    """The last rows are of the prompt and of generated tokens; a window of 1 is the last of these."""
    model = zoo.BY_NAME[name].build("sdpa")
    ids = zoo.tokens(21)
    with torch.no_grad(), attnpatch.token_scores(model, window) as scores:
        whole = model.generate(
            ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, cache_implementation=cache
        )
    inputs = {"input_ids": whole[:, :-1]}
    check(scores, weights_of(name, model, inputs), real_of(inputs), window, key_heads)


@pytest.mark.parametrize("window", [None, 5])
def test_scores_of_a_padded_batch_that_generates(window):
    model = zoo.BY_NAME["llama"].build("sdpa")
    ids, mask = zoo.tokens(21, batch=2), zoo.padding_mask("left", 21)
    with torch.no_grad(), attnpatch.token_scores(model, window) as scores:
        whole = model.generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)[
            :, :-1
        ]
    mask = torch.nn.functional.pad(mask, (0, whole.shape[1] - 21), value=1)
    inputs = {"input_ids": whole, "attention_mask": mask}
    check(scores, weights_of("llama", model, inputs), real_of(inputs), window, 2)
    # The top keys are real: the second sequence has 14 tokens of padding.
    for positions in scores.top(9, recent=2).values():
        assert positions[1].min() >= 14
        assert {21, 22} <= set(positions[1, 0].tolist())


@pytest.mark.parametrize(
    ("sites", "what"), [("decoder.*SelfAttention", "decoder"), ("decoder.*EncDec*", "cross")]
)
def test_scores_of_an_encoder_decoder_that_generates(sites, what):
    model, dense = (zoo.BY_NAME["t5"].build(each) for each in ("sdpa", "eager"))
    ids = zoo.tokens(21)
    with torch.no_grad(), attnpatch.token_scores(model, window=3, sites=sites) as scores:
        whole = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)[:, :-1]
    with torch.no_grad():
        weights = dense(ids, decoder_input_ids=whole, output_attentions=True, use_cache=False)[
            f"{what}_attentions"
        ]
    check(scores, weights, torch.ones(1, 5, dtype=torch.bool), 3, 4)


def test_a_prompt_in_pieces():
    """Rows of the window are in two pieces: 70 tokens, then 31."""
    model, ids = zoo.BY_NAME["llama"].build("sdpa"), zoo.tokens(101)
    with torch.no_grad(), attnpatch.token_scores(model, window=64) as scores:
        cache = model(ids[:, :70]).past_key_values
        model(ids[:, 70:], past_key_values=cache)
    check(scores, weights_of("llama", model, {"input_ids": ids}), real_of({"input_ids": ids}), 64, 2)


@pytest.mark.parametrize("window", [None, 16])
def test_cross_attention_is_chosen_by_sites(window):
    case = zoo.BY_NAME["t5"]
    model, inputs = case.build("eager"), case.inputs("none")
    with torch.no_grad(), attnpatch.token_scores(model, window, "head") as scores:
        weights = model(**inputs, output_attentions=True, use_cache=False).cross_attentions
    with pytest.raises(CaptureError, match="several kinds"):
        scores[0]
    with (
        torch.no_grad(),
        attnpatch.token_scores(model, window, "head", sites="decoder.*EncDecAttention") as scores,
    ):
        model(**inputs)
    real = torch.ones(inputs["decoder_input_ids"].shape, dtype=torch.bool)
    check(scores, weights, real, window, weights[0].shape[1])


def test_layers_and_top():
    model, inputs = zoo.BY_NAME["llama"].build("sdpa"), zoo.BY_NAME["llama"].inputs()
    with torch.no_grad(), attnpatch.token_scores(model, layers=[-1]) as scores:
        model(**inputs)
    assert scores.layers == [1] and torch.equal(scores[-1], scores[1])
    with pytest.raises(CaptureError, match=r"layer 0 has no scores; there are: \[1\]"):
        scores[0]
    ranked = sorted(range(101), key=lambda key: -scores[1][0, 1, key].item())
    assert scores.top(5)[1][0, 1].tolist() == ranked[:5]
    kept = scores.top(5, recent=3)[1][0, 1].tolist()
    assert set(kept[:3]) == {98, 99, 100} and kept[3:] == [key for key in ranked if key < 98][:2]
    for k, recent in ((0, 0), (102, 0), (3, 4), (2.0, 0)):
        with pytest.raises(CaptureError, match="give k from 1 to 101"):
            scores.top(k, recent)
    assert "last 64 query rows" in repr(scores) and "2 KV heads" in repr(scores)


# ------------------------------------------------------------------------------------------------------ what is refused


def left_out(model, run, **options):
    with (
        pytest.warns(AttnpatchWarning, match="has no scores"),
        torch.no_grad(),
        attnpatch.token_scores(model, **options) as scores,
    ):
        run()
    with pytest.raises(CaptureError) as raised:
        scores.layers  # noqa: B018
    assert scores.left_out and next(iter(scores.left_out.values())) in str(raised.value)
    return str(raised.value)


def test_heads_that_share_keys_must_be_known():
    """BERT's modules do not say which heads share keys, and there is no cache."""
    case = zoo.BY_NAME["bert"]
    model, inputs = case.build("sdpa"), case.inputs()
    assert "choose per='head' or per='mean'" in left_out(model, lambda: model(**inputs))
    with torch.no_grad(), attnpatch.token_scores(model, None, "head") as scores:
        model(**inputs)
    dense = case.build("eager")
    dense.load_state_dict(model.state_dict())
    with torch.no_grad():
        check(scores, dense(**inputs, output_attentions=True).attentions, real_of(inputs), None, 4)


@pytest.mark.parametrize("window", [None, 8])
def test_tokens_that_leave_the_cache_are_refused(window):
    model, ids = zoo.BY_NAME["llama"].build("sdpa"), zoo.tokens(31)

    def cut():
        cache = model(ids).past_key_values
        cache.crop(-11)
        model(ids[:, 20:], past_key_values=cache)

    assert "cache was cut" in left_out(model, cut, window=window)


@pytest.mark.parametrize("window", [None, 8])
def test_beams_are_refused(window):
    model, ids = zoo.BY_NAME["llama"].build("sdpa"), zoo.tokens(31)
    run = lambda: model.generate(ids, num_beams=3, max_new_tokens=6, do_sample=False)
    assert "changed places" in left_out(model, run, window=window)


def test_weights_that_are_mixed_over_heads_are_refused():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = torch.nn.Parameter(torch.randn(4, 4))
            self.qkv = torch.nn.Linear(32, 96)

        def forward(self, x):
            query, key, value = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            weights = (query @ key.mT).softmax(-1)
            mixed = torch.einsum("hg,bgij->bhij", self.mix, weights)
            return (mixed @ value).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    model = torch.nn.Sequential(Attention())
    x = torch.randn(1, 40, 32)
    assert "mixed after softmax" in left_out(model, lambda: model(x), window=None, per="head")


def test_a_refused_sequence_does_not_show_the_one_before():
    model, ids = zoo.BY_NAME["llama"].build("sdpa"), zoo.tokens(31)

    def two():
        model(ids)
        model.generate(ids, num_beams=3, max_new_tokens=6, do_sample=False)

    assert "changed places" in left_out(model, two)


def test_a_layer_that_runs_twice_is_refused():
    class Attention(torch.nn.Module):
        def forward(self, x):
            heads = x.unflatten(-1, (4, 8)).transpose(1, 2)
            found = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
            return found.transpose(1, 2).flatten(2)

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention()

        def forward(self, x):
            return x + self.attention(x + self.attention(x))

    model, x = Twice(), torch.randn(1, 40, 32)
    assert "called 2 times" in left_out(model, lambda: model(x), window=None, per="head")


def test_options_are_checked():
    model = zoo.BY_NAME["llama"].build("sdpa")
    for options, words in (
        ({"window": 0}, "number of query rows"),
        ({"window": True}, "number of query rows"),
        ({"per": "kv"}, "'kv_head', 'head' or 'mean'"),
        ({"layers": [7]}, "layers with attention"),
    ):
        with pytest.raises(CaptureError, match=words), attnpatch.token_scores(model, **options):
            pass
    with attnpatch.token_scores(model) as scores:
        pass
    with pytest.raises(CaptureError, match="call the model inside"):
        len(scores)
