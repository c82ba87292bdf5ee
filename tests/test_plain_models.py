"""Models that no host builds, under activation: patched at their first call, the same bits, nothing left in the way."""

import copy
import gc
import io
import json
import os
import pathlib
import pickle
import subprocess
import sys
import threading
import weakref

import pytest
import torch
import zoo
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from transformers import BertConfig, BertModel, PreTrainedModel

import attnpatch
from attnpatch import Policy, compat
from attnpatch.activation import first_calls
from attnpatch.activation import session as sessions
from attnpatch.activation.closing import closing_lines
from attnpatch.activation.session import Session
from attnpatch.activation.settings import Settings
from attnpatch.errors import PatchError
from attnpatch.patching.forward_swap import STATE, sites_of
from attnpatch.patching.patch import patch_of

ROOT = pathlib.Path(__file__).parents[1]
BOOT = ROOT / "attnpatch" / "activation" / "boot"


class Mixer(nn.Module):
    """Attention that no class name tells."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x):
        q = self.q(x)
        return torch.softmax(q @ q.mT, -1) @ x


class Router(nn.Module):
    """Reads like attention, and is none."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 4), nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x):
        return torch.einsum("bne,ecd,bnc->bnd", torch.softmax(self.gate(x), -1), self.experts, x)


class Net(nn.Module):
    def __init__(self, *kinds):
        super().__init__()
        self.layers = nn.ModuleList(kind() for kind in kinds or (Mixer, Mixer))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


X = zoo.floats(2, 40, 8)


@pytest.fixture
def active(monkeypatch):
    """Begins a session that sees every model of this process, as the start-up file would; it ends with the test."""

    def begin(mode="always", **settings):
        session = Session(Settings(Policy(mode=mode), **settings))
        monkeypatch.setattr(sessions, "_session", session)
        original = PreTrainedModel.post_init

        def post_init(self):
            original(self)
            session.built(self)

        monkeypatch.setattr(PreTrainedModel, "post_init", post_init)
        session.tell_of_first_calls(None)
        session.asked = []
        told = vars(nn.Module)[compat.COMPILED_CALL].told
        vars(nn.Module)[compat.COMPILED_CALL].told = lambda module: (
            session.asked.append(module) or told(module)
        )
        return session

    yield begin
    first_calls.uninstall()
    assert getattr(nn.Module, compat.COMPILED_CALL) is None


def by_rows(model):
    return attnpatch.report(model).totals["by_rows"]


def is_patched(model):
    return any(STATE in vars(module) for module in model.modules())


def run(model, x=X):
    with torch.no_grad():
        return model(x)


# ---------------------------------------------------------------------------------- repositories, by the variable alone


