"""Runs a program of a platform where it can harm nothing: namespaces of its own, no network but loopback, all read-only but one folder.

By bubblewrap, as Flatpak does. A bundle is installed in it as root, at absolute paths, and the machine stays as it was.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from edgebuild.errors import StepFailed
from edgebuild.step import ENVIRONMENT

PROGRAM, PACKAGE = "bwrap", "bubblewrap"  # Debian's name for it
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32", "/etc/ssl", "/etc/alternatives", "/etc/ld.so.cache")


@cache
def closed() -> str:
    """Why no program can be run so here, else empty: in a container of its own a process may get no namespaces."""
    if shutil.which(PROGRAM) is None:
        return f"{PROGRAM} is not installed: apt-get install {PACKAGE}"
    with tempfile.TemporaryDirectory() as scratch:
        done = run(["true"], scratch=Path(scratch), timeout=60)
    said = done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"status {done.returncode}"]
    return f"{PROGRAM} makes no sandbox here: {said[-1][:200]}" if done.returncode else ""


def run(
    words: Sequence[str],
    *,
    scratch: Path,
    root: Path | None = None,
    read: Sequence[Path] = (),
    devices: Mapping[str, Path] | None = None,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
    machine_root: bool = False,
) -> "subprocess.CompletedProcess[bytes]":
    """A program with mount, process, IPC, host name and network namespaces of its own, in `scratch`, the one folder that it can write.

    Without `root` it sees this machine's files; with it, that folder is /, and of the machine only its programs and what is to be
    `read`. `devices`: path below /dev → the file that stands there, to be written too. Its environment is PATH, LANG and
    `environment`. `machine_root`: where this process is root, it may mount file systems and be any user, as what builds and runs
    images must, in these namespaces and no user namespace. Raises StepFailed where it takes longer than `timeout` seconds.
    """
    view = ["--ro-bind", "/", "/", "--tmpfs", "/tmp", *(("--tmpfs", "/run", "--tmpfs", "/var/tmp") if machine_root else ())]
    if root is not None:
        view = ["--bind", str(root), "/"]
        for path in SYSTEM:
            if Path(path).is_symlink():
                view += ["--symlink", str(Path(path).readlink()), path]
            elif Path(path).exists():
                view += ["--ro-bind", path, path]
        view += ["--tmpfs", "/tmp"]
    for shown in read:
        view += ["--ro-bind", str(shown), str(shown)]
    view += ["--bind", str(scratch), str(scratch), "--dev", "/dev", "--proc", "/proc", "--chdir", str(scratch)]
    for device, file in (devices or {}).items():
        view += ["--bind", str(file), device]
    given = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", **(environment or {})}
    for name, value in given.items():
        view += ["--setenv", name, value]
    apart = ["--unshare-all"]
    if machine_root:
        apart = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--cap-add", "ALL"]
    command = [PROGRAM, *apart, "--die-with-parent", "--new-session", "--clearenv", *view, "--", *words]
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        raise StepFailed(f"{Path(words[0]).name} took longer than {timeout:.0f} s and was ended") from error
    except FileNotFoundError as error:
        raise StepFailed(f"{PROGRAM} is not installed; Debian's package is {PACKAGE}") from error


def python(script: Path, timeout: float) -> "subprocess.CompletedProcess[bytes]":
    """This interpreter on a script in a bundle, with all that it imports: in a sandbox, or as it is where none can be made.

    Raises StepFailed where it takes longer than `timeout` seconds.
    """
    words = [sys.executable, "-B", str(script)]
    environment = {**ENVIRONMENT, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    with tempfile.TemporaryDirectory(prefix="edgebuild-python-") as scratch:
        if not closed():
            places = [sys.prefix, sys.base_prefix, *sys.path, str(script.parent)]
            read = [Path(place) for place in places if os.path.isdir(place)]
            return run(words, scratch=Path(scratch), read=read, environment=environment, timeout=timeout)
        try:
            return subprocess.run(
                words,
                cwd=scratch,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise StepFailed(f"{script.name} took longer than {timeout:.0f} s and was ended") from error
