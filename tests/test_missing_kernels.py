"""Stand-ins for kernel packages that are not installed: whole scripts with the variable only, and the modules' edges."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

from attnpatch.activation.launcher import BOOT

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = pathlib.Path(__file__).parent / "missing_kernels"
ACTIVE = {"ATTNPATCH": "1", "ATTNPATCH_REPLACE_KERNELS": "1"}
NAMES = ("flash_attn", "flash_attn_interface", "xformers", "sageattention")


def run(*arguments, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ATTNPATCH")}
    path = os.pathsep.join([str(BOOT), str(ROOT)])
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**environment, "PYTHONPATH": path, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def code(text, **variables):
    done = run("-c", text, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wrong_by(done):
    assert done.returncode == 0, done.stderr
    found = re.search(r"wrong by (.*)", done.stdout)
    return max(map(float, found[1].split()))


# ------------------------------------------------------------------------------------------------- whole scripts

LINE = "attnpatch: {} is not installed; a stand-in computes its attention functions with torch's"


@pytest.mark.parametrize(
    ("script", "arguments", "package"),
    [
        ("wan", (), "flash_attn"),
        pytest.param("hunyuan", (), "flash_attn", marks=pytest.mark.long),
        pytest.param("framepack", ("sage",), "sageattention", marks=pytest.mark.long),
        pytest.param("framepack", ("flash",), "flash_attn", marks=pytest.mark.long),
        ("framepack", ("xformers",), "xformers"),
        ("ollm", (), "flash_attn"),
    ],
)
def test_a_script_that_needs_a_kernel_runs(script, arguments, package):
    """It fails without the variable (``ollm``: it chooses SDPA), and gives the float64 result with it."""
    path = SCRIPTS / f"{script}.py"
    without = run(path, *arguments)
    assert without.returncode == 1 or "runs sdpa" in without.stdout
    done = run(path, *arguments, **ACTIVE, ATTNPATCH_MIN_FREE="900GB", ATTNPATCH_MIN_TOKENS="0")
    assert wrong_by(done) < 1e-5
    assert done.stderr.count(LINE.format(package)) == 1
    assert "active; patched" in done.stderr  # its modules count as attention
    if script == "ollm":
        assert "runs flash_attention_2" in done.stdout
    if script == "hunyuan":
        assert "refused: flash_attn is not installed" in done.stdout
    if script == "ollm":
        quiet = run(path, *arguments, **ACTIVE, ATTNPATCH_QUIET="1")
        assert quiet.returncode == 0 and "attnpatch" not in quiet.stderr


@pytest.mark.long  # it measures a process's memory, which needs a quiet machine
def test_a_function_outside_any_model_goes_by_rows():
    """2,048 rows: the scores of all heads are 134 MB in float32; a step of them is a few MB."""
    short = run(SCRIPTS / "functions.py", 2048, **ACTIVE, ATTNPATCH_REPORT="1", ATTNPATCH_MIN_FREE="900GB")
    assert wrong_by(short) < 1e-5
    by_rows = float(re.search("took (.*) MB", short.stdout)[1])
    plenty = run(
        SCRIPTS / "functions.py", 2048, **ACTIVE, ATTNPATCH_FREE_MEMORY="900GB", ATTNPATCH_REPORT="1"
    )
    assert wrong_by(plenty) < 1e-5
    assert by_rows < 100 < float(re.search("took (.*) MB", plenty.stdout)[1])
    for done in (short, plenty):
        assert "flash_attn_func (stand-in, outside patched models)" in done.stderr
        assert "saw no model" not in done.stderr


# ---------------------------------------------------------------------------------------------- what is offered

OFFERED = """
import importlib.util, inspect, sys
import flash_attn, xformers.ops, sageattention
from attnpatch.hosts.kernels.wrapping import READERS
from attnpatch.standins.modules import HOMES
for name, home in HOMES.items():
    for function, read in READERS[home].items():
        if function == "memory_efficient_attention_partial":
            assert not hasattr(sys.modules[name], function)
            continue
        ours = getattr(sys.modules[name], function)
        assert ours is getattr(sys.modules[home], function)
        assert list(inspect.signature(ours).parameters.values()) == list(inspect.signature(read).parameters.values())
        assert inspect.signature(ours).return_annotation is inspect.Signature.empty
print(flash_attn.__version__, flash_attn.__doc__)
"""


def test_what_has_a_reader_is_offered_with_the_signature_of_the_package():
    said = code(OFFERED, **ACTIVE)
    assert said.startswith(
        "2.8.3 Stand-in of attnpatch for flash_attn, which is not installed: flash_attn_func, "
    )


ERRORS = """
import importlib.util, sys
import flash_attn, xformers.ops
def of(statement):
    try:
        exec(statement, {"flash_attn": flash_attn, "xformers": xformers})
    except (ImportError, AttributeError) as error:
        print(type(error).__name__, error)
