"""A readers-writer lock on this machine: a measurement has it to itself, every other step shares it.

By flock(2) in the user's cache, so across threads, builds and stores; it ends with its process, however that ends.
"""

import fcntl
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from edgebuild.errors import StepFailed
from edgebuild.files import locked, user_cache

ALONE, BESIDE = "waits to have the machine to itself", "waits for a measurement that has the machine to itself"
MEASURES = "has the machine to itself"


@contextmanager
def shared(waits: Callable[[], None]) -> Iterator[int]:
    """→ the descriptor that holds it, which a child may inherit; `waits` is told, once, if a measurement must be waited for.

    Raises StepFailed where the user's cache cannot be written.
    """
    folder = user_cache()
    with ExitStack() as held:
        try:
            handle = held.enter_context(_taken(folder, False, waits))
        except OSError as error:
            raise StepFailed(f"{folder} cannot be written ({error.strerror}); set XDG_CACHE_HOME to a folder that can") from error
        yield handle


@contextmanager
def exclusive(folder: str, handle: int, waits: Callable[[], None]) -> Iterator[None]:
    """Instead of sharing it by `handle`, which is given up in every process that has it. Else as `shared`, in this user's cache."""
    fcntl.flock(handle, fcntl.LOCK_UN)
    with _taken(folder, True, waits):
        yield


@contextmanager
def _taken(folder: str, alone: bool, waits: Callable[[], None]) -> Iterator[int]:
    """Who waits to have it alone keeps the turn meanwhile, so that no other step begins before."""
    told = functools.cache(waits)  # once, whichever of the two it waits for
    with ExitStack() as held:
        with locked(f"{folder}/machine.turn", alone=alone, waits=told):
            handle = held.enter_context(locked(f"{folder}/machine.lock", alone=alone, waits=told))
        yield handle
