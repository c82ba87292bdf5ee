"""Collects what ``attnpatch doctor`` prints: versions, devices, kernels, variables, and problems with their fixes."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from attnpatch.activation import settings
from attnpatch.activation.launcher import startup_folder
from attnpatch.errors import PolicyError
from attnpatch.hosts import off
from attnpatch.policy import FREE_MEMORY, Policy
from attnpatch.releases import tested
from attnpatch.standins.finder import is_missing
from attnpatch.standins.packages import PACKAGES as KERNELS

PACKAGES = ("torch", "transformers", "diffusers", "accelerate", "bitsandbytes", "peft", "wrapt")
# A kernel package without a stand-in.
NO_STAND_IN = {"flash_attn_interface": ("flash-attn-3", "")}
CALLS = ("no mask", "causal", "mask", "grouped heads", "heads of 60")
# torch.nn.attention.SDPBackend by number.
_KERNELS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn", 4: "overrideable"}
_PROBE = (
    "import sys; m = sys.modules.get('attnpatch.activation.session'); sys.exit(0 if m and m._session else 3)"
)


@dataclasses.dataclass
class Findings:
    """What was found.

    Attributes:
        versions: For each package, the installed version (``None``: not installed) and the lowest allowed one.
        devices: Name, free bytes, total bytes.
        kernels: Device, dtype, and the kernel for each of ``CALLS``.
        packages: For each kernel package, what is found of it: its version, that it is missing, what replaces it.
        disabled: SDPA backends that are switched off.
        folder: Folder of the start-up file, or ``None`` if it is not installed.
        is_seen: Whether a fresh interpreter with ``ATTNPATCH=1`` becomes active.
        is_active: Whether this process is active.
        variables: The ``ATTNPATCH*`` variables of this process.
        policy: The policy that the variables define, or ``None`` if a variable is invalid.
        notes: Facts that are no problem but good to know, such as releases that are newer than tested.
        off: Features that are off because the installed releases of the hosts lack names that they need, and the
            releases that have these names.
        wrong: Problems, each with its fix.
    """

    versions: dict[str, tuple[str | None, str]] = dataclasses.field(default_factory=dict)
    devices: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)
    kernels: list[tuple[str, str, list[str]]] = dataclasses.field(default_factory=list)
    packages: dict[str, str] = dataclasses.field(default_factory=dict)
    disabled: list[str] = dataclasses.field(default_factory=list)
    folder: str | None = None
    is_seen: bool = False
    is_active: bool = False
    variables: dict[str, str] = dataclasses.field(default_factory=dict)
    policy: Policy | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    off: list[str] = dataclasses.field(default_factory=list)
    wrong: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def examination() -> Findings:
    """Examine this environment."""
    found = Findings()
    _versions(found)
    _activation(found, os.environ)
    _packages(found, os.environ)
    try:
        import torch
    except Exception as error:
        found.wrong.append(
            (f"torch cannot be imported: {error}", "reinstall torch: pip install --force-reinstall torch")
        )
        return found
    found.off = features_off()
    if off.missing() is None:
        _devices(found, torch)
        _kernels(found, torch)
    return found


def _versions(found: Findings) -> None:
    least = _declared()
    oldest, newest = tested.TESTED["python"]
    found.versions["python"] = (platform.python_version(), oldest)
    if tested.older_than_tested("python"):
        found.wrong.append(
            (f"Python {platform.python_version()} is older than {oldest}", f"use {oldest} to {newest}")
        )
    found.notes += [words for name in tested.TESTED if (words := tested.newer_than_tested(name))]
    for name in PACKAGES:
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed = None
        found.versions[name] = (installed, least.get(name, ""))
        if name in tested.TESTED:
            least[name] = tested.TESTED[name][0]
            found.versions[name] = (installed, least[name])
        if installed is None and name in ("torch", "wrapt"):
            found.wrong.append((f"{name} is not installed", f"pip install {name}"))
        elif (
            installed is not None
            and name in least
            and tested.numbers(installed, 3) < tested.numbers(least[name], 3)
        ):
            found.wrong.append(
                (f"{name} {installed} is older than {least[name]}", f'pip install "{name}>={least[name]}"')
            )


def features_off() -> list[str]:
    """What is off with the installed releases, and which releases have it."""
    error = off.missing()
    if error is not None:
        return [str(error)]
    from attnpatch.hosts import features

    return [str(feature) for feature in features.off()]


def _packages(found: Findings, environment: Mapping[str, str]) -> None:
    """Which kernel packages are installed, and what happens to their calls under the variables of this process."""
    is_replaced = (
        found.policy is not None and found.policy.replace_kernels and settings.is_asked_for(environment)
    )
    for package, (name, _) in {**KERNELS, **NO_STAND_IN}.items():
        if is_missing(package):
            has_stand_in = is_replaced and package in KERNELS
            found.packages[package] = "missing, a stand-in is found" if has_stand_in else "missing"
            continue
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed = "installed"
        found.packages[package] = (
            f"{installed}, its calls in models are replaced" if is_replaced else installed
        )


def _declared() -> dict[str, str]:
    """The lowest allowed version of each package that attnpatch's metadata names."""
    try:
        lines = importlib.metadata.requires("attnpatch") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = [re.match(r"([\w.-]+)[^;]*>=\s*([\d.]+)", line) for line in lines]
    return {match.group(1): match.group(2) for match in found if match}


