"""What the last token attends to: reads one row of the last layer's attention weights, for a sequence of any length.

python examples/last_token.py --tokens 32768 --attention sdpa
"""

import argparse
import time

import torch
from transformers import LlamaConfig, LlamaModel

import attnpatch
from attnpatch.memory.peak import PeakMeter

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--tokens", type=int, default=2048)
parser.add_argument("--attention", choices=["eager", "sdpa"], default="sdpa")
given = parser.parse_args()

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=given.tokens, attn_implementation=given.attention,
)  # fmt: skip
model = LlamaModel(config).eval()
ids = torch.randint(0, 512, (1, given.tokens))
padding = torch.ones_like(ids)
padding[:, :16] = 0  # so that transformers needs a mask


def measured(what, work):
    with PeakMeter() as meter:
        start = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - start
    print(f"{what:20} {seconds:8.3f} s {meter.peak / 1e6:8.0f} MB")
    return result


with torch.no_grad(), attnpatch.patched(model, mode="always"):
    outputs = measured(
        "forward pass",
        lambda: model(ids, attention_mask=padding, use_cache=False, output_attentions=True),
    )
    weights = outputs.attentions[-1]
    row = measured("one row of weights", lambda: weights[:, :, -1].cpu())  # [batch, heads, keys]
print(f"{'all of that layer':20} {'':8}   {weights.nbytes / 1e6:8.0f} MB, never held")
strongest = row[0].mean(0).topk(3).indices.tolist()
print(f"the last of {given.tokens} tokens attends most to tokens {strongest}")
