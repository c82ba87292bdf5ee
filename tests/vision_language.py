"""Small vision-language models of transformers with their real processors, for tests.

Processors of models with videos need torchvision, which the tests do without. Of these the tokenizer, the image
processor and the text that the processor's own code puts in place of a picture are used.
"""

import ast
import types
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers as T
from PIL import Image

if not hasattr(T, "Qwen2VLImageProcessorPil"):
    pytest.skip(
        f"transformers {T.__version__} has no image processors that do without torchvision",
        allow_module_level=True,
    )

EDGE = 32  # of a picture that the vision tower sees, in pixels
PATCH = 8


def tokenizer_with(*special, **named):
    """A tokenizer of a few words; ``named`` special tokens become its attributes, with their ids."""
    words = ["[UNK]", "[PAD]", "<s>", "</s>", "what", "is", "this", "?", "one", "two"]
    raw = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, "[UNK]")
    )
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    found = T.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]", bos_token="<s>", eos_token="</s>"
    )
    found.add_special_tokens({"additional_special_tokens": [*special, *named.values()]})
    for name, token in named.items():
        setattr(found, name, token)
        setattr(found, f"{name}_id", found.convert_tokens_to_ids(token))
    return found


TEXT = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": EDGE,
    "patch_size": PATCH,
}  # fmt: skip


def built(kind, config):
    torch.manual_seed(0)
    return kind._from_config(config, attn_implementation="eager").eval()


def llava():
    tokenizer = tokenizer_with(image_token="<image>")
    pictures = T.CLIPImageProcessorPil(
        size={"shortest_edge": EDGE}, crop_size={"height": EDGE, "width": EDGE}
    )
    processor = T.LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**VISION),
        text_config=T.LlamaConfig(**TEXT),
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-1,
    )
    return processor, built(T.LlavaForConditionalGeneration, config)


def llava_with_class_token():
    processor, model = llava()
    processor.vision_feature_select_strategy = model.config.vision_feature_select_strategy = "full"
    return processor, model


