"""Files of our own: written whole under a temporary name that says whose it is, and removed whatever their modes.

What only saves time (memo, plan cache, the no-op's verdict) is sealed: damage makes it none, never another one.
"""

import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

BLOCK = 1 << 14  # bytes of one read: receipts and most records are shorter


def mine() -> str:
    """This process, by number and start: what names its temporary files."""
    return _mine(os.getpid())


@cache
def _mine(pid: int) -> str:
    return process_name(pid)  # read once: a look into /proc takes longer than the file that is named by it


def process_name(pid: int) -> str:
    """A process by number and start, so that another one with its number is not taken for it."""
    return f"{pid}.{_start_of(pid)}"


def alive(name: str) -> bool:
    """Whether the process that has this `process_name` still runs."""
    pid, _, start = name.partition(".")
    return pid.isdigit() and start != "" and _start_of(int(pid)) == start


def _start_of(pid: int) -> str:
    """When a process started, in the kernel's ticks since boot (proc(5), stat field 22); seconds elsewhere; empty: none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        pass
    if sys.platform == "linux":
        return ""
    import psutil

    try:
        return f"{psutil.Process(pid).create_time():.0f}"
    except psutil.Error:
        return ""


def user_cache() -> str:
    """edgebuild's folder in the user's cache: what is kept for the user and the machine, whatever the project."""
    return os.path.join(os.path.abspath(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")), "edgebuild")


def remove_tree(path: str) -> None:
    """Remove a file or folder, read-only or not. What cannot be removed stays for the next start to collect."""
    if os.path.isdir(path) and not os.path.islink(path):
        import shutil

        shutil.rmtree(path, ignore_errors=True)
        if not os.path.isdir(path):
            return
        for folder, _, _ in os.walk(path):  # what was closed to us
            try:
                os.chmod(folder, 0o700)
            except OSError:
                pass
        shutil.rmtree(path, ignore_errors=True)
    else:
        try:
            os.unlink(path)
        except OSError:
            pass


@contextmanager
def locked(path: str, *, alone: bool = True, waits: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Hold a lock file, by the descriptor that this yields, `alone` or beside others who hold it so too; `waits` is told if somebody must be waited for.

    flock(2) on a descriptor of its own, so that threads count too: 9 µs, where filelock's ReadWriteLock takes 600
    (measured). It ends with its process, however that ends. Raises OSError where the file cannot be made.
    """
    import fcntl

    how_open = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        handle = os.open(path, how_open, 0o666)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle = os.open(path, how_open, 0o666)
    try:
        how = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
        try:
            fcntl.flock(handle, how | fcntl.LOCK_NB)
        except BlockingIOError:
            waits()
            fcntl.flock(handle, how)
        yield handle
    finally:
        os.close(handle)


def sealed(data: bytes) -> bytes:
    """JSON `data` behind its checksum, as JSON again. A CRC: it is for accidents, and a no-op pays for it."""
    return b'["%08x",' % zlib.crc32(data) + data + b"]"


def unsealed(data: bytes) -> bytes:
    """What was sealed. Raises ValueError where it was damaged."""
    content = data[12:-1]
    if sealed(content) != data:
        raise ValueError("damaged")
    return content


def read_whole(path: str) -> bytes:
    """A small file's content, in four system calls; `open` makes ten. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = part = os.read(handle, BLOCK)
        while len(part) == BLOCK:  # a regular file gives less at its end only
            part = os.read(handle, BLOCK)
            data += part
        return data
    finally:
        os.close(handle)


def make_folder(path: str) -> None:
    """A folder, and those that it lies in, where it is not there yet: most often it is. Raises OSError."""
    if not os.path.isdir(path):
        try:
            os.mkdir(path)
        except (FileNotFoundError, FileExistsError):
            os.makedirs(path, exist_ok=True)


def rename_over(path: str, target: str) -> None:
    """Rename a file of ours; a folder where it should be is damage, and goes. Raises OSError."""
    try:
        os.replace(path, target)
    except IsADirectoryError:
        remove_tree(target)
        os.replace(path, target)


def write_whole(path: str, data: bytes) -> None:
    """Write a small file whole: temporary name, rename. Not fsynced: receipts and memos may be lost, never torn unseen."""
    folder = os.path.dirname(path)
    temporary = f"{folder}/.tmp-{mine()}-{os.urandom(6).hex()}"
    try:
        try:
            write_new(temporary, data)
        except FileNotFoundError:
            os.makedirs(folder, exist_ok=True)
            write_new(temporary, data)
        rename_over(temporary, path)
    except BaseException:
        remove_tree(temporary)
        raise


def write_new(path: str, data: bytes) -> None:
    """Write a small file where there is none, without a rename: whoever kills us meanwhile leaves it torn. Raises OSError."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(handle, "wb") as file:  # buffered: it writes on where the system takes a part
        os.fchmod(handle, 0o644)  # whatever the umask says
        file.write(data)
