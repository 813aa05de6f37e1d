"""Which accelerators this machine has, by what each kind can be asked: nothing is loaded, nothing is guessed."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgebuild.errors import first_line

TIMEOUT = 10  # seconds
_VENDORS = {"0x8086": "Intel", "0x1002": "AMD", "0x10de": "NVIDIA", "0x1022": "AMD", "0x17cb": "Qualcomm", "0x1af4": "virtio"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Accelerators:
    """Those of one kind: a line for each that was found; else why nothing is known of any."""

    kind: str
    found: tuple[str, ...]
    unavailable: str = ""


def accelerators(devices: Path = Path("/dev"), classes: Path = Path("/sys/class")) -> list[Accelerators]:
    return [
        _asked("NVIDIA GPU", _nvidia),
        _asked("GPU of the system (DRI)", lambda: _nodes(devices / "dri", "renderD", classes / "drm")),
        _asked("NPU of the system (accel)", lambda: _nodes(devices / "accel", "accel", classes / "accel")),
        _asked("Apple GPU (Metal)", _metal),
    ]


def _asked(kind: str, ask: Callable[[], list[str]]) -> Accelerators:
    try:
        return Accelerators(kind=kind, found=tuple(ask()))
    except (OSError, subprocess.SubprocessError) as error:
        return Accelerators(kind=kind, found=(), unavailable=str(error).strip() or type(error).__name__)


def _nvidia() -> list[str]:
    """Name, memory, driver and compute capability, by nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        raise OSError("no nvidia-smi here")
    query = "--query-gpu=name,memory.total,driver_version,compute_cap"
    done = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    if done.returncode:
        raise OSError(f"nvidia-smi says: {first_line(done.stdout + done.stderr) or f'nothing, status {done.returncode}'}")
    rows = [[part.strip() for part in line.rsplit(",", 3)] for line in done.stdout.splitlines() if line.count(",") >= 3]
    return [f"{name}, {memory}, driver {driver}, compute capability {capability}" for name, memory, driver, capability in rows]


def _nodes(folder: Path, prefix: str, sysfs: Path) -> list[str]:
    """Device nodes, with vendor and driver from sysfs, and whether this user may open them."""
    if not folder.is_dir():
        raise OSError(f"no {folder} here")
    found = []
    for node in sorted(path for path in folder.iterdir() if path.name.startswith(prefix)):
        device = sysfs / node.name / "device"
        vendor = _text(device / "vendor")
        driver = os.path.basename(os.path.realpath(device / "driver")) if (device / "driver").exists() else "unknown"
        opened = "" if os.access(node, os.R_OK | os.W_OK) else ", which this user may not open"
        found.append(f"{node}: {_VENDORS.get(vendor, vendor or 'unknown vendor')}, driver {driver}{opened}")
    if not found:
        raise OSError(f"no {prefix}* in {folder}")
    return found


def _metal() -> list[str]:
    if sys.platform != "darwin":
        raise OSError("this is no macOS")
    if platform.machine() != "arm64":
        raise OSError("no Apple silicon")
    done = subprocess.run(
        ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, timeout=TIMEOUT, check=True
    )
    return [f"{done.stdout.strip()}, macOS {platform.mac_ver()[0]}"]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
