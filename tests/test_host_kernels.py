"""Kernels that transformers and diffusers hand query, key and value to: maps and weights beside them, and in their place.

The kernels are functions of numpy in float64, which no mode can look into, and torch's own FlexAttention.
"""

import sys
import types

import diffusers
import numpy as np
import pipelines
import pytest
import torch
import transformers
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry
from diffusers.models.attention_dispatch import attention_backend
from test_known_facts import WIDTH, captured, reduced, same
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask, sdpa_mask
from transformers.modeling_utils import AttentionInterface

import attnpatch
from attnpatch.hosts.tables import Replaced

SITES = "model.layers.*.self_attn"


def softmax(scores):
    powers = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e300))
    return powers / np.maximum(powers.sum(-1, keepdims=True), 1e-300)


def one_sequence(q, k, v, scale, causal, window, softcap, sinks=None, extra=None):
    """``[length, heads, width]`` arrays; the last query is at the place of the last key."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = np.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    if extra is not None:
        scores = scores + extra
    rows, keys = scores.shape[1:]
    place, key = np.arange(rows)[:, None] + keys - rows, np.arange(keys)
    if causal:
        scores = np.where(key > place, -np.inf, scores)
    left, right = window
    if left is not None and left >= 0:
        scores = np.where(key < place - left, -np.inf, scores)
    if right is not None and right >= 0:
        scores = np.where(key > place + right, -np.inf, scores)
    if sinks is not None:
        last = np.broadcast_to(sinks[:, None, None], (*scores.shape[:2], 1))
        return np.einsum("hqk,khd->qhd", softmax(np.concatenate([scores, last], -1))[..., :-1], v)
    return np.einsum("hqk,khd->qhd", softmax(scores), v)


def numbers(tensor):
    return tensor.detach().numpy().astype(np.float64)


CALLS = []


def flash_attn_func(
    q, k, v, softmax_scale=None, causal=False, qv=None, window_size=(-1, -1), softcap=0.0, s_aux=None
):
    CALLS.append("func")
    return torch.stack(
        [
            torch.from_numpy(
                one_sequence(*map(numbers, one), softmax_scale, causal, window_size, softcap, s_aux)
            ).to(q.dtype)
            for one in zip(q, k, v, strict=True)
        ]
    )


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, s_aux=None,
):  # fmt: skip
    CALLS.append("varlen")
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(queries) - 1):
        own, other = slice(*queries[i : i + 2]), slice(*keys[i : i + 2])
        found = one_sequence(
            *map(numbers, (q[own], k[other], v[other])), softmax_scale, causal, window_size, softcap
        )
        out[own] = torch.from_numpy(found).to(q.dtype)
    return out


@pytest.fixture(scope="module", autouse=True)
def flash_attention():
    """A module with the functions of flash-attn 3, which transformers imports without asking for a GPU."""
    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    module.flash_attn_with_kvcache = None
    sys.modules["flash_attn_interface"] = module
    yield
    del sys.modules["flash_attn_interface"]


SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "head_dim": 8,
}  # fmt: skip
MODELS = {
    "Llama": {},
    "Mistral": {"sliding_window": 9},
    "Gemma2": {"sliding_window": 12, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 2},
    "Qwen2": {},
}


def model_of(name, implementation):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **MODELS[name])
    config._attn_implementation = "eager" if implementation == "flash_attention_3" else implementation
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for part in model.modules():
        if hasattr(part, "config"):
            part.config._attn_implementation = implementation
    return model


def padding(kind, batch=2, length=40):
    mask = torch.ones(batch, length, dtype=torch.long)
    if kind == "left":
        mask[0, :7] = 0
    elif kind == "right":
        mask[1, -9:] = 0
    return None if kind == "none" else mask


def ids_of(batch=2, length=40):
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def positions(mask, row, length):
    """The positions of each block of a sequence, counted without padding."""
    own = list(range(length)) if mask is None else mask[row].nonzero().flatten().tolist()
    return [own[start : start + WIDTH] for start in range(0, len(own), WIDTH)]


def dense(name, ids, mask):
    """For each sequence ``[layers, blocks, blocks]``, from the eager model's own probabilities."""
    with torch.no_grad():
        seen = model_of(name, "eager")(ids, attention_mask=mask, output_attentions=True).attentions
    found = []
    for row in range(len(ids)):
        blocks = positions(mask, row, ids.shape[1])
        found.append(torch.stack([reduced(p[row], blocks, blocks) for p in seen]))
    return found


def assert_maps(maps, wanted):
    assert not maps.left_out, maps.left_out
    found = maps[SITES].mass
    for row, own in enumerate(wanted):
        count = own.shape[-1]
        same((found if len(wanted) == 1 else found[row])[:, :count, :count], own)


