"""Forced by rows, every model of the zoo gives the bits that it gives unpatched, and is as it was afterwards.

Tiles of one head are left out of the comparisons of bits: there a matrix product may take another kernel.
"""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import by_rows, equal_with_nan

# (rows, heads): remainders, tiles of heads, a last row left alone, whatever the budget says.
TILES = [(7, None), (33, 2), (zoo.TEXT_LEN - 1, None), (None, None)]
DTYPES = [torch.float32, torch.bfloat16]
MANY = {"deberta", "deberta_v2", "t5", "bart", "xlnet_two_streams"}
COMBINATIONS = [
    pytest.param(
        case,
        implementation,
        dtype,
        id=f"{case.name}-{implementation}-{str(dtype)[6:]}",
        # Of these the steps are many; the same steps in one of two dtypes.
        marks=[pytest.mark.long] if case.name in MANY and dtype is not torch.float32 else [],
    )
    for case in zoo.CASES
    for implementation in case.implementations
    for dtype in case.dtypes
]


def assert_identical(got: dict, expected: dict, what: str) -> None:
    """Every named tensor equal; otherwise names the first that differs and by how much."""
    assert list(got) == list(expected), f"{what}: other outputs"
    for name, tensor in expected.items():
        if not equal_with_nan(got[name], tensor):
            assert got[name].shape == tensor.shape and got[name].dtype == tensor.dtype, f"{what}: {name}"
            difference = (got[name].double() - tensor.double()).abs()
            pytest.fail(
                f"{what}: {name} {tuple(tensor.shape)} differs in {int((difference != 0).sum())} of "
                f"{tensor.numel()} places, by at most {difference.max():.3g}"
            )


def assert_close(got: dict, expected: dict, what: str, dtype: torch.dtype) -> None:
    """Every named tensor the same but for rounding, which two layers and a projection after them enlarge."""
    assert list(got) == list(expected), f"{what}: other outputs"
    for name, tensor in expected.items():
        unit = torch.finfo(dtype).eps * tensor.abs().max().item()
        difference = (got[name].double() - tensor.double()).abs()
        assert difference.max().item() <= 32 * unit, f"{what}: {name} differs by {difference.max():.3g}"
        assert difference.mean().item() <= unit, (
            f"{what}: {name} differs by {difference.mean():.3g} in the mean"
        )


def snapshot(model: nn.Module) -> dict:
    """What every module holds: class, attributes and what is in its dictionaries, by identity."""
    return {
        name: (
            type(module),
            {
                key: ({k: id(v) for k, v in value.items()} if isinstance(value, dict) else id(value))
                for key, value in vars(module).items()
            },
        )
        for name, module in model.named_modules(remove_duplicate=False)
    }


def fused_causal_calls(run) -> tuple[dict, list]:
    """Runs and gives the output with the SDPA calls that are causal by flag and have no mask."""
    calls = []

    def on_call(args, kwargs):
        named = dict(
            zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)
        )
        named |= kwargs
        if named.get("is_causal") and named.get("attn_mask") is None and named["query"].shape[-2] > 1:
            calls.append(
                {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in named.items()}
            )

    with zoo.watched_sdpa(on_call):
        output = run()
    return output, calls


# ----------------------------------------------------------------------------------------- every architecture


@pytest.mark.parametrize(("case", "implementation", "dtype"), COMBINATIONS)
def test_bits(case, implementation, dtype):
    """Every padding and every tile: the same bits, attention did go by rows, and nothing is left behind."""
    import attnpatch

    model = zoo.shared_model(case.name, implementation, dtype)
    before = None
    # In float32 every tile with every padding. In other dtypes, and under SDPA (``test_sdpa_properties.py`` draws masks and
    # tiles), every tile and every padding.
    is_full = (dtype is torch.float32 and implementation != "sdpa") or len(case.paddings) == 1
    for number, padding in enumerate(case.paddings):
        inputs = case.inputs(padding, dtype)
        native, causal = fused_causal_calls(lambda inputs=inputs: case.run(model, inputs))
        # Only now: transformers hangs its own hooks on a model when hidden states are first asked for.
        before = before or snapshot(model)
        for rows, heads in TILES if is_full else TILES[number % 2 :: 2]:
            what = f"{case.name} {implementation} {padding} rows={rows} heads={heads}"
            with by_rows(model, case, rows=rows, heads=heads):
                got = case.run(model, inputs)
                report = attnpatch.report(model)
            if causal or not case.exact:
                # The fused causal kernel rounds otherwise than the same kernel on some of the rows:
                # test_causal_calls_against_float64 holds these to the float64 result.
                assert_close(got, native, what, dtype)
            else:
                assert_identical(got, native, what)
            if case.by_rows:
                assert report.totals["by_rows"] > 0, f"{what}\n{report}"
            if case.clean:
                assert report.totals["materialised"] == 0, f"{what}\n{report}"
        assert_identical(case.run(model, inputs), native, f"{case.name} after remove")
    assert snapshot(model) == before