def script(*arguments, **variables):
    """A script in an interpreter of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ATTNPATCH")}
    paths = [str(BOOT), str(ROOT), *filter(None, [clean.get("PYTHONPATH")])]
    clean |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=clean, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return done


KINDS = [
    "GPT", "Aggregator", "TriangleUpdate", "Boltz", "ComfyTransformer", "ConformerEncoder", "DiffusionWrapper", "Decoder",
    "AutoregressiveWrapper", "VisionTransformer", "Sequential", "ImageEncoderViT", "TwoWay", "DataParallel",
]  # fmt: skip


def test_repositories_by_the_variable_alone():
    file = ROOT / "tests" / "repositories.py"
    plain = json.loads(script(file).stdout)
    done = script(file, ATTNPATCH="1", ATTNPATCH_MODE="always")
    found = json.loads(done.stdout)
    assert plain["patched"] == [] and len(plain["outputs"]) == 14
    assert found["outputs"] == plain["outputs"]
    assert {kind for kind, *_ in found["patched"]} == set(KINDS)
    assert not any(failed for *_, failed in found["patched"])
    # SAM's products with tables of positions are taken for scores, and computed whole.
    assert [kind for kind, *_, by_rows, _ in found["patched"] if not by_rows] == ["ImageEncoderViT"]
    first, *more = done.stderr.splitlines()
    assert first == "attnpatch: active; patched GPT (2 attention modules)"
    assert all(line.startswith("attnpatch: patched ") for line in more) and len(more) == len(KINDS) - 1


# ------------------------------------------------------------------------------------------------------ what is patched


def test_the_outermost_module_that_is_called(active):
    model = Net(Mixer, Router)
    native = run(model)
    session = active()
    assert torch.equal(run(model), native) and torch.equal(run(model), native)
    assert [site.name for site in patch_of(model).sites] == ["", "layers.0"]
    assert by_rows(model) == 2 and list(session.patches.values()) == [patch_of(model)]
    run(model.layers[0])
    assert by_rows(model) == 3 and len(session.patches) == 1


def test_later_calls_are_not_looked_at(active):
    session = active()
    model, other = Net(), nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    for _ in range(3):
        run(model)
        run(other)
    assert session.asked == [model, other]
    assert all(
        vars(module)[compat.COMPILED_CALL] is None for net in (model, other) for module in net.modules()
    )


def test_no_attention_leaves_nothing(active):
    session = active()
    model = Net(Router)
    run(model)
    assert not is_patched(model) and not session.patches
    assert dict(session.plain.seen) == {("Net", "tried in the first call, and no attention: layers.0"): 1}
    assert nn.Module.__call__ is type(model).__call__ and "forward" not in vars(model)
    assert not any(
        hasattr(function, "__kwdefaults__") and function.__kwdefaults__ for function in [Router.forward]
    )


def test_a_part_that_is_called_first_keeps_its_patch(active):
    session = active()
    model = nn.ModuleDict({"encoder": Net(Mixer), "decoder": Net(Mixer)})
    model.forward = lambda x: model["decoder"](model["encoder"](x))
    run(model["encoder"])
    run(model)
    assert [site.name for site in patch_of(model).sites] == ["", "decoder.layers.0"]
    assert by_rows(model["encoder"]) == 2 and by_rows(model) == 1 and len(session.patches) == 2


def test_modules_in_plain_lists_and_added_later(active):
    active()

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.kept, self.own = [Mixer()], Mixer()

        def forward(self, x):
            return self.own(self.kept[0](x))

    model = Holder()
    run(model)
    assert by_rows(model) == by_rows(model.kept[0]) == 1
    model.own = Mixer()
    run(model)
    assert by_rows(model.own) == 1


def test_a_model_of_a_host_keeps_its_patch_in_a_module_around_it(active):
    session = active()

    class Tagger(nn.Module):
        def __init__(self, *more):
            super().__init__()
            self.bert = BertModel(BertConfig(
                vocab_size=97, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
            ))  # fmt: skip
            self.more = nn.ModuleList(more)

        def forward(self, ids):
            x = self.bert(ids).last_hidden_state
            for each in self.more:
                x = each(x)
            return x

    model = Tagger().eval()
    run(model, zoo.tokens(40))
    assert patch_of(model) is None and by_rows(model.bert) == 1 and len(session.patches) == 1
    model = Tagger(Mixer()).eval()
    run(model, zoo.tokens(40))
    assert by_rows(model) == by_rows(model.bert) == 1


def test_what_the_script_applies_comes_first(active):
    active()
    model = Net()
    with attnpatch.patched(model, mode="never"):
        run(model)
        assert patch_of(model).policy.mode == "never"
    run(model)  # the block has ended
    assert patch_of(model).automatic and by_rows(model) == 2
    attnpatch.apply(model, mode="never")
    run(model)
    assert attnpatch.report(model).policy.mode == "never" and by_rows(model) == 2
    attnpatch.remove(model)
    outer = nn.ModuleList([Net()])
    attnpatch.apply(outer, sites=["0.layers.1"], mode="never")
    run(outer[0])  # a part of what the script has patched
    assert [len(list(sites_of(module))) for module in outer[0].layers] == [0, 1]


def test_removed_it_stays_removed(active):
    active()
    model = Net()
    run(model)
    attnpatch.remove(model)
    run(model)
    assert not is_patched(model)


def test_a_dry_run_changes_nothing(active):
    active()
    model = Net()
    before = [dict(vars(module)) for module in model.modules()]
    attnpatch.explain(model, inputs=X, min_tokens=0)
    assert [dict(vars(module)) for module in model.modules()] == before
    run(model)
    assert by_rows(model) == 2


def test_a_first_call_that_raises(active):
    active()
    model = Net()
    with pytest.raises(RuntimeError):
        run(model, zoo.floats(2, 3, 5))
    run(model)
    assert by_rows(model) == 2


def test_a_failure_of_ours_leaves_the_model_as_it_is(active, monkeypatch, capsys):
    session, model = active(), Net()
    native = run(copy.deepcopy(model))

    def broken(*args):
        put_in(*args)
        if args[0] is model.layers[0]:
            raise ZeroDivisionError("ours")

    from attnpatch.patching import patch

    put_in = patch.put_in
    monkeypatch.setattr(patch, "put_in", broken)
    assert torch.equal(run(model), native)
    assert not is_patched(model) and session.counts["unpatched"] == 1
    assert (
        capsys.readouterr().err.splitlines()[-1] == "attnpatch: Net is left as it is: ZeroDivisionError: ours"
    )


# ------------------------------------------------------------------------------------------ copies, ends, threads, tools


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_models_of_their_own(active, how):
    session = active()
    model = Net()
    early = how(model)
    native = run(model)
    late = how(model)
    assert not any(compat.COMPILED_CALL in vars(module) for module in late.modules())
    for other in (early, late):
        assert torch.equal(run(other), native) and by_rows(other) == 2
    assert by_rows(model) == 2 and len(session.patches) == 3


def test_a_saved_model_is_read_where_attnpatch_is_not_active(active, tmp_path):
    model = Net()
    active()
    with_entries, without = tmp_path / "patched.pt", tmp_path / "plain.pt"
    torch.save(model, without)
    native = run(model)
    torch.save(model, with_entries)
    first_calls.uninstall()
    for file in (with_entries, without):
        assert torch.equal(run(torch.load(file, weights_only=False)), native)


def test_models_are_freed_at_once(active):
    session = active()
    gc.disable()
    try:
        models = [Net(), Net()]
        run(models[0])
        session.asked.clear()
        gone = [weakref.ref(model) for model in models]
        del models
        assert [each() for each in gone] == [None, None]
    finally:
        gc.enable()
    assert not session.patches and len(session.gone) == 1


def test_threads_that_call_at_once(active):
    session = active()
    model = Net(*[Mixer] * 4)
    native, results, start = run(copy.deepcopy(model)), [], threading.Barrier(8)

    def call():
        start.wait()
        results.append(run(model))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and all(torch.equal(result, native) for result in results)
    assert [patch for patch in session.patches.values() if patch is patch_of(model)] == [patch_of(model)]


@pytest.mark.parametrize("is_called", [False, True])
def test_torchscript(active, is_called):
    active()
    model = Net(Mixer, Router).eval()
    native = run(model) if is_called else run(copy.deepcopy(model))
    for made in (torch.jit.script(model), torch.jit.trace(model, X)):
        file = io.BytesIO()
        torch.jit.save(made, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        assert compat.COMPILED_CALL not in str(loaded._c.dump_to_str(True, True, False))
        torch.testing.assert_close(run(made), native)
        torch.testing.assert_close(run(loaded), native)
    assert torch.equal(run(model), native) and by_rows(model) >= 1


def test_torchscript_is_said_once_in_one_line(active, capsys):
    made = torch.jit.trace(Net(), X)
    session = active()
    capsys.readouterr()
    run(made)
    run(made)
    run(torch.jit.script(nn.Sequential(nn.Linear(8, 8))))  # no attention in it: nothing to say
    holder = nn.Sequential(nn.Linear(8, 8), made)
    run(holder)
    said = "is TorchScript, which cannot be patched; use the eager model"
    assert capsys.readouterr().err.splitlines() == [
        f"attnpatch: Net is not patched: its attention {said}",
        f"attnpatch: Sequential is not patched: its attention in 1 {said}",
    ]
    assert not session.patches
    with pytest.raises(PatchError, match=f"^the attention of Net {said}$"):
        attnpatch.apply(made)
    with pytest.raises(PatchError, match=f"^the attention of Sequential in 1 {said}$"):
        attnpatch.apply(holder)


def test_compiled(active):
    session, model = active(), Net()
    native = run(model)
    counter = torch._dynamo.testing.CompileCounter()
    inner = Net()
    compiled = torch.compile(lambda x: inner(x), fullgraph=True, backend=counter)
    run(compiled)
    assert not is_patched(inner)  # it was recorded, and not called
    run(inner)
    run(compiled)
    assert counter.frame_count == 1 and by_rows(inner) == 2
    assert attnpatch.report(inner).compiled == ()
    by_method = Net()
    assert not getattr(by_method, compat.COMPILED_CALL)  # so PEFT asks
    by_method.compile(backend="eager", fullgraph=True)
    run(by_method)
    whole = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(whole), native)
    assert (
        "OptimizedModule",
        "compiled by torch.compile, which runs its own attention",
    ) in session.plain.seen


def test_compiled_with_a_graph_break(active):
    active()

    class Breaks(Net):
        def forward(self, x):
            torch._dynamo.graph_break()
            return super().forward(x)

    model, inner = Breaks(), Net()
    native = run(copy.deepcopy(model))
    assert torch.equal(run(torch.compile(model, backend="eager")), native)

    def outer(x):
        x = x + 0
        torch._dynamo.graph_break()
        return inner(x)

    assert torch.equal(torch.compile(outer, backend="eager")(X), run(inner))


def test_exported_and_traced_by_fx(active):
    active()
    model = Net()
    native = run(copy.deepcopy(model))
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), native)
    torch.testing.assert_close(run(torch.fx.symbolic_trace(model)), native)
    assert torch.equal(run(model), native)


def test_functional_calls(active):
    models = [Net() for _ in range(3)]
    base = Net()

    def call(parameters, buffers, x):
        return functional_call(base, (parameters, buffers), (x,))

    given = stack_module_state(models)
    native = vmap(call, (0, 0, None))(*given, X)
    active()
    assert torch.equal(vmap(call, (0, 0, None))(*given, X), native)
    one = {name: value[0] for name, value in given[0].items()}
    native = call(one, {}, X)
    assert torch.equal(native, models[0](X)) and by_rows(models[0]) == 2


# ---------------------------------------------------------------------------------------------------------- the variables


def test_classes_that_are_named(active):
    session = active(modules=(f"{__name__}:Net",))
    outer, other = nn.Sequential(nn.Linear(8, 8), Net()), nn.Sequential(Mixer())
    run(outer)
    run(other)
    assert patch_of(outer) is None and by_rows(outer[1]) == 2 and not is_patched(other)
    run(outer)
    assert len(session.asked) == len(set(session.asked))


def test_a_class_that_is_named_and_that_nothing_recognises(active):
    class Quiet(nn.Module):
        def forward(self, x):
            return getattr(torch, "soft" + "max")(getattr(x, "mat" + "mul")(x.mT), -1) @ x

    model = nn.Sequential(Quiet(), nn.ReLU())
    active(modules=(f"{__name__}:{Quiet.__qualname__}",))
    run(model)
    assert by_rows(model[0]) == 1 and attnpatch.report(model[0]).sites[0].why == "asked for"


def test_sites_that_are_named(active):
    session = active(sites=("layers.1", "encoder.*"))
    model = Net()
    run(model)
    run(nn.Sequential(Mixer()))
    bert = BertModel(BertConfig(
        vocab_size=97, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
    )).eval()  # fmt: skip
    run(bert, zoo.tokens(40))
    assert [site.name for site in attnpatch.report(model).sites] == ["layers.1"]
    assert [kind for kind, _ in session.plain.seen] == ["Sequential"]
    assert by_rows(model) == 1 and by_rows(bert) == 2


# --------------------------------------------------------------------------------------------------------- what is said

QUIET_SCRIPT = "import torch\nfrom torch import nn\nnet = nn.Sequential(nn.Linear(8, 8), nn.ReLU())\nnet(torch.ones(1, 8))\n"
NOTHING = "attnpatch was active and saw no model with attention in this process"


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({}, [f"{NOTHING}; ATTNPATCH_REPORT=1 says why not"]),
        ({"ATTNPATCH_QUIET": "1"}, []),
        ({"RANK": "3"}, []),
        ({"ATTNPATCH_MODULES": "a.b:C,d:E"}, [f"{NOTHING} that ATTNPATCH_MODULES=a.b:C,d:E asks for"]),
        (
            {"ATTNPATCH_REPORT": "1", "ATTNPATCH_SITES": "x.*"},
            [
                f"{NOTHING} that ATTNPATCH_SITES=x.* asks for",
                "attnpatch: not patched: Sequential: sites: no module of Sequential matches 'x.*'; its attention modules are: none",
            ],
        ),
        (
            {"ATTNPATCH_REPORT": "1"},
            [
                f"{NOTHING}; ATTNPATCH_REPORT=1 says why not",
                "attnpatch: not patched: Sequential: no class name says attention, no code names a softmax and a product",
            ],
        ),
    ],
)
def test_a_script_without_attention(tmp_path, variables, says):
    (tmp_path / "script.py").write_text(QUIET_SCRIPT)
    assert script(tmp_path / "script.py", ATTNPATCH="1", **variables).stderr.splitlines() == says


def test_processes_that_call_no_module_say_nothing(tmp_path):
    """A launcher (``torchrun``), a compiler's worker, a worker of multiprocessing: their children or parents speak."""
    assert script("-c", "import torch", ATTNPATCH="1").stderr == ""
    (tmp_path / "script.py").write_text(
        "import multiprocessing, torch\n"
        "def work(x):\n    torch.nn.Sequential(torch.nn.Linear(2, 2))(torch.ones(1, 2))\n    return x\n"
        "if __name__ == '__main__':\n    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(work, [1]))\n"
    )
    done = script(tmp_path / "script.py", ATTNPATCH="1")
    assert (done.stdout, done.stderr) == ("[1]\n", f"{NOTHING}; ATTNPATCH_REPORT=1 says why not\n")


def test_layers_that_a_script_calls_one_by_one_are_added_up(active):
    session = active()
    layers = [Mixer() for _ in range(3)]
    for layer in layers:
        run(layer)
    first, table, *_ = closing_lines(session)
    assert first == "attnpatch: 3 models of this kind, added up:"
    assert table.startswith("attnpatch: Mixer: Policy(") and "(model)" in table


def test_a_forward_that_wrapt_decorates():
    """As NeMo's ``typecheck``: it says that it is a function, and has to know its instance."""
    import wrapt

    @wrapt.decorator
    def decorated(wrapped, instance, args, kwargs):
        assert instance is model[0] and not args
        return wrapped(**kwargs)

    class Typed(Mixer):
        forward = decorated(Mixer.forward)

    model = nn.ModuleList([Typed()])
    native = model[0](x=X)
    with attnpatch.patched(model, mode="always"):
        assert torch.equal(model[0](x=X), native) and by_rows(model) == 1
