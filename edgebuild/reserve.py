"""A counting lock on this machine's memory: steps that do not fit beside one another run one after the other.

Who runs a heavy step holds a file in the user's cache that says how much is set aside for it, by flock(2): it ends with its
process, however that ends, and counts across threads, builds and stores. Whoever holds one waits for nobody, so that no two
wait for each other.
"""

import fcntl
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from edgebuild.files import locked, mine

TURN = "turn"
LOOK_SECONDS = 0.2  # between two looks at who still runs


class NoRoom(Exception):
    """What is wanted cannot be had, whoever ends; `available`: bytes that are free now."""

    def __init__(self, available: int) -> None:
        super().__init__(available)
        self.available = available


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """In bytes. `most` is set aside for one who runs; `before`: what was free when all who run now had taken nothing."""

    most: int
    before: int


@contextmanager
def reserved(folder: str, least: int, most: int, available: Callable[[], int], waits: Callable[[], None]) -> Iterator[None]:
    """Hold `most` bytes of memory; alone on the machine, `least` do. Who waits keeps the turn, so that no later one overtakes it.

    `waits` is told, once, if somebody must be waited for. Raises NoRoom, OSError where the folder cannot be written.
    """
    told = functools.cache(waits)
    with locked(f"{folder}/{TURN}", waits=told):
        before = _admitted(folder, least, most, available, told)
        path, handle = _hold(folder, Share(most=most, before=before))
    try:
        yield
    finally:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        os.close(handle)


def _admitted(folder: str, least: int, most: int, available: Callable[[], int], waits: Callable[[], None]) -> int:
    """Wait until there is room; → what was free before anybody who runs began.

    Of what is set aside for others they have taken what is missing now of what was free before; the rest they will yet take.
    """
    while True:
        shares, free = _shares(folder), available()
        taken = sum(share.most for share in shares)
        if least > free + taken:
            raise NoRoom(free)
        used = max(0, min(taken, min((share.before for share in shares), default=free) - free))
        if not shares or most <= free - (taken - used):
            return free + used
        waits()
        time.sleep(LOOK_SECONDS)


def _hold(folder: str, share: Share) -> tuple[str, int]:
    path = f"{folder}/{mine()}-{os.urandom(6).hex()}"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        os.write(handle, json.dumps([share.most, share.before]).encode())
    except BaseException:
        os.close(handle)
        raise
    return path, handle


def _shares(folder: str) -> list[Share]:
    """Of all who run, for who has the turn. A file that nobody holds any more goes."""
    found = []
    for name in os.listdir(folder):
        if name == TURN:
            continue
        path = f"{folder}/{name}"
        try:
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        except BlockingIOError:
            most, before = json.loads(os.read(handle, 200))
            found.append(Share(most=most, before=before))
        except FileNotFoundError:
            pass
        finally:
            os.close(handle)
    return found
