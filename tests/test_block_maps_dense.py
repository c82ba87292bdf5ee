"""Block maps equal those that dense eager attention weights give in float64."""

import contextlib

import numpy as np
import pytest
import torch
import zoo
from torch import nn

# What a map of a float32 model may be off by: its probabilities are float32, the sums of them better.
TOLERANCE = 1e-6


def dense_weights(name: str, inputs: dict) -> dict[str, list[torch.Tensor]]:
    """Attention weights of an unpatched eager copy, by kind of attention, one ``[B, H, q, k]`` per layer."""
    model = zoo.BY_NAME[name].build("eager")
    with torch.no_grad():
        output = model(**inputs, output_attentions=True)
    return {key: list(value) for key, value in dict(output).items() if "attentions" in key}


def token_blocks(mask, length: int, size=None, spans=None) -> list[list[list[int]]]:
    """Positions of each block of each sequence; tokens are counted without padding, as ``Blocks`` has it."""
    found = []
    for row in mask if mask is not None else [torch.ones(length)]:
        positions = row.nonzero().flatten().tolist()
        edges = spans or [(i, min(i + size, len(positions))) for i in range(0, len(positions), size)]
        found.append([positions[start:end] for start, end in edges])
    return found


def dense_map(weights: list[torch.Tensor], queries, keys) -> np.ndarray:
    """``[B, L, H, query_blocks, key_blocks]`` float64, from the definition; NaN where no block is."""
    batch, heads = weights[0].shape[:2]
    shape = batch, len(weights), heads, max(map(len, queries)), max(map(len, keys))
    result = np.full(shape, np.nan)
    for layer, attention in enumerate(weights):
        for b in range(batch):
            matrix = attention[b].double().numpy()
            for i, rows in enumerate(queries[b]):
                for j, columns in enumerate(keys[b]):
                    block = matrix[:, rows][:, :, columns]
                    result[b, layer, :, i, j] = block.sum(-1).mean(-1)
    return result


def select(expected: np.ndarray, heads, layers) -> np.ndarray:
    """What of all layers and heads was asked for, in the layout of ``BlockMap.to_numpy``."""
    if layers is not None:
        expected = expected[:, layers]
    if heads == "mean":
        expected = expected.mean(2)
    elif heads != "all":
        expected = expected[:, :, heads]
    return expected[0] if expected.shape[0] == 1 else expected


def assert_same(block_map, expected: np.ndarray) -> None:
    """Equal where there is a block, empty where there is none, and every row with its missing mass is 1."""
    got = block_map.to_numpy()
    assert got.shape == expected.shape
    there = ~np.isnan(expected)
    assert np.abs(got[there] - expected[there]).max() <= TOLERANCE
    assert (np.nan_to_num(got[~there]) == 0).all(), "a block that does not exist has mass"
    exists = there.any(-1)
    missing = np.asarray(block_map.unassigned_mass, dtype=np.float64).reshape(exists.shape)
    row_sums = np.nan_to_num(got).sum(-1) + missing
    assert np.abs(row_sums[exists] - 1).max() <= TOLERANCE


@contextlib.contextmanager
def capturing(model: nn.Module, way: str, **kwargs):
    """Captures while attention runs natively, or while it is forced by rows."""
    import attnpatch

    with contextlib.ExitStack() as stack:
        if way == "rows":
            stack.enter_context(attnpatch.patched(model, mode="always", rows=32, heads=2))
        yield stack.enter_context(attnpatch.capture(model, **kwargs))


def captured(name, implementation, inputs, way="native", **kwargs):
    """The maps of one forward pass; the outputs are those of the model without attnpatch."""
    case = zoo.BY_NAME[name]
    model = case.build(implementation)
    native = case.run(model, inputs)
    with capturing(model, way, **kwargs) as maps:
        got = case.run(model, inputs)
    if way == "native":
        for key, tensor in native.items():
            assert zoo.equal_with_nan(got[key], tensor), f"capturing changed {key}"
    return maps


