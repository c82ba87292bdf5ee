"""Models that other people wrote, built small from the packages they publish."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types

import einops
import torch
import zoo
from einops import rearrange, repeat
from torch import nn
from zoo import Case, floats

# What the packages read pictures and average weights with; no model of theirs needs it to run.
_ABSENT = ("torchvision", "pytorch_fid", "ema_pytorch", "scipy")


class _AnyName(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Absent(types.ModuleType):
    __path__: tuple = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = _AnyName(name, (), {})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in _ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Absent(spec.name)

    def exec_module(self, module):
        pass


@contextlib.contextmanager
def without_pictures():
    """Packages that import torchvision can be imported: its wheels load beside builds of torch for CUDA only.

    Afterwards it is absent again, so that transformers and diffusers do not take it for the real one.
    """
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _Absent)]:
            del sys.modules[name]


def _x_transformers(flash: bool = False, decoder: bool = True, cross: bool = False, **options):
    def make(implementation: str) -> nn.Module:
        from x_transformers import Decoder, Encoder, TransformerWrapper

        del implementation
        kind = Decoder if decoder else Encoder
        layers = kind(dim=64, depth=2, heads=4, attn_dim_head=16, attn_flash=flash, **options)
        return TransformerWrapper(num_tokens=zoo.VOCAB, max_seq_len=256, attn_layers=layers)

    return make


def _x_inputs(padding: str) -> dict:
    if padding == "none":
        return {"x": zoo.tokens(zoo.TEXT_LEN)}
    mask = zoo.padding_mask(padding, zoo.TEXT_LEN).bool()
    return {"x": zoo.tokens(zoo.TEXT_LEN, batch=2), "mask": mask}


def _perceiver(implementation: str) -> nn.Module:
    from perceiver_pytorch import Perceiver

    return Perceiver(
        num_freq_bands=4,
        depth=2,
        max_freq=8.0,
        input_channels=5,
        input_axis=1,
        num_latents=37,
        latent_dim=48,
        cross_heads=2,
        latent_heads=4,
        cross_dim_head=16,
        latent_dim_head=16,
        num_classes=10,
    )


def _perceiver_inputs(padding: str) -> dict:
    if padding == "none":
        return {"data": floats(1, zoo.TEXT_LEN, 5)}
    return {
        "data": floats(2, zoo.TEXT_LEN, 5),
        "mask": zoo.padding_mask(padding, zoo.TEXT_LEN).bool(),
    }


def _unet(flash: bool):
    def make(implementation: str) -> nn.Module:
        with without_pictures():
            from denoising_diffusion_pytorch import Unet

        return Unet(dim=16, dim_mults=(1, 2), flash_attn=flash, full_attn=(False, True), attn_dim_head=16)

    return make


def _linear_attention(implementation: str) -> nn.Module:
    with without_pictures():
        from denoising_diffusion_pytorch.denoising_diffusion_pytorch import LinearAttention

    return nn.Sequential(*[LinearAttention(32, dim_head=16) for _ in range(2)])


def _timm(name: str, **options):
    def make(implementation: str) -> nn.Module:
        with without_pictures():
            import timm
            from timm.layers import set_fused_attn

        set_fused_attn(implementation == "sdpa")
        try:
            return timm.create_model(name, num_classes=10, **options)
        finally:
            set_fused_attn(True)

    return make


class Cross(nn.Module):
    """Torch's own decoder over a memory."""

    def __init__(self, norm_first: bool):
        super().__init__()
        layer = nn.TransformerDecoderLayer(64, 4, 96, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, x, memory):
        return self.decoder(x, memory)


def _encoder(norm_first: bool):
    def make(implementation: str) -> nn.Module:
        layer = nn.TransformerEncoderLayer(64, 4, 96, dropout=0.0, batch_first=True, norm_first=norm_first)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    return make


def _encoder_inputs(padding: str) -> dict:
    if padding == "none":
        return {"src": floats(1, zoo.TEXT_LEN, 64)}
    mask = zoo.padding_mask(padding, zoo.TEXT_LEN) == 0
    return {"src": floats(2, zoo.TEXT_LEN, 64), "src_key_padding_mask": mask}


class CrossAttention(nn.Module):
    """The attention of latent diffusion, as its authors wrote it: heads folded into the batch by ``rearrange``."""

    def __init__(
        self, query_dim: int = 64, context_dim: int | None = None, heads: int = 4, dim_head: int = 16
    ):
        super().__init__()
        inner_dim = dim_head * heads
        context_dim = query_dim if context_dim is None else context_dim
        self.scale = dim_head**-0.5
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, query_dim), nn.Dropout(0.0))

    def forward(self, x, context=None, mask=None):
        h = self.heads
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (rearrange(t, "b n (h d) -> (b h) n d", h=h) for t in (q, k, v))
        sim = torch.einsum("b i d, b j d -> b i j", q, k) * self.scale
        if mask is not None:
            mask = rearrange(mask, "b ... -> b (...)")
            mask = repeat(mask, "b j -> (b h) () j", h=h)
            sim.masked_fill_(~mask, -torch.finfo(sim.dtype).max)
        attn = sim.softmax(dim=-1)
        out = torch.einsum("b i j, b j d -> b i d", attn, v)
        out = rearrange(out, "(b h) n d -> b n (h d)", h=h)
        return self.to_out(out)


