"""Small models of transformers as data: what a value of a config becomes, and what cannot be derived for an architecture."""

from __future__ import annotations

import torch

from .recipe import Recipe, floats

HIDDEN, INNER, HEADS, KEY_HEADS, HEAD_DIM, LAYERS, VOCAB = 64, 96, 4, 2, 16, 2, 512
IMAGE, PATCH, FRAMES, POSITIONS = 64, 4, 4, 1024
# Ids of special tokens are put above all words that a text is made of.
WORDS, SPECIAL_IDS = 97, 400

_LAYERS = """num_hidden_layers num_layers n_layer n_layers layers encoder_layers decoder_layers depth num_decoder_layers
num_encoder_layers decoder_num_hidden_layers encoder_num_hidden_layers conf_num_hidden_layers
speech_encoder_layers t2u_encoder_layers t2u_decoder_layers memory_attention_num_layers resampler_depth
decoder_num_layers text_encoder_num_layers query_dec_layers num_blocks num_attention_layers l_layers x_layers
r_layers num_self_attends_per_block folding_trunk_num_hidden_layers num_timestamp_prediction_layers
num_global_layers perceiver_resampler_num_layers decoder_depth postnet_layers""".split()
_VOCAB = """vocab_size text_vocab_size src_vocab_size tgt_vocab_size entity_vocab_size codebook_vocab_size
vocab_size_per_layer_input t2u_vocab_size unit_hifi_gan_vocab_size text_encoder_vocab_size audio_vocab_size
vision_vocab_size encoder_hash_byte_group_vocab num_hash_buckets mel_vocab_size shape_vocab_size
pronunciation_vocab_size""".split()
_WIDTHS = """hidden_size d_model n_embd dim emb_dim hidden_dim embed_dim projection_dim embedding_size text_hidden_size
decoder_hidden_size encoder_hidden_size encoder_hidden_dim out_hidden_size vision_hidden_size output_proj_dims
cross_hidden_size memory_attention_hidden_size memory_encoder_hidden_size fpn_hidden_size d_latents
hidden_size_global backbone_hidden_size mask_dim conv_dim fpn_feature_size mask_feature_size feature_size
adapter_out_dim reassemble_hidden_size project_dim decoder_embed_dim hidden_channels text_embed_dim word_embed_proj_dim output_dim
decoder_in_channels projector_hidden_size projection_hidden_size emb_size true_hidden_size intra_bottleneck_size
memory_encoder_output_channels_ image_text_hidden_size mask_downsampler_embed_dim memory_fuser_embed_dim
perceiver_resampler_hidden_size output_channels decoder_output_dim input_embedding_size output_embedding_size
mm_embed_dim audio_embed_dim condition_dim audio_hidden_size prompt_embed_dim vector_quantization_hidden_dimension""".split()
_INNER = """intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff dim_ff dff mlp_dim ffn_hidden_size d_inner
n_inner moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size
decoder_intermediate_size encoder_feedforward_dim dim_feedforward encoder_dim_feedforward decoder_dim_feedforward
iou_head_hidden_dim intermediate_size_mlp moe_shared_expert_intermediate_size speech_encoder_intermediate_size
t2u_encoder_ffn_dim t2u_decoder_ffn_dim memory_fuser_intermediate_dim memory_attention_feed_forward_hidden_size
memory_attention_mlp_hidden_size perceiver_resampler_mlp_intermediate_size dense_intermediate_size
shared_experts_intermediate_size encoder_linear_units decoder_linear_units moe_hidden_size feed_forward_size
task_encoder_hidden_dim projection_intermediate_dim pair_transition_intermediate_size
centroid_intermediate_size""".split()
HEAD_NAMES = """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads
decoder_num_attention_heads encoder_num_attention_heads conf_num_attention_heads speech_encoder_attention_heads
t2u_encoder_attention_heads t2u_decoder_attention_heads cross_num_attention_heads cross_num_key_value_heads
decoder_num_heads num_encoder_attention_heads num_decoder_attention_heads resampler_n_heads resampler_heads
swa_num_attention_heads index_n_heads linear_num_value_heads linear_num_key_heads linear_num_heads
mamba_n_heads mamba_num_heads num_self_attention_heads num_cross_attention_heads decoder_self_attention_heads
decoder_cross_attention_heads""".split()
KEY_HEAD_NAMES = "num_key_value_heads swa_num_key_value_heads num_key_value_attention_heads".split()
_HEAD_DIMS = """head_dim d_kv d_head v_head_dim qk_nope_head_dim dim_head attention_head_size cross_head_dim
global_head_dim swa_head_dim index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim kv_channels
mamba_head_dim mamba_d_head resampler_head_dim resampler_dim_head attention_head_dim""".split()
_EXPERTS = """num_experts n_routed_experts num_local_experts moe_num_experts num_moe_experts""".split()
_PICKED = "num_experts_per_tok moe_topk moe_k top_k_experts moe_top_k".split()
POSITION_NAMES = """max_position_embeddings n_positions n_ctx max_source_positions max_target_positions max_seq_len
decoder_max_position_embeddings max_encoder_position_embeddings max_decoder_position_embeddings context_length
t2u_max_position_embeddings max_sequence_length""".split()