# Those that say is_causal instead of making a mask, when there is no padding.
CAUSAL_CASES = [
    zoo.BY_NAME[name]
    for name in ("llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "opt", "bart", "whisper", "clip")
]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CAUSAL_CASES, ids=[case.name for case in CAUSAL_CASES])
def test_causal_calls_against_float64(case, dtype):
    """SDPA with ``is_causal`` and no mask, as hosts call it: as near to float64 as the fused call."""
    model = zoo.shared_model(case.name, "sdpa", dtype)
    inputs = case.inputs("none", dtype)
    native, calls = fused_causal_calls(lambda: case.run(model, inputs))
    assert calls, "the host makes no such call any more"
    for call in calls:
        query, key, value = (call.pop(name) for name in ("query", "key", "value"))
        exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), **call)
        fused = F.scaled_dot_product_attention(query, key, value, **call)
        # Both results are rounded to the dtype: two that are equally good may differ by that rounding.
        slack = torch.finfo(dtype).eps * value.abs().max().item()
        for rows, heads in TILES:
            module = zoo.SdpaCall()
            with by_rows(module, zoo.SDPA_CALL, rows=rows, heads=heads):
                got = module(query, key, value, **call)
            error, native_error = (got - exact).abs().max().item(), (fused - exact).abs().max().item()
            assert error <= native_error + slack, f"{case.name} rows={rows}: {error} against {native_error}"
    # And the model as a whole: rounding in one layer moves the next, so by rows against native, in units of
    # what bfloat16 or float32 does to this model at all.
    reference = case.run(copy.deepcopy(model).double(), case.inputs("none", torch.float64))
    with by_rows(model, rows=7):
        got = case.run(model, inputs)
    for name, tensor in reference.items():
        native_error = (native[name].double() - tensor).square().mean().sqrt().item()
        error = (got[name].double() - tensor).square().mean().sqrt().item()
        slack = torch.finfo(dtype).eps * tensor.abs().max().item()
        assert error <= native_error + slack, f"{name}: {error} against {native_error}"


# -------------------------------------------------------------------------------------------- around the call

