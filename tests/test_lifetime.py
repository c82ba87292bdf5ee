"""What is held, and for how long: objects of ours, layers' tensors, a class's forward, what a thread is in the middle of."""

import collections
import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import attnpatch
from attnpatch import Blocks
from attnpatch.capturing import capture_patch as capturing
from attnpatch.patching.calls import Around
from attnpatch.patching.class_forward import ForwardOfClass, is_gate
from attnpatch.recording import threads
from attnpatch.rows.thread_state import here

X = torch.randn(1, 48, 32, generator=torch.Generator().manual_seed(0))
BLOCKS = Blocks.fixed(8)


class Failed(Exception):
    pass


class HeldAttention(nn.Module):
    """Attention written by hand, which may fail in the middle, and says which tensors it has made."""

    def __init__(self):
        super().__init__()
        self.project, self.error, self.made = nn.Linear(32, 96), None, []

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        scores = q @ k.mT * 0.25
        if self.error is not None:
            raise self.error
        self.made += map(weakref.ref, (q, k, v))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def model(error=None):
    found = nn.Sequential(HeldAttention(), HeldAttention())
    found[1].error = error
    return found


def applied(error=None):
    return attnpatch.apply(model(error), mode="always", min_tokens=0)


def tried(work):
    try:
        work()
    except (Failed, KeyboardInterrupt, SystemExit) as error:
        error.__traceback__ = None


def removed():
    one = applied()
    one(X).sum().backward()
    attnpatch.remove(one)


def used_again_after(error):
    one = applied(error)
    tried(lambda: one(X))
    one[1].error = None
    one(X).sum().backward()
    assert attnpatch.report(one).totals["failed"] == 0


def failing_backward():
    one = applied()

    def fail(grad):
        raise Failed

    one[0].project.weight.register_hook(fail)
    tried(lambda: one(X).sum().backward())


def captured(error=None):
    def work():
        with attnpatch.capture(one, blocks=BLOCKS) as maps:
            one(X).sum().backward()
        assert maps.block_map.layers

    one = model(error)
    tried(work)
    assert not any(is_gate(vars(base).get("forward")) for base in HeldAttention.__mro__)


def dropped_capture():
    entered = attnpatch.capture(model(), blocks=BLOCKS)
    entered.__enter__()


def copied_in_a_capture():
    one = applied()
    with attnpatch.capture(one, blocks=BLOCKS):
        one(X)
        for layer in one:
            layer.made.clear()  # weak references cannot be pickled
        for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            other(X)
    assert attnpatch.report(other).totals["captured"] == 0


def collected_in_another_thread():
    holder = [applied()]
    holder[0](X)
    holder[0].itself = [holder[0]]
    thread = threading.Thread(target=lambda: (holder.clear(), gc.collect()))
    thread.start()
    thread.join()


def in_another_thread():
    one = applied()
    thread = threading.Thread(target=lambda: one(X).sum().backward())
    thread.start()
    thread.join()


def backward_in_another_thread():
    result = applied()(X).sum()
    thread = threading.Thread(target=result.backward)
    thread.start()
    thread.join()


WAYS = {
    "removed": removed,
    "dropped": lambda: applied()(X).sum().backward(),
    "dropped without a backward pass": lambda: applied()(X),
    "an error": lambda: used_again_after(Failed()),
    "interrupted": lambda: used_again_after(KeyboardInterrupt()),
    "a backward pass fails": failing_backward,
    "captured": captured,
    "an error in a capture": lambda: captured(Failed()),
    "a capture is interrupted": lambda: captured(KeyboardInterrupt()),
    "a script ends in a capture": lambda: captured(SystemExit()),
    "a capture is dropped": dropped_capture,
    "copied in a capture": copied_in_a_capture,
    "collected in another thread": collected_in_another_thread,
    "in another thread": in_another_thread,
    "a backward pass in another thread": backward_in_another_thread,
    "explained": lambda: attnpatch.explain(model(), inputs=X),
}


