"""Programs of a platform that bundles are made with: called, and asked for their versions."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from edgebuild.errors import StepFailed

TIMEOUT = 900  # seconds
PASSWORD = "EDGEBUILD_PASSWORD"  # the variable by which a program is told one


def call(
    words: Sequence[str],
    *,
    cwd: Path,
    packages: Mapping[str, str],
    given: bytes = b"",
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run a program; → what it printed. `packages`: program → Debian's package. Raises StepFailed with its last lines."""
    inherited = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    variables = {**inherited, "LC_ALL": "C.UTF-8", **(environment or {})}
    try:
        done = subprocess.run(
            words, cwd=cwd, input=given, env=variables, umask=0o022, capture_output=True, timeout=TIMEOUT, check=False
        )
    except FileNotFoundError as error:
        raise StepFailed(f"{missing([words[0]], packages)}; this bundle is made with it") from error
    except subprocess.TimeoutExpired as error:
        raise StepFailed(f"{words[0]} took longer than {TIMEOUT} s and was ended") from error
    if done.returncode:
        raise StepFailed(f"{words[0]} fails: {last_lines(done)}")
    return done.stdout.decode("utf-8", "replace")


def last_lines(done: "subprocess.CompletedProcess[bytes]", count: int = 3) -> str:
    """What a program that failed printed last, errors after the rest, in one line."""
    text = b"\n".join((done.stdout, done.stderr)).decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-count:])[:500] or f"status {done.returncode}"


def absent(programs: Iterable[str]) -> list[str]:
    """Those that are not here; a path is one of a file that they read."""
    return [name for name in programs if not (Path(name).is_file() if "/" in name else shutil.which(name))]


def missing(programs: Sequence[str], packages: Mapping[str, str]) -> str:
    """That these programs are not installed, and what to do."""
    wanted = " ".join(sorted({packages.get(name, name) for name in programs}))
    return f"{' and '.join(programs)} {'is' if len(programs) == 1 else 'are'} not installed: apt-get install {wanted}"


def version(program: str) -> str:
    """As it says itself, else as Debian's package does."""
    path = shutil.which(program) or program
    for words in ([path, "--version"], [path, "version"], ["dpkg-query", "-W", "-f", "${Version}", program]):
        try:
            done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if found := re.search(rb"\d+(\.\d+)+[\w.+~-]*", done.stdout + done.stderr):
            return found[0].decode()
    return "of unknown version"
