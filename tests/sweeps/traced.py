"""Runs a function in a forked child with strace attached, which lists its system calls or makes the n-th of them fail.

The only module here that knows strace. A fork of a process that has everything imported starts in milliseconds, and counts
from the marker where strace attaches, so that no interpreter's start is among the calls.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Calls that change what lies on a disk. An `open` is one of them where it creates or truncates. `?`: not on every machine.
NAMED = [
    "rename",
    "renameat",
    "renameat2",
    "link",
    "linkat",
    "symlink",
    "symlinkat",
    "unlink",
    "unlinkat",
    "mkdir",
    "mkdirat",
    "rmdir",
    "chmod",
    "fchmodat",
    "truncate",
    "utimensat",
    "open",
    "openat",
    "creat",
]
HANDLED = [
    "write",
    "pwrite64",
    "writev",
    "pwritev",
    "fsync",
    "fdatasync",
    "fchmod",
    "ftruncate",
    "fallocate",
    "copy_file_range",
    "sendfile",
    "ioctl",
]
REMOVING = ("unlink", "unlinkat", "rmdir")
TRACE = "trace=" + ",".join("?" + name for name in (*NAMED, *HANDLED))
LINE = re.compile(r"^(?:\d+ +)?(?P<name>\w+)\((?P<arguments>.*)$")
MINUTE = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One system call: the `nth` of its name since the marker, on `path` (of the file that it changes)."""

    name: str
    nth: int
    path: str
    injected: bool
    removing: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a child ended: exit status (negative: the signal), what it wrote to its terminal."""

    status: int
    out: str
    err: str


def forked(function: Callable[[], int], folder: Path, options: tuple[str, ...] | None = None) -> Ended:
    """Call `function` in a child; with `options`, under strace, whose log is `folder`/strace. Its result is the exit status."""
    pid = os.fork()
    if pid == 0:
        _child(function, folder, options is not None)
    tracer = None
    if options is not None:
        os.waitpid(pid, os.WUNTRACED)
        tracer = subprocess.Popen(["strace", "-qq", "-y", "-o", str(folder / "strace"), *options, "-p", str(pid)])
        _attached(pid)
        os.kill(pid, signal.SIGCONT)
    status = _wait(pid)
    if tracer is not None:
        tracer.wait()
    return Ended(status=status, out=(folder / "out").read_text(), err=(folder / "err").read_text())


def calls(log: Path, root: Path, below: Path) -> list[Call]:
    """The mutating calls in a log of strace on paths below `below`. `root`: what relative paths are relative to."""
    found = []
    count: dict[str, int] = {}
    for line in log.read_text(errors="replace").splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        name, arguments = match["name"], match["arguments"]
        count[name] = count.get(name, 0) + 1
        if _mutates(name, arguments):
            path = _path(name, arguments, root)
            if path.startswith(f"{below}/"):
                removing = name in REMOVING or (name == "chmod" and ", 0700)" in arguments)  # to remove what is below
                found.append(Call(name=name, nth=count[name], path=path, injected="(INJECTED)" in line, removing=removing))
    return found


def _mutates(name: str, arguments: str) -> bool:
    if " = -1 " in arguments and "(INJECTED)" not in arguments:
        return False  # it was refused, as `mkdir` of a folder that is there
    if name in ("open", "openat"):
        return "O_CREAT" in arguments or "O_TRUNC" in arguments
    return name != "ioctl" or "FICLONE" in arguments


def _path(name: str, arguments: str, root: Path) -> str:
    handles = re.findall(r"<(/[^>]*)>", arguments)
    if name in HANDLED:
        return handles[-1 if name == "copy_file_range" else 0] if handles else ""
    names = re.findall(r'"((?:[^"\\]|\\.)*)"', arguments)
    folder = handles[-1] if handles and name.endswith("at") and not name.startswith("open") else ""
    return os.path.normpath(os.path.join(root, folder, names[-1])) if names else ""


def _child(function: Callable[[], int], folder: Path, stop: bool) -> None:
    status = 99
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        if stop:
            os.kill(os.getpid(), signal.SIGSTOP)
        status = function()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 98
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        import sys

        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _attached(pid: int) -> None:
    deadline = time.monotonic() + MINUTE
    while "TracerPid:\t0" in Path(f"/proc/{pid}/status").read_text():
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            raise TimeoutError("strace did not attach; may this user trace processes?")
        time.sleep(0.001)


def _wait(pid: int) -> int:
    deadline = time.monotonic() + MINUTE
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.003)
