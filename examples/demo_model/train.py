"""Trains the demo model: a small Llama that answers questions about what was said earlier in a chat.

    python examples/demo_model/train.py --out attnpatch/demo/model

The vocabulary is the words of the conversation generator. The model starts from random weights and is trained on
generated conversations only, short ones first and long ones last.

A run that was killed continues if it is started again with the same arguments. On the same machine, with the same
number of threads, it ends with the same weights as an uninterrupted run. The checkpoint holds weights, optimizer,
random state and step, and step ``n`` draws its conversations from ``(seed, n)`` alone.
"""

import argparse
import json
import math
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import checkpoints
import torch
import torch.nn.functional as F
from generator import DENSE, NATURAL, all_phrases, training_conversation
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from attnpatch.demo.conversation import DemoConversation

ROLES = ("system", "user", "assistant")
END, PAD = "<|end|>", "<|pad|>"
# With one space before the text, a word is the same token at the start of a message as inside it.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPLIT = r"'s| ?\p{L}+| ?\p{N}{2}| ?\p{N}| ?[^\s\p{L}\p{N}]|\s+"
MAX_TOKENS = 4600
HIDDEN = 256
# Loss weight of the assistant's small talk, so that the model learns to chat too.
OTHER_WEIGHT = 0.05


@dataclass(frozen=True)
class Stage:
    """A part of the training, with one range of lengths.

    Attributes:
        steps: Optimizer steps, before ``--scale``.
        shortest, longest: Tokens per conversation, drawn uniformly once per step.
        tokens: Tokens per step, which determine the number of conversations.
        learning_rate: The peak. In the last stage it falls to a tenth.
        scaffold: Weight of :func:`scaffold_loss`.
        listen: See :func:`training_conversation`.
    """

    steps: int
    shortest: int
    longest: int
    tokens: int
    learning_rate: float
    scaffold: float = 1.0
    listen: float = 0.0


