"""What a host allows for its own products (TF32, bfloat16) does not reach the numbers of a map."""

import threading

import pytest
import torch
import zoo
from torch._subclasses import FakeTensorMode

import attnpatch
from attnpatch import Blocks
from attnpatch.rows.precision import in_full

LLAMA = zoo.BY_NAME["llama"]


@pytest.fixture(params=["high", "medium"])
def allowed(request):
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision("highest")


def settings():
    """Of CUDA and of the CPU; before torch 2.9 one for both."""
    kinds = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(torch.backends, "fp32_precision"):
        return [torch.get_float32_matmul_precision()] * 2
    return [kind.fp32_precision for kind in kinds]


FULL = ("ieee", "none", "highest")


def test_products_are_in_full_inside_and_as_they_were_outside(allowed):
    before = settings()
    assert before[0] not in FULL and before[1] not in FULL
    with FakeTensorMode():
        on_cuda, on_cpu = torch.empty(2, device="cuda"), torch.empty(2)
    with in_full(on_cuda):
        assert settings()[0] in FULL
        with in_full(on_cpu), in_full(on_cuda.half()):
            assert all(setting in FULL for setting in settings())
        assert settings()[0] in FULL
    with in_full(on_cuda.double()):
        assert settings() == before
    with pytest.raises(ZeroDivisionError), in_full(on_cpu):
        raise ZeroDivisionError
    assert settings() == before and torch.get_float32_matmul_precision() == allowed


def test_threads_that_overlap_put_back_what_was_there(allowed):
    before, tensor = settings(), torch.empty(2)
    inside, leave = threading.Event(), threading.Event()

    def first():
        with in_full(tensor):
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(30)
    with in_full(tensor):
        leave.set()
        thread.join()
        assert settings()[1] in FULL
    assert settings() == before


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="one setting for all")
def test_what_is_taken_from_all_devices_goes_on_being_taken_from_there():
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.backends.mkldnn.fp32_precision = "bf16"
    try:
        with in_full(torch.empty(2)):
            assert settings()[1] == "ieee"
        assert settings()[1] == "bf16"
    finally:
        torch.backends.mkldnn.fp32_precision = "none"
    assert settings()[1] == "none"


@pytest.mark.parametrize(
    "asked",
    [{}, {"heads": "all"}, {"measures": ("received", "entropy", "sink")}, {"sample_rows": 3}],
    ids=str,
)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_map_sums_to_one_whatever_the_host_allows(implementation, asked, allowed):
    """What the host computes in half the bits stays as it is; what is summed of it is not rounded once more."""
    model = LLAMA.build(implementation)
    with torch.no_grad(), attnpatch.capture(model, blocks=Blocks.fixed(8), **asked) as maps:
        LLAMA.run(model, LLAMA.inputs("none", torch.float32))
    sums = maps.block_map.mass.sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=2e-6, rtol=0)
    if "measures" in asked:
        received = maps.measured()["received"].sum(-1)
        tokens = float(maps.block_map.query_sizes.sum())
        torch.testing.assert_close(received, torch.full_like(received, tokens), atol=1e-3, rtol=0)


class Attention(torch.nn.Module):
    def forward(self, query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, query, key, value):
        return self.attention(query, key, value)


@pytest.mark.parametrize("weighting", ["probability", "gradient"])
def test_scores_computed_again_are_not_rounded(weighting, allowed):
    """Beside a fused kernel, which has 24 bits always."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, 64, 64) for _ in range(3))
    expected = (query[0].double() @ key[0].double().mT / 8).softmax(-1)
    if weighting == "gradient":
        # Of the output's sum a probability has the sum of its value as gradient.
        expected = expected * value[0].double().sum(-1)
    model, query = Model(), query.requires_grad_()
    with attnpatch.capture(model, blocks=Blocks.fixed(1), weighting=weighting) as maps:
        result = model(query, key, value)
        if weighting == "gradient":
            result.sum().backward()
    torch.testing.assert_close(maps.block_map.mass, expected.float(), atol=2e-5, rtol=0)
