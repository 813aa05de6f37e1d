"""Makes the environment of a lock, or its folder of wheels, by pip or uv.

Every package is held against its hash, none resolved, and what is made is whole or not at all.
"""

import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from errno import EDQUOT, ENOSPC

from edgebuild import environment
from edgebuild.environment import Environment
from edgebuild.errors import StepFailed, disk
from edgebuild.files import remove_tree, write_whole
from edgebuild.step import ENVIRONMENT
from edgebuild.toolchain import Lock
from edgebuild.units import human

Command = Callable[[Sequence[str], Mapping[str, str], Callable[[str], None]], int]
"""Runs a program: its words, its environment, and who is told each line that it prints; → its exit status."""

# Settings of pip that would put packages elsewhere, or none anywhere.
UNWANTED = (
    "PIP_TARGET",
    "PIP_PREFIX",
    "PIP_ROOT",
    "PIP_USER",
    "PIP_DRY_RUN",
    "PIP_REQUIRE_VIRTUALENV",
    "PYTHONPATH",
    "PYTHONHOME",
)
PATIENCE = {"PIP_DEFAULT_TIMEOUT": "30", "PIP_RETRIES": "2"}  # seconds without a byte, and tries after that
EXACTLY = ("--no-deps", "--require-hashes")
QUIET = ("--no-input", "--disable-pip-version-check", "--progress-bar", "off")
LAST_LINES = 12
_FULL = re.compile(r"No space left on device|Errno 28\b|os error 28\b|Disk quota exceeded|os error 122\b", re.IGNORECASE)
_SILENT = re.compile(
    r"connection broken by|Max retries exceeded|Read timed out|ReadTimeout|ConnectTimeout|NewConnectionError|Connection refused"
    r"|Connection reset|IncompleteRead|SSLError|ProxyError|[Nn]ame resolution|error sending request|operation timed out|"
    r"error decoding response body|tunnel error|dns error"
)
_STATUS = re.compile(r"(?:HTTP error|status (?:client|server) error[ (]*) *(\d{3})")


def install(lock: Lock, command: Command, doing: Callable[[str], None]) -> Environment:
    """The environment of a lock, made where it is not there; `doing` is told how far it is.

    Raises StepFailed with one message, and then nothing of it is left but a log.
    """
    try:
        environment.sweep()
        waits = "waits for another edgebuild that makes it"
        with environment.lock(lock.digest, lambda: doing(waits), alone=True):
            return environment.note(lock.digest) or _make(lock, command, doing)
    except OSError as error:
        raise StepFailed(refused_by_disk(error)) from error


def works(lock: Lock, command: Command) -> str:
    """Why an environment that is there does not do what it is for, in one sentence; empty where it does."""
    return _imports(lock, environment.python(lock.digest), command)


def _make(lock: Lock, command: Command, doing: Callable[[str], None]) -> Environment:
    with environment.beside(lock.digest) as path:
        os.makedirs(f"{path}/tmp")
        if lock.wheels:
            os.mkdir(f"{path}/wheels")
        else:
            doing("makes an environment")
            _venv(path)
        _packages(lock, path, command, doing)
        doing("tries it")
        if problem := _imports(lock, f"{path}/bin/python", command):
            raise StepFailed(f"{problem}; nothing was kept")
        remove_tree(f"{path}/tmp")
        if not lock.wheels:
            _move_scripts(path, environment.place(lock.digest))
        made = Environment(
            name=lock.name,
            digest=lock.digest,
            lock=lock.text,
            python=f"{platform.python_implementation()} {platform.python_version()}",
            packages=len(lock.pins),
            bytes=environment.size(path),
            form=environment.WHEELS if lock.wheels else environment.TOOLCHAIN,
        )
        environment.put(path, made)
        remove_tree(_log_file(lock))  # of a try that failed
    return made


def _venv(path: str) -> None:
    """An interpreter without packages. Packages come by an installer that stands outside."""
    import venv

    venv.EnvBuilder(symlinks=True, with_pip=False).create(path)


def _packages(lock: Lock, path: str, command: Command, doing: Callable[[str], None]) -> None:
    """Raises StepFailed with what went wrong, and the end of the installer's log."""
    said: list[str] = []
    count = len(lock.pins)
    seen: set[str] = set()

    def told(line: str) -> None:
        said.append(line)
        if text := _progress(line, seen, count):
            doing(text)

    surroundings = {name: value for name, value in os.environ.items() if name not in UNWANTED}
    surroundings = {**PATIENCE, **surroundings, **lock.build, "TMPDIR": f"{path}/tmp", "PYTHONUNBUFFERED": "1"}
    words = _wheel_maker(f"{path}/wheels") if lock.wheels else _installer(f"{path}/bin/python")
    status = command([*words, "-r", lock.path], surroundings, told)
    if status:
        raise StepFailed(_why(said, lock, path))


def _installer(python: str) -> list[str]:
    """pip, where this interpreter has it, as it knows the user's index; else uv."""
    if importlib.util.find_spec("pip"):
        return [
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            *EXACTLY,
            *QUIET,
            "--no-warn-script-location",
            "--no-compile",
        ]
    if uv := shutil.which("uv"):
        # Each package from whichever index has the bytes that its hash says, as pip does it.
        return [uv, "pip", "install", "--python", python, *EXACTLY, "--index-strategy", "unsafe-best-match", "--no-progress"]
    raise StepFailed("neither pip nor uv is here to install packages; install one: python -m ensurepip, or your system's package")


