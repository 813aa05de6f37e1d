"""What must hold in a project whatever broke a build: nothing torn, a sound store, nothing left behind. Reads only."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from edgebuild import digest
from edgebuild.memo import Memo
from edgebuild.store import Store

Contents = dict[str, tuple[int, str]]  # path -> (mode, sha256)


def contents(root: Path) -> Contents:
    """Every file below build/ and dist/."""
    return {
        str(path.relative_to(root)): (path.stat().st_mode & 0o777, hashlib.sha256(path.read_bytes()).hexdigest())
        for place in ("build", "dist")
        for path in sorted((root / place).rglob("*"))
        if path.is_file()
    }


def torn(root: Path, states: list[tuple[Contents, dict[str, dict[str, str]]]]) -> Iterator[str]:
    """Outputs and receipts that are none of what the states hold, whole, nor absent; receipts that speak too early.

    `states`: what clean builds made, and their receipts (path -> output path -> digest).
    """
    now = contents(root)
    for path in sorted({path for _, receipts in states for receipt in receipts for path in (receipt, *receipts[receipt])}):
        part = _part(now, path)
        if part and part not in [_part(clean, path) for clean, _ in states]:
            yield f"{path} is torn"
    for clean, receipts in states:
        for receipt, outputs in receipts.items():
            others = [other.get(receipt) for other, _ in states if other is not clean]
            if now.get(receipt) == clean[receipt] and clean[receipt] not in others:
                yield from (f"{receipt} speaks of {path} too early" for path in outputs if _part(now, path) != _part(clean, path))


def receipts(root: Path) -> dict[str, dict[str, str]]:
    found = {}
    for path in (root / "build").glob("*/*.json"):
        if path.name != "evidence.json":
            found[str(path.relative_to(root))] = {
                str(made[0]): str(made[1]) for made in json.loads(path.read_text())["outputs"].values()
            }
    return found


def unsound(root: Path) -> Iterator[str]:
    """Objects that are not what their names say, and records that cannot be read or name what is not there."""
    store = Store(str(root / ".edgebuild"), Memo(""))
    for path in sorted((root / ".edgebuild" / "objects").glob("*/*")):
        name, data = path.parent.name + path.name, path.read_bytes()
        if name not in (hashlib.sha256(data).hexdigest(), digest.of_bytes(b"tree\0" + data)):
            yield f"object {name[:12]} is not what its name says"
    for path in sorted((root / ".edgebuild" / "records").glob("*/*")):
        record = store.record(path.parent.name + path.name)
        if record is None:
            yield f"record {path.name[:12]} cannot be read"
        elif not all(store.has(artifact) for artifact in record.outputs.values()):
            yield f"the record of {record.name} names an object that the store has not, whole"


def leftovers(root: Path) -> Iterator[str]:
    """Temporary files, scratch folders and notes on workers."""
    for place in ("build", "dist", ".edgebuild"):
        for folder, folders, files in os.walk(root / place):
            yield from (f"{folder}/{name} was left behind" for name in (*folders, *files) if name.startswith(".tmp-"))
    for place in ("tmp", "workers"):
        if (root / ".edgebuild" / place).is_dir():
            yield from (f"{path} was left behind" for path in sorted((root / ".edgebuild" / place).iterdir()))


def _part(found: Contents, path: str) -> Contents:
    return {name: file for name, file in found.items() if name == path or name.startswith(path + "/")}
