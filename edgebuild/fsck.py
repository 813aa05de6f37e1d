"""`edgebuild verify --store`: every object hashed again, every record held against its key and against what it names.

What is damaged is removed, so that a build that wants it makes it again. The stat memo is not asked: bit rot moves no stat.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from edgebuild import digest
from edgebuild.artifact import record_from_bytes
from edgebuild.errors import FAILED, OK
from edgebuild.files import remove_tree
from edgebuild.progress import hashing
from edgebuild.project import Project
from edgebuild.store import Store
from edgebuild.units import human

LARGEST_TREE = 64 << 20  # bytes of a directory's listing, some 400,000 files; a larger object can only be a file
Grow = Callable[[int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """How many objects and records there are, the objects' bytes, and a sentence for each thing that was damaged."""

    objects: int
    records: int
    bytes: int
    damaged: tuple[str, ...]


def run(waits: Callable[[], None]) -> int:
    """Of the project here; → exit status. `waits` is told where builds use the store."""
    start, store = time.monotonic(), Project().store
    with hashing(size(store)) as grow:
        health = check(store, grow, waits)
    for damage in health.damaged:
        print(f"{damage}; removed, a build that needs it makes it again")
    print(
        f"store {store.root}: {health.objects:,} objects, {human(health.bytes)}, {health.records:,} records, "
        f"{len(health.damaged):,} damaged ({time.monotonic() - start:.1f} s)"
    )
    return FAILED if health.damaged else OK


def size(store: Store) -> int:
    """Bytes of all objects."""
    total = 0
    for _, path in store.names("objects"):
        try:
            total += os.lstat(path).st_size
        except FileNotFoundError:
            pass  # a collection runs beside us
    return total


def check(store: Store, grow: Grow, waits: Callable[[], None]) -> Health:
    """Check everything and remove what is damaged; `grow` is told of bytes hashed. Raises OSError where it cannot."""
    objects, records = dict(store.names("objects")), dict(store.names("records"))
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        sizes = dict(zip(objects, pool.map(lambda sha256: _whole(sha256, objects[sha256], grow), objects), strict=True))
    whole = {sha256 for sha256, size in sizes.items() if size is not None}
    doubted = {key: path for key, path in records.items() if _fault(store, key, path, whole.__contains__)}
    damaged: list[str] = []
    if len(whole) < len(objects) or doubted:
        with store.held(alone=True, waits=waits):  # a look once more: a build may have put it right meanwhile
            damaged += _damaged_objects(store, objects.keys() - whole)
            damaged += _damaged_records(store, doubted)
    total = sum(size for size in sizes.values() if size)
    return Health(objects=len(objects), records=len(records), bytes=total, damaged=tuple(damaged))


def _damaged_objects(store: Store, doubted: set[str]) -> list[str]:
    """Remove those that are still wrong.

    A hard link in `build/` shares the damage; to unlink the object moves the ctime of both, so no memo vouches for it.
    """
    found = []
    for sha256 in sorted(doubted):
        path = store.object(sha256)
        if os.path.lexists(path) and _whole(sha256, path) is None:
            found.append(f"object {sha256}: its content is another one")
            _remove(path)
    return found


def _damaged_records(store: Store, doubted: dict[str, str]) -> list[str]:
    found = []
    for key, path in sorted(doubted.items()):
        fault = _fault(store, key, path, lambda sha256: _whole(sha256, store.object(sha256)) is not None)
        if os.path.lexists(path) and fault:
            found.append(f"record {key}{fault}")
            _remove(path)
    return found


def _whole(sha256: str, path: str, grow: Grow = lambda size: None) -> int | None:
    """The bytes of an object whose content, or whose listing of a directory, is what its name says; else None."""
    try:
        size = os.lstat(path).st_size
        right = digest.of_file(path) == sha256 or (size < LARGEST_TREE and _is_tree(sha256, path))
    except OSError:
        return None
    grow(size)
    return size if right else None


def _is_tree(sha256: str, path: str) -> bool:
    with open(path, "rb") as file:
        return digest.of_bytes(b"tree\0" + file.read()) == sha256


def _fault(store: Store, key: str, path: str, whole: Callable[[str], bool]) -> str:
    """What is wrong with a record, beginning with its step's name where that can be read; else empty."""
    try:
        with open(path, "rb") as file:
            record = record_from_bytes(file.read())
        recipe = digest.tagged("recipe", record.components["recipe"])
        told = digest.tagged("key", [recipe, sorted(record.components["inputs"].items())])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ": cannot be read"
    if not key == record.key == told:
        return f" ({record.name}): its key is not that of the recipe and inputs that it states"
    if lost := sorted(sha256 for sha256 in store.reached(record) if not whole(sha256)):
        return f" ({record.name}): object {lost[0]} is missing or was damaged"
    return ""


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        remove_tree(path)
    else:
        os.unlink(path)
