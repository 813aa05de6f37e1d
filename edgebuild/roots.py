"""Which projects use a store, and which keys the receipts of each need. A collector's roots, as Nix calls them.

A project is known to the store before its first step publishes there. One that cannot be seen now may come back (a disk
that is not mounted, another machine's folder): only one that was surely removed or moved is taken to be gone.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

from edgebuild import digest
from edgebuild.artifact import receipt_from_json
from edgebuild.files import remove_tree, write_whole

HERE, GONE, AWAY = "here", "gone", "away"


@dataclass(frozen=True, kw_only=True, slots=True)
class Root:
    """A project that uses a store. `state`: it is here, it is gone for good, or it is away and may come back."""

    folder: str
    state: str
    file: str


def register(store: str) -> None:
    """Make the project in the current directory known to a store. Raises OSError where that cannot be written."""
    folder = os.getcwd()
    note = json.dumps({"root": folder, "host": os.uname().nodename, "device": os.stat(folder).st_dev}).encode()
    path = _file(store, folder)
    try:
        with open(path, "rb") as file:
            if file.read() == note:
                return
    except OSError:
        pass
    write_whole(path, note)


def forget(store: str, folder: str) -> bool:
    """Drop a project, by its folder or by the file that makes it known, from those that use a store; → whether it was one."""
    path = os.path.abspath(folder)
    known = [
        root.file for root in roots(store) if path in (root.folder, os.path.abspath(root.file)) and os.path.exists(root.file)
    ]
    for file in known:
        remove_tree(file)
    return bool(known)


def roots(store: str) -> list[Root]:
    """Every project that uses a store; the one in the current directory always."""
    here = os.getcwd()
    found = [Root(folder=here, state=HERE, file=_file(store, here))]
    try:
        names = sorted(os.listdir(f"{store}/projects"))
    except FileNotFoundError:
        names = []
    for name in names:
        path = f"{store}/projects/{name}"
        if name.endswith(".json") and path != found[0].file:
            found.append(_root(path))
    return found


def needs(root: Root) -> dict[str, set[str]]:
    """target → the keys of its receipts. Raises OSError where a project that is here cannot be read."""
    found: dict[str, set[str]] = {}
    for target in _names(f"{root.folder}/build"):
        for name in _names(f"{root.folder}/build/{target}"):
            if name.endswith(".json") and (key := _key(f"{root.folder}/build/{target}/{name}")):
                found.setdefault(target, set()).add(key)
    return found


def _root(path: str) -> Root:
    try:
        with open(path, "rb") as file:
            note = json.loads(file.read())
        folder, host, device = str(note["root"]), str(note["host"]), int(note["device"])
    except (OSError, ValueError, KeyError, TypeError):
        return Root(folder=os.path.abspath(path), state=AWAY, file=path)
    if os.path.isdir(f"{folder}/targets") and os.path.isfile(f"{folder}/dodo.py"):
        return Root(folder=folder, state=HERE, file=path)
    gone = not os.path.lexists(folder) and host == os.uname().nodename and _device(folder) == device
    return Root(folder=folder, state=GONE if gone else AWAY, file=path)


def _device(path: str) -> int:
    """The file system of the nearest folder above that is there: another one where the project's own is not mounted."""
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return os.stat(path).st_dev


def _key(path: str) -> str:
    """The key that a receipt says; empty where the file is none, which `fresh` takes it for too."""
    try:
        with open(path, "rb") as file:
            return receipt_from_json(json.loads(file.read())).key
    except (FileNotFoundError, IsADirectoryError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return ""


def _names(folder: str) -> Iterator[str]:
    try:
        yield from sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return


def _file(store: str, folder: str) -> str:
    return f"{store}/projects/{digest.of_bytes(os.fsencode(folder))[:32]}.json"
