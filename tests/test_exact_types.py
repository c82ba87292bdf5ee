"""Hosts compare classes exactly, so a patched module has its own, and the class is as it was afterwards.

The function that stands in a class's namespace while instances are patched serves those and nobody else.
"""

import copy
import functools
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
import zoo
from torch import nn

import attnpatch
from attnpatch.patching.class_forward import is_gate
from attnpatch.patching.forward_swap import STATE

FLOATS = zoo.floats(2, 17, 16)


class PlainAttention(nn.Module):
    """Attention with a gradient, a buffer and an argument that has a default."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 16)

    def forward(self, x, scale: float = 0.25):
        x = self.project(x)
        return torch.matmul(torch.matmul(x, x.transpose(-1, -2)).mul(scale).softmax(-1), x)


class InheritedAttention(PlainAttention):
    """Has no forward of its own."""


class OuterAttention(PlainAttention):
    def forward(self, x, scale: float = 0.25):
        return super().forward(x, scale) + 1


class CallableForward:
    """A forward that is an object, told its module by being bound."""

    def __get__(self, instance, owner=None):
        return self if instance is None else functools.partial(PlainAttention.forward, instance)

    def __call__(self, module, x):
        return PlainAttention.forward(module, x)


class ObjectAttention(PlainAttention):
    forward = CallableForward()


class PartialAttention(PlainAttention):
    forward = functools.partialmethod(PlainAttention.forward, scale=0.5)


KINDS = [PlainAttention, InheritedAttention, OuterAttention, ObjectAttention, PartialAttention]


@pytest.fixture(autouse=True)
def nobody_is_patched():
    """What earlier tests left in cycles would still count as patched."""
    gc.collect()


def namespaces(*kinds):
    return [dict(vars(base)) for kind in kinds for base in kind.__mro__]


def is_as_it_was(kind):
    return not any(is_gate(vars(base).get("forward")) for base in kind.__mro__)


def by_rows(model):
    return attnpatch.report(model).totals["by_rows"]


# --------------------------------------------------------------------------------------------- what hosts compare


def captured_inside(model):
    with attnpatch.capture(model, blocks=attnpatch.Blocks.fixed(8)):
        model(FLOATS)
        yield model


def explained(model):
    """A patch of its own lies on top while that runs."""
    attnpatch.explain(model, inputs=FLOATS)
    yield model


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    yield torch.load(buffer, weights_only=False)


def sent_on(model):
    """A pickle that arrives where no instance is patched any more."""
    data = pickle.dumps(model)
    attnpatch.remove(model)
    assert is_as_it_was(type(model[0]))
    yield pickle.loads(data)


def dropped(model):
    """A copy outlives the model that it is of."""
    other = copy.deepcopy(model)
    attnpatch.remove(model)
    yield other


STAGES = {
    "patched": lambda model: iter([model]),
    "captured": captured_inside,
    "explained": explained,
    "deepcopy": lambda model: iter([copy.deepcopy(model)]),
    "shallow": lambda model: iter([copy.copy(model)]),
    "pickle": lambda model: iter([pickle.loads(pickle.dumps(model))]),
    "torch_save": through_torch_save,
    "sent_on": sent_on,
    "outlived": dropped,
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_class_is_the_hosts(kind, stage):
    """At every stage: the exact class, served by rows; afterwards every class's namespace is what it was."""
    before = namespaces(kind)
    model = nn.Sequential(kind())
    native = model(FLOATS)
    attnpatch.apply(model, mode="always", rows=7)
    for other in STAGES[stage](model):
        assert {type(module) for module in other.modules()} <= {nn.Sequential, kind, nn.Linear}
        assert all(module.__class__ is type(module) for module in other.modules())
        count = by_rows(other)
        assert torch.equal(other(FLOATS), native)
        assert by_rows(other) == count + 1
        del other
    del model
    gc.collect()
    assert namespaces(kind) == before


def test_hosts_that_compare_classes():
    """diffusers' GLIGEN looks for its layers by exact class; its pipelines keep components by theirs."""
    pytest.importorskip("diffusers")
    import pipelines
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = attnpatch.apply(pipelines.build("sd15"), mode="always")
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.unet is pipe.unet and other.vae is pipe.vae
    with attnpatch.capture(pipe):
        assert type(pipe) is pipe.__class__ is type(pipelines.build("sd15"))
        assert StableDiffusionImg2ImgPipeline.from_pipe(pipe).unet is pipe.unet


