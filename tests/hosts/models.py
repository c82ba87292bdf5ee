"""Small models of ten architectures and more, under the hosts' own common tests; run by ``make test-hosts``."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from testers import BATCH, HEADS, LAYERS, LENGTH, VOCAB, WIDTH, Setup, ids, made, real

TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 40,
    "max_position_embeddings": 128,
}  # fmt: skip


def text(config: Any) -> dict[str, Any]:
    return {"input_ids": ids(BATCH, LENGTH), "attention_mask": real(BATCH, LENGTH)}


def llama() -> Any:
    return transformers.LlamaConfig(**TOKENS, **SIZES, num_key_value_heads=2)


def bert() -> Any:
    return transformers.BertConfig(**TOKENS, **SIZES, type_vocab_size=3)


def gptj() -> Any:
    return transformers.GPTJConfig(
        **TOKENS, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=40, n_positions=128, rotary_dim=4,
        tie_word_embeddings=False,
    )  # fmt: skip


def bloom() -> Any:
    return transformers.BloomConfig(**TOKENS, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS, seq_length=128)


def mpt() -> Any:
    return transformers.MptConfig(**TOKENS, d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, max_seq_len=128)


def t5() -> Any:
    return transformers.T5Config(
        **TOKENS, d_model=WIDTH, d_kv=8, d_ff=40, num_layers=LAYERS, num_heads=HEADS, decoder_start_token_id=0,
        relative_attention_num_buckets=8,
    )  # fmt: skip


def two_sided(config: Any) -> dict[str, Any]:
    more = {
        "decoder_input_ids": ids(BATCH, 7),
        "decoder_attention_mask": torch.ones(BATCH, 7, dtype=torch.long),
    }
    return {**text(config), **more}


def longformer() -> Any:
    return transformers.LongformerConfig(**TOKENS, **SIZES, attention_window=4)


def longformer_text(config: Any) -> dict[str, Any]:
    # A multiple of the window, without padding, and one token that looks at all.
    marked = torch.zeros(BATCH, 12, dtype=torch.long)
    marked[:, 0] = 1
    seen = torch.ones(BATCH, 12, dtype=torch.long)
    return {"input_ids": ids(BATCH, 12), "attention_mask": seen, "global_attention_mask": marked}


def vit() -> Any:
    return transformers.ViTConfig(**SIZES, image_size=24, patch_size=8, encoder_stride=8)


def image(config: Any) -> dict[str, Any]:
    return {"pixel_values": torch.rand(BATCH, 3, 24, 24)}


def whisper() -> Any:
    return transformers.WhisperConfig(
        vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, d_model=WIDTH,
        encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS, decoder_attention_heads=HEADS,
        encoder_ffn_dim=40, decoder_ffn_dim=40, num_mel_bins=8, max_source_positions=14, max_target_positions=64,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip


def sound(config: Any) -> dict[str, Any]:
    return {"input_features": torch.rand(BATCH, 8, 28), "decoder_input_ids": ids(BATCH, 7)}


def xlnet() -> Any:
    return transformers.XLNetConfig(**TOKENS, d_model=WIDTH, n_layer=LAYERS, n_head=HEADS, d_inner=40)


def llava() -> Any:
    vision = transformers.CLIPVisionConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=40, image_size=24,
        patch_size=8, projection_dim=WIDTH,
    )  # fmt: skip
    return transformers.LlavaConfig(
        vision_config=vision, text_config=llama(), image_token_index=4, vision_feature_layer=-1,
        vision_feature_select_strategy="default", image_seq_length=9,
    )  # fmt: skip


def image_and_text(config: Any) -> dict[str, Any]:
    tokens = ids(BATCH, 20, low=5)
    tokens[:, 4:13] = 4
    return {
        "input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": torch.rand(BATCH, 3, 24, 24),
    }  # fmt: skip


SETUPS = [
    Setup(
        "Llama", llama, text,
        ("LlamaModel", "LlamaForCausalLM", "LlamaForSequenceClassification", "LlamaForQuestionAnswering",
         "LlamaForTokenClassification"),
    ),
    Setup(
        "Bert", bert, text,
        ("BertModel", "BertLMHeadModel", "BertForMaskedLM", "BertForMultipleChoice", "BertForQuestionAnswering",
         "BertForSequenceClassification", "BertForTokenClassification"),
        # An encoder keeps no cache for candidates.
        options={"test_generating_by_looking_up_the_prompt": None},
    ),
    Setup("T5", t5, two_sided, ("T5Model", "T5ForConditionalGeneration"),
          {"seq_length": 7, "encoder_seq_length": LENGTH, "decoder_seq_length": 7}, {"is_encoder_decoder": True}, text),
    Setup("Gptj", gptj, text, ("GPTJModel", "GPTJForCausalLM", "GPTJForSequenceClassification")),
    Setup("Bloom", bloom, text, ("BloomModel", "BloomForCausalLM", "BloomForSequenceClassification")),
    Setup("Mpt", mpt, text, ("MptModel", "MptForCausalLM", "MptForSequenceClassification")),
    Setup(
        "Longformer", longformer, longformer_text,
        ("LongformerModel", "LongformerForMaskedLM", "LongformerForTokenClassification"),
        {"seq_length": 12, "key_length": 6, "encoder_seq_length": 12},
        # Its weights are another tensor than those that it goes on with.
        {"test_retain_grad_hidden_states_attentions": None},
    ),
    Setup("Vit", vit, image, ("ViTModel", "ViTForImageClassification", "ViTForMaskedImageModeling"),
          {"seq_length": 10, "encoder_seq_length": 10, "image_size": 24, "patch_size": 8, "num_masks": 4, "mask_length": 9},
          {"test_resize_embeddings": False}),
    Setup("Whisper", whisper, sound, ("WhisperModel", "WhisperForConditionalGeneration"),
          {"seq_length": 7, "encoder_seq_length": 14, "decoder_seq_length": 7, "decoder_key_length": 7},
          # Its own generate wants timestamps for several sequences of a sound.
          {"is_encoder_decoder": True, "test_resize_embeddings": False, "test_generating_with_beams": None},
          targets=7),
    Setup("Xlnet", xlnet, text, ("XLNetModel", "XLNetLMHeadModel", "XLNetForSequenceClassification"),
          # It keeps hidden states instead of a cache, and its weights are another tensor than those that it goes on with.
          options={"test_generating_by_looking_up_the_prompt": None, "test_retain_grad_hidden_states_attentions": None}),
    Setup("Llava", llava, image_and_text, ("LlavaModel", "LlavaForConditionalGeneration"),
          {"seq_length": 20, "encoder_seq_length": 20, "image_size": 24, "patch_size": 8},
          {"_is_composite": True}),
]  # fmt: skip

globals().update({setup.name: made(setup) for setup in SETUPS})
