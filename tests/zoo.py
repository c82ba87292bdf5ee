"""The zoo: one table of small models, built from configs with fixed seeds, that every feature is tested on.

A case says how to build a model, how to make its inputs and how to run it; a test asks for a case by name or
goes through ``CASES``. Sequence lengths are primes or odd numbers, so that any number of rows leaves a
remainder, and the weights are large enough that attention is neither uniform nor one-hot.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

# Longer than 64: below, torch's fused CPU kernel cannot be cut without rounding differently.
TEXT_LEN = 101
TARGET_LEN = 71
VOCAB = 97
TEXT_PADDINGS = ("none", "left", "right")


# -------------------------------------------------------------------------------------------- weights, inputs


def randomise(model: nn.Module, seed: int = 0, gain: float = 1.4) -> nn.Module:
    """Draws every parameter anew, so that no architecture hides behind zeros, ones or tiny weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "sinks" in name:
                parameter.copy_(noise + 2.0)  # large enough to take a share that shows
            elif parameter.dim() == 2 and any(part in name for part in ("embed", "wte", "wpe", "_bias.")):
                parameter.copy_(noise)
            elif parameter.dim() < 2:
                # Norm weights stay near one (or zero, where the host adds one); biases leave zero.
                parameter.add_(noise, alpha=0.2)
            else:
                fan_in = parameter.shape[-1] if parameter.dim() == 2 else math.prod(parameter.shape[1:])
                parameter.copy_(noise * (gain / math.sqrt(fan_in)))
    return model