of("from flash_attn import flash_attn_nothing")
of("flash_attn.flash_attn_nothing")
of("from xformers.ops import SwiGLU")
of("import flash_attn.layers.rotary")
of("from flash_attn.ops.rms_norm import RMSNorm")
of("import flash_attn_interface")
assert not hasattr(flash_attn, "nothing")
for name in ("flash_attn.cute", "flash_attn_interface", "xformers.sparse"):
    assert importlib.util.find_spec(name) is None, name
"""


def test_what_is_not_offered_names_what_is():
    said = code(ERRORS, **ACTIVE).splitlines()
    kinds = [line.split()[0] for line in said]
    assert kinds == ["ImportError", "AttributeError", "ImportError", *3 * ["ModuleNotFoundError"]]
    for line in said[:2]:
        assert "stand-in for flash_attn has no 'flash_attn_nothing', only flash_attn_func, " in line
    assert (
        "stand-in for xformers.ops has no 'SwiGLU', only " in said[2]
        and "memory_efficient_attention" in said[2]
    )
    assert (
        "No module named 'flash_attn.layers'; flash_attn is not installed, and attnpatch's stand-in has only"
        in said[3]
    )
    assert "No module named 'flash_attn.ops'" in said[4]
    assert "No module named 'flash_attn_interface'; attnpatch has no stand-in for it, since" in said[5]


METADATA = """
import importlib.metadata as metadata
print(metadata.version("flash_attn"), metadata.version("flash-attn"), metadata.version("xformers"))
print(metadata.packages_distributions()["flash_attn"], metadata.metadata("sageattention")["Summary"])
print([one.metadata["Name"] for one in metadata.distributions(path=["/nowhere"])])
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available
print(is_flash_attn_2_available(), is_flash_attn_3_available())
"""


def test_hosts_find_the_metadata_that_lets_them_load():
    first, second, third, fourth = code(METADATA, **ACTIVE).splitlines()
    assert first == "2.8.3 2.8.3 0.0.33"
    assert second == "['flash-attn'] Stand-in of attnpatch; the package itself is not installed"
    assert third == "[]"  # of a folder that pip looks into
    assert fourth == "True False"


DIFFUSERS = """
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models import attention_dispatch as found
assert found._CAN_USE_FLASH_ATTN and found._CAN_USE_SAGE_ATTN and found._CAN_USE_XFORMERS_ATTN
torch.manual_seed(0)
model = FluxTransformer2DModel(
    patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
).eval()
given = dict(
    hidden_states=torch.randn(1, 48, 4), encoder_hidden_states=torch.randn(1, 8, 32), pooled_projections=torch.randn(1, 32),
    timestep=torch.tensor([1.0]), img_ids=torch.randn(48, 3), txt_ids=torch.zeros(8, 3),
)
with torch.no_grad():
    expected = model(**given).sample
    for name in ("flash", "sage", "xformers"):
        model.set_attention_backend(name)
        print("wrong by", float((model(**given).sample - expected).abs().max()))
"""


def test_backends_of_diffusers_run():
    pytest.importorskip("diffusers")
    said = re.findall("wrong by (.*)", code(DIFFUSERS, **ACTIVE))
    assert len(said) == 3 and all(float(wrong) < 1e-5 for wrong in said)


# ---------------------------------------------------------------------------------------- when there is none

INSTALLED = """
import sys, flash_attn
print(flash_attn.__file__, getattr(flash_attn, "mine", None))
"""


@pytest.mark.parametrize("is_late", [False, True])
def test_an_installed_package_wins(tmp_path, is_late):
    """Also one that a finder finds which was added later, as those of editable installs are."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("mine = True\n")
    late = f"""
import importlib.machinery, sys
class Late:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return importlib.machinery.PathFinder.find_spec(name, [{str(tmp_path)!r}]) if name == "flash_attn" else None
sys.meta_path.append(Late)
"""
    start = late if is_late else f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    said = code(start + INSTALLED, **ACTIVE)
    assert "True" in said and "__init__.py" in said


@pytest.mark.parametrize(
    "variables", [{}, {"ATTNPATCH": "1"}, {"ATTNPATCH_REPLACE_KERNELS": "1"}, {**ACTIVE, "ATTNPATCH": "0"}]
)
def test_without_both_variables_nothing_is_found(variables):
    for name in NAMES:
        done = run("-c", f"import {name}", **variables)
        assert done.returncode == 1 and f"No module named '{name}'\n" in done.stderr


