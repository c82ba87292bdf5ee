"""Gradients by rows are the native ones, dropout repeats itself, and a training step holds far less."""

import copy
import json
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from zoo import by_rows


def gradients(model: nn.Module, inputs: dict, pick=None) -> dict[str, torch.Tensor]:
    """The loss and its gradient in every parameter and every float input."""
    model.zero_grad(set_to_none=True)
    inputs = {
        k: v.clone().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    with zoo.slow_path():
        output = model(**inputs)
    tensors = zoo.flatten(dict(output) if isinstance(output, dict) else output)
    tensors = [t for t in tensors.values() if t.requires_grad]
    # A fixed random weight for every output element: a plain sum would let errors cancel.
    generator = torch.Generator().manual_seed(7)
    loss = sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in tensors)
    loss.backward()
    found = {
        f"parameter {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }
    found |= {
        f"input {k}": v.grad.clone() for k, v in inputs.items() if torch.is_tensor(v) and v.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), **found}


# Padding such that no row is hidden altogether: in float64 the hosts' masks make such a row NaN.
CASES = [
    ("llama", "eager", "right"),
    ("llama", "sdpa", "left"),
    ("llama", "sdpa", "none"),
    ("gemma2", "eager", "none"),
    ("gpt_oss", "eager", "none"),
    # The same steps as by hand, behind a mask of SDPA's.
    pytest.param("t5", "sdpa", "right", marks=pytest.mark.long),
    ("t5", "eager", "right"),
    ("bert", "eager", "right"),
    ("bert", "sdpa", "right"),
    ("deberta_v2", "eager", "right"),
    ("xlnet", "eager", "none"),
    ("bloom", "eager", "right"),
    ("multihead_weights_per_head", "torch", "left"),
    ("multihead_weights_mean", "torch", "none"),
    ("multihead_no_weights", "torch", "cross"),
    ("encoder_layer_train", "torch", "causal"),
    ("einsum", "torch", "cross"),
    ("baddbmm", "torch", "left"),
    ("talking_heads", "torch", "none"),
    ("not", "torch", "none"),
]


@pytest.mark.parametrize(("name", "implementation", "padding"), CASES)
def test_gradients(name, implementation, padding):
    """In float64 to 1e-10; in float32 no farther from float64 than the native backward pass."""
    case = zoo.BY_NAME[name]
    model = case.build(implementation)
    double = copy.deepcopy(model).double()
    double_inputs = case.inputs(padding, torch.float64)
    exact = gradients(double, double_inputs)
    native = gradients(model, case.inputs(padding))
    for rows, heads in [(7, 2), (16, None), (60, None)]:
        with by_rows(double, case, rows=rows, heads=heads):
            got = gradients(double, double_inputs)
        assert list(got) == list(exact)
        for key, tensor in exact.items():
            # Hosts compute parts in float32 whatever the model's dtype; these parts are the same by rows.
            scale = max(1.0, tensor.abs().max().item())
            assert (got[key] - tensor).abs().max().item() <= 1e-10 * scale, f"{key} rows={rows} heads={heads}"
        if rows == 60:
            continue  # float64 has shown its sums; those of float32 are as few as natively
        with by_rows(model, case, rows=rows, heads=heads):
            got = gradients(model, case.inputs(padding))
        assert list(got) == list(native)
        for key, tensor in exact.items():
            # Sums over rows are taken in another order, so errors are compared by their size as a whole,
            # with one rounding of the largest element to spare.
            error = (got[key].double() - tensor).norm().item()
            native_error = (native[key].double() - tensor).norm().item()
            slack = torch.finfo(torch.float32).eps * (tensor.norm().item() + 1.0)
            assert error <= 1.5 * native_error + slack, f"{key} rows={rows}: {error} against {native_error}"


@pytest.mark.parametrize("frozen", ["weights", "query_projection"])
def test_gradients_reach_only_what_asks(frozen):
    """With frozen parameters (as adapters train) the rest still gets its native gradient."""
    case = zoo.BY_NAME["llama"]
    model = case.build("eager", torch.float64)
    for name, parameter in model.named_parameters():
        if frozen == "weights":
            parameter.requires_grad_("o_proj" in name or "layers.0.self_attn.v_proj" in name)
        else:
            parameter.requires_grad_("q_proj" not in name)
    inputs = case.inputs("right")
    exact = gradients(model, inputs)
    with by_rows(model, rows=7):
        got = gradients(model, inputs)
    assert list(got) == list(exact)
    for key, tensor in exact.items():
        assert torch.allclose(got[key], tensor, rtol=1e-10, atol=1e-10), key


