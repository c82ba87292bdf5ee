"""What cannot be derived from the configs and signatures of transformers' architectures."""

from __future__ import annotations

import torch

from benchmarks.small_models import floats
from benchmarks.small_transformers import HIDDEN, Special

BATCH, LENGTH = 2, 101
# Of time series: what is known, what is asked for, and how far back a step looks.
PAST, FUTURE, LAGS = 83, 24, 3


def ids(*shape: int, high: int = 90) -> torch.Tensor:
    return torch.randint(5, high, shape, generator=torch.Generator().manual_seed(7))


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.long)


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
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_PAIR = Special(inputs={"pixel_values": floats(BATCH, 2, 3, 64, 64)})


def _without(special: Special, *names: str) -> Special:
    config = {key: value for key, value in special.config.items() if key not in names}
    return Special(config=config, inputs=special.inputs)


SPECIAL: dict[str, Special] = {
    # Hybrids: so that a layer is attention.
    "bamba": Special(config={"attn_layer_indices": [1]}),
    "falcon_h1": Special(config={"mamba_d_ssm": 64}),
    "granitemoehybrid": Special(config={"layer_types": ["linear_attention", "full_attention"]}),
    "jamba": Special(config={"attn_layer_period": 2, "attn_layer_offset": 1}),
    "recurrent_gemma": Special(config={"block_types": ["recurrent", "attention"]}),
    "zamba": Special(config={"layers_block_type": ["linear_attention", "hybrid"]}),
    "zamba2": Special(config={"layers_block_type": ["linear_attention", "hybrid"]}),
    "mamba2": Special(config={"num_heads": 8, "head_dim": 16}),
    "gpt_neo": Special(config={"attention_types": [[["global", "local"], 1]], "window_size": 32}),
    "muse_spark_audio": Special(config={"num_hidden_layers": 4}),
    "muse_spark": Special(config={"audio_config": {"num_hidden_layers": 4}}),
    "gemma4_assistant": Special(config={"text_config": {"hidden_size_per_layer_input": 0}}),
    "fun_asr_nano": Special(config={"adaptor_config": {"intermediate_size": HIDDEN // 4}}),
    "molmo2": Special(config={"adapter_config": {"vision_feature_layer": [1, 0]}}),
    "cosmos3_edge_text": Special(config={"rope_parameters": _SECTIONS}),
    "cosmos3_edge": Special(config={"text_config": {"rope_parameters": _SECTIONS}}),
    "depth_pro": Special(config={"patch_size": 64}),
    "nemotron_h_omni": Special(config={"vision_config": {"video_temporal_patch_size": 2}}),
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
            "attention_mask": ones(BATCH, 40),
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
    "blip_2_qformer": Special(inputs={"query_embeds": floats(BATCH, 20, HIDDEN)}),
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
