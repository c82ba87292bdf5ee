"""Models whose peaks are measured: ``python measured.py CASE TOKENS WAY`` prints the bytes of one forward pass.

The kernel's own high-water mark, in a process that does nothing else. With the threshold of glibc's allocator fixed
(``MALLOC_MMAP_THRESHOLD_``) it is what tensors hold; as the allocator comes, it is that and the holes it keeps.
"""

import sys

import torch
from torch import nn


def llama(attention):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=8192, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def bert(attention):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=128, hidden_size=512, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=8,
        max_position_embeddings=8192, attn_implementation=attention,
    )  # fmt: skip
    return BertModel(config)


def t5(attention):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=128, d_model=256, d_kv=64, d_ff=512, num_layers=1, num_heads=4, decoder_start_token_id=0,
        attn_implementation=attention,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


class Research(nn.Module):
    """Hand-written attention over ``[batch, tokens, 256]``, four heads; no transformers model."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(256, 768)

        def forward(self, x):
            query, key, value = self.qkv(x).unflatten(-1, (3, 4, 64)).unbind(2)
            scores = torch.einsum("bihd,bjhd->bhij", query, key) / 8.0
            return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), value).flatten(2)

    def __init__(self):
        super().__init__()
        self.attention = self.Attention()

    def forward(self, x):
        return x + self.attention(x)


class Dense(nn.Module):
    """torch's own attention, made to run its dense math."""

    class Attention(nn.Module):
        def forward(self, x):
            query = x.unflatten(-1, (4, 64)).transpose(1, 2)
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                return nn.functional.scaled_dot_product_attention(query, query, query).transpose(1, 2)

    def __init__(self):
        super().__init__()
        self.attention = self.Attention()

    def forward(self, x):
        return self.attention(x)


CASES = {
    "llama eager": lambda: llama("eager"),
    "llama sdpa": lambda: llama("sdpa"),
    "bert eager": lambda: bert("eager"),
    "t5 sdpa": lambda: t5("sdpa"),
    "research": Research,
    "dense math": Dense,
}


def inputs_of(case, length):
    if CASES[case] in (Research, Dense):
        return {"x": torch.zeros(1, length, 256)}
    ids = torch.zeros(1, length, dtype=torch.long)
    return {"input_ids": ids, **({"decoder_input_ids": ids} if case.startswith("t5") else {})}


def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


@torch.no_grad()
def main(case, length, way):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = CASES[case]().eval()
    if way == "rows":
        import attnpatch

        attnpatch.apply(model, mode="always")
    model(**inputs_of(case, 64))  # what a first call allocates for good
    inputs = inputs_of(case, length)
    before = memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # the peak counts from here
    result = model(**inputs)
    print(memory("VmHWM") - before)
    del result


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
