"""What cannot be derived from the configs and signatures of transformers' architectures."""

from __future__ import annotations

import torch

from .models_diffusers import floats
from .models_transformers import HIDDEN, Special

BATCH, LENGTH = 2, 101
# Of time series: what is known, what is asked for, and how far back a step looks.
PAST, FUTURE, LAGS = 83, 24, 3


def ids(*shape: int, high: int = 90) -> torch.Tensor:
    return torch.randint(5, high, shape, generator=torch.Generator().manual_seed(7))


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.long)


def _patches() -> torch.Tensor:
    """Patches of 16 x 16 pixels that begin with their row and column."""
    places = torch.stack([torch.arange(60) // 10 + 1, torch.arange(60) % 10 + 1], dim=-1)
    return torch.cat([places.float().expand(BATCH, -1, -1), floats(BATCH, 60, 768)], dim=-1)


_SERIES = Special(
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
_CROPS = Special(
    config={"image_grid_pinpoints": [[64, 64]]},
    inputs={
        "pixel_values": floats(BATCH, 2, 3, 64, 64),
        "image_sizes": torch.tensor([[64, 64]] * BATCH),
    },
)
# Patches of 4 x 4 pixels, flat.
_FLAT = Special(
    inputs={
        "pixel_values": floats(BATCH, 96, 48),
        "spatial_shapes": torch.tensor([[8, 12]] * BATCH),
        "pixel_attention_mask": ones(BATCH, 96),
    }
)
_PAIR = Special(inputs={"pixel_values": floats(BATCH, 2, 3, 64, 64)})


def _without(special: Special, *names: str) -> Special:
    config = {key: value for key, value in special.config.items() if key not in names}
    return Special(config=config, inputs=special.inputs)


SPECIAL: dict[str, Special] = {
    # So that a layer is attention, or the head that is.
    "pp_ocrv5_mobile_rec": Special(kind="PPOCRV5MobileRecForTextRecognition"),
    "pp_ocrv5_server_rec": Special(kind="PPOCRV5ServerRecForTextRecognition"),
    "pp_ocrv6_small_rec": Special(kind="PPOCRV6SmallRecForTextRecognition"),
    "pp_ocrv6_tiny_rec": Special(kind="PPOCRV6TinyRecForTextRecognition"),
    "sam3_lite_text_text_model": Special(config={"num_hidden_layers": 3}),
    "bamba": Special(config={"attn_layer_indices": [1]}),
    "falcon_h1": Special(config={"mamba_d_ssm": 64}),
    "granitemoehybrid": Special(config={"layer_types": ["linear_attention", "full_attention"]}),
    "jamba": Special(config={"attn_layer_period": 2, "attn_layer_offset": 1}),
    "recurrent_gemma": Special(config={"block_types": ["recurrent", "attention"]}),
    "zamba": Special(config={"layers_block_type": ["linear_attention", "hybrid"]}),
    "zamba2": Special(config={"layers_block_type": ["linear_attention", "hybrid"]}),
    "mamba2": Special(config={"num_heads": 8, "head_dim": 16}),
    "gpt_neo": Special(config={"attention_types": [[["global", "local"], 1]], "window_size": 32}),
    "muse_spark": Special(config={"audio_config": {"num_hidden_layers": 4}}),
    "gemma4_assistant": Special(
        config={"hidden_size_per_layer_input": 0, "text_config": {"hidden_size_per_layer_input": 0}}
    ),
    "fun_asr_nano": Special(config={"adaptor_config": {"intermediate_size": HIDDEN // 4}}),
    "molmo2": Special(config={"adapter_config": {"vision_feature_layer": [1, 0]}}),
    "cosmos3_edge_text": Special(config={"rope_parameters": _SECTIONS}),
    "cosmos3_edge": Special(config={"text_config": {"rope_parameters": _SECTIONS}}),
    "depth_pro": Special(config={"patch_size": 64}),
    "nemotron_h_omni": Special(config={"vision_config": {"video_temporal_patch_size": 2}}),
    # Defaults that make no model.
    "dbrx": Special(config={"attn_config": {"rope_theta": 10000.0}}),
    "esm": Special(config={"vocab_size": 33}),
    "dots1": Special(config={"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}),
    "deepseek_v2": Special(config={"num_experts_per_tok": 2}),
    "diffusion_gemma": Special(
        config={"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}}
    ),
    "hunyuan_v1_dense": Special(config={"rope_parameters": _ROPE, "head_dim": 16}),
    "hunyuan_v1_moe": Special(config={"rope_parameters": _ROPE, "head_dim": 16}),
    "hunyuan_vl": Special(config={"text_config": {"rope_parameters": _ROPE, "head_dim": 16}}),
    "hunyuan_vl_text": Special(config={"rope_parameters": _ROPE, "head_dim": 16}),
    "ministral": Special(config={"head_dim": 16}),
    "cvt": Special(config={"depth": [1, 2, 3]}),
    "reformer": Special(
        config={
            "axial_pos_embds_dim": [32, 32],
            "axial_pos_shape": [8, 16],
            "max_position_embeddings": 128,
            "local_attn_chunk_length": 16,
            "lsh_attn_chunk_length": 16,
        }
    ),
    "lfm2_moe": Special(config={"rope_parameters": _ROPE}),
    "nemotron": Special(config={"head_dim": 16, "num_key_value_heads": 2}),
    "nemotron_h": Special(config={"n_groups": 2, "mamba_num_heads": 8}),
    "longcat_flash": Special(config={"head_dim": 8}),
    "jev": Special(
        inputs={
            "input_ids": ids(1, LENGTH),
            "attention_mask": ones(1, LENGTH),
            "marks": torch.tensor([[20, 60]]),
            "num_options": torch.tensor([[2, 2]]),
            "question_type_ids": torch.tensor([[0, 0]]),
        }
    ),
    "pix2struct": Special(inputs={"flattened_patches": _patches()}),
    "muse_spark_audio": Special(
        config={"num_hidden_layers": 4}, inputs={"input_values": floats(BATCH, 38400)}
    ),
    "musicgen": Special(
        kind="MusicgenForConditionalGeneration", inputs={"decoder_input_ids": ids(BATCH * 4, 71, high=60)}
    ),
    "musicgen_melody": Special(
        kind="MusicgenMelodyForConditionalGeneration",
        inputs={"decoder_input_ids": ids(BATCH * 4, 71, high=60)},
        without=("input_features",),
    ),
    "timesfm": Special(
        config={"context_length": 512},
        inputs={
            "past_values": floats(BATCH, 512),
            "past_values_padding": torch.zeros(BATCH, 512, dtype=torch.long),
            "freq": torch.zeros(BATCH, 1, dtype=torch.long),
        },
    ),
    "timesfm2_5": Special(
        config={"context_length": 512},
        inputs={
            "past_values": floats(BATCH, 512),
            "past_values_padding": torch.zeros(BATCH, 512, dtype=torch.long),
        },
    ),
    "step3p7": Special(config={"text_config": {"sliding_window": 32}}),
    "siglip2": _FLAT,
    "siglip2_vision_model": _FLAT,
    "lfm2_vl": _FLAT,
    "lfm3_vl": _FLAT,
    "gemma4_vision": Special(
        inputs={
            "pixel_values": floats(BATCH, 96, 48),
            "pixel_position_ids": torch.stack([torch.arange(96) % 12, torch.arange(96) // 12], -1).expand(
                2, -1, -1
            ),
        }
    ),
    "video_llama_3_vision": Special(inputs={"merge_sizes": torch.tensor([2, 2])}),
    "video_llama_3": Special(inputs={"image_merge_sizes": torch.tensor([2, 2])}),
    "dia": Special(inputs={"decoder_input_ids": ids(BATCH, 71, 9)}),
    "gemma3n_audio": Special(
        inputs={
            "audio_mel": floats(BATCH, 200, 128),
            "audio_mel_mask": torch.zeros(BATCH, 200, dtype=torch.bool),
        }
    ),
    # Sparse patterns: so that a sequence is longer than they are.
    "big_bird": Special(config={"block_size": 8, "num_random_blocks": 2}),
    "bigbird_pegasus": Special(config={"block_size": 8, "num_random_blocks": 2}),
    "longformer": Special(config={"attention_window": 16}),
    "led": Special(config={"attention_window": 16}),
    # Time series, decisions.
    "autoformer": _SERIES,
    "informer": _without(_SERIES, "moving_average", "label_length"),
    "time_series_transformer": _without(_SERIES, "moving_average", "label_length"),
    "patchtst": Special(config={"context_length": 96}, inputs={"past_values": floats(BATCH, 96, 1)}),
    "patchtsmixer": Special(
        config={"context_length": 96, "self_attn": True}, inputs={"past_values": floats(BATCH, 96, 1)}
    ),
    "decision_transformer": Special(
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
    "lxmert": Special(
        inputs={"visual_feats": floats(BATCH, 20, 2048), "visual_pos": torch.rand(BATCH, 20, 4)}
    ),
    "bros": Special(inputs={"bbox": torch.rand(BATCH, LENGTH, 8)}),
    "udop": Special(inputs={"bbox": torch.rand(BATCH, LENGTH, 4)}),
    "perceiver": Special(
        config={"d_latents": HIDDEN, "d_model": HIDDEN},
        inputs={"inputs": floats(BATCH, LENGTH, HIDDEN), "attention_mask": ones(BATCH, LENGTH)},
    ),
    "oneformer": Special(inputs={"task_inputs": ids(BATCH, 77)}),
    "omdet-turbo": Special(
        inputs={
            "classes_input_ids": ids(4, 12),
            "classes_attention_mask": ones(4, 12),
            "tasks_input_ids": ids(BATCH, 12),
            "tasks_attention_mask": ones(BATCH, 12),
            "classes_structure": torch.tensor([2, 2]),
        }
    ),
    "blip-2": Special(config={"image_token_index": 450}),
    "instructblip": Special(config={"image_token_index": 450}),
    "instructblipvideo": Special(config={"video_token_index": 450}),
    "aria": Special(config={"projector_patch_to_query_dict": {256: 20}}),
    "mllama": Special(
        inputs={
            "pixel_values": floats(BATCH, 1, 4, 3, 64, 64),
            "aspect_ratio_mask": ones(BATCH, 1, 4),
            "aspect_ratio_ids": ones(BATCH, 1),
            "cross_attention_mask": ones(BATCH, LENGTH, 1, 4),
        }
    ),
    "chameleon": Special(
        config={
            "vocabulary_map": {"<image>": 450, **{f"IMGIMG{chr(65 + i)}Z": i for i in range(10)}},
            "vq_config": {"num_embeddings": 10},
        }
    ),
    "llava_next": _CROPS,
    "llava_next_video": _CROPS,
    "llava_onevision": _CROPS,
    "granite4_vision": _CROPS,
    "align": Special(config={"projection_dim": 640}),
    "blip_2_qformer": Special(
        inputs={"query_embeds": floats(BATCH, 20, HIDDEN), "encoder_hidden_states": floats(BATCH, 50, HIDDEN)}
    ),
    # Images in pairs, with prompts.
    "superglue": _PAIR,
    "lightglue": _PAIR,
    "efficientloftr": Special(
        config={"hidden_size": 256}, inputs={"pixel_values": floats(BATCH, 2, 1, 64, 64)}
    ),
    "seggpt": Special(
        config={"image_size": [64, 32]},
        inputs={
            name: floats(BATCH, 3, 32, 32) for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")
        },
    ),
    # Sound.
    "speecht5": Special(kind="SpeechT5ForSpeechToText"),
    # An encoder and a decoder of other architectures.
    "encoder-decoder": Special(config={"pad_token_id": 0, "decoder_start_token_id": 1}),
    "vision-encoder-decoder": Special(config={"pad_token_id": 0, "decoder_start_token_id": 1}),
    "speech-encoder-decoder": Special(config={"pad_token_id": 0, "decoder_start_token_id": 1}),
}
