"""`edgebuild doctor`: what edgebuild has to work with here, each backend tried in a worker; for people, or JSON (schemas/doctor.json)."""

import contextlib
import json
import os
import platform
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from edgebuild import __version__, machine, resources, shipped, toolchain
from edgebuild.accelerators import Accelerators, accelerators
from edgebuild.backends import BACKENDS
from edgebuild.errors import FAILED, OK, StepFailed
from edgebuild.process import Workers
from edgebuild.run import Perform
from edgebuild.store import reflink
from edgebuild.units import human

SECONDS = 60.0  # that a smoke may take: about one here, a few where a framework is read from a cold disk
NOT_INSTALLED, WORKS, BROKEN = "not installed", "works", "broken"
Versions = Callable[[tuple[str, ...]], Mapping[str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """`found` is `missing` where it is not installed; `pinned` are the versions that the lock names, one for each Python."""

    name: str
    found: str
    pinned: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """A backend: `works`, `broken` (installed, and its smoke failed) or `not installed`; and what was run, or what to do."""

    name: str
    state: str
    message: str
    packages: tuple[Package, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A folder that is written to: bytes free there; whether files can share extents (None: it could not be tried, and why)."""

    path: str
    free: int
    reflink: bool | None
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    edgebuild: str
    python: str
    system: str
    isa: str
    cpu: str
    cores: int
    memory: resources.Memory
    store: Place
    temporary: Place
    network: str
    backends: tuple[Checked, ...]
    accelerators: tuple[Accelerators, ...]


def doctor(store: str, as_json: bool) -> tuple[str, int]:
    """→ (what to print, exit status: 1 where an installed backend does not work). `store` is where objects go."""
    found = examine(store)
    status = FAILED if any(backend.state == BROKEN for backend in found.backends) else OK
    return json.dumps(asdict(found), indent=1, ensure_ascii=False) if as_json else _show(found), status


def examine(store: str, perform: Perform | None = None, versions: Versions = toolchain.versions) -> Report:
    """Look at everything. `perform` runs a smoke: in a worker process, or in tests otherwise."""
    host = machine.fingerprint()
    store_place, temporary = _place(store), _place(tempfile.gettempdir())
    with tempfile.TemporaryDirectory(prefix="edgebuild-doctor-") as scratch, contextlib.chdir(scratch):
        attempt = _smoke(perform or Workers().perform, scratch)
        backends = tuple(_check(name, attempt, versions) for name in sorted(BACKENDS) if name != "fake")
        try:
            network = attempt("fake")[1]  # its smoke needs nothing: the worker tells how it is kept from the network
        except StepFailed as error:
            network = f"unavailable: {error}"
    return Report(
        edgebuild=__version__,
        python=f"{platform.python_implementation()} {platform.python_version()}",
        system=platform.platform(),
        isa=host["isa"],
        cpu=host["cpu"],
        cores=int(host["cores"]),
        memory=resources.memory(),
        store=store_place,
        temporary=temporary,
        network=network,
        backends=backends,
        accelerators=tuple(accelerators()),
    )


def _smoke(perform: Perform, scratch: str) -> Callable[[str], tuple[str, str]]:
    """→ a function: a backend's name → (what its smoke says, the worker's network). That raises StepFailed."""

    def attempt(name: str) -> tuple[str, str]:
        folder = os.path.join(scratch, name)
        os.mkdir(folder)
        record = {
            "name": f"smoke:{name}",
            "verb": "smoke",
            "backend": name,
            "params": {},
            "root": folder,
            "inputs": {},
            "outputs": {},
        }
        result = perform(record, folder, os.path.join(folder, "log"), None, SECONDS)
        return result.summary, result.network

    return attempt


def _check(name: str, attempt: Callable[[str], tuple[str, str]], versions: Versions) -> Checked:
    pinned, wanted = _pins(name), tuple(BACKENDS[name].PACKAGES)
    found = versions(wanted)
    packages = tuple(Package(name=one, found=found[one], pinned=tuple(pinned.get(one.replace("_", "-"), ()))) for one in wanted)
    install = f"run: pip install 'edgebuild[{name}]'"
    if missing := [package.name for package in packages if package.found == "missing"]:
        return Checked(name=name, state=NOT_INSTALLED, message=f"{', '.join(missing)} missing; {install}", packages=packages)
    others = [f"{one.name} {one.found} instead of {' or '.join(one.pinned)}" for one in packages if one.found not in one.pinned]
    note = f"; other versions than were tried: {', '.join(others)}; {install}" if others else ""
    try:
        return Checked(name=name, state=WORKS, message=attempt(name)[0] + note, packages=packages)
    except StepFailed as error:
        message = str(error).splitlines()[0]
        return Checked(name=name, state=BROKEN, message=f"{message}{note or '; ' + install}", packages=packages)


def _pins(name: str) -> dict[str, list[str]]:
    """package → the versions that the backend's lock names: those of its extra, and of all that they need."""
    found: dict[str, list[str]] = {}
    for line in Path(shipped.PACKAGE, "locks", f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if pin := re.match(r"([a-z0-9._-]+)==([^\s;\\]+)", line):
            found.setdefault(pin[1], []).append(pin[2])
    return found


def _place(path: str) -> Place:
    """Tried with a file of a few bytes, which is gone afterwards."""
    folder = resources.existing(path)
    free = resources.free(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=".edgebuild-doctor-", dir=folder) as trial:
            Path(trial, "one").write_bytes(b"x" * 4096)
            return Place(path=path, free=free, reflink=reflink(f"{trial}/one", f"{trial}/two"))
    except OSError as error:
        return Place(path=path, free=free, reflink=None, reason=f"cannot be written: {error.strerror or error}")


# -- for people ---------------------------------------------------------------------------------------------------------
def _show(found: Report) -> str:
    memory = found.memory
    limit = "no cgroup limit" if memory.cgroup_limit is None else f"cgroup limit {human(memory.cgroup_limit)}"
    network = "none: a network namespace of their own" if found.network == "none" else found.network
    rows = [
        ("edgebuild", f"{found.edgebuild}, {found.python}, {found.system}"),
        ("processor", f"{found.cpu}, {found.cores} cores, {found.isa}"),
        ("memory", f"{human(memory.total)}, {human(memory.available)} available, {limit}"),
        ("store", _show_place(found.store)),
        ("temporary files", _show_place(found.temporary)),
        ("workers' network", network),
        *((one.name, f"{one.state}: {one.message}") for one in found.backends),
        *((one.kind, "; ".join(one.found) or f"unavailable: {one.unavailable}") for one in found.accelerators),
    ]
    return "\n".join(f"{name:<26} {text}" for name, text in rows)


def _show_place(place: Place) -> str:
    shares = {True: "reflinks", False: "no reflinks: hard links and copies", None: place.reason}[place.reflink]
    return f"{place.path}, {human(place.free)} free, {shares}"
