"""Measures whether the demo model answers correctly, and whether its attention points to the message with the fact.

    python examples/demo_model/measure.py

There are two figures, on held-out conversations of 1,000 to 4,600 tokens. Each ends with a question about a fact
that one earlier message states.

* *exact*: greedy decoding gives the expected answer, word for word, and stops.
* *fact block strongest*: the answer's tokens put most attention on the message that states the fact. The expected
  answer is given as the last message. Attention is summed over a message's tokens and averaged over the answer's tokens
  and all heads of one layer. All messages before the answer count, also the system message and the question. The layer
  is chosen on other conversations.
"""

import argparse
import json
import random
import time
from itertools import accumulate, count
from pathlib import Path

import torch
from generator import held_out_conversation
from transformers import AutoModelForCausalLM, AutoTokenizer

import attnpatch
from attnpatch.demo.conversation import DemoConversation

MODEL = Path(__file__).parents[2] / "attnpatch" / "demo" / "model"
SHORTEST, LONGEST = 1000, 4600
# These conversations were not looked at while the training was developed; some below 10,000 were.
FIRST_SEED = 20_000
# First seeds of the conversations on which the layer is chosen, and of those from which one is picked to ship.
LAYER_SEEDS, PICK_SEEDS = 1_000_000, 2_000_000


