"""Whoever reads deferred scores or probabilities gets native gradients: hooks, checkpoints, functions of somebody's own."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import attnpatch

LENGTH, WIDTH = 24, 16


class Softmax(torch.autograd.Function):
    """Softmax with a backward pass of its own, as entmax, Megatron and DeBERTa's XSoftmax are."""

    @staticmethod
    def forward(ctx, scores):
        probabilities = scores.softmax(-1)
        ctx.save_for_backward(probabilities)
        return probabilities

    @staticmethod
    def backward(ctx, grad):
        (p,) = ctx.saved_tensors
        return p * (grad - (grad * p).sum(-1, keepdim=True))


class Doubled(torch.autograd.Function):
    """The identity with twice its gradient: what a recipe of the values cannot know."""

    @staticmethod
    def forward(ctx, scores):
        return scores.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Halved(torch.autograd.Function):
    """A step in place, as functions of somebody's own do them."""

    @staticmethod
    def forward(ctx, scores):
        ctx.mark_dirty(scores)
        return scores.mul_(0.5)

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


@torch.jit.script
def scripted(scores: torch.Tensor) -> torch.Tensor:
    return torch.softmax(scores * 0.2, -1)


@torch.jit.script
def scripted_step(scores: torch.Tensor) -> torch.Tensor:
    return torch.tanh(scores) * 2.0


class MyAttention(nn.Module):
    """Attention whose middle is given; what the middle keeps in ``seen`` is compared too."""

    def __init__(self, middle):
        super().__init__()
        torch.manual_seed(0)
        self.projection, self.middle, self.seen = nn.Linear(WIDTH, 3 * WIDTH), middle, {}
        self.dropout = nn.Dropout(0.0)

    def forward(self, x):
        query, key, value = self.projection(x).chunk(3, -1)
        return self.middle(self, query @ key.transpose(1, 2), query, value)


def hook_on_scores(module, scores, query, value):
    scores.register_hook(lambda grad: module.seen.update(scores=grad.clone()))
    return scores.softmax(-1) @ value


def hook_that_changes(module, scores, query, value):
    scores = scores * 0.5
    scores.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))
    probabilities = scores.softmax(-1)
    del scores
    return probabilities @ value


def retained(module, scores, query, value):
    probabilities = scores.softmax(-1)
    probabilities.retain_grad()
    module.kept = probabilities
    return probabilities @ value


def gradient_inside(module, scores, query, value):
    probabilities = scores.softmax(-1)
    out = probabilities @ value
    grads = torch.autograd.grad(out.square().sum(), [probabilities, value], retain_graph=True)
    module.seen.update(enumerate(grads))
    return out


def hook_on_a_part(module, scores, query, value):
    if not module.dropout._backward_hooks:
        module.dropout.register_full_backward_hook(lambda m, i, o: module.seen.update(dropped=o[0].clone()))
    return module.dropout(scores.softmax(-1)) @ value


def detached_scores(module, scores, query, value):
    return scores.detach().softmax(-1) @ value


def detached_probabilities(module, scores, query, value):
    return scores.softmax(-1).detach() @ value


def detached_view(module, scores, query, value):
    with torch.no_grad():
        view = scores.unflatten(-1, (2, -1)).flatten(-2)
    return view.softmax(-1) @ value + scores.softmax(-1) @ query


def frozen_value(module, scores, query, value):
    return scores.softmax(-1) @ value.detach()


def read_without_gradients(module, scores, query, value):
    probabilities = scores.softmax(-1)
    with torch.no_grad():
        module.seen.update(mean=probabilities.mean(), most=probabilities.max())
    return probabilities @ value + probabilities.sum(-1, keepdim=True).square() + probabilities.amax().exp()


def written_without_gradients(module, scores, query, value):
    with torch.no_grad():
        scores.mul_(0.5)
    return scores.softmax(-1) @ value


def written_through_detached(module, scores, query, value):
    scores.detach().mul_(0.5)
    return scores.softmax(-1) @ value


def written_in_steps(module, scores, query, value):
    scores *= 0.3
    scores += torch.arange(LENGTH) * 0.01
    scores.masked_fill_(torch.ones(LENGTH, LENGTH).triu(1).bool(), -1e4)
    scores[:, 3] = 0
    return scores.softmax(-1) @ value


def result_written(module, scores, query, value):
    out = scores.softmax(-1) @ value
    out += query
    return out


