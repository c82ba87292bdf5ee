"""``register_kernel``: kernels of the user's give maps and can be replaced."""

import dataclasses
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnpatch
from attnpatch import KernelCall
from attnpatch.errors import AttnpatchWarning, PatchError
from attnpatch.rows.kernels import table

TOKENS, BLOCK = 64, 16


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left():
    """Names of registered kernels make candidates of modules in the tests after these."""
    yield
    table.registered.clear()


def dense(q, k, v):
    """What a kernel computes, unseen by modes: ``[batch, length, heads, width]``."""
    with torch._C.DisableTorchFunction():
        q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
        out = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v
        return out.transpose(1, 2).float().clone()


def read(q, k, v):
    return KernelCall(
        *(x.transpose(1, 2) for x in (q, k, v)),
        output=lambda result: result.transpose(1, 2),
        returned=lambda result, lse: result.transpose(1, 2),
    )


class Mix(nn.Module):
    """Not attention by its name."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(32, 96)

    def of(self, x):
        return self.inside(x).unflatten(-1, (3, 4, 8)).unbind(2)


class Net(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.mix, self.last = mix, nn.Linear(32, 32)

    def forward(self, x):
        return self.last(self.mix(x))


# ------------------------------------------------------------------------------------------------ kinds of kernels


@attnpatch.register_kernel(read=read)
def decorated(q, k, v):
    return dense(q, k, v)


def plain(q, k, v):
    return dense(q, k, v)


def bad(q, k, v):
    """Not what its reader says."""
    return dense(q, k, v) * 1.5


extension = types.ModuleType("an_extension_of_a_user")
extension.attend = lambda q, k, v: dense(q, k, v)
sys.modules[extension.__name__] = extension


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return dense(q, k, v)

    @staticmethod
    def backward(ctx, grad):
        saved = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in saved)).transpose(1, 2)
        return torch.autograd.grad(out, saved, grad)


@torch.library.custom_op("attnpatch_tests::attend", mutates_args=())
def operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return dense(q, k, v)


CALLS = {
    "decorated function": lambda q, k, v: decorated(q, k, v),
    "function": lambda q, k, v: plain(q, k, v),
    "function of an extension": lambda q, k, v: extension.attend(q, k, v),
    "autograd function": lambda q, k, v: Own.apply(q, k, v),
    "custom operator": lambda q, k, v: operator(q, k, v),
    "custom operator by its path": lambda q, k, v: torch.ops.attnpatch_tests.attend(q, k, v),
}


@pytest.fixture(scope="module", autouse=True)
def registered():
    assert attnpatch.register_kernel(plain, read=read) is globals()["plain"]
    assert attnpatch.register_kernel(extension.attend, read=read) is extension.attend
    assert attnpatch.register_kernel(Own, read=read) is Own
    assert attnpatch.register_kernel(operator, read=read) is operator
    attnpatch.register_kernel(bad, read=read)


def net_of(kind):
    torch.manual_seed(0)

    class Of(Mix):
        def forward(self, x):
            return CALLS[kind](*self.of(x)).flatten(2)

    # The kernel's name is in the code of the function that it calls.
    return Net(Of())


def expected(net, x):
    q, k, _ = (each.transpose(1, 2).double() for each in net.mix.of(x))
    weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1).mean(1)
    parts = TOKENS // BLOCK
    return weights.view(-1, parts, BLOCK, parts, BLOCK).sum(-1).mean(2)


@pytest.mark.parametrize("kind", CALLS)
def test_a_map_and_the_replacement(kind):
    net, x = net_of(kind), torch.randn(2, TOKENS, 32)
    native = net(x)
    with torch.no_grad(), attnpatch.capture(net, attnpatch.Blocks.fixed(BLOCK)) as maps:
        assert torch.equal(net(x), native)
    assert not maps.left_out
    found = torch.from_numpy(maps["mix"].to_numpy())[:, 0]
    assert (found.double() - expected(net, x)).abs().max() < 1e-5

    attnpatch.apply(net, replace_kernels=True, mode="always")
    given = x.clone().requires_grad_()
    out = net(given)
    assert 0 < (out - native).abs().max() < 1e-5  # computed by torch, in float32
    report = attnpatch.report(net)
    assert report.totals["by_rows"] == 1
    (kernels,) = (site.kernels for site in report.sites if site.kernels)
    assert list(kernels.values()) == [1] and next(iter(kernels)).endswith(" (replaced)")
    assert f"kernels outside torch: {next(iter(kernels))} x1" in str(report)
    out.square().sum().backward()
    reference = x.clone().requires_grad_()
    q, k, v = (each.transpose(1, 2) for each in net.mix.of(reference))
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    net.last(mixed).square().sum().backward()
    assert (given.grad - reference.grad).abs().max() < 1e-4
    attnpatch.remove(net)


def test_a_kernel_that_computes_something_else_is_left_out():
    class Of(Mix):
        def forward(self, x):
            return bad(*self.of(x)).flatten(2)

    net = Net(Of())
    with (
        pytest.warns(AttnpatchWarning, match="bad: row 0"),
        torch.no_grad(),
        attnpatch.capture(net, attnpatch.Blocks.fixed(BLOCK)) as maps,
    ):
        net(torch.randn(1, TOKENS, 32))
    assert "bad: row" in str(maps.left_out) and "differs" in str(maps.left_out)


def test_a_function_in_a_closure_is_called_by_what_is_returned():
    def local(q, k, v):
        return dense(q, k, v)

    seen = attnpatch.register_kernel(local, read=read)
    assert seen is not local

    class Of(Mix):
        def forward(self, x):
            return seen(*self.of(x)).flatten(2)

    net = Net(Of())
    attnpatch.apply(net, replace_kernels=True, mode="always")
    net(torch.randn(1, TOKENS, 32))
    assert attnpatch.report(net).totals["by_rows"] == 1


# --------------------------------------------------------------------------------------------------------- errors


def failing(kernel_read):
    def local(q, k, v):
        return dense(q, k, v)

    seen = attnpatch.register_kernel(local, read=kernel_read)

    class Of(Mix):
        def forward(self, x):
            return seen(*self.of(x)).flatten(2)

    return Net(Of())


def test_what_cannot_be_registered():
    for given, words in (
        (3, r"register_kernel\(\) takes a function, not 3"),
        (nn.Linear(2, 2), r"attnpatch.register\(\) takes classes of modules"),
        (nn.Linear, r"not the class Linear"),
    ):
        with pytest.raises(PatchError, match=words):
            attnpatch.register_kernel(given, read=read)
    for given in (None, 3):
        with pytest.raises(PatchError, match=r"needs read=, a function that takes the kernel's arguments"):
            attnpatch.register_kernel(plain, read=given)


READERS = {
    "the reader of local returned tuple": lambda q, k, v: (q, k, v),
    "the reader of local failed with TypeError": lambda q: KernelCall(q, q, q),
    "KernelCall takes [batch, heads, length, width]": lambda q, k, v: KernelCall(q[0], k[0], v[0]),
    "heads of the query that are a multiple": lambda q, k, v: KernelCall(q, k.transpose(1, 2), v),
}


@pytest.mark.parametrize("words", READERS)
def test_what_a_reader_may_return(words):
    net = failing(READERS[words])
    attnpatch.apply(net, replace_kernels=True)
    with pytest.raises(PatchError) as raised:
        net(torch.randn(1, TOKENS, 32))
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_a_reader_may_refuse_a_call():
    def refuse(q, k, v):
        raise NotImplementedError("it needs the moon")

    net, x = failing(refuse), torch.randn(1, TOKENS, 32)
    native = net(x)
    attnpatch.apply(net, replace_kernels=True)
    assert torch.equal(net(x), native)
    with (
        pytest.warns(AttnpatchWarning, match="it needs the moon"),
        torch.no_grad(),
        attnpatch.capture(net, attnpatch.Blocks.fixed(BLOCK)) as maps,
    ):
        net(x)
    assert "it needs the moon" in str(maps.left_out)


def test_a_reader_is_replaced():
    net = failing(lambda q, k, v: None)

    def local(q, k, v):
        return dense(q, k, v)

    seen = attnpatch.register_kernel(local, read=lambda q, k, v: None)
    assert attnpatch.register_kernel(seen, read=read) is seen

    class Of(Mix):
        def forward(self, x):
            return seen(*self.of(x)).flatten(2)

    net = Net(Of())
    attnpatch.apply(net, replace_kernels=True)
    net(torch.randn(1, TOKENS, 32))


# ------------------------------------------------------------------------------------------------ before it runs


def unseen(q, k, v):
    """It cannot run on shapes."""
    return torch.from_numpy(dense(q, k, v).detach().numpy())


@pytest.mark.parametrize(
    ("policy", "decision", "reason"),
    [
        ({}, "native", "a kernel outside torch: nothing to save"),
        ({"replace_kernels": True}, "replaced", "torch's fused kernel in the place of unseen"),
        ({"replace_kernels": True, "mode": "always"}, "by rows", "in the place of unseen; mode is 'always'"),
    ],
)
def test_explain_does_not_run_the_kernel(policy, decision, reason):
    seen = attnpatch.register_kernel(unseen, read=read)

    class Of(Mix):
        def forward(self, x):
            return seen(*self.of(x)).flatten(2)

    said = attnpatch.explain(Net(Of()), inputs=torch.zeros(1, 2048, 32), **policy)
    (group,) = said.groups
    assert (group.kernel, group.decision, group.reason) == ("outside torch: unseen", decision, reason)
    assert group.temporaries < 2048 * 2048  # no scores
    assert "outside torch: unseen" in str(said)


# ------------------------------------------------------------------------------------------ what else reads weights


def causal_read(q, k, v):
    return dataclasses.replace(read(q, k, v), is_causal=True)


def causal(q, k, v):
    """``[batch, length, heads, width]``, as many queries as keys."""
    with torch._C.DisableTorchFunction():
        q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
        later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(later, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).float().clone()


def test_token_scores_and_heads_beside_a_kernel(request):
    """The same as with eager attention."""
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    seen = attnpatch.register_kernel(causal, read=causal_read)

    def attend(module, query, key, value, mask, scaling=None, **others):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        return seen(*(x.transpose(1, 2) for x in (query, key, value))), None

    AttentionInterface.register("a_kernel_of_a_user", attend)
    request.addfinalizer(lambda: AttentionInterface._global_mapping.pop("a_kernel_of_a_user"))
    found = []
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    for implementation in ("a_kernel_of_a_user", "eager"):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=97, num_key_value_heads=2, attn_implementation=implementation, **sizes
        )
        model = LlamaForCausalLM(config).eval()
        ids = torch.arange(40)[None] % 17
        with torch.no_grad(), attnpatch.token_scores(model, window=8) as scores:
            model(ids, use_cache=False)
        heads = attnpatch.heads(model, [list(range(20)) * 2])
        assert not scores.left_out and not heads.left_out
        found.append((scores[0], scores[1], *(heads[name] for name in ("previous", "sink", "local"))))
    for mine, expected in zip(*found, strict=True):
        assert mine.shape == expected.shape and (mine - expected).abs().max() < 1e-5


def opaque(q, k, v):
    """Its code names neither a softmax nor a product, as that of a C++ function."""
    return getattr(sys.modules[__name__], "den" + "se")(q, k, v)


def test_a_module_is_recognised_by_the_kernel_that_it_calls():
    class Of(Mix):
        def forward(self, x):
            return opaque(*self.of(x)).flatten(2)

    net = Net(Of())
    with pytest.raises(PatchError, match="no attention"):
        attnpatch.apply(net)
    attnpatch.register_kernel(opaque, read=read)
    attnpatch.apply(net, replace_kernels=True)
    net(torch.randn(1, TOKENS, 32))
    (found,) = (site for site in attnpatch.report(net).sites if site.kernels)
    assert (found.name, found.kernels) == ("mix", {"opaque (replaced)": 1})