# The first stage is short. While few facts are open, the newest one that was not asked about is mostly the right
# answer, so the model would not learn to read names.
STAGES = (
    Stage(steps=160, shortest=40, longest=128, tokens=1536, learning_rate=1.2e-3),
    Stage(steps=450, shortest=192, longest=512, tokens=3072, learning_rate=1.2e-3),
    Stage(steps=100, shortest=512, longest=2048, tokens=6144, learning_rate=8e-4),
    Stage(steps=110, shortest=2048, longest=MAX_TOKENS, tokens=9200, learning_rate=8e-4, listen=0.9),
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the generator, and one per byte for anything else.

    Every piece costs the same, so the unigram model takes the split with the fewest pieces. ``decode`` restores any
    text.
    """
    splitter = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pre_tokenizer = pre_tokenizers.Sequence([splitter, byte_level])
    words = set()
    for phrase in all_phrases():
        plain = re.sub(r"\{\w+\}", "x", phrase if phrase == "'s" else f" {phrase}")
        words.update(word for word, _ in pre_tokenizer.pre_tokenize_str(plain) if len(word) > 1)
    specials = [PAD, END, *(f"<|{role}|>" for role in ROLES)]
    pieces = specials + sorted(pre_tokenizers.ByteLevel.alphabet()) + sorted(words)
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=None))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=specials[2:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """The untrained model, about 2 million parameters.

    The rotation base is large so that a head can match words at any distance.

    The task needs copying and matching, so the model starts with both. With the usual initialization, it took many
    times as many steps.

    * The output projection of every attention is a multiple of the transpose of its value projection, so each head
      copies what it attends to (similar to "Mimetic Initialization of Self-Attention Layers", Trockman and Kolter,
      2023). Embeddings are large enough for the copy to be read.
    * The last layer's queries and keys are equal, so it attends to equal words.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        num_hidden_layers=4,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.06)
        for layer in model.model.layers:
            attention = layer.self_attn
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                torch.nn.init.normal_(projection.weight, std=HIDDEN**-0.5)
            share = 0.3 if layer is model.model.layers[-1] else 0.05
            attention.o_proj.weight.copy_(share * attention.v_proj.weight.T)
        attention.k_proj.weight.copy_(attention.q_proj.weight)
    return model


def name_for_older_releases(folder: Path) -> None:
    """Add what transformers 4 reads under other names: the rotation base, the dtype, special tokens, the template."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.update(rope_theta=config["rope_parameters"]["rope_theta"], torch_dtype=config["dtype"])
    path.write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n", encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    path.write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n", encoding="utf-8")


@dataclass
class Batch:
    """The conversations of one step, padded on the right.

    Attributes:
        tokens: ``[B, N]`` int64.
        weights: ``[B, N]`` float32, the weight of each token's loss: 1 inside answers, ``OTHER_WEIGHT`` in the
            assistant's other messages, 0 elsewhere.
        pointers: ``[A, 3]`` int64, for each answer token: its conversation, the position that predicts it,
            and the position in the statement that it can be copied from.
    """

    tokens: torch.Tensor
    weights: torch.Tensor
    pointers: torch.Tensor


def encode(tokenizer: PreTrainedTokenizerFast, conversation: DemoConversation) -> tuple[list, list, list]:
    """Token ids, weights and ``(predicts, source)`` pointers of a conversation with its answer."""
    messages = conversation.with_answer()
    facts = dict([*conversation.asked, (len(messages) - 1, conversation.fact_message)])
    texts = [f"<|{message['role']}|> {message['content']}{END}" for message in messages]
    encoded = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(texts)]
    ids, weights, pointers, starts = [], [], [], []
    for index, (message, piece) in enumerate(zip(messages, encoded, strict=True)):
        said = 1.0 if index in facts else OTHER_WEIGHT if message["role"] == "assistant" else 0.0
        starts.append(len(ids))
        ids += piece
        weights += [0.0] + [said] * (len(piece) - 1)
        if index in facts:
            value, stated = piece[1:-1], encoded[facts[index]]
            offset = next(at for at in range(len(stated)) if stated[at : at + len(value)] == value)
            # One pointer more than the value has tokens: the end of the answer matches the full stop of the statement.
            source = starts[facts[index]] + offset
            pointers += [(starts[index] + at, source + at) for at in range(len(value) + 1)]
    return ids, weights, pointers


def batch_of(tokenizer, stage: Stage, seed: int, step: int) -> Batch:
    """The conversations of one step, drawn from the seed and the step alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    length = int(torch.randint(stage.shortest, stage.longest + 1, (), generator=generator))
    size = max(1, stage.tokens // length)
    first = (seed * 1_000_003 + step) * 1000
    rows, pointers = [], []
    for row in range(size):
        # Every eighth conversation has few questions and more small talk, like those that are shown.
        mix = NATURAL if (step * 7 + row) % 8 == 0 else DENSE
        conversation = training_conversation(first + row, length, mix, stage.listen)
        *ids_and_weights, found = encode(tokenizer, conversation)
        rows.append(ids_and_weights)
        pointers += [(row, *pointer) for pointer in found]
    longest = max(len(ids) for ids, _ in rows)
    tokens = torch.full((size, longest), tokenizer.pad_token_id)
    weights = torch.zeros(size, longest)
    for row, (ids, weight) in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
        weights[row, : len(ids)] = torch.tensor(weight)
    return Batch(tokens, weights, torch.tensor(pointers))


def answer_loss(model, hidden: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, float]:
    """Mean loss by weight, and the share of answer tokens predicted right.

    Args:
        model: The model.
        hidden: ``[B, N, hidden]``, its last hidden states. Logits are computed only where there is a loss.
        batch: The batch they were computed from.
    """
    targets, weights = batch.tokens[:, 1:], batch.weights[:, 1:]
    chosen = weights > 0
    logits = model.lm_head(hidden[:, :-1][chosen])
    targets, weights = targets[chosen], weights[chosen]
    losses = F.cross_entropy(logits, targets, reduction="none")
    right = (logits.argmax(-1) == targets)[weights == 1].float().mean().item()
    return (losses * weights).sum() / weights.sum(), right


def log_attention(model, layer: int, inputs: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Log of the attention probabilities of some query positions of one conversation.

    Args:
        model: The model.
        layer: Which of its layers.
        inputs: ``[N, hidden]``, the inputs of that layer.
        at: ``[A]`` int64, the query positions.

    Returns:
        ``[H, A, N]`` float32.
    """
    block = model.model.layers[layer]
    attention = block.self_attn
    inputs = block.input_layernorm(inputs)[None]
    shape = (1, inputs.shape[1], -1, attention.head_dim)
    query = attention.q_proj(inputs).view(shape).transpose(1, 2)
    key = attention.k_proj(inputs).view(shape).transpose(1, 2)
    positions = torch.arange(inputs.shape[1])
    query, key = apply_rotary_pos_emb(query, key, *model.model.rotary_emb(inputs, positions[None]))
    scores = query[0][:, at] @ key[0].mT * attention.scaling
    return scores.masked_fill(positions > at[:, None], -torch.inf).log_softmax(-1)


def scaffold_loss(model, states: tuple[torch.Tensor, ...], batch: Batch, possessive: int) -> torch.Tensor:
    """How far attention is from a prescribed way of copying: the mean of -log(probability).

    At a word to be copied, and at the position that copies it, two heads of the second layer should attend to the
    person and two to the thing. At the position that copies, all heads of the last layer should attend to the word.

    Args:
        model: The model.
        states: Its hidden states, ``[B, N, hidden]`` each.
        batch: The batch they were computed from.
        possessive: The token between person and thing.
    """
    losses = []
    for row, tokens in enumerate(batch.tokens):
        at, source = batch.pointers[batch.pointers[:, 0] == row, 1:].T
        found = log_attention(model, -1, states[-2][row], at)[:, torch.arange(len(at)), source]
        readers = torch.cat([at, source])
        possessives = (tokens == possessive).nonzero().flatten()
        nearest = possessives[torch.bucketize(readers, possessives) - 1]
        read = log_attention(model, 1, states[1][row], readers)
        each = torch.arange(len(readers))
        losses += [
            found.flatten(),
            read[:2, each, nearest - 1].flatten(),
            read[2:, each, nearest + 1].flatten(),
        ]
    return -torch.cat(losses).mean()


class Trainer:
    """The training state, and its checkpoints.

    Args:
        stages: With ``--scale`` applied.
        out: Folder for the model; the checkpoint lies beside it.
        arguments: A checkpoint is continued only if it was made with these.
    """

    def __init__(self, stages: list[Stage], out: Path, arguments: dict):
        self.stages = stages
        self.out = out
        self.arguments = arguments
        self.seed = arguments["seed"]
        self.tokenizer = build_tokenizer()
        self.possessive = self.tokenizer.convert_tokens_to_ids("'s")
        self.model = build_model(self.tokenizer, self.seed)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.01
        )
        self.checkpoint = out.with_name(out.name + ".checkpoint.pt")
        self.step = 0
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self.tokens_seen = 0

    @property
    def total(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[Stage, float]:
        """The stage of ``step``, and the share of that stage that is done."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step / stage.steps
            step -= stage.steps
        return self.stages[-1], 1.0

    def learning_rate(self, step: int) -> float:
        """Warm-up over 50 steps, then constant; in the last stage it falls to a tenth along a half cosine."""
        stage, done = self.stage_at(step)
        fall = 0.55 + 0.45 * math.cos(math.pi * done) if stage is self.stages[-1] else 1.0
        return stage.learning_rate * min(1.0, (step + 1) / 50) * fall

    def train_step(self) -> tuple[float, float]:
        """One optimizer step; returns the loss and the share of answer tokens predicted right."""
        stage, _ = self.stage_at(self.step)
        batch = batch_of(self.tokenizer, stage, self.seed, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        # Padding is on the right, and causal attention never attends to it, so no mask is needed.
        states = self.model.model(batch.tokens, output_hidden_states=True).hidden_states
        loss, right = answer_loss(self.model, states[-1], batch)
        scaffold = scaffold_loss(self.model, states, batch, self.possessive)
        self.optimizer.zero_grad()
        (loss + stage.scaffold * scaffold).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.tokens_seen += batch.tokens.numel()
        return loss.item(), right

    def save_checkpoint(self) -> None:
        """Write all that ``resume`` needs, atomically."""
        state = {name: getattr(self, name) for name in KEPT}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state["rng"] = torch.get_rng_state()
        checkpoints.write(self.checkpoint, state)

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one."""
        state = checkpoints.read(self.checkpoint, self.arguments)
        if state is None:
            return
        for name in KEPT:
            setattr(self, name, state[name])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        print(f"continuing at step {self.step} of {self.total}", flush=True)

    def save_model(self) -> None:
        """Write model, tokenizer and the record of the training.

        Weights are written in float16, which halves the file. The shipped model is evaluated with these weights.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self.model.half().save_pretrained(self.out)
        self.tokenizer.save_pretrained(self.out)
        name_for_older_releases(self.out)
        record = {
            **self.arguments,
            "threads": torch.get_num_threads(),
            "steps": self.step,
            "tokens": self.tokens_seen,
            "wall_minutes": round(self.seconds / 60, 1),
            "cpu_minutes": round(self.cpu_seconds / 60, 1),
            "stages": [asdict(stage) for stage in self.stages],
        }
        (self.out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


KEPT = ("arguments", "step", "seconds", "cpu_seconds", "tokens_seen")


def train(trainer: Trainer, every: int, keep_every: float) -> None:
    """Train to the last step, and print progress.

    Args:
        trainer: New or resumed.
        every: Steps per printed line.
        keep_every: Seconds between checkpoints.
    """
    losses, rights = [], []
    kept = clock = time.monotonic()
    cpu_clock = time.process_time()
    while trainer.step < trainer.total:
        loss, right = trainer.train_step()
        now, cpu_now = time.monotonic(), time.process_time()
        trainer.seconds += now - clock
        trainer.cpu_seconds += cpu_now - cpu_clock
        clock, cpu_clock = now, cpu_now
        losses.append(loss)
        rights.append(right)
        if trainer.step % every == 0 or trainer.step == trainer.total:
            longest = trainer.stage_at(trainer.step - 1)[0].longest
            print(
                f"step {trainer.step}/{trainer.total}  up to {longest} tokens"
                f"  loss {sum(losses) / len(losses):.4f}  answer tokens right {sum(rights) / len(rights):.2%}"
                f"  {trainer.tokens_seen / 1e6:.2f} M tokens  {trainer.seconds / 60:.1f} min",
                flush=True,
            )
            losses, rights = [], []
        if now - kept > keep_every:
            trainer.save_checkpoint()
            kept = now


def main() -> None:
    """Read the command line, train, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("attnpatch/demo/model"), help="folder for the model")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the steps of every stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--print-every", type=int, default=20, help="steps per line of progress")
    parser.add_argument("--keep-every", type=float, default=60.0, help="seconds between checkpoints")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    stages = [replace(stage, steps=max(1, round(stage.steps * options.scale))) for stage in STAGES]
    trainer = Trainer(stages, options.out, {"seed": options.seed, "scale": options.scale})
    trainer.resume()
    train(trainer, options.print_every, options.keep_every)
    trainer.save_model()
    trainer.checkpoint.unlink(missing_ok=True)
    print(f"saved {options.out}")


if __name__ == "__main__":
    main()
