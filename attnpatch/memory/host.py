"""Memory of the host that this process can still take, within the limits of control groups and of SLURM."""

from __future__ import annotations

import os
import pathlib
import re

import psutil

# For each version of control groups: the root folder, the files with limits and the file with the usage. ``memory.high`` stops
# nothing, but above it the kernel slows a process down until it hardly moves.
_CGROUPS = {
    2: ("/sys/fs/cgroup", ("memory.max", "memory.high"), "memory.current"),
    1: ("/sys/fs/cgroup/memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes"),
}
# SLURM's limits, in MiB unless they have a unit, and the number of which each is one share.
_SLURM = {
    "SLURM_MEM_PER_NODE": None,
    "SLURM_MEM_PER_CPU": "SLURM_CPUS_ON_NODE",
    "SLURM_MEM_PER_GPU": "SLURM_GPUS_ON_NODE",
}
_SLURM_UNITS = {"K": 2**10, "": 2**20, "M": 2**20, "G": 2**30, "T": 2**40}
_MEMBERSHIP = "/proc/self/cgroup"


def free_on_host() -> int:
    """Bytes of the host's memory: what is available, within every limit that applies to this process."""
    return min([psutil.virtual_memory().available, *_cgroup_free(), *_slurm_free()])


def _cgroup_free() -> list[int]:
    """Bytes left under each memory limit of this process: its own control group's, and those of its parents."""
    found = []
    for version, path in _memberships():
        root, limit_names, used_name = _CGROUPS[version]
        place = pathlib.PurePosixPath("/", path)
        for group in (place, *place.parents):
            # Inside a container the path may be the host's: then only the root folder exists.
            folder = pathlib.Path(root, *group.parts[1:])
            limits = [limit for name in limit_names if (limit := _number(folder / name)) is not None]
            used = _number(folder / used_name)
            # If there is no limit, version 2 has "max" and version 1 a number near 2**63.
            if limits and min(limits) < 2**60 and used is not None:
                found.append(max(0, min(limits) - used + _page_cache(folder)))
    return found


def _number(path: pathlib.Path) -> int | None:
    """The number in a file; ``None`` if there is no such file, or another word in it."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _slurm_free() -> list[int]:
    """Bytes left of the memory that SLURM gave this job on this node. Other processes of the job are not known."""
    found = []
    for name, shares in _SLURM.items():
        match = re.fullmatch(r"(\d+)([KMGT]?)B?", os.environ.get(name, "").strip().upper())
        count = os.environ.get(shares, "") if shares else "1"
        # A limit of 0 means the whole node.
        if match and int(match.group(1)) and count.isdigit():
            limit = int(match.group(1)) * _SLURM_UNITS[match.group(2)] * int(count)
            found.append(max(0, limit - psutil.Process().memory_info().rss))
    return found


def _memberships() -> list[tuple[int, str]]:
    """Version and path of the control groups that limit this process's memory."""
    try:
        lines = pathlib.Path(_MEMBERSHIP).read_text().splitlines()
    except OSError:
        lines = []
    found = []
    for line in lines:
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if "memory" in controllers.split(","):
            found.append((1, path))
        elif number == "0" and not controllers:
            found.append((2, path))
    return found or [(2, "/"), (1, "/")]


def _page_cache(folder: pathlib.Path) -> int:
    """Bytes of file cache charged to a control group. The kernel frees them before it kills a process."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
        found = {name: int(count) for name, count in map(str.split, lines)}
    except (OSError, ValueError):
        return 0
    # Version 1 has a separate total that includes the groups inside.
    return found.get("total_inactive_file", found.get("inactive_file", 0))
