"""Train a small LLaVA to say where a white square is, and draw where its answer looks."""

import argparse
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import attnpatch
from attnpatch.capturing.picture_overlay import picture_heat, plot_on_picture
from attnpatch.viewing.page import write_page

EDGE, PATCH, SQUARE = 64, 8, 12
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
WORDS = ["[UNK]", "where", "is", "the", "square", "?", *ROWS, *COLUMNS]


def built():
    """The processor, and the model with random weights."""
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", pad_token="[UNK]"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    pictures = transformers.CLIPImageProcessor(
        size={"shortest_edge": EDGE}, crop_size={"height": EDGE, "width": EDGE}
    )
    processor = transformers.LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**small, "num_hidden_layers": 1}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=EDGE, patch_size=PATCH),
        text_config=transformers.LlamaConfig(**small, vocab_size=16, max_position_embeddings=128),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,  # the patches before any attention, so that a token shows its own place only
    )
    return processor, transformers.LlavaForConditionalGeneration(config)


def picture(generator):
    """A noisy picture with a white square, where it is in words (as token ids), and its middle in pixels."""
    pixels = generator.integers(40, 140, (EDGE, EDGE, 3)).astype(np.uint8)
    y, x = map(int, generator.integers(0, EDGE - SQUARE, 2))
    pixels[y : y + SQUARE, x : x + SQUARE] = 255
    middle = y + SQUARE // 2, x + SQUARE // 2
    answer = [
        WORDS.index(names[place * 3 // EDGE]) for names, place in zip((ROWS, COLUMNS), middle, strict=True)
    ]
    return Image.fromarray(pixels), answer, middle


def trained(steps, seed=0):
    """The processor and the trained model."""
    torch.manual_seed(seed)
    processor, model = built()
    generator = np.random.default_rng(seed)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, steps)
    for step in range(steps):
        batch = [picture(generator) for _ in range(32)]
        inputs = processor(
            images=[image for image, *_ in batch],
            text=["<image> where is the square ?"] * 32,
            return_tensors="pt",
        )
        answers = torch.tensor([answer for _, answer, _ in batch])
        ids = torch.cat([inputs["input_ids"], answers[:, :1]], 1)
        logits = model(
            input_ids=ids, pixel_values=inputs["pixel_values"], attention_mask=torch.ones_like(ids)
        ).logits
        loss = torch.nn.functional.cross_entropy(logits[:, -2:].flatten(0, 1), answers.flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return processor, model.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("where"))
    given = parser.parse_args()
    processor, model = trained(given.steps)
    given.out.mkdir(parents=True, exist_ok=True)
    generator, right, looks = np.random.default_rng(99), 0, 0
    for number in range(20):
        image, answer, middle = picture(generator)
        inputs = processor(images=image, text="<image> where is the square ?", return_tensors="pt")
        blocks = attnpatch.Blocks.images(processor, inputs, tile=1)
        with torch.no_grad(), attnpatch.capture(model, blocks) as maps:
            found = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
        said = found[0, inputs["input_ids"].shape[1] :][:2].tolist()
        right += said == answer
        heat = picture_heat(maps.block_map, layer=1)
        row, column = np.unravel_index(heat.argmax(), heat.shape)
        away = max(abs((place + 0.5) * PATCH - at) for place, at in zip((row, column), middle, strict=True))
        looks += away < (SQUARE + PATCH) / 2  # the tile lies on the square, at least in part
        if number == 0:
            print("it says:", processor.tokenizer.decode(said))
            plot_on_picture(image, maps.block_map, layers=[0, 1], path=given.out / "where.png")
            write_page({"where": maps.block_map}, given.out / "page.html", pictures=[image])
    print(f"{right} of 20 answers are right; in {looks}, the strongest tile of layer 1 lies on the square")


if __name__ == "__main__":
    main()
