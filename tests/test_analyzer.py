"""BlockAttentionAnalyzer: every way through a conversation gives the map of dense attention."""

import sys

import numpy as np
import pytest
import torch
from test_blocks import make_tokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import attnpatch
from attnpatch.conversations.analyzer import CHECKPOINTING_NOTE, BlockAttentionAnalyzer
from attnpatch.conversations.result import Analysis
from attnpatch.conversations.tokenized_chat import render
from attnpatch.errors import AnalysisError, BlockMapFileError, MissingExtraError
from attnpatch.maps.block_map import BlockMap

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "the key is red " * 4},
    {"role": "user", "content": "what is the key? " * 6},
    {"role": "assistant", "content": "red it is " * 5},
    {"role": "user", "content": "thanks, fine"},
]
MEASURES = ("received", "entropy", "sink")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(CHATML)


def llama(size, attention="sdpa"):
    config = LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation=attention, max_position_embeddings=1024,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def mistral(size, attention="sdpa"):
    """Every layer sees 32 tokens only."""
    config = MistralConfig(
        vocab_size=size, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=32, attn_implementation=attention,
    )  # fmt: skip
    return MistralForCausalLM(config)


def sharp(model, seed=0):
    """Weights that make attention differ from row to row."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.4, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def model(tokenizer):
    return sharp(llama(len(tokenizer) + 8))


@pytest.fixture(scope="module")
def analyzer(model, tokenizer):
    return BlockAttentionAnalyzer(model=model, tokenizer=tokenizer, measures=MEASURES)


def dense(model, tokenizer, messages=MESSAGES):
    """float64 ``[layers, heads, tokens, tokens]`` of eager attention, and where messages lie."""
    rendered = render(tokenizer, messages)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            weights = model(torch.tensor([rendered.ids]), output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    return torch.cat(weights).double(), rendered.spans


def by_blocks(weights, spans):
    """Means over heads and query tokens of sums over key tokens."""
    rows = [[weights[:, :, a:b, c:d].sum(-1).mean((1, 2)) for c, d in spans] for a, b in spans]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


@pytest.mark.parametrize("build", [llama, mistral])
@pytest.mark.parametrize("way", ["", "_sequential", "_chunked"])
def test_every_way_is_the_dense_map(tokenizer, build, way):
    model = sharp(build(len(tokenizer) + 8))
    weights, spans = dense(model, tokenizer)
    analyzer = BlockAttentionAnalyzer(model=model, tokenizer=tokenizer, measures=MEASURES, chunk_size=23)
    found = getattr(analyzer, f"analyze_conversation{way}")(MESSAGES, "none")
    torch.testing.assert_close(found.block_map.mass.double(), by_blocks(weights, spans), rtol=0, atol=1e-6)
    assert found.block_map.query_labels == ("0 system", "1 user", "2 assistant", "3 user")
    assert found.block_map.query_sizes.tolist() == [b - a for a, b in spans]
    torch.testing.assert_close(found.received.double(), weights.sum(2).mean(1), rtol=1e-6, atol=1e-5)
    entropy = -torch.xlogy(weights, weights).sum(-1).mean(-1)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=0, atol=1e-5)
    if build is llama or not way:
        # A sliding cache has forgotten the first token, whose mass is then nothing, as it is in the single pass.
        torch.testing.assert_close(found.sink.double(), weights[..., 0].mean(-1), rtol=0, atol=1e-6)


def test_the_answer_of_the_guide(analyzer):
    """Its names and its defaults."""
    found = analyzer.analyze_conversation_sequential(messages=MESSAGES, normalize="row")
    rows = found.block_map.to_numpy().sum(-1)
    np.testing.assert_allclose(rows, 1, atol=1e-5)
    assert found.block_map.metadata["method"] == "sequential"
    assert found.block_map.metadata["template"] == "chat template"
    assert found.texts[3] == "thanks, fine"
    assert found.seconds > 0


def test_sequential_holds_what_the_longest_message_needs(tokenizer, model):
    """By rows of a fixed size the widest step of a message is its own length times all tokens."""
    seen = []
    original = model.model.layers[0].self_attn.forward

    def watch(*args, **kwargs):
        seen.append(kwargs["hidden_states"].shape[1] if "hidden_states" in kwargs else args[0].shape[1])
        return original(*args, **kwargs)

    model.model.layers[0].self_attn.forward = watch
    try:
        BlockAttentionAnalyzer(model=model, tokenizer=tokenizer).analyze_conversation_sequential(MESSAGES)
    finally:
        del model.model.layers[0].self_attn.forward
    spans = render(tokenizer, MESSAGES).spans
    # Before them a short text, which shows once that pieces give the same map.
    assert seen[-len(spans) :] == [b - a for a, b in spans]
    assert all(length <= 40 for length in seen[: -len(spans)])


# --------------------------------------------------------------------------------------------------------- options


def test_layers_heads_and_blocks(analyzer, model, tokenizer):
    weights, spans = dense(model, tokenizer)
    last = analyzer.analyze_conversation(MESSAGES, "none", layers="last")
    assert last.block_map.layers == (2,)
    two = analyzer.analyze_conversation(MESSAGES, "none", layers=[0, -1], heads=[1])
    expected = by_blocks(weights[[0, 2]][:, 1:2], spans)
    torch.testing.assert_close(two.block_map.mass[:, 0].double(), expected, rtol=0, atol=1e-6)
    fixed = analyzer.analyze_conversation(MESSAGES, blocks=16)
    assert fixed.block_map.query_labels[:2] == ("0:16", "16:32")
    assert fixed.texts[0].startswith("<|im_start|>")


def test_words_are_blocks(analyzer, tokenizer):
    found = analyzer.analyze_conversation(MESSAGES, blocks="words")
    labels = list(found.block_map.query_labels)
    assert labels[1:5] == ["the", "key", "is", "red"]
    assert "thanks," in labels and "fine<|im_end|>" in labels
    assert found.block_map.query_sizes.sum() == len(render(tokenizer, MESSAGES).ids)


def test_a_sample_is_unbiased_and_says_how_far_off_it_is(analyzer):
    exact = analyzer.analyze_conversation(MESSAGES, "none", measures=()).block_map.mass
    drawn = [
        analyzer.analyze_conversation_sequential(
            MESSAGES, "none", sample_rows=4, seed=seed, measures=()
        ).block_map
        for seed in range(24)
    ]
    mass, error = (torch.stack([getattr(one, name) for one in drawn]).double() for name in ("mass", "error"))
    # The mean of 24 estimates lies within four of its own standard errors in every cell.
    assert ((mass.mean(0) - exact).abs() <= 4 * mass.std(0) / 24**0.5 + 1e-6).all()
    assert ((mass - exact).abs() <= 2 * error + 1e-6).double().mean() > 0.9
    # Not so wide that it says nothing: on average no more than twice what is seen.
    wide = mass.std(0) > 1e-3
    assert (error.mean(0)[wide] < 2 * mass.std(0)[wide]).double().mean() > 0.8
    whole = analyzer.analyze_conversation(MESSAGES, "none", sample_rows=500, measures=()).block_map
    torch.testing.assert_close(whole.mass, exact, rtol=0, atol=1e-6)
    assert (whole.error == 0).all()
    again = analyzer.analyze_conversation_sequential(MESSAGES, "none", sample_rows=4, seed=3, measures=())
    assert torch.equal(again.block_map.mass, drawn[3].mass)


def test_one_row_of_several_has_no_error(analyzer):
    one = analyzer.analyze_conversation(MESSAGES, "none", sample_rows=1, measures=()).block_map
    assert one.error[:, 1, 0].isnan().all()


# -------------------------------------------------------------------------------------------------------- gradients


def dense_gradient(model, tokenizer):
    """Probability times its gradient, by autograd through eager attention."""
    rendered = render(tokenizer, MESSAGES)
    ids = torch.tensor([rendered.ids])
    start, end = rendered.spans[2]
    model.set_attn_implementation("eager")
    try:
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
        output = model(inputs_embeds=inputs, output_attentions=True, use_cache=False)
        for weights in output.attentions:
            weights.retain_grad()
        logits = output.logits[0, start - 1 : end - 1].float()
        torch.log_softmax(logits, -1).gather(1, ids[0, start:end, None]).sum().backward()
        found = torch.cat([weights.double() * weights.grad.double() for weights in output.attentions])
    finally:
        model.set_attn_implementation("sdpa")
        model.zero_grad()
    return by_blocks(found.detach(), rendered.spans)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("policy", [{}, {"mode": "always", "rows": 16}])
def test_gradient_maps_are_the_dense_ones(model, tokenizer, checkpointing, policy):
    expected = dense_gradient(model, tokenizer)
    analyzer = BlockAttentionAnalyzer(
        model=model, tokenizer=tokenizer, use_gradient_checkpointing=checkpointing, policy=policy,
        weighting="gradient",
    )  # fmt: skip
    asked = [parameter.requires_grad for parameter in model.parameters()]
    found = analyzer.analyze_conversation(MESSAGES, "none")
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(found.block_map.mass.double(), expected, rtol=1e-4, atol=1e-5)
    assert found.block_map.layers == (0, 1, 2) and not found.notes
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert not any(module.training for module in model.modules())
    assert not model.is_gradient_checkpointing
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_are_divided_by_no_sum_with_signs(model, tokenizer):
    analyzer = BlockAttentionAnalyzer(model=model, tokenizer=tokenizer, weighting="gradient")
    found = analyzer.analyze_conversation(MESSAGES)
    mass = found.block_map.mass.double()
    assert found.block_map.normalization == "none" and (mass < 0).any() and (mass > 0).any()
    asked = analyzer.analyze_conversation(MESSAGES, "row").block_map
    assert asked.normalization == "absolute row"
    shares = mass / mass.abs().sum(-1, keepdim=True)
    torch.testing.assert_close(asked.values.double(), shares.nan_to_num(0), rtol=1e-5, atol=1e-6)
    for measure in (found.lookback, found.rollout):
        with pytest.raises(AnalysisError, match="weighted by gradients"):
            measure()


def test_targets(analyzer):
    some = analyzer.analyze_conversation(MESSAGES, "none", weighting="gradient", target=[5, 9], measures=())
    # Nothing after the tokens that lead to the target has a gradient.
    assert (some.block_map.mass[:, 1:] == 0).all() and (some.block_map.mass[:, 0] != 0).any()
    for target, words in (
        ([0], "positions from 1"),
        ("question", "'answer' or positions"),
        ([10**6], "positions"),
    ):
        with pytest.raises(AnalysisError, match=words):
            analyzer.analyze_conversation(MESSAGES, weighting="gradient", target=target, measures=())
    with pytest.raises(AnalysisError, match="no message of the assistant"):
        analyzer.analyze_conversation(MESSAGES[:2], weighting="gradient", measures=())
    with pytest.raises(AnalysisError, match="single pass"):
        analyzer.analyze_conversation_sequential(MESSAGES, weighting="gradient", measures=())
    with pytest.raises(AnalysisError, match="leave them out"):
        analyzer.analyze_conversation(MESSAGES, weighting="gradient")


def test_gradients_of_hand_written_attention_are_refused(tokenizer):
    eager = sharp(llama(len(tokenizer) + 8, "eager"))
    analyzer = BlockAttentionAnalyzer(model=eager, tokenizer=tokenizer, weighting="gradient")
    with pytest.raises(AnalysisError, match="attn_implementation='sdpa'"):
        analyzer.analyze_conversation(MESSAGES)


def test_checkpointing_without_gradients_says_that_it_saves_nothing(model, tokenizer):
    analyzer = BlockAttentionAnalyzer(model=model, tokenizer=tokenizer, use_gradient_checkpointing=True)
    assert analyzer.analyze_conversation_sequential(MESSAGES).notes == (CHECKPOINTING_NOTE,)


# ------------------------------------------------------------------------------------------------------- generation


def test_an_answer_grows_while_it_is_written(model, tokenizer):
    analyzer = BlockAttentionAnalyzer(model=model, tokenizer=tokenizer, measures=("received",))
    found = analyzer.analyze_generation(MESSAGES, "none", max_new_tokens=6)
    apart = analyzer.analyze_generation(MESSAGES, "none", max_new_tokens=6, steps="all")
    rendered = render(tokenizer, MESSAGES, add_generation_prompt=True)
    with torch.no_grad():
        ids = model.generate(torch.tensor([rendered.ids]), max_new_tokens=6, do_sample=False)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = torch.cat(model(ids[:, :-1], output_attentions=True).attentions).double()
    model.set_attn_implementation("sdpa")
    spans = [*rendered.spans[:-1], (rendered.spans[-1][0], ids.shape[1] - 1)]
    torch.testing.assert_close(found.block_map.mass.double(), by_blocks(weights, spans), rtol=0, atol=1e-6)
    assert found.block_map.query_labels[-1] == "assistant (next)"
    assert found.texts[-1] == tokenizer.decode(ids[0, len(rendered.ids) :], skip_special_tokens=True)
    # Step 3 wrote from the row of one token.
    row = weights[:, :, len(rendered.ids) + 2].mean(1)
    expected = torch.stack([row[:, a:b].sum(-1) for a, b in spans], -1)
    torch.testing.assert_close(apart.block_map.mass[3, :, -1].double(), expected, rtol=0, atol=1e-6)
    assert len(apart.block_map.steps) == 6
    with pytest.warns(DeprecationWarning, match="steps=True is now steps='all'") as said:
        again = analyzer.analyze_generation(MESSAGES, "none", max_new_tokens=6, steps=True)
    assert again.block_map == apart.block_map and said[0].filename == __file__
    last = analyzer.analyze_generation(MESSAGES, "none", max_new_tokens=6, steps="last")
    assert torch.equal(last.block_map.mass, apart.block_map.mass[-1:])
    with pytest.raises(AnalysisError, match="steps='mean'"):
        last.rollout()


# ------------------------------------------------------------------------------------------- derived maps and files


def test_lookback_and_rollout(analyzer):
    found = analyzer.analyze_conversation(MESSAGES, "none")
    mass = found.block_map.mass.double()
    expected = mass[1, 2, :2].sum() / mass[1, 2, :3].sum()
    assert found.lookback()[1, 2] == pytest.approx(expected.item(), abs=1e-6)
    rolled = torch.eye(4, dtype=torch.float64)
    for layer in mass:
        rolled = (
            0.5 * torch.eye(4, dtype=torch.float64) + 0.5 * layer / layer.sum(-1, keepdim=True)
        ) @ rolled
    torch.testing.assert_close(found.rollout().double(), rolled, rtol=0, atol=1e-6)
    assert "approximate" in Analysis.rollout.__doc__


def test_files_and_pictures(analyzer, tmp_path):
    pytest.importorskip("matplotlib")
    found = analyzer.analyze_conversation(MESSAGES, sample_rows=4)
    again = Analysis.load(found.save(tmp_path / "one.safetensors"))
    assert again.block_map == found.block_map
    assert torch.equal(again.received, found.received) and again.notes == list(found.notes)
    assert again.peak_bytes == found.peak_bytes and again.seconds == found.seconds
    assert BlockMap.load(tmp_path / "one.safetensors") == found.block_map
    with pytest.raises(BlockMapFileError, match="block map only"):
        Analysis.load(found.block_map.save(tmp_path / "map.safetensors"))
    for name, draw in (("map", found.plot), ("layers", found.plot_layers)):
        assert draw(tmp_path / f"{name}.png").stat().st_size > 5000
    assert found.plot_row("3 user", tmp_path / "row.svg").exists()
    with pytest.raises(AnalysisError, match="no block 'nobody'"):
        found.plot_row("nobody")


def test_pictures_that_cannot_be_drawn_leave_no_folder(analyzer, tmp_path, monkeypatch):
    found = analyzer.analyze_conversation(MESSAGES)
    (tmp_path / "mine").mkdir()
    # As where matplotlib is not installed.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for folder in (tmp_path / "new" / "one", tmp_path / "mine"):
        with pytest.raises(MissingExtraError, match="matplotlib"):
            analyzer.visualize_results(found, save_dir=folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"blocks": "sentences"}, "'messages', 'words' or a number"),
        ({"chunk_size": 0}, "1 token or more"),
        ({"measures": ["heat"]}, "'received', 'entropy', 'sink'"),
        ({"colour": "red"}, "unknown option 'colour'"),
        ({"normalize": "rows"}, "normalize='rows'"),
        ({"max_tokens": 20}, "20"),
    ],
)
def test_what_cannot_be_used_is_one_line(analyzer, options, words):
    with pytest.raises(AnalysisError, match=words) as caught:
        analyzer.analyze_conversation(MESSAGES, **options)
    assert "\n" not in str(caught.value)


def test_models_that_cannot_be_loaded(tmp_path, model):
    (tmp_path / "empty").mkdir()
    for name, words in ((tmp_path / "none", "no such folder"), (tmp_path / "empty", r"no config\.json")):
        with pytest.raises(AnalysisError, match=words):
            BlockAttentionAnalyzer(name)
    with pytest.raises(AnalysisError, match="without its tokenizer"):
        BlockAttentionAnalyzer(model=model)
    with pytest.raises(AnalysisError, match="give model_name_or_path"):
        BlockAttentionAnalyzer()


def test_more_tokens_than_the_model_has_positions_for(tokenizer):
    small = sharp(
        GPT2LMHeadModel(
            GPT2Config(vocab_size=len(tokenizer) + 8, n_embd=16, n_layer=1, n_head=2, n_positions=64)
        )
    )
    analyzer = BlockAttentionAnalyzer(model=small, tokenizer=tokenizer)
    with pytest.raises(AnalysisError, match="64"):
        analyzer.analyze_conversation(MESSAGES)
    found = analyzer.analyze_conversation(MESSAGES, truncate="left")
    assert found.notes and found.block_map.query_sizes.sum() == 64


def test_loading_as_its_user_can_afford(tokenizer, model, tmp_path):
    folder = tmp_path / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    native = BlockAttentionAnalyzer(folder, torch_dtype="float32").analyze_conversation(MESSAGES, "none")
    half = BlockAttentionAnalyzer(str(folder), torch_dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    close = half.analyze_conversation_sequential(MESSAGES, "none").block_map.mass
    torch.testing.assert_close(close, native.block_map.mass, rtol=0, atol=0.1)
    with pytest.raises(AnalysisError, match="choose one"):
        BlockAttentionAnalyzer(folder, load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(AnalysisError, match="bfloat16 or float16"):
        BlockAttentionAnalyzer(folder, torch_dtype="int8")


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantised(tokenizer, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 8, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    analyzer = BlockAttentionAnalyzer(
        tmp_path,
        device_map="cpu",
        torch_dtype=torch.float32,
        use_gradient_checkpointing=True,
        **{f"load_in_{bits}": True},
    )
    assert any(
        "bnb" in type(m).__module__ or "bitsandbytes" in type(m).__module__ for m in analyzer.model.modules()
    )
    found = analyzer.analyze_conversation_sequential(MESSAGES, "none").block_map.mass
    native = BlockAttentionAnalyzer(tmp_path).analyze_conversation(MESSAGES, "none").block_map.mass
    torch.testing.assert_close(found, native, rtol=0, atol=0.05)


def test_each_analysis_counts_for_itself(model, tokenizer):
    """Also on a model that is patched all the time, whose own report goes on."""
    attnpatch.apply(model, mode="always")
    try:
        analyzer = BlockAttentionAnalyzer(model=model, tokenizer=tokenizer)
        said = [analyzer.analyze_conversation(MESSAGES).block_map.metadata["attention"] for _ in range(3)]
        assert said[0] == said[1] == said[2] and said[0]["captured"] == 3
        assert attnpatch.report(model).totals["captured"] == 9
    finally:
        attnpatch.remove(model)
