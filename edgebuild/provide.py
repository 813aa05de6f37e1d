"""Which interpreter a worker runs in: this one, or that of its toolchain's environment, made first where it is not there.

A build makes it as a step of its own, `toolchain:NAME`, when the first step that runs in it has work to do; and so what an image is
made of: its wheels, and the base that it is tried on.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

from edgebuild import environment
from edgebuild.errors import StepFailed
from edgebuild.units import human

if TYPE_CHECKING:
    from edgebuild.install import Command
    from edgebuild.toolchain import Lock

OFFLINE = "EDGEBUILD_OFFLINE"


class Watcher(Protocol):
    """Who is told how a step goes that no plan names."""

    def more(self) -> None: ...
    def started(self, name: str) -> None: ...
    def doing(self, name: str, what: str) -> None: ...
    def ended(self, name: str, outcome: str, seconds: float, summary: str) -> None: ...
    def failed(self, name: str, message: str, seconds: float) -> None: ...


class Unwatched:
    """Nobody is told."""

    def _nothing(self, *_: object) -> None: ...

    more = started = doing = ended = failed = _nothing


class Toolchains:
    """Those that a run uses. `beside` is held while one is made: the lock of whoever shares the machine."""

    def __init__(self, command: "Command", watcher: Watcher, beside: Callable[[str], AbstractContextManager[object]]) -> None:
        self._command, self._watcher, self._beside = command, watcher, beside
        self._one = threading.Lock()  # at a time: the second to need it waits for the first
        self._failed: set[str] = set()
        self._locks: dict[str, Lock] = {}
        self._no_base = ""  # why the base could not be made

    @contextmanager
    def interpreter(self, label: str) -> Iterator[str]:
        """The interpreter whose versions are in a key: `label` is the lock's there, empty where it is this one.

        Raises StepFailed where it cannot be had, OSError where the cache cannot be written.
        """
        if not label:
            yield sys.executable
            return
        with self._held(label) as lock:
            yield environment.python(lock.digest)

    @contextmanager
    def wheels(self, label: str) -> Iterator[str]:
        """The folder of wheels of a lock; else as `interpreter`."""
        with self._held(label) as lock:
            yield environment.wheels(lock.digest)

    @contextmanager
    def _held(self, label: str) -> Iterator["Lock"]:
        lock = self._locks.get(label) or _lock(label)
        self._locks[label] = lock
        self._ensure(lock)
        with environment.lock(lock.digest, lambda: None, alone=False):
            if not environment.whole(lock.digest):
                raise StepFailed(f"its toolchain {lock.name} was removed as it was to be used; build again")
            yield lock

    @contextmanager
    def base(self) -> Iterator[tuple[str, str]]:
        """(the base that images are tried on here, or empty; why it is not here): that says how far a bundle is proven, no more."""
        from edgebuild import baseimage

        missing, named = self._why_no_base(), baseimage.key()
        with environment.lock(named, lambda: None, alone=False):
            if environment.whole(named):
                yield environment.base(named), ""
            else:
                yield "", missing or "it was removed as it was to be used"

    def _why_no_base(self) -> str:
        """Make the base where it is not here; → why that cannot be, else empty."""
        from edgebuild import baseimage

        with self._one:
            if environment.whole(baseimage.key()):
                return ""
            if reason := no_base() or self._no_base:
                return reason
            name, start = f"toolchain:{baseimage.NAME}", time.monotonic()
            self._watcher.more()
            self._watcher.started(name)
            try:
                with self._beside(name):
                    made = baseimage.make(self._command, lambda what: self._watcher.doing(name, what))
            except (StepFailed, OSError) as error:
                self._no_base = str(error)
                self._watcher.ended(name, "refused", time.monotonic() - start, self._no_base)  # no step fails by it
                return self._no_base
            self._watcher.ended(name, "ran", time.monotonic() - start, f"Debian {baseimage.SUITE}, {human(made.bytes)}")
            return ""

    def _ensure(self, lock: "Lock") -> None:
        from edgebuild.install import install, summary

        with self._one:
            if environment.whole(lock.digest):
                return
            name = f"toolchain:{lock.name}"
            if name in self._failed:
                raise StepFailed(f"its toolchain could not be made: {name} failed")
            start = time.monotonic()
            self._watcher.more()
            self._watcher.started(name)
            try:
                check_online(lock)
                with self._beside(name):
                    made = install(lock, self._command, lambda what: self._watcher.doing(name, what))
            except StepFailed as error:
                self._failed.add(name)
                self._watcher.failed(name, str(error), time.monotonic() - start)
                raise StepFailed(f"its toolchain could not be made: {name} failed") from error
            self._watcher.ended(name, "ran", time.monotonic() - start, summary(made))


def kept() -> list[tuple[environment.Environment, bool]]:
    """All that was made for builds of this user, each with whether this edgebuild would use it. Raises UserError for a damaged lock."""
    from edgebuild import baseimage, toolchain

    there = environment.present()
    current = {baseimage.lock(), *toolchain.shipped_texts()} if there else set()
    return [(one, one.lock in current) for one in there]


def offline() -> bool:
    return os.environ.get(OFFLINE, "") not in ("", "0")


def no_base() -> str:
    """Why the base image cannot be made here and now, in a few words, else empty."""
    from edgebuild import baseimage

    return baseimage.why_not() or ("offline" if offline() else "")


def check_online(lock: "Lock") -> None:
    """Raises StepFailed where nothing may be asked of a network, with what is missing."""
    if offline():
        named = ", ".join(f"{name} {lock.pinned(name)}" for name in _main(lock))
        wanted = f"{len(lock.pins)} wheels" if lock.wheels else named
        raise StepFailed(
            f"offline ({OFFLINE}=1), and the toolchain {lock.name} ({wanted}) is not in {environment.folder()}; "
            f"with a network: edgebuild toolchain install {lock.name}"
        )


def _main(lock: "Lock") -> list[str]:
    """The packages that a lock is for, as what they are imported by tells."""
    from edgebuild import toolchain

    found = [toolchain.normalized(name.partition(".")[0]) for name in lock.imports]
    return [name for name in found if lock.pinned(name)] or sorted(lock.pins)


def _lock(label: str) -> "Lock":
    """Raises StepFailed where it is not the lock that the plan was made from."""
    from edgebuild import toolchain

    lock = toolchain.read(label.partition(" ")[0])
    if lock is None or lock.label != label:
        raise StepFailed(f"the lock of {label.partition(' ')[0]} was changed as this build began; build again")
    return lock
