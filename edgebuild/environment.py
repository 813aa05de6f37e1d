"""Where the environments of toolchains lie, one for each user, lock and interpreter; which are whole, and how one goes.

Folders of wheels, which an image takes, are kept as environments are, and so is the base image that one is tried on.

An environment is made under another name beside its place and renamed when all of it is there, and goes the same way. Who
works in one holds its lock file beside others; who makes or removes it, alone.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass

from edgebuild.errors import StepFailed
from edgebuild.files import alive, locked, mine, remove_tree, user_cache

MARKER = "edgebuild.json"  # written last: an environment without it is not whole
TOOLCHAIN, WHEELS, BASE = "toolchain", "wheels", "base image"
DAMAGED = "(damaged)"  # the name of what has no marker
_TEMPORARY = ".tmp-"


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """One that was whole once. `lock`: the digest of the lock's text; `python`: the interpreter's version; `bytes`: as it was made.

    `form`: what it is to people.
    """

    name: str
    digest: str
    lock: str
    python: str
    packages: int
    bytes: int
    form: str = TOOLCHAIN


def folder() -> str:
    return os.path.join(user_cache(), "toolchains")


def place(digest: str) -> str:
    return os.path.join(folder(), digest)


def python(digest: str) -> str:
    """The interpreter of an environment."""
    return os.path.join(place(digest), "bin", "python")


def wheels(digest: str) -> str:
    """The folder of wheels, where that is what was asked for."""
    return os.path.join(place(digest), "wheels")


def base(digest: str) -> str:
    """The root file system of a base image, where that is what was asked for."""
    return os.path.join(place(digest), "base.tar")


def note(digest: str) -> Environment | None:
    """What an environment is, where it is whole: its marker is there, and its interpreter runs, or its wheels or image are there."""
    found = _marked(digest)
    usable = os.access(python(digest), os.X_OK) or os.path.isdir(wheels(digest)) or os.path.exists(base(digest))
    return found if usable else None


def _marked(digest: str) -> Environment | None:
    """What its marker says, whether or not it can still be used here."""
    try:
        with open(os.path.join(place(digest), MARKER), encoding="utf-8") as file:
            found = Environment(**json.load(file))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.digest == digest else None


def whole(digest: str) -> bool:
    return note(digest) is not None


def put(path: str, made: Environment) -> Environment:
    """Give what was made whole `beside` its place that place, by who holds its lock alone: on the disk, not only in memory."""
    os.sync()
    with open(os.path.join(path, MARKER), "w", encoding="utf-8") as file:
        json.dump(asdict(made), file)
        file.flush()
        os.fsync(file.fileno())
    discard(made.digest)  # what lies there is not whole
    os.rename(path, place(made.digest))
    return made


def size(path: str) -> int:
    """Bytes of all files below a folder."""
    return sum(os.lstat(os.path.join(place, name)).st_size for place, _, names in os.walk(path) for name in names)


def present() -> list[Environment]:
    """Every environment that lies here. One that was damaged, so that nothing says what it was, is of no lock."""
    try:
        digests = [name for name in os.listdir(folder()) if len(name) == 64]
    except FileNotFoundError:
        return []
    return sorted((_marked(digest) or _damaged(digest) for digest in digests), key=lambda one: (one.name, one.digest))


def _damaged(digest: str) -> Environment:
    return Environment(name=DAMAGED, digest=digest, lock="", python="", packages=0, bytes=size(place(digest)))


def lock(digest: str, waits: Callable[[], None], *, alone: bool) -> AbstractContextManager[int]:
    """Held `alone` by who makes or removes an environment, beside others by who works in it. Raises OSError."""
    return locked(place(digest) + ".lock", alone=alone, waits=waits)


@contextmanager
def beside(digest: str) -> Iterator[str]:
    """The name, beside the place of an environment, under which one is made; what is left there at the end goes."""
    path = os.path.join(folder(), f"{_TEMPORARY}{mine()}-{digest[:12]}-{os.urandom(4).hex()}")
    try:
        yield path
    finally:
        remove_tree(path)


def discard(digest: str) -> None:
    """Remove what lies at the place of an environment, whole or not, by who holds its lock alone. Raises OSError."""
    if os.path.lexists(place(digest)):
        with beside(digest) as aside:
            os.rename(place(digest), aside)


def remove(found: Environment) -> None:
    """Raises StepFailed where it is in use, or cannot be removed."""

    def in_use() -> None:
        raise StepFailed(f"the {found.form} {found.name} is in use by a build; remove it when that has ended")

    try:
        with lock(found.digest, in_use, alone=True):
            discard(found.digest)
    except OSError as error:
        raise StepFailed(f"{error.filename or place(found.digest)} cannot be removed: {error.strerror or error}") from error


def idle(found: Environment) -> bool:
    """Whether nobody works in an environment now, or makes it."""

    class _InUse(Exception): ...

    def in_use() -> None:
        raise _InUse

    try:
        with lock(found.digest, in_use, alone=True):
            return True
    except (_InUse, OSError):
        return False


def sweep() -> None:
    """Remove what was begun by processes that are no more."""
    try:
        names = os.listdir(folder())
    except OSError:
        return
    for name in names:
        if name.startswith(_TEMPORARY) and not alive(name.removeprefix(_TEMPORARY).split("-")[0]):
            remove_tree(os.path.join(folder(), name))
