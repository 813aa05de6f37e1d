"""Which projects use a store, and which keys the receipts of each need. A collector's roots, as Nix calls them.

A project is known to a store that is not its own before its first step publishes there; the project in whose folder a store
lies is known by that. One that cannot be seen now may come back (a disk that is not mounted, another machine's folder): only
one that was surely removed or moved is taken to be gone.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch

from edgebuild import digest
from edgebuild.artifact import receipt_from_bytes
from edgebuild.files import remove_tree, write_whole
from edgebuild.noop import STATE

HERE, GONE, AWAY = "here", "gone", "away"


@dataclass(frozen=True, kw_only=True, slots=True)
class Root:
    """A project that uses a store. `state`: it is here, it is gone for good, or it is away and may come back.

    `name` is its folder, behind the machine's name where that is another one; `file` makes it known, where a file does.
    """

    folder: str
    state: str
    name: str
    file: str = ""


def register(store: str) -> None:
    """Make the project in the current directory known to a store. Raises OSError where that cannot be written."""
    if store == STATE:
        return  # it lies in the project
    folder, host = os.getcwd(), os.uname().nodename
    found = os.stat(folder)
    note = json.dumps({"root": folder, "host": host, "device": found.st_dev, "inode": found.st_ino}).encode()
    path = f"{store}/projects/{digest.of_bytes(os.fsencode(f'{host}:{folder}'))[:32]}.json"
    try:
        with open(path, "rb") as file:
            if file.read() == note:
                return
    except OSError:
        pass
    write_whole(path, note)


def forget(store: str, pattern: str) -> list[Root]:
    """Drop the projects that cannot be seen and match (`*` any text), by name, from those that use a store."""
    found = [root for root in roots(store) if root.state != HERE and fnmatch(root.name, pattern)]
    for root in found:
        remove_tree(root.file)
    return found


def roots(store: str) -> list[Root]:
    """Every project that uses a store; the one in the current directory always, and first."""
    found = {folder: Root(folder=folder, state=HERE, name=folder) for folder in (os.getcwd(), *_owner(store))}
    try:
        names = sorted(os.listdir(f"{store}/projects"))
    except FileNotFoundError:
        names = []
    for root in (_root(f"{store}/projects/{name}") for name in names if name.endswith(".json")):
        found.setdefault(root.folder if root.state == HERE else root.file, root)
    return list(found.values())


def needs(root: Root) -> dict[str, set[str]]:
    """target → the keys of its receipts. Raises OSError where a project that is here cannot be read."""
    found: dict[str, set[str]] = {}
    for target in _names(f"{root.folder}/build"):
        for name in _names(f"{root.folder}/build/{target}"):
            if name.endswith(".json") and (key := _key(f"{root.folder}/build/{target}/{name}")):
                found.setdefault(target, set()).add(key)
    return found


def _owner(store: str) -> Iterator[str]:
    folder, name = os.path.split(os.path.realpath(store))
    if name == STATE and _is_project(folder):
        yield folder


def _is_project(folder: str) -> bool:
    return os.path.isdir(f"{folder}/targets") and os.path.isfile(f"{folder}/dodo.py")


def _root(path: str) -> Root:
    try:
        with open(path, "rb") as file:
            note = json.loads(file.read())
        folder, host, device, inode = str(note["root"]), str(note["host"]), int(note["device"]), int(note["inode"])
    except (OSError, ValueError, KeyError, TypeError):
        return Root(folder=path, state=AWAY, name=path, file=path)
    same_host = host == os.uname().nodename
    name = folder if same_host else f"{host}:{folder}"
    if _is_project(folder):
        found = os.stat(folder)
        same = same_host or (found.st_dev, found.st_ino) == (device, inode)  # a machine may be given another name
        return Root(folder=folder, state=HERE if same else AWAY, name=name, file=path)
    gone = same_host and not os.path.lexists(folder) and _device(folder) == device
    return Root(folder=folder, state=GONE if gone else AWAY, name=name, file=path)


def _device(path: str) -> int:
    """The file system of the nearest folder above that is there: another one where the project's own is not mounted."""
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return os.stat(path).st_dev


def _key(path: str) -> str:
    """The key that a receipt says; empty where the file is none, which `fresh` takes it for too."""
    try:
        with open(path, "rb") as file:
            return receipt_from_bytes(file.read()).key
    except (FileNotFoundError, IsADirectoryError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return ""


def _names(folder: str) -> Iterator[str]:
    try:
        yield from sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
