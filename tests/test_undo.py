"""A patch goes in, is copied and compiled with its model, and comes out without a trace."""

import copy
import gc
import inspect
import io
import pickle
import shutil
import threading

import pytest
import torch
import zoo
from torch import nn

import attnpatch
from attnpatch import Blocks, errors
from attnpatch.patching.forward_swap import STATE
from attnpatch.patching.patch import Patch, patch_of


def snapshot(model):
    return [(type(module), dict(vars(module))) for module in model.modules()]


def forwards(model):
    return [vars(base).get("forward") for module in model.modules() for base in type(module).__mro__]


def run(model):
    case = zoo.BY_NAME["llama"]
    return case.run(model, case.inputs("left", torch.float32))["logits"]


def small_llama(used=True):
    """A model that has run once: transformers puts hooks of its own in at the first call, patched or not."""
    model = zoo.BY_NAME["llama"].build("eager")
    if used:
        with torch.no_grad():
            run(model)
    return model


@pytest.mark.parametrize("name", ["llama", "t5", "deberta_v2", "whisper", "multihead_weights_mean", "einsum"])
def test_remove_leaves_nothing(name):
    case = zoo.BY_NAME[name]
    model = case.build(case.implementations[0])
    for cls in case.register:
        attnpatch.register(cls)
    with torch.no_grad():
        case.run(model, case.inputs(case.paddings[0], torch.float32))
        gc.collect()
        before, of_classes = snapshot(model), forwards(model)
        attnpatch.apply(model, mode="always", rows=7)
        assert snapshot(model) != before and forwards(model) != of_classes
        case.run(model, case.inputs(case.paddings[0], torch.float32))
        attnpatch.remove(model)
    assert snapshot(model) == before and forwards(model) == of_classes


def test_an_exception_inside_patched_leaves_nothing():
    model = small_llama()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), attnpatch.patched(model, mode="always"):
        run(model)
        raise ZeroDivisionError
    assert snapshot(model) == before
    with pytest.raises(errors.PatchError, match="not patched"):
        attnpatch.report(model)


def test_an_exception_inside_the_model_leaves_nothing():
    model = small_llama()
    before = snapshot(model)
    with pytest.raises(IndexError), attnpatch.patched(model, mode="always"):
        model(torch.tensor([[10**6]]))
    assert snapshot(model) == before
    # The mode is not left active either: a product outside any model is a product.
    assert type(torch.ones(1, 4, 8) @ torch.ones(1, 8, 4)) is torch.Tensor


def test_an_exception_inside_capture_leaves_nothing():
    model = small_llama()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), attnpatch.capture(model, blocks=Blocks.fixed(8)):
        run(model)
        raise ZeroDivisionError
    assert snapshot(model) == before


def test_patched_inside_applied():
    model = attnpatch.apply(small_llama(), min_tokens=5)
    with attnpatch.patched(model, mode="always"):
        assert attnpatch.report(model).policy.mode == "always"
    assert attnpatch.report(model).policy == attnpatch.Policy(min_tokens=5)
    with attnpatch.capture(model, blocks=Blocks.fixed(8)):
        pass
    assert attnpatch.report(model).policy == attnpatch.Policy(min_tokens=5)


def test_applying_twice_is_one_patch():
    model = small_llama()
    before = snapshot(model)
    assert attnpatch.apply(model, mode="always") is model
    attnpatch.apply(model, mode="never")
    with torch.no_grad():
        run(model)
    assert attnpatch.report(model).totals["native"] == 2
    attnpatch.remove(model)
    assert snapshot(model) == before


def test_a_part_and_the_whole_are_not_patched_twice():
    model = small_llama()
    attnpatch.apply(model.model.layers[0])
    before = snapshot(model)
    with pytest.raises(errors.PatchError, match=r"model\.layers\.0.*patched already"):
        attnpatch.apply(model)
    assert snapshot(model) == before


