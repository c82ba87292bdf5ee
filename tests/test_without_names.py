"""A release of torch that lacks a private name of ``attnpatch/compat.py``: nothing of the user's breaks.

Every name is taken away, whether or not it is listed here. Unless it is listed, attnpatch must be off as a whole. This is
about releases to come: with an older release, which has its names, other features may be off.
"""

import json
import os
import pathlib
import subprocess
import sys

import fresh
import pytest
import torch
from test_layers import private_names
from without_names import COMPAT, names_in

from attnpatch import Policy, errors
from attnpatch.activation import session
from attnpatch.activation.settings import Settings
from attnpatch.hosts import off
from attnpatch.patching.patch import patch_of
from attnpatch.releases.tested import TESTED

SCRIPT = pathlib.Path(__file__).with_name("without_names.py")
NAMES = names_in(COMPAT.read_text(encoding="utf-8"))
CHECKPOINTS, ENCODERS, KERNELS = (
    "attention by rows in checkpoints",
    "attention by rows in torch's encoder layers",
    "maps beside fused kernels without computing scores again",
)
# Names without which one feature is off, and all others stay.
FEATURES = {
    "checkpoint._CheckpointFrame": CHECKPOINTS,
    "checkpoint._StopRecomputationError": CHECKPOINTS,
    "torch._native_multi_head_attention": ENCODERS,
    "torch._transformer_encoder_layer_fwd": ENCODERS,
    "torch._transform_bias_rescale_qkv": ENCODERS,
    "torch._masked_softmax": ENCODERS,
    "torch._addmm_activation": ENCODERS,
    "torch._fused_sdp_choice": "dense math of scaled_dot_product_attention by rows",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": KERNELS,
    "torch.ops.aten._scaled_dot_product_flash_attention": KERNELS,
    "torch.ops.aten._scaled_dot_product_efficient_attention": KERNELS,
    "torch.ops.aten._scaled_dot_product_cudnn_attention": KERNELS,
}
# Names without which nothing is off, and why.
NOTHING_OFF = {
    "torch.ops.aten._safe_softmax": "torch computes no softmax with it then",
    "torch._C._mps_maxBufferLength": "the longest buffer is not known; the policy has a cap of its own",
    "torch._C._EnableTorchFunction": "only torch 2.8 and older need it",
    "torch._C._autograd._top_saved_tensors_default_hooks": "torch 2.6 and older: attnpatch notes the hooks itself",
    "torch._C._autograd._push_saved_tensors_default_hooks": "only torch 2.6 and older need it",
    "torch._C._autograd._pop_saved_tensors_default_hooks": "only torch 2.6 and older need it",
    "torch.cpu._is_amx_tile_supported": "the more careful number of rows is taken",
    "torch.cpu._is_amx_fp16_supported": "the more careful number of rows is taken",
    "sys._is_gil_enabled": "Python 3.12 and older always have the lock",
}

pytestmark = [
    pytest.mark.xdist_group("without_names"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="each name is tried in a fork"),
]


@pytest.fixture(scope="module")
def outcomes():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    found = map(json.loads, done.stdout.splitlines())
    return {each.pop("name"): each for each in found}


@pytest.mark.parametrize("name", NAMES)
def test_without_a_name_of_torch(name, outcomes):
    """The result and the gradients of the model, also in checkpoints; one warning; doctor names what is off."""
    found = outcomes[name]
    assert "error" not in found, found["error"]
    assert found["is_same"] and not found["differ"]
    if name in NOTHING_OFF:
        assert found["by_rows"] and not found["refusal"]
        assert found["off"] == found["warnings"] == []
        return
    (off,), (warning,) = found["off"], found["warnings"]
    assert off in warning and f"to {TESTED['torch'][1]})" in off
    if name in FEATURES:
        assert found["by_rows"] and not found["refusal"]
        assert off.startswith(FEATURES[name])
    else:
        assert not found["by_rows"] and off in found["refusal"]
        assert off.startswith("attention by rows and maps (torch ") and "_no_such_name" in off