def tokens(length: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    """Token ids that avoid the first few, which configs use as padding and end of sequence."""
    return torch.randint(5, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def floats(*shape: int, seed: int = 2) -> torch.Tensor:
    """Normal floats from a fixed seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def padding_mask(padding: str, length: int, pad: int = 14) -> torch.Tensor:
    """``[2, length]`` ones and zeros: the second sequence has ``pad`` tokens of padding."""
    mask = torch.ones(2, length, dtype=torch.long)
    if padding == "left":
        mask[1, :pad] = 0
    elif padding == "right":
        mask[1, length - pad :] = 0
    return mask


def text_inputs(padding: str, length: int = TEXT_LEN) -> dict:
    """Inputs of a text model: one full sequence, or two of which one is padded on the side asked for."""
    if padding == "none":
        return {"input_ids": tokens(length)}
    return {"input_ids": tokens(length, batch=2), "attention_mask": padding_mask(padding, length)}


def encoder_decoder_inputs(padding: str) -> dict:
    """Inputs of an encoder-decoder text model; padding applies to both sides."""
    inputs = text_inputs(padding)
    batch = inputs["input_ids"].shape[0]
    inputs["decoder_input_ids"] = tokens(TARGET_LEN, batch=batch, seed=3)
    if padding != "none":
        inputs["decoder_attention_mask"] = padding_mask(padding, TARGET_LEN, pad=9)
    return inputs


# ---------------------------------------------------------------------------------------------------- running


def flatten(output, prefix: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a nested output by its path, so that a difference can be named."""
    if isinstance(output, torch.Tensor):
        return {prefix or "output": output}
    if isinstance(output, dict):
        items = output.items()
    elif isinstance(output, list | tuple):
        items = enumerate(output)
    else:
        return {}
    found = {}
    for key, value in items:
        found.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return found


def run_transformers(model: nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    """One forward pass; hidden states are kept, so that a difference shows where it began."""
    extra = {} if getattr(model.config, "model_type", "") == "clip" else {"output_hidden_states": True}
    with torch.no_grad():
        return flatten(dict(model(**inputs, **extra)))


def run_module(model: nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    """One forward pass of a plain module."""
    with torch.no_grad():
        return flatten(model(**inputs))


@contextlib.contextmanager
def slow_path():
    """``nn.MultiheadAttention`` computes in Python instead of in the fused inference kernel of torch."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def run_slow_path(model: nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    """One forward pass of a module that holds ``nn.MultiheadAttention``."""
    with slow_path():
        return run_module(model, inputs)


# -------------------------------------------------------------------------------------------------- comparing


def equal_with_nan(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Bit for bit, a NaN being equal to a NaN."""
    if left.shape != right.shape or left.dtype != right.dtype or left.device != right.device:
        return False
    if not left.is_floating_point():
        return torch.equal(left, right)
    return torch.equal(left.isnan(), right.isnan()) and torch.equal(left.nan_to_num(), right.nan_to_num())


@contextlib.contextmanager
def by_rows(model: nn.Module, case: Case | None = None, **policy):
    """The model forced by rows, and back."""
    import attnpatch

    for cls in case.register if case else ():
        attnpatch.register(cls)
    with attnpatch.patched(model, mode="always", **policy):
        yield model


# -------------------------------------------------------------------------------------------------- the table


@dataclasses.dataclass(frozen=True)
class Case:
    """One architecture of the zoo.

    Attributes:
        name: What tests call it.
        make: ``make(implementation)`` builds the model with its own weights; use :meth:`build`.
        make_inputs: ``make_inputs(padding)`` gives the keyword arguments of one call, float32.
        implementations: Attention implementations that the class supports.
        paddings: Kinds of inputs there are.
        run: ``run(model, inputs)`` gives every output tensor by name.
        clean: Every product goes by rows: nothing has to be materialised for an operation.
        exact: Bit for bit. Not where a step rounds by the shape of what it is given: ``sigmoid`` treats the
            last few elements of a tensor apart, a product packs its right operand by its width.
        by_rows: At least one product goes by rows (false where the attention is not an attention).
        register: Classes attnpatch has to be told about.
        train: Whether the model stays in training mode (with dropout of zero).
        gain: Scale of the random weights.
        dtypes: What the host itself can run.
    """

    name: str
    make: Callable[[str], nn.Module]
    make_inputs: Callable[[str], dict] = text_inputs
    implementations: tuple[str, ...] = ("eager", "sdpa")
    paddings: tuple[str, ...] = TEXT_PADDINGS
    run: Callable[[nn.Module, dict], dict[str, torch.Tensor]] = run_transformers
    clean: bool = True
    exact: bool = True
    by_rows: bool = True
    register: tuple[type, ...] = ()
    train: bool = False
    gain: float = 1.4
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)

    def build(self, implementation: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A fresh model: same arguments, same weights."""
        # The constructor draws initial weights: from a fixed state, so that buffers repeat too.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.make(implementation or self.implementations[0])
        return randomise(model, gain=self.gain).to(dtype).train(self.train)

    def inputs(self, padding: str = "none", dtype: torch.dtype = torch.float32) -> dict:
        """Keyword arguments of one call; floats are cast to ``dtype``."""
        return {
            key: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for key, value in self.make_inputs(padding).items()
        }


def _transformers(class_name: str, config_name: str, **fields) -> Callable[[str], nn.Module]:
    """``make(implementation)`` of a transformers class; transformers is imported only when it is called."""

    def make(implementation: str) -> nn.Module:
        import transformers

        if not hasattr(transformers, config_name):
            pytest.skip(f"transformers {transformers.__version__} has no {config_name}")
        config = getattr(transformers, config_name)(**fields)
        config._attn_implementation = implementation
        kind = getattr(transformers, class_name)
        if implementation == "sdpa" and not kind._supports_sdpa:
            pytest.skip(f"{class_name} has no SDPA in transformers {transformers.__version__}")
        model = kind(config)
        assert model.config._attn_implementation == implementation
        return model

    return make


_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
}
_GPT = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BART = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
}
_DEBERTA = {
    **_ENCODER,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "max_relative_positions": 16,
    "position_biased_input": False,
}


def _whisper_inputs(padding: str) -> dict:
    del padding  # Whisper pads sound, not its mask.
    return {"input_features": floats(1, 16, 150), "decoder_input_ids": tokens(TARGET_LEN)}


def _clip_inputs(padding: str) -> dict:
    inputs = text_inputs(padding, length=TARGET_LEN)
    # CLIP reads the sentence at its end token: the largest id, which appears once.
    inputs["input_ids"][:, 30] = VOCAB - 1
    return {**inputs, "pixel_values": floats(inputs["input_ids"].shape[0], 3, 36, 36)}


def _xlnet_inputs(padding: str) -> dict:
    """Two-stream inputs: the last token is predicted from a query stream that does not see it."""
    inputs = text_inputs(padding)
    batch, length = inputs["input_ids"].shape
    perm_mask = torch.zeros(batch, length, length)
    perm_mask[:, :, -1] = 1.0
    target_mapping = torch.zeros(batch, 3, length)
    target_mapping[:, 0, -1] = target_mapping[:, 1, -5] = target_mapping[:, 2, 20] = 1.0
    return {**inputs, "perm_mask": perm_mask, "target_mapping": target_mapping, "use_mems": False}


TRANSFORMERS_CASES = [
    Case("llama", _transformers("LlamaForCausalLM", "LlamaConfig", **_DECODER)),
    Case("mistral", _transformers("MistralForCausalLM", "MistralConfig", **_DECODER, sliding_window=9)),
    Case(
        "gemma2",
        _transformers(
            "Gemma2ForCausalLM",
            "Gemma2Config",
            **_DECODER,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=11,
            attn_logit_softcapping=3.0,
        ),
        implementations=("eager",),
    ),
    Case(
        "gemma3",
        _transformers(
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            **_DECODER,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=11,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    Case(
        "gpt_oss",
        _transformers(
            "GptOssForCausalLM",
            "GptOssConfig",
            **_DECODER,
            head_dim=16,
            num_local_experts=3,
            num_experts_per_tok=2,
            experts_implementation="eager",  # the grouped one has no float64
            sliding_window=10,
        ),
        implementations=("eager",),
    ),
    Case("qwen2", _transformers("Qwen2ForCausalLM", "Qwen2Config", **_DECODER)),
    Case("qwen3", _transformers("Qwen3ForCausalLM", "Qwen3Config", **_DECODER, head_dim=16)),
    Case("gpt2", _transformers("GPT2LMHeadModel", "GPT2Config", **_GPT), gain=2.4),
    Case(
        "gpt2_upcast",  # reorder_and_upcast_attn: torch.baddbmm with autocast switched off inside the module
        _transformers(
            "GPT2LMHeadModel",
            "GPT2Config",
            **_GPT,
            reorder_and_upcast_attn=True,
            scale_attn_by_inverse_layer_idx=True,
        ),
        implementations=("eager",),
        gain=2.4,
    ),
    Case(
        "gptj",
        _transformers("GPTJForCausalLM", "GPTJConfig", **_GPT, rotary_dim=8),
        implementations=("eager",),
    ),
    Case(
        "gpt_neox",
        _transformers(
            "GPTNeoXForCausalLM",
            "GPTNeoXConfig",
            **{k: v for k, v in _DECODER.items() if "key_value" not in k},
        ),
    ),
    Case(
        "bloom",
        _transformers(
            "BloomForCausalLM", "BloomConfig", vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4
        ),
        implementations=("eager",),
    ),
    Case(
        "mpt",
        _transformers(
            "MptForCausalLM",
            "MptConfig",
            vocab_size=VOCAB,
            d_model=64,
            n_layers=2,
            n_heads=4,
            max_seq_len=1024,
        ),
        implementations=("eager",),
    ),
    Case(
        "falcon_alibi",
        _transformers(
            "FalconForCausalLM",
            "FalconConfig",
            vocab_size=VOCAB,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            alibi=True,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    Case(
        "opt",
        _transformers(
            "OPTForCausalLM",
            "OPTConfig",
            vocab_size=VOCAB,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=96,
            max_position_embeddings=1024,
            word_embed_proj_dim=64,
        ),
    ),
    Case("bert", _transformers("BertModel", "BertConfig", **_ENCODER)),
    Case("deberta", _transformers("DebertaModel", "DebertaConfig", **_DEBERTA), implementations=("eager",)),
    Case(
        "deberta_v2",
        _transformers(
            "DebertaV2Model",
            "DebertaV2Config",
            **_DEBERTA,
            share_att_key=True,
            position_buckets=8,
            norm_rel_ebd="layer_norm",
        ),
        implementations=("eager",),
    ),
    Case(
        "xlnet",
        _transformers(
            "XLNetLMHeadModel", "XLNetConfig", vocab_size=VOCAB, d_model=64, n_layer=2, n_head=4, d_inner=96
        ),
        implementations=("eager",),
        clean=False,  # its relative shift moves elements from row to row
    ),
    Case(
        "xlnet_two_streams",
        _transformers(
            "XLNetLMHeadModel", "XLNetConfig", vocab_size=VOCAB, d_model=64, n_layer=2, n_head=4, d_inner=96
        ),
        _xlnet_inputs,
        implementations=("eager",),
        clean=False,
        dtypes=(torch.float32,),  # transformers 5.23: the second stream leaves the positions in float32
    ),
    Case(
        "t5",
        _transformers(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=VOCAB,
            d_model=64,
            d_kv=16,
            d_ff=96,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=32,
            decoder_start_token_id=0,
        ),
        encoder_decoder_inputs,
        gain=0.8,  # T5 does not scale its scores
    ),
    Case(
        "bart",
        _transformers("BartForConditionalGeneration", "BartConfig", **_BART, max_position_embeddings=1024),
        encoder_decoder_inputs,
    ),
    Case(
        "whisper",
        _transformers(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **_BART,
            num_mel_bins=16,
            max_source_positions=75,
            max_target_positions=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=3,
        ),
        _whisper_inputs,
        paddings=("none",),
    ),
    Case(
        "vit",
        _transformers(
            "ViTModel",
            "ViTConfig",
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            image_size=36,
            patch_size=4,
        ),
        lambda padding: {"pixel_values": floats(2, 3, 36, 36)},
        paddings=("none",),
    ),
    Case(
        "clip",
        _transformers(
            "CLIPModel",
            "CLIPConfig",
            projection_dim=32,
            text_config={**_ENCODER, "eos_token_id": VOCAB - 1, "bos_token_id": 1},
            vision_config={
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 36,
                "patch_size": 4,
            },
        ),
        _clip_inputs,
        paddings=("none", "right"),
    ),
]


# --------------------------------------------------------------------------------- attention outside the hubs


class Layers(nn.Module):
    """Two residual attention layers: enough that an error in one reaches the next."""

    def __init__(self, attention: Callable[[], nn.Module], dim: int = 64):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.attentions = nn.ModuleList(attention() for _ in range(2))

    def forward(self, x, **kwargs):
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = x + attention(norm(x), **kwargs)
        return x


class _Projections(nn.Module):
    """The projections every research attention has."""

    def __init__(self, dim: int = 64, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def fold(self, x):
        """``[B, N, H*D]`` to ``[B*H, N, D]``."""
        batch, length, dim = x.shape
        x = x.view(batch, length, self.heads, dim // self.heads).permute(0, 2, 1, 3)
        return x.reshape(batch * self.heads, length, dim // self.heads)

    def unfold(self, x):
        """``[B*H, N, D]`` to ``[B, N, H*D]``."""
        _, length, head_dim = x.shape
        x = x.view(-1, self.heads, length, head_dim).permute(0, 2, 1, 3)
        return x.reshape(x.shape[0], length, self.heads * head_dim)

    def split(self, x):
        """``[B, N, H*D]`` to ``[B, H, N, D]``."""
        batch, length, dim = x.shape
        return x.view(batch, length, self.heads, dim // self.heads).transpose(1, 2)

    def join(self, x):
        """``[B, H, N, D]`` to ``[B, N, H*D]``."""
        return x.transpose(1, 2).flatten(2)

    def project(self, x, context=None):
        """Query, key and value, heads not split yet; ``context`` makes it a cross-attention."""
        context = x if context is None else context
        return self.to_q(x), self.to_k(context), self.to_v(context)


class EinsumAttention(_Projections):
    """The attention of a paper's code: heads folded into the batch, ``einsum`` for both products."""

    def forward(self, x, context=None, mask=None):
        query, key, value = map(self.fold, self.project(x, context))
        sim = torch.einsum("b i d, b j d -> b i j", query, key) * self.scale
        if mask is not None:
            sim.masked_fill_(
                mask.repeat_interleave(self.heads, 0)[:, None, :] == 0, -torch.finfo(sim.dtype).max
            )
        attn = sim.softmax(dim=-1)
        out = torch.einsum("b i j, b j d -> b i d", attn, value)
        return self.to_out(self.unfold(out))


class SequenceFirstAttention(_Projections):
    """Rows are not the axis before the last: ``einsum`` over ``[N, B, H, D]``."""

    def forward(self, x, context=None, mask=None):
        query, key, value = (
            t.unflatten(-1, (self.heads, -1)).transpose(0, 1) for t in self.project(x, context)
        )
        scores = torch.einsum("ibnd,jbnd->bnij", query * self.scale, key)
        if mask is not None:
            scores = scores - 1e4 * torch.einsum("jb->bj", 1 - mask.to(scores.dtype).t())[:, None, None, :]
        weights = torch.softmax(scores, dim=-1)
        out = torch.einsum("bnij,jbnd->ibnd", weights, value)
        return self.to_out(out.flatten(2).transpose(0, 1))


class RowsLastAttention(_Projections):
    """Scores are key by query, softmax runs over the axis before the last, then they are transposed."""

    def forward(self, x, context=None, mask=None):
        query, key, value = map(self.split, self.project(x, context))
        scores = torch.matmul(key, query.transpose(-1, -2)) * self.scale
        if mask is not None:
            scores = scores + (1.0 - mask.to(scores.dtype))[:, None, :, None] * -1e4
        weights = scores.softmax(dim=-2)
        return self.to_out(self.join(weights.transpose(-1, -2) @ value))


class BaddbmmAttention(_Projections):
    """As the ``AttnProcessor`` of diffusers: ``baddbmm`` onto an empty tensor or a mask."""

    def forward(self, x, context=None, mask=None):
        query, key, value = map(self.fold, self.project(x, context))
        if mask is None:
            base = torch.empty(
                query.shape[0], query.shape[1], key.shape[1], dtype=query.dtype, device=query.device
            )
            beta = 0
        else:
            base = ((1 - mask.to(query.dtype)) * -1e4)[:, None, :].repeat_interleave(self.heads, 0)
            base = base.expand(-1, query.shape[1], -1)
            beta = 1
        scores = torch.baddbmm(base, query, key.transpose(-1, -2), beta=beta, alpha=self.scale)
        probabilities = scores.float().softmax(dim=-1)
        del scores
        return self.to_out(self.unfold(torch.bmm(probabilities.to(value.dtype), value)))


class TalkingHeadsAttention(_Projections):
    """Heads are mixed before and after softmax: rows stay independent, heads do not."""

    def __init__(self, dim: int = 64, heads: int = 4):
        super().__init__(dim, heads)
        self.before = nn.Parameter(torch.eye(heads))
        self.after = nn.Parameter(torch.eye(heads))

    def forward(self, x, context=None, mask=None):
        query, key, value = map(self.split, self.project(x, context))
        scores = query @ key.transpose(-1, -2) * self.scale
        scores = torch.einsum("bhij,hg->bgij", scores, self.before)
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None, :] == 0, -1e4)
        weights = scores.softmax(-1)
        weights = torch.einsum("bhij,hg->bgij", weights, self.after)
        return self.to_out(self.join(weights @ value))


class LinearTalkingHeadsAttention(_Projections):
    """As CaiT: heads are mixed by ``nn.Linear`` on a permuted tensor."""

    def __init__(self, dim: int = 64, heads: int = 4):
        super().__init__(dim, heads)
        self.before = nn.Linear(heads, heads)
        self.after = nn.Linear(heads, heads)

    def forward(self, x, context=None, mask=None):
        query, key, value = map(self.split, self.project(x, context))
        scores = (query * self.scale) @ key.transpose(-2, -1)
        scores = self.before(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if mask is not None:
            scores = torch.where(
                mask[:, None, None, :].bool(), scores, torch.full((), -1e4, dtype=scores.dtype)
            )
        weights = self.after(scores.softmax(dim=-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.to_out(self.join(weights @ value))


class InPlaceAttention(_Projections):
    """Every step on the scores is in place."""

    def forward(self, x, context=None, mask=None):
        query, key, value = map(self.split, self.project(x, context))
        scores = torch.matmul(query, key.transpose(-1, -2))
        scores *= self.scale
        if mask is not None:
            scores += (1.0 - mask.to(scores.dtype))[:, None, None, :] * -50.0
            scores.masked_fill_(mask[:, None, None, :] == 0, -1e4)
        scores.sub_(0.5).div_(1.25).clamp_(min=-1e4)
        weights = scores.softmax(dim=-1)
        weights.mul_(1.5)
        return self.to_out(self.join(weights @ value))


class OverwritingAttention(_Projections):
    """Tensors that a pending graph reads are overwritten before it is used: what they were must count."""

    def forward(self, x, context=None, mask=None):
        query, key, value = map(self.split, self.project(x, context))
        query, key = query.clone(), key.clone()
        scores = torch.matmul(query, key.transpose(-1, -2)) * self.scale
        query.mul_(0.0)
        bias = torch.zeros(key.shape[-2], dtype=scores.dtype)
        if mask is not None:
            bias = (1.0 - mask.to(scores.dtype))[:, None, None, :] * -50.0
        other = torch.matmul(key, key.transpose(-1, -2)) * self.scale + bias
        bias += 3.0
        key[:, :, 1:3] = 7.0
        factor = torch.full((1,), 1.5, dtype=scores.dtype)
        weights = scores.softmax(dim=-1) * factor
        factor.zero_()
        view = value.transpose(-1, -2)
        out = weights @ value + other.softmax(dim=-1) @ value
        view.zero_()
        return self.to_out(self.join(out))


class ManualSoftmaxAttention(_Projections):
    """Softmax written out: subtract the maximum, ``exp``, divide by the sum."""

    def forward(self, x, context=None, mask=None):
        query, key, value = map(self.split, self.project(x, context))
        scores = query @ key.mT * self.scale
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :].bool(), -1e4)
        scores = scores - scores.amax(dim=-1, keepdim=True)
        weights = scores.exp()
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return self.to_out(self.join(torch.matmul(weights, value)))


class SigmoidAttention(_Projections):
    """Not a softmax at all; rows are independent all the same."""

    def forward(self, x, context=None, mask=None):
        query, key, value = map(self.split, self.project(x, context))
        scores = query @ key.transpose(-1, -2) * self.scale - math.log(key.shape[-2])
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None, :] == 0, float("-inf"))
        return self.to_out(self.join(torch.sigmoid(scores) @ value))


class NotAttention(_Projections):
    """Products that look like scores and are used as something else: a wrong guess is harmless."""

    def forward(self, x, context=None, mask=None):
        query, key, value = map(self.split, self.project(x, context))
        product = torch.matmul(query, key.transpose(-1, -2)) * self.scale
        symmetric = product + product.transpose(-1, -2)  # rows need columns
        first = product[:, :, 0, :].softmax(-1)  # one row, by index
        picked = product[..., torch.arange(0, product.shape[-2], 3), :].sum()
        largest = product.max().item() if product.abs().sum() > 0 else 1.0
        assert "tensor" in repr(product)
        along_rows = product.softmax(dim=-2)  # softmax over the row axis
        once = product.softmax(-1) @ value
        twice = product.tanh() @ value  # a second use of the same product
        covariance = torch.matmul(value.transpose(-1, -2), value)
        inverse = torch.linalg.solve(
            covariance.float() + torch.eye(covariance.shape[-1], device=x.device), covariance.float()
        ).to(x.dtype)
        out = once + twice + symmetric.softmax(-1) @ value + along_rows @ value + value @ inverse
        out = out + first.unsqueeze(-2) @ value + picked / product.numel() + value / (1.0 + abs(largest))
        rolled = torch.roll(product, 1, dims=-2)
        rolled[:, :, 3] = 0.25  # assignment into a part
        return self.to_out(
            self.join(out + rolled.softmax(-1) @ value + product.float().numpy(force=True).mean().item())
        )


class SdpaAttention(_Projections):
    """Research code that calls torch's fused attention itself."""

    def forward(self, x, context=None, mask=None):
        query, key, value = map(self.split, self.project(x, context))
        mask = None if mask is None else mask[:, None, None, :].bool()
        return self.to_out(self.join(F.scaled_dot_product_attention(query, key, value, attn_mask=mask)))


class SdpaCall(nn.Module):
    """One call of torch's attention, with whatever arguments it is given."""

    def __init__(self):
        super().__init__()
        self.attention = SdpaCallAttention()

    def forward(self, *args, **kwargs):
        return self.attention(*args, **kwargs)


class SdpaCallAttention(nn.Module):
    """The site inside :class:`SdpaCall`."""

    def forward(self, *args, **kwargs):
        return F.scaled_dot_product_attention(*args, **kwargs)


SDPA_CALL = Case("sdpa_call", lambda implementation: SdpaCall(), register=(SdpaCallAttention,))


def _research_inputs(padding: str) -> dict:
    if padding == "none":
        return {"x": floats(2, TEXT_LEN, 64)}
    if padding == "cross":
        return {"x": floats(2, TEXT_LEN, 64), "context": floats(2, 37, 64, seed=5)}
    return {"x": floats(2, TEXT_LEN, 64), "mask": padding_mask(padding, TEXT_LEN)}


def _research(attention: type, **fields) -> Case:
    return Case(
        name="".join("_" + c.lower() if c.isupper() else c for c in attention.__name__)[1:].removesuffix(
            "_attention"
        ),
        make=lambda implementation: Layers(attention),
        make_inputs=_research_inputs,
        implementations=("torch",),
        run=run_module,
        register=(attention,),
        **fields,
    )


_WITH_CROSS = ("none", "left", "right", "cross")
RESEARCH_CASES = [
    _research(EinsumAttention, paddings=_WITH_CROSS),
    _research(SequenceFirstAttention, paddings=_WITH_CROSS),
    _research(RowsLastAttention, exact=False, paddings=_WITH_CROSS),
    _research(BaddbmmAttention, paddings=_WITH_CROSS),
    _research(TalkingHeadsAttention, paddings=_WITH_CROSS),
    _research(LinearTalkingHeadsAttention, paddings=_WITH_CROSS),
    _research(InPlaceAttention, paddings=_WITH_CROSS),
    _research(OverwritingAttention),
    _research(ManualSoftmaxAttention, paddings=_WITH_CROSS),
    _research(SigmoidAttention, exact=False, paddings=_WITH_CROSS),
    _research(SdpaAttention, paddings=_WITH_CROSS),
    _research(NotAttention, paddings=("none",), clean=False, by_rows=False),
]


# ---------------------------------------------------------------------------------------- torch's own modules


class MultiheadLayers(nn.Module):
    """``nn.MultiheadAttention`` twice, with everything its constructor and its call can be asked for."""

    def __init__(self, call: dict | None = None, **fields):
        super().__init__()
        self.call = call or {}
        self.batch_first = fields.get("batch_first", False)
        self.attentions = nn.ModuleList(nn.MultiheadAttention(64, 4, **fields) for _ in range(2))

    def forward(self, x, context=None, key_padding_mask=None, attn_mask=None):
        if not self.batch_first:
            x = x.transpose(0, 1)
            context = None if context is None else context.transpose(0, 1)
        returned = []
        for attention in self.attentions:
            source = x if context is None else context
            out, weights = attention(
                x, source, source, key_padding_mask=key_padding_mask, attn_mask=attn_mask, **self.call
            )
            x = x + out
            returned.append(weights)
        return x, returned


def _multihead_inputs(padding: str, length: int = TEXT_LEN) -> dict:
    inputs = {"x": floats(2, length, 64)}
    if padding == "cross":
        inputs["context"] = floats(2, 37, 64, seed=5)
    elif padding == "causal":
        # As nn.Transformer.generate_square_subsequent_mask makes it.
        inputs["attn_mask"] = torch.full((length, length), float("-inf")).triu(1)
    elif padding != "none":
        inputs["key_padding_mask"] = padding_mask(padding, length) == 0
        # One mask per head, boolean: [B*H, N, N]; the diagonal stays open.
        drop = torch.rand(8, length, length, generator=torch.Generator().manual_seed(6)) < 0.2
        drop[:, torch.arange(length), torch.arange(length)] = False
        inputs["attn_mask"] = drop
        if padding == "left":
            # A padded query sees only padding: keep the first real key open, as hosts do.
            inputs["attn_mask"][:, :, 14] = False
    return inputs


def _multihead(
    name: str, call: dict | None = None, clean: bool = True, paddings=("none", "left", "cross"), **fields
):
    return Case(
        name=name,
        make=lambda implementation: MultiheadLayers(call, **fields),
        make_inputs=_multihead_inputs,
        implementations=("torch",),
        paddings=paddings,
        run=run_slow_path,
        clean=clean,
    )


class EncoderLayers(nn.Module):
    """Two ``nn.TransformerEncoderLayer``."""

    def __init__(self, **fields):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(64, 4, 96, dropout=0.0, batch_first=True, **fields) for _ in range(2)
        )

    def forward(self, x, src_mask=None, src_key_padding_mask=None):
        for layer in self.layers:
            x = layer(x, src_mask=src_mask, src_key_padding_mask=src_key_padding_mask)
        return x


