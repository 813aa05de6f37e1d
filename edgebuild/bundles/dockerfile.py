"""The Dockerfile of a container bundle: what it promises, held against what it says; and hadolint's word, where that is installed."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from edgebuild.errors import StepFailed

DOCKERFILE = "Dockerfile"
FIRST_USER = 10000  # numbers below may be somebody's on the host


def check(out: Path) -> None:
    """Raises StepFailed where it is not what this kind promises: on a base by digest, without a network, as an ordinary user."""
    lines = instructions((out / DOCKERFILE).read_text(encoding="utf-8"))
    words = [word for word, _ in lines]
    if "FROM" not in words or words[0] != "ARG" or not re.fullmatch(r'BASE(="?\S+@sha256:[0-9a-f]{64}"?)?', lines[0][1]):
        raise _refused("must begin with ARG BASE, an image by its digest or none")
    for word, rest in lines:
        if word == "FROM" and not re.fullmatch(r"\$\{BASE\}( AS \w+)?", rest):
            raise _refused(f"FROM {rest}: every stage begins with ${{BASE}}")
        if word == "ADD" or (word == "RUN" and re.search(r"\b(curl|wget|apt|apt-get|git)\b", rest)):
            raise _refused(f"{word} {rest[:60]}: nothing may come from a network")
        if (
            word == "RUN"
            and re.search(r"\bpip\b.*\binstall\b", rest)
            and not {"--no-index", "--require-hashes"} <= set(shlex.split(rest))
        ):
            raise _refused("pip must be told --no-index and --require-hashes")
        if word == "COPY":
            _sources(out, rest)
        if word in ("ENTRYPOINT", "CMD") and not _executed(rest):
            raise _refused(f"{word} {rest[:60]}: must be a list in JSON, which no shell reads")
    last = len(words) - words[::-1].index("FROM")
    user = [rest for word, rest in lines[last:] if word == "USER"]
    if len(user) != 1 or not re.fullmatch(r"\d{5,9}:\d{5,9}", user[0]) or int(user[0].partition(":")[0]) < FIRST_USER:
        raise _refused(f"USER {' '.join(user) or '(none)'}: must be one number of {FIRST_USER} or more, and so its group")
    if "ENTRYPOINT" not in words[last:]:
        raise _refused("has no ENTRYPOINT")


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, what follows) of a Dockerfile, its continued lines joined and its comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    split = (line.strip().partition(" ") for line in joined.splitlines() if line.strip())
    return [(word.upper(), rest.strip()) for word, _, rest in split]


def _sources(out: Path, rest: str) -> None:
    words = shlex.split(rest)
    if any(word.startswith("--from=") for word in words):
        return
    for source in [word for word in words if not word.startswith("--")][:-1]:
        if ".." in Path(source).parts or source.startswith("/") or not (out / source).exists():
            raise _refused(f"COPY {source}: there is no such file in the bundle")


def _executed(rest: str) -> bool:
    try:
        words = json.loads(rest)
    except ValueError:
        return False
    return isinstance(words, list) and bool(words) and all(isinstance(word, str) for word in words)


def _refused(reason: str) -> StepFailed:
    return StepFailed(f"{DOCKERFILE}: {reason}; correct the template")


def lint(out: Path) -> dict[str, str]:
    """hadolint's word, where it is installed; → its version. Raises StepFailed for what it warns of."""
    program = shutil.which("hadolint") or shutil.which("hadolint", path=os.path.dirname(sys.executable))
    if not program:
        return {}
    words = [program, "--no-color", "--failure-threshold", "warning", str(out / DOCKERFILE)]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
    if done.returncode:
        raise StepFailed(f"hadolint: {last(done.stdout or done.stderr)}; correct the template")
    version = subprocess.run([program, "--version"], capture_output=True, timeout=60, check=False).stdout.decode()
    return {"hadolint": number(version)}


def number(text: str) -> str:
    found = re.search(r"\d+(\.\d+)+", text)
    return found[0] if found else "unknown"


def last(said: bytes) -> str:
    lines = [line.strip() for line in said.decode("utf-8", "replace").splitlines() if line.strip()]
    return " | ".join(lines[-3:])[:500] or "it says nothing"
