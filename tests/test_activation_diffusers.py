"""In an active process models of diffusers are patched as they are built, and pipelines with them."""

import copy
import inspect
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

import diffusers
import pipelines
import zoo
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models import modeling_utils
from test_activation_session import roots

import attnpatch
from attnpatch import Policy
from attnpatch.activation import session as sessions
from attnpatch.activation.closing import closing_lines
from attnpatch.activation.session import Session
from attnpatch.activation.settings import Settings
from attnpatch.hosts import building
from attnpatch.patching.forward_swap import STATE, put_in
from attnpatch.patching.patch import patch_of

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def active(monkeypatch):
    """A session that sees the models whose classes are made in the test: diffusers' own are made already."""

    def begin(**settings):
        session = Session(Settings(**settings))
        # For its undoing only.
        monkeypatch.setattr(modeling_utils.ModelMixin, "__init_subclass__", None, raising=False)
        building._watch_diffusers(modeling_utils, session.built)
        monkeypatch.setattr(sessions, "_session", session)
        return session

    yield begin


def part():
    """As in diffusers: a config is registered around ``__init__``."""

    class Part(modeling_utils.ModelMixin, ConfigMixin):
        config_name = "config.json"

        @register_to_config
        def __init__(self, width: int = 8, heads: int = 2):
            super().__init__()
            self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0]

        def decode(self, x):
            return self.attention(x, x, x)[0]

    return Part


X = zoo.floats(1, 24, 8)


def test_a_model_is_patched_once_it_is_complete(active):
    session = active(policy=Policy(mode="always"))

    class Longer(part()):
        def __init__(self):
            super().__init__()
            self.more = nn.MultiheadAttention(8, 2, batch_first=True)

    model = Longer()
    assert roots(model) == [""]
    assert STATE in vars(model.more) and STATE in vars(model.attention)
    assert list(session.patches.values()) == [patch_of(model)]
    assert patch_of(model).policy == Policy(mode="always")


def test_a_model_of_models_is_one_patch(active):
    session = active()
    inner = part()

    class Both(modeling_utils.ModelMixin):
        def __init__(self, models):
            super().__init__()
            self.models = nn.ModuleList(models)

    both = Both([inner(), inner()])
    assert roots(both) == [""]
    assert list(session.patches.values()) == [patch_of(both)]


def test_a_class_without_an_init_of_its_own(active):
    active()

    class Same(part()):
        pass

    assert roots(Same()) == [""]
    # Built by type(model)(...) of a patched one.
    assert roots(type(Same())()) == [""]


def test_an_init_that_was_replaced_or_raises(active):
    session = active()
    kind = part()
    before = kind.__init__

    def replaced(self):
        before(self)

    kind.__init__ = replaced
    assert roots(kind()) == [""]
    kind.__init__ = before
    with pytest.raises(TypeError):
        kind(nonsense=1)
    assert building._under_way == set()
    assert session.counts == {}


def test_a_model_without_attention_is_noted(active):
    session = active()

    class Plain(modeling_utils.ModelMixin):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

    assert STATE not in vars(Plain())
    assert session.counts == {"without": 1}


def test_an_autoencoder_counts_though_its_forward_is_never_called(active):
    session = active(policy=Policy(mode="always"))
    model = part()()
    native = copy.deepcopy(model)
    attnpatch.remove(native)
    with torch.no_grad():
        assert torch.equal(model.decode(X), native.decode(X))
    lines = "\n".join(closing_lines(session))
    assert "Part: Policy(mode='always'" in lines and "never called" not in lines


def test_configs_and_checkpoints_are_as_ever(active, tmp_path):
    plain = part()
    active(policy=Policy(mode="never"))
    watched = part()
    assert inspect.signature(watched.__init__) == inspect.signature(plain.__init__)
    model = watched(heads=4)
    assert model.config == plain(heads=4).config
    model.save_pretrained(tmp_path)
    loaded = watched.from_pretrained(tmp_path)
    assert roots(loaded) == [""] and loaded.config.heads == 4
    assert torch.equal(loaded(X), model(X))
    assert torch.equal(plain.from_pretrained(tmp_path)(X), model(X))


@pytest.mark.parametrize("kind", [AutoencoderKL, PixArtTransformer2DModel])
def test_models_of_diffusers(active, kind):
    active()

    class Watched(kind):
        def __init__(self, **config):
            super().__init__(**config)

    pipe = pipelines.build("pixart")
    (source,) = (part for part in pipelines.modules(pipe).values() if isinstance(part, kind))
    model = Watched.from_config(source.config)
    assert roots(model) == [""]
    attnpatch.remove(model)
    assert type(model) is Watched and roots(model) == []


def test_a_failure_of_ours_leaves_the_model_as_it_is(active, monkeypatch, capsys):
    session, calls = active(), []

    def broken(*args):
        calls.append(put_in(*args))
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("attnpatch.patching.patch.put_in", broken)
    model = part()()
    assert not any(STATE in vars(module) for module in model.modules())
    assert session.counts["unpatched"] == 1
    assert capsys.readouterr().err == "attnpatch: Part is left as it is: ZeroDivisionError: ours\n"


def test_hosts_that_are_not_what_was_expected_do_not_stop_the_import(capsys):
    failures = []
    building._hook(building._watch_diffusers, print, failures.append, object())
    (error,) = failures
    assert isinstance(error, AttributeError)


CHILD = """
import sys
from attnpatch.activation.start import start
start()
assert not {"torch", "diffusers"} & set(sys.modules)
import diffusers, numpy, pipelines
pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])
numpy.save(sys.argv[2], pipelines.run(pipe, "pixart"))
"""


def test_a_pipeline_that_is_loaded_in_an_active_process(tmp_path):
    pipelines.build("pixart").save_pretrained(tmp_path / "pipe")
    native = pipelines.run(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe"), "pixart")
    variables = {name: value for name, value in os.environ.items() if not name.startswith("ATTNPATCH")}
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "tests"))
    variables |= {
        "ATTNPATCH": "1",
        "ATTNPATCH_MODE": "always",
        "ATTNPATCH_ROWS": "7",
        "ATTNPATCH_REPORT": "1",
    }
    variables |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, tmp_path / "pipe", tmp_path / "images.npy"],
        env=variables, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "images.npy"), native)
    for kind in ("T5EncoderModel", "AutoencoderKL", "PixArtTransformer2DModel"):
        assert f"attnpatch: {kind}: Policy(mode='always'" in done.stderr
    assert "left as it is" not in done.stderr
