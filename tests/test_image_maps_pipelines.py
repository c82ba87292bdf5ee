"""Pipelines whose denoiser gets more, or other rows, than one image and its text: beside float64 from query and key."""

import contextlib

import diffusers
import pipelines
import pytest
import torch
from diffusers.models import StableCascadeUNet
from pipelines import NEGATIVE, PROMPT
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import attnpatch

WORDS = PROMPT.split()


@contextlib.contextmanager
def watched(denoiser):
    """For each call of a denoiser: by site, the mean over heads of its probabilities ``[batch, queries, keys]``."""
    calls, handles = [], [denoiser.register_forward_pre_hook(lambda *_: calls.append({}))]
    given = {}

    def keep(name, side):
        return lambda _, args, result: given.__setitem__((name, side), result.detach().double())

    def reduce(name):
        def hook(module, args, result):
            query, key = (
                given[name, side].unflatten(-1, (module.heads, -1)).transpose(1, 2) for side in "qk"
            )
            calls[-1][name] = (query @ key.mT * module.scale).softmax(-1).mean(1)

        return hook

    for name, module in denoiser.named_modules():
        if hasattr(module, "to_q"):
            handles.append(module.to_q.register_forward_hook(keep(name, "q")))
            handles.append(module.to_k.register_forward_hook(keep(name, "k")))
            handles.append(module.register_forward_hook(reduce(name)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def run(pipe, part, **call):
    """The maps, and for each site the mean over the calls of the unpatched pipeline, if they have one batch size."""
    pipe.set_progress_bar_config(disable=True)
    for module in pipelines.modules(pipe).values():
        module.eval()
    with watched(getattr(pipe, part)) as calls:
        pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=2, **call)
    with attnpatch.capture(pipe) as maps:
        pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=2, **call)
    found = {name: [call[name] for call in calls] for name in calls[0]}
    alike = {name: each for name, each in found.items() if len({one.shape for one in each}) == 1}
    return maps, {f"{part}.{name}": sum(each) / len(each) for name, each in alike.items()}


def stable_diffusion(kind, **more):
    torch.manual_seed(0)
    parts = pipelines.stable_diffusion(checked=False).components
    del parts["image_encoder"]
    return getattr(diffusers, kind)(**{**parts, **more}, requires_safety_checker=False)


def test_an_adapter():
    unet = pipelines.unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    adapter = diffusers.T2IAdapter(3, channels=[32, 64], num_res_blocks=1, downscale_factor=2)
    pipe = stable_diffusion("StableDiffusionAdapterPipeline", unet=unet, adapter=adapter)
    maps, exact = run(
        pipe, "unet", prompt=PROMPT, negative_prompt=NEGATIVE, image=pipelines.image(), output_type="latent",
        **pipelines.SIZE,
    )  # fmt: skip
    assert not maps.left_out
    for kind, place in (("cross", slice(1, 12)), ("self", slice(None))):
        for number, site in enumerate(maps[kind].layers):
            if len(exact[site][1]) == 256:  # the middle sees the image at another resolution
                assert (maps[kind].mass[0, number] - exact[site][1][:, place]).abs().max() < 1e-6


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_views_of_a_panorama(at_once):
    """They are parts of one image, whether they come one by one or as a batch."""
    levels = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
    unet = pipelines.unet(
        block_out_channels=(32,) * 4,
        down_block_types=("DownBlock2D",) * 3 + levels[:1],
        up_block_types=levels[1:] + ("UpBlock2D",) * 3,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, sample_size=32,
    )  # fmt: skip
    pipe = stable_diffusion("StableDiffusionPanoramaPipeline", unet=unet, vae=vae)
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "height": 512, "output_type": "latent"}
    maps, _ = run(pipe, "unet", **call, width=640, view_batch_size=at_once)
    reasons = {why for name, why in maps.left_out.items() if name.startswith("images of text")}
    wanted = "pipeline returned 1" if at_once == 3 else "each time with other latents"
    assert reasons and all(wanted in why and "in one piece" in why for why in reasons)
    with pytest.raises(attnpatch.errors.CaptureError, match="parts of"):
        _ = maps["cross"]
    if at_once == 3:
        maps, exact = run(pipe, "unet", **call, width=512, view_batch_size=at_once)  # one view
        assert not maps.left_out
        site = maps["cross"].layers[0]
        assert (maps.map(site, own_grid=True).mass[0, 0] - exact[site][1][:, 1:12]).abs().max() < 1e-6


