"""A context manager around a generation call: the model is patched and captured inside, and unchanged outside.

python examples/context_manager.py
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import attnpatch

torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=512)).eval()
prompt = torch.randint(3, 512, (1, 300))

with attnpatch.patched(model, mode="always"), attnpatch.capture(model, attnpatch.Blocks.fixed(64)) as maps:
    model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    print(attnpatch.report(model))

print(maps.block_map)
print(
    "share of the last block's attention on the first block:",
    round(float(maps.block_map.to_numpy()[:, -1, 0].mean()), 3),
)