# What a value of a config becomes; never more than it was.
SMALL: dict[str, int] = {
    **dict.fromkeys(_LAYERS, LAYERS),
    **dict.fromkeys(_VOCAB, VOCAB),
    **dict.fromkeys(_WIDTHS, HIDDEN),
    **dict.fromkeys(_INNER, INNER),
    **dict.fromkeys(HEAD_NAMES, HEADS),
    **dict.fromkeys(KEY_HEAD_NAMES, KEY_HEADS),
    **dict.fromkeys(_HEAD_DIMS, HEAD_DIM),
    **dict.fromkeys(_EXPERTS, 4),
    **dict.fromkeys(_PICKED, 2),
    "qk_rope_head_dim": 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "o_lora_rank": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 16,
    "index_topk": 16,
    "rotary_dim": 8,
    "image_size": IMAGE,
    "patch_size": PATCH,
    "num_queries": 20,
    "num_query_tokens": 20,
    "num_latents": 20,
    "window_size": 4,
    "num_pos_feats": HIDDEN // 2,
    "sliding_window": 32,
    "num_mel_bins": 16,
    "num_frames": FRAMES,
    "codebook_size": 64,
    "num_codebooks": 4,
    "mamba_d_state": 16,
    "num_res_blocks": 1,
    "depths": 2,
    "upsample_groups": HIDDEN,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
}
# What only costs time: shrunk where widths stay as they are.
COSTLY = {
    *_LAYERS,
    *_VOCAB,
    *_EXPERTS,
    *_PICKED,
    "num_kv_shared_layers",
    "n_group",
    "topk_group",
    "num_frames",
}
COSTLY |= {"first_k_dense_replace", "sliding_window", "num_mtp_layers", "num_nextn_predict_layers"}
ID_ENDINGS = ("_token_id", "_token_index", "_token_ids")

BATCH, LENGTH = 2, 101
# Of time series: what is known, what is asked for, and how far back a step looks.
PAST, FUTURE, LAGS = 83, 24, 3


def ids(*shape: int, high: int = 90) -> torch.Tensor:
    return torch.randint(5, high, shape, generator=torch.Generator().manual_seed(7))


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(8))


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.long)