SELF_ATTENTION = [
    (name, implementation, padding)
    for name in ("llama", "gemma2", "gpt_oss", "bert", "mistral", "qwen3")
    for implementation in zoo.BY_NAME[name].implementations
    for padding in zoo.TEXT_PADDINGS
]


@pytest.mark.parametrize("way", ["native", "rows"])
@pytest.mark.parametrize(("name", "implementation", "padding"), SELF_ATTENTION)
def test_self_attention(name, implementation, padding, way):
    """Blocks of eight tokens, heads averaged, every padding: padding belongs to no block."""
    from attnpatch import Blocks

    inputs = zoo.BY_NAME[name].inputs(padding)
    maps = captured(name, implementation, inputs, way, blocks=Blocks.fixed(8), heads="mean")
    blocks = token_blocks(inputs.get("attention_mask"), zoo.TEXT_LEN, size=8)
    expected = dense_map(dense_weights(name, inputs)["attentions"], blocks, blocks)
    assert_same(maps.block_map, select(expected, "mean", None))


@pytest.mark.parametrize("way", ["native", "rows"])
@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("heads", ["mean", "all", [0, 2]])
@pytest.mark.parametrize(
    ("name", "implementation"), [("llama", "eager"), ("llama", "sdpa"), ("gpt_oss", "eager")]
)
def test_heads_and_layers(name, implementation, heads, layers, way):
    """Any choice of heads and layers."""
    from attnpatch import Blocks

    inputs = zoo.BY_NAME[name].inputs("left")
    maps = captured(name, implementation, inputs, way, blocks=Blocks.fixed(8), heads=heads, layers=layers)
    blocks = token_blocks(inputs["attention_mask"], zoo.TEXT_LEN, size=8)
    expected = dense_map(dense_weights(name, inputs)["attentions"], blocks, blocks)
    assert_same(maps.block_map, select(expected, heads, layers))


SPANS = [(0, 5), (5, 6), (10, 25), (26, 40)]


@pytest.mark.parametrize("padding", zoo.TEXT_PADDINGS)
@pytest.mark.parametrize(
    ("name", "implementation"), [("llama", "sdpa"), ("llama", "eager"), ("bert", "sdpa"), ("gemma2", "eager")]
)
def test_spans_with_gaps(name, implementation, padding):
    """Uneven blocks with tokens in between that belong to none: what those take is missing mass."""
    from attnpatch import Blocks

    inputs = zoo.BY_NAME[name].inputs(padding)
    maps = captured(name, implementation, inputs, blocks=Blocks.spans(SPANS), heads="all")
    blocks = token_blocks(inputs.get("attention_mask"), zoo.TEXT_LEN, spans=SPANS)
    expected = dense_map(dense_weights(name, inputs)["attentions"], blocks, blocks)
    assert_same(maps.block_map, select(expected, "all", None))


@pytest.mark.parametrize("size", [1, 7, 101, 1000])
def test_block_sizes(size):
    """One token per block up to one block for all."""
    from attnpatch import Blocks

    inputs = zoo.BY_NAME["llama"].inputs("none")
    maps = captured("llama", "sdpa", inputs, blocks=Blocks.fixed(size), heads="all")
    blocks = token_blocks(None, zoo.TEXT_LEN, size=size)
    expected = dense_map(dense_weights("llama", inputs)["attentions"], blocks, blocks)
    assert_same(maps.block_map, select(expected, "all", None))


def test_learned_sinks_are_missing_mass():
    """gpt-oss: what its sinks took, block by block and head by head."""
    from attnpatch import Blocks

    inputs = zoo.BY_NAME["gpt_oss"].inputs("right")
    maps = captured("gpt_oss", "eager", inputs, blocks=Blocks.fixed(8), heads="all")
    blocks = token_blocks(inputs["attention_mask"], zoo.TEXT_LEN, size=8)
    weights = dense_weights("gpt_oss", inputs)["attentions"]
    expected = dense_map(weights, blocks, blocks)
    # Every key is in a block, so what a row lacks is the sinks'.
    taken = 1 - np.nansum(expected, axis=-1)
    exists = ~np.isnan(expected).all(-1)
    missing = np.asarray(maps.block_map.unassigned_mass, dtype=np.float64).reshape(taken.shape)
    assert np.abs(missing[exists] - taken[exists]).max() <= TOLERANCE
    assert taken[exists].max() > 0.05, "the sinks of this model take nothing: the test shows nothing"


