"""torch's C++ fast paths: taken apart for rows, the same to the last bit; left alone otherwise."""

import warnings

import pytest
import torch
import zoo
from torch import nn

import attnpatch


@pytest.fixture(autouse=True)
def fast_path():
    """The zoo switches it off; here it is what is tested."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(True)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def masks(kind, batch, length):
    padding = torch.zeros(batch, length, dtype=torch.bool)
    padding[0, length - 11 :] = True
    causal = torch.ones(length, length, dtype=torch.bool).triu(1)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "causal": {"attn_mask": causal},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
    }[kind]


@pytest.mark.parametrize("weights", [None, "mean", "heads"])
@pytest.mark.parametrize("kind", ["none", "padding", "causal", "both"])
def test_multihead_attention(kind, weights):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    nn.init.normal_(attention.in_proj_bias)
    model, x = nn.Sequential(attention), zoo.floats(2, 61, 64)
    call = {
        "need_weights": weights is not None,
        "average_attn_weights": weights == "mean",
        **masks(kind, 2, 61),
    }
    with torch.no_grad():
        native = attention(x, x, x, **call)
        with torch.profiler.profile() as profile:
            attention(x, x, x, **call)
        assert any("_native_multi_head_attention" in event.name for event in profile.events()), (
            "no fast path here"
        )
        with attnpatch.patched(model, mode="always", rows=7):
            got = attention(x, x, x, **call)
            totals = attnpatch.report(model).totals
    assert totals["by_rows"] == 1
    assert totals["materialised"] == 0
    assert torch.equal(got[0], native[0])
    assert weights is None or torch.equal(got[1] * 1, native[1])


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("masked", [False, True])
def test_encoder_layer(norm_first, activation, masked):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        64, 4, 96, batch_first=True, norm_first=norm_first, activation=activation
    ).eval()
    model, x = nn.Sequential(layer), zoo.floats(2, 61, 64)
    mask = masks("causal", 2, 61)["attn_mask"] if masked else None
    with torch.no_grad():
        native = layer(x, src_mask=mask)
        with attnpatch.patched(model, mode="always", rows=7):
            got = layer(x, src_mask=mask)
            assert attnpatch.report(model).totals["by_rows"] == 1
        with attnpatch.patched(model):
            assert torch.equal(layer(x, src_mask=mask), native)
            assert attnpatch.report(model).totals == {
                **dict.fromkeys(attnpatch.report(model).totals, 0),
                "native": 1,
            }
    assert torch.equal(got, native)


def test_nested_tensors_are_left_alone():
    """With padding torch's encoder packs the batch; that call stays native and is counted."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
    encoder, x = nn.TransformerEncoder(layer, 2).eval(), zoo.floats(2, 61, 64)
    padding = masks("padding", 2, 61)["key_padding_mask"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        native = encoder(x, src_key_padding_mask=padding)
        with attnpatch.patched(encoder, mode="always"):
            got = encoder(x, src_key_padding_mask=padding)
            assert attnpatch.report(encoder).totals["native"] == 2
    assert torch.equal(got, native)


def test_block_map_of_multihead_attention():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    model, x = nn.Sequential(attention), zoo.floats(2, 61, 64)
    with torch.no_grad():
        weights = attention(x, x, x)[1].double()
        with attnpatch.capture(model, blocks=attnpatch.Blocks.fixed(61)) as maps:
            attention(x, x, x)
        assert maps.block_map.mass.shape == (2, 1, 1, 1)
        with attnpatch.capture(model, blocks=attnpatch.Blocks.fixed(1)) as maps:
            attention(x, x, x)
    torch.testing.assert_close(maps.block_map.mass[:, 0].double(), weights, atol=1e-6, rtol=0)