def _wheel_maker(folder: str) -> list[str]:
    """pip downloads wheels, and makes them of what has none."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "wheel", *EXACTLY, *QUIET, "--wheel-dir", folder]
    raise StepFailed("pip is not here to download wheels; install it: python -m ensurepip, or your system's package")


def _progress(line: str, seen: set[str], count: int) -> str:
    """What a line of pip's says of how far it is, else nothing."""
    if found := re.match(r"\s*Collecting ([A-Za-z0-9._-]+)", line):
        seen.add(found[1])
        return f"{len(seen)} of {count} packages: {found[1]}"
    if found := re.match(r"\s*Downloading (?:\S*/)?([A-Za-z0-9._]+)-\S* \(([^)]+)\)", line):
        return f"{len(seen)} of {count} packages: downloads {found[1]}, {found[2]}"
    if found := re.match(r"\s*Building wheel for ([A-Za-z0-9._-]+)", line):
        return f"compiles {found[1]}"
    return f"installs {count} packages" if re.match(r"\s*(Installing collected packages|Prepared )", line) else ""


def _imports(lock: Lock, python: str, command: Command) -> str:
    """Why what the lock is for cannot be imported there: packages may be there, and what they need of the system not."""
    if not lock.imports:
        return ""
    said: list[str] = []
    surroundings = {name: value for name, value in os.environ.items() if name not in UNWANTED} | ENVIRONMENT
    if not command([python, "-I", "-c", f"import {', '.join(lock.imports)}"], surroundings, said.append):
        return ""
    last = next((line.strip() for line in reversed(said) if line.strip()), "it says nothing")
    return f"what was installed of {lock.name} cannot be imported here: {last[:300]}"


def _move_scripts(path: str, to: str) -> None:
    """Console scripts name their interpreter by its path, which becomes another one."""
    for entry in os.scandir(f"{path}/bin"):
        if entry.is_symlink() or not entry.is_file():
            continue
        with open(entry.path, "rb") as file:
            content = file.read()
        if path.encode() in content[:1024] and content[:2] == b"#!":
            with open(entry.path, "wb") as file:
                file.write(content.replace(path.encode(), to.encode()))


# -- what went wrong ----------------------------------------------------------------------------------------------------
def refused_by_disk(error: OSError) -> str:
    """What the disk of the environments refused, and what to do."""
    if error.errno in (ENOSPC, EDQUOT):
        return f"the disk of {environment.folder()} is full; nothing was kept; free space there, or set XDG_CACHE_HOME to a folder on another disk"
    return disk(error)


def _why(said: list[str], lock: Lock, path: str) -> str:
    """One sentence of what an installer said, with the end of its log and where that lies."""
    text = "\n".join(said)
    if _FULL.search(text) or _room(path) < 64 * 1024:
        return refused_by_disk(OSError(ENOSPC, ""))
    if "DO NOT MATCH THE HASHES" in text or "Hash mismatch for" in text:
        return f"{_mismatch(text)}; nothing was kept; try again, or ask who keeps your package index{_log(said, lock)}"
    if _SILENT.search(text):
        return f"the package index does not answer{_host(text)}; look to the network, or set PIP_INDEX_URL to an index that can be reached{_log(said, lock)}"
    if found := _STATUS.search(text):
        return f"the package index answers with HTTP status {found[1]}{_host(text)}; try again later, or set PIP_INDEX_URL to another{_log(said, lock)}"
    if found := re.search(r"No matching distribution found for (\S+)|no version of (\S+)", text):
        here = f"{platform.python_implementation()} {platform.python_version()} on {sys.platform} {platform.machine()}"
        none = " or does not answer" if "(from versions: none)" in text else ""
        return f"the package index has no {found[1] or found[2]} for {here}{none}; use another Python, or another index (PIP_INDEX_URL){_log(said, lock)}"
    errors = [number for number, line in enumerate(said) if re.match(r"\s*(ERROR|error)\b", line)]
    last = " ".join(line.strip() for line in said[errors[-1] :] if line.strip()) if errors else (said or ["it said nothing"])[-1]
    return f"packages cannot be installed: {last[:300]}{_log(said, lock)}"


def _mismatch(text: str) -> str:
    package = re.search(r"^\s*([A-Za-z0-9._-]+==\S+) from ", text, re.MULTILINE) or re.search(
        r"Hash mismatch for `([^`]+)`", text
    )
    got = re.search(r"Got\s+([0-9a-f]{12})", text) or re.search(r"Computed:\s+sha256:([0-9a-f]{12})", text)
    digest = f" (sha256 {got[1]}…)" if got else ""
    return f"the package index gives other bytes of {package[1] if package else 'a package'}{digest} than the lock names, which are refused"


def _host(text: str) -> str:
    found = re.search(r"host='([^']+)'(?:, port=(\d+))?", text) or re.search(r"https?://([^/\s:'\")]+)(?::(\d+))?", text)
    return "" if found is None else f" ({found[1]}{f':{found[2]}' if found[2] and found[2] != '443' else ''})"


def _log(said: list[str], lock: Lock) -> str:
    path = _log_file(lock)
    try:
        write_whole(path, "\n".join(said).encode())
    except OSError:
        path = "none: it cannot be written"
    return f"\n  log: {path}" + "".join(_shown(said))


def _log_file(lock: Lock) -> str:
    return f"{environment.place(lock.digest)}.log"


def _shown(said: list[str]) -> Iterator[str]:
    for line in [line for line in said if line.strip()][-LAST_LINES:]:
        yield f"\n    | {line[:200]}"


def _room(path: str) -> int:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return 1 << 30


def summary(made: Environment) -> str:
    """What an environment is, for people."""
    return f"{made.packages} package{'' if made.packages == 1 else 's'}, {human(made.bytes)}"
