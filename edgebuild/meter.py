"""What the system's own counters say: energy (RAPL, powercap in the kernel's documentation) and memory (proc(5))."""

from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")


class Energy:
    """Joules of all processor packages between start and stop, from RAPL's counters; None where they cannot be read."""

    def __init__(self, root: Path) -> None:
        # intel-rapl:0 is a package; intel-rapl:0:1 is a part of it and would count twice.
        self._zones = [zone for zone in sorted(root.glob("intel-rapl:*")) if zone.name.count(":") == 1]
        self._begin: list[int] | None = None

    def start(self) -> None:
        self._begin = self._read("energy_uj")

    def stop(self) -> float | None:
        """The counters begin again at 0 behind max_energy_range_uj."""
        now, ranges = self._read("energy_uj"), self._read("max_energy_range_uj")
        if self._begin is None or now is None or ranges is None:
            return None
        return sum((after - before) % (top + 1) for before, after, top in zip(self._begin, now, ranges, strict=True)) * 1e-6

    def _read(self, name: str) -> list[int] | None:
        try:
            return [int((zone / name).read_text(encoding="ascii")) for zone in self._zones] or None
        except (OSError, ValueError):
            return None


class Memory:
    """What this process uses beyond what it used when this was made, in bytes, from /proc; elsewhere unknown."""

    def __init__(self) -> None:
        try:  # the peak of importing is not the model's: 5 sets VmHWM back to what is resident now (proc(5))
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            pass  # then the peak may be the imports' and the figure too high, never too low
        self._idle = _status()

    def above(self) -> dict[str, Any]:
        now = _status()
        if not now or not self._idle:
            return {"peak": None, "anonymous": None, "memory_reason": "not measured: this system has no /proc/self/status"}
        return {
            "peak": max(0, now["VmHWM"] - self._idle["VmRSS"]),
            "anonymous": max(0, now["RssAnon"] - self._idle["RssAnon"]),
            "memory_reason": "",
        }


def _status() -> dict[str, int]:
    """VmHWM, VmRSS and RssAnon of this process, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return {name: int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS", "RssAnon")}
    except (OSError, ValueError, KeyError, IndexError):
        return {}
