"""Trains the models that test the heat maps: they draw two coloured shapes from a caption, in 32 x 32 pixels.

    python examples/demo_model/train_shapes.py --model unet
    python examples/demo_model/train_shapes.py --model dit

Both start from random weights. Training pictures are drawn on the fly, from captions that are not held out.
"""

import argparse
import copy
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import checkpoints
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

sys.path.insert(0, str(Path(__file__).parents[1]))
import shapes

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
TOKENS = 8
WIDTH = 64


@dataclass(frozen=True)
class Recipe:
    """How one model is trained.

    Attributes:
        steps: Optimizer steps.
        batch: Pictures per step.
        learning_rate: Peak.
    """

    steps: int
    batch: int
    learning_rate: float


RECIPES = {
    "unet": Recipe(steps=2400, batch=16, learning_rate=2e-3),
    "dit": Recipe(steps=1400, batch=16, learning_rate=1.5e-3),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, and the comma; a caption has seven, and an end."""
    places = [place for pair in shapes.PLACES for place in pair]
    vocabulary = [PAD, END, UNKNOWN, ",", *shapes.COLOURS, *shapes.SHAPES, *places]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(vocabulary)}, UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, vocabulary.index(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=TOKENS,
        clean_up_tokenization_spaces=False,
    )


def build_text_encoder(vocabulary: int) -> T5EncoderModel:
    """One layer, in which a colour and a shape get their place from the words that follow.

    Its heads start with attention to the next two words. So "red" and "circle" have "left" from the first step on, and
    training need not find out which words belong together.
    """
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=WIDTH,
            d_kv=16,
            d_ff=128,
            num_layers=1,
            num_heads=4,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=16,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )
    attention = encoder.encoder.block[0].layer[0].SelfAttention
    ahead = attention._relative_position_bucket(torch.tensor([1, 2]), num_buckets=32, max_distance=16)
    with torch.no_grad():
        attention.relative_attention_bias.weight[ahead] += 3.0
    return encoder


def build_unet() -> UNet2DConditionModel:
    """Attention at 16 x 16 and 8 x 8, over tiles of 2 x 2 pixels and their positions.

    Its cross-attention starts sharper than usual, so it learns sooner which place belongs to which words.
    """
    unet = UNet2DConditionModel(
        sample_size=shapes.SIZE // 2,
        in_channels=12 + 8,
        out_channels=12,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(48, 64),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        # In this class, this is the number of heads.
        attention_head_dim=4,
        norm_num_groups=8,
    )
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if name.endswith(("attn2.to_q.weight", "attn2.to_k.weight")):
                weight *= 2
    return unet


def build_dit() -> PixArtTransformer2DModel:
    """256 tiles of 2 x 2 pixels."""
    return PixArtTransformer2DModel(
        sample_size=shapes.SIZE,
        in_channels=3,
        out_channels=3,
        patch_size=2,
        num_attention_heads=3,
        attention_head_dim=32,
        num_layers=4,
        cross_attention_dim=WIDTH,
        caption_channels=None,
        use_additional_conditions=False,
    )


def build(model: str, seed: int) -> shapes.ShapesPipeline:
    """The untrained pipeline, ``"unet"`` or ``"dit"``."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    parts = {"unet": build_unet()} if model == "unet" else {"transformer": build_dit()}
    return shapes.ShapesPipeline(
        tokenizer, build_text_encoder(len(tokenizer)), FlowMatchEulerDiscreteScheduler(), **parts
    )


class Trainer:
    """The training state, and its checkpoints.

    Args:
        model: ``"unet"`` or ``"dit"``.
        recipe: How it is trained.
        seed: Seed of the weights and, with the step, of each batch.
        out: Folder for the pipeline; the checkpoint lies beside it.
    """

    def __init__(self, model: str, recipe: Recipe, seed: int, out: Path):
        self.recipe = recipe
        self.arguments = {"model": model, "seed": seed, **asdict(recipe)}
        self.seed = seed
        self.out = out
        self.checkpoint = out.with_name(out.name + ".checkpoint.pt")
        self.pipe = build(model, seed)
        self.trained = nn.ModuleList([self.pipe.denoiser, self.pipe.text_encoder]).train()
        self.average = copy.deepcopy(self.trained).requires_grad_(False)
        self.captions, _ = shapes.captions()
        self.optimizer = torch.optim.AdamW(
            self.trained.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.01
        )
        self.step = 0
        self.seconds = 0.0

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pictures, token ids, noise and noise levels of one step, drawn from the seed and the step alone."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        size = self.recipe.batch
        chosen = torch.randint(len(self.captions), (size,), generator=generator).tolist()
        pictures = torch.stack([shapes.draw(self.captions[at], generator)[0] for at in chosen])
        dropped = torch.rand(size, generator=generator) < 0.1
        texts = [
            "" if drop else shapes.text(self.captions[at]) for at, drop in zip(chosen, dropped, strict=True)
        ]
        ids = self.pipe.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        noise = torch.randn(pictures.shape, generator=generator)
        # Mostly noise: at these levels it is decided where each shape goes.
        mean = 1.3 if self.pipe.unet is not None else 0.8
        level = torch.sigmoid(1.2 * torch.randn(size, generator=generator) + mean)
        return pictures, ids, noise, level

    def learning_rate(self, step: int) -> float:
        """Warm-up over 100 steps, then a half cosine downwards."""
        return (
            self.recipe.learning_rate
            * min(1.0, (step + 1) / 100)
            * (0.51 + 0.49 * math.cos(math.pi * step / self.recipe.steps))
        )

    def train_step(self) -> float:
        """One optimizer step; returns the loss."""
        pictures, ids, noise, level = self.batch(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        mixed = torch.lerp(pictures, noise, level[:, None, None, None])
        denoiser, text_encoder = self.trained
        words = text_encoder(ids).last_hidden_state
        velocity = shapes.predict(denoiser, mixed, level, words)
        errors = (velocity - (noise - pictures)).square().mean((1, 2, 3))
        # With little noise, the target (noise minus picture) is known only after division by the noise level.
        weight = (level / 0.3).clamp(max=1).square() if self.pipe.unet is not None else 1.0
        loss = (weight * errors).mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        keep = min(0.999, self.step / (self.step + 10))
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.trained.parameters(), strict=True):
                mean.lerp_(value, 1 - keep)
        return loss.item()

    def save_checkpoint(self) -> None:
        """Write all that ``resume`` needs, atomically."""
        state = {name: getattr(self, name) for name in ("arguments", "step", "seconds")}
        state |= {name: getattr(self, name).state_dict() for name in ("trained", "average", "optimizer")}
        checkpoints.write(self.checkpoint, state)

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one."""
        state = checkpoints.read(self.checkpoint, self.arguments)
        if state is None:
            return
        self.step, self.seconds = state["step"], state["seconds"]
        for name in ("trained", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        print(f"continuing at step {self.step} of {self.recipe.steps}", flush=True)

    def save(self) -> None:
        """Write the pipeline with the averaged weights in float16, and the record of the training."""
        denoiser, text_encoder = copy.deepcopy(self.average).eval().half()
        name = "unet" if self.pipe.unet is not None else "transformer"
        pipe = shapes.ShapesPipeline(
            self.pipe.tokenizer, text_encoder, self.pipe.scheduler, **{name: denoiser}
        )
        pipe.save_pretrained(self.out)
        record = {
            **self.arguments,
            "stopped_at": self.step,
            "threads": torch.get_num_threads(),
            "wall_minutes": round(self.seconds / 60, 1),
        }
        (self.out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def train(trainer: Trainer, every: int, keep_every: float) -> None:
    """Train to the last step, and print progress.

    Args:
        trainer: New or resumed.
        every: Steps per printed line.
        keep_every: Seconds between checkpoints.
    """
    losses = []
    kept = clock = time.monotonic()
    while trainer.step < trainer.recipe.steps:
        losses.append(trainer.train_step())
        now = time.monotonic()
        trainer.seconds += now - clock
        clock = now
        if trainer.step % every == 0 or trainer.step == trainer.recipe.steps:
            mean = sum(losses) / len(losses)
            print(
                f"step {trainer.step}/{trainer.recipe.steps}  loss {mean:.4f}  {trainer.seconds / 60:.1f} min",
                flush=True,
            )
            losses = []
        if now - kept > keep_every:
            trainer.save_checkpoint()
            trainer.save()
            kept = now


def main() -> None:
    """Read the command line, train, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(RECIPES), required=True)
    parser.add_argument("--out", type=Path, help="folder for the pipeline; if not given, in shapes_models")
    parser.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--print-every", type=int, default=50, help="steps per line of progress")
    parser.add_argument("--keep-every", type=float, default=60.0, help="seconds between checkpoints")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = RECIPES[options.model]
    if options.steps:
        recipe = Recipe(options.steps, recipe.batch, recipe.learning_rate)
    trainer = Trainer(options.model, recipe, options.seed, options.out or shapes.MODELS / options.model)
    trainer.resume()
    train(trainer, options.print_every, options.keep_every)
    trainer.save()
    trainer.checkpoint.unlink(missing_ok=True)
    print(f"saved {trainer.out}")


if __name__ == "__main__":
    main()
