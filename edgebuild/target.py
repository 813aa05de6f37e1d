"""Target and Platform: what to deliver, and what the device is. Frozen data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """A limit on one metric. `waive` keeps the verdict and packs all the same."""

    min: float | None = None
    max: float | None = None
    required: bool = False
    waive: Mapping[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        return {"min": self.min, "max": self.max, "required": self.required, "waive": self.waive and dict(self.waive)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Platform:
    """A device class, from `platforms/NAME.yaml`. `not_measured` is empty where timing here says something about it."""

    name: str
    description: str = ""
    not_measured: str = ""  # why nothing is timed on this machine for this platform
    defaults: Mapping[str, Any] = field(default_factory=dict)  # the same keys as in a target
    facts: Mapping[str, Any] = field(default_factory=dict)  # what bundles state: minimum system versions and the like


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One deliverable: built-in defaults ← platform ← target file, checked. Sizes in bytes, times in seconds."""

    name: str
    file: str
    description: str
    default: bool
    source: str
    sha256: str
    task: str
    platform: Platform
    framework: str
    scheme: str
    quantize: Mapping[str, Any]  # group_size, symmetric, method, … as written
    calibration: str
    calibration_samples: int | None
    evaluation: str
    profile: str
    gates: Mapping[str, Gate]
    kind: str
    version: str
    shell_limit: int | None
    weights_limit: int | None
    archive: bool
    require_level: str
    memory_limit: int | None
    time_limit: float
    lines: Mapping[str, int] = field(compare=False)  # dotted key -> its line in `file`, for messages

    def problem(self, key: str, message: str) -> str:
        """`FILE:LINE: KEY: message`, with the line of the nearest key that stands in the file."""
        known = key
        while known and known not in self.lines:
            known = known.rpartition(".")[0]
        line = f":{self.lines[known]}" if known else ""
        return f"{self.file}{line}: {key}: {message}"
