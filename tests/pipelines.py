"""Small pipelines of diffusers, of real classes with random weights; nothing is fetched."""

import functools

import diffusers
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = ["a", "red", "cube", "on", "the", "blue", "table", "under", "green", "lamp", "bad", "photo"]
PROMPT = "a red cube on the blue table under a green lamp"
NEGATIVE = "a bad photo"
# Longer than the 32 rows that torch's fused kernel takes at once, so that it is cut.
TEXT_TOKENS = 72


def tokenizer(start=True):
    """One token per word; CLIP's has a start token, T5's has none."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "<s>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    single = "<s> $A </s>" if start else "$A </s>"
    inner.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 3), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>",
        model_max_length=TEXT_TOKENS,
    )  # fmt: skip


def clip(projection=False):
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=TEXT_TOKENS, projection_dim=32, bos_token_id=3, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5():
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return T5EncoderModel(config)


def umt5():
    config = UMT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return UMT5EncoderModel(config)


def vae(latents=4, **more):
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=latents, sample_size=32, **more,
    )  # fmt: skip


def unet(**more):
    values = {
        "block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 32, "in_channels": 4, "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32, "attention_head_dim": 8, "norm_num_groups": 32,
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**{**values, **more})


def ddim():
    return diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


def safety_checker():
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=4,
        projection_dim=32,
    )  # fmt: skip
    text = CLIPTextConfig(hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4)
    return StableDiffusionSafetyChecker(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=32)
    )


def stable_diffusion(kind="StableDiffusionPipeline", checked=True):
    features = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return getattr(diffusers, kind)(
        vae=vae(), text_encoder=clip(), tokenizer=tokenizer(), unet=unet(), scheduler=ddim(),
        safety_checker=safety_checker() if checked else None, feature_extractor=features if checked else None,
        requires_safety_checker=checked,
    )  # fmt: skip


def sdxl():
    more = {
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "transformer_layers_per_block": (1, 2), "projection_class_embeddings_input_dim": 6 * 8 + 32, "cross_attention_dim": 64,
        "attention_head_dim": (2, 4),
    }  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(), text_encoder=clip(), text_encoder_2=clip(True), tokenizer=tokenizer(), tokenizer_2=tokenizer(),
        unet=unet(**more), scheduler=diffusers.EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip


def sd3():
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=64, pooled_projection_dim=64,
        pos_embed_max_size=64, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(True), tokenizer=tokenizer(), text_encoder_2=clip(True), tokenizer_2=tokenizer(),
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def flux():
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae(shift_factor=0.06), text_encoder=clip(),
        tokenizer=tokenizer(), text_encoder_2=t5(), tokenizer_2=tokenizer(False), transformer=transformer,
    )  # fmt: skip


def pixart():
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=32, sample_size=16, patch_size=2, caption_channels=32, norm_type="ada_norm_single",
        use_additional_conditions=False,
    )  # fmt: skip
    return diffusers.PixArtAlphaPipeline(
        tokenizer=tokenizer(False), text_encoder=t5(), vae=vae(), transformer=transformer, scheduler=ddim()
    )


def wan():
    autoencoder = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip
    return diffusers.WanPipeline(
        tokenizer=tokenizer(False), text_encoder=umt5(), vae=autoencoder, transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip


def ltx():
    autoencoder = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
        num_layers=1, caption_channels=32,
    )  # fmt: skip
    return diffusers.LTXPipeline(
        tokenizer=tokenizer(False), text_encoder=t5(), vae=autoencoder, transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def image():
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


SIZE = {"height": 32, "width": 32}
GUIDED = {"negative_prompt": NEGATIVE, "guidance_scale": 6.0, "num_inference_steps": 2}
# Name: how it is built, and what it is called with.
CASES = {
    "sd15": (stable_diffusion, {**SIZE, **GUIDED}),
    "img2img": (
        functools.partial(stable_diffusion, "StableDiffusionImg2ImgPipeline", False),
        {**GUIDED, "image": image(), "strength": 0.9, "num_inference_steps": 3},
    ),
    "sdxl": (sdxl, {**SIZE, **GUIDED}),
    "sd3": (sd3, {**SIZE, **GUIDED}),
    "flux": (flux, {**SIZE, "num_inference_steps": 2, "max_sequence_length": 40}),
    "pixart": (
        pixart,
        {
            **SIZE,
            **GUIDED,
            "use_resolution_binning": False,
            "clean_caption": False,
            "max_sequence_length": 40,
        },
    ),
    "wan": (wan, {**GUIDED, "height": 32, "width": 48, "num_frames": 9, "max_sequence_length": 40}),
    "ltx": (ltx, {**SIZE, **GUIDED, "num_frames": 9, "max_sequence_length": 40}),
}


# More of them, for tests of one thing: added by those.
MORE = {}


def build(name, text="eager"):
    """A pipeline, the same at every call.

    Args:
        name: Of ``CASES`` or ``MORE``.
        text: Attention of the text encoders. SDPA with ``is_causal``, as CLIP calls it, agrees to rounding only when it
            is forced by rows.
    """
    torch.manual_seed(0)
    pipe = {**CASES, **MORE}[name][0]()
    for name, part in modules(pipe).items():
        part.eval()
        if name.startswith("text_encoder") and hasattr(part, "set_attn_implementation"):  # transformers 4.49
            part.set_attn_implementation(text)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def modules(pipe):
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def run(pipe, name, **more):
    """The images (frames) as numpy, always of the same seed."""
    options = {**{**CASES, **MORE}[name][1], **more}
    made = pipe(PROMPT, generator=torch.Generator().manual_seed(0), output_type="np", **options)
    return np.asarray(made[0])
