"""The store: objects by content, records by key; and how an object gets into `build/` and `dist/`.

Protocol: write to a temporary name on the same file system, fsync, rename,
fsync the directory; objects before the record that names them; a missing or wrong object is a miss, never an error.
A remote store is the same layout behind `has`, `publish`, `record` and `keep`.
"""

import errno
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress

from edgebuild import digest
from edgebuild.artifact import Artifact, Record, record_from_bytes
from edgebuild.files import locked, make_folder, mine, read_whole, remove_tree, rename_over
from edgebuild.memo import Memo

FICLONE = 0x40049409  # linux/fs.h: share a file's extents with another file (reflink)
LARGE = 64_000_000  # bytes; a file that a disk takes a moment to write


class Store:
    """Objects and records below `root`. Methods raise OSError where the disk does not take what is written."""

    def __init__(self, root: str, memo: Memo) -> None:
        self.root = root
        self._memo = memo
        self._reflinks = True  # until the file system refuses one

    # -- objects ------------------------------------------------------------------------------------------------------
    def object(self, sha256: str) -> str:
        return f"{self.root}/objects/{sha256[:2]}/{sha256[2:]}"

    def has(self, artifact: Artifact) -> bool:
        """Whether the store holds this artifact, whole and right."""
        if not artifact.tree:
            return self._intact(artifact.digest)
        entries = self._whole_listing(artifact.digest)
        return entries is not None and all(self._intact(sha256) for _, _, sha256, _ in entries)

    def listing(self, tree: str) -> list[digest.Entry]:
        """The files of a tree object. Raises OSError or ValueError where it is missing or wrong."""
        data = json.loads(read_whole(self.object(tree)))
        return [(str(path), bool(executable), str(sha256), int(size)) for path, executable, sha256, size in data]

    def publish(self, path: str) -> Artifact:
        """Move what a step made into the store, file by file; `path` is in `scratch()` and is used up.

        Raises OSError where it is missing, a link, or cannot be written.
        """
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            with _synced([path]):
                sha256 = self._memo.look(path)
            size = os.stat(path).st_size
            self._move_in(path, sha256)
            return Artifact(digest=sha256, tree=False, size=size)
        with _synced([os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]):
            entries = sorted(self._memo.entries(path))
        for name, _, sha256, _ in entries:
            self._move_in(os.path.join(path, name), sha256)
        tree = digest.of_tree(entries)
        if self._whole_listing(tree) is None:
            self._write(self.object(tree), digest.tree_bytes(entries))
        return Artifact(digest=tree, tree=True, size=sum(size for *_, size in entries))

    def materialise(self, artifact: Artifact, path: str, *, link: bool) -> None:
        """Put an artifact at `path`: reflink, else (where `link`) a read-only hard link, else a copy.

        `dist/` is never hard-linked: people edit, sign and upload what lies there.
        """
        make_folder(os.path.dirname(path))
        if link and not artifact.tree and not self._reflinks and not os.path.lexists(path) and self._link(artifact.digest, path):
            self._memo.forget(path)
            return
        temporary = _beside(path)
        try:
            if artifact.tree:
                os.mkdir(temporary)
                os.chmod(temporary, 0o755)
                made = {temporary}
                for name, executable, sha256, _ in self.listing(artifact.digest):
                    target = os.path.join(temporary, name)
                    folder = os.path.dirname(target)
                    if folder not in made:
                        _make_folders(folder, made)
                    self._place(sha256, target, executable, link)
            else:
                self._place(artifact.digest, temporary, False, link)
            self.remove(path)
            before = os.stat(temporary)
            os.rename(temporary, path)
            if not artifact.tree:
                self._memo.renew(path, before)
        except BaseException:
            with suppress(FileNotFoundError):
                self._remove(temporary)
            raise
        self._memo.forget(path)

    def copy(self, source: str, target: str) -> None:
        """A new file in `scratch()` with the bytes of another one, whose digest is then its own too: neither is hashed again."""
        sha256 = self._memo.look(source)
        try:
            shared = self._reflinks and reflink(source, target)
        except OSError:  # another file system
            shared = False
        self._copy(source, target, 0o644, sha256, shared)

    def remove(self, path: str) -> None:
        """Remove a file or directory that a step made; hard links to objects are let go without hashing them again.

        A directory goes under a temporary name first: whoever kills us, no half of one stands where a bundle stood.
        """
        try:
            found = os.lstat(path)
        except OSError:
            found = None
        if found and stat.S_ISDIR(found.st_mode):
            aside = _beside(path)
            os.rename(path, aside)
            self._remove(aside)
        elif found:
            self._let_go(path, found)
        self._memo.forget(path)

    # -- records ------------------------------------------------------------------------------------------------------
    def record(self, key: str) -> Record | None:
        """The record under this key, or None where there is none that can be read."""
        try:
            record = record_from_bytes(read_whole(self.record_file(key)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return record if record.key == key else None

    def keep(self, record: Record) -> None:
        """Write a record. Everything that it names must be in the store already."""
        self._write(self.record_file(record.key), record.to_bytes())

    def record_file(self, key: str) -> str:
        return f"{self.root}/records/{key[:2]}/{key[2:]}"

    def touch(self, key: str) -> None:
        """A record was used: `gc` drops those first that were not used for longest."""
        try:
            os.utime(self.record_file(key))
        except PermissionError:
            pass  # another user's; then its age is that of its making

    # -- what there is ------------------------------------------------------------------------------------------------
    def names(self, kind: str) -> Iterator[tuple[str, str]]:
        """(name, path) of all `objects` or `records`, whatever lies there under such a name."""
        for folder in _listed(f"{self.root}/{kind}"):
            for name in _listed(f"{self.root}/{kind}/{folder}"):
                if len(folder + name) == 64:
                    yield folder + name, f"{self.root}/{kind}/{folder}/{name}"

    def reached(self, record: Record) -> set[str]:
        """Every object that a record names: its files, and of its trees the listings and their files."""
        try:
            stored = record.stored.values()
        except (KeyError, TypeError):
            return set()  # a record that does not say what it is of names nothing
        found = {made.digest for made in stored}
        for made in stored:
            try:
                found |= {sha256 for _, _, sha256, _ in self.listing(made.digest)} if made.tree else set()
            except (OSError, ValueError, TypeError):
                pass  # a tree that is missing or wrong names nothing
        return found

    # -- scratch and locks --------------------------------------------------------------------------------------------
    @contextmanager
    def scratch(self) -> Iterator[str]:
        """A folder of its own on the store's file system, gone afterwards whatever happens.

        Its name holds who made it: those whose process has died are collected at the next start.
        """
        make_folder(f"{self.root}/tmp")
        folder = tempfile.mkdtemp(prefix=f"{mine()}-", dir=f"{self.root}/tmp")
        try:
            yield folder
        finally:
            remove_tree(folder)

    def lock(self, key: str) -> AbstractContextManager[int]:
        """Held while a key is worked on: of two builds that want it, the second waits, then restores."""
        return locked(f"{self.root}/locks/{key[:32]}")

    def held(self, *, alone: bool = False, waits: Callable[[], None] = lambda: None) -> AbstractContextManager[int]:
        """Keep what the store holds from being removed meanwhile; `alone`: be the one who removes. `waits`: told if it must."""
        return locked(f"{self.root}/lock", alone=alone, waits=waits)

    # -- inside -------------------------------------------------------------------------------------------------------
    def _intact(self, sha256: str) -> bool:
        try:
            return self._memo.look(self.object(sha256)) == sha256
        except OSError:
            return False

    def _whole_listing(self, tree: str) -> list[digest.Entry] | None:
        try:
            entries = self.listing(tree)
        except (OSError, ValueError, TypeError):
            return None
        return entries if digest.of_tree(entries) == tree else None

    def _move_in(self, path: str, sha256: str) -> None:
        target = self.object(sha256)
        if self._intact(sha256):
            self._let_go(path, os.lstat(path))
            return
        os.chmod(path, 0o444)
        _fsync(path)
        self._rename_in(path, target)
        self._memo.learn(target, sha256)

    def _write(self, target: str, data: bytes) -> None:
        make_folder(f"{self.root}/tmp")
        handle, temporary = tempfile.mkstemp(prefix=f"{mine()}-", dir=f"{self.root}/tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o444)
            self._rename_in(temporary, target)
        except BaseException:
            remove_tree(temporary)
            raise

    def _rename_in(self, path: str, target: str) -> None:
        folder = os.path.dirname(target)
        if not os.path.isdir(folder):
            with suppress(OSError):  # a folder: somebody made it just now
                os.unlink(folder)  # a file or a link to nothing where a folder of ours should be is damage
            os.makedirs(folder, exist_ok=True)
        rename_over(path, target)
        _fsync(folder)

    def _place(self, sha256: str, target: str, executable: bool, link: bool) -> None:
        source = self.object(sha256)
        mode = (0o555 if executable else 0o444) if link else (0o755 if executable else 0o644)
        shared = self._reflinks = self._reflinks and reflink(source, target)
        if link and not executable and not shared and self._link(sha256, target):
            return
        self._copy(source, target, mode, sha256, shared)

    def _copy(self, source: str, target: str, mode: int, sha256: str, shared: bool) -> None:
        if not shared:
            shutil.copyfile(source, target)
        os.chmod(target, mode)
        now = time.time_ns()
        os.utime(target, ns=(now, now))  # between two ticks of the kernel's clock: no write can leave this time as it is
        if os.stat(target).st_mtime_ns == now and self._memo.known(os.stat(source)) == sha256:  # nobody wrote into either
            self._memo.learn(target, sha256)

    def _link(self, sha256: str, target: str) -> bool:
        """A hard link to an object, at once or not at all; False where the file system gives none, or something lies there."""
        source = self.object(sha256)
        try:
            if os.stat(source).st_mode & 0o777 != 0o444:
                os.chmod(source, 0o444)  # somebody's chmod of a link to it was one of the object
            os.link(source, target)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EEXIST):
                raise
            return False
        self._memo.learn(source, sha256)  # the link moved the ctime that both names share
        return True

    def _remove(self, path: str) -> None:
        found = os.lstat(path)
        if stat.S_ISDIR(found.st_mode):
            with os.scandir(path) as entries:
                names = [entry.path for entry in entries]
            for name in names:
                self._remove(name)
            os.rmdir(path)
        else:
            self._let_go(path, found)

    def _let_go(self, path: str, found: os.stat_result) -> None:
        """Unlink `path`; where it was a hard link to an object, renew the object's memo entry, whose ctime that moves."""
        sha256 = self._memo.known(found) if found.st_nlink > 1 else None
        os.unlink(path)
        if sha256:
            try:
                self._memo.renew(self.object(sha256), found)
            except OSError:
                pass


def _beside(path: str) -> str:
    """A temporary name in the folder of `path`, on the same file system."""
    return f"{os.path.dirname(path)}/.tmp-{mine()}-{os.urandom(6).hex()}"


def _make_folders(folder: str, made: set[str]) -> None:
    missing = []
    while folder not in made:
        missing.append(folder)
        folder = os.path.dirname(folder)
    for path in reversed(missing):
        os.mkdir(path)
        os.chmod(path, 0o755)  # not what the umask leaves
        made.add(path)


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


@contextmanager
def _synced(paths: Sequence[str]) -> Iterator[None]:
    """Large files go to the disk while they are looked at: a third less time than one after the other. Raises OSError."""
    found = {path: os.lstat(path) for path in paths}
    large = [path for path, status in found.items() if stat.S_ISREG(status.st_mode) and status.st_size >= LARGE]
    if not large:
        yield
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as beside:
        written = [beside.submit(_fsync, path) for path in large]
        yield
        for one in written:
            one.result()


def _fsync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reflink(source: str, target: str) -> bool:
    """Share the source's extents (btrfs, xfs); False, and nothing made, where the file system has no such thing."""
    if sys.platform != "linux":
        return False
    import fcntl

    with open(source, "rb") as original:
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.ioctl(handle, FICLONE, original.fileno())
        except OSError:
            os.unlink(target)
            return False
        finally:
            os.close(handle)
    return True
