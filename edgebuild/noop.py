"""A no-op, answered by stats alone: the verdict that all is fresh, remembered with the signature of every path behind it.

A file that was touched and holds what it held is no reason to plan anew: then its content answers in its stat's place.

Imports next to nothing, because what it imports is most of what a no-op costs.
"""

import json
import os
import stat
import sys
import time
from collections.abc import Callable

from edgebuild import __version__, machine, shipped
from edgebuild.files import sealed, unsealed, write_whole

STATE = ".edgebuild"
NOTE = f"{STATE}/noop.json"
SIGN = "EDGEBUILD_SIGN"  # the variable by which bundles are signed with the test key whatever their targets name
TICK = 20_000_000  # ns: file systems' clocks tick more often than that, but those that show whole seconds only
Signature = list[int]  # mtime_ns, ctime_ns, size, inode, mode
THERE: Signature = []  # in a signature's place: that something is there was all that was asked


def signature(path: str) -> Signature | None:
    """What tells whether a path was touched: None where there is nothing."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return signature_of(found)


def signature_of(found: os.stat_result) -> Signature:
    """Of a path that was looked at already."""
    return [found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino, found.st_mode]


def moved(found: Signature | None, was: Signature | None) -> bool:
    """Whether a path that has this signature now is not as it was."""
    return found != was and not (found and was == THERE)


def racy(found: Signature | None, when: int | None = None) -> bool:
    """Whether a write in the same tick of the file system's clock could leave this signature as it is.

    git's rule, but by the time `when` the path was looked at (ns; now): what is written behind that look must not hide. A clock
    that shows whole seconds only is taken to tick every two.
    """
    if not found:
        return False
    changed = max(found[0], found[1])
    now = time.time_ns() if when is None else when
    return now - changed < (2_000_000_000 if changed % 1_000_000_000 == 0 else TICK)


def identity(version: str | None = None, strict: bool = False) -> list[object]:
    """What a plan depends on that no file's stat shows: `version` and `strict` are what the command line said."""
    said = machine.elsewhere(), os.environ.get(SIGN, "")
    return [__version__, shipped.PACKAGE, sys.version, sys.prefix, machine.boot(), *said, version, strict]


def recall(who: list[object], holds: Callable[[str, Signature], bool] | None = None) -> list[str] | None:
    """The names of the steps, all of them fresh, where nothing that this was read from has moved; else None.

    `holds` is asked of each file that was only touched, with the signature that it had: whether it holds what it held then.
    """
    start = time.time_ns()
    try:
        with open(NOTE, "rb") as file:
            note = json.loads(unsealed(file.read()))
        if note["identity"] != who:
            return None
        seen: dict[str, Signature | None] = note["seen"]
        touched: dict[str, Signature | None] = {}
        for path, was in seen.items():
            if (found := signature(path)) != was and moved(found, was):
                if found is None or holds is None:
                    return None
                touched[path] = found
        if touched and not (holds and _all_hold(seen, touched, holds)):
            return None
        if touched and not any(racy(found, start) for found in touched.values()):
            write_whole(NOTE, sealed(json.dumps({**note, "seen": seen | touched}, separators=(",", ":")).encode()))
        return [str(name) for name in note["steps"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _all_hold(
    seen: dict[str, Signature | None], touched: dict[str, Signature | None], holds: Callable[[str, Signature], bool]
) -> bool:
    """Whether each is the same file as before, of the same size and mode, and holds the same. Raises OSError."""
    pairs = [(path, seen[path], found) for path, found in touched.items()]
    alike = [was is not None and found is not None and was[2:] == found[2:] and _plain(path) for path, was, found in pairs]
    return all(alike) and all(was is not None and holds(path, was) and signature(path) == found for path, was, found in pairs)


def _plain(path: str) -> bool:
    """Whether it is a regular file, not a folder, whose entries decide, nor a link."""
    return stat.S_ISREG(os.lstat(path).st_mode)