def test_with_every_name_nothing_is_off(outcomes):
    found = outcomes[""]
    assert found["by_rows"] and not (found["off"] or found["warnings"] or found["refusal"])


def test_the_names_are_all_private_names_of_compat():
    """Another reader of code finds no more; and what is listed is used."""
    parts = {part for name in NAMES for part in name.split(".")}
    assert {name.rpartition(".")[2] for name in private_names(COMPAT)} <= parts
    assert FEATURES.keys() | NOTHING_OFF.keys() <= set(NAMES)
    assert names_in("import torch\nfrom torch.overrides import _a as b\ntorch.c._d\ngetattr(torch.e, '_f', 1)\n") == [
        "torch.overrides._a", "torch.c._d", "torch.e._f",
    ]  # fmt: skip


ERROR = errors.ReleaseError("attention by rows and maps (torch 2.5.1 to 2.14.1): no _name")


@pytest.fixture
def nothing_said(monkeypatch):
    monkeypatch.setattr(off, "_said", set())


@pytest.mark.parametrize(
    "use",
    [
        lambda instead, function: instead("by_rows")(function),
        lambda instead, function: instead("by_rows")(min_free="8GB")(function),
        lambda instead, function: instead("apply")(function, mode="always"),
        lambda instead, function: instead("patched")(function, mode="always").__enter__(),
    ],
)
def test_what_a_script_calls_while_attnpatch_is_off(use, nothing_said):
    """What is given comes back, with one warning."""

    def given():
        pass

    def instead(name):
        return off.instead_of(name, ERROR)

    with pytest.warns(errors.AttnpatchWarning, match="no _name. Models run as they are") as record:
        assert use(instead, given) is given
        assert use(instead, given) is given
    assert len(record) == 1
    assert instead("register")(given) is given and instead("remove")(given) is given
    assert "attnpatch is off with torch" in instead("report")(given)


@pytest.mark.parametrize("name", ["capture", "explain", "BlockAttentionAnalyzer", "token_scores", "heads"])
def test_what_makes_a_map_is_refused_while_attnpatch_is_off(name):
    with pytest.raises(errors.ReleaseError, match=rf"{name} is off with torch .* no _name"):
        off.instead_of(name, ERROR)(model=None)


def test_activation_while_attnpatch_is_off(monkeypatch, capsys):
    """One line, also where only errors are said; models of hosts are left alone, and nothing is said at exit."""
    monkeypatch.setattr(session, "missing", lambda: ERROR)
    before = dict(vars(torch.nn.Module))
    active = session.Session(Settings(Policy(mode="always"), quiet=True))
    active.tell_of_first_calls(None)
    model = torch.nn.MultiheadAttention(8, 2)
    active.built(model)
    active.end()
    assert dict(vars(torch.nn.Module)) == before and patch_of(model) is None
    assert capsys.readouterr().err == f"attnpatch: models run as they are: ReleaseError: {ERROR}\n"


MODEL = "attnpatch/demo/model"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["doctor"], 0, "off  attention by rows and maps (torch "),
        (["explain", MODEL, "--seq-len", "64"], 1, "attnpatch: explain is off with torch "),
        (
            ["analyze", "--model", MODEL, "--json", "chats.json", "--out", "maps"],
            1,
            "attnpatch: off with this torch: attention by rows and maps",
        ),
    ],
)
def test_commands_where_torch_lacks_a_name(arguments, code, says):
    script = "\n".join([
        f"import sys, torch; sys.path.insert(0, {str(SCRIPT.parent)!r})",
        "from without_names import Compat",
        "sys.meta_path.insert(0, Compat('torch._neg_view'))",
        "from attnpatch.cli.app import app",
        f"app({arguments})",
    ])  # fmt: skip
    done = fresh.run("-c", script, cwd=SCRIPT.parents[1], COLUMNS="300")
    assert says in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert done.returncode == code, done.stdout + done.stderr
