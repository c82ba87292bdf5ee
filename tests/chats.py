"""A tiny chat model in a folder, and files of conversations for it, good and bad."""

import json
import os
import pathlib

import torch

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "the key to the red house is under a stone near the old well and nobody knows of it but you".split()
GOOD = (0, 2, 3, 5, 6, 8, 10)
# Of the 12 records of ``write_mixed``: what stands in the line, and what is said of it.
BAD = {
    1: ('{"messages": [', "not JSON"),
    4: ('{"text": "hello"}', "no messages in it"),
    7: ('{"messages": [{"role": "wizard", "content": "hello"}]}', "role 'wizard'"),
    9: ('{"messages": []}', "empty"),
    11: ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "lone surrogate"),
}


def save_model(folder: pathlib.Path) -> pathlib.Path:
    """A random Llama of two layers and four heads, and a fast tokenizer with a chat template."""
    import tokenizers
    import transformers

    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    raw.train_from_iterator([" ".join(WORDS)], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    # Sizes that 4-bit weights on CPU can have.
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def conversation(number: int, turns: int = 2, **more) -> dict:
    """System, user and assistant in turn, whose words depend on the number."""
    roles = ["system", *["user", "assistant"] * turns]
    messages = [
        {"role": role, "content": " ".join(WORDS[(number + place) % 7 :][: 4 + (number * place) % 9])}
        for place, role in enumerate(roles)
    ]
    return {"messages": messages, **more}


def write_good(path: pathlib.Path, count: int = 3, turns: int = 2) -> pathlib.Path:
    path.write_text("".join(json.dumps(conversation(i, turns)) + "\n" for i in range(count)))
    return path


def write_mixed(path: pathlib.Path) -> pathlib.Path:
    """Twelve records, five of them bad; of the good ones one has other blocks, and one an id."""
    lines = []
    for number in range(12):
        more = {"id": "a chat/of mine"} if number == 3 else {}
        good = json.dumps(conversation(number, 3 if number == 8 else 2, **more))
        lines.append(BAD[number][0] if number in BAD else good)
    path.write_text("\n".join(lines) + "\n")
    return path


def index_of(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


def as_process(rank: int, count: int, port: int, arguments: list[str]) -> None:
    """The command line in one of several processes, as a launcher starts them."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    from attnpatch.cli.app import app

    app(arguments, prog_name="attnpatch")
