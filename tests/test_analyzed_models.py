"""Which models the analyzer takes, and which of them piece by piece: the map is that of dense attention in a single pass."""

import chats
import pytest
import safetensors.torch
import torch
import transformers
from compat import models_transformers
from test_blocks import make_tokenizer
from typer.testing import CliRunner

import attnpatch
from attnpatch.cli.app import app
from attnpatch.conversations.single_pass_check import tokens_to_try
from attnpatch.errors import AnalysisError
from attnpatch.hosts.transformers.loading import load_model

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TALK = [
    {"role": "user", "content": "where is the key ?"},
    {"role": "assistant", "content": "under the stone near the well"},
    {"role": "user", "content": "which one ?"},
]
T5 = {"vocab_size": 320, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
BART = {
    "vocab_size": 320, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 256,
    **{f"{side}_{what}": 4 for side in ("encoder", "decoder") for what in ("attention_heads", "ffn_dim")},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(CHATML)


def whisper():
    config = transformers.WhisperConfig(
        **{**BART, "num_mel_bins": 8, "max_source_positions": 20, "pad_token_id": 0}
    )
    return transformers.WhisperForConditionalGeneration(config)


def vision():
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.ViTModel(transformers.ViTConfig(**size, image_size=16, patch_size=8))


BOTH = {
    "T5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "T5 without a head": lambda: transformers.T5Model(transformers.T5Config(**T5)),
    "BART": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)),
    "Whisper": whisper,
    "ViT": vision,
}
WAYS = (
    "analyze_conversation",
    "analyze_conversation_sequential",
    "analyze_conversation_chunked",
    "analyze_generation",
)


def analyzing(tmp_path, path):
    """The command line of an analysis of a file."""
    return [
        "analyze",
        "--model",
        str(tmp_path / "model"),
        "--json",
        str(path),
        "--out",
        str(tmp_path / "out"),
    ]


@pytest.mark.parametrize("name", BOTH)
def test_models_of_more_than_one_sequence_are_refused_in_one_line(name, tokenizer):
    model = BOTH[name]().eval()
    for way in WAYS:
        with pytest.raises(AnalysisError, match="capture") as raised:
            getattr(attnpatch.BlockAttentionAnalyzer(model=model, tokenizer=tokenizer), way)(TALK)
        assert len(str(raised.value).splitlines()) == 1 and type(model).__name__ in str(raised.value)
        assert ("an encoder and a decoder" in str(raised.value)) == (name != "ViT")


@pytest.mark.parametrize(
    "build",
    [
        lambda: transformers.T5EncoderModel(transformers.T5Config(**T5)),
        lambda: transformers.BartForCausalLM(transformers.BartConfig(**BART)),
        lambda: transformers.BartModel(transformers.BartConfig(**BART)).encoder,
    ],
    ids=["T5's encoder", "BART's decoder", "BART's encoder"],
)
def test_one_side_of_such_a_model_is_a_sequence(build, tokenizer):
    analyzer = attnpatch.BlockAttentionAnalyzer(model=build().eval(), tokenizer=tokenizer)
    found = analyzer.analyze_conversation(TALK, "none").block_map
    torch.testing.assert_close(found.mass.sum(-1), torch.ones(1, 3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["T5", "BART"])
def test_a_folder_of_such_a_model_is_refused_before_any_conversation(name, tokenizer, tmp_path):
    """BART's loads as a decoder, whose embeddings the checkpoint does not have: they would be drawn at random."""
    BOTH[name]().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    path = chats.write_good(tmp_path / "chats.jsonl")
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, analyzing(tmp_path, path))
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("attnpatch: ")]
    assert result.exit_code == 1 and "an encoder and a decoder" in line and "attnpatch.capture" in line
    assert "record" not in result.stderr and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "BERT"])
def test_weights_that_a_checkpoint_lacks_are_not_drawn_at_random(name, tmp_path):
    """A head may be: no attention depends on it. Nor is one missed that shares its weights (Gemma)."""
    build = GOES_ON.get(name) or STOPS[name][0]
    build().save_pretrained(tmp_path)
    load_model(str(tmp_path))
    path = tmp_path / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    lost = next(
        key for key in weights if "1.self_attn.q_proj.weight" in key or "1.attention.self.query.weight" in key
    )
    del weights[lost]
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    with pytest.raises(
        AnalysisError, match=r"lacks 1 weights of its \w+, such as .*drawn at random"
    ) as raised:
        load_model(str(tmp_path))
    assert len(str(raised.value).splitlines()) == 1