def test_what_is_left_of_a_patched_model_can_be_unpatched():
    outer = nn.Sequential(small_llama())
    inner = outer[0]
    plain = snapshot(inner)
    attnpatch.apply(outer, mode="always")
    del outer
    with pytest.raises(errors.PatchError, match=r"call attnpatch\.remove"):
        attnpatch.apply(inner)
    attnpatch.remove(inner)
    assert snapshot(inner) == plain
    with pytest.raises(errors.PatchError, match="not patched"):
        attnpatch.remove(inner)


def automatic(model):
    return Patch(model, attnpatch.Policy(mode="never"), automatic=True)


def test_an_automatic_patch_gives_way():
    """What somebody asks for lies on top of it, and leaves it as it was."""
    model = small_llama()
    plain = snapshot(model)
    below = automatic(model)
    before = snapshot(model)
    with torch.no_grad():
        native = run(model)
        with attnpatch.patched(model.model, mode="always"):
            assert torch.equal(run(model), native)
            assert attnpatch.report(model.model).totals["by_rows"] == 2
        assert snapshot(model) == before
        attnpatch.apply(model.model.layers[1], mode="always")
        assert torch.equal(run(model), native)
        assert attnpatch.report(model.model.layers[1]).totals["by_rows"] == 1
    below.take_out(model)
    attnpatch.remove(model.model.layers[1])
    assert snapshot(model) == plain


def test_an_automatic_patch_goes_into_that_of_a_larger_model():
    model = small_llama()
    plain = snapshot(model)
    automatic(model.model)
    attnpatch.apply(model.model.layers[0].self_attn, mode="always")
    outer = automatic(model)
    assert [site.name for site in outer.sites] == ["", "model", "model.layers.1.self_attn"]
    assert patch_of(model.model) is None
    outer.take_out(model)
    attnpatch.remove(model.model.layers[0].self_attn)
    assert snapshot(model) == plain


def test_the_first_call_is_told_of_also_through_a_hook():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model, told = small_llama(), []
    add_hook_to_module(model, ModelHook())
    Patch(
        model,
        attnpatch.Policy(),
        automatic=True,
        first_call=lambda patch, called: told.append((patch, called)),
    )
    with torch.no_grad():
        run(model)
        run(model)
    assert [called for _, called in told] == [model]


def test_what_is_added_later_can_be_patched_too():
    model = small_llama()
    patch = automatic(model)
    model.more = copy.deepcopy(zoo.BY_NAME["llama"].build("eager").model.layers[0].self_attn)
    patch.complete(model)
    assert [site.name for site in patch.sites][-1] == "more"
    patch.take_out(model)
    assert not any(STATE in vars(module) for module in model.modules())


@pytest.mark.parametrize("what", [nn.Linear(3, 3), "a name", None])
def test_nothing_to_patch(what):
    with pytest.raises(errors.PatchError):
        attnpatch.apply(what)
    with pytest.raises(errors.PatchError), attnpatch.capture(what, blocks=Blocks.fixed(2)):
        pass


@pytest.mark.parametrize("what", [3, nn.Linear(2, 2), int])
def test_register_refuses_what_is_no_module_class(what):
    with pytest.raises(errors.PatchError):
        attnpatch.register(what)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies_are_patched_on_their_own(copied):
    # The hooks of a used transformers model cannot be pickled, patched or not.
    model = small_llama(used=False)
    with torch.no_grad():
        native = run(small_llama())
        attnpatch.apply(model, mode="always", rows=7)
        other = copied(model)
        assert torch.equal(run(other), native)
        assert attnpatch.report(other).totals["by_rows"] == 2
        assert attnpatch.report(model).totals["by_rows"] == 0, "the copy counted on the original's account"
        with torch.no_grad():
            other.model.layers[0].self_attn.q_proj.weight.zero_()
        assert not torch.equal(run(other), native), "the copy runs the original's weights"
        attnpatch.remove(other)
    assert STATE not in vars(other)
    assert type(other) is type(small_llama())
    assert attnpatch.report(model).policy.mode == "always"


