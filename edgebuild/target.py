"""Target, Platform, Source: what to deliver, what the device is, what the model is made from. Frozen data."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_REPOSITORY = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})@(?P<revision>[\w.-]+)(/(?P<path>.+))?\Z", re.ASCII
)
_ADDRESS = re.compile(r"[!-~]+\Z")  # RFC 3986, 2
_DISTRIBUTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\Z")  # packaging.python.org, "Names and normalization"


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
    hardware: str = "any"  # what it computes with, as preferences.yaml knows it
    memory: int | None = None  # bytes that the device has
    not_measured: str = ""  # why nothing is timed on this machine for this platform
    defaults: Mapping[str, Any] = field(default_factory=dict)  # the same keys as in a target
    facts: Mapping[str, Any] = field(default_factory=dict)  # what bundles state: minimum system versions and the like
    file: str = field(default="", compare=False)
    lines: Mapping[str, int] = field(default_factory=dict, compare=False)  # as a target's

    def problem(self, key: str, message: str) -> str:
        """As a target's."""
        return _problem(self.file, self.lines, key, message)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One deliverable: built-in defaults ← platform ← target file, checked. Sizes in bytes, times in seconds."""

    name: str
    file: str
    description: str
    default: bool
    source: str
    sha256: str
    state: Mapping[str, str]  # input → the output that is fed back to it; samples are then sequences of steps
    shape: Mapping[str, list[int]]  # input → the sizes that the model is made for, where its own are free
    task: str
    platform: Platform
    framework: str
    prefer: str  # what `framework: auto` puts first, else empty
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
    sign: Mapping[str, str]  # key, cert and pin_env, as written
    sign_kinds: frozenset[str]  # of all bundles that it was written for: of the target's file, or of the platform
    memory_limit: int | None
    estimates: Mapping[str, int]  # a step's name → the memory that it takes, where the target says it better than an estimate
    time_limit: float
    lines: Mapping[str, int] = field(compare=False)  # dotted key -> its line in `file`, for messages

    def problem(self, key: str, message: str) -> str:
        """`FILE:LINE: KEY: message`, with the line of the nearest key that stands in the file."""
        return _problem(self.file, self.lines, key, message)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What `model.source` names: its `kind` is `local`, `package`, `hf` or `https`.

    `path` is a local path, a path inside a distribution or a repository (empty: the whole of it), or the address.
    """

    kind: str
    path: str
    name: str = ""  # DISTRIBUTION or ORG/REPO
    commit: str = ""

    @property
    def remote(self) -> bool:
        return self.kind in ("hf", "https")


def parse_source(text: str) -> Source:
    """Raises ValueError with what is wrong and what to write, in one sentence."""
    scheme, colon, rest = text.partition(":")
    if colon and scheme == "hf":
        return _hf(rest)
    if colon and scheme == "package":
        name, _, inside = rest.partition("/")
        if not _DISTRIBUTION.match(name) or not inside or not _inside(inside):
            raise ValueError("a file of an installed distribution is package:DISTRIBUTION/path/inside, without ..")
        return Source(kind="package", path=inside, name=name)
    if colon and scheme == "https":
        return _https(text)
    if colon and (rest.startswith("//") or scheme in ("s3", "gs")):
        raise ValueError(f"edgebuild takes nothing from {scheme}:; give hf:ORG/REPO@COMMIT, an https address, or a local path")
    return Source(kind="local", path=text)


def _problem(file: str, lines: Mapping[str, int], key: str, message: str) -> str:
    known = key
    while known and known not in lines:
        known = known.rpartition(".")[0]
    line = f":{lines[known]}" if known else ""
    return f"{file}{line}: {key}: {message}"


def _hf(rest: str) -> Source:
    match = _REPOSITORY.match(rest)
    if not match or ".." in match["name"] or not _inside(match["path"] or "x"):
        raise ValueError("a Hugging Face repository is hf:ORG/REPO@COMMIT, or hf:ORG/REPO@COMMIT/FILE for one file of it")
    return Source(kind="hf", path=match["path"] or "", name=match["name"], commit=match["revision"])


def _https(address: str) -> Source:
    if not _ADDRESS.match(address):
        raise ValueError(
            "an address is written in ASCII without spaces: %C3%BC for ü and %20 for a space, xn--… in a host's name"
        )
    try:
        parts = urlsplit(address)
        host = (parts.hostname or "").encode("idna") if parts.port != 0 else b""
    except ValueError:  # of its brackets, its port, an empty part of the host's name
        host = b""
    if not host:
        raise ValueError("this is no address such as https://example.org/model.onnx")
    if parts.username or parts.password:
        raise ValueError("an address with a user name or a password in it would lie open in the target file; give one without")
    return Source(kind="https", path=address)


def _inside(path: str) -> bool:
    """Whether a path stays in the folder that it is relative to."""
    return not path.startswith("/") and "\\" not in path and not {"", ".", ".."} & set(path.split("/"))
