"""Attention modules that other people wrote and published work unchanged: by rows, captured, and undone."""

import copy

import others
import pytest
import torch
import zoo
from test_block_maps_dense import assert_same, capturing, dense_map, select, token_blocks
from test_exact import assert_close, assert_identical, fused_causal_calls, snapshot
from torch.overrides import TorchFunctionMode

TILES = [(7, None), (33, 2), (None, None)]
ALL = [
    pytest.param(case, implementation, id=f"{case.name}-{implementation}")
    for case in others.OTHERS
    for implementation in case.implementations
]


@pytest.mark.parametrize(("case", "implementation"), ALL)
def test_by_rows(case, implementation):
    """The same bits for every padding and tile, nothing whole in memory, and no trace afterwards."""
    import attnpatch

    model = case.build(implementation)
    before = None
    for padding in case.paddings:
        inputs = case.inputs(padding)
        native, causal = fused_causal_calls(lambda inputs=inputs: case.run(model, inputs))
        # Only now: a first call fills caches (ALiBi's bias).
        before = before or snapshot(model)
        for rows, heads in TILES:
            what = f"{case.name} {implementation} {padding} rows={rows} heads={heads}"
            with zoo.by_rows(model, case, rows=rows, heads=heads):
                got = case.run(model, inputs)
                report = attnpatch.report(model)
            if causal:
                # As in test_exact: the fused causal kernel rounds otherwise than the same kernel on some rows.
                assert_close(got, native, what, torch.float32)
            else:
                assert_identical(got, native, what)
            assert (report.totals["by_rows"] > 0) == case.by_rows, f"{what}\n{report}"
            assert (report.totals["materialised"] == 0) == case.clean, f"{what}\n{report}"
        assert_identical(case.run(model, inputs), native, f"{case.name} after remove")
    assert snapshot(model) == before


class _Softmaxes(TorchFunctionMode):
    """Keeps the dense float64 probabilities of every attention call, in order."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "softmax" and args[0].dim() >= 3:
            # Some hosts ask softmax for float32 whatever comes in.
            self.found.append(args[0].double().softmax(args[1] if len(args) > 1 else kwargs["dim"]))
        elif name == "scaled_dot_product_attention":
            self.found.append(_dense(*args, **kwargs))
        return func(*args, **kwargs)


def _dense(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1)


CAPTURED = [
    "x_plain", "x_plain_flash", "x_encoder", "x_alibi", "x_t5_bias", "x_rotary", "x_softclamp", "x_qk_norm", "timm_vit"
]  # fmt: skip


@pytest.mark.parametrize("way", ["native", "rows"])
@pytest.mark.parametrize(("case", "implementation"), [p for p in ALL if p.values[0].name in CAPTURED])
def test_captured(case, implementation, way):
    """The block map is that of the model's own dense probabilities in float64, and outputs are what they were."""
    from attnpatch import Blocks

    model, inputs = case.build(implementation), case.inputs("none")
    native = case.run(model, inputs)
    with _Softmaxes() as dense:
        case.run(copy.deepcopy(model).double(), case.inputs("none", torch.float64))
    with capturing(model, way, blocks=Blocks.fixed(8), heads="all") as maps:
        got = case.run(model, inputs)
    if way == "native":
        assert_identical(got, native, f"capturing {case.name}")
    blocks = token_blocks(torch.ones(dense.found[0].shape[0], zoo.TEXT_LEN), zoo.TEXT_LEN, size=8)
    assert_same(maps.block_map, select(dense_map(dense.found, blocks, blocks), "all", None))


@pytest.mark.parametrize("way", ["native", "rows"])
@pytest.mark.parametrize("name", ["latent_diffusion", "einops"])
def test_einops_captured(name, way):
    """Self- and cross-attention written with einops: what the scores are folded into makes no difference."""
    from attnpatch import Blocks

    case = next(case for case in others.OTHERS if case.name == name)
    model, inputs = case.build(), case.inputs("none")
    with _Softmaxes() as dense:
        case.run(copy.deepcopy(model).double(), case.inputs("none", torch.float64))
    queries = token_blocks(None, zoo.TEXT_LEN, size=8)
    with capturing(model, way, blocks=Blocks.fixed(8), heads="all") as maps:
        case.run(model, inputs)
    for site, probabilities, length in zip(
        ("own", "other"), dense.found, (zoo.TEXT_LEN, zoo.TARGET_LEN), strict=True
    ):
        weights = probabilities.reshape(1, 4, zoo.TEXT_LEN, length)
        keys = token_blocks(None, length, size=8)
        assert_same(maps[site], select(dense_map([weights], queries, keys), "all", None))
