"""What this machine has at this moment: memory that one more process may take, and room on its disks."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

# Beside each limit, what counts against it: cgroup v2 (docs.kernel.org/admin-guide/cgroup-v2.html), and v1.
_LIMITS = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}
_NO_LIMIT = 2**60  # v1 says "none" by a number near 2⁶³


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """In bytes. `available`: what can be taken without swapping, or is left of a cgroup's limit where that is less."""

    total: int
    available: int
    cgroup_limit: int | None  # the least limit of the cgroups that this process is in


def memory(cgroups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Memory:
    import psutil

    machine = psutil.virtual_memory()
    limits = _cgroup_limits(cgroups, root)
    left = min((limit - used for limit, used in limits), default=machine.available)
    return Memory(
        total=machine.total,
        available=max(0, min(machine.available, left)),
        cgroup_limit=min((limit for limit, _ in limits), default=None),
    )


def free(path: str) -> int:
    """Bytes that may still be written at a path, which need not exist yet. Raises OSError where no folder above it does."""
    return shutil.disk_usage(existing(path)).free


def existing(path: str) -> str:
    """The path, or the nearest folder above it that exists."""
    whole = os.path.abspath(path)
    while not os.path.exists(whole) and os.path.dirname(whole) != whole:
        whole = os.path.dirname(whole)
    return whole


def _cgroup_limits(cgroups: Path, root: Path) -> list[tuple[int, int]]:
    """(limit, used) of every cgroup above this process that has a limit on memory."""
    found = []
    try:
        lines = cgroups.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []  # no Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        kind = "memory" if "memory" in controllers.split(",") else controllers
        if kind not in _LIMITS:
            continue
        folder = root / kind / path.lstrip("/")
        for place in (folder, *folder.parents):
            if place == root.parent:
                break
            limit, used = (_number(place / name) for name in _LIMITS[kind])
            if limit is not None and used is not None and limit < _NO_LIMIT:
                found.append((limit, used))
    return found


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None  # "max", or no such file
