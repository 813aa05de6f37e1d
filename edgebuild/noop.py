"""A no-op, answered by stats alone: the verdict that all is fresh, remembered with the signature of every path behind it.

Imports next to nothing, because what it imports is most of what a no-op costs.
"""

import json
import os
import sys
import time

from edgebuild import __version__, machine, shipped
from edgebuild.files import unsealed

STATE = ".edgebuild"
NOTE = f"{STATE}/noop.json"
Signature = list[int]  # mtime_ns, ctime_ns, size, inode


def signature(path: str) -> Signature | None:
    """What tells whether a path was touched: None where there is nothing."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino]


def moved(seen: dict[str, Signature | None]) -> bool:
    """Whether any of these paths was touched since its signature was taken."""
    return any(signature(path) != found for path, found in seen.items())


def racy(found: Signature) -> bool:
    """Whether a write in the same tick of the file system's clock could have left this signature as it is.

    git's rule. A clock that shows whole seconds only is taken to tick every two.
    """
    changed = max(found[0], found[1])
    return time.time_ns() - changed < (2_000_000_000 if changed % 1_000_000_000 == 0 else 20_000_000)


def identity(version: str | None = None, strict: bool = False) -> list[object]:
    """What a plan depends on that no file's stat shows: `version` and `strict` are what the command line said."""
    return [__version__, shipped.PACKAGE, sys.version, sys.prefix, machine.boot(), version, strict]


def recall(who: list[object]) -> list[str] | None:
    """The names of the steps, all of them fresh, where nothing that this was read from has moved; else None."""
    try:
        with open(NOTE, "rb") as file:
            note = json.loads(unsealed(file.read()))
        if note["identity"] == who and not moved(note["seen"]):
            return [str(name) for name in note["steps"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None
