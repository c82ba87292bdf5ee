"""Out of memory: a native call that fails is answered by rows, smaller and smaller, and the answer is right.

Errors are injected below torch's own operators, at an allocation inside an attention module. Everything else is real.
"""

import contextlib
import functools
import traceback

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attnpatch
from attnpatch.patching import site as patching
from attnpatch.releases import tested
from attnpatch.rows.creation import row_masks

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.")
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried 8"
)
MPS = RuntimeError("MPS backend out of memory (MPS allocated: 17.50 GB, max allowed: 18.13 GB).")
# One tensor is larger than the device takes, whatever is free: MPS; Intel's own package for Arc.
BUFFER = RuntimeError("Invalid buffer size: 19.38 GiB")
BLOCK = RuntimeError(
    "Current platform can NOT allocate memory block with size larger than 4GB! Tried to allocate 40.00 GiB"
)


class Shortage(TorchDispatchMode):
    """Lets allocations inside attention modules fail.

    Args:
        least: Bytes from which on an allocation counts.
        at: Which one fails, once, counted from 1; 0: none.
        most: Bytes above which every allocation fails.
        error: What is raised.
        only: Part of the name of the operators whose allocations count.
        anywhere: Also outside attention modules.
        in_place: Also operators that return what they were given.
    """

    def __init__(self, least=0, at=0, most=None, error=CUDA, only="", anywhere=False, in_place=False):
        super().__init__()
        self.anywhere, self.in_place = anywhere, in_place
        self.least, self.at, self.most, self.error, self.only = least, at, most, error, only
        self.seen, self.largest, self.failed = 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inside = self.anywhere or patching.calls_here.mode is not None
        if not inside or self.only not in str(func):
            return result
        before = (
            set()
            if self.in_place
            else {
                t.untyped_storage().data_ptr()
                for t in tree_leaves((args, kwargs))
                if isinstance(t, torch.Tensor)
            }
        )
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in before:
                self.allocated(tensor.untyped_storage().nbytes(), str(func))
        return result

    def allocated(self, size, name):
        self.largest = max(self.largest, size)
        self.seen += size >= self.least
        if (size >= self.least and self.seen == self.at) or (self.most is not None and size > self.most):
            self.failed.append(name)
            # A fresh one each time, as torch raises it.
            raise type(self.error)(*self.error.args)


@pytest.fixture(autouse=True)
def plenty(monkeypatch):
    """So that the rule says native."""
    monkeypatch.setenv("ATTNPATCH_FREE_MEMORY", "900GB")


@contextlib.contextmanager
def patched(model, case=None, **policy):
    for cls in () if case is None else case.register:
        attnpatch.register(cls)
    with attnpatch.patched(model, **{"min_tokens": 16, **policy}):
        yield


TOKENS, HEADS = zoo.TEXT_LEN, 4
SCORES = 2 * HEADS * TOKENS * TOKENS * 4


def llama(implementation, **fields):
    """A model of two layers, two padded sequences, and the logits of the unpatched model."""
    model = zoo.BY_NAME["llama"].build(implementation)
    for name, value in fields.items():
        for module in model.modules():
            if hasattr(module, name):
                setattr(module, name, value)
    inputs = zoo.text_inputs("left")
    with torch.no_grad():
        return model, inputs, model(**inputs).logits


# ------------------------------------------------------------------------------- every allocation, once