def llava_next():
    tokenizer = tokenizer_with(image_token="<image>")
    pinpoints = [[EDGE, 2 * EDGE], [2 * EDGE, EDGE], [2 * EDGE, 2 * EDGE]]
    pictures = T.LlavaNextImageProcessorPil(
        size={"shortest_edge": EDGE},
        crop_size={"height": EDGE, "width": EDGE},
        image_grid_pinpoints=pinpoints,
    )
    processor = T.LlavaNextProcessor(
        pictures,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = T.LlavaNextConfig(
        vision_config=T.CLIPVisionConfig(**VISION),
        text_config=T.LlamaConfig(**TEXT),
        image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
    )
    return processor, built(T.LlavaNextForConditionalGeneration, config)


def paligemma():
    tokenizer = tokenizer_with(image_token="<image>")
    pictures = T.SiglipImageProcessorPil(size={"height": EDGE, "width": EDGE})
    pictures.image_seq_length = (EDGE // PATCH) ** 2
    processor = T.PaliGemmaProcessor(pictures, tokenizer)
    config = T.PaliGemmaConfig(
        vision_config=T.SiglipVisionConfig(**VISION, projection_dim=32).to_dict(),
        text_config=T.GemmaConfig(**{**TEXT, "vocab_size": 1300}).to_dict(),
        image_token_index=tokenizer.image_token_id,
        projection_dim=32,
    )
    return processor, built(T.PaliGemmaForConditionalGeneration, config)


def gemma3():
    tokenizer = tokenizer_with(boi_token="<boi>", image_token="<img>", eoi_token="<eoi>")
    pictures = T.Gemma3ImageProcessorPil(size={"height": EDGE, "width": EDGE})
    processor = T.Gemma3Processor(pictures, tokenizer, image_seq_length=4)
    config = T.Gemma3Config(
        vision_config=T.SiglipVisionConfig(**VISION).to_dict(),
        text_config=T.Gemma3TextConfig(**TEXT, sliding_window=512).to_dict(),
        image_token_index=tokenizer.image_token_id,
        mm_tokens_per_image=4,
    )
    model = built(T.Gemma3ForConditionalGeneration, config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # 0 by default
    return processor, model


PIECES = ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
PIECES += [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]


def idefics3():
    tokenizer = tokenizer_with(*PIECES, image_token="<image>")
    pictures = T.Idefics3ImageProcessorPil(
        size={"longest_edge": 3 * EDGE}, max_image_size={"longest_edge": EDGE}
    )
    processor = T.Idefics3Processor(pictures, tokenizer, image_seq_len=4)
    config = T.Idefics3Config(
        vision_config=VISION,
        text_config=T.LlamaConfig(**TEXT),
        image_token_id=tokenizer.image_token_id,
        scale_factor=2,
    )
    return processor, built(T.Idefics3ForConditionalGeneration, config)


def idefics2(split=False):
    """A resampler makes four tokens of each piece of a picture."""
    tokenizer = tokenizer_with("<end_of_utterance>", image_token="<image>", image_boundary_token="<fake>")
    pictures = T.Idefics2ImageProcessorPil(
        size={"shortest_edge": EDGE, "longest_edge": 2 * EDGE}, do_image_splitting=split
    )
    processor = T.Idefics2Processor(pictures, tokenizer, image_seq_len=4)
    resampler = {
        "resampler_n_latents": 4,
        "resampler_depth": 1,
        "resampler_n_heads": 2,
        "resampler_head_dim": 16,
    }
    config = T.Idefics2Config(
        vision_config=VISION | {"image_size": 2 * EDGE},
        perceiver_config={"hidden_size": 32, "num_key_value_heads": 2, **resampler},
        text_config=T.MistralConfig(**TEXT).to_dict(),
        image_token_id=tokenizer.image_token_id,
    )
    return processor, built(T.Idefics2ForConditionalGeneration, config)


def smolvlm():
    tokenizer = tokenizer_with(*PIECES, image_token="<image>")
    pictures = T.SmolVLMImageProcessorPil(
        size={"longest_edge": 3 * EDGE}, max_image_size={"longest_edge": EDGE}
    )
    processor = without_videos(
        T.SmolVLMProcessor,
        pictures,
        tokenizer,
        image_seq_len=4,
        fake_image_token=PIECES[0],
        global_image_token="<global-img>",
    )
    config = T.SmolVLMConfig(
        vision_config=VISION,
        text_config=T.LlamaConfig(**TEXT),
        image_token_id=tokenizer.image_token_id,
        scale_factor=2,
    )
    return processor, built(T.SmolVLMForConditionalGeneration, config)


def internvl(pieces=False):
    tokenizer = tokenizer_with(image_token="<IMG>", start_image_token="<start>", end_image_token="<end>")
    pictures = T.GotOcr2ImageProcessorPil(
        size={"height": EDGE, "width": EDGE}, crop_to_patches=pieces, max_patches=4
    )
    processor = without_videos(
        T.InternVLProcessor,
        pictures,
        tokenizer,
        image_seq_length=4,
        start_image_token="<start>",
        end_image_token="<end>",
    )
    vision = {**VISION, "image_size": [EDGE, EDGE], "patch_size": [PATCH, PATCH]}
    config = T.InternVLConfig(
        vision_config=T.InternVLVisionConfig(**vision),
        text_config=T.Qwen2Config(**TEXT),
        image_token_id=tokenizer.image_token_id,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return processor, built(T.InternVLForConditionalGeneration, config)


def llava_onevision():
    tokenizer = tokenizer_with(image_token="<image>", video_token="<video>")
    pinpoints = [[EDGE * i, EDGE * j] for i in range(1, 4) for j in range(1, 4)]
    pictures = T.LlavaOnevisionImageProcessorPil(
        size={"height": EDGE, "width": EDGE}, image_grid_pinpoints=pinpoints
    )
    processor = without_videos(
        T.LlavaOnevisionProcessor,
        pictures,
        tokenizer,
        video_token=tokenizer.video_token,
        video_token_id=tokenizer.video_token_id,
        num_image_tokens=(EDGE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
    )
    config = T.LlavaOnevisionConfig(
        vision_config=T.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=T.Qwen2Config(**TEXT),
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
    )
    return processor, built(T.LlavaOnevisionForConditionalGeneration, config)


def pixtral_tokens():
    return tokenizer_with("[IMG_BREAK]", "[IMG_END]", image_token="[IMG]")


def hosts_function(path, kind, name):
    """A method of a class of transformers whose module needs torchvision when it is imported: its own source, alone."""
    tree = ast.parse((Path(T.__file__).parent / path).read_text())
    (found,) = (
        each
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == kind
        for each in node.body
        if isinstance(each, ast.FunctionDef) and each.name == name
    )
    namespace = {"torch": torch}
    exec(compile(ast.Module([found], []), path, "exec"), namespace)
    return namespace[name]


def processor_like(kind, path, pictures, tokenizer, **settings):
    """What ``Blocks.images`` and the tests use of a processor that cannot be imported without torchvision."""
    own = {"replace_image_token": hosts_function(path, kind, "replace_image_token")}
    return without_videos(type(kind, (), own), pictures, tokenizer, **settings)


def pixtral_processor(pictures, tokenizer, merge):
    marks = {"image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    sizes = {"patch_size": PATCH, "spatial_merge_size": merge}
    path = "models/pixtral/processing_pixtral.py"
    return processor_like("PixtralProcessor", path, pictures, tokenizer, **sizes, **marks)


class KimiPictures:
    """Patches in the order of the image processor, whose own function makes them; without its resizing."""

    merge_size = 2

    def __call__(self, images, return_tensors):
        patchify = hosts_function(
            "models/kimi_k25/image_processing_kimi_k25.py", "Kimi_K25ImageProcessor", "patchify"
        )
        every = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 for image in images]
        found = [patchify(self, image, PATCH) for image in every]
        grid = torch.tensor([[1, height, width] for _, height, width in found])
        return {"pixel_values": torch.cat([each[0].flatten(0, 1) for each in found]), "image_grid_thw": grid}


def kimi():
    tokenizer = tokenizer_with(image_token="<|media_pad|>", video_token="<video>")
    path = "models/kimi_k25/processing_kimi_k25.py"
    video = {"video_token": tokenizer.video_token, "video_token_id": tokenizer.video_token_id}
    processor = processor_like("Kimi_K25Processor", path, KimiPictures(), tokenizer, **video)
    text = {
        **TEXT, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
        "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 2, "moe_intermediate_size": 16,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": PATCH,
        "pos_emb_height": 8, "pos_emb_width": 8,
    }  # fmt: skip
    config = T.Kimi_K25Config(
        vision_config=T.Kimi_K25VisionConfig(**vision), text_config=T.DeepseekV3Config(**text),
        projection_hidden_size=32, image_token_id=tokenizer.image_token_id, video_token_id=tokenizer.video_token_id,
    )  # fmt: skip
    return processor, built(T.Kimi_K25ForConditionalGeneration, config)


def pixtral():
    tokenizer = pixtral_tokens()
    pictures = T.PixtralImageProcessorPil(
        size={"longest_edge": 64}, patch_size={"height": PATCH, "width": PATCH}
    )
    processor = pixtral_processor(pictures, tokenizer, 1)
    config = T.LlavaConfig(
        vision_config=T.PixtralVisionConfig(**VISION | {"image_size": 64}),
        text_config=T.MistralConfig(**TEXT),
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return processor, built(T.LlavaForConditionalGeneration, config)


def mistral3():
    """As Pixtral, with tokens of 2 x 2 patches."""
    tokenizer = pixtral_tokens()
    pictures = T.PixtralImageProcessorPil(
        size={"longest_edge": 64}, patch_size={"height": 2 * PATCH, "width": 2 * PATCH}
    )
    processor = pixtral_processor(pictures, tokenizer, 2)
    config = T.Mistral3Config(
        vision_config=T.PixtralVisionConfig(**VISION | {"image_size": 64}),
        text_config=T.MistralConfig(**TEXT),
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-1,
        spatial_merge_size=2,
    )
    return processor, built(T.Mistral3ForConditionalGeneration, config)


QWEN = {"spatial_merge_size": 2, "patch_size": 4, "temporal_patch_size": 1, "num_heads": 2, "depth": 2}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}


def qwen(name, vision, kind=T.Qwen2VLImageProcessorPil):
    tokenizer = tokenizer_with("<start>", "<end>", image_token="<|image_pad|>", video_token="<|video_pad|>")
    pictures = kind(min_pixels=16 * 16, max_pixels=64 * 64, patch_size=4, merge_size=2, temporal_patch_size=1)
    processor = without_videos(
        getattr(T, f"{name}Processor"),
        pictures,
        tokenizer,
        video_token=tokenizer.video_token,
        video_token_id=tokenizer.video_token_id,
    )
    marks = {"image_token_id": tokenizer.image_token_id, "video_token_id": tokenizer.video_token_id}
    ends = {"vision_start_token_id": 10, "vision_end_token_id": 11}
    config = getattr(T, f"{name}Config")(
        vision_config={**QWEN, **vision}, text_config={**TEXT, "rope_parameters": ROPE}, **marks, **ends
    )
    return processor, built(getattr(T, f"{name}ForConditionalGeneration"), config)


def qwen2_vl():
    return qwen("Qwen2VL", {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2})


def qwen2_5_vl():
    sizes = {
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    return qwen("Qwen2_5_VL", sizes)


def qwen3_vl():
    sizes = {
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    return qwen("Qwen3VL", sizes)


def without_videos(kind, pictures, tokenizer, **settings):
    """A processor whose ``__init__`` would need torchvision, with what its own code for pictures uses."""
    found = object.__new__(kind)
    vars(found).update(
        image_processor=pictures,
        tokenizer=tokenizer,
        image_token=tokenizer.image_token,
        image_token_id=tokenizer.image_token_id,
        **settings,
    )
    return found


def inputs_of(processor, texts, images):
    """The processor's output for texts with ``{}`` in place of each picture; ``images`` has a list for each text."""
    with_videos = processor.__class__.__name__ in (
        "SmolVLMProcessor",
        "InternVLProcessor",
        "PixtralProcessor",
    ) or hasattr(processor, "video_token_id")
    if not with_videos:
        mark = getattr(processor, "boi_token", processor.image_token)
        nested = isinstance(processor, T.Idefics2Processor | T.Idefics3Processor | T.Gemma3Processor)
        every = images if nested else [image for row in images for image in row]
        texts = [text.replace("{}", f" {mark} ") for text in texts]
        return processor(images=every, text=texts, return_tensors="pt", padding=True)
    nested = isinstance(processor, T.SmolVLMProcessor)
    every = images if nested else [image for row in images for image in row]
    more = {"return_row_col_info": True} if nested else {}
    pictures = processor.image_processor(every, return_tensors="pt", **more)
    number, written = 0, []
    for text in texts:
        first, *rest = text.split("{}")
        for part in rest:
            first += f" {processor.replace_image_token(pictures, number)} {part}"
            number += 1
        written.append(first)
    used = {name: pictures[name] for name in pictures if name not in ("rows", "cols", "num_patches")}
    encoded = processor.tokenizer(written, return_tensors="pt", padding=True)
    found = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], **used}
    if "image_grid_thw" in used:
        found["mm_token_type_ids"] = (found["input_ids"] == processor.image_token_id).long()
    return found


def picture(height, width, spot=None):
    """A picture of dark noise; with a white spot at these shares of its height and width."""
    pixels = np.random.default_rng(0).integers(0, 120, (height, width, 3), dtype=np.uint8)
    if spot is not None:
        y, x = int(spot[0] * height), int(spot[1] * width)
        pixels[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] = 255
    return Image.fromarray(pixels)


def embeddings(model, inputs):
    """What the language model is given: ``[batch, tokens, channels]``."""
    found = types.SimpleNamespace(value=None)
    (language,) = (
        module
        for name, module in model.named_modules()
        if name in ("model.language_model", "model.text_model")
    )

    def keep(module, args, kwargs):
        found.value = kwargs["inputs_embeds"].detach()

    handle = language.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        handle.remove()
    return found.value


FAMILIES = {
    each.__name__: each
    for each in (
        llava, llava_with_class_token, llava_next, paligemma, gemma3, idefics3, smolvlm, internvl, qwen2_vl, qwen2_5_vl,
        qwen3_vl, llava_onevision, pixtral, mistral3, kimi,
    )
}  # fmt: skip
