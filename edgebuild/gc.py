"""`edgebuild gc`: remove from a store what no receipt needs, of this project or of any other that uses the store.

And of the user's cache toolchains, wheels and base images that this edgebuild would not use.

The store is held alone meanwhile: a build waits where it would look up, publish or deliver, and loses nothing. Records go
before the objects that they name, so that a collection that is cut off leaves objects without a record, never the reverse.
Lock files stay: they are empty, and to remove one under a build that waits for it would let two do the same work.
"""

import os
import shlex
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from edgebuild import environment, provide, roots, units
from edgebuild.errors import OK, StepFailed, UserError
from edgebuild.files import remove_tree
from edgebuild.inventory import Inventory
from edgebuild.noop import STATE
from edgebuild.project import Project
from edgebuild.step import ACROSS
from edgebuild.store import Store
from edgebuild.units import human

UNFINISHED = 86_400.0  # seconds for which a download that nobody goes on with is kept


def takes(parser: ArgumentParser) -> None:
    parser.add_argument("--keep-last", metavar="N", type=_number, default=0, help="keep the N newest results of every step too")
    parser.add_argument(
        "--max-size",
        metavar="SIZE",
        type=_size,
        help="keep what nobody needs too, newest first, while all fits in SIZE, such as 20GB",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would go, and remove nothing")
    parser.add_argument("--forget", metavar="DIR", help="do without a project that cannot be seen; '*' stands for any text")


def run(options: Namespace, waits: Callable[[], None]) -> int:
    """→ exit status. `waits` is told where builds use the store."""
    project = Project()
    if options.forget is not None:
        forget(project.store, options.forget)
    found = collect(project, options.keep_last, options.max_size, options.dry_run, waits)
    print(show(found, options.dry_run))
    check_size(found, options.max_size)
    return OK


def _size(text: str) -> int:
    try:
        return units.size(text)
    except ValueError as error:
        raise ArgumentTypeError(f"must be {error}, not {text}") from error


def _number(text: str) -> int:
    if not text.isdecimal():
        raise ArgumentTypeError(f"must be a number, 0 or more, not {text}")
    return int(text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Collection:
    """What goes and what stays, sizes in bytes."""

    records: Mapping[str, str]  # key → its step's name, empty where the record cannot be read
    objects: tuple[str, ...]
    freed: int
    needed: int  # by receipts
    spare: int  # kept besides: --keep-last, --max-size
    rest: Mapping[str, int]  # unfinished downloads and old logs, path → bytes
    here: int  # projects that use the store
    gone: tuple[roots.Root, ...]
    toolchains: tuple[environment.Environment, ...]  # wheels and base images too, of other locks and not in use


def collect(project: Project, keep_last: int, max_size: int | None, dry_run: bool, waits: Callable[[], None]) -> Collection:
    """Remove what is not needed; `dry_run`: only find it. Raises UserError where a project is away, OSError from the disk."""
    with project.store.held(alone=not dry_run, waits=waits):
        found = find(project, keep_last, max_size)
        if not dry_run:
            _remove(project.store, found)
    return found


def find(project: Project, keep_last: int = 0, max_size: int | None = None) -> Collection:
    """What `gc` would remove. Raises UserError where a project that may need something cannot be seen."""
    store = project.store
    known = roots.roots(store.root)
    if away := [root.name for root in known if root.state == roots.AWAY]:
        raise UserError(
            f"{away[0]} uses this store and cannot be seen now, so nothing is removed: make it visible, "
            f"or, if it is no more: edgebuild gc --forget {shlex.quote(away[0])}"
        )
    here = [root for root in known if root.state == roots.HERE]
    there = Inventory.of(store)
    needed = {key for root in here for keys in _needs(root).values() for key in keys} & there.records.keys()
    keep = _keep(there, needed, keep_last, max_size)
    kept, by_receipts = there.size(keep), there.size(needed)
    names = {key: held.name for key, held in there.records.items() if key not in keep}
    return Collection(
        records=names | dict.fromkeys(there.broken, ""),
        objects=tuple(sorted(there.objects.keys() - there.reach(keep))),
        freed=there.total() - kept,
        needed=by_receipts,
        spare=kept - by_receipts,
        rest=dict([*_downloads(store.root), *_logs(project)]),
        here=len(here),
        gone=tuple(root for root in known if root.state == roots.GONE),
        toolchains=tuple(one for one, current in provide.kept() if not current and environment.idle(one)),
    )


def show(found: Collection, dry_run: bool) -> str:
    """What went and what stayed, for people."""
    goes = "would go" if dry_run else "removed"
    lines = [f"{goes:<9} {_count(len(found.records), 'record')}, {_count(len(found.objects), 'object')}: {human(found.freed)}"]
    steps = Counter(name or "records that cannot be read" for name in found.records.values())
    lines += [f"{'':<9}   {name}{f' ×{count}' if count > 1 else ''}" for name, count in sorted(steps.items())]
    lines += [f"{goes:<9} {path}: {human(size)}" for path, size in found.rest.items()]
    lines += [f"{goes:<9} the {old.form} {old.name} of another lock: {human(old.bytes)}" for old in found.toolchains]
    lines += [f"{goes:<9} {root.name} from the projects that use this store: it is no more" for root in found.gone]
    lines.append(
        f"{'kept':<9} {human(found.needed)} that {_count(found.here, 'project')} here can need, {human(found.spare)} besides"
    )
    return "\n".join(lines)


def check_size(found: Collection, max_size: int | None) -> None:
    """Raises StepFailed where what is needed alone is larger than it may be."""
    kept = found.needed + found.spare
    if max_size is not None and kept > max_size:
        raise StepFailed(
            f"what must stay has {human(kept)}, more than --max-size {human(max_size)}; "
            "remove targets with `doit clean build:NAME`, or lower --keep-last"
        )


def forget(store: Store, pattern: str) -> None:
    """Drop projects that cannot be seen from those that use the store. Raises UserError where a plain name is none of them."""
    if not roots.forget(store.root, pattern) and "*" not in pattern:
        known = ", ".join(root.name for root in roots.roots(store.root) if root.state != roots.HERE) or "none"
        raise UserError(f"{pattern} is no project that uses this store and cannot be seen; there are: {known}")


def _needs(root: roots.Root) -> dict[str, set[str]]:
    try:
        return roots.needs(root)
    except OSError as error:
        raise StepFailed(
            f"{root.folder} uses this store and cannot be read ({error.filename}: {error.strerror}), so nothing is removed"
        ) from error


def _keep(there: Inventory, needed: set[str], keep_last: int, max_size: int | None) -> set[str]:
    """The keys of the records that stay: needed ones, the newest of each step, and of the rest what has room."""
    newest = sorted(there.records, key=lambda key: (there.records[key].used, key), reverse=True)
    count: dict[str, int] = {}
    keep = set(needed)
    for key in newest:
        name = there.records[key].name
        count[name] = count.get(name, 0) + 1
        if count[name] <= keep_last:
            keep.add(key)
    if max_size is None:
        return keep
    size, reached = there.size(keep), there.reach(keep)
    for key in newest:
        if key in keep:
            continue
        added = there.reach([key]) - reached
        size += there.records[key].size + sum(there.objects[one] for one in added)
        if size > max_size:
            break
        keep.add(key)
        reached |= added
    return keep


def _remove(store: Store, found: Collection) -> None:
    """Records first: an object without a record is waste, a record without its objects a miss that costs work."""
    for path in (*map(store.record_file, found.records), *map(store.object, found.objects)):
        if os.path.isdir(path) and not os.path.islink(path):
            remove_tree(path)  # damage
        else:
            os.unlink(path)
    for path in (*found.rest, *(root.file for root in found.gone)):
        remove_tree(path)
    for old in found.toolchains:
        environment.remove(old)
    environment.sweep()


def _downloads(store: str) -> Iterator[tuple[str, int]]:
    """Downloads that were begun and not touched for a day."""
    for name in _names(f"{store}/partial"):
        path = f"{store}/partial/{name}"
        found = os.lstat(path)
        if time.time() - max(found.st_mtime, found.st_ctime) > UNFINISHED:  # a link to an object has the object's mtime
            yield path, _bytes(path)


def _logs(project: Project) -> Iterator[tuple[str, int]]:
    """Logs of targets that are no more."""
    for name in _names(f"{STATE}/logs"):
        if name not in (*project.names(), ACROSS):
            yield f"{STATE}/logs/{name}", _bytes(f"{STATE}/logs/{name}")


def _bytes(path: str) -> int:
    if not os.path.isdir(path):
        return os.lstat(path).st_size
    return sum(os.lstat(os.path.join(folder, name)).st_size for folder, _, names in os.walk(path) for name in names)


def _names(folder: str) -> list[str]:
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