IN_PYTHON = """
import sys, attnpatch
assert "torch" not in sys.modules
print(attnpatch.replace_missing_kernels(mode="always"))
assert "torch" not in sys.modules
import torch
from flash_attn import flash_attn_func
from attnpatch.reporting import report_of
from attnpatch.standins import modules
q = torch.randn(1, 64, 2, 8)
flash_attn_func(q, q, q)
(patch,) = modules.used()
print(report_of(patch).totals["by_rows"])
"""


def test_in_python():
    said = code(IN_PYTHON)
    assert said == "('flash_attn', 'xformers', 'sageattention')\n1\n"


# ------------------------------------------------------------------------------------------- parts of a stand-in


def test_padding():
    from attnpatch.standins import padding

    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1]])
    x = torch.randn(3, 4, 2, 5)
    tokens, places, ends, longest, used = padding.unpad_input(x, mask)
    assert torch.equal(tokens, x[mask.bool()]) and longest == 4
    assert ends.tolist() == [0, 2, 6, 8] and ends.dtype == torch.int32
    assert used.tolist() == [2, 4, 2] and places.tolist() == [0, 1, 4, 5, 6, 7, 9, 11]
    padded = padding.pad_input(tokens, places, 3, 4)
    assert torch.equal(padded, x * mask[..., None, None])
    assert torch.equal(padding.index_first_axis(x.flatten(0, 1), places), tokens)
    unused = torch.tensor([[0, 0, 1, 0]] * 3) * (1 - mask)
    tokens, places, ends, _, used = padding.unpad_input(x, mask, unused)
    assert ends.tolist() == [0, 3, 7, 10] and used.tolist() == [2, 4, 2] and len(tokens) == len(places) == 10


def biases():
    from attnpatch.standins import xformers_biases as b

    packed = b.BlockDiagonalMask.from_seqlens([3, 5, 4], [4, 7, 4])
    padded = b.BlockDiagonalPaddedKeysMask.from_seqlens([3, 5, 4], 9, [4, 7, 6])
    causal = b.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([3, 5, 4], 9, [4, 7, 6])
    bias = torch.randn(1, 2, 12, 15)
    return {
        "causal": b.LowerTriangularMask(),
        "causal and a bias": b.LowerTriangularMask().add_bias(bias),
        "causal to the end": b.LowerTriangularFromBottomRightMask(),
        "causal, local": b.LowerTriangularFromBottomRightMask().make_local_attention(4),
        "local": b.LocalAttentionFromBottomRightMask(2, 3),
        "packed": packed,
        "packed, causal": packed.make_causal(),
        "packed, causal to the end": packed.make_causal_from_bottomright(),
        "packed, local": packed.make_local_attention(2),
        "packed, local to the end": packed.make_local_attention_from_bottomright(3),
        "padded": padded,
        "padded, causal": causal,
    }


@pytest.mark.parametrize("name", biases())
def test_biases_mean_the_tensor_that_they_materialise(name):
    """What a reader makes of a bias, against its own ``materialize`` in float64."""
    from attnpatch.hosts.kernels import wrapping
    from attnpatch.rows.kernels.compute import attention

    bias = biases()[name]
    kv_len = 27 if name.startswith("padded") else 15
    q = torch.randn(1, 12, 2, 8, dtype=torch.double)
    k, v = (torch.randn(1, kv_len, 2, 8, dtype=torch.double) for _ in range(2))
    call = wrapping.READERS["xformers.ops.fmha"]["memory_efficient_attention"](q, k, v, bias)
    result, _ = attention(call, None)
    mask = bias.materialize((1, 2, 12, kv_len), dtype=torch.double)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5 + mask
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    is_open = ~expected.isnan()
    assert is_open.any() and mask.isinf().any()
    found = call.returned(result, None)
    assert (found - expected)[is_open].abs().max() < 1e-9
    assert (found[~is_open] == 0).all()