def test_of_two_pipelines_of_a_class_the_captured_one_is_watched():
    pytest.importorskip("diffusers")
    import pipelines

    pipe, other = pipelines.build("sd15"), pipelines.build("sd15")
    before = namespaces(type(pipe))
    with attnpatch.capture(pipe) as maps:
        pipelines.run(other, "sd15")
        with pytest.raises(attnpatch.errors.CaptureError):
            maps.heat_map("red")
        pipelines.run(pipe, "sd15")
        assert maps.heat_map("red").max() > 0
    assert namespaces(type(pipe)) == before


# ------------------------------------------------------------------------------------------ instances of one class


def test_an_unpatched_instance_is_its_class_s_own():
    """Neither served nor marked; also compiled in one graph, scripted, traced and called by a subclass."""
    patched, other, outer = PlainAttention(), PlainAttention(), OuterAttention()
    before = dict(vars(other))
    native, of_outer = other(FLOATS), outer(FLOATS)
    attnpatch.apply(patched, mode="always", sites=[""])
    assert torch.equal(other(FLOATS), native)
    assert by_rows(patched) == 0
    with pytest.raises(attnpatch.errors.PatchError):
        attnpatch.report(other)
    for run, expected in (
        (torch.compile(other, backend="eager", fullgraph=True), native),
        (torch.compile(outer, backend="eager", fullgraph=True), of_outer),
        (torch.jit.script(other), native),
        (torch.jit.trace(other, FLOATS), native),
        (torch.fx.symbolic_trace(other), native),
    ):
        assert torch.equal(run(FLOATS), expected)
    torch.compiler.reset()
    assert torch.equal(torch.jit.script(patched)(FLOATS), torch.jit.script(copy.deepcopy(patched))(FLOATS))
    assert set(vars(other)) - set(before) <= {"__overloads__", "_is_torch_compile"}  # torch's own