MODES = ["autocast", "inference_mode", "grad"]
# transformers 5.23 mixes dtypes there and stops, patched or not.
NO_AUTOCAST = {"deberta", "xlnet_two_streams"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", zoo.CASES, ids=[case.name for case in zoo.CASES])
def test_modes(case, mode):
    """Autocast to bfloat16, ``inference_mode``, and recording a graph: the same bits."""
    import attnpatch

    if mode == "autocast" and case.name in NO_AUTOCAST:
        pytest.skip("the host itself cannot")
    padding = case.paddings[1] if len(case.paddings) > 1 else "none"
    inputs = case.inputs(padding)
    for implementation in case.implementations:
        model = zoo.shared_model(case.name, implementation)

        def run(model=model):
            if mode == "autocast":
                with torch.autocast("cpu", torch.bfloat16):
                    return case.run(model, inputs)
            if mode == "inference_mode":
                with torch.inference_mode():
                    return case.run(model, inputs)
            with torch.enable_grad(), zoo.slow_path():
                extra = {"output_hidden_states": True} if case.run is zoo.run_transformers else {}
                output = model(**inputs, **extra)
                return zoo.flatten(dict(output) if extra else output)

        native, causal = fused_causal_calls(run)
        with by_rows(model, case, rows=7):
            got = run()
            totals = attnpatch.report(model).totals
        if causal or not case.exact:
            low = torch.bfloat16 if mode == "autocast" else torch.float32
            assert_close(got, native, f"{case.name} {implementation} {mode}", low)
        else:
            assert_identical(got, native, f"{case.name} {implementation} {mode}")
        assert totals["by_rows"] > 0 or not case.by_rows
        for name, tensor in native.items():
            assert got[name].requires_grad == tensor.requires_grad, name
            assert got[name].is_inference() == tensor.is_inference(), name


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("name", "implementation"),
    [("llama", "eager"), ("llama", "sdpa"), ("gemma2", "eager"), ("t5", "eager"), ("t5", "sdpa")],
)
def test_generate(name, implementation, cache):
    """Greedy generation with a left-padded batch: the same tokens and the same scores."""
    import attnpatch

    case = zoo.BY_NAME[name]
    model = zoo.shared_model(name, implementation)
    inputs = {k: v for k, v in case.inputs("left").items() if not k.startswith("decoder")}

    def generate():
        out = model.generate(
            **inputs,
            max_new_tokens=6,
            do_sample=False,
            cache_implementation="static" if cache == "static" else None,
            output_scores=True,
            return_dict_in_generate=True,
        )
        return {"sequences": out.sequences, **zoo.flatten(out.scores)}

    native, causal = fused_causal_calls(generate)
    assert not causal
    before = snapshot(model)
    with by_rows(model, rows=7, heads=2):
        got = generate()
        totals = attnpatch.report(model).totals
    assert_identical(got, native, f"{name} {implementation} {cache}")
    assert totals["by_rows"] > 0
    assert totals["materialised"] == 0
    assert snapshot(model) == before
    assert_identical(generate(), native, "after remove")


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "gpt_oss", "gpt2", "bloom", "bert", "deberta", "xlnet", "t5"]
)
def test_returned_weights(name):
    """Attention weights that leave the module are the native ones, whole or a few rows at a time."""
    case = zoo.BY_NAME[name]
    model = zoo.shared_model(name, "eager")
    inputs = case.inputs("left")

    def run():
        with torch.no_grad():
            return dict(model(**inputs, output_attentions=True))

    native = run()
    weights = [key for key in native if "attentions" in key]
    assert weights
    with by_rows(model, rows=7):
        got = run()
    for key in weights:
        for layer, (mine, theirs) in enumerate(zip(got[key], native[key], strict=True)):
            what = f"{key}[{layer}]"
            assert mine.shape == theirs.shape and mine.dtype == theirs.dtype, what
            assert equal_with_nan(mine[:, :, 10:20].clone(), theirs[:, :, 10:20]), what
            assert equal_with_nan(mine[0, -1, 3].clone(), theirs[0, -1, 3]), what
            assert equal_with_nan(mine[mine > 0.1], theirs[theirs > 0.1]), what
            assert (mine == None) is False, what  # noqa: E711
            assert equal_with_nan(mine + 0, theirs), what
            assert equal_with_nan(mine.mean(dim=1), theirs.mean(dim=1)), what
    assert_identical(zoo.flatten(got), zoo.flatten(native), name)


# ------------------------------------------------------------------------------------ torch's fused fast path


@pytest.mark.parametrize(
    "name",
    ["multihead_weights_mean", "multihead_no_weights", "multihead_sequence_first", "encoder_layer_eval"],
)
def test_fast_path(name):
    """``nn.MultiheadAttention`` in evaluation takes a kernel in C++: the same bits, and still by rows."""
    import attnpatch

    case = zoo.BY_NAME[name]
    model = zoo.shared_model(name, "torch")
    inputs = case.inputs("none")
    native = zoo.run_module(model, inputs)
    with by_rows(model, rows=7):
        got = zoo.run_module(model, inputs)
        totals = attnpatch.report(model).totals
    assert_identical(got, native, name)
    assert totals["by_rows"] > 0


# --------------------------------------------------------------------------------------------- what tiles are


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5", "bert", "einsum", "multihead_no_weights"])
def test_tiles_of_one_head_and_one_row(name):
    """The smallest tiles may take other kernels: within a few roundings, not to the bit."""
    case = zoo.BY_NAME[name]
    implementation = case.implementations[0]
    model = zoo.shared_model(name, implementation)
    inputs = case.inputs("none")
    native = case.run(model, inputs)
    reference = case.run(copy.deepcopy(model).double(), case.inputs("none", torch.float64))
    for rows, heads in [(7, 1), (1, None), (1, 1), (1000, 1)]:
        with by_rows(model, case, rows=rows, heads=heads):
            got = case.run(model, inputs)
        for key, tensor in reference.items():
            native_error = (native[key].double() - tensor).square().mean().sqrt().item()
            error = (got[key].double() - tensor).square().mean().sqrt().item()
            slack = torch.finfo(torch.float32).eps * tensor.abs().max().item()
            assert error <= native_error + slack, f"{key} rows={rows} heads={heads}: {error}, {native_error}"