# Large, and not made of scores: relative positions and biases that a host computes in its attention modules.
# Where a softmax runs along rows, its figures are summed in another order (README, "What it does not do").
TO_ROUNDING = {"not"}
OTHERS = {
    "deberta": {"aten.add.Tensor", "aten.clamp.default", "aten.neg.default"},
    "deberta_v2": {"aten.add.Tensor", "aten.clamp.default", "aten.neg.default", "aten.gather.default",
                   "aten.div.Tensor"},
    # Positions, their buckets, and the bias of shape [1, heads, N, N] that is looked up for them.
    "t5": {"aten.sub.Tensor", "aten._to_copy.default", "aten.mul.Tensor", "aten.add.Tensor", "aten.abs.default",
           "aten.full_like.default", "aten.lt.Scalar", "aten.div.Tensor", "aten.log.default", "aten.minimum.default",
           "aten.where.self", "aten.embedding.default", "aten.neg.default", "aten.zeros_like.default",
           "aten.zeros.default"},
    # Until transformers 4.47, zeros of the scores' size, to which baddbmm adds the scores.
    "gpt_neox": {"aten.zeros.default"},
    # It overwrites its queries and keys after the product: nothing is left to answer from.
    "overwriting": {"aten._softmax.default", "aten.mul.Tensor"},
    "not": {"aten._softmax.default"},
}  # fmt: skip
CASES = [
    pytest.param(case, implementation, id=f"{case.name}-{implementation}")
    for case in zoo.CASES
    for implementation in case.implementations
]