def test_packing_tensors():
    from attnpatch.standins.xformers_biases import BlockDiagonalMask

    tensors = [torch.randn(2, 3, 2, 8), torch.randn(1, 5, 2, 8)]
    bias, packed = BlockDiagonalMask.from_tensor_list(tensors)
    assert packed.shape == (1, 11, 2, 8) and bias.q_seqinfo.seqstart_py == [0, 3, 6, 11]
    assert all(torch.equal(a, b) for a, b in zip(bias.split(packed), tensors, strict=True))
    keys = [torch.randn(2, 4, 2, 8), torch.randn(1, 2, 2, 8)]
    bias, q, k, v = BlockDiagonalMask.from_tensor_lists_qkv(tensors, keys)
    assert v is None and k.shape == (1, 10, 2, 8) and torch.equal(q, packed)
    assert all(torch.equal(a, b) for a, b in zip(bias.split_kv(k), keys, strict=True))
    with pytest.raises(ValueError, match=r"a tensor \[1, 11, ...\] is split, not \[1, 10, 2, 8\]"):
        bias.split(k)


# ------------------------------------------------------------------------------------------- what is refused, and said

REFUSED = """
import torch, attnpatch
from flash_attn import flash_attn_func, flash_attn_with_kvcache
from sageattention import sageattn_varlen
from xformers.ops import memory_efficient_attention
q = torch.randn(1, 8, 2, 8)
ends = torch.tensor([0, 8], dtype=torch.int32)
class Unknown: pass
def of(call):
    try:
        call()
    except attnpatch.errors.AttnpatchError as error:
        assert "\\n" not in str(error)
        print(error)
of(lambda: memory_efficient_attention(q, q, q, Unknown()))
of(lambda: sageattn_varlen(q[0, :4], q[0], q[0], ends // 2, ends, 4, 8, is_causal=True))
of(lambda: flash_attn_with_kvcache(q, q, q, rotary_cos=torch.ones(8, 4), rotary_sin=torch.ones(8, 4)))
torch.manual_seed(0)
ours = flash_attn_func(q, q, q, dropout_p=0.5)
assert not torch.equal(ours, flash_attn_func(q, q, q)) and not torch.equal(ours, flash_attn_func(q, q, q, dropout_p=0.5))
"""


def test_calls_that_nobody_can_express_are_refused_in_one_line():
    said = code(REFUSED, **ACTIVE).splitlines()
    for line, (name, what, package) in zip(
        said,
        (
            ("memory_efficient_attention", "class Unknown", "xformers"),
            ("sageattn_varlen", "as many queries as keys only", "sageattention"),
            ("flash_attn_with_kvcache", "rotary_cos and rotary_sin", "flash_attn"),
        ),
        strict=True,
    ):
        assert line.startswith(f"{name}: ") and what in line
        assert line.endswith(f"{package} is not installed, and attnpatch's stand-in cannot compute this call")


def test_the_doctor_lists_kernel_packages():
    for variables, said in (
        ({}, "flash_attn: missing;"),
        (ACTIVE, "flash_attn: missing, a stand-in is found;"),
    ):
        done = run("-m", "attnpatch", "doctor", **variables)
        text = " ".join(done.stdout.split())
        assert said in text and "flash_attn_interface: missing " in text
    text = " ".join(run("-m", "attnpatch", "doctor", ATTNPATCH_REPLACE_KERNELS="1").stdout.split())
    assert "ATTNPATCH_REPLACE_KERNELS without ATTNPATCH=1: nothing happens" in text


OFF = """
from attnpatch import errors
from attnpatch.hosts import off
off.missing = lambda: errors.ReleaseError("no _name in torch")
import importlib
for name in ("flash_attn", "xformers.ops"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(error)
"""


def test_there_is_no_stand_in_with_a_torch_that_attnpatch_does_not_run_with():
    first, second = code(OFF, **ACTIVE).splitlines()
    assert first == "No module named 'flash_attn', and no stand-in: no _name in torch"
    assert second.startswith("No module named 'xformers', and no stand-in")


SHOWN = """
import glob, attnpatch
(own,) = glob.glob("maps/*self_attn*")
found = attnpatch.load(own).mass
assert found.shape == (2, 1, 6, 6) and (found.sum(-1) - 1).abs().max() < 1e-6
(cross,) = glob.glob("maps/*cross_attn*")
found = attnpatch.load(cross).mass[:, 0]
print([round(float(one), 4) for one in found[1, :, 1]])
assert (found.sum(-1) - 1).abs().max() < 1e-6
"""


def test_captures_hold_inside_a_model(tmp_path):
    """Of the second sequence's text only five tokens are there, so its second block of eight gets nothing."""
    done = run(SCRIPTS / "wan.py", **ACTIVE, ATTNPATCH_CAPTURE=str(tmp_path / "maps"), ATTNPATCH_BLOCKS="8")
    assert done.returncode == 0, done.stderr
    assert "not captured" not in done.stderr
    shown = subprocess.run(
        [sys.executable, "-c", SHOWN],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == "[0.0, 0.0, 0.0, 0.0, 0.0, 0.0]\n"
