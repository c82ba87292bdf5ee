"""A release that attnpatch does not know: the model's own code runs, with one warning, and ``attnpatch doctor`` says it.

A name that a host no longer has is one that attnpatch does not find: its entry in ``compat`` is replaced by a word that
no host has. The hosts themselves are not changed.
"""

import itertools
import pathlib
import sys
import warnings

import pytest
import torch
from test_masks import inputs_of, model_of
from versions.rows import ROWS

import attnpatch
from attnpatch import Policy, compat, errors
from attnpatch.activation.examination import examination
from attnpatch.activation.session import Session
from attnpatch.activation.settings import Settings
from attnpatch.hosts import features
from attnpatch.patching import forward_swap
from attnpatch.patching.patch import patch_of
from attnpatch.releases import tested

NOWHERE = "_no_such_name"
# Entry of compat that is taken away, and the feature that is off without it.
TAKEN = {
    "MASK_TABLE": "masks by rows",
    "MASK_FUNCTIONS": "masks by rows",
    "OUTPUT_COLLECTOR": "attention weights under SDPA",
    "OUTPUT_HOOK": "attention weights under SDPA",
    "QUANTIZED_KEYS": "maps of a generation with a quantised cache",
    "PENDING_BEAMS": "maps of beam search with a quantised cache",
    "ATTENTION_TABLE": "kernels behind attention functions of transformers",
    "BACKEND_REGISTRY": "kernels behind attention back ends of diffusers",
    "BACKENDS": "kernels behind attention back ends of diffusers",
    "ACCELERATE_HOOK": "modules offloaded by accelerate",
    "ACCELERATE_FORWARD": "modules offloaded by accelerate",
    "COMPILED_MODULE": "compiled modules in a model",
    "COMPILED_FUNCTION": "compiled modules in a model",
    "COMPILED_CALL": "models that no host builds, under ATTNPATCH=1",
    "PLAIN_CALL": "models that no host builds, under ATTNPATCH=1",
    "OPERATOR_SCHEMA": "operators of others that write to an argument",
    "CUSTOM_OPERATOR": "custom operators as kernels, if they are called through torch.ops",
}
# Objects of torch, which ``test_without_names.py`` takes away.
OBJECTS = {"SELECTIVE_MODES", "ENCODER_OPERATORS", "KERNELS", "__all__"}
# Names that only older releases of transformers are asked for. These are out, and have them.
OLDER = {"OUTPUT_WRAPPER", "MASK_POSITIONS"}
# Names of xFormers, which is not installed here: tests/test_kernels.py has biases without them.
ELSEWHERE = {"XFORMERS_BIAS", "XFORMERS_OLD_BIAS", "XFORMERS_WINDOW"}
# Names of Python itself, which no release of a host takes away.
OF_PYTHON = {"TARGET_OF_THREAD"}


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(features, "_said", set())
    monkeypatch.setattr(tested, "_said", set())


@pytest.fixture
def taken(monkeypatch):
    def take(entry):
        value = getattr(compat, entry)
        gone = (NOWHERE,) * len(value) if isinstance(value, tuple) else NOWHERE
        monkeypatch.setattr(compat, entry, gone)
        if value in forward_swap._ATTRIBUTES:
            monkeypatch.setattr(forward_swap, "_ATTRIBUTES", (NOWHERE, "forward"))

    return take


def offloaded(model):
    """The model with hooks of accelerate: every layer's weights wait elsewhere."""
    import accelerate

    return accelerate.cpu_offload(model, "cpu")


def warned(record):
    return [str(each.message) for each in record if issubclass(each.category, errors.AttnpatchWarning)]


def test_every_name_of_a_host_is_in_this_table():
    strings = {
        name
        for name, value in vars(compat).items()
        if name.isupper() and isinstance(value, (str, tuple)) and name not in OBJECTS
    }
    assert strings == TAKEN.keys() | OLDER | ELSEWHERE | OF_PYTHON


