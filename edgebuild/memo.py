"""The stat memo: a file's sha256 is not computed again while its (mtime, ctime, size) stay. Losing it costs time only.

So it trusts the kernel: that no write leaves a file's ctime as it is. What rots on the medium below the file system it
does not see, nor a memo forged with its seal.

Entries are by (device, inode), so that hard links share one and a moved checkout keeps all. Within a run the digest of
a path is looked up once; `forget` drops what a step that ran has touched.
"""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from edgebuild import digest
from edgebuild.files import sealed, unsealed, write_whole
from edgebuild.noop import STATE, Signature, racy, signature, signature_of
from edgebuild.step import SOURCES

MEMO = f"{STATE}/memo.json"
LIMIT = 200_000  # entries; beyond it those that this run did not use are dropped


class Memo:
    """Digests of files and directories. Raises OSError from `of` and `look` where a path cannot be read."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._loaded: dict[str, list[int | str]] | None = None
        self._used: set[str] = set()
        self._seen: dict[str, str] = {}
        self._noted: dict[str, Signature] | None = None
        self._changed = False

    @property
    def _known(self) -> dict[str, list[int | str]]:
        """The entries, read when the first is asked for: a remembered no-op asks for none."""
        if self._loaded is None:
            self._loaded = {}
            try:
                with open(self._path, "rb") as file:
                    known = json.loads(unsealed(file.read()))
                if isinstance(known, dict):
                    self._loaded = known
            except (OSError, ValueError):
                pass  # lost or torn: everything is hashed once
        return self._loaded

    def of(self, path: str) -> str:
        """The digest of a file or directory, looked up once in a run."""
        seen = self._seen.get(path)
        if seen is None:
            seen = self._seen[path] = self.look(path)
        return seen

    def look(self, path: str) -> str:
        """The digest of a file or directory as it is at this moment."""
        found = os.stat(path)
        if self._noted is not None:
            self._noted[path] = signature_of(found)
        if stat.S_ISDIR(found.st_mode):
            return digest.of_tree(self.entries(path))
        return self._file(path, found)

    def entries(self, path: str, prefix: str = "") -> Iterator[digest.Entry]:
        """The files of a directory. Special files are refused, and links too: they have no content of their own.

        In `.edgebuild/sources` links are followed: the model files that they show lie in the Hugging Face cache.
        """
        follow = path.startswith(SOURCES)
        with os.scandir(path) as found:
            for entry in found:
                name = prefix + entry.name
                status = entry.stat(follow_symlinks=follow)
                if self._noted is not None:
                    self._noted[entry.path] = signature_of(status)
                if stat.S_ISDIR(status.st_mode):
                    yield from self.entries(entry.path, name + "/")
                elif stat.S_ISREG(status.st_mode):
                    yield name, bool(status.st_mode & 0o100), self._file(entry.path, status), status.st_size
                else:
                    raise OSError(f"{entry.path} is neither a file nor a directory")

    @contextmanager
    def noting(self) -> Iterator[dict[str, Signature]]:
        """Whatever is looked up meanwhile, anew: path → the signature that it had before it was read, of what lies below it too."""
        self.forget_all()
        noted: dict[str, Signature] = {}
        self._noted = noted
        try:
            yield noted
        finally:
            self._noted = None

    def size(self, path: str) -> int:
        """Bytes of a file, or of all files of a directory."""
        if os.path.isdir(path):
            return sum(size for *_, size in self.entries(path))
        return os.stat(path).st_size

    def forget(self, *paths: str) -> None:
        """Look these paths up again: a step has touched them."""
        for path in paths:
            self._seen.pop(path, None)

    def forget_all(self) -> None:
        self._seen.clear()

    def doubt(self, path: str) -> None:
        """Hash what lies at and below `path` anew when it is next asked for, whatever its stat says."""
        for part, _ in signatures(path):
            if os.path.exists(part):
                found = os.stat(part)
                self._known.pop(f"{found.st_dev}:{found.st_ino}", None)
                self.forget(part)
        self._changed = True

    def learn(self, path: str, sha256: str) -> None:
        """Note the digest of a file that we have just written, linked or renamed ourselves."""
        found = os.stat(path)
        self._note(found, sha256)

    def renew(self, path: str, before: os.stat_result) -> None:
        """A rename, link or unlink of ours moved a file's ctime: what was known of it stays so, where nothing else moved."""
        sha256, after = self.known(before), os.stat(path)
        if sha256 and (after.st_dev, after.st_ino, after.st_mtime_ns, after.st_size) == (
            before.st_dev,
            before.st_ino,
            before.st_mtime_ns,
            before.st_size,
        ):
            self._note(after, sha256)

    def known(self, found: os.stat_result) -> str | None:
        """The digest of a file that has this stat, if it is known."""
        entry = self._known.get(f"{found.st_dev}:{found.st_ino}")
        try:
            if entry and entry[0] == found.st_mtime_ns and entry[1] == found.st_ctime_ns and entry[2] == found.st_size:
                return str(entry[3])
        except (LookupError, TypeError):
            pass  # an entry of another shape is no entry
        return None

    def holds(self, path: str, was: Signature) -> bool:
        """Whether a file holds what it held when its signature was this; False where that is not known."""
        found = os.stat(path)
        entry = self._known.get(f"{found.st_dev}:{found.st_ino}")
        return entry is not None and entry[:3] == was[:3] and self._file(path, found) == entry[3]

    def save(self) -> None:
        """Write the memo whole (no fsync: a torn one is a miss). A memo that cannot be written costs time only."""
        if not self._changed:
            return
        if len(self._known) > LIMIT:
            self._loaded = {key: value for key, value in self._known.items() if key in self._used}
        try:
            write_whole(self._path, sealed(json.dumps(self._known, separators=(",", ":")).encode()))
        except OSError:
            pass

    def _file(self, path: str, found: os.stat_result) -> str:
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path} is not a regular file")
        sha256 = self.known(found)
        if sha256 is None:
            sha256 = digest.of_file(path)
            after = os.stat(path)
            still = (after.st_mtime_ns, after.st_ctime_ns, after.st_size) == (found.st_mtime_ns, found.st_ctime_ns, found.st_size)
            if still and not racy([after.st_mtime_ns, after.st_ctime_ns]):
                self._note(after, sha256)
        else:
            self._used.add(f"{found.st_dev}:{found.st_ino}")
        return sha256

    def _note(self, found: os.stat_result, sha256: str) -> None:
        key = f"{found.st_dev}:{found.st_ino}"
        self._known[key] = [found.st_mtime_ns, found.st_ctime_ns, found.st_size, sha256]
        self._used.add(key)
        self._changed = True


def signatures(path: str) -> Iterator[tuple[str, Signature | None]]:
    """A path and, for a directory, every directory and file below it, each with its signature: all that its digest depends on."""
    found = signature(path)
    yield path, found
    if found and stat.S_ISDIR(found[4]):
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from signatures(entry.path)
                else:
                    yield entry.path, signature(entry.path)