@pytest.mark.parametrize(("case", "implementation"), CASES)
def test_each_allocation(case, implementation):
    """The first, the second, ... large allocation fails: the same bits as if none had."""
    model = zoo.shared_model(case.name, implementation, torch.float32)
    inputs = case.inputs(case.paddings[0])
    # torch's dense math allocates scores as hand-written attention does; the fused kernel holds none.
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        native = case.run(model, inputs)
        with patched(model, case), Shortage() as probe:
            case.run(model, inputs)
        with patched(model, case), Shortage(least=probe.largest * 0.5) as count:
            case.run(model, inputs)
        answered = 0
        for at in range(1, count.seen + 1, max(1, count.seen // 12)):
            with patched(model, case), Shortage(least=probe.largest * 0.5, at=at) as shortage:
                try:
                    got = case.run(model, inputs)
                except torch.OutOfMemoryError:
                    assert shortage.failed[0] in OTHERS.get(case.name, ()), f"{at}: {shortage.failed}"
                    continue
                totals = attnpatch.report(model).totals
            # Materialised: a graph that nothing could extend, computed by rows nevertheless.
            assert totals["retried"] == 1, f"{at}: {totals}"
            # Native: a step that needs every row (a matrix added to its own transpose) is computed in one piece.
            assert totals["by_rows"] + totals["materialised"] + totals["native"] > 0, f"{at}: {totals}"
            same = torch.equal if case.exact else torch.allclose
            if case.name in TO_ROUNDING:
                same = functools.partial(torch.allclose, rtol=1e-4, atol=1e-4)
            assert all(same(got[name].nan_to_num(), native[name].nan_to_num()) for name in native), f"{at}"
            answered += 1
    assert answered


@pytest.mark.parametrize(
    "error", [CUDA, MPS, CPU, BUFFER, BLOCK], ids=["cuda", "mps", "cpu", "buffer", "block"]
)
def test_every_device_says_it_in_its_own_way(error):
    model, inputs, native = llama("eager")
    with patched(model), Shortage(least=SCORES, at=1, error=error) as shortage, torch.no_grad():
        assert torch.equal(model(**inputs).logits, native)
        totals = attnpatch.report(model).totals
    assert shortage.failed
    # The second layer does not try: it is known by then that memory is short.
    assert (totals["retried"], totals["by_rows"], totals["native"]) == (1, 2, 0)


def test_another_error_is_not_answered():
    model, inputs, _ = llama("eager")
    with (
        patched(model),
        Shortage(least=SCORES, at=1, error=RuntimeError("a bug")),
        pytest.raises(RuntimeError),
    ):
        model(**inputs)


with_masking_utils = pytest.mark.skipif(
    not tested.is_at_least("transformers", "4.53"), reason="each model writes its own mask"
)


@with_masking_utils
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_mask_that_does_not_fit(implementation):
    """The host runs out of memory before any attention: mask and attention go by rows."""
    model, inputs, native = llama(implementation)
    less = {"least": TOKENS * TOKENS, "only": "bitwise_and", "at": 1, "anywhere": True}
    with patched(model), torch.no_grad(), Shortage(**less) as shortage:
        got = model(**inputs).logits
        totals = attnpatch.report(model).totals
    assert shortage.failed
    assert torch.equal(got, native)
    assert totals["retried"] == 1 and totals["by_rows"] == 2 and not totals["materialised"]
    with patched(model, retry_on_oom=False), Shortage(**less), pytest.raises(torch.OutOfMemoryError):
        model(**inputs)


@with_masking_utils
def test_a_mask_that_does_not_fit_and_cannot_be_put_off(monkeypatch):
    """The host's own error, and never a mask that is none."""
    model, inputs, _ = llama("sdpa")
    monkeypatch.setattr(row_masks, "deferred", lambda *args: None)
    less = {"least": TOKENS * TOKENS, "only": "bitwise_and", "at": 1, "anywhere": True}
    with patched(model), Shortage(**less), pytest.raises(torch.OutOfMemoryError):
        model(**inputs)


@pytest.mark.parametrize("name", ["baddbmm", "gpt2_upcast"])
def test_memory_set_aside_for_scores_is_not_taken(name):
    """By rows nothing as large as the scores is allocated, not even the empty tensor that ``baddbmm`` is handed."""
    case = zoo.BY_NAME[name]
    model = zoo.shared_model(name, case.implementations[0], torch.float32)
    inputs = case.inputs(case.paddings[0])
    with torch.no_grad():
        native = case.run(model, inputs)
        with patched(model, case), Shortage() as probe:
            case.run(model, inputs)
        with (
            patched(model, case, mode="always", rows=7, heads=2),
            Shortage(most=probe.largest // 2) as shortage,
        ):
            got = case.run(model, inputs)
            assert attnpatch.report(model).totals["retried"] == 0
    assert not shortage.failed
    assert all(torch.equal(got[key], native[key]) for key in native)


@pytest.mark.parametrize("policy", [{"mode": "never"}, {"retry_on_oom": False}])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_it_can_be_turned_off(policy, implementation):
    model, inputs, _ = llama(implementation)
    with (
        sdpa_kernel(SDPBackend.MATH),
        patched(model, **policy),
        Shortage(least=SCORES, at=1, anywhere=True),
        pytest.raises(torch.OutOfMemoryError),
    ):
        model(**inputs)


def test_a_fused_call():
    """With a mask a fused call by rows has the same bits; the report says that it was not fused."""
    model, inputs, native = llama("sdpa")
    with patched(model), Shortage(only="flash_attention", at=1) as shortage, torch.no_grad():
        assert torch.equal(model(**inputs).logits, native)
        totals = attnpatch.report(model).totals
    assert shortage.failed
    assert (totals["retried"], totals["by_rows"], totals["fused"]) == (1, 1, 1)


def test_torch_fast_path():
    """One C++ operator, taken apart when it fails, and by rows inside."""
    layer = zoo.randomise(nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)).eval()
    x = zoo.floats(2, TOKENS, 64)
    with torch.no_grad():
        native = layer(x)
        with patched(layer), Shortage(only="_transformer_encoder_layer_fwd", at=1) as shortage:
            assert torch.equal(layer(x), native)
            totals = attnpatch.report(layer).totals
    assert shortage.failed
    assert (totals["retried"], totals["by_rows"]) == (1, 1)


# --------------------------------------------------------------------------------------- halving, to the end


class Plain(nn.Module):
    """Hand-written attention: 64 query rows over 8,192 keys, so that one row is larger than the result."""

    def forward(self, query, key, value):
        return (query @ key.transpose(-1, -2)).softmax(-1) @ value


class Fused(nn.Module):
    def forward(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value)


ROW = 8000 * 4


def long_inputs():
    return [zoo.floats(1, 2, length, 2, seed=length) for length in (64, 8000, 8000)]


def held(kind, most):
    """The output while every allocation above ``most`` bytes fails, and the totals."""
    attnpatch.register(kind)
    model, inputs = kind(), long_inputs()
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        attnpatch.patched(model, min_tokens=16),
        Shortage(most=most),
    ):
        return model(*inputs), attnpatch.report(model).totals


@pytest.mark.parametrize("kind", [Plain, Fused])
@pytest.mark.parametrize("rows", [64, 32, 16, 8, 4])
def test_halved_until_it_fits(kind, rows):
    """Two heads and at least four rows at a time: the same bits."""
    with sdpa_kernel(SDPBackend.MATH):
        native = kind()(*long_inputs())
    got, totals = held(kind, 2 * rows * ROW)
    # The first attempt is of all 64 rows, whose native call holds no more than one head fewer here.
    assert totals["retried"] == {64: 0, 32: 2, 16: 3, 8: 4, 4: 5}[rows]
    assert totals["by_rows"] == (rows < 64)
    assert torch.equal(got, native)


@pytest.mark.parametrize("kind", [Plain, Fused])
def test_one_row_at_last(kind):
    """Below four rows a product rounds differently: an answer to rounding is better than none."""
    with sdpa_kernel(SDPBackend.MATH):
        native = kind()(*long_inputs())
    # torch's dense math makes a scaled copy of a head's keys, twice as large as a row of scores here.
    got, totals = held(kind, {Plain: 1, Fused: 2}[kind] * ROW)
    assert totals["by_rows"] == 1
    # A matrix times a vector is summed one key after the other: at most as many roundings as keys, some cancel.
    most = 8000 * torch.finfo(torch.float32).eps / 8
    torch.testing.assert_close(got, native, rtol=0, atol=most)


def notes_of(error):
    """Python 3.10 has no notes: they are below the message."""
    return getattr(error, "__notes__", None) or str(error).splitlines()[1:]


@pytest.mark.parametrize("kind", [Plain, Fused])
def test_when_not_even_one_row_fits(kind):
    """The native call's own error, and in its notes what was tried."""
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 8") as caught:
        held(kind, ROW - 1)
    note = " ".join(notes_of(caught.value))
    assert "the native call, then steps of 64 rows" in note
    assert note.endswith("steps of 1 row x 1 head")
    # Frames hold tensors: none of ours is kept below the one that raises.
    names = [entry.name for entry in traceback.extract_tb(caught.value.__traceback__)]
    assert "_forward" not in names and names[-1] == "give_up"


def test_a_fixed_tile_is_halved_too():
    attnpatch.register(Plain)
    model, inputs = Plain(), long_inputs()
    with torch.no_grad(), attnpatch.patched(model, mode="always", rows=32, heads=2), Shortage(most=16 * ROW):
        got = model(*inputs)
        assert attnpatch.report(model).totals["retried"] == 2
    assert torch.equal(got, Plain()(*long_inputs()))


def test_probabilities_shown_beside_a_fused_call():
    """Capture computes them again; a tile that does not fit is halved, and nothing is counted twice."""
    attnpatch.register(Fused)
    model = Fused()
    inputs = [zoo.floats(1, 2, 1024, 2, seed=i) for i in range(3)]
    found = []
    # Two tiles for each head: one has been shown when the second fails.
    for at in (0, 2):
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            attnpatch.capture(model, blocks=attnpatch.Blocks.fixed(128)) as maps,
            Shortage(at=at, only="aten.mm") as shortage,
        ):
            model(*inputs)
            assert attnpatch.report(model).totals["retried"] == (at > 0)
        assert shortage.seen > 3
        found.append(maps.block_map.to_numpy())
    assert abs(found[0] - found[1]).max() < 1e-6