@pytest.mark.parametrize("kind", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_flash_attention_behind_transformers(name, kind):
    ids, mask = ids_of(), padding(kind)
    model = model_of(name, "flash_attention_3")
    CALLS.clear()
    native = model(ids, attention_mask=mask).logits
    assert ["varlen" if kind != "none" else "func"] * 2 == CALLS
    results = []
    maps = captured(model, lambda: results.append(model(ids, attention_mask=mask).logits))
    assert torch.equal(results[0], native), "capture has changed what the kernel computes"
    assert_maps(maps, dense(name, ids, mask))


@torch.no_grad()
def test_tokens_of_a_generation():
    ids = ids_of(1)
    run = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model = model_of("Mistral", "flash_attention_3")
    texts = []
    maps = captured(model, lambda: texts.append(model.generate(ids, **run)))
    whole = dense("Mistral", texts[0][:, :-1], None)
    assert_maps(maps, whole)


def test_packed_sequences_behind_transformers():
    """Positions that begin again: the sequences do not see each other."""
    ids = ids_of(1)
    places = torch.cat([torch.arange(16), torch.arange(24)])[None]
    model = model_of("Llama", "flash_attention_3")
    maps = captured(model, lambda: model(ids, position_ids=places, use_cache=False))
    eager = model_of("Llama", "eager")
    apart = [eager(part, output_attentions=True).attentions for part in (ids[:, :16], ids[:, 16:])]
    wanted = torch.zeros(2, 5, 5)
    for layer in range(2):
        for part, blocks, at in ((0, range(2), 0), (1, range(2, 5), 16)):
            cut = [list(range(b * WIDTH - at, (b + 1) * WIDTH - at)) for b in blocks]
            wanted[layer, blocks[0] : blocks[-1] + 1, blocks[0] : blocks[-1] + 1] = reduced(
                apart[part][layer][0].detach(), cut, cut
            )
    assert_maps(maps, [wanted])


@torch.no_grad()
def test_weights_that_a_kernel_does_not_return():
    ids, mask = ids_of(), padding("left")
    wanted = model_of("Gemma2", "eager")(ids, attention_mask=mask, output_attentions=True).attentions
    model = model_of("Gemma2", "flash_attention_3")
    with attnpatch.patched(model):
        found = model(ids, attention_mask=mask, output_attentions=True).attentions
    for one, other in zip(found, wanted, strict=True):
        rows = mask[:, None, :, None].bool()
        torch.testing.assert_close(one * rows, other * rows, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["none", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_in_place_of_a_kernel(name, kind):
    """Results and gradients are those of eager attention."""
    ids, mask = ids_of(), padding(kind)
    seen = slice(None) if mask is None else mask.bool()
    results = []
    for implementation in ("eager", "flash_attention_3"):
        model = model_of(name, implementation)
        if implementation != "eager":
            attnpatch.apply(model, replace_kernels=True)
        CALLS.clear()
        logits = model(ids, attention_mask=mask).logits[seen]
        logits.square().mean().backward()
        results.append((logits.detach(), model.model.layers[0].self_attn.q_proj.weight.grad))
        assert not CALLS
    torch.testing.assert_close(results[1][0], results[0][0], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(results[1][1], results[0][1], atol=1e-6, rtol=1e-4)


# ------------------------------------------------------------------------------------- functions that users register


def opaque(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention of numpy; its mask is one of transformers' bool masks, or ``None``: causal."""
    found = []
    for row in range(len(query)):
        q, k, v = (numbers(one[row].transpose(0, 1)) for one in (query, key, value))
        extra = None
        if attention_mask is not None:
            extra = np.where(attention_mask[row].numpy(), 0.0, -np.inf)
        found.append(one_sequence(q, k, v, scaling, attention_mask is None, (-1, -1), 0.0, extra=extra))
    return torch.from_numpy(np.stack(found)).to(query.dtype), None


def of_torch(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """A function of torch functions, as users write them."""
    group = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(group, 1) for one in (key, value))
    scores = (query @ key.transpose(-2, -1)) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    else:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return (weights @ value).transpose(1, 2).contiguous(), None


def wrong(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """It uses half the scale that it is given."""
    return opaque(module, query, key, value, attention_mask, scaling / 2)


for _name, _function, _mask in (
    ("opaque", opaque, sdpa_mask),
    ("of_torch", of_torch, sdpa_mask),
    ("wrong", wrong, sdpa_mask),
    ("wrong_mask", opaque, flash_attention_mask),
):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, _mask)


@pytest.mark.parametrize("kind", ["none", "left", "right"])
@pytest.mark.parametrize("implementation", ["opaque", "of_torch"])
def test_functions_of_users(implementation, kind):
    ids, mask = ids_of(), padding(kind)
    model = model_of("Llama", implementation)
    native = model(ids, attention_mask=mask).logits
    results = []
    maps = captured(model, lambda: results.append(model(ids, attention_mask=mask).logits))
    assert torch.equal(results[0], native)
    assert_maps(maps, dense("Llama", ids, mask))


def test_functions_of_torch_go_by_rows_as_ever():
    ids, model = ids_of(), model_of("Llama", "of_torch")
    native = model(ids).logits
    with attnpatch.patched(model, mode="always"):
        assert torch.equal(model(ids).logits, native)
        totals = attnpatch.report(model).totals
    assert totals["by_rows"] == 2 and totals["fused"] == 0


def test_a_kernel_that_computes_something_else():
    """Its arguments say one scale, its result another: the map would be wrong, so there is none."""
    ids, model = ids_of(), model_of("Llama", "wrong")
    native = model(ids).logits
    results = []
    maps = captured(model, lambda: results.append(model(ids).logits))
    assert torch.equal(results[0], native)
    assert len(maps) == 0 and len(maps.left_out) == 2
    assert all("wrong" in why and "differs by" in why for why in maps.left_out.values())


def test_the_table_is_as_before():
    table = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    before = dict(table._global_mapping)
    model = model_of("Llama", "opaque")
    during = []

    def function(*args, **kwargs):
        during.append(table["opaque"])
        return opaque(*args, **kwargs)

    AttentionInterface.register("noting", function)
    AttentionMaskInterface.register("noting", sdpa_mask)
    before["noting"] = function
    model.config._attn_implementation = "noting"
    for _ in range(2):
        captured(model, lambda: model(ids_of()))
    assert during and during[0] is not opaque
    # Always the same function: with another one, compiled code would be compiled again.
    assert len(set(during)) == 1
    assert dict(table._global_mapping) == before
    del table._global_mapping["noting"], AttentionMaskInterface._global_mapping["noting"]


def test_a_table_is_as_before_if_a_function_cannot_be_replaced():
    """And the functions are replaced again by the next call."""
    broken = [True]

    def replacement(key, function):
        if key == "second" and broken[0]:
            raise MemoryError
        return "ours"

    table, given = {"first": "theirs", "second": "theirs"}, Replaced(replacement)
    with pytest.raises(MemoryError), given.inside(table):
        pass
    assert table == {"first": "theirs", "second": "theirs"}
    broken[0] = False
    with given.inside(table):
        assert table == {"first": "ours", "second": "ours"}
    assert table == {"first": "theirs", "second": "theirs"}


# -------------------------------------------------------------------------------------------------------- diffusers


def back_end(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, _parallel_config=None
):
    CALLS.append("back end")
    found = [
        one_sequence(*map(numbers, one), scale, is_causal, (-1, -1), 0.0)
        for one in zip(query, key, value, strict=True)
    ]
    return torch.from_numpy(np.stack(found)).to(query.dtype)


@pytest.fixture
def xformers_back_end(monkeypatch):
    """A kernel of numpy in the place of a back end whose package is not installed."""
    name = diffusers.models.attention_dispatch.AttentionBackendName.XFORMERS
    monkeypatch.setitem(Registry._backends, name, back_end)
    monkeypatch.setitem(Registry._supported_arg_names, name, {"query", "key", "value", "attn_mask", "scale"})
    monkeypatch.setitem(Registry._constraints, name, [])
    monkeypatch.setattr(Registry, "_active_backend", name)
    yield


@torch.no_grad()
def test_images_beside_a_back_end(xformers_back_end, monkeypatch):
    pipe = pipelines.build("flux")
    CALLS.clear()
    call = {"prompt": pipelines.PROMPT, "num_inference_steps": 2, "output_type": "latent", **pipelines.SIZE}
    pipe.set_progress_bar_config(disable=True)

    def run():
        return pipe(generator=torch.Generator().manual_seed(0), **call)[0]

    native = run()
    assert "back end" in CALLS
    with attnpatch.capture(pipe) as maps:
        assert torch.equal(run(), native)
    monkeypatch.setattr(
        Registry, "_active_backend", diffusers.models.attention_dispatch.AttentionBackendName.NATIVE
    )
    with attnpatch.capture(pipe) as wanted:
        run()
    assert not maps.left_out and not wanted.left_out
    assert maps.keys() == wanted.keys()
    for word in pipelines.PROMPT.split():
        found, expected = (torch.as_tensor(each.heat_map(word)) for each in (maps, wanted))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_flex_of_diffusers_by_rows():
    """Without a compiler it holds all scores; so it goes by rows when memory is short."""
    pipe = pipelines.build("flux")
    model = pipe.transformer.eval()
    inputs = {
        "hidden_states": torch.randn(1, 64, model.config.in_channels),
        "encoder_hidden_states": torch.randn(1, 12, model.config.joint_attention_dim),
        "pooled_projections": torch.randn(1, model.config.pooled_projection_dim),
        "timestep": torch.tensor([1.0]), "img_ids": torch.zeros(64, 3), "txt_ids": torch.zeros(12, 3),
    }  # fmt: skip
    if model.config.guidance_embeds:
        inputs["guidance"] = torch.tensor([1.0])
    native = model(**inputs)[0]
    with attention_backend("flex"), attnpatch.patched(model, mode="always"):
        found = model(**inputs)[0]
        totals = attnpatch.report(model).totals
    torch.testing.assert_close(found, native, atol=1e-5, rtol=1e-5)
    assert totals["by_rows"] > 0 and totals["fused"] == 0
