"""A readers-writer lock on this machine: a measurement has it to itself, every other step shares it.

A measurement waits for the end of a step that watches a clock, and has every other one stand still. By flock(2) in the user's cache, so
across threads, builds and stores; it ends with its process, however that ends. Three files: `lock` is held by the measurement, and by
each step that it waits for; `still` by the measurement, and by each step that may stand still, which gives it up where `lock` is taken;
`turn` by who begins, so that nobody overtakes a measurement that waits.
"""

import fcntl
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from edgebuild.errors import StepFailed
from edgebuild.files import locked, user_cache

ALONE, BESIDE = "waits to have the machine to itself", "waits for a measurement that has the machine to itself"
MEASURES, STANDS, GOES = "has the machine to itself", "stands still: a measurement has the machine to itself", "goes on"


@contextmanager
def shared(waits: Callable[[], None], still: bool = False) -> Iterator[int]:
    """→ the descriptor that holds it, which a child may inherit; `waits` is told, once, if a measurement must be waited for.

    Who may stand `still` must ask `wanted`, and then `stand_aside`. Raises StepFailed where the user's cache cannot be written.
    """
    told = functools.cache(waits)  # once, whichever of the two it waits for
    with ExitStack() as held:
        try:
            with locked(_file("turn"), alone=False, waits=told):
                handle = held.enter_context(locked(_file("still" if still else "lock"), alone=False, waits=told))
        except OSError as error:
            where = f"{user_cache()} cannot be written ({error.strerror})"
            raise StepFailed(f"{where}; set XDG_CACHE_HOME to a folder that can") from error
        yield handle


def wanted() -> bool:
    """Whether a measurement has all of the machine but what those hold who may stand still."""
    try:
        handle = os.open(_file("lock"), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def stand_aside(handle: int) -> None:
    """Give up what was shared by `handle` until no measurement has the machine; then share it again."""
    fcntl.flock(handle, fcntl.LOCK_UN)
    with locked(_file("lock"), alone=False):  # so that no measurement has `still`
        fcntl.flock(handle, fcntl.LOCK_SH)


@contextmanager
def exclusive(folder: str, handle: int, waits: Callable[[], None]) -> Iterator[None]:
    """Instead of sharing it by `handle`, which is given up in every process that has it. Else as `shared`, in this user's cache."""
    fcntl.flock(handle, fcntl.LOCK_UN)
    told = functools.cache(waits)
    with ExitStack() as held:
        with locked(_file("turn", folder), waits=told):
            for name in ("lock", "still"):
                held.enter_context(locked(_file(name, folder), waits=told))
        yield


def _file(name: str, folder: str = "") -> str:
    return f"{folder or user_cache()}/machine.{name}"