# ------------------------------------------------------------------- caches, dropout, gradients, checkpoints


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_is_appended_to_once(implementation, kind):
    model, inputs, _ = llama(implementation)
    # "dynamic" is the default; transformers 4.46 does not know the word.
    chosen = {} if kind == "dynamic" else {"cache_implementation": kind}

    def generated():
        out = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, **chosen,
            return_dict_in_generate=True, output_logits=True, pad_token_id=0,
        )  # fmt: skip
        cache = out.past_key_values
        if isinstance(cache, tuple):  # until 4.47
            return out.sequences, torch.stack(out.logits), cache[0][0], cache[0][0].shape[-2]
        keys = cache.layers[0].keys if hasattr(cache, "layers") else cache.key_cache[0]  # until 4.53
        return out.sequences, torch.stack(out.logits), keys, cache.get_seq_length()

    with sdpa_kernel(SDPBackend.MATH):
        native = generated()
        for at in (1, 2, 3):
            with patched(model), Shortage(least=SCORES, at=at) as shortage:
                got = generated()
                assert attnpatch.report(model).totals["retried"] == 1
            assert shortage.failed
            assert all(torch.equal(a, b) for a, b in zip(got[:3], native[:3], strict=True))
            assert int(got[3]) == int(native[3])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dropout_does_not_drift(implementation):
    """Whatever was drawn before the error is drawn again: the result is that of attention by rows from the start."""
    model, inputs, _ = llama(implementation, attention_dropout=0.3)
    model.train()

    def run():
        torch.manual_seed(7)
        return model(**inputs).logits, torch.get_rng_state()

    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        with patched(model, mode="always"):
            expected = run()
        with patched(model), Shortage(least=SCORES) as count:
            run()
        for at in range(1, count.seen // 2 + 1):
            with patched(model), Shortage(least=SCORES, at=at) as shortage:
                got = run()
            assert shortage.failed
            assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1]), (
                f"{at}: {shortage.failed}"
            )


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).logits.square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gradients(implementation):
    """Out of memory in the forward pass, and in the backward pass of what went by rows."""
    model, inputs, _ = llama(implementation)
    with sdpa_kernel(SDPBackend.MATH):
        native = gradients(model, inputs)
        for at in (1, 2, 3):
            with patched(model), Shortage(least=SCORES, at=at) as shortage:
                got = gradients(model, inputs)
            assert shortage.failed
            assert_close(got, native)
        # By rows of 32 nothing fits that is larger than 16 of them.
        with (
            patched(model, mode="always", rows=32, heads=2),
            Shortage(most=2 * 20 * TOKENS * 4, only="softmax_backward", anywhere=True) as shortage,
        ):
            got = gradients(model, inputs)
            assert attnpatch.report(model).totals["retried"] > 0
        assert shortage.failed
        assert_close(got, native)