def _encoder_layer_inputs(padding: str) -> dict:
    names = {"attn_mask": "src_mask", "key_padding_mask": "src_key_padding_mask"}
    return {names.get(key, key): value for key, value in _multihead_inputs(padding).items()}


def _encoder_layer(name: str, **fields) -> Case:
    train = fields.pop("train", False)
    return Case(
        name=name,
        make=lambda implementation: EncoderLayers(**fields),
        make_inputs=_encoder_layer_inputs,
        implementations=("torch",),
        paddings=("none", "right", "causal"),
        run=run_slow_path,
        train=train,
    )


TORCH_CASES = [
    _multihead("multihead_weights_mean", {"need_weights": True}, clean=False, batch_first=True),
    _multihead(
        "multihead_weights_per_head", {"need_weights": True, "average_attn_weights": False}, batch_first=True
    ),
    _multihead("multihead_no_weights", {"need_weights": False}, batch_first=True),
    _multihead("multihead_sequence_first", {"need_weights": False}),
    _multihead("multihead_sequence_first_weights", {"average_attn_weights": False}),
    _multihead(
        "multihead_bias_kv", {"average_attn_weights": False}, paddings=("none", "left"), add_bias_kv=True
    ),
    _multihead("multihead_zero_attn", {"need_weights": False}, paddings=("none", "left"), add_zero_attn=True),
    _encoder_layer("encoder_layer_eval"),
    _encoder_layer("encoder_layer_train", train=True, norm_first=True),
]

CASES = TRANSFORMERS_CASES + RESEARCH_CASES + TORCH_CASES
BY_NAME = {case.name: case for case in CASES}


@functools.lru_cache(maxsize=4)
def shared_model(name: str, implementation: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of the zoo, kept between the tests that use it one after another; leave it as it was."""
    return BY_NAME[name].build(implementation, dtype)


@contextlib.contextmanager
def watched_sdpa(on_call: Callable):
    """Calls ``on_call(args, kwargs)`` before each ``F.scaled_dot_product_attention``, composites included."""
    original = F.scaled_dot_product_attention

    @functools.wraps(original)
    def watching(*args, **kwargs):
        on_call(args, kwargs)
        return original(*args, **kwargs)

    F.scaled_dot_product_attention = watching
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
