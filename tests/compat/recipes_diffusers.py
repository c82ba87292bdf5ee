"""Small models of diffusers as data: what an argument becomes, and what cannot be derived for a class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .recipe import Recipe, floats

HEADS, HEAD_DIM, WIDTH, TEXT_WIDTH, TEXT_LEN = 4, 16, 64, 32, 19
FRAMES, HEIGHT, WIDTH_PX = 2, 8, 12
TOKENS = FRAMES * HEIGHT * WIDTH_PX // 2

_LAYERS = """num_layers depth num_hidden_layers num_single_layers num_mmdit_layers num_single_dit_layers n_layers
nlayers num_refiner_layers n_refiner_layers mmdit_layers transformer_num_layers num_text_blocks num_visual_blocks
dit_depth perceiver_num_layers num_layerwise_text_blocks num_refiner_text_blocks decoder_num_layers
encoder_num_hidden_layers decoder_num_hidden_layers LFE_depth approximator_layers""".split()
_HEADS = """num_attention_heads n_heads num_heads nheads dit_heads num_cross_attention_heads block_num_heads
text_num_attention_heads decoder_num_attention_heads audio_num_attention_heads face_encoder_num_heads
attn_num_heads motion_num_attention_heads cross_attn_num_heads LFE_num_heads""".split()
_KEY_HEADS = "num_key_value_heads num_kv_heads n_kv_heads num_key_value_attention_heads text_num_key_value_heads".split()
_HEAD_DIMS = """attention_head_dim head_dim cross_attention_head_dim linear_head_dim decoder_attention_head_dim d_kv
audio_attention_head_dim dim_heads decoder_head_dim cross_attn_dim_head LFE_dim_head""".split()
_WIDTHS = """hidden_size model_dim dim cross_attention_dim caption_projection_dim token_dim dit_dim embed_dim d_model
audio_cross_attention_dim encoder_hidden_size decoder_hidden_size model_channels""".split()
_INNER = """intermediate_size ffn_dim ff_dim ffn_hidden_size ff_inner_dim d_ff text_intermediate_size
decoder_intermediate_size moe_intermediate_dim approximator_hidden_dim""".split()
TEXT_NAMES = """text_embed_dim joint_attention_dim text_dim caption_channels cap_feat_dim cross_attention_input_dim
encoder_hid_dim context_in_dim in_text_dim dit_text_dim text_in_dim cond_token_dim text_hidden_dim source_dim
llm_features_dim condition_dim text_encoder_dim""".split()
_OTHER_WIDTHS = """pooled_projection_dim in_text_dim2 cross_attention_dim_t5 text_embed_dim_t5 text_embed_2_dim
time_embed_dim time_dim freq_dim image_embed_dim global_cond_dim global_states_input_dim text_emb_dim adaln_dim
adaln_lora_dim time_embedding_dim timestep_channels time_step_dim pair_repr_dim dim_cond
time_embed_hidden_dim""".split()

# How a value of the signature is made small; ``None`` in the signature means "not used" and is left alone.
SMALL: dict[str, Any] = {
    **dict.fromkeys(_LAYERS, 1),
    **dict.fromkeys(_HEADS, HEADS),
    **dict.fromkeys(_KEY_HEADS, HEADS // 2),
    **dict.fromkeys(_HEAD_DIMS, HEAD_DIM),
    **dict.fromkeys(_WIDTHS, WIDTH),
    **dict.fromkeys(_INNER, 2 * WIDTH),
    **dict.fromkeys(TEXT_NAMES, TEXT_WIDTH),
    **dict.fromkeys(_OTHER_WIDTHS, TEXT_WIDTH),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "num_res_blocks": 1,
    "base_dim": 16,
    "vocab_size": 97,
    "ch": 32,
    "channels": 32,
    "groups": 8,
}
AXES = ("axes_dims_rope", "axes_dims", "rope_axes_dim", "axes_dim_rope", "rope_dim_list", "rope_dim")
AXES_BY_COUNT = {2: (8, 8), 3: (4, 6, 6), 4: (4, 4, 4, 4)}

Build = Callable[[str], nn.Module]
_MOTION_BLOCKS = {"block_out_channels": (32,) * 4, "norm_num_groups": 8}


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 7, shape, generator=torch.Generator().manual_seed(7))


def grid(height: int = 8, width: int = 12, axes: int = 3, before: int = 0) -> torch.Tensor:
    """Positions of tokens: first those of a text, then those of an image."""
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    image = torch.stack([torch.zeros_like(rows)] * (axes - 2) + [rows, columns], dim=1)
    return torch.cat([torch.zeros(before, axes, dtype=image.dtype), image])


def several(
    name: str, kind: str, first: tuple[int, ...], condition: tuple[int, ...], **inputs: object
) -> Recipe:
    """A class that holds a list of others."""

    def make(build: Build) -> nn.Module:
        import diffusers.models as models

        return getattr(models, name)([build(kind)])

    given = {
        "controlnet_cond": [floats(*condition)],
        "conditioning_scale": [1.0],
        "return_dict": False,
        **inputs,
    }
    return Recipe(build=make, first=first, inputs=given)


def _z_image_control(build: Build) -> nn.Module:
    from diffusers.models import ZImageControlNetModel

    control = ZImageControlNetModel(
        control_layers_places=[0], control_refiner_layers_places=[0], control_in_dim=16, dim=WIDTH,
        n_refiner_layers=1, n_heads=HEADS, n_kv_heads=HEADS, add_control_noise_refiner="control_noise_refiner",
    )  # fmt: skip
    return ZImageControlNetModel.from_transformer(control, build("ZImageTransformer2DModel"))


_HUNYUAN = {
    "encoder_hidden_states": floats(1, TEXT_LEN, WIDTH),
    "encoder_hidden_states_t5": floats(1, TEXT_LEN, TEXT_WIDTH),
    "text_embedding_mask": torch.arange(TEXT_LEN)[None] < 15,
    "text_embedding_mask_t5": torch.arange(TEXT_LEN)[None] < 16,
    "image_meta_size": floats(1, 6),
    "style": ids(1) * 0,
    "image_rotary_emb": (floats(64, 16), floats(64, 16)),
}

# fmt: off
RECIPES: dict[str, Recipe] = {
    "AceStepTransformer1DModel": Recipe(
        config={"num_hidden_layers": 2, "in_channels": 48, "audio_acoustic_hidden_dim": 16, "sliding_window": 16},
        first=(1, TOKENS, 16),
        inputs={"context_latents": floats(1, TOKENS, 32), "encoder_hidden_states": floats(1, TEXT_LEN, WIDTH)},
    ),
    "AnimaTextConditioner": Recipe(
        config={"target_dim": WIDTH, "min_sequence_length": 16},
        first=(1, TOKENS, TEXT_WIDTH),
        inputs={"target_input_ids": ids(1, 37)},
    ),
    "AnyFlowFARTransformer3DModel": Recipe(first=(1, 5, 16, 16, 24), inputs={"chunk_partition": [1, 2, 2], "timestep": torch.full((1, 5), 500.0), "r_timestep": torch.full((1, 5), 400.0)}),
    "AnyFlowTransformer3DModel": Recipe(first=(1, 5, 16, 16, 24), inputs={"timestep": torch.full((1, 5), 500.0), "r_timestep": torch.full((1, 5), 400.0)}),
    "AutoencoderKLHunyuanImage": Recipe(
        config={
            "in_channels": 3, "out_channels": 3, "latent_channels": 8, "block_out_channels": (32, 32, 32),
            "layers_per_block": 1, "spatial_compression_ratio": 4, "sample_size": 64,
        },
    ),
    "AutoencoderKLHunyuanImageRefiner": Recipe(
        config={"latent_channels": 8, "block_out_channels": (16, 16, 32), "spatial_compression_ratio": 4,
                "temporal_compression_ratio": 2},
        first=(1, 3, 5, 32, 48),
    ),
    "AutoencoderKLHunyuanVideo15": Recipe(
        config={"latent_channels": 8, "block_out_channels": (16, 16, 32), "spatial_compression_ratio": 4,
                "temporal_compression_ratio": 2},
        first=(1, 3, 5, 32, 48),
    ),
    "AutoencoderKLKVAEAudio": Recipe(
        config={"encoder_dim": 8, "encoder_rates": [2, 4], "decoder_rates": [4, 2], "latent_dim": 32,
                "codebook_dim": 8, "decoder_dim": 32},
        first=(1, 1, 1024),
    ),
    "AutoencoderKLMiniMaxH3": Recipe(config={"clip_length": 17, "token_drop": 1}, first=(1, 3, 33, 64, 96)),
    "AutoencoderKLMiniMaxH3Audio": Recipe(
        config={"encoder_dim": 8, "encoder_rates": (2, 4), "latent_dim": 32, "latent_channels": 8, "decoder_dim": 32,
                "decoder_rates": (4, 2), "decoder_kernel_sizes": (8, 4)},
        first=(1, 1, 1024),
    ),
    "AutoencoderKLMochi": Recipe(
        config={"in_channels": 3 * 5, "layers_per_block": (1,) * 5}, first=(1, 3, 7, 32, 48),
    ),
    "AutoencoderKLQwenImage21": Recipe(first=(1, 4, 1, 64, 96)),
    "AutoencoderSAME": Recipe(
        config={"patch_size": 16, "encoder_channels": 32, "encoder_c_mults": (2,), "encoder_strides": (2,),
                "encoder_transformer_depths": (1,), "latent_dim": 16, "encoder_sinusoidal_blocks": (0,),
                "decoder_sinusoidal_blocks": (0,)},
        first=(1, 2, 2048),
    ),
    "BriaFibo2Transformer2DModel": Recipe(
        config={"injection_layer_ids": (0,), "min_num_gist_tokens": 8, "max_num_gist_tokens": 16, "gist_step": 4,
                "gist_min_text_len": 8, "gist_max_text_len": 64},
        inputs={"encoder_hidden_states": floats(1, 2, TEXT_LEN, TEXT_WIDTH)}, without=("encoder_attention_mask",),
    ),
    "BriaFiboTransformer2DModel": Recipe(
        config={"text_encoder_dim": WIDTH // 2},
        first=(1, TOKENS, 64),
        inputs={"text_encoder_layers": [floats(1, TEXT_LEN, WIDTH // 2)] * 2},
    ),
    "CogVideoXTransformer3DModel": Recipe(
        config={"max_text_seq_length": TEXT_LEN}, first=(1, 5, 16, 16, 24),
    ),
    "ConsisIDTransformer3DModel": Recipe(
        config={"max_text_seq_length": TEXT_LEN}, first=(1, 5, 16, 16, 24),
    ),
    "ConsistencyDecoderVAE": Recipe(config={"encoder_layers_per_block": 1, "decoder_layers_per_block": 1},
                                     first=(1, 3, 64, 96)),
    "ControlNetUnionModel": Recipe(
        config={"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80, "num_control_type": 6,
                "num_trans_channel": 32, "num_trans_head": HEADS, "num_proj_channel": 32, "attention_head_dim": 8},
        inputs={"controlnet_cond": [floats(1, 3, 128, 192)], "control_type": torch.tensor([[1.0, 0, 0, 0, 0, 0]]),
                "control_type_idx": [0],
                "added_cond_kwargs": {"text_embeds": floats(1, 32), "time_ids": floats(1, 6)}},
    ),
    "CosmosTransformer3DModel": Recipe(
        config={"max_size": (8, 32, 32), "concat_padding_mask": False, "attention_head_dim": 18},
        first=(1, 16, 5, 16, 24),
    ),
    "CosmosControlNetModel": Recipe(),
    "DiTTransformer2DModel": Recipe(config={"sample_size": 16}, first=(1, 4, 16, 16)),
    "DreamLiteTransformer2DModel": Recipe(config={"in_channels": 32, "cross_attention_dim": WIDTH},
                                           inputs={"encoder_hidden_states": floats(1, TEXT_LEN, WIDTH)}),
    "DualTransformer2DModel": Recipe(
        config={"in_channels": 32, "cross_attention_dim": WIDTH}, first=(1, 32, 16, 24),
        inputs={"encoder_hidden_states": floats(1, 77 + 257, WIDTH)},
    ),
    "EasyAnimateTransformer3DModel": Recipe(
        config={"in_channels": 16, "out_channels": 16, "patch_size": 2}, first=(1, 16, 5, 16, 24),
    ),
    "ErnieImageTransformer2DModel": Recipe(
        inputs={"text_bth": floats(1, TEXT_LEN, TEXT_WIDTH), "text_lens": torch.tensor([TEXT_LEN])},
    ),
    "FluxMultiControlNetModel": several("FluxMultiControlNetModel", "FluxControlNetModel", (1, 96, 64), (1, 96, 64), controlnet_mode=[torch.zeros(1, dtype=torch.long)], encoder_hidden_states=floats(1, TEXT_LEN, TEXT_WIDTH), pooled_projections=floats(1, TEXT_WIDTH), img_ids=grid(), txt_ids=grid(0, 0, before=TEXT_LEN)),
    "GlmImageTransformer2DModel": Recipe(
        inputs={"prior_token_id": ids(1, 96), "prior_token_drop": torch.tensor([False])},
    ),
    "HiDreamImageTransformer2DModel": Recipe(
        config={"patch_size": 2, "in_channels": 4, "caption_channels": (32, 32), "llama_layers": (0, 1),
                "axes_dims_rope": (8, 4, 4), "max_resolution": (16, 24)},
        first=(1, 4, 16, 24),
        inputs={"encoder_hidden_states_llama3": floats(2, 1, TEXT_LEN, 32),
                "encoder_hidden_states_t5": floats(1, TEXT_LEN, 32), "pooled_embeds": floats(1, TEXT_WIDTH)},
    ),
    "HunyuanDiT2DModel": Recipe(
        config={"in_channels": 4, "patch_size": 2, "sample_size": 16, "text_len": TEXT_LEN, "text_len_t5": TEXT_LEN,
                "num_layers": 2, "pooled_projection_dim": TEXT_WIDTH},
        first=(1, 4, 16, 16),
        inputs={"encoder_hidden_states": floats(1, TEXT_LEN, WIDTH), "image_meta_size": floats(1, 6), "style": ids(1) * 0,
                "image_rotary_emb": (floats(64, 16), floats(64, 16))},
    ),
    "HunyuanImageTransformer2DModel": Recipe(config={"text_embed_2_dim": TEXT_WIDTH, "rope_axes_dim": (8, 8)}),
    "HunyuanVideo15Transformer3DModel": Recipe(
        config={"text_embed_2_dim": TEXT_WIDTH, "image_embed_dim": TEXT_WIDTH},
        inputs={"image_embeds": floats(1, 9, TEXT_WIDTH)},
    ),
    "HunyuanVideoFramepackTransformer3DModel": Recipe(
        config={"has_clean_x_embedder": True, "has_image_proj": True, "image_proj_dim": TEXT_WIDTH},
        first=(1, 16, 5, 16, 24),
        inputs={"image_embeds": floats(1, 7, TEXT_WIDTH), "indices_latents": torch.arange(5),
                "latents_clean": floats(1, 16, 1, 16, 24), "indices_latents_clean": torch.arange(1),
                "latents_history_2x": floats(1, 16, 2, 16, 24), "indices_latents_history_2x": torch.arange(2),
                "latents_history_4x": floats(1, 16, 4, 16, 24), "indices_latents_history_4x": torch.arange(4)},
    ),
    "I2VGenXLUNet": Recipe(
        first=(1, 4, 3, 16, 24),
        inputs={"image_latents": floats(1, 4, 3, 16, 24), "image_embeddings": floats(1, WIDTH)},
    ),
    "Ideogram4Transformer2DModel": Recipe(
        config={"mrope_section": (3, 3, 2)},
        inputs={"encoder_hidden_states": floats(1, TOKENS, TEXT_WIDTH), "position_ids": grid()[None],
                "segment_ids": (torch.arange(TOKENS) // 60)[None], "indicator": torch.full((1, TOKENS), 3)},
    ),
    "JoyImageEditPlusTransformer3DModel": Recipe(
        first=(1, TOKENS, 16, 1, 2, 2), inputs={"shape_list": [[(1, 8, 12)]]},
    ),
    "Kandinsky3UNet": Recipe(config={"groups": 8, "attention_head_dim": 8, "cross_attention_dim": WIDTH, "block_out_channels": (16, 32, 64, 128), "time_embedding_dim": 64,
                                     "layers_per_block": 3}),
    "Kandinsky5Transformer3DModel": Recipe(
        first=(1, 5, 16, 24, 4),
        inputs={"visual_rope_pos": [torch.arange(5), torch.arange(8), torch.arange(12)],
                "text_rope_pos": torch.arange(TEXT_LEN)},
    ),
    "Kandinsky6SRTransformer3DModel": Recipe(config={"out_visual_dim": 64}, first=(1, 2, 16, 24, 129)),
    "Krea2Transformer2DModel": Recipe(
        config={"num_text_layers": 2},
        inputs={"encoder_hidden_states": floats(1, TEXT_LEN, 2, TEXT_WIDTH), "position_ids": grid(before=TEXT_LEN)},
    ),
    "LuminaNextDiT2DModel": Recipe(
        config={"num_kv_heads": 2, "num_layers": 2, "cross_attention_dim": TEXT_WIDTH},
        inputs={"encoder_hidden_states": floats(1, TEXT_LEN, TEXT_WIDTH), "cross_attention_kwargs": {},
                "image_rotary_emb": torch.polar(torch.ones(384, 384, 8), floats(384, 384, 8))},
    ),
    "MMAudioVAE": Recipe(config={"mel_bins": 16, "latent_channels": 8, "hidden_channels": 32}, first=(1, 48000)),
    "MiniMaxH3Transformer3DModel": Recipe(
        first=(1, 96, 96),
        config={"text_dim": 32, "rope_freq_dim": 2},
        inputs={"audio_hidden_states": floats(1, 11, 32), "timestep": torch.tensor([0.5]),
                "timestep_indices": torch.zeros(126, dtype=torch.long),
                "token_tags": torch.tensor([1] * TEXT_LEN + [0] * 96 + [2] * 11),
                "position_ids": torch.cat([grid(before=TEXT_LEN), torch.zeros(11, 3, dtype=torch.long)]).float(),
                "video_indices": torch.arange(TEXT_LEN, TEXT_LEN + 96),
                "audio_indices": torch.arange(TEXT_LEN + 96, 126),
                "text_indices": torch.arange(TEXT_LEN)},
    ),
    "MiniMaxMusic3RVQDepthDecoder": Recipe(config={"max_position_embeddings": 64}, first=(1, 8, WIDTH)),
    "MiniMaxMusic3Transformer1DModel": Recipe(
        config={"rotary_dim": 8}, first=(1, 128, TOKENS), inputs={"encoder_hidden_states": floats(1, TOKENS, 32)},
    ),
    "MultiControlNetModel": several("MultiControlNetModel", "ControlNetModel", (1, 4, 16, 24), (1, 3, 128, 192), encoder_hidden_states=floats(1, TEXT_LEN, WIDTH)),
    "OmniGenTransformer2DModel": Recipe(
        config={"pad_token_id": 0, "vocab_size": 97, "num_key_value_heads": HEADS,
                "rope_scaling": {"type": "su", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}},
        inputs={"input_ids": ids(1, 16), "input_img_latents": [], "input_image_sizes": {},
                "attention_mask": torch.ones(1, 16 + 1 + 96, 16 + 1 + 96), "position_ids": torch.arange(16 + 1 + 96)[None]},
    ),
    "PRXTransformer2DModel": Recipe(config={"axes_dim": [8, 8]}),
    "PixArtTransformer2DModel": Recipe(config={"sample_size": 16}, first=(1, 4, 16, 16)),
    "PriorTransformer": Recipe(
        config={"embedding_dim": TEXT_WIDTH, "num_embeddings": 77},
        first=(1, TEXT_WIDTH),
        inputs={"proj_embedding": floats(1, TEXT_WIDTH), "encoder_hidden_states": floats(1, 77, TEXT_WIDTH)},
    ),
    "QwenImage21Transformer2DModel": Recipe(
        first=(1, TOKENS, 64), without=("encoder_hidden_states_mask",),
        inputs={"img_mask": torch.arange(TEXT_LEN + TOKENS // 4)[None] >= TEXT_LEN},
    ),
    "QwenImageMultiControlNetModel": several("QwenImageMultiControlNetModel", "QwenImageControlNetModel", (1, 96, 64), (1, 96, 64)),
    "SD3MultiControlNetModel": several("SD3MultiControlNetModel", "SD3ControlNetModel", (1, 16, 16, 24), (1, 16, 16, 24), pooled_projections=floats(1, TEXT_WIDTH)),
    "SanaWMTransformer3DModel": Recipe(
        first=(1, 128, 5, 16, 24), without=("encoder_attention_mask",),
        inputs={"encoder_hidden_states": floats(1, 1, TEXT_LEN, TEXT_WIDTH), "mask": torch.ones(1, TEXT_LEN),
                "timestep": torch.full((1, 1, 5), 500.0)},
    ),
    "SparseControlNetModel": Recipe(
        first=(1, 4, 3, 16, 24),
        inputs={"controlnet_cond": floats(1, 4, 3, 16, 24), "conditioning_mask": torch.ones(1, 1, 3, 16, 24),
                "encoder_hidden_states": floats(3, TEXT_LEN, WIDTH)},
    ),
    "StableAudio3DiTModel": Recipe(
        config={"io_channels": 16, "local_add_cond_dim": 17, "num_memory_tokens": 4},
        first=(1, 16, TOKENS),
        inputs={"global_hidden_states": floats(1, TEXT_WIDTH), "timestep": torch.tensor([0.5])},
    ),
    "StableAudioDiTModel": Recipe(
        config={"cross_attention_dim": WIDTH, "time_proj_dim": 32}, first=(1, 64, TOKENS),
        inputs={"global_hidden_states": floats(1, 1, TEXT_WIDTH), "rotary_embedding": (floats(TOKENS + 1, 8), floats(TOKENS + 1, 8))},
    ),
    "StableCascadeUNet": Recipe(
        config={"block_out_channels": (32, 32), "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1),
                "conditioning_dim": WIDTH, "clip_text_pooled_in_channels": TEXT_WIDTH, "num_attention_heads": (4, 4)},
        inputs={"timestep_ratio": torch.tensor([0.5]), "clip_text_pooled": floats(1, 1, TEXT_WIDTH)},
    ),
    "T5FilmDecoder": Recipe(
        config={"input_dims": 32, "targets_length": 48},
        inputs={"encodings_and_masks": [(floats(1, TEXT_LEN, WIDTH), torch.ones(1, TEXT_LEN))],
                "decoder_input_tokens": floats(1, 48, 32), "decoder_noise_time": torch.tensor([0.5])},
    ),
    "Transformer2DModel": Recipe(config={"in_channels": 32, "cross_attention_dim": WIDTH},
                                  inputs={"encoder_hidden_states": floats(1, TEXT_LEN, WIDTH)}),
    "TransformerTemporalModel": Recipe(config={"in_channels": 32}, first=(5, 32, 16, 24), inputs={"num_frames": 5}, without=("encoder_hidden_states",)),
    "UNet1DModel": Recipe(first=(1, 2, 512), config={"extra_in_channels": 16, "block_out_channels": (8, 32, 32)}),
    "UNetControlNetXSModel": Recipe(first=(1, 4, 16, 24), inputs={"controlnet_cond": floats(1, 3, 128, 192)}),
    "UNetMotionModel": Recipe(first=(1, 4, 3, 16, 24), inputs={"encoder_hidden_states": floats(3, TEXT_LEN, WIDTH)}),
    "UNetSpatioTemporalConditionModel": Recipe(
        config={"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24},
        first=(1, 3, 8, 16, 24), inputs={"added_time_ids": floats(1, 3)},
    ),
    "UVit2DModel": Recipe(
        config={"cond_embed_dim": 32, "micro_cond_embed_dim": 5 * 16, "micro_cond_encode_dim": 16, "vocab_size": 97,
                "codebook_size": 90, "in_channels": 32, "block_out_channels": 32, "block_num_heads": 4},
        inputs={"input_ids": ids(1, 12, 12), "encoder_hidden_states": floats(1, TEXT_LEN, WIDTH),
                "pooled_text_emb": floats(1, 32), "micro_conds": floats(1, 5)},
    ),
    "WanAnimateTransformer3DModel": Recipe(
        config={"image_dim": TEXT_WIDTH, "added_kv_proj_dim": WIDTH, "motion_encoder_size": 16,
                "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16}, "motion_style_dim": 16, "motion_dim": 4,
                "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16, "inject_face_latents_blocks": 1},
        first=(1, 36, 5, 16, 24),
        inputs={"pose_hidden_states": floats(1, 16, 4, 16, 24), "face_pixel_values": floats(1, 3, 13, 16, 16),
                "encoder_hidden_states_image": floats(1, 7, TEXT_WIDTH)},
    ),
    "WanVACETransformer3DModel": Recipe(
        config={"vace_layers": [0]}, first=(1, 16, 5, 16, 24),
        inputs={"control_hidden_states": floats(1, 96, 5, 16, 24)},
    ),
    "ZImageTransformer2DModel": Recipe(
        config={"axes_dims": [4, 6, 6]},
        inputs={"x": [floats(16, 1, 16, 24)], "cap_feats": [floats(TEXT_LEN, TEXT_WIDTH)]},
    ),
    "MultiControlNetUnionModel": several(
        "MultiControlNetUnionModel", "ControlNetUnionModel", (1, 4, 16, 24), (1, 3, 128, 192),
        controlnet_cond=[[floats(1, 3, 128, 192)]], control_type=[torch.tensor([[1.0, 0, 0, 0, 0, 0]])],
        control_type_idx=[[0]], encoder_hidden_states=floats(1, TEXT_LEN, WIDTH),
        added_cond_kwargs={"text_embeds": floats(1, 32), "time_ids": floats(1, 6)},
    ),
    "Kandinsky6Transformer3DModel": Recipe(config={"visual_cond": False}, first=(1, 5, 16, 24, 16), without=("encoder_attention_mask",)),
    "HunyuanDiT2DControlNetModel": Recipe(
        config={"in_channels": 4, "patch_size": 2, "sample_size": 16, "text_len": TEXT_LEN, "text_len_t5": TEXT_LEN,
                "transformer_num_layers": 4, "pooled_projection_dim": TEXT_WIDTH},
        first=(1, 4, 16, 16),
        inputs={**_HUNYUAN, "controlnet_cond": floats(1, 4, 16, 16)},
    ),
    "HunyuanDiT2DMultiControlNetModel": several(
        "HunyuanDiT2DMultiControlNetModel", "HunyuanDiT2DControlNetModel", (1, 4, 16, 16), (1, 4, 16, 16), **_HUNYUAN
    ),
    "ImageProjection": Recipe(first=(1, TEXT_WIDTH)),
    "LTX2VideoTransformer3DModel": Recipe(
        first=(1, TOKENS, 128),
        config={"audio_in_channels": 32, "audio_out_channels": 32, "audio_attention_head_dim": 8,
                "audio_cross_attention_dim": 32},
        inputs={"audio_hidden_states": floats(1, 11, 32), "audio_encoder_hidden_states": floats(1, TEXT_LEN, TEXT_WIDTH),
                "audio_num_frames": 11, "timestep": torch.full((1,), 500.0)},
    ),
    "AutoencoderKLLTX2Video": Recipe(first=(1, 3, 9, 64, 96), config={"block_out_channels": (16, 32, 64, 128), "decoder_block_out_channels": (16, 32, 64)}),
    "ZImageControlNetModel": Recipe(
        build=_z_image_control,
        inputs={"x": [floats(16, 1, 16, 24)], "t": torch.tensor([0.5]), "cap_feats": [floats(TEXT_LEN, TEXT_WIDTH)],
                "control_context": [floats(16, 1, 16, 24)]},
    ),
    "LTX2VideoDiffusionDecoderModel": Recipe(
        config={"latent_channels": 8, "decoder_stage_channels": (128, 64, 32, 32, 16), "decoder_head_dim": 16,
                "decoder_stage_depths": (1,) * 5, "decoder_stage_kernels": ((3, 3, 3),) * 4,
                "decoder_stage5_kernel": (3, 3, 3), "decoder_t_emb_dim": 16},
        first=(1, 8, 2, 3, 3),
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Recipe(
        first=(1, TOKENS, 128), inputs={"video_rotary_emb": (floats(1, TOKENS, WIDTH), floats(1, TOKENS, WIDTH))},
    ),
}
# fmt: on


def recipe_of(name: str) -> Recipe:
    """What cannot be derived for a class; nothing for most."""
    return RECIPES.get(name, Recipe())
