"""A release of torch that lacks a private name of ``attnpatch/compat.py``: nothing of the user's breaks.

Every name is taken away, whether or not it is listed here. Unless it is listed, attnpatch must be off as a whole. This is
about releases to come: with an older release, which has its names, other features may be off.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from test_layers import private_names
from without_names import COMPAT, names_in

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