def test_gradient_checkpointing_of_the_host():
    """The host's own checkpointing runs the swapped forward twice: the same gradients."""
    case = zoo.BY_NAME["llama"]
    model = case.build("eager", torch.float64).train()
    inputs = case.inputs("right")
    exact = gradients(model, inputs)
    model.gradient_checkpointing_enable()
    with by_rows(model, rows=7):
        got = gradients(model, inputs)
    for key, tensor in exact.items():
        assert torch.allclose(got[key], tensor, rtol=1e-10, atol=1e-10), key


# ---------------------------------------------------------------------------------------------------- dropout


def _bert_with_dropout(dtype=torch.float64, rate=0.3) -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=31,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        attention_probs_dropout_prob=rate,
        hidden_dropout_prob=0.1,
    )
    config._attn_implementation = "eager"
    return zoo.randomise(BertModel(config, add_pooling_layer=False)).to(dtype).train()


def test_dropout_repeats_with_the_seed():
    """The same seed gives the same loss and the same gradients; another seed gives others."""
    model = _bert_with_dropout()
    inputs = {"inputs_embeds": zoo.floats(2, 13, 8).double()}

    def seeded(seed):
        torch.manual_seed(seed)
        return gradients(model, inputs)

    with by_rows(model, rows=4):
        first, second, other = seeded(1), seeded(1), seeded(2)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["loss"], other["loss"])


@pytest.mark.parametrize("rows", [2, 3, None])
def test_dropout_gradient_belongs_to_the_forward(rows):
    """Finite differences with a fixed seed: the backward pass saw the very masks of the forward pass."""
    model = _bert_with_dropout()
    inputs = zoo.floats(1, 5, 8).double().requires_grad_()

    def run(x):
        torch.manual_seed(3)
        return model(inputs_embeds=x).last_hidden_state

    with by_rows(model, rows=rows):
        assert torch.autograd.gradcheck(run, (inputs,), eps=1e-6, atol=1e-6)


class DropoutProbe(nn.Module):
    """Values are the identity, so that the output is the dropped-out probabilities themselves."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, query, key):
        probabilities = (query @ key.transpose(-1, -2)).softmax(-1)
        dropped = F.dropout(probabilities, self.rate, training=True)
        return dropped @ torch.eye(key.shape[-2], dtype=key.dtype)


PROBE = zoo.Case("probe", lambda implementation: nn.Identity(), register=(DropoutProbe,))


def test_dropout_drops_at_its_rate():
    """Every probability is dropped or scaled, at the rate asked for, differently in every tile."""
    rate = 0.4
    model = nn.Sequential(DropoutProbe(rate))
    query, key = zoo.floats(2, 4, 37, 8), zoo.floats(2, 4, 64, 8, seed=9)
    probabilities = (query @ key.transpose(-1, -2)).softmax(-1)
    torch.manual_seed(0)
    with by_rows(model, PROBE, rows=5, heads=2):
        got = model[0](query, key)
        again = model[0](query, key)
        torch.manual_seed(0)
        assert torch.equal(model[0](query, key), got), "the seed does not decide"
    kept = got != 0
    assert torch.allclose(got[kept], (probabilities / (1 - rate))[kept], rtol=1e-6)
    # Two calls draw two masks: they agree in as many places as independent ones would.
    agree = (kept == (again != 0)).double().mean().item()
    expected = rate**2 + (1 - rate) ** 2
    assert abs(agree - expected) < 4 * (expected * (1 - expected) / got.numel()) ** 0.5
    # Four standard deviations of a binomial share.
    share = kept.double().mean().item()
    assert abs(share - (1 - rate)) < 4 * (rate * (1 - rate) / got.numel()) ** 0.5
    rows_of_masks = kept.flatten(0, 2).int()
    assert len(torch.unique(rows_of_masks, dim=0)) == len(rows_of_masks), "two rows share a mask"


class SdpaDropoutProbe(DropoutProbe):
    """The same through torch's own attention."""

    def forward(self, query, key):
        value = torch.eye(key.shape[-2], dtype=key.dtype).expand(*key.shape[:2], -1, -1)
        return F.scaled_dot_product_attention(query, key, value, dropout_p=self.rate, scale=1.0)