def bias_written_later(module, scores, query, value):
    bias = torch.zeros(LENGTH, LENGTH)
    first = (scores + bias).softmax(-1) @ value
    bias += 1 + torch.arange(LENGTH)
    return first + (scores + bias[None]).softmax(-1) @ value


def leaf_of_its_own(module, scores, query, value):
    module.kept = scores.detach().softmax(-1).requires_grad_()
    return module.kept @ value


def used_twice(module, scores, query, value):
    probabilities = scores.softmax(-1)
    return probabilities @ value + probabilities.square() @ query


def differentiated_twice(module, scores, query, value):
    out = scores.softmax(-1) @ value
    (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    return out + grad.sum()


def probabilities_differentiated_twice(module, scores, query, value):
    probabilities = scores.softmax(-1)
    out = probabilities @ value
    (grad,) = torch.autograd.grad(out.square().sum(), probabilities, create_graph=True)
    return out + grad.sum()


def function_on_scores(module, scores, query, value):
    return Softmax.apply(scores) @ value


def function_with_another_gradient(module, scores, query, value):
    return Doubled.apply(scores).softmax(-1) @ value


def function_in_place(module, scores, query, value):
    return Halved.apply(scores).softmax(-1) @ value


def retained_over_both_sides(module, scores, query, value):
    scores = scores + 0.1
    module.kept = scores
    out = (scores.softmax(-1) * scores.softmax(-2)) @ value
    scores.retain_grad()
    return out


def read_in_inference_mode(module, scores, query, value):
    with torch.inference_mode():
        module.seen.update(mean=scores.mean() * 1)
    scores *= 0.5
    return scores.softmax(-1) @ value


def joined_with_nothing(module, scores, query, value):
    return torch.cat([scores, scores[:0]]).softmax(-1) @ value


def kept_before_a_write(module, scores, query, value):
    scores = scores * 0.5
    scores.retain_grad()
    module.kept = scores
    scores.mul_(1.5)
    return scores.softmax(-1) @ value


def kept_after_a_write(module, scores, query, value):
    scores.mul_(1.5)
    scores.retain_grad()
    module.kept = scores
    return scores.softmax(-1) @ value


def kept_after_a_function_in_place(module, scores, query, value):
    scores = Halved.apply(scores)
    out = scores @ value
    scores.retain_grad()
    module.kept = scores
    return out


def kept_before_a_write_to_what_a_function_gave(module, scores, query, value):
    scores = scripted_step(scores)
    scores.retain_grad()
    module.kept = scores
    scores.add_(0.5)
    return scores @ value


def hooked_before_and_after_a_write(module, scores, query, value):
    scores.register_hook(lambda grad: module.seen.update(before=grad.clone()))
    scores.mul_(1.5)
    scores.register_hook(lambda grad: grad * 0.5)
    return scores.softmax(-1) @ value


def function_that_is_scripted(module, scores, query, value):
    return scripted(scores) @ value


def backward_from_inside(module, scores, query, value):
    probabilities = scores.softmax(-1)
    probabilities.square().sum().backward(retain_graph=True)
    return probabilities @ value


def checkpointed_softmax(module, scores, query, value):
    return checkpoint(lambda s: s.softmax(-1), scores, use_reentrant=False) @ value


def checkpointed_softmax_reentrant(module, scores, query, value):
    return checkpoint(lambda s: s.softmax(-1), scores, use_reentrant=True) @ value


def checkpointed_product(module, scores, query, value):
    return checkpoint(lambda s, v: s.softmax(-1) @ v, scores, value, use_reentrant=False)


def checkpointed_core(module, scores, query, value):
    def core(q, k, v):
        return (q @ k.transpose(1, 2)).softmax(-1).square() @ v

    return checkpoint(core, query, value, value, use_reentrant=False) + scores.softmax(-1) @ value


def checkpointed_with_what_is_computed_later(module, scores, query, value):
    bias = query.detach() @ query.detach().transpose(1, 2)
    out = checkpoint(lambda s, b: (s * 0.5 + b * 0.1).softmax(-1) @ value, scores, bias, use_reentrant=False)
    module.seen.update(scores=scores.detach().clone(), bias=bias.sum())
    return out


def checkpointed_around_what_is_computed_later(module, scores, query, value):
    bias = query.detach() @ query.detach().transpose(1, 2)
    out = checkpoint(lambda v: (scores * 0.5 + bias * 0.1).softmax(-1) @ v, value, use_reentrant=False)
    module.seen.update(scores=scores.detach().clone(), bias=bias.sum())
    return out


def checkpointed_and_computed_inside(module, scores, query, value):
    bias = query.detach() @ query.detach().transpose(1, 2)

    def core(s, b, v):
        first = (s + b * 0.1).softmax(-1) @ v
        return first * b.std() + (s - b).softmax(-1) @ v

    return checkpoint(core, scores, bias, value, use_reentrant=False)


def returned_by_a_checkpoint_before_another_write(module, scores, query, value):
    """A reentrant checkpoint gives what was computed a history; a write to anything else is none to that."""
    scores = checkpoint(lambda s: s.cpu(), scores, use_reentrant=True)
    beside = torch.zeros(2, 3)
    beside += 1.0
    return scores.tril() @ value


def returned_by_a_checkpoint_and_written(module, scores, query, value):
    scores = checkpoint(lambda s: s.cpu(), scores, use_reentrant=True)
    scores = scores * 1.0
    scores[..., 0] += 1.0
    return scores.softmax(-1) @ value


def checkpointed_scores_reentrant(module, scores, query, value):
    def core(q, k):
        return (q @ k.transpose(1, 2)).softmax(-1)

    return checkpoint(core, query, value, use_reentrant=True) @ value


def checkpointed_step_whose_bias_is_overwritten(module, scores, query, value):
    def core(s):
        bias = torch.arange(LENGTH) * 0.1
        s = s + bias
        bias.zero_()
        return Softmax.apply(s).square()

    return checkpoint(core, scores, use_reentrant=False) @ value


def checkpointed_step_that_overwrites_its_argument(module, scores, query, value):
    def core(s):
        view = s.flatten(0, 1)
        s[..., 0] = 0.25
        return s + view.view(s.shape)

    return checkpoint(core, scores, use_reentrant=False) @ value


def checkpointed_step_that_adds_a_bias_to_its_argument(module, scores, query, value):
    bias = torch.arange(LENGTH) * 0.1
    scores = checkpoint(lambda s, b: s.add_(b), scores * 0.5, bias, use_reentrant=False)
    scores.mul_(-0.75)
    others = checkpoint(lambda s, b: s.add_(b), scores.detach() * 0.5, query.mT[:, :1], use_reentrant=False)
    others.mul_(-0.75)
    return scores @ value + others @ value


def checkpointed_figures_of_what_is_normalised_along_its_rows_later(module, scores, query, value):
    core = lambda s: s + s.sum(-1, keepdim=True).softmax(-2)
    return checkpoint(core, scores, use_reentrant=False).softmax(-2) @ value


def given_other_values(module, scores, query, value):
    view, scaled = scores[:, 1:], scores * 3.0
    scores.data = scores.data * 0.25
    with torch.no_grad():
        module.seen.update(mean=scores.mean(), other=view.mean())
    view.mul_(0.5)
    return (scores + scaled).softmax(-1) @ value + view.mean()


def operand_given_other_values(module, scores, query, value):
    query, value = query * 1.0, value * 0.5
    scores = query @ value.mT
    query.data = query.data * 2.0
    value.data = value.data * 2.0
    return scores.softmax(-1) @ value


def figures_without_gradients_over_both_sides(module, scores, query, value):
    with torch.no_grad():
        most = scores.amax(-1, keepdim=True)
    scores = scores - most
    return ((scores - scores.amax(-2, keepdim=True)) @ value).square()


def bias_written_after_a_backward_pass(module, scores, query, value):
    bias = torch.arange(LENGTH) * 0.1
    probabilities = (scores + bias).softmax(-1)
    module.seen.update(grad=torch.autograd.grad(probabilities.square().sum(), query, retain_graph=True)[0])
    out = probabilities @ value
    bias.zero_()
    return out


def function_on_what_was_written_to_by_views(module, scores, query, value):
    scores[..., 0].fill_(-0.5)
    scores.diagonal(dim1=-2, dim2=-1).mul_(0.25)
    scores[:, 1].mul_(2.0)
    return Softmax.apply(scores) @ value


def detached_in_place(module, scores, query, value):
    probabilities = scores.softmax(-1)
    probabilities.detach_()
    module.seen.update(needs=torch.tensor(probabilities.requires_grad))
    return probabilities @ value


def hooked_and_gone_when_a_part_is_written_to(module, scores, query, value):
    scores = scores * 0.5
    scores.register_hook(lambda grad: module.seen.update(scores=grad.clone()))
    scores = torch.cat([scores, torch.zeros_like(scores[..., :1])], -1)[..., :-1]
    view = scores.expand_as(scores)
    view += 0.3
    return scores @ value


def kept_before_a_write_without_gradients(module, scores, query, value):
    scores = scores * 0.5
    scores.retain_grad()
    module.kept = scores
    with torch.no_grad():
        scores.mul_(0.5)
    return scores @ value


def kept_before_a_view_of_it_was_written_to(module, scores, query, value):
    scores = Doubled.apply(scores)
    scores.retain_grad()
    module.kept = scores
    view = scores.transpose(1, 2)
    view.add_(view)
    return scores @ value


def kept_after_a_part_was_written_without_gradients(module, scores, query, value):
    probabilities = scores.softmax(-1)
    with torch.no_grad():
        scores[..., 0].zero_()
    scores.retain_grad()
    module.kept = scores
    return scores @ value + probabilities @ query


def function_on_what_was_read_and_written_to_by_a_view(module, scores, query, value):
    scores.sum().item()
    scores[..., 0].zero_()
    return Doubled.apply(scores) @ value


def function_on_what_got_a_history_by_a_view(module, scores, query, value):
    scores = scores.detach() * 0.5
    scores.sum().item()
    scores[..., 0].add_(query[..., 0])
    module.seen.update(needs=torch.tensor(scores.requires_grad))
    return Doubled.apply(scores) @ value


def nothing_done_in_place_to_what_a_function_has_saved(module, scores, query, value):
    probabilities = Softmax.apply(scores)
    nn.functional.dropout(probabilities, 0.0, inplace=True)
    return probabilities @ value


def other_values_for_what_a_function_has_saved(module, scores, query, value):
    probabilities = Softmax.apply(scores)
    probabilities.data = probabilities.data * 0.5
    return probabilities @ value


def hook_on_an_edge(module, scores, query, value):
    probabilities = scores.softmax(-1)
    if scores.requires_grad:
        probabilities.grad_fn.register_prehook(lambda grads: (grads[0] * 0.5,))
        scores.grad_fn.register_hook(lambda _, grads: module.seen.update(scores=grads[0].clone()))
    return probabilities @ value


def hook_on_an_edge_after_a_write(module, scores, query, value):
    scores = Halved.apply(scores)
    if scores.requires_grad:
        scores.grad_fn.register_prehook(lambda grads: (grads[0] * 0.5,))
    return scores.softmax(-1) @ value


def gradient_of_an_edge(module, scores, query, value):
    edge = torch.autograd.graph.get_gradient_edge(scores)
    out = scores.softmax(-1) @ value
    del scores
    module.seen.update(enumerate(torch.autograd.grad(out.square().sum(), edge, retain_graph=True)))
    return out


def hooks_on_many(module, scores, query, value):
    probabilities = scores.softmax(-1)
    told = lambda grads: module.seen.update(enumerate(grad.clone() for grad in grads))
    if scores.requires_grad:
        torch.autograd.graph.register_multi_grad_hook([scores, probabilities], told)
    return probabilities @ value


def hook_on_a_leaf_of_its_own(module, scores, query, value):
    leaf = scores.detach().softmax(-1).requires_grad_()
    leaf.register_post_accumulate_grad_hook(lambda t: module.seen.update(grad=t.grad.clone()))
    return leaf @ value


def many_gradients_at_once(module, scores, query, value):
    probabilities = scores.softmax(-1)
    out = probabilities @ value
    grads = torch.arange(3 * out.numel()).view(3, *out.shape).cos()
    found = torch.autograd.grad(out, [probabilities, query], grads, is_grads_batched=True, retain_graph=True)
    module.seen.update(enumerate(found))
    return out


class Named(torch.Tensor):
    """A class of tensors of somebody's own."""


def another_class_of_tensor(module, scores, query, value):
    return (scores.as_subclass(Named).softmax(-1) @ value).as_subclass(torch.Tensor)


MIDDLES = [
    many_gradients_at_once, another_class_of_tensor,
    hook_on_an_edge, hook_on_an_edge_after_a_write, gradient_of_an_edge, hooks_on_many, hook_on_a_leaf_of_its_own,
    hook_on_scores, hook_that_changes, retained, gradient_inside, hook_on_a_part, detached_scores,
    detached_probabilities, detached_view, frozen_value, read_without_gradients, written_without_gradients,
    written_in_steps, result_written, bias_written_later, leaf_of_its_own, used_twice,
    differentiated_twice, probabilities_differentiated_twice, function_on_scores, function_with_another_gradient,
    function_in_place, retained_over_both_sides, read_in_inference_mode, joined_with_nothing,
    written_through_detached, kept_before_a_write, kept_after_a_write, kept_after_a_function_in_place,
    kept_before_a_write_to_what_a_function_gave, hooked_before_and_after_a_write, function_that_is_scripted, backward_from_inside, checkpointed_softmax, checkpointed_softmax_reentrant,
    returned_by_a_checkpoint_before_another_write, returned_by_a_checkpoint_and_written,
    checkpointed_with_what_is_computed_later, checkpointed_around_what_is_computed_later,
    checkpointed_and_computed_inside, checkpointed_product, checkpointed_core, checkpointed_scores_reentrant,
    given_other_values,
    operand_given_other_values, figures_without_gradients_over_both_sides, checkpointed_step_whose_bias_is_overwritten,
    bias_written_after_a_backward_pass, function_on_what_was_written_to_by_views, detached_in_place,
    hooked_and_gone_when_a_part_is_written_to, kept_before_a_write_without_gradients,
    checkpointed_step_that_overwrites_its_argument, checkpointed_step_that_adds_a_bias_to_its_argument,
    checkpointed_figures_of_what_is_normalised_along_its_rows_later,
    kept_before_a_view_of_it_was_written_to, kept_after_a_part_was_written_without_gradients,
    function_on_what_was_read_and_written_to_by_a_view, function_on_what_got_a_history_by_a_view,
    nothing_done_in_place_to_what_a_function_has_saved, other_values_for_what_a_function_has_saved,
]  # fmt: skip


def gradients(middle, mode, around=None):
    """What a training step leaves: the result, whether it has a history, and every gradient.

    ``around``: the module is called in a checkpoint, which is ``"reentrant"`` or ``"other"``.
    """
    module = MyAttention(middle)
    x = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    with attnpatch.patched(module, mode=mode, min_tokens=4):
        if around is None:
            result = module(x)
        else:
            result = checkpoint(module, x.requires_grad_(), use_reentrant=around == "reentrant")
        result.square().sum().backward()
        totals = attnpatch.report(module).totals
    found = {"result": result.detach(), "weight": module.projection.weight.grad, **module.seen}
    if hasattr(module, "kept"):
        found["kept"] = module.kept.grad
    return {"needs": result.requires_grad} | found, totals


@pytest.mark.parametrize("around", [None, "reentrant", "other"])
@pytest.mark.parametrize("middle", MIDDLES, ids=lambda middle: middle.__name__)
def test_gradients_are_native(middle, around):
    try:
        native, _ = gradients(middle, "never", around)
    except RuntimeError as error:
        assert around is not None, error
        pytest.skip(f"torch itself does not: {error}")
    got, totals = gradients(middle, "always", around)
    assert totals["by_rows"] + totals["materialised"] > 0 and not totals["failed"], totals
    assert list(got) == list(native)
    assert got.pop("needs") == native.pop("needs")
    for name, expected in native.items():
        most = float(expected.abs().max()) if expected is not None and expected.numel() else 0.0
        torch.testing.assert_close(
            got[name], expected, rtol=1e-4, atol=1e-5 * max(1.0, most), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("needs", [(q, k, v) for q in (0, 1) for k in (0, 1) for v in (0, 1)])
def test_requires_grad_is_native(needs):
    """Of scores, of probabilities and of the result, whichever operands need gradients."""

    class Asking(nn.Module):
        def forward(self, query, key, value):
            scores = query @ key.transpose(1, 2)
            probabilities = scores.softmax(-1)
            self.asked = [
                tensor.requires_grad
                for tensor in (scores, probabilities, scores > 0, scores.detach(), scores.argmax(-1))
            ]
            return probabilities @ value

    found = []
    for mode in ("never", "always"):
        module, operands = Asking(), torch.randn(3, 2, LENGTH, WIDTH).unbind()
        operands = [
            tensor.clone().requires_grad_(bool(need)) for tensor, need in zip(operands, needs, strict=True)
        ]
        with attnpatch.patched(module, mode=mode, min_tokens=4, sites=[""]):
            result = module(*operands)
        found.append([*module.asked, result.requires_grad, result.is_leaf])
    assert found[0] == found[1]


class Largest(TorchDispatchMode):
    """Notes the most bytes of one tensor that was made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.most = max(self.most, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(
    ("middle", "is_whole"), [(used_twice, False), (frozen_value, False), (retained, True)]
)
def test_only_who_asks_gets_the_gradient_of_scores(middle, is_whole):
    """A training step of which nobody looks at scores never holds their gradient."""
    tokens = 2048
    module = MyAttention(middle)
    with attnpatch.patched(module, mode="always", rows=64, heads=1):
        result = module(torch.randn(1, tokens, WIDTH))
        with Largest() as held:
            result.sum().backward()
    assert (held.most >= tokens * tokens * 4) == is_whole


def test_weights_that_leave_a_checkpoint():
    """Returned weights of a checkpointed layer, differentiated beside its output, whose forward runs again meanwhile."""

    def middle(module, scores, query, value):
        probabilities = scores.softmax(-1)
        module.weights = probabilities
        return probabilities @ value

    def gradient(mode, use_reentrant):
        module = MyAttention(middle)
        layer = lambda x: (module(x), module.weights)
        with attnpatch.patched(module, mode=mode, min_tokens=4):
            x = torch.linspace(-1, 1, 2 * LENGTH * WIDTH).view(2, LENGTH, WIDTH).requires_grad_()
            out, weights = checkpoint(layer, x, use_reentrant=use_reentrant)
            torch.autograd.backward([out, weights], [torch.ones_like(out), torch.full(weights.shape, 0.25)])
        return x.grad

    for use_reentrant in (True, False):
        native, by_rows = gradient("never", use_reentrant), gradient("always", use_reentrant)
        torch.testing.assert_close(by_rows, native, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias", [None, 0.1])
def test_the_fused_kernel_leaves_scores_observable(bias):
    """``fuse=True``: the kernel has no scores, and who asks for their gradient gets it."""

    def middle(module, scores, query, value):
        scores = scores / WIDTH**0.5
        scores = scores if bias is None else scores + bias * torch.arange(LENGTH)
        probabilities = scores.softmax(-1)
        out = probabilities @ value
        probabilities.retain_grad()
        module.kept = probabilities
        return out

    found = []
    for options in ({"mode": "never"}, {"fuse": True, "min_tokens": 4}):
        module = MyAttention(middle)
        with attnpatch.patched(module, **options):
            module(torch.linspace(-1, 1, 2 * LENGTH * WIDTH).view(2, LENGTH, WIDTH)).square().sum().backward()
        found.append((module.kept.grad, module.projection.weight.grad))
    for mine, native in zip(*found[::-1], strict=True):
        torch.testing.assert_close(mine, native, rtol=1e-3, atol=1e-5)


def test_two_checkpointed_passes_of_one_size(monkeypatch):
    """Each runs again as it ran, natively or by rows, though memory has changed since."""
    module = MyAttention(used_twice)
    attnpatch.apply(module, min_tokens=4)
    x = torch.randn(2, LENGTH, WIDTH)
    with_room = []
    for free in ("900GB", "1GB", "900GB", "1GB"):
        monkeypatch.setenv("ATTNPATCH_FREE_MEMORY", free)
        with_room.append(checkpoint(module, x, use_reentrant=False))
    sum(result.sum() for result in with_room).backward()
    again = module.projection.weight.grad.clone()
    attnpatch.remove(module)
    module.zero_grad()
    (4 * module(x).sum()).backward()
    torch.testing.assert_close(again, module.projection.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_narrow_dtypes_are_summed_in_float32(dtype):
    """The error of keys' and values' gradients does not grow with the number of steps: at most 1.1 times native's."""
    generator = torch.Generator().manual_seed(2)
    operands = [torch.randn(2, 1024, 32, generator=generator) for _ in range(3)]
    grad = torch.randn(2, 1024, 32, generator=generator)

    class Plain(nn.Module):
        def forward(self, query, key, value):
            return (query @ key.transpose(1, 2) * 32**-0.5).softmax(-1) @ value

    def found(dtype, **options):
        module, tensors = Plain(), [tensor.to(dtype).requires_grad_() for tensor in operands]
        with attnpatch.patched(module, sites=[""], min_tokens=4, **options):
            return torch.autograd.grad(module(*tensors), tensors, grad.to(dtype))

    exact = [tensor.to(dtype).double() for tensor in operands]
    exact = [tensor.requires_grad_() for tensor in exact]
    exact = torch.autograd.grad(Plain()(*exact), exact, grad.to(dtype).double())
    native = found(dtype, mode="never")
    for rows in (512, 64, 8):
        by_rows = found(dtype, mode="always", rows=rows)
        for mine, theirs, expected in zip(by_rows, native, exact, strict=True):
            error, least = ((g.double() - expected).square().mean().sqrt() for g in (mine, theirs))
            assert error <= 1.1 * least, (rows, float(error), float(least))