@pytest.mark.parametrize("copies", [1, 2])
def test_several_images_of_one_text(copies):
    """As many as the pipeline returns are images."""
    pipe = stable_diffusion("StableDiffusionPipeline")
    maps, _ = run(
        pipe, "unet", prompt=PROMPT, num_images_per_prompt=copies, output_type="latent", **pipelines.SIZE
    )
    assert not maps.left_out
    assert [
        each["image"] for each in maps["cross"].metadata["sequences"] if each["role"] == "prompt"
    ] == list(range(copies))


# --------------------------------------------------------------------------------------------------- Stable Cascade


def cascade(kind, **more):
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=pipelines.TEXT_TOKENS, projection_dim=32, bos_token_id=3, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return kind(
        tokenizer=pipelines.tokenizer(), text_encoder=CLIPTextModelWithProjection(config),
        scheduler=diffusers.DDPMWuerstchenScheduler(), **more,
    )  # fmt: skip


def unet(blocks, **more):
    return StableCascadeUNet(
        conditioning_dim=32, block_out_channels=(32, 64), num_attention_heads=(4, 4), down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1), down_blocks_repeat_mappers=(1, 1), up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=blocks, clip_text_pooled_in_channels=32, clip_seq=4, timestep_ratio_embedding_dim=16,
        dropout=(0.1, 0.1), kernel_size=3, self_attn=True, **more,
    )  # fmt: skip


PLAIN = ("SDCascadeResBlock", "SDCascadeTimestepBlock")
ATTENDING = (*PLAIN, "SDCascadeAttnBlock")


def test_words_of_the_prior():
    """Keys are the image, then the text, of which the first token begins it, then four vectors of the text."""
    prior = unet(
        (ATTENDING, ATTENDING), in_channels=16, out_channels=16, clip_text_in_channels=32, clip_image_in_channels=32,
        patch_size=1, switch_level=(False,),
    )  # fmt: skip
    pipe = cascade(
        diffusers.StableCascadePriorPipeline, prior=prior, feature_extractor=None, image_encoder=None
    )
    maps, exact = run(pipe, "prior", prompt=PROMPT, negative_prompt=NEGATIVE, height=384, width=512)
    one = maps["image to text+image"]
    assert [each["role"] for each in one.metadata["sequences"]] == ["prompt", "negative"]
    for number, site in enumerate(one.layers):
        for row, text in enumerate((WORDS, NEGATIVE.split())):
            keys, image = exact[site][row], len(exact[site][row])
            words = slice(image + 1, image + 1 + len(text))
            assert (one.mass[row, number, :, : len(text)] - keys[:, words]).abs().max() < 1e-6
        assert (one.mass[0, number, :, len(WORDS) :] - exact[site][0][:, :image]).abs().max() < 1e-6


def test_guidance_of_the_decoder():
    """Both rows have the same latents and no tokens of text: a vector tells their texts apart."""
    quantizer = diffusers.StableCascadeDecoderPipeline.__init__.__annotations__["vqgan"]
    decoder = unet(
        (PLAIN, ATTENDING),
        in_channels=4,
        out_channels=4,
        effnet_in_channels=8,
        patch_size=2,
        switch_level=None,
    )
    pipe = cascade(
        diffusers.StableCascadeDecoderPipeline, decoder=decoder, latent_dim_scale=10.67,
        vqgan=quantizer(bottleneck_blocks=1, num_vq_embeddings=2),
    )  # fmt: skip
    embeddings = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(3))
    maps, exact = run(
        pipe, "decoder", image_embeddings=embeddings, prompt=PROMPT, negative_prompt=NEGATIVE, guidance_scale=2.0,
        output_type="latent",
    )  # fmt: skip
    assert not any("again" in why for why in maps.left_out.values())
    found = [(each["text_number"], each["image"]) for each in maps["self"].metadata["sequences"]]
    assert found == [(0, 0), (1, 0)]
    for site in maps["self"].layers:
        own = maps.map(site, own_grid=True).mass[:, 0]
        assert (own - exact[site][:, :, : own.shape[-1]]).abs().max() < 1e-6
