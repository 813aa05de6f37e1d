"""A toolchain is an interpreter plus a lock: the versions that a backend runs with, as installed here or as its lock names them.

Locks are shipped as data, `locks/NAME.txt`, in the format of pip's requirement files: all that a backend needs, with hashes for
every platform. Comments in them say what pip has no word for: `# import: NAME …`, what can be imported where nothing is
missing; `# build: NAME=VALUE`, the environment of what is built from source; `# form: wheels`, that nothing is installed here: the
wheels themselves are wanted, for an image.
"""

import os
import platform
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from edgebuild import digest, shipped
from edgebuild.errors import UserError

FOLDER = os.path.join(shipped.PACKAGE, "locks")
MISSING = "missing"
Versions = Callable[[tuple[str, ...]], Mapping[str, str]]  # packages → the versions that somebody runs with


@dataclass(frozen=True, kw_only=True, slots=True)
class Lock:
    """What a lock says to this interpreter. `pins`: normalized name → version, of those lines whose markers hold here.

    `content` is the digest of what it makes one run with, and in keys; `text` is that of its lines, hashes too; `digest` is also
    that of the interpreter and the machine, and names the environment that is made of it.
    """

    name: str
    path: str
    pins: Mapping[str, str]
    imports: tuple[str, ...]
    build: Mapping[str, str]
    wheels: bool  # whether it is a folder of wheels, and no environment
    content: str
    text: str
    digest: str

    @property
    def interpreter(self) -> str:
        """What wheels are for: `cp311 x86_64`. Another patch release of Python takes the same ones."""
        return f"{_tag()} {platform.machine()}"

    @property
    def label(self) -> str:
        """What a key holds of the lock of an environment: `onnxruntime 1f2e3d4c5b6a7988`."""
        return f"{self.name} {self.content[:16]}"

    def versions(self, packages: Iterable[str]) -> dict[str, str]:
        """package → the version that it has in the lock's own environment; and the interpreter's, and the lock itself."""
        return {"python": _interpreter(), **{one: self.pinned(one) or MISSING for one in packages}, "lock": self.label}

    def pinned(self, package: str) -> str:
        """The version of a package, empty where the lock has none for this interpreter."""
        return self.pins.get(normalized(package), "")

    def differences(self, found: Mapping[str, str]) -> list[str]:
        """`onnx 1.0.0 instead of 1.23.2` for each package whose version is not the lock's (of any build of it: 2.13.0+cpu)."""
        wanted = {one: self.pinned(one) for one in found if one != "python"}
        others = {one: found[one] for one, pin in wanted.items() if pin and found[one].partition("+")[0] != pin}
        return [f"{one} {version} instead of {wanted[one]}" for one, version in others.items()]


def names() -> list[str]:
    """Every toolchain that there is a lock of."""
    try:
        return sorted(name.removesuffix(".txt") for name in os.listdir(FOLDER) if name.endswith(".txt"))
    except FileNotFoundError:
        return []


def shipped_texts() -> set[str]:
    """The digest of the text of every lock, as environments note it. Raises UserError."""
    return {lock.text for name in names() if (lock := read(name))}


def file(name: str) -> str:
    return os.path.join(FOLDER, f"{name}.txt")


def read(name: str) -> Lock | None:
    """The lock of a backend; None where it has none, and then this interpreter is its toolchain. Raises UserError."""
    path = file(name)
    try:
        with open(path, encoding="utf-8") as opened:
            lines = [line.strip() for line in opened]
    except FileNotFoundError:
        return None
    pins, options, said = _pins(path, lines), [line for line in lines if re.match(r"--?(?!hash=)[a-z]", line)], _said(lines)
    build, wheels = dict(line.split("=", 1) for line in said["build"]), said["form"] == ["wheels"]
    text = digest.tagged("lock text", [[line for line in lines if line and not line.startswith("#")], build])
    here = [sysconfig.get_config_var("SOABI"), platform.machine(), _tag() if wheels else _interpreter()]
    return Lock(
        name=name,
        path=path,
        pins=pins,
        imports=tuple(" ".join(said["import"]).split()),
        build=build,
        wheels=wheels,
        content=digest.tagged("lock", [pins, options, build]),
        text=text,
        digest=digest.tagged("toolchain", [text, here]),
    )


def normalized(package: str) -> str:
    """A distribution's name as indexes compare it (packaging.python.org, "Names and normalization")."""
    return re.sub(r"[-_.]+", "-", package).lower()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """package → installed version, `missing` where there is none; and the interpreter's own."""
    import importlib.metadata

    found = {"python": _interpreter()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = MISSING
    return found


def evidence(packages: Iterable[str]) -> list[str]:
    """The paths whose stat moves when any of these packages is installed, removed or changed."""
    import importlib.metadata

    paths = {entry for entry in sys.path if entry and os.path.isdir(entry)}
    for package in packages:
        try:
            for file in ("METADATA", "RECORD"):
                paths.add(str(importlib.metadata.distribution(package).locate_file("")))
                location = getattr(importlib.metadata.distribution(package), "_path", None)
                if location is not None:
                    paths.add(os.path.join(str(location), file))
        except importlib.metadata.PackageNotFoundError:
            continue
    return sorted(paths)


def _interpreter() -> str:
    return f"{platform.python_implementation()} {platform.python_version()}"


def _tag() -> str:
    return f"{'cp' if platform.python_implementation() == 'CPython' else 'pp'}{sys.version_info[0]}{sys.version_info[1]}"


def _pins(path: str, lines: list[str]) -> dict[str, str]:
    from packaging.requirements import InvalidRequirement, Requirement

    pins = {}
    for number, line in enumerate(lines, 1):
        if not line or line.startswith(("#", "-")):
            continue
        try:
            wanted = Requirement(line.removesuffix("\\").strip())
            (version,) = (one.version for one in wanted.specifier if one.operator == "==")
        except (InvalidRequirement, ValueError) as error:
            raise UserError(
                f'{path}:{number}: "{line[:80]}" is no pinned package; install edgebuild again, or make the lock again'
            ) from error
        if wanted.marker is None or wanted.marker.evaluate():
            pins[normalized(wanted.name)] = version
    return pins


def _said(lines: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"build": [], "import": [], "form": []}
    for line in lines:
        if (said := re.match(r"#\s*(build|import|form):\s*(\S.*)", line)) and (said[1] != "build" or "=" in said[2]):
            found[said[1]].append(said[2])
    return found