def test_a_compiled_instance_is_compiled_at_most_once_more():
    """However often another instance of its class is patched and not."""
    graphs = []
    torch.compiler.reset()
    other = PlainAttention()
    run = torch.compile(other, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    run(FLOATS)
    for _ in range(5):
        with attnpatch.patched(PlainAttention(), mode="always"):
            run(FLOATS)
        run(FLOATS)
    torch.compiler.reset()
    assert len(graphs) <= 2


def test_the_last_one_out():
    """Removed one by one, or only dropped, the class is let go with the last."""
    original = PlainAttention.forward
    models = [attnpatch.apply(PlainAttention(), mode="always") for _ in range(3)]
    attnpatch.remove(models.pop())
    assert is_gate(PlainAttention.forward)
    models[1](FLOATS)
    assert by_rows(models[1]) == 1
    del models[0]
    assert is_gate(PlainAttention.forward)
    del models[0]
    assert PlainAttention.forward is original


def test_a_class_and_its_subclass_are_patched_at_once():
    """``super().forward()`` is part of the call that is served, not another one."""
    for kinds in ([PlainAttention, OuterAttention], [OuterAttention, PlainAttention]):
        models = [kind() for kind in kinds]
        natives = [model(FLOATS) for model in models]
        for model in models:
            attnpatch.apply(model, mode="always", rows=7)
        for model, native in zip(models, natives, strict=True):
            assert torch.equal(model(FLOATS), native)
            assert by_rows(model) == 1
        attnpatch.remove(models[0])
        models[1](FLOATS)
        assert by_rows(models[1]) == 2
        attnpatch.remove(models[1])
        assert is_as_it_was(OuterAttention)


def test_a_class_that_another_tool_changes_for_the_module():
    """A subclass of its own, as parametrizations and FSDP2 give it, before the patch or after."""
    for is_first in (False, True):
        model = PlainAttention()
        native = model(FLOATS)
        if not is_first:
            attnpatch.apply(model, mode="always", rows=7)
        model.__class__ = type("Changed", (PlainAttention,), {})
        if is_first:
            attnpatch.apply(model, mode="always", rows=7)
        assert torch.equal(model(FLOATS), native)
        assert by_rows(model) == 1
        assert torch.equal(copy.deepcopy(model)(FLOATS), native)
        attnpatch.remove(model)
        assert is_as_it_was(type(model))


# ------------------------------------------------------------------------------ a forward that somebody else replaces


@pytest.fixture
def replaceable():
    original = PlainAttention.forward
    yield original
    PlainAttention.forward = original


@pytest.mark.parametrize("goes_on", [True, False])
@pytest.mark.parametrize("who", [PlainAttention, InheritedAttention])
def test_a_tool_gives_the_class_another_forward(who, goes_on, replaceable):
    """Before a long call of the model it is found and served, once; afterwards the tool's stays."""
    model = attnpatch.apply(nn.Sequential(InheritedAttention()), mode="always", rows=7)
    own = who.forward

    def replaced(self, x, scale=0.25):
        return own(self, x, scale) * 2 if goes_on else replaceable(self, x, scale) * 2

    who.forward = replaced
    try:
        native = replaceable(model[0], FLOATS) * 2
        assert torch.equal(model(FLOATS), native)
        assert by_rows(model) == 1
        attnpatch.remove(model)
        assert vars(who)["forward"] is replaced
        assert torch.equal(model(FLOATS), native)
        assert not is_gate(own)
    finally:
        if who is InheritedAttention:
            del who.forward


def test_what_a_tool_put_back_in_the_wrong_order_holds_nothing_of_ours(replaceable):
    model = attnpatch.apply(PlainAttention(), mode="always")
    before, PlainAttention.forward = PlainAttention.forward, lambda self, x: x
    attnpatch.remove(model)
    PlainAttention.forward = before
    assert is_as_it_was(PlainAttention)
    assert PlainAttention.forward.__code__ is replaceable.__code__
    assert torch.equal(model(FLOATS), replaceable(model, FLOATS))


def test_what_a_tool_binds_of_an_unpatched_instance_becomes_the_class_s_own():
    patched, other = attnpatch.apply(PlainAttention()), PlainAttention()
    native = other(FLOATS)
    bound = other.forward
    attnpatch.remove(patched)
    assert bound.__func__.__code__ is PlainAttention.forward.__code__
    assert not any(
        "attnpatch" in str(value) for value in (bound.__func__.__kwdefaults__, vars(bound.__func__))
    )
    assert torch.equal(bound(FLOATS, scale=0.25), native)


# ------------------------------------------------------------------------------------------------------- lifetime


def made_here():
    class LocalAttention(PlainAttention):
        def forward(self, x):
            return super().forward(x)

    return LocalAttention


@pytest.mark.parametrize("ends", ["removed", "dropped", "captured"])
def test_a_class_that_nobody_uses_goes(ends):
    """A class made in a function, once its patched instance is gone."""
    model = nn.Sequential(made_here()())
    kind = weakref.ref(type(model[0]))
    if ends == "captured":
        with attnpatch.capture(model, blocks=attnpatch.Blocks.fixed(8)):
            model(FLOATS)
    else:
        attnpatch.apply(model, mode="always")
        model(FLOATS)
    if ends == "removed":
        attnpatch.remove(model)
    del model
    gc.collect()
    assert kind() is None


def test_a_model_goes_without_the_garbage_collector():
    model = attnpatch.apply(nn.Sequential(PlainAttention()), mode="always")
    model(FLOATS)
    weight = weakref.ref(model[0].project.weight)
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_instances_come_and_go_in_threads():
    """While one thread patches and unpatches instances, calls of others are right."""
    other, stop, errors = PlainAttention(), threading.Event(), []
    native = other(FLOATS)

    def call():
        with torch.no_grad():
            while not stop.is_set():
                if not torch.equal(other(FLOATS), native):
                    errors.append("another result")

    def patch():
        for _ in range(50):
            model = attnpatch.apply(PlainAttention(), mode="always")
            model(FLOATS)
            if by_rows(model) != 1:
                errors.append("not served")
            attnpatch.remove(model)

    caller, patchers = threading.Thread(target=call), [threading.Thread(target=patch) for _ in range(2)]
    for thread in (caller, *patchers):
        thread.start()
    for thread in patchers:
        thread.join()
    stop.set()
    caller.join()
    assert not errors
    assert is_as_it_was(PlainAttention) and STATE not in vars(other)
