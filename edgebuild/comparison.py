"""Two builds of one output, file by file; of a bundle that is signed, by what its kind says is the same each time.

What is compared may be somebody else's: nothing of it is run, and an archive gives plain files below one folder, or it is none.
"""

import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from edgebuild import digest
from edgebuild.bundle import MANIFEST
from edgebuild.bundles import SIGNED
from edgebuild.errors import shown
from edgebuild.memo import Memo


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """`same`: what two builds have in common of it: its sha256, or where its kind says so, a digest of all but signatures."""

    executable: bool
    sha256: str
    same: str


Files = Mapping[str, File]  # by path below a folder, empty for a lone file
Reader = Callable[[Memo, str], Files]


def files(memo: Memo, path: str) -> Files:
    """Raises OSError for what is missing, a link, no plain file."""
    if os.path.isdir(path) and not os.path.islink(path):
        found = {name: (executable, sha256) for name, executable, sha256, _ in memo.entries(path)}
    else:
        found = {"": (False, memo.look(path))}
    return {name: File(executable=executable, sha256=sha256, same=sha256) for name, (executable, sha256) in found.items()}


def reader(kind: str, name: str, *, archive: bool) -> Reader:
    """What reads a bundle of the target `name`, or its archive: where such a kind is signed, without what a signature changes."""
    if kind not in SIGNED:
        return files

    def settled(memo: Memo, path: str) -> Files:
        found = files(memo, path)
        try:
            same = settled_files(kind, Path(path).absolute())
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return found  # what was damaged is compared by its bytes
        return {**found, **{place: replace(found[place], same=common) for place, common in same.items() if place in found}}

    def unpacked(memo: Memo, path: str) -> Files:
        with tempfile.TemporaryDirectory(prefix="edgebuild-compare-") as folder:
            _unpack(path, name, folder)
            return settled(memo, os.path.join(folder, name))

    return unpacked if archive else settled


def settled_files(kind: str, folder: Path) -> Mapping[str, str]:
    """As a kind says it of a bundle; and of the manifest all but size and sha256 of these files.

    Raises OSError, ValueError, KeyError, TypeError, RecursionError where the bundle is damaged.
    """
    found = SIGNED[kind].settled(folder)
    if not found:
        return {}
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"] = [
        {key: value for key, value in entry.items() if key not in ("sha256", "size") or entry["path"] not in found}
        for entry in manifest["files"]
    ]
    return {**found, MANIFEST: digest.tagged("manifest", manifest)}


def signed_otherwise(old: Files, new: Files) -> tuple[str, ...]:
    """The files whose signatures alone differ; the manifest, which holds their digests, goes without saying."""
    both = sorted({*old} & {*new} - {MANIFEST})
    return tuple(name for name in both if old[name].sha256 != new[name].sha256 and old[name].same == new[name].same)


def differences(path: str, old: Files, new: Files) -> tuple[str, ...]:
    """A sentence for each file of the output at `path` that a rebuild, `new`, makes otherwise."""
    return tuple(
        f"{os.path.join(path, shown(name)) if name else path}: {difference}"
        for name in sorted({*old, *new})
        if (difference := _difference(old.get(name), new.get(name)))
    )


def _difference(old: File | None, new: File | None) -> str:
    if old is None or new is None:
        return "is missing" if old is None else "is not made by a rebuild"
    if old.same != new.same:
        return f"sha256 {old.sha256[:12]}…, rebuilt {new.sha256[:12]}…"
    if old.executable != new.executable:
        return "is executable, rebuilt it is not" if old.executable else "is not executable, rebuilt it is"
    return ""


def _unpack(path: str, name: str, folder: str) -> None:
    """Below `folder` only new plain files are written. Raises OSError where an archive holds anything else."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts
                if parts[:1] != (name,) or ".." in parts or not (member.isdir() or member.isreg()):
                    raise OSError(f"{path}: {shown(member.name)} is no file of a bundle")
                target = Path(folder, *parts)
                (target if member.isdir() else target.parent).mkdir(parents=True, exist_ok=True)
                if member.isdir():
                    continue
                content = tar.extractfile(member)
                assert content is not None  # of a plain file
                with content, target.open("xb") as file:
                    shutil.copyfileobj(content, file)
                target.chmod(0o755 if member.mode & 0o100 else 0o644)
    except (tarfile.TarError, ValueError) as error:
        raise OSError(f"{path}: is no archive: {error}") from error
