"""No error of attnpatch leaves a forward: whatever step of patching fails, the result is the native one.

An error is put into one function of attnpatch at a time. The module's forward runs once all the same.
"""

import copy
import threading
import types

import pipelines
import pytest
import torch
import zoo
from dense_images import pipe_of
from torch import nn

import attnpatch
from attnpatch import failures
from attnpatch.errors import AttnpatchWarning
from attnpatch.hosts.diffusers.prompts import Prompts
from attnpatch.patching import calls
from attnpatch.patching import site as patching
from attnpatch.patching.patch import Patch
from attnpatch.patching.recognition import Watch
from attnpatch.recording.diffusion.observer import ImageObserver
from attnpatch.recording.text.observer import TextObserver
from attnpatch.recording.text.recorder import Recorder
from attnpatch.rows.autograd.native_tape import NativeTape
from attnpatch.rows.creation import positions, row_masks
from attnpatch.rows.mode import RowsMode
from attnpatch.rows.provenance import observed
from attnpatch.rows.provenance.sources import Sources
from attnpatch.rows.sdpa import serve

IDS = zoo.tokens(33, batch=2)
FLOATS = zoo.floats(2, 33, 16)


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch):
    monkeypatch.setattr(failures, "_said", set())


class Recognised(nn.Module):
    """Its name says nothing: its first call tells."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return (x @ x.transpose(-1, -2)).softmax(-1) @ x


def small(kind):
    torch.manual_seed(0)
    return nn.Sequential(kind()), (FLOATS,)


def llama(implementation="eager"):
    model = zoo.BY_NAME["llama"].build(implementation)
    model(IDS, output_attentions=True)  # transformers puts hooks of its own in at the first call
    return model, (IDS,)


def captured(model, inputs):
    with attnpatch.capture(model, blocks=attnpatch.Blocks.fixed(8)):
        output = model(*inputs)
        return output, attnpatch.report(model).totals


def weights_asked(model, inputs):
    with attnpatch.patched(model, mode="always", rows=7):
        output = model(*inputs, output_attentions=True)
        return output, attnpatch.report(model).totals


def by_rows(model, inputs):
    with attnpatch.patched(model, mode="always", rows=7):
        return model(*inputs), attnpatch.report(model).totals


def short(model, inputs):
    with attnpatch.patched(model, min_tokens=10_000):
        return model(*inputs), attnpatch.report(model).totals


# Where the error is, what is run, and how.
STEPS = [
    (patching.masks, "is_short", llama, by_rows),
    (patching, "FreeMemoryCache", llama, by_rows),
    (patching, "pending", llama, short),
    (patching, "renew", llama, by_rows),
    (positions, "is_watching", llama, short),
    (patching.masks, "by_rows", llama, by_rows),
    (positions, "watched", llama, by_rows),
    (positions.Before, "__enter__", llama, by_rows),
    (row_masks, "may_defer", llama, by_rows),
    (row_masks, "keeping", llama, by_rows),
    (patching.attention_outputs, "are_asked_for", llama, by_rows),
    (patching.attention_outputs, "are_asked_for", llama, short),
    (patching, "most_rows", llama, short),
    (patching.attention_outputs, "put_in", lambda: llama("sdpa"), weights_asked),
    (patching, "AttentionCall", llama, by_rows),
    (calls, "opened", lambda: small(lambda: nn.MultiheadAttention(16, 2)), by_rows),
    (RowsMode, "__init__", llama, by_rows),
    (RowsMode, "__enter__", llama, by_rows),
    (Recorder, "begin_call", llama, captured),
    (Recorder, "end_call", llama, captured),
    (Recorder, "wants", llama, captured),
    (Recorder, "observer", llama, captured),
    (TextObserver, "begin", llama, captured),
    (TextObserver, "end", llama, captured),
    (TextObserver, "finish", llama, captured),
    (Sources, "__init__", llama, captured),
    (Sources, "follow", llama, captured),
    (observed, "scored", llama, captured),
    (observed, "_watched", llama, captured),
    (serve, "_is_shown", lambda: llama("sdpa"), captured),
    (Watch, "__init__", lambda: small(Recognised), by_rows),
    (Watch, "_became", lambda: small(Recognised), by_rows),
    (Watch, "mark", lambda: small(Recognised), by_rows),
    (Patch, "judged", lambda: small(Recognised), by_rows),
]


def broken(*_, **__):
    raise KeyError("put in by the test")


@pytest.mark.parametrize(
    ("where", "name", "build", "run"), STEPS, ids=[f"{step[0].__name__}.{step[1]}-{step[3].__name__}" for step in STEPS]
)  # fmt: skip
def test_the_result_is_native(where, name, build, run, monkeypatch):
    model, inputs = build()
    inputs = (
        inputs * 3
        if isinstance(model[0] if isinstance(model, nn.Sequential) else None, nn.MultiheadAttention)
        else inputs
    )
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    plain = copy.deepcopy(model)
    run_plain = plain[0] if isinstance(plain, nn.Sequential) else plain
    with torch.no_grad():
        native = run_plain(*inputs)
        target = model[0] if len(inputs) == 3 else model
        with (
            monkeypatch.context() as patch,
            pytest.warns(AttnpatchWarning, match="KeyError: 'put in by the test'"),
        ):
            patch.setattr(where, name, broken)
            output, totals = run(target, inputs)
    for got, expected in zip(tensors(output), tensors(native), strict=True):
        assert torch.equal(got, expected)
    assert totals["failed"] > 0
    calls = getattr(run_plain, "calls", None)
    assert calls is None or model[0].calls == calls == 1
    for module in model.modules():
        vars(module).pop("calls", None)
    assert [(kind, {k: v for k, v in values.items() if k != "calls"}) for kind, values in before] == [
        (type(module), dict(vars(module))) for module in model.modules()
    ]


def tensors(output):
    logits = getattr(output, "logits", output)
    return [part for part in (logits if isinstance(logits, tuple) else [logits]) if part is not None]


def test_refusals_still_reach_the_user():
    model, inputs = llama()
    with (
        pytest.warns(attnpatch.errors.AttnpatchWarning, match="in no map"),
        attnpatch.capture(model, blocks=attnpatch.Blocks.spans([(0, 900)])) as maps,
    ):
        model(*inputs)
    with pytest.raises(attnpatch.errors.CaptureError, match="900"):
        _ = maps.block_map


class Failing(nn.Module):
    """The host's own error is nobody else's."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        raise KeyError("the host's")


