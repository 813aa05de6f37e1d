"""A folder of files under a signed list, `release.json` (schemas/release.json) and `release.json.minisig`: written, and verified.

Verification trusts one public key and nothing in the folder: what the list says is read once its signature holds, and files
are read as the list bounds them, never through a link.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebuild import digest, keys
from edgebuild.errors import StepFailed, UserError, shown

if TYPE_CHECKING:
    from minisign import PublicKey

LIST, SIGNATURE = "release.json", "release.json.minisig"
LARGEST = 1 << 24  # bytes of a list: a hundred thousand files
BLOCK = 1 << 20
_PLAIN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def entries(folder: Path) -> list[dict[str, Any]]:
    """What a list says of the files in `folder`: plain ones, no folders; sorted by name."""
    found = []
    for path in sorted(folder.iterdir()):
        about = path.lstat()
        entry = {"path": path.name, "size": about.st_size, "sha256": digest.of_file(str(path))}
        found.append({**entry, "executable": bool(about.st_mode & 0o111)})
    return found


def write(folder: Path, about: Mapping[str, Any], files: list[dict[str, Any]], key: keys.Key, comment: str) -> None:
    """Put the signed list beside its files. Raises StepFailed where the key's public half would not verify it."""
    lines = ",\n".join("  " + json.dumps(entry) for entry in files)
    head = json.dumps({"edgebuild": 1, **about}, indent=1).removesuffix("\n}")
    data = f'{head},\n "files": [\n{lines}\n ]\n}}\n'.encode()
    signature = key.sign(data, comment)
    keys.check(data, signature, keys.parsed(key.public))  # a key's two halves may be of two keys
    for name, content in ((LIST, data), (SIGNATURE, signature)):
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o644)


def verify(folder: str, public: "PublicKey") -> tuple[dict[str, Any], list[str]]:
    """→ (the list, a sentence for each file that differs from it); without a list that holds, ({}, why not).

    Raises UserError where `folder` is none.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        why = "is a link or no folder" if error.errno in (errno.ELOOP, errno.ENOTDIR) else f"cannot be read: {error.strerror}"
        raise UserError(f"{folder} {why}") from error
    try:
        about, problem = _listed(handle, public)
        if problem:
            return {}, [problem]
        files = {entry["path"]: entry for entry in about["files"]}
        problems = [f"{shown(name)}: {problem}" for name, entry in files.items() if (problem := _differs(handle, name, entry))]
        added = {*os.listdir(handle)} - {*files, LIST, SIGNATURE}
        return about, sorted([*problems, *(f"{shown(name)}: was added" for name in added)])
    finally:
        os.close(handle)


def _listed(folder: int, public: "PublicKey") -> tuple[dict[str, Any], str]:
    """The list, and why it may not be believed, else empty."""
    signature, problem = _small(folder, SIGNATURE, keys.LARGEST)
    if problem:
        return {}, f"{SIGNATURE}: {problem}"
    data, problem = _small(folder, LIST, LARGEST)
    if problem:
        return {}, f"{LIST}: {problem}"
    try:
        keys.check(data, signature, public)
    except StepFailed as error:
        return {}, f"{LIST}: {error}"
    try:
        about = json.loads(data)
        names = [_name(entry) for entry in about["files"]]
        known = about["edgebuild"] == 1 and len(names) == len({*names}) and isinstance(about["version"], str)
    except (ValueError, KeyError, TypeError, RecursionError):
        known = False
    return (about, "") if known else ({}, f"{LIST}: is signed, but of a form that this edgebuild does not know; use a newer one")


def _name(entry: Mapping[str, Any]) -> str:
    """An entry's name, of a file beside the list. Raises ValueError, KeyError, TypeError where the entry is none."""
    name, size = entry["path"], entry["size"]
    if not isinstance(name, str) or "/" in name or "\0" in name or name in ("", ".", "..", LIST, SIGNATURE):
        raise ValueError(name)
    if type(size) is not int or type(entry["executable"]) is not bool or not isinstance(entry["sha256"], str):
        raise TypeError(name)
    return name


def _small(folder: int, name: str, most: int) -> tuple[bytes, str]:
    """A file of at most `most` bytes; and why it is not taken, else empty."""
    try:
        handle = os.open(name, _PLAIN, dir_fd=folder)
    except OSError as error:
        return b"", _refused(error)
    with open(handle, "rb") as file:
        found = os.fstat(handle)
        if problem := _no_plain(found) or ("was made executable" if found.st_mode & 0o111 else ""):
            return b"", problem
        data = file.read(most + 1)
    return (data, "") if len(data) <= most else (b"", f"was changed: it has more than {most:,} bytes")


def _differs(folder: int, name: str, entry: Mapping[str, Any]) -> str:
    try:
        handle = os.open(name, _PLAIN, dir_fd=folder)
    except OSError as error:
        return _refused(error)
    try:
        found = os.fstat(handle)
        if problem := _no_plain(found):
            return problem
        problems = []
        if found.st_size != entry["size"]:
            problems.append(f"was changed: {found.st_size:,} bytes, listed are {entry['size']:,}")
        elif _sha256(handle, entry["size"]) != entry["sha256"]:
            problems.append("was changed")
        if (executable := bool(found.st_mode & 0o111)) != entry["executable"]:
            problems.append("was made executable" if executable else "is not executable any more")
        return "; ".join(problems)
    except OSError as error:
        return _refused(error)
    finally:
        os.close(handle)


def _no_plain(found: os.stat_result) -> str:
    if not stat.S_ISREG(found.st_mode):
        return "is no plain file"
    return "is a hard link: it has another name, by which it can be changed; copy the folder" if found.st_nlink > 1 else ""


def _refused(error: OSError) -> str:
    if error.errno in (errno.ELOOP, errno.EMLINK):
        return "is a link"
    if error.errno == errno.ENXIO:
        return "is no plain file"
    return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"


def _sha256(handle: int, size: int) -> str:
    """Of the first `size` bytes; empty where there are more by now."""
    total, left = hashlib.sha256(), size
    while left and (block := os.read(handle, min(left, BLOCK))):
        total.update(block)
        left -= len(block)
    return "" if left or os.read(handle, 1) else total.hexdigest()