@torch.no_grad()
@pytest.mark.parametrize("entry", TAKEN)
def test_without_a_name_of_a_host(entry, taken):
    """The same bits as natively, also with weights, by beams and offloaded; one warning; one line of doctor."""
    from test_masks import DECODER
    from transformers import LlamaConfig, LlamaForCausalLM

    if "diffusers" in TAKEN[entry]:
        pytest.importorskip("diffusers")  # nothing is said of packages that are not imported
    model, inputs = model_of("Llama", "sdpa"), inputs_of("Llama", 40)
    torch.manual_seed(0)
    generating = LlamaForCausalLM(LlamaConfig(**DECODER)).eval()
    prompt = inputs["input_ids"][:, :8]
    beams = {"num_beams": 2, "max_new_tokens": 3, "attention_mask": torch.ones_like(prompt)}
    compiled = (
        torch.compile(model, backend="eager") if TAKEN[entry] == "compiled modules in a model" else model
    )
    native, written = compiled(**inputs)[0], generating.generate(prompt, **beams)
    taken(entry)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for each in (model, compiled):
            with attnpatch.patched(each, mode="always"):
                assert torch.equal(each(**inputs)[0], native)
        with attnpatch.patched(model, mode="always"):
            assert torch.equal(model(**inputs, output_attentions=True)[0], native)
        if entry in ("QUANTIZED_KEYS", "PENDING_BEAMS"):
            with attnpatch.patched(generating, mode="always"):
                assert torch.equal(generating.generate(prompt, **beams), written)
        if entry.startswith("ACCELERATE"):
            with attnpatch.patched(offloaded(model), mode="always"):
                assert torch.equal(model(**inputs)[0], native)
    said = [words for words in warned(record) if "off with" in words]
    assert len(said) == 1 and TAKEN[entry] in said[0], warned(record)
    assert [each.name for each in features.off()] == [TAKEN[entry]]


def test_nothing_is_off_with_these_releases():
    assert features.off() == [] and all(each.is_there for each in features.features())


@pytest.mark.parametrize("package", ["torch", "transformers", "diffusers"])
def test_a_newer_release_is_said_to_be_newer(package, monkeypatch):
    oldest, _ = tested.TESTED[package]
    monkeypatch.setitem(tested.TESTED, package, (oldest, oldest))
    found = examination()
    assert [note for note in found.notes if note.startswith(package) and "newer than tested" in note], (
        found.notes
    )


@pytest.mark.parametrize("package", ["torch", "transformers", "diffusers"])
def test_an_older_release_is_said_by_apply_in_one_line(package, monkeypatch):
    pytest.importorskip(package)
    monkeypatch.setitem(tested.TESTED, package, ("99.1", "99.2"))
    model = model_of("Llama", "sdpa")
    with pytest.warns(errors.AttnpatchWarning, match=rf"{package} .* is older than 99\.1") as record:
        attnpatch.apply(model)
        attnpatch.remove(model)
        attnpatch.apply(model)
    attnpatch.remove(model)
    assert len(record) == 1 and "\n" not in str(record[0].message)
    assert any(package in wrong and "older than 99.1" in wrong for wrong, _ in examination().wrong)


def test_doctor_says_which_releases_have_a_feature(taken):
    taken("MASK_TABLE")
    assert examination().off == [f"masks by rows (transformers 4.53 to {tested.TESTED['transformers'][1]})"]


@pytest.mark.parametrize("missing", ["COMPILED_CALL", "PLAIN_CALL", "the interpreter's lock"])
def test_without_a_place_to_see_first_calls(missing, monkeypatch, capsys):
    """One line, nothing is put into ``nn.Module``, and models of hosts are patched all the same."""
    if missing in TAKEN:
        monkeypatch.setattr(compat, missing, NOWHERE)
    else:
        monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    before = dict(vars(torch.nn.Module))
    session = Session(Settings(Policy(mode="always")))
    session.tell_of_first_calls(None)
    assert dict(vars(torch.nn.Module)) == before
    assert capsys.readouterr().err.splitlines() == [
        "attnpatch: this torch tells of no first call: only models of hosts are patched"
    ]
    plain, model = torch.nn.MultiheadAttention(8, 2), model_of("Llama", "eager")
    plain(*torch.ones(3, 40, 1, 8))
    inputs = inputs_of("Llama", 40)
    with torch.no_grad():
        native = model(**inputs)[0]
        session.built(model)
        assert torch.equal(model(**inputs)[0], native)
    assert attnpatch.report(model).totals["by_rows"] == 2
    assert list(session.patches.values()) == [patch_of(model)] and patch_of(plain) is None


def test_what_is_declared_is_what_the_rows_run():
    """``make test-versions`` runs the oldest and the newest release of everything that is declared."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    declared = dict(
        requirement.split(">=")
        for requirement in [*project["dependencies"], *itertools.chain(*extras)]
        if ">=" in requirement
    )
    run = {}
    for row in ROWS:
        for requirement in (*row.packages, f"python=={row.python}"):
            name, release = requirement.split("==")
            run.setdefault(name, []).append(release)
    for name, least in declared.items():
        oldest = min(run[name], key=tested.numbers)
        assert tested.numbers(oldest, 3)[: least.count(".") + 1] == tested.numbers(least, 3), name
    for name, (oldest, newest) in tested.TESTED.items():
        releases = sorted(run[name], key=tested.numbers)
        assert (releases[0], releases[-1]) == (oldest, newest), name
    oldest, newest = tested.TESTED["python"]
    _, after = tested.numbers(newest)
    assert project["requires-python"] == f">={oldest},<3.{after + 1}"