def test_an_error_of_the_host_is_its_own():
    model = nn.Sequential(Failing())
    with attnpatch.patched(model, sites=["0"], mode="always"), pytest.raises(KeyError, match="the host's"):
        try:
            model(FLOATS)
        finally:
            assert attnpatch.report(model).totals["failed"] == 0
    assert model[0].calls == 1


# ------------------------------------------------------------------------------------------------ classes and threads

SOURCE = """
class Made(Module):
    def forward(self, x):
        return torch.matmul(torch.matmul(x, x.transpose(-1, -2)).softmax(-1), x)
"""
# Where the namespace says no name, this makes a class without __module__.
BARE = """
Made = type("Made", (Module,), {"forward": lambda self, x: torch.matmul(torch.matmul(x, x.transpose(-1, -2)).softmax(-1), x)})
"""


@pytest.mark.parametrize("names", [{}, {"__name__": None}, {"__name__": "nowhere"}, {"__builtins__": {}}])
@pytest.mark.parametrize("sites", ["auto", ["0"]])
def test_a_class_made_by_exec(names, sites):
    """Its module may have no name, an odd one or none that can be imported."""
    space = {"torch": torch, "Module": nn.Module, **names}
    if "__builtins__" in names:
        space["__builtins__"] = {"__build_class__": __build_class__, "__name__": "made"}
    exec(SOURCE if names else BARE, space)
    kind, code = space["Made"], space["Made"].forward.__code__
    assert names != {} or "__module__" not in vars(kind)
    model = nn.Sequential(kind())
    native = model(FLOATS)
    with attnpatch.patched(model, sites=sites, mode="always", rows=7):
        assert torch.equal(model(FLOATS), native)
        assert attnpatch.report(model).totals["by_rows"] == 1
        assert torch.equal(copy.deepcopy(model)(FLOATS), native)
    assert kind.forward.__code__ is code