# ------------------------------------------------------------------------------------------------- piece by piece

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CAUSAL = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 512}
STATES = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_n_groups": 1}
T = transformers


def of(model, config, **fields):
    return lambda: getattr(T, model)(getattr(T, config)(**fields))


GOES_ON = {
    "Llama": of("LlamaForCausalLM", "LlamaConfig", **CAUSAL),
    "GPT-2": of("GPT2LMHeadModel", "GPT2Config", vocab_size=320, n_embd=64, n_layer=2, n_head=4),
    "Mistral, a window of 8": of("MistralForCausalLM", "MistralConfig", **CAUSAL, sliding_window=8),
    "Gemma 3": of("Gemma3ForCausalLM", "Gemma3TextConfig", **CAUSAL, head_dim=16),
    "LFM2, convolutions": of("Lfm2ForCausalLM", "Lfm2Config", **CAUSAL, layer_types=["conv", "full_attention"]),
    "Granite, states": of(
        "GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig", **CAUSAL, **STATES, num_local_experts=2,
        layer_types=["mamba", "attention"], num_experts_per_tok=1,
    ),
}  # fmt: skip
STOPS = {
    "BERT": (of("BertModel", "BertConfig", **SMALL), "attend to later tokens"),
    "BERT with a head": (of("BertLMHeadModel", "BertConfig", **SMALL), "attend to later tokens"),
    "XLM-R": (of("XLMRobertaModel", "XLMRobertaConfig", **SMALL), "attend to later tokens"),
    "EmbeddingGemma": (
        of("Gemma3TextModel", "Gemma3TextConfig", **CAUSAL, head_dim=16, layer_types=["full_attention"] * 2,
           use_bidirectional_attention=True),
        "attend to later tokens",
    ),
    # Of its window only the cache knows.
    "Moshi, a window of 24": (
        of("MoshiForCausalLM", "MoshiConfig", **CAUSAL, head_dim=16, sliding_window=24, ffn_dim=64),
        "another map",
    ),
    "T5's encoder": (lambda: T.T5EncoderModel(T.T5Config(**T5)), "no KV cache"),
    "Bamba": (of("BambaForCausalLM", "BambaConfig", **CAUSAL, **STATES, attn_layer_indices=[1]), "another map"),
    "RecurrentGemma": (
        of("RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", **{**CAUSAL, "num_hidden_layers": 3},
           attention_window_size=64, lru_width=64, head_dim=16),
        "another map",
    ),
}  # fmt: skip


