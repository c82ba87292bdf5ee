"""One line: the attention of a transformers model runs by rows when memory is short.

python examples/one_line.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attnpatch

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    attn_implementation="eager",
)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(0, 512, (1, 1500))
with torch.no_grad():
    native = model(ids).logits

attnpatch.apply(model, min_free="900GB")  # more than any machine has free, so that it shows

with torch.no_grad():
    by_rows = model(ids).logits
print(attnpatch.report(model))
print("same to the last bit:", torch.equal(native, by_rows))