class Meeting(nn.Module):
    """Waits until every thread is in its forward; ``attends``: whether it is attention."""

    def __init__(self, count, attends) -> None:
        super().__init__()
        self.barrier = threading.Barrier(count)
        self.attends = attends

    def forward(self, x):
        self.barrier.wait(30)
        weights = torch.matmul(x, x.transpose(-1, -2)).softmax(-1)
        self.barrier.wait(30)
        return torch.matmul(weights, x) if self.attends else weights


@pytest.mark.parametrize("attends", [True, False])
def test_threads_make_a_first_call_at_once(attends):
    """A candidate that is looked at in several threads: each gets the native result, and it is judged once."""
    count = 4
    model = nn.Sequential(Meeting(count, attends))
    weights = (FLOATS @ FLOATS.transpose(-1, -2)).softmax(-1)
    native = weights @ FLOATS if attends else weights
    attnpatch.apply(model, mode="always", rows=7)
    found, errors = [], []

    def call():
        try:
            found.append(model(FLOATS).clone())
        except BaseException as error:
            errors.append(error)

    for _ in range(2):
        threads = [threading.Thread(target=call) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    report = attnpatch.report(model)
    attnpatch.remove(model)
    assert not errors
    assert len(found) == 2 * count and all(torch.equal(one, native) for one in found)
    assert report.left_alone == (() if attends else ("0",))
    assert report.totals["by_rows"] == (2 * count if attends else 0)


# ------------------------------------------------------------------------------------------------------- lifetime


class Layer(nn.Module):
    """Attention by hand that leaves a weak reference to its query."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.q = [], nn.Linear(16, 16)

    def forward(self, x):
        import weakref

        query = self.q(x)
        self.queries.append(weakref.ref(query))
        return x + (query @ x.transpose(-1, -2)).mul(0.25).softmax(-1) @ x


class StackAttention(nn.Module):
    """Around its layers, as a block of a U-Net is: its name makes it a site."""

    def __init__(self, count) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(count))
        self.alive = []

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            self.alive.append(sum(each.queries[-1]() is not None for each in self.layers if each.queries))
        return x


@pytest.mark.parametrize("tokens", [8, 65])
def test_queries_of_earlier_layers_are_gone(tokens):
    """What an outer site notes of native steps lives no longer than their results."""
    model = nn.Sequential(StackAttention(5))
    x = zoo.floats(1, tokens, 16)
    with torch.no_grad():
        native = model(x)
        with attnpatch.patched(model, sites=["0"], min_tokens=4, min_free=0):
            assert torch.equal(model(x), native)
            assert attnpatch.report(model).totals["native"] == 1
    assert model[0].alive == [0] * 10


def test_what_is_noted_of_a_step_lives_with_its_result():
    call = types.SimpleNamespace(answers_shortage=True)
    trail = NativeTape()
    query, key = zoo.floats(1, 2, 40, 8), zoo.floats(1, 2, 8, 40)
    scores = trail.run(torch.matmul, (query, key), {}, call)
    weights = trail.run(torch.softmax, (scores, -1), {}, call)
    del scores
    assert len(trail._made) == 1
    del weights
    assert not trail._made


@pytest.mark.parametrize("step", ["begin", "end"])
def test_a_pipeline_goes_on(step, monkeypatch):
    """An error in what a capture notes of a pipeline's call is none of that call."""
    pipe = pipe_of("sd15")
    native = pipelines.run(pipe, "sd15")
    monkeypatch.setattr(Prompts, step, broken)
    with (
        attnpatch.capture(pipe),
        pytest.warns(AttnpatchWarning, match="KeyError: 'put in by the test'"),
    ):
        got = pipelines.run(pipe, "sd15")
    assert (got == native).all()


def broken_at(name, step):
    """``step`` of the observers, which fails for one site at its second tile or call."""

    def failing(self, *args):
        if self.name.startswith(name):
            failing.count += 1
        if self.name.startswith(name) and failing.count == failing.at:
            raise KeyError("put in by the test")
        return step(self, *args)

    failing.count, failing.at = 0, 1
    return failing


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("step", ["_begin", "add_sequence", "_end"])
def test_what_an_error_cut_short_is_left_out(step, implementation, monkeypatch):
    """A site has no map without what the error has lost; the other sites have theirs."""
    model, inputs = llama(implementation)
    monkeypatch.setattr(
        TextObserver, step, broken_at("model.layers.1.self_attn", getattr(TextObserver, step))
    )
    with (
        pytest.warns(AttnpatchWarning, match="put in by the test"),
        torch.no_grad(),
        attnpatch.capture(model, blocks=attnpatch.Blocks.fixed(8)) as maps,
    ):
        model(*inputs)
    assert list(maps.left_out) == ["model.layers.1.self_attn"]
    assert "attnpatch failed while it observed" in maps.left_out["model.layers.1.self_attn"]
    assert maps.block_map.layers == (0,)


@pytest.mark.parametrize("step", ["_begin", "add_sequence", "_end"])
def test_a_step_of_generation_that_an_error_cut_short(step, monkeypatch):
    """The map of the tokens before it would be of rows that lack some."""
    model, (ids,) = llama("sdpa")
    failing = broken_at("model.layers.1.self_attn", getattr(TextObserver, step))
    failing.at = 3
    monkeypatch.setattr(TextObserver, step, failing)
    with (
        pytest.warns(AttnpatchWarning, match="put in by the test"),
        torch.no_grad(),
        attnpatch.capture(model, blocks=attnpatch.Blocks.fixed(8)) as maps,
    ):
        model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert list(maps.left_out) == ["model.layers.1.self_attn"] and maps.block_map.layers == (0,)


@pytest.mark.parametrize("step", ["_begin", "add_sequence", "_end"])
def test_gradients_that_an_error_cut_short(step, monkeypatch):
    model, (ids,) = llama("sdpa")
    monkeypatch.setattr(
        TextObserver, step, broken_at("model.layers.1.self_attn", getattr(TextObserver, step))
    )
    with (
        pytest.warns(AttnpatchWarning, match="put in by the test"),
        attnpatch.capture(model, blocks=attnpatch.Blocks.fixed(8), weighting="gradient") as maps,
    ):
        model(ids).logits.sum().backward()
    assert list(maps.left_out) == ["model.layers.1.self_attn"] and maps.block_map.layers == (0,)


@pytest.mark.parametrize("step", ["_begin", "add_sequence", "end"])
def test_an_image_that_an_error_cut_short(step, monkeypatch):
    pipe = pipe_of("sd15")
    native, name = pipelines.run(pipe, "sd15"), "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
    failing = broken_at(name, getattr(ImageObserver, step))
    failing.at = 2  # the second step of the sampler, or a tile
    monkeypatch.setattr(ImageObserver, step, failing)
    with pytest.warns(AttnpatchWarning, match="put in by the test"), attnpatch.capture(pipe) as maps:
        got = pipelines.run(pipe, "sd15")
    assert (got == native).all()
    assert "attnpatch failed while it observed" in maps.left_out[name]
    assert name not in maps["cross"].layers and len(maps["cross"].layers) > 1