class EinopsAttention(CrossAttention):
    """Every function of einops on the scores: ``einsum``, ``rearrange``, ``reduce``, ``repeat``, ``pack``."""

    def forward(self, x, context=None, mask=None):
        h = self.heads
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=h) for t in (q, k, v))
        sim = einops.einsum(q, k, "b h i d, b h j d -> b h i j") * self.scale
        sim, packed = einops.pack([sim], "* i j")
        sim = sim - einops.reduce(sim, "n i j -> n i 1", "max")
        (sim,) = einops.unpack(sim, packed, "* i j")
        sim = repeat(sim, "b h i j -> b h i j 1")
        sim = rearrange(sim, "b h i j 1 -> j b i h")
        if mask is not None:
            sim = sim.masked_fill(~rearrange(mask, "b j -> j b 1 1"), -torch.finfo(sim.dtype).max)
        sim = rearrange(sim, "j b i h -> b (h i) j")
        attn = sim.softmax(dim=-1)
        attn = rearrange(attn, "b (h i) j -> b h i j", h=h)
        attn = einops.reduce(repeat(attn, "b h i j -> b h r i j", r=2), "b h r i j -> b h i j", "mean")
        out = einops.einsum(attn, v, "b h i j, b h j d -> b h i d")
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class Blocks(nn.Module):
    """Self-attention, then attention to a context of another length."""

    def __init__(self, kind: type[nn.Module]):
        super().__init__()
        self.own, self.other = kind(), kind(context_dim=48)

    def forward(self, x, context, mask=None):
        x = x + self.own(x)
        return x + self.other(x, context, mask)


def _context_inputs(padding: str) -> dict:
    batch = 1 if padding == "none" else 2
    inputs = {"x": floats(batch, zoo.TEXT_LEN, 64), "context": floats(batch, zoo.TARGET_LEN, 48, seed=3)}
    if padding != "none":
        inputs["mask"] = zoo.padding_mask(padding, zoo.TARGET_LEN).bool()
    return inputs


def _images(side: int, channels: int = 3, **more):
    return lambda padding: {"x": floats(2, channels, side, side), **more}


def _case(name, make, inputs=_x_inputs, paddings=("none", "right"), implementations=("own",), **more) -> Case:
    return Case(
        name,
        make,
        inputs,
        implementations=implementations,
        paddings=paddings,
        run=zoo.run_module,
        dtypes=(torch.float32,),
        **more,
    )


_X = {
    "plain": {},
    "encoder": {"decoder": False},
    "alibi": {"alibi_pos_bias": True, "alibi_num_heads": 2},
    "t5_bias": {"rel_pos_bias": True},
    "dynamic_bias": {"dynamic_pos_bias": True, "dynamic_pos_bias_log_distance": False},
    "rotary": {"rotary_pos_emb": True},
    "memory_keys": {"attn_num_mem_kv": 5},
    "qk_norm": {"attn_qk_norm": True},
    "one_key_head": {"attn_one_kv_head": True},
    "sparse_topk": {"attn_sparse_topk": 8},
    "softclamp": {"attn_softclamp_logits": True},
    "learned_sink": {"attn_head_learned_sink": True},
    "talking_heads": {"attn_pre_talking_heads": True, "attn_post_talking_heads": True},
    "residual": {"residual_attn": True},
    "gated": {"attn_gate_values": True},
}
_FLASH = ("plain", "encoder", "alibi", "rotary", "memory_keys")
OTHERS = [
    *[_case(f"x_{name}", _x_transformers(**options)) for name, options in _X.items()],
    # What a row may see depends on the rows before it: no attention whose rows are independent.
    # Its gate is summed over the rows before it: made whole, and counted so instead of as by rows.
    _case("x_selective", _x_transformers(attn_selective=True), clean=False, by_rows=False),
    *[_case(f"x_{name}_flash", _x_transformers(flash=True, **_X[name])) for name in _FLASH],
    _case("latent_diffusion", lambda _: Blocks(CrossAttention), _context_inputs),
    _case("einops", lambda _: Blocks(EinopsAttention), _context_inputs),
    _case("perceiver", _perceiver, _perceiver_inputs),
    # Its linear attention multiplies keys with values first: a product that was put off for nothing.
    _case("ddpm_unet", _unet(False), _images(16, time=torch.tensor([3, 500])), ("none",), clean=False),
    _case("ddpm_unet_flash", _unet(True), _images(16, time=torch.tensor([3, 500])), ("none",), clean=False),
    _case(
        "ddpm_linear_attention",
        _linear_attention,
        lambda _: {"input": floats(2, 32, 11, 11)},
        ("none",),
        clean=False,
        by_rows=False,
    ),
    _case(
        "timm_vit",
        _timm("vit_tiny_patch16_224", img_size=40, patch_size=4, depth=2, embed_dim=64, num_heads=4),
        _images(40),
        ("none",),
        ("eager", "sdpa"),
    ),
    _case(
        "timm_swin",
        _timm(
            "swin_tiny_patch4_window7_224",
            img_size=56,
            embed_dim=16,
            depths=(2, 2),
            num_heads=(2, 4),
            window_size=7,
        ),
        _images(56),
        ("none",),
        ("eager", "sdpa"),
    ),
    _case("torch_encoder", _encoder(False), _encoder_inputs),
    _case("torch_encoder_norm_first", _encoder(True), _encoder_inputs),
    _case(
        "torch_decoder",
        lambda _: Cross(False),
        lambda _: {"x": floats(2, zoo.TARGET_LEN, 64), "memory": floats(2, zoo.TEXT_LEN, 64, seed=3)},
        ("none",),
    ),
]