def _patches() -> torch.Tensor:
    """Patches of 16 x 16 pixels that begin with their row and column."""
    places = torch.stack([torch.arange(60) // 10 + 1, torch.arange(60) % 10 + 1], dim=-1)
    return torch.cat([places.float().expand(BATCH, -1, -1), floats(BATCH, 60, 768)], dim=-1)


_SERIES = Recipe(
    config={
        "prediction_length": FUTURE,
        "context_length": PAST - LAGS,
        "lags_sequence": [1, 2, LAGS],
        "num_time_features": 2,
        "moving_average": 5,
        "label_length": 10,
    },
    inputs={
        "past_values": floats(BATCH, PAST),
        "past_time_features": floats(BATCH, PAST, 2),
        "past_observed_mask": torch.ones(BATCH, PAST),
        "future_values": floats(BATCH, FUTURE),
        "future_time_features": floats(BATCH, FUTURE, 2),
    },
)
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
# An image whole and in one crop.
_CROPS = Recipe(
    config={"image_grid_pinpoints": [[64, 64]]},
    inputs={
        "pixel_values": floats(BATCH, 2, 3, 64, 64),
        "image_sizes": torch.tensor([[64, 64]] * BATCH),
    },
)
# Patches of 4 x 4 pixels, flat.
_FLAT = Recipe(
    inputs={
        "pixel_values": floats(BATCH, 96, 48),
        "spatial_shapes": torch.tensor([[8, 12]] * BATCH),
        "pixel_attention_mask": ones(BATCH, 96),
    }
)
_PAIR = Recipe(inputs={"pixel_values": floats(BATCH, 2, 3, 64, 64)})


def _without(recipe: Recipe, *names: str) -> Recipe:
    config = {key: value for key, value in recipe.config.items() if key not in names}
    return Recipe(config=config, inputs=recipe.inputs)


RECIPES: dict[str, Recipe] = {
    # So that a layer is attention, or the head that is.
    "pp_ocrv5_mobile_rec": Recipe(kind="PPOCRV5MobileRecForTextRecognition"),
    "pp_ocrv5_server_rec": Recipe(kind="PPOCRV5ServerRecForTextRecognition"),
    "pp_ocrv6_small_rec": Recipe(kind="PPOCRV6SmallRecForTextRecognition"),
    "pp_ocrv6_tiny_rec": Recipe(kind="PPOCRV6TinyRecForTextRecognition"),
    "sam3_lite_text_text_model": Recipe(config={"num_hidden_layers": 3}),
    "bamba": Recipe(config={"attn_layer_indices": [1]}),
    "falcon_h1": Recipe(config={"mamba_d_ssm": 64}),
    "granitemoehybrid": Recipe(config={"layer_types": ["linear_attention", "full_attention"]}),
    "jamba": Recipe(config={"attn_layer_period": 2, "attn_layer_offset": 1}),
    "recurrent_gemma": Recipe(config={"block_types": ["recurrent", "attention"]}),
    "zamba": Recipe(config={"layers_block_type": ["linear_attention", "hybrid"]}),
    "zamba2": Recipe(config={"layers_block_type": ["linear_attention", "hybrid"]}),
    "mamba2": Recipe(config={"num_heads": 8, "head_dim": 16}),
    "gpt_neo": Recipe(config={"attention_types": [[["global", "local"], 1]], "window_size": 32}),
    "muse_spark": Recipe(config={"audio_config": {"num_hidden_layers": 4}}),
    "gemma4_assistant": Recipe(
        config={"hidden_size_per_layer_input": 0, "text_config": {"hidden_size_per_layer_input": 0}}
    ),
    "fun_asr_nano": Recipe(config={"adaptor_config": {"intermediate_size": HIDDEN // 4}}),
    "molmo2": Recipe(config={"adapter_config": {"vision_feature_layer": [1, 0]}}),
    "cosmos3_edge_text": Recipe(config={"rope_parameters": _SECTIONS}),
    "cosmos3_edge": Recipe(config={"text_config": {"rope_parameters": _SECTIONS}}),
    "depth_pro": Recipe(config={"patch_size": 64}),
    "nemotron_h_omni": Recipe(config={"vision_config": {"video_temporal_patch_size": 2}}),
    # Defaults that make no model.
    "dbrx": Recipe(config={"attn_config": {"rope_theta": 10000.0}}),
    "esm": Recipe(config={"vocab_size": 33}),
    "dots1": Recipe(config={"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}),
    "deepseek_v2": Recipe(config={"num_experts_per_tok": 2}),
    "diffusion_gemma": Recipe(
        config={"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}}
    ),
    "hunyuan_v1_dense": Recipe(config={"rope_parameters": _ROPE, "head_dim": 16}),
    "hunyuan_v1_moe": Recipe(config={"rope_parameters": _ROPE, "head_dim": 16}),
    "hunyuan_vl": Recipe(config={"text_config": {"rope_parameters": _ROPE, "head_dim": 16}}),
    "hunyuan_vl_text": Recipe(config={"rope_parameters": _ROPE, "head_dim": 16}),
    "ministral": Recipe(config={"head_dim": 16}),
    "cvt": Recipe(config={"depth": [1, 2, 3]}),
    "reformer": Recipe(
        config={
            "axial_pos_embds_dim": [32, 32],
            "axial_pos_shape": [8, 16],
            "max_position_embeddings": 128,
            "local_attn_chunk_length": 16,
            "lsh_attn_chunk_length": 16,
        }
    ),
    "lfm2_moe": Recipe(config={"rope_parameters": _ROPE}),
    "nemotron": Recipe(config={"head_dim": 16, "num_key_value_heads": 2}),
    "nemotron_h": Recipe(config={"n_groups": 2, "mamba_num_heads": 8}),
    "longcat_flash": Recipe(config={"head_dim": 8}),
    "jev": Recipe(
        inputs={
            "input_ids": ids(1, LENGTH),
            "attention_mask": ones(1, LENGTH),
            "marks": torch.tensor([[20, 60]]),
            "num_options": torch.tensor([[2, 2]]),
            "question_type_ids": torch.tensor([[0, 0]]),
        }
    ),
    "pix2struct": Recipe(inputs={"flattened_patches": _patches()}),
    "muse_spark_audio": Recipe(
        config={"num_hidden_layers": 4}, inputs={"input_values": floats(BATCH, 38400)}
    ),
    "musicgen": Recipe(
        kind="MusicgenForConditionalGeneration", inputs={"decoder_input_ids": ids(BATCH * 4, 71, high=60)}
    ),
    "musicgen_melody": Recipe(
        kind="MusicgenMelodyForConditionalGeneration",
        inputs={"decoder_input_ids": ids(BATCH * 4, 71, high=60)},
        without=("input_features",),
    ),
    "timesfm": Recipe(
        config={"context_length": 512},
        inputs={
            "past_values": floats(BATCH, 512),
            "past_values_padding": torch.zeros(BATCH, 512, dtype=torch.long),
            "freq": torch.zeros(BATCH, 1, dtype=torch.long),
        },
    ),
    "timesfm2_5": Recipe(
        config={"context_length": 512},
        inputs={
            "past_values": floats(BATCH, 512),
            "past_values_padding": torch.zeros(BATCH, 512, dtype=torch.long),
        },
    ),
    "step3p7": Recipe(config={"text_config": {"sliding_window": 32}}),
    "siglip2": _FLAT,
    "siglip2_vision_model": _FLAT,
    "lfm2_vl": _FLAT,
    "lfm3_vl": _FLAT,
    "gemma4_vision": Recipe(
        inputs={
            "pixel_values": floats(BATCH, 96, 48),
            "pixel_position_ids": torch.stack([torch.arange(96) % 12, torch.arange(96) // 12], -1).expand(
                2, -1, -1
            ),
        }
    ),
    "video_llama_3_vision": Recipe(inputs={"merge_sizes": torch.tensor([2, 2])}),
    "video_llama_3": Recipe(inputs={"image_merge_sizes": torch.tensor([2, 2])}),
    "dia": Recipe(inputs={"decoder_input_ids": ids(BATCH, 71, 9)}),
    "gemma3n_audio": Recipe(
        inputs={
            "audio_mel": floats(BATCH, 200, 128),
            "audio_mel_mask": torch.zeros(BATCH, 200, dtype=torch.bool),
        }
    ),
    # Sparse patterns: so that a sequence is longer than they are.
    "big_bird": Recipe(config={"block_size": 8, "num_random_blocks": 2}),
    "bigbird_pegasus": Recipe(config={"block_size": 8, "num_random_blocks": 2}),
    "longformer": Recipe(config={"attention_window": 16}),
    "led": Recipe(config={"attention_window": 16}),
    # Time series, decisions.
    "autoformer": _SERIES,
    "informer": _without(_SERIES, "moving_average", "label_length"),
    "time_series_transformer": _without(_SERIES, "moving_average", "label_length"),
    "patchtst": Recipe(config={"context_length": 96}, inputs={"past_values": floats(BATCH, 96, 1)}),
    "patchtsmixer": Recipe(
        config={"context_length": 96, "self_attn": True}, inputs={"past_values": floats(BATCH, 96, 1)}
    ),
    "decision_transformer": Recipe(
        inputs={
            "states": floats(BATCH, 40, 17),
            "actions": floats(BATCH, 40, 4),
            "rewards": floats(BATCH, 40, 1),
            "returns_to_go": floats(BATCH, 40, 1),
            "timesteps": torch.arange(40).expand(BATCH, -1),
            "attention_mask": torch.arange(40).expand(BATCH, -1).ge(torch.tensor([[0], [6]])).long(),
        }
    ),
    # Text beside something.
    "lxmert": Recipe(inputs={"visual_feats": floats(BATCH, 20, 2048), "visual_pos": rand(BATCH, 20, 4)}),
    "bros": Recipe(inputs={"bbox": rand(BATCH, LENGTH, 8)}),
    "udop": Recipe(inputs={"bbox": rand(BATCH, LENGTH, 4)}),
    "perceiver": Recipe(
        config={"d_latents": HIDDEN, "d_model": HIDDEN},
        inputs={"inputs": floats(BATCH, LENGTH, HIDDEN), "attention_mask": ones(BATCH, LENGTH)},
    ),
    "oneformer": Recipe(inputs={"task_inputs": ids(BATCH, 77)}),
    "omdet-turbo": Recipe(
        inputs={
            "classes_input_ids": ids(4, 12),
            "classes_attention_mask": ones(4, 12),
            "tasks_input_ids": ids(BATCH, 12),
            "tasks_attention_mask": ones(BATCH, 12),
            "classes_structure": torch.tensor([2, 2]),
        }
    ),
    "blip-2": Recipe(config={"image_token_index": 450}),
    "instructblip": Recipe(config={"image_token_index": 450}),
    "instructblipvideo": Recipe(config={"video_token_index": 450}),
    "aria": Recipe(config={"projector_patch_to_query_dict": {256: 20}}),
    "mllama": Recipe(
        inputs={
            "pixel_values": floats(BATCH, 1, 4, 3, 64, 64),
            "aspect_ratio_mask": ones(BATCH, 1, 4),
            "aspect_ratio_ids": ones(BATCH, 1),
            "cross_attention_mask": ones(BATCH, LENGTH, 1, 4),
        }
    ),
    "chameleon": Recipe(
        config={
            "vocabulary_map": {"<image>": 450, **{f"IMGIMG{chr(65 + i)}Z": i for i in range(10)}},
            "vq_config": {"num_embeddings": 10},
        }
    ),
    "llava_next": _CROPS,
    "llava_next_video": _CROPS,
    "llava_onevision": _CROPS,
    "granite4_vision": _CROPS,
    "align": Recipe(config={"projection_dim": 640}),
    "blip_2_qformer": Recipe(
        inputs={"query_embeds": floats(BATCH, 20, HIDDEN), "encoder_hidden_states": floats(BATCH, 50, HIDDEN)}
    ),
    # Images in pairs, with prompts.
    "superglue": _PAIR,
    "lightglue": _PAIR,
    "efficientloftr": Recipe(
        config={"hidden_size": 256}, inputs={"pixel_values": floats(BATCH, 2, 1, 64, 64)}
    ),
    "seggpt": Recipe(
        config={"image_size": [64, 32]},
        inputs={
            name: floats(BATCH, 3, 32, 32) for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")
        },
    ),
    # Sound.
    "speecht5": Recipe(kind="SpeechT5ForSpeechToText"),
    # An encoder and a decoder of other architectures.
    "encoder-decoder": Recipe(config={"pad_token_id": 0, "decoder_start_token_id": 1}),
    "vision-encoder-decoder": Recipe(config={"pad_token_id": 0, "decoder_start_token_id": 1}),
    "speech-encoder-decoder": Recipe(config={"pad_token_id": 0, "decoder_start_token_id": 1}),
}


def recipe_of(model_type: str) -> Recipe:
    """What cannot be derived for an architecture; nothing for most."""
    return RECIPES.get(model_type, Recipe())