def test_sdpa_dropout():
    """SDPA with dropout: rate and scale are right, the seed decides, gradients belong to the forward."""
    rate = 0.4
    model = nn.Sequential(SdpaDropoutProbe(rate))
    case = zoo.Case("sdpa_probe", lambda implementation: nn.Identity(), register=(SdpaDropoutProbe,))
    query, key = zoo.floats(2, 4, 37, 8), zoo.floats(2, 4, 64, 8, seed=9)
    probabilities = (query @ key.transpose(-1, -2)).softmax(-1)
    small, other = zoo.floats(1, 2, 5, 3).double().requires_grad_(), zoo.floats(1, 2, 5, 3, seed=8).double()

    def run(x):
        torch.manual_seed(3)
        return model[0](x, other)

    with by_rows(model, case, rows=5, heads=2):
        torch.manual_seed(0)
        got = model[0](query, key)
        torch.manual_seed(0)
        assert torch.equal(model[0](query, key), got)
        assert torch.autograd.gradcheck(run, (small,), eps=1e-6, atol=1e-6)
    kept = got != 0
    assert torch.allclose(got[kept], (probabilities / (1 - rate))[kept], rtol=1e-5)
    assert abs(kept.double().mean().item() - (1 - rate)) < 4 * (rate * (1 - rate) / got.numel()) ** 0.5


def test_second_derivative():
    """Gradients of gradients, in float64, through both paths."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query = zoo.floats(1, 2, 5, 3).double().requires_grad_()
    case = zoo.BY_NAME["einsum"]
    attention = case.build("torch", torch.float64).attentions[0]
    x = zoo.floats(1, 3, 64).double().requires_grad_()
    with by_rows(attention, case, rows=2):
        assert torch.autograd.gradgradcheck(lambda t: attention(t).sum(-1), (x,), atol=1e-6, nondet_tol=0.0)
    model = zoo.SdpaCall()
    # torch's fused CPU kernel has no second derivative; its dense math has.
    with by_rows(model, zoo.SDPA_CALL, rows=2), sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(lambda t: model(t, t, t), (query,), atol=1e-6)


# ----------------------------------------------------------------------------------------------------- memory

PEAK = textwrap.dedent(
    """
    import json, sys
    import torch
    from transformers import LlamaConfig, LlamaModel

    torch.set_num_threads(1)
    by_rows, length = sys.argv[1] == "rows", int(sys.argv[2])
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=1,
                         num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=length)
    config._attn_implementation = "eager"
    model = LlamaModel(config)
    if by_rows:
        import attnpatch
        attnpatch.apply(model, mode="always")

    def step(length):
        x = torch.randn(1, length, 128, generator=torch.Generator().manual_seed(1)).requires_grad_()
        model(inputs_embeds=x, use_cache=False).last_hidden_state.square().mean().backward()
        return x.grad

    def memory(field):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

    step(64)  # what a first call allocates for good
    before = memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # the peak counts from here
    grad = step(length)
    peak = memory("VmHWM") - before
    print(json.dumps({"peak": peak, "norm": grad.double().norm().item()}))
    """
)


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_training_step(record_property):
    """Forward and backward of an eager layer at 4,096 tokens: at most a quarter of the native peak."""
    figures = {}
    for way in ("native", "rows"):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, way, "4096"],
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        figures[way] = json.loads(done.stdout.splitlines()[-1])
    native, rows = figures["native"]["peak"], figures["rows"]["peak"]
    record_property("peak_bytes", figures)
    print(f"training step at 4096 tokens: native {native / 2**20:.0f} MiB, by rows {rows / 2**20:.0f} MiB")
    assert abs(figures["rows"]["norm"] / figures["native"]["norm"] - 1) < 1e-5
    assert rows * 4 <= native, f"native {native / 2**20:.0f} MiB, by rows {rows / 2**20:.0f} MiB"