def sharp(model):
    """Attention that differs from row to row."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("q_proj", "k_proj", "query", "key", "c_attn", ".q.", ".k.")):
            parameter.data.mul_(6)
    return model.eval()


def dense(model, tokenizer, spans):
    """``[layers, blocks, blocks]`` of eager attention in a single pass, by plain sums."""
    ids = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=False, return_tensors="pt")
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            found = model(ids, output_attentions=True, use_cache=False).attentions
    finally:
        model.set_attn_implementation(before)
    layers = [layer[0].double().mean(0) for layer in found]
    return torch.stack(
        [
            torch.stack([torch.stack([w[a:b, c:d].sum(1).mean() for c, d in spans]) for a, b in spans])
            for w in layers
        ]
    )


@pytest.mark.parametrize("way", ["sequential", "chunked"])
@pytest.mark.parametrize("name", [*GOES_ON, *STOPS])
def test_pieces_are_the_single_pass_or_are_not_made(name, way, tokenizer):
    torch.manual_seed(0)
    build, words = STOPS.get(name) or (GOES_ON[name], None)
    model = sharp(build())
    analyzer = attnpatch.BlockAttentionAnalyzer(model=model, tokenizer=tokenizer, chunk_size=19)
    found = getattr(analyzer, f"analyze_conversation_{way}")(TALK, "none")
    ends = found.block_map.query_sizes.cumsum(0).tolist()
    expected = dense(model, tokenizer, list(zip([0, *ends[:-1]], ends, strict=True)))
    torch.testing.assert_close(found.block_map.mass.double(), expected, rtol=0, atol=1e-5)
    if words is None:
        assert found.notes == () and found.block_map.metadata["method"] == way
    else:
        (note,) = found.notes
        assert note.startswith("in a single pass: ") and words in note and len(note.splitlines()) == 1
        assert type(model).__name__ in note and found.block_map.metadata["method"] == "single pass"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_of_narrow_dtypes_is_no_reason_and_a_lost_state_is(dtype, tokenizer):
    for name, words in (
        ("Llama", None),
        ("Mistral, a window of 8", None),
        ("Bamba", "another map"),
        ("BERT", "attend to later tokens"),
    ):
        torch.manual_seed(0)
        build = GOES_ON.get(name) or STOPS[name][0]
        analyzer = attnpatch.BlockAttentionAnalyzer(model=sharp(build()).to(dtype), tokenizer=tokenizer)
        why = analyzer.why_single_pass()
        assert (why is None) == (words is None), name
        assert words is None or words in why


def test_a_longer_text_is_tried_where_a_conversation_passes_a_window():
    windows = transformers.MistralForCausalLM(transformers.MistralConfig(**CAUSAL, sliding_window=64)).eval()
    topk = GOES_ON["Llama"]()
    topk.config.index_topk = 2048
    for model, length, expected in (
        (windows, 60, 40), (windows, 65, 104), (topk, 2048, 40), (topk, 4000, 2560), (GOES_ON["Llama"](), 10**6, 40),
    ):  # fmt: skip
        assert tokens_to_try(model, length) == expected
    windows.config.sliding_window = 100_000
    assert tokens_to_try(windows, 200_000) == 8192


@pytest.mark.filterwarnings("ignore:.*in no map")
@pytest.mark.parametrize("way", ["", "_sequential"])
def test_layers_that_are_in_no_map_are_in_the_notes(way, tokenizer):
    """Of Kimi Linear one layer in two attends by a softmax."""
    torch.manual_seed(0)
    config = models_transformers.config_of("kimi_linear", 0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    analyzer = attnpatch.BlockAttentionAnalyzer(model=model, tokenizer=tokenizer, max_tokens=400)
    found = getattr(analyzer, f"analyze_conversation{way}")(TALK, "none")
    (note,) = [note for note in found.notes if "left out" in note]
    assert note.startswith("left out of the map: model.layers.0.self_attn: ")
    assert found.block_map.layers == (1,)
    torch.testing.assert_close(found.block_map.mass.sum(-1), torch.ones(1, len(TALK)), rtol=0, atol=1e-5)


def test_it_is_tried_once_and_leaves_the_model_as_it_was(tokenizer):
    model = sharp(GOES_ON["Llama"]())
    lengths = []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    analyzer = attnpatch.BlockAttentionAnalyzer(model=model, tokenizer=tokenizer)
    before = {name: {*vars(module)} for name, module in model.named_modules()}
    first = analyzer.analyze_conversation_sequential(TALK)
    tried = len(lengths)
    again = analyzer.analyze_conversation_sequential(TALK)
    assert lengths[tried:] == lengths[tried - len(TALK) : tried] and max(lengths) <= 40
    assert first.block_map.metadata["attention"] == again.block_map.metadata["attention"]
    # One message is one piece: nothing to try.
    lengths.clear()
    attnpatch.BlockAttentionAnalyzer(model=model, tokenizer=tokenizer).analyze_conversation_sequential(
        TALK[:1]
    )
    assert len(lengths) == 1
    hook.remove()
    assert {name: {*vars(module)} for name, module in model.named_modules()} == before


def test_the_command_line_says_it_once(tokenizer, tmp_path):
    sharp(STOPS["BERT with a head"][0]()).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    path = chats.write_good(tmp_path / "chats.jsonl", 2)
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, analyzing(tmp_path, path))
    assert result.exit_code == 0, result.output
    assert result.stderr.count("in a single pass: tokens attend to later tokens") == 1
    for line in chats.index_of(tmp_path / "out"):
        assert line["method"] == "single pass" and "attend to later tokens" in line["notes"][0]


@pytest.mark.parametrize(
    "way, options, words",
    [
        ("analyze_generation", {}, "cannot generate"),
        ("analyze_conversation", {"weighting": "gradient"}, "no logits"),
    ],
)
def test_what_a_model_without_a_head_cannot_do(way, options, words, tokenizer):
    model = STOPS["BERT"][0]().eval()
    with pytest.raises(AnalysisError, match=words) as raised:
        getattr(attnpatch.BlockAttentionAnalyzer(model=model, tokenizer=tokenizer, **options), way)(TALK)
    assert len(str(raised.value).splitlines()) == 1
