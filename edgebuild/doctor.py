"""`edgebuild doctor`: what edgebuild has to work with here, each backend tried in a worker; for people, or JSON (schemas/doctor.json)."""

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from edgebuild import __version__, environment, machine, resources, toolchain
from edgebuild.accelerators import Accelerators, accelerators
from edgebuild.backend import Needs
from edgebuild.backends import BACKENDS
from edgebuild.bundles import BUNDLES, pkcs11
from edgebuild.errors import FAILED, OK, StepFailed
from edgebuild.process import Workers
from edgebuild.run import Perform
from edgebuild.store import reflink
from edgebuild.units import human

SECONDS = 60.0  # that a smoke may take: about one here, a few where a framework is read from a cold disk
NOT_INSTALLED, WORKS, BROKEN = "not installed", "works", "broken"
Versions = Callable[[tuple[str, ...]], Mapping[str, str]]
# (backend, its lock, the versions of the packages that it names, an interpreter) → (what its smoke says, the worker's network)
Attempt = Callable[[str, str, Mapping[str, str], str], tuple[str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """`found` is `missing` where this Python does not have it; `pinned` is what the lock names for this Python, if anything."""

    name: str
    found: str
    pinned: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """A backend, or one of its toolchains: `works`, `broken` (installed, and its smoke failed) or `not installed`; and what was run, or what to do.

    `python`: the interpreter that it was tried in, this one or that of its toolchain; empty where there is none.
    """

    name: str
    state: str
    message: str
    python: str
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


def apt(kinds: Iterable[str] = tuple(BUNDLES), tokens: bool = True) -> str:
    """The one line that installs, on Debian and Ubuntu, every program that bundles are made, signed and checked with; or nothing.

    `tokens`: what signs with a key in a token too.
    """
    tools = [*(BUNDLES[kind].TOOLS for kind in kinds), pkcs11.PACKAGES if tokens else {}]
    packages = sorted({package for one in tools for package in one.values()})
    return " ".join(("apt-get install -y --no-install-recommends", *packages)) if packages else ""


def examine(store: str, perform: Perform | None = None, versions: Versions = toolchain.versions) -> Report:
    """Look at everything. `perform` runs a smoke: in a worker process, or in tests otherwise."""
    host = machine.fingerprint()
    store_place, temporary = _place(store), _place(tempfile.gettempdir())
    with tempfile.TemporaryDirectory(prefix="edgebuild-doctor-") as scratch, contextlib.chdir(scratch):
        attempt = _smoke(perform or Workers().perform, scratch)
        backends = tuple(_check(name, needs, attempt, versions) for name, needs in _needs())
        try:  # it needs nothing; the worker tells how it is kept from the network
            network = attempt("fake", "", {}, sys.executable)[1]
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


def _needs() -> list[tuple[str, Needs]]:
    """(backend, what it needs), by the name of the lock: a backend has one toolchain, or several for sources of several formats."""
    found = {(name, needs) for name, backend in BACKENDS.items() if name != "fake" for needs in backend.NEEDS.values()}
    return sorted(found, key=lambda one: one[1].lock)


def _smoke(perform: Perform, scratch: str) -> Attempt:
    """It raises StepFailed."""

    def attempt(name: str, lock: str, packages: Mapping[str, str], python: str) -> tuple[str, str]:
        folder = os.path.join(scratch, lock or name)
        os.mkdir(folder)
        record = {
            "name": f"smoke:{name}",
            "verb": "smoke",
            "backend": name,
            "params": {},
            "toolchain": dict(packages),
            "root": folder,
            "inputs": {},
            "outputs": {},
        }
        result = perform(record, folder, os.path.join(folder, "log"), None, SECONDS, python, None)
        return result.summary, result.network

    return attempt


def _check(backend: str, needs: Needs, attempt: Attempt, versions: Versions) -> Checked:
    name, wanted = needs.lock, needs.packages
    lock, found = toolchain.read(name), versions(wanted)
    packages = tuple(Package(name=one, found=found[one], pinned=_pinned(lock, one)) for one in wanted)
    python, where = _interpreter(lock, found)
    install = f"run: edgebuild toolchain install {name}"
    by_pip = f" (or: pip install 'edgebuild[{name}]')" if name in _extras() else ""
    if not python:
        missing = [one for one in wanted if found[one] == toolchain.MISSING]
        others = lock.differences({one: found[one] for one in wanted if one not in missing}) if lock else []
        why = "; ".join(filter(None, [f"{', '.join(missing)} missing" if missing else "", ", ".join(others)]))
        message = f"{why}; the first build that needs it makes its toolchain, or {install}{by_pip}"
        return Checked(name=name, state=NOT_INSTALLED, message=message, python="", packages=packages)
    try:
        said = attempt(backend, name, found, python)[0]
        return Checked(name=name, state=WORKS, message=said + where, python=python, packages=packages)
    except StepFailed as error:
        mend = install if where or not by_pip else f"run: pip install --force-reinstall 'edgebuild[{name}]'"
        message = f"{str(error).splitlines()[0]}{where}; {mend}"
        return Checked(name=name, state=BROKEN, message=message, python=python, packages=packages)


def _extras() -> list[str]:
    """What may stand in `edgebuild[…]`; a toolchain that has versions which no resolver accepts has no extra."""
    return importlib.metadata.metadata("edgebuild").get_all("Provides-Extra") or []


def _interpreter(lock: toolchain.Lock | None, found: Mapping[str, str]) -> tuple[str, str]:
    """(the interpreter that a build would take, empty where it would have to be made; where that is, for people)."""
    if lock is None:
        return "" if toolchain.MISSING in found.values() else sys.executable, ""
    if not lock.differences(found):
        return sys.executable, ""
    if environment.whole(lock.digest):
        return environment.python(lock.digest), f", in its own toolchain {lock.digest[:12]}"
    return "", ""


def _pinned(lock: toolchain.Lock | None, package: str) -> tuple[str, ...]:
    return (lock.pinned(package),) if lock and lock.pinned(package) else ()


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
