"""How much memory is free: of devices that are not here, told by stand-ins, and of the host within its limits."""

import types
import warnings

import fresh
import psutil
import pytest
import torch

from attnpatch import compat
from attnpatch.errors import AttnpatchWarning
from attnpatch.memory import devices, free, host


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch):
    for name in ("ATTNPATCH_FREE_MEMORY", "PYTORCH_MPS_HIGH_WATERMARK_RATIO", *host._SLURM):
        monkeypatch.delenv(name, raising=False)
    free.allocation_limit.cache_clear()
    free._say_unknown.cache_clear()
    yield
    free.allocation_limit.cache_clear()


def stand_in(**answers):
    """A device's module: each function takes a device and gives a number, or raises what it is given."""

    def function(answer):
        def ask(device=None):
            if isinstance(answer, Exception):
                raise answer
            return answer

        return ask

    return types.SimpleNamespace(**{name: function(answer) for name, answer in answers.items()})


def told_by(monkeypatch, *modules):
    monkeypatch.setattr(devices, "modules_of", lambda device: list(modules))


# ------------------------------------------------------------------------------------------------------- accelerators

USED = {"memory_reserved": 7, "memory_allocated": 3}
OF_XPU = {"total_memory": 100, "has_fp64": True}
# Some drivers of Intel raise this.
SILENT = RuntimeError(
    "The device (Intel(R) Arc(TM) Graphics) doesn't support querying the available free memory."
)
# What the device's module tells; free bytes.
TOLD = {
    "the driver's and the allocator's": ({"mem_get_info": (10, 100), **USED}, 14),
    "a share above what is free": ({"mem_get_info": (10, 100), "get_per_process_memory_fraction": 1.0, **USED}, 14),
    "a share": ({"mem_get_info": (90, 100), "get_per_process_memory_fraction": 0.25, **USED}, 25 - 3),
    "a share that is used": ({"mem_get_info": (90, 100), "get_per_process_memory_fraction": 0.05, **USED}, 4),
    "a driver that does not answer": (
        {"mem_get_info": SILENT, "get_device_properties": types.SimpleNamespace(**OF_XPU), **USED}, 100 - 3,
    ),
    "no allocator": ({"mem_get_info": (10, 100)}, 10),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
@pytest.mark.parametrize("name", TOLD)
def test_free_memory_of_a_device(monkeypatch, name, kind):
    answers, expected = TOLD[name]
    told_by(monkeypatch, stand_in(**answers))
    assert free.free_bytes(f"{kind}:0") == expected


def test_what_a_module_lacks_is_asked_of_torch_accelerator(monkeypatch):
    own = stand_in(memory_allocated=3)
    general = stand_in(get_memory_info=(10, 100), memory_reserved=7, memory_allocated=99)
    told_by(monkeypatch, own, general)
    assert free.free_bytes("mtia") == 14


def test_a_device_that_does_not_answer_is_no_device_with_the_memory_of_the_host(monkeypatch):
    told_by(monkeypatch, stand_in(mem_get_info=RuntimeError("no driver")))
    with pytest.raises(RuntimeError, match="no driver"):
        free.free_bytes("cuda")


def test_a_device_that_tells_nothing_has_the_memory_of_the_host_and_one_warning(monkeypatch):
    told_by(monkeypatch)
    monkeypatch.setattr(free, "free_on_host", lambda: 77)
    with pytest.warns(AttnpatchWarning, match="'hpu' is free.*ATTNPATCH_FREE_MEMORY") as said:
        assert [free.free_bytes("hpu") for _ in range(2)] == [77, 77]
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert free.free_bytes("meta") == 77  # nothing is there yet


# torch_npu names its device and registers its module so.
NPU = """
import types
import torch
torch.utils.rename_privateuse1_backend("npu")
numbers = {"mem_get_info": (50, 100), "memory_reserved": 30, "memory_allocated": 10}
module = types.ModuleType("torch.npu")
module.is_available = lambda: True
for name, number in numbers.items():
    setattr(module, name, lambda device=None, number=number: number)
torch._register_device_module("npu", module)
from attnpatch.memory.free import allocation_limit, free_bytes
assert torch.get_device_module("npu") is module
print(free_bytes("npu:0"), allocation_limit(torch.device("npu:0")))
module.get_per_process_memory_fraction = lambda device=None: 0.4
print(free_bytes("npu"))
"""


def test_free_memory_of_npu():
    """In an interpreter of its own, since a name is given once."""
    done = fresh.run("-c", NPU)
    assert done.stdout.split() == ["70", "None", "30"], done.stderr


MPS = {"recommended_max_memory": 50, "current_allocated_memory": 20, "driver_allocated_memory": 24}


@pytest.mark.parametrize(
    ("share", "of_host", "expected"),
    [
        ("", 1000, 30),
        ("1.7", 1000, 30),
        ("0.0", 1000, 30),
        ("0.5", 1000, 5),
        ("0.1", 1000, 0),
        ("nonsense", 1000, 30),
        ("", 8, 12),
    ],
)
def test_free_memory_of_mps(monkeypatch, share, of_host, expected):
    """It shares the host's memory; 4 bytes are the allocator's cache."""
    told_by(monkeypatch, stand_in(**MPS))
    monkeypatch.setenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", share)
    monkeypatch.setattr(devices, "free_on_host", lambda: of_host)
    assert free.free_bytes("mps") == expected


def test_the_longest_allocation_of_a_device(monkeypatch):
    cpu, mps, xpu, cuda = map(torch.device, ("cpu", "mps", "xpu", "cuda"))
    told_by(monkeypatch, stand_in(**MPS))
    monkeypatch.setattr(compat, "mps_longest_buffer", lambda: 33)
    assert free.allocation_limit(mps) == 33
    free.allocation_limit.cache_clear()
    monkeypatch.setattr(compat, "mps_longest_buffer", lambda: 2**40)
    assert free.allocation_limit(mps) == 2**32  # more ends the process inside Metal
    free.allocation_limit.cache_clear()
    monkeypatch.setattr(compat, "mps_longest_buffer", lambda: None)  # an older torch
    assert free.allocation_limit(mps) == 50
    for has_fp64, most in ((True, None), (False, 2**32 - 2**13)):
        free.allocation_limit.cache_clear()
        told_by(monkeypatch, stand_in(get_device_properties=types.SimpleNamespace(has_fp64=has_fp64)))
        assert free.allocation_limit(xpu) == most
    assert free.allocation_limit(cuda) is None and free.allocation_limit(cpu) is None


def test_torch_has_the_functions_that_are_asked():
    """Of this release; a stand-in would not show a wrong name."""
    for name in ("mem_get_info", "memory_reserved", "memory_allocated", "get_per_process_memory_fraction"):
        assert hasattr(torch.cuda, name) and hasattr(torch.xpu, name)
    assert all(hasattr(torch.mps, name) for name in MPS)
    assert all(hasattr(torch.accelerator, name) for name in ("get_memory_info", "memory_reserved"))
    assert devices.modules_of(torch.device("xpu"))[0] is torch.xpu
    assert compat.mps_longest_buffer() in (0, None) or torch.backends.mps.is_available()


def test_doctor_lists_every_accelerator(monkeypatch):
    from attnpatch.activation.examination import Findings, _devices

    answers = {"mem_get_info": (10, 100), "device_count": 2, "get_device_name": "Arc", **USED}
    told_by(monkeypatch, stand_in(**answers))
    monkeypatch.setattr(compat, "accelerator", lambda: torch.device("xpu"))
    found = Findings()
    _devices(found, torch)
    assert found.devices[1:] == [("xpu:0 Arc", 14, 100), ("xpu:1 Arc", 14, 100)] and not found.wrong
    told_by(monkeypatch, stand_in(**MPS))
    monkeypatch.setattr(compat, "accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(devices, "free_on_host", lambda: 1000)
    found = Findings()
    _devices(found, torch)
    assert found.devices[1:] == [("mps:0", 30, 50)]


# --------------------------------------------------------------------------------------------------------------- host

FILES = {
    2: ("memory.max", "memory.current", "memory.high"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}
OLD_NONE = 2**63 - 4096
# What /proc/self/cgroup says; by group: limit, usage, file cache and, in version 2, the limit above which it is slow.
GROUPS = {
    "none": ("0::/\n", {}, []),
    "root": ("0::/\n", {"": (100, 30, 5)}, [75]),
    "child": ("0::/slurm/job/step\n", {"": ("max", 30, 5), "slurm/job": (80, 30, 10), "slurm/job/step": ("max", 1, 0)}, [60]),
    "both": ("0::/user/me\n", {"user": (1000, 100, 0), "user/me": (400, 100, 50)}, [350, 900]),
    "an ancestor has less": ("0::/a/b/c\n", {"a": (90, 80, 0), "a/b": (1000, 70, 0), "a/b/c": (500, 10, 0)}, [10, 490, 930]),
    "high": ("0::/app.slice/run\n", {"app.slice": ("max", 60, 0, 100), "app.slice/run": (90, 60, 0, "max")}, [30, 40]),
    "high below max": ("0::/run\n", {"run": (90, 60, 0, 70)}, [10]),
    "above high": ("0::/run\n", {"run": ("max", 80, 0, 70)}, [0]),
    "of a host outside": ("0::/docker/abc\n", {"": (90, 30, 0)}, [60]),
    "older": ("9:cpu:/x\n4:cpuset,memory:/job/1\n", {"": (OLD_NONE, 1, 0), "job/1": (70, 20, 5)}, [55]),
    "older, nested": ("4:memory:/slurm/uid/job\n", {"slurm": (OLD_NONE, 90, 0), "slurm/uid": (100, 60, 0), "slurm/uid/job": (80, 30, 0)}, [40, 50]),
    "both versions": ("4:memory:/job\n0::/user\n", {"job": (70, 20, 0)}, [50]),
    "unreadable": (None, {"": (100, 30, 5)}, [75]),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_limits_of_every_control_group_count(name, tmp_path, monkeypatch):
    membership, groups, expected = GROUPS[name]
    version = 1 if "4:" in (membership or "") else 2
    if membership is not None:
        (tmp_path / "membership").write_text(membership)
    for path, (limit, used, cache, *high) in groups.items():
        folder = tmp_path / "groups" / path
        folder.mkdir(parents=True, exist_ok=True)
        for file, number in zip(FILES[version], (limit, used, *high), strict=False):
            (folder / file).write_text(f"{number}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")
    monkeypatch.setattr(host, "_MEMBERSHIP", str(tmp_path / "membership"))
    files = {number: host._CGROUPS[number][1:] for number in (1, 2)}
    roots = {version: str(tmp_path / "groups"), 3 - version: str(tmp_path / "none")}
    monkeypatch.setattr(host, "_CGROUPS", {number: (roots[number], *files[number]) for number in (1, 2)})
    assert sorted(host._cgroup_free()) == expected
    assert free.free_bytes("cpu") <= min([*expected, 2**60])


MIB = 2**20
# Variables of a SLURM job; its limit.
JOBS = [
    ({"SLURM_MEM_PER_NODE": "3000"}, 3000 * MIB),
    ({"SLURM_MEM_PER_NODE": "8G"}, 8 * 2**30),
    ({"SLURM_MEM_PER_NODE": "0"}, None),  # the whole node
    ({"SLURM_MEM_PER_NODE": "lots"}, None),
    ({"SLURM_MEM_PER_CPU": "2000", "SLURM_CPUS_ON_NODE": "4"}, 8000 * MIB),
    ({"SLURM_MEM_PER_CPU": "2000"}, None),
    ({"SLURM_MEM_PER_CPU": "1g", "SLURM_CPUS_ON_NODE": "16"}, 2**34),
    ({"SLURM_MEM_PER_GPU": "9000", "SLURM_GPUS_ON_NODE": "2"}, 18000 * MIB),
    ({"SLURM_JOB_ID": "7"}, None),
]  # fmt: skip


@pytest.mark.parametrize(("variables", "limit"), JOBS)
def test_limits_of_slurm(variables, limit, monkeypatch):
    for name in ("SLURM_CPUS_ON_NODE", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = psutil.Process().memory_info().rss
    found = host._slurm_free()
    if limit is None:
        assert found == []
    else:
        (left,) = found
        assert 0 <= abs(limit - before - left) < 64 * MIB


def test_the_least_of_all_limits_counts(monkeypatch):
    monkeypatch.setattr(host, "_cgroup_free", list)
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1")
    assert free.free_bytes("cpu") == 0  # this process holds more than that
    monkeypatch.delenv("SLURM_MEM_PER_NODE")
    assert free.free_bytes("cpu") > 0
    monkeypatch.setattr(host, "_cgroup_free", lambda: [9, 5])
    assert free.free_bytes("cpu") == 5