def load(folder: Path):
    """The model in float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def conversation_of(seed: int) -> DemoConversation:
    """Held-out conversation ``seed``. Its length is drawn uniformly from the measured range."""
    length = random.Random(f"length {seed}").randint(SHORTEST + 40, LONGEST - 80)
    return held_out_conversation(seed, length)


def message_ends(tokenizer, messages: list[dict]) -> list[int]:
    """The end of each message, in tokens of the whole conversation.

    The demo's chat template writes each message between separate tokens, so lengths add up.
    """
    lengths = (len(tokenizer.apply_chat_template([message])["input_ids"]) for message in messages)
    return list(accumulate(lengths))


@torch.inference_mode()
def answer_attention(model, tokenizer, conversation: DemoConversation) -> torch.Tensor:
    """The attention mass that the expected answer puts on each message before it.

    Args:
        model: Causal language model.
        tokenizer: Its tokenizer, with a chat template.
        conversation: Ends with a question; the expected answer is appended as the last message.

    Returns:
        ``[layers, messages]`` float32, mean over heads and over the answer's tokens. A row sums to 1 less the
        mass that the answer puts on itself.
    """
    messages = conversation.with_answer()
    ends = message_ends(tokenizer, messages)
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt")["input_ids"]
    prefix, answer = ids[:, : ends[-2]], ids[:, ends[-2] :]
    cache = model(prefix, use_cache=True, logits_to_keep=1).past_key_values
    # Only the answer's rows are captured: the prefix runs before the capture begins.
    blocks = attnpatch.Blocks.spans(list(zip([0, *ends[:-1]], ends, strict=True)))
    with attnpatch.capture(model, blocks=blocks) as maps:
        model(answer, past_key_values=cache)
    return maps.block_map.mass[:, -1, :-1]


@torch.inference_mode()
def greedy_answer(model, tokenizer, conversation: DemoConversation, max_new_tokens: int = 12) -> str:
    """The model's reply to the last question."""
    inputs = tokenizer.apply_chat_template(
        conversation.messages, add_generation_prompt=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    reply = output[0, inputs["input_ids"].shape[1] :]
    ended = reply[-1].item() == tokenizer.eos_token_id
    text = tokenizer.decode(reply, skip_special_tokens=True).strip()
    return text if ended else f"{text} ..."


def choose_layer(model, tokenizer, number: int) -> tuple[int, list[float]]:
    """The layer whose strongest message is most often the one with the fact, and that share for every layer."""
    hits = torch.zeros(model.config.num_hidden_layers)
    for seed in range(LAYER_SEEDS, LAYER_SEEDS + number):
        conversation = conversation_of(seed)
        hits += answer_attention(model, tokenizer, conversation).argmax(-1) == conversation.fact_message
    return int(hits.argmax()), (hits / number).tolist()


def measure(model, tokenizer, layer: int, number: int, first: int = FIRST_SEED) -> dict:
    """Both figures over ``number`` conversations from seed ``first`` on, with the failures."""
    exact = strongest = 0
    mass, lengths, missed = [], [], []
    for seed in range(first, first + number):
        conversation = conversation_of(seed)
        lengths.append(message_ends(tokenizer, conversation.messages)[-1])
        reply = greedy_answer(model, tokenizer, conversation)
        attention = answer_attention(model, tokenizer, conversation)[layer]
        top = int(attention.argmax())
        exact += reply == conversation.answer
        strongest += top == conversation.fact_message
        mass.append(attention[conversation.fact_message].item())
        if reply != conversation.answer or top != conversation.fact_message:
            missed.append(
                {
                    "seed": seed,
                    "expected": conversation.answer,
                    "reply": reply,
                    "fact_message": conversation.fact_message,
                    "strongest_message": top,
                    "messages": len(conversation.messages),
                }
            )
    return {
        "conversations": number,
        "tokens": [min(lengths), max(lengths)],
        "exact": exact / number,
        "fact_block_strongest": strongest / number,
        "mean_mass_on_fact": sum(mass) / number,
        "missed": missed,
    }


def pick(model, tokenizer, layer: int, num_tokens: int = 4300) -> tuple[int, DemoConversation]:
    """The first conversation of that length that has the fact in its first half and both figures right."""
    for seed in count(PICK_SEEDS):
        conversation = held_out_conversation(seed, num_tokens)
        early = conversation.fact_message < len(conversation.messages) // 2
        if not early or greedy_answer(model, tokenizer, conversation) != conversation.answer:
            continue
        if int(answer_attention(model, tokenizer, conversation)[layer].argmax()) == conversation.fact_message:
            return seed, conversation
    raise AssertionError("count() does not end")


def table(figures: dict) -> str:
    """The figures as a small table."""
    rows = [
        ("held-out conversations", str(figures["conversations"])),
        ("tokens", "{} to {}".format(*figures["tokens"])),
        ("exact answers (at least 95 %)", f"{figures['exact']:.1%}"),
        (
            f"fact block strongest, layer {figures['layer']} (at least 90 %)",
            f"{figures['fact_block_strongest']:.1%}",
        ),
        ("mean attention mass on the fact's message", f"{figures['mean_mass_on_fact']:.3f}"),
        ("each layer, on the conversations that choose the layer", figures_of(figures["layer_shares"])),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def figures_of(shares: list[float]) -> str:
    """Shares as percentages in one cell."""
    return "  ".join(f"{share:.0%}" for share in shares)


def main() -> None:
    """Measure and print. The exit code is 1 if a figure misses its target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument(
        "--layer-conversations",
        type=int,
        default=20,
        help="number of other conversations, to choose the layer",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument(
        "--pick",
        type=Path,
        help="measure nothing; write a conversation of over 4,096 tokens into this file, to ship it",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = load(options.model)
    start = time.monotonic()
    layer, shares = choose_layer(model, tokenizer, options.layer_conversations)
    if options.pick:
        seed, conversation = pick(model, tokenizer, layer)
        conversation.save(options.pick)
        print(f"layer {layer}, seed {seed}: {options.pick}")
        return
    figures = {
        "layer": layer,
        "layer_shares": shares,
        **measure(model, tokenizer, layer, options.conversations),
    }
    figures["seconds"] = round(time.monotonic() - start, 1)
    print(json.dumps(figures, indent=1))
    print(table(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(figures["exact"] < 0.95 or figures["fact_block_strongest"] < 0.9)


if __name__ == "__main__":
    main()