@pytest.mark.parametrize("length", [2, 3, 7, 8, 9, 15])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_short_sequences(implementation, length):
    """Row counts around and beyond the length, lengths that leave one row: the same bits."""
    case = zoo.BY_NAME["llama"]
    model = zoo.shared_model("llama", implementation)
    inputs = {
        "input_ids": zoo.tokens(length, batch=2),
        "attention_mask": torch.ones(2, length, dtype=torch.long),
    }
    inputs["attention_mask"][1, 0] = 0
    native = case.run(model, inputs)
    for rows in (2, 3, 7, 8, 100):
        with by_rows(model, rows=rows):
            got = case.run(model, inputs)
        assert_identical(got, native, f"length={length} rows={rows}")


@pytest.mark.parametrize("length", [65, 197, 801])
@pytest.mark.parametrize("name", ["llama", "gemma3", "bert"])
def test_longer_sequences(name, length):
    """Lengths at which torch's fused CPU kernel takes 32, 64 and 256 rows at a time: the same bits."""
    case = dataclasses.replace(
        zoo.BY_NAME[name], make_inputs=lambda padding: zoo.text_inputs(padding, length)
    )
    for implementation in case.implementations:
        model = case.build(implementation)
        for padding in ("left", "right"):
            inputs = case.inputs(padding)
            native = case.run(model, inputs)
            for rows, heads in [(32, None), (64, 2), (256, None), (length - 1, None)]:
                with by_rows(model, rows=rows, heads=heads):
                    got = case.run(model, inputs)
                what = f"{name} {implementation} {padding} length={length} rows={rows} heads={heads}"
                assert_identical(got, native, what)


class QueryRows(TorchDispatchMode):
    """Notes the query rows of every attention kernel that runs with a mask or is causal.

    A causal call is cut in two, the keys before its rows and the keys among them; the rows count once.
    """

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = (kwargs or {}).get("attn_mask") is not None
        if "scaled_dot_product" in str(func) and (masked or any(value is True for value in args)):
            self.seen.append(args[0].shape[-2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padding", ["none", "left"])
def test_fused_calls_are_cut(padding):
    """By rows means fewer rows at the kernel, and every row: a whole call would pass all the other tests."""
    case = zoo.BY_NAME["llama"]
    model = zoo.shared_model("llama", "sdpa")
    with by_rows(model, rows=32), QueryRows() as kernels:
        case.run(model, case.inputs(padding))
    assert kernels.seen
    assert max(kernels.seen) < zoo.TEXT_LEN
    assert sum(kernels.seen) % zoo.TEXT_LEN == 0
    assert min(kernels.seen) > 1


def test_never_is_native():
    """``mode="never"`` and a long ``min_tokens`` leave every call native."""
    import attnpatch

    case = zoo.BY_NAME["llama"]
    model = zoo.shared_model("llama", "eager")
    inputs = case.inputs("left")
    native = case.run(model, inputs)
    for policy in ({"mode": "never"}, {"mode": "auto"}):
        with attnpatch.patched(model, **policy):
            assert_identical(case.run(model, inputs), native, str(policy))
            totals = attnpatch.report(model).totals
        assert totals["by_rows"] == 0 and totals["native"] > 0, totals


@pytest.mark.parametrize("name", [case.name for case in zoo.TRANSFORMERS_CASES if case.name != "clip"])
def test_the_zoo_attends(name):
    """The random models attend neither to everything nor to one token, or the tests would show little."""
    case = zoo.BY_NAME[name]
    model = zoo.shared_model(case.name, "eager")
    with torch.no_grad():
        output = dict(model(**case.inputs("none"), output_attentions=True))
    weights = [w for key, value in output.items() if "attentions" in key for w in value]
    assert weights
    for layer in weights:
        probabilities = (layer[0] if isinstance(layer, tuple) else layer).double()
        seen = (probabilities > 1e-9).sum(-1)
        entropy = torch.special.entr(probabilities).sum(-1)[seen > 4] / seen[seen > 4].log()
        assert 0.2 < entropy.mean() < 0.95
