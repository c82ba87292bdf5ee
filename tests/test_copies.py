"""Copies of a patched model, and what else stands in an instance's forward, also after other tools were at work."""

import copy
import functools
import inspect
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from test_combinations import align, attentions, logits, small_llama, unhook
from torch import nn
from traces import described, first_difference

import attnpatch


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def replicated(model: nn.Module) -> nn.Module:
    """What ``DataParallel`` makes of a model on each device, on the CPU."""
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, replicas.get(child))
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.detach().clone())
        for name, buffer in module._buffers.items():
            setattr(replica, name, None if buffer is None else buffer.clone())
    return replicas[model]


COPIES = [copy.deepcopy, through_pickle, through_torch_save, replicated]


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("hooked", ["never", "patch_first", "hook_first", "hook_still_on"])
def test_copies(copied, hooked, tmp_path):
    """A copy of a patched model goes by rows on its own weights, also where accelerate was at work before."""
    if hooked == "hook_still_on" and copied in (through_pickle, through_torch_save):
        pytest.skip("accelerate's forward is a local function, which cannot be pickled")
    native = logits(small_llama())
    model = small_llama()  # not run yet: the hooks of transformers cannot be pickled
    if hooked in ("hook_first", "hook_still_on"):
        align(model, tmp_path, offload=False)
    attnpatch.apply(model, mode="always", rows=7)
    if hooked == "patch_first":
        align(model, tmp_path, offload=False)
    if hooked in ("patch_first", "hook_first"):
        unhook(model)
    other = copied(model)
    assert torch.equal(logits(other)["logits"], native["logits"])
    assert attnpatch.report(other).totals["by_rows"] == 2
    if copied is replicated and hooked != "never":
        return  # accelerate's forward stays bound to the module it was made for, patched or not
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.zero_()
    changed = logits(other)["logits"]
    assert not torch.equal(changed, native["logits"]), "the copy runs the weights of the original"
    if copied is not replicated:
        attnpatch.remove(other)
        assert torch.equal(logits(other)["logits"], changed)
        described(other)  # fails on anything of ours


def test_a_copy_of_a_removed_patch_is_as_ever(tmp_path):
    model = attnpatch.apply(align(small_llama(), tmp_path, offload=False), mode="always")
    copied = copy.deepcopy(unhook(model))
    attnpatch.remove(model)
    attnpatch.remove(copied)
    assert not first_difference(
        described(copied), described(unhook(align(small_llama(), tmp_path, offload=False)))
    )


# ----------------------------------------------------------------------------------------------- forward of one's own


def own_forward(model: nn.Module, wrap: Callable) -> nn.Module:
    inner = model.forward
    model.forward = wrap(inner)
    return model


def doubled(forward: Callable) -> Callable:
    @functools.wraps(forward)
    def twice(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    return twice


@pytest.mark.parametrize("compiles", [False, True])
def test_a_forward_of_ones_own(compiles):
    """Somebody's function in the instance is called as ever, compiled or not, and keeps its signature."""
    torch.compiler.reset()
    model = own_forward(small_llama(), doubled)
    runs = torch.compile(model, backend="eager", fullgraph=True) if compiles else model
    native, signature = logits(runs)["logits"], inspect.signature(model.forward)
    before = dict(vars(model))
    attnpatch.apply(model, mode="always", rows=7)
    assert inspect.signature(model.forward) == signature
    assert torch.equal(logits(runs)["logits"], native)
    attnpatch.remove(model)
    assert dict(vars(model)) == before


def through_class(module: nn.Module, *args, **kwargs):
    return type(module).forward(module, *args, **kwargs)


def test_a_slot_that_reaches_the_class_and_is_emptied():
    """Whether the instance's forward reaches the class's or goes away: each call is served once."""
    model = small_llama()
    for attention in attentions(model):
        attention.forward = functools.partial(through_class, attention)
    attnpatch.apply(model, mode="never")
    logits(model)
    assert attnpatch.report(model).totals["native"] == 2
    del attentions(model)[0].forward
    logits(model)
    assert attnpatch.report(model).totals["native"] == 4
    attnpatch.remove(model)
    described(model)