def test_saved_weights_are_the_same():
    model = small_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = attnpatch.apply(model).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_replicas_of_data_parallel_run_their_own_weights():
    """``DataParallel`` copies ``__dict__`` and nothing else: a bound method in it would run the old module."""
    model = attnpatch.apply(small_llama(), mode="always")
    attention = model.model.layers[0].self_attn
    replica = attention._replicate_for_data_parallel()
    assert replica.forward.__self__ is replica


NO_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=NO_COMPILER)])
def test_compiled_in_one_graph(backend):
    torch.compiler.reset()
    model = zoo.BY_NAME["einsum"].build("torch")
    attnpatch.register(type(next(m for m in model.modules() if "Attention" in type(m).__name__)))
    x = zoo.floats(2, 16, 64)
    with torch.no_grad():
        native = model(x)
        attnpatch.apply(model, mode="always")
        compiled = torch.compile(model, fullgraph=True, backend=backend)(x)
    torch.testing.assert_close(compiled, native)


def test_llama_compiled_in_one_graph():
    torch.compiler.reset()
    model = attnpatch.apply(small_llama(), mode="always")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        native = model(ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")(ids, use_cache=False).logits
    torch.testing.assert_close(compiled, native)


def test_signature_is_kept():
    model = small_llama()
    attention = model.model.layers[0].self_attn
    before = inspect.signature(model.forward), inspect.signature(attention.forward)
    attnpatch.apply(model)
    assert (inspect.signature(model.forward), inspect.signature(attention.forward)) == before
    assert type(attention).__name__ == "LlamaAttention"


@pytest.mark.parametrize("first", ["hook", "patch"])
@pytest.mark.parametrize("last", ["hook", "patch"])
def test_with_accelerate_hooks(first, last):
    """A hook put on before or after, taken off before or after: forward is the class's own at the end."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Counting.calls += 1
            return args, kwargs

    model = small_llama()
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        native = run(model)
        steps = [
            lambda: add_hook_to_module(attention, Counting()),
            lambda: attnpatch.apply(model, mode="always"),
        ]
        for step in steps if first == "hook" else reversed(steps):
            step()
        assert torch.equal(run(model), native)
        assert Counting.calls == 1
        assert attnpatch.report(model).totals["by_rows"] == 2
        steps = [lambda: attnpatch.remove(model), lambda: remove_hook_from_module(attention)]
        for step in steps if last == "hook" else reversed(steps):
            step()
        assert torch.equal(run(model), native)
    assert STATE not in vars(attention)
    assert attention.forward.__func__ is type(small_llama().model.layers[0].self_attn).forward


def test_two_models_in_two_threads():
    first, second = small_llama(), small_llama()
    attnpatch.apply(first, mode="always", rows=7)
    attnpatch.apply(second, mode="never")
    with torch.no_grad():
        native = run(second)
    found = {}

    def work(name, model):
        with torch.no_grad():
            found[name] = [run(model) for _ in range(5)]

    threads = [threading.Thread(target=work, args=item) for item in (("first", first), ("second", second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(out, native) for outs in found.values() for out in outs)
    assert attnpatch.report(first).totals["by_rows"] == 10
    assert attnpatch.report(second).totals["by_rows"] == 0


def test_report_prints_a_table():
    model = attnpatch.apply(small_llama(), mode="always")
    with torch.no_grad():
        run(model)
    text = str(attnpatch.report(model))
    assert "model.layers.0.self_attn" in text
    assert "total" in text
    assert "LlamaForCausalLM" in text


def test_what_one_thread_defers_is_nothing_to_another():
    """Weights that wait to be computed here must not be looked through while they come and go elsewhere."""
    from attnpatch.rows.deferred.handle import pending

    model = small_llama()
    found = {}
    with torch.no_grad(), attnpatch.patched(model, mode="always"):
        native = model(torch.arange(12)[None], output_attentions=True).attentions
        assert pending()
        thread = threading.Thread(
            target=lambda: found.update(pending=pending(), row=native[1][0, 0, 3].clone())
        )
        thread.start()
        thread.join()
    assert found["pending"] is False
    assert torch.equal(found["row"], native[1][0, 0, 3])