def _activation(found: Findings, environment: Mapping[str, str]) -> None:
    found.folder = startup_folder()
    session = sys.modules.get("attnpatch.activation.session")
    found.is_active = session is not None and session._session is not None
    found.variables = {
        name: value
        for name, value in sorted(environment.items())
        if name == settings.SWITCH or name.startswith(settings.PREFIX)
    }
    found.is_seen = found.folder is not None and _fresh_interpreter_is_active(environment)
    if not found.folder:
        found.wrong.append(
            ("the start-up file is not installed, so ATTNPATCH=1 does nothing",
             "pip install attnpatch again, or start scripts with: attnpatch run script.py")
        )  # fmt: skip
    elif not found.is_seen:
        found.wrong.append(
            ("a fresh interpreter with ATTNPATCH=1 does not become active",
             'run this and read its message: ATTNPATCH=1 python -c ""')
        )  # fmt: skip
    _variables(found, environment)


def _fresh_interpreter_is_active(environment: Mapping[str, str]) -> bool:
    clean = {name: value for name, value in environment.items() if not name.startswith(settings.PREFIX)}
    command = [sys.executable, "-c", _PROBE]
    try:
        done = subprocess.run(
            command, env={**clean, settings.SWITCH: "1"}, capture_output=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _variables(found: Findings, environment: Mapping[str, str]) -> None:
    try:
        asked = settings.is_asked_for(environment)
        given = settings.Settings.of_environment(environment)
        found.policy = given.policy
    except PolicyError as error:
        found.wrong.append((str(error), "set it to an accepted value, or unset it"))
        return
    idle = [name for name in found.variables if name not in (settings.SWITCH, FREE_MEMORY)]
    if idle and not asked:
        found.wrong.append(
            (f"{', '.join(idle)} without ATTNPATCH=1: nothing happens", "set ATTNPATCH=1, or unset it")
        )
    if environment.get(settings.BLOCKS) and given.capture is None:
        found.wrong.append(
            (
                "ATTNPATCH_BLOCKS without ATTNPATCH_CAPTURE: nothing is captured",
                "set ATTNPATCH_CAPTURE=folder",
            )
        )


def _devices(found: Findings, torch: Any) -> None:
    import psutil

    from attnpatch.memory import devices
    from attnpatch.memory.free import free_bytes

    try:
        found.devices.append(("cpu", free_bytes("cpu"), psutil.virtual_memory().total))
        for name, device in devices.present():
            told = devices.memory_of(device)
            if told is not None:
                found.devices.append((name, free_bytes(device), told[1]))
    except PolicyError:
        # ATTNPATCH_FREE_MEMORY is not a size; _variables has reported that.
        pass
    except RuntimeError as error:
        found.wrong.append((f"a device does not answer: {error}", "check that its driver works: nvidia-smi"))
    if torch.version.cuda and not torch.cuda.is_available():
        found.wrong.append(
            (f"torch is built for CUDA {torch.version.cuda} and finds no device",
             "check that nvidia-smi lists one and CUDA_VISIBLE_DEVICES does not hide it")
        )  # fmt: skip


def _kernels(found: Findings, torch: Any) -> None:
    types = [("cpu", "float32"), ("cpu", "bfloat16")]
    if torch.cuda.is_available():
        types += [("cuda", "float16"), ("cuda", "bfloat16"), ("cuda", "float32")]
        flags = {"flash": "flash", "efficient": "mem_efficient", "cudnn": "cudnn"}
        for kernel, name in flags.items():
            if not getattr(torch.backends.cuda, f"{name}_sdp_enabled", lambda: True)():
                found.disabled.append(kernel)
    for device, dtype in types:
        chosen = [_chosen(torch, device, getattr(torch, dtype), call) for call in CALLS]
        found.kernels.append((device, dtype, chosen))
        slow = [call for call, kernel in zip(CALLS[:3], chosen, strict=False) if kernel == "math"]
        if slow and device != "cpu":
            why = f"; switched off: {', '.join(found.disabled)}" if found.disabled else ""
            found.wrong.append(
                (f"SDPA runs dense math on {device} in {dtype} ({', '.join(slow)}){why}",
                 "switch the fused kernels on: torch.backends.cuda.enable_flash_sdp(True), enable_mem_efficient_sdp(True)")
            )  # fmt: skip


def _chosen(torch: Any, device: str, dtype: Any, call: str) -> str:
    """The kernel that torch would choose for a small call; the call is not run."""
    from attnpatch import compat

    size = 60 if call == "heads of 60" else 64
    query = torch.empty(1, 4, 128, size, dtype=dtype, device=device)
    key = query[:, :2] if call == "grouped heads" else query
    mask = torch.ones(1, 1, 128, 128, dtype=torch.bool, device=device) if call == "mask" else None
    grouped = {"enable_gqa": call == "grouped heads"}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            number = compat.fused_sdp_choice(query, key, key, mask, 0.0, call == "causal", **grouped)
    except (RuntimeError, AttributeError, TypeError):
        return "unknown"
    return "unknown" if number == compat.UNKNOWN_KERNEL else _KERNELS.get(int(number), str(number))
