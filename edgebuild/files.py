"""Files of our own: written whole under a temporary name that says whose it is, and removed whatever their modes.

What only saves time (memo, plan cache, the no-op's verdict) is sealed: damage makes it none, never another one.
"""

import os
import sys
import zlib
from functools import cache


def mine() -> str:
    """This process, by number and start: what names its temporary files."""
    return _named(os.getpid())


@cache
def _named(pid: int) -> str:
    return f"{pid}.{_start_of(pid)}"  # read once: a look into /proc takes longer than the file that is named by it


def owner_alive(owner: str) -> bool:
    """Whether the process that `mine()` named so still runs (and is not another one with its number)."""
    pid, _, start = owner.partition(".")
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


def remove_tree(path: str) -> None:
    """Remove a file or folder, read-only or not. What cannot be removed stays for the next start to collect."""
    if os.path.isdir(path) and not os.path.islink(path):
        for folder, _, _ in os.walk(path):
            try:
                os.chmod(folder, 0o700)
            except OSError:
                pass
        import shutil

        shutil.rmtree(path, ignore_errors=True)
    else:
        try:
            os.unlink(path)
        except OSError:
            pass


def sealed(data: bytes) -> bytes:
    """JSON `data` behind its checksum, as JSON again. A CRC: it is for accidents, and a no-op pays for it."""
    return b'["%08x",' % zlib.crc32(data) + data + b"]"


def unsealed(data: bytes) -> bytes:
    """What was sealed. Raises ValueError where it was damaged."""
    content = data[12:-1]
    if sealed(content) != data:
        raise ValueError("damaged")
    return content


def write_whole(path: str, data: bytes) -> None:
    """Write a small file whole: temporary name, rename. Not fsynced: receipts and memos may be lost, never torn unseen."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    temporary = f"{folder}/.tmp-{mine()}-{os.urandom(6).hex()}"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        if os.path.isdir(path) and not os.path.islink(path):
            remove_tree(path)  # a folder where a file of ours should be is damage
        os.replace(temporary, path)
    except BaseException:
        remove_tree(temporary)
        raise
