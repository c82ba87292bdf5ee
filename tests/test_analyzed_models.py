"""Which models the analyzer takes: a conversation is one sequence of tokens, or the model is refused in one line."""

import chats
import pytest
import torch
import transformers
from test_blocks import make_tokenizer
from typer.testing import CliRunner

import attnpatch
from attnpatch.cli import app
from attnpatch.errors import AnalysisError

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
    given = [
        "analyze",
        "--model",
        str(tmp_path / "model"),
        "--json",
        str(path),
        "--out",
        str(tmp_path / "out"),
    ]
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, given)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("attnpatch: ")]
    assert result.exit_code == 1 and "an encoder and a decoder" in line and "attnpatch.capture" in line
    assert "record" not in result.stderr and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()