def assert_close(got, native):
    for ours, theirs in zip(got, native, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "fused"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_checkpointed_layer_takes_the_same_way_again(implementation, use_reentrant, at):
    """What failed steps had saved is not counted: the layer finds as much when it runs again by rows."""
    model, inputs, _ = llama(implementation.replace("fused", "sdpa"))
    fault = {"least": SCORES} if implementation != "fused" else {"only": "flash_attention_for_cpu"}
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION] if implementation == "fused" else [SDPBackend.MATH]):
        native = gradients(model, inputs)
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        with patched(model), Shortage(**fault, at=at) as shortage:
            got = gradients(model, inputs)
            totals = attnpatch.report(model).totals
    assert shortage.failed or implementation == "fused"
    assert totals["retried"] == bool(shortage.failed)
    assert_close(got, native)


def test_a_step_in_place_is_not_answered():
    """The host goes on with the tensor that was to be overwritten, whatever is returned: so the error is raised."""

    class WritingAttention(nn.Module):
        def forward(self, x, bias):
            scores = x @ x.transpose(-1, -2)
            scores.add_(bias)
            return scores.softmax(-1) @ x

    model, x = WritingAttention(), zoo.floats(2, 64, 4)
    bias = zoo.floats(64, 64).double()
    native = model(x, bias)
    with attnpatch.patched(model, min_tokens=16):
        with (
            Shortage(only="add_", most=0, anywhere=True, in_place=True),
            pytest.raises(torch.OutOfMemoryError),
        ):
            model(x, bias)
        with Shortage(only="_softmax", at=1) as shortage:
            assert torch.equal(model(x, bias), native)
    assert shortage.failed
