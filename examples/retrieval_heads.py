"""Do the heads that `attnpatch.heads` finds carry the answers? Removes them, and as many random others, and counts.

The heads are found on some conversations of the model that attnpatch ships, and removed while it answers others: in
the rows that generate the answer, the output of a removed head is 0.

python examples/retrieval_heads.py --conversations 50 --draws 10
"""

import argparse
import contextlib
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import attnpatch

sys.path.insert(0, str(Path(__file__).parent / "demo_model"))
from generator import held_out_conversation

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--conversations", type=int, default=10, help="answered with each set of heads removed")
parser.add_argument("--draws", type=int, default=3, help="sets of random heads")
parser.add_argument("--tokens", type=int, default=600, help="length of a conversation")
given = parser.parse_args()

folder = Path(attnpatch.__file__).parent / "demo" / "model"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()


@contextlib.contextmanager
def removed(heads):
    """Inside the block the last row of each call has no output of some heads, pairs of layer and head."""
    hooks = []
    for index, layer in enumerate(model.model.layers):
        numbers = [head for at, head in heads if at == index]

        def zero(module, args, numbers=numbers, width=layer.self_attn.head_dim):
            outputs = args[0].unflatten(-1, (-1, width)).clone()
            outputs[:, -1, numbers] = 0
            return (outputs.flatten(-2),)

        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(zero))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def right_answers(conversations, heads=()):
    """How many conversations are answered exactly."""
    right = 0
    for conversation in conversations:
        ids = tokenizer.apply_chat_template(
            conversation.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        with removed(heads):
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
            )
        said = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
        right += said == conversation.answer
    return right


# The heads are found on ten conversations, and removed on others; the model was trained on neither.
shown = [held_out_conversation(3_000_000 + seed, given.tokens) for seed in range(10)]
asked = [held_out_conversation(4_000_000 + seed, given.tokens) for seed in range(given.conversations)]
probes = attnpatch.Probes.conversations(tokenizer, [(c.messages, c.fact_message, c.answer) for c in shown])
scores = attnpatch.heads(model, probes)
print(scores)

every = [(layer, head) for layer in scores.layers for head in range(4)]
found = [one[:2] for one in scores.top("retrieval", len(every)) if one.score >= 0.5]
others = [head for head in every if head not in found]
print(f"\nretrieval heads (score at least 0.5): {', '.join(f'{layer}.{head}' for layer, head in found)}")
print(f"right answers of {given.conversations}:")
print(f"  no head removed                  {right_answers(asked):5}")
print(f"  the {len(found)} retrieval heads removed    {right_answers(asked, found):5}")
counts = []
for seed in range(given.draws):
    draw = sorted(random.Random(seed).sample(others, len(found)))
    counts.append(right_answers(asked, draw))
    print(
        f"  {len(found)} others removed                 {counts[-1]:5}   {' '.join(f'{a}.{b}' for a, b in draw)}"
    )
print(f"  {len(found)} others removed, mean of {len(counts):2}  {sum(counts) / len(counts):7.1f}")
