"""Built as ollm: transformers with flash-attn if it can be imported, and weights and layers of its own around that."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def implementation():
    try:
        import flash_attn  # noqa: F401

        return "flash_attention_2"
    except ImportError:
        return "sdpa"


class OwnLlama(LlamaForCausalLM):
    """Moves layers while it runs, as a model does that keeps them on the CPU."""

    def forward(self, *args, **kwargs):
        for layer in self.model.layers:
            layer.to(self.device)
        return super().forward(*args, **kwargs)


def built(kind, how):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=97, num_attention_heads=4, num_key_value_heads=2, **sizes, attn_implementation=how
    )
    return kind(config).eval()


model, other = built(OwnLlama, implementation()), built(LlamaForCausalLM, "eager")
print("runs", model.config._attn_implementation)
ids = torch.randint(0, 97, (2, 40))
mask = torch.ones_like(ids)
mask[1, :7] = 0
with torch.no_grad():
    out = model(ids, attention_mask=mask).logits
    expected = other(ids, attention_mask=mask).logits
print("wrong by", float((out - expected)[mask.bool()].abs().max()))
long, same = (
    each.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for each in (model, other)
)
assert torch.equal(long, same)
model.set_attn_implementation("sdpa")
model.set_attn_implementation("flash_attention_2")