def objects_of_ours():
    gc.collect()
    kinds = collections.Counter(map(type, gc.get_objects()))
    found = {kind: count for kind, count in kinds.items() if str(kind.__module__).startswith("attnpatch")}
    return {**found, torch.Tensor: kinds[torch.Tensor], nn.Parameter: kinds[nn.Parameter]}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_stays(way):
    """Once more and once more: no more objects, the classes as they were, the thread in the middle of nothing."""
    classes = [dict(vars(base)) for kind in (HeldAttention, nn.Sequential) for base in kind.__mro__]
    start = threading.Thread.start
    WAYS[way]()  # what is made once
    before = objects_of_ours()
    # What other tests hold may still be alive.
    others = {*here.pending, *here.real, *(one for known in here.kept.values() for one in known)}
    for _ in range(3):
        WAYS[way]()
    assert objects_of_ours() == before
    assert classes == [dict(vars(base)) for kind in (HeldAttention, nn.Sequential) for base in kind.__mro__]
    assert threading.Thread.start is start
    assert {*here.pending, *here.real, *(one for known in here.kept.values() for one in known)} <= others
    assert (here.site, here.model_call, here.positions, here.order, here.hidden) == (
        None,
        None,
        None,
        None,
        (),
    )


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("is_captured", [False, True])
def test_tensors_of_a_layer_go_with_its_call(is_captured, gradients):
    """Without the garbage collector; maps that were captured are there still."""
    one = model() if is_captured else applied()
    gc.collect()
    gc.disable()
    try:
        with torch.set_grad_enabled(gradients):
            if is_captured:
                with attnpatch.capture(one, blocks=BLOCKS) as maps:
                    result = one(X)
                assert len(maps.block_map.layers) == 2
            else:
                result = one(X)
            del result
        assert one[0].made and not any(made() is not None for layer in one for made in layer.made)
    finally:
        gc.enable()


SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}


@pytest.mark.parametrize("has_backward", [False, True])
@pytest.mark.parametrize("mode", ["never", "always"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", [(LlamaModel, LlamaConfig), (BertModel, BertConfig)], ids=["llama", "bert"])
def test_a_model_that_was_captured_under_gradients_goes(kind, attention, mode, has_backward):
    """The garbage collector does not see through an autograd graph, so nothing in it may refer to the model."""

    def run():
        built = kind[0](kind[1](attn_implementation=attention, **SIZES))
        attnpatch.apply(built, mode=mode)
        with attnpatch.capture(built, Blocks.fixed(8)) as maps:
            result = built(torch.arange(40)[None])[0]
        assert len(maps.block_map.layers) == 2
        if has_backward:
            result.sum().backward()
        return weakref.ref(built)

    alive = run()
    gc.collect()
    assert alive() is None


def test_what_backward_passes_need_is_not_listed_for_ever():
    one, before = applied(), set(here.kept)
    one(X).sum().backward()
    assert set(here.kept) <= before, "a backward pass that is over needs nothing"
    graphs = []
    for _ in range(300):
        graphs = [*graphs[-1:], one(X[:, :20])]
    assert len(here.kept) <= 300
    graphs[-1].sum().backward()


class Itself:
    """In a cycle: only the garbage collector lets it go."""

    def __init__(self, *held):
        self.held, self.itself = held, self


def test_a_model_that_is_collected_while_another_one_is_patched(monkeypatch):
    """The last patched instance of a class goes just when the next one is about to join it."""
    Itself(applied())
    join = ForwardOfClass.add

    def collected(forward, entry):
        gc.collect()
        join(forward, entry)

    monkeypatch.setattr(ForwardOfClass, "add", collected)
    one = applied()
    assert is_gate(vars(nn.Sequential)["forward"]) and is_gate(vars(HeldAttention)["forward"])
    one(X)
    assert attnpatch.report(one).totals["by_rows"] == 2


@pytest.mark.parametrize("lock", [capturing._lock, threads._lock], ids=["patch", "threads"])
def test_a_dropped_capture_that_is_collected_while_another_one_begins(lock):
    """The garbage collector comes where a lock is held, and ends what was dropped in the same thread."""
    one, ended = model(), threading.Event()

    def work():
        entered = attnpatch.capture(one, blocks=BLOCKS)
        entered.__enter__()
        Itself(entered)
        del entered
        with lock:
            gc.collect()
        ended.set()

    threading.Thread(target=work, daemon=True).start()
    assert ended.wait(60), "the thread waits for itself"
    with attnpatch.capture(one, blocks=BLOCKS) as maps:
        one(X)
    assert len(maps.sequences) == 1


def test_a_capture_ends_while_the_next_one_of_its_model_begins(monkeypatch):
    one = model()
    entered = attnpatch.capture(one, blocks=BLOCKS)
    entered.__enter__()
    Itself(entered)
    del entered
    put = capturing.put_in_place

    def collected(*args):
        found = put(*args)
        gc.collect()
        return found

    monkeypatch.setattr(capturing, "put_in_place", collected)
    with attnpatch.capture(one, blocks=BLOCKS) as maps:
        one(X)
    assert maps.block_map.layers == (0, 1)


def test_what_has_begun_ends_where_the_next_beginning_is_interrupted():
    seen = []

    class Context:
        def __init__(self, error=None):
            self.error = error

        def __enter__(self):
            seen.append("begun")
            if self.error:
                raise self.error

        def __exit__(self, *exc_info):
            seen.append(exc_info[0])

    with pytest.raises(KeyboardInterrupt), Around(None, Context(), Context(KeyboardInterrupt())):
        seen.append("inside")
    assert seen == ["begun", "begun", KeyboardInterrupt]