@pytest.mark.parametrize("way", ["native", "rows"])
@pytest.mark.parametrize("padding", zoo.TEXT_PADDINGS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_t5(implementation, padding, way):
    """Encoder, decoder and cross-attention: a map for each kind of site, with the blocks of either side."""
    from attnpatch import Blocks

    inputs = zoo.BY_NAME["t5"].inputs(padding)
    maps = captured("t5", implementation, inputs, way, blocks=Blocks.fixed(8), heads="all")
    source = token_blocks(inputs.get("attention_mask"), zoo.TEXT_LEN, size=8)
    target = token_blocks(inputs.get("decoder_attention_mask"), zoo.TARGET_LEN, size=8)
    weights = dense_weights("t5", inputs)
    for pattern, kind, queries, keys in [
        ("encoder.block.*.layer.0.SelfAttention", "encoder_attentions", source, source),
        ("decoder.block.*.layer.0.SelfAttention", "decoder_attentions", target, target),
        ("decoder.block.*.layer.1.EncDecAttention", "cross_attentions", target, source),
    ]:
        assert_same(maps[pattern], select(dense_map(weights[kind], queries, keys), "all", None))


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_low_precision_models(implementation, dtype):
    """A bfloat16 model: the map is that of its own bfloat16 weights, summed in float32 or better."""
    from attnpatch import Blocks

    case = zoo.BY_NAME["llama"]
    inputs = case.inputs("left")
    model = case.build(implementation, dtype)
    with capturing(model, "native", blocks=Blocks.fixed(8), heads="all", layers=[0]) as maps:
        case.run(model, inputs)
    with torch.no_grad():
        weights = case.build("eager", dtype)(**inputs, output_attentions=True).attentions[:1]
    blocks = token_blocks(inputs["attention_mask"], zoo.TEXT_LEN, size=8)
    expected = select(dense_map(weights, blocks, blocks), "all", None)
    got = maps.block_map.to_numpy()
    there = ~np.isnan(expected)
    # Eager weights are bfloat16 themselves: each is off by half a unit of its last place at most. SDPA's
    # scores are float32 where eager rounds them: a score of size s moves its probability by eps * s.
    slack = torch.finfo(dtype).eps * (0.5 if implementation == "eager" else 16)
    assert np.abs(got[there] - expected[there]).max() <= slack


def test_repeated_calls_and_the_pattern():
    """A model whose sites share one pattern has that one map, under its pattern too."""
    from attnpatch import Blocks

    inputs = zoo.BY_NAME["llama"].inputs("none")
    maps = captured("llama", "sdpa", inputs, blocks=Blocks.fixed(8))
    assert np.array_equal(maps["model.layers.*.self_attn"].to_numpy(), maps.block_map.to_numpy())


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("name", "implementation"), [("llama", "eager"), ("llama", "sdpa"), ("gemma2", "eager")]
)
def test_generation_adds_to_one_map(name, implementation, cache):
    """Prompt and generated tokens, one at a time from a cache: the map of one pass over all of them."""
    from attnpatch import Blocks

    inputs = zoo.BY_NAME[name].inputs("left")
    model = zoo.BY_NAME[name].build(implementation)
    with capturing(model, "native", blocks=Blocks.fixed(8), heads="all") as maps:
        tokens = model.generate(
            **inputs,
            max_new_tokens=6,
            do_sample=False,
            cache_implementation="static" if cache == "static" else None,
        )
    # The last token was chosen and never attended from.
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 5, dtype=torch.long)], dim=1)
    whole = {"input_ids": tokens[:, :-1], "attention_mask": mask}
    blocks = token_blocks(mask, mask.shape[1], size=8)
    expected = dense_map(dense_weights(name, whole)["attentions"], blocks, blocks)
    assert_same(maps.block_map, select(expected, "all", None))
