"""The root file system that images of containers are tried on here: Debian with Python, made by mmdebstrap once per user.

It is kept as the environment of a toolchain is; its lock is the list of what mmdebstrap is told. Nothing that is delivered depends
on it: a recipient builds on the base image that he names by its digest.
"""

import os
import platform
import shutil
from collections.abc import Callable

from edgebuild import digest, environment
from edgebuild.environment import Environment
from edgebuild.errors import StepFailed
from edgebuild.install import Command, refused_by_disk

NAME, PROGRAM = "base", "mmdebstrap"
SUITE = "bookworm"
PACKAGES = ("python3-minimal", "python3-venv", "ca-certificates", "libstdc++6")


def lock() -> str:
    """The digest of what it is made of, as an environment notes that of its lock's text."""
    return digest.tagged("base image", [SUITE, *PACKAGES])


def key() -> str:
    """What names it among environments: the digest of its lock and of the machine."""
    return digest.tagged("base", [lock(), platform.machine()])


def why_not() -> str:
    """Why it cannot be made here, in a few words, else empty."""
    if os.geteuid() != 0:
        return "not run as root"
    return "" if shutil.which(PROGRAM) else f"{PROGRAM} is not installed"


def make(command: Command, doing: Callable[[str], None]) -> Environment:
    """Made where it is not there. Raises StepFailed where Debian's packages cannot be had, or for the disk."""
    try:
        environment.sweep()
        return _made(key(), command, doing)
    except OSError as error:
        raise StepFailed(refused_by_disk(error)) from error


def _made(named: str, command: Command, doing: Callable[[str], None]) -> Environment:
    with environment.lock(named, lambda: doing("waits for another edgebuild that makes it"), alone=True):
        if found := environment.note(named):
            return found
        doing(f"Debian {SUITE} with Python, by {PROGRAM}")
        said: list[str] = []
        with environment.beside(named) as path:
            os.mkdir(path)
            tar = os.path.join(path, os.path.basename(environment.base(named)))
            words = [PROGRAM, "--quiet", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, tar]
            if command(words, dict(os.environ), said.append):
                last = next((line for line in reversed(said) if line.strip()), "it says nothing")
                raise StepFailed(f"{PROGRAM} cannot make a base image of Debian {SUITE}: {last[:300]}")
            made = Environment(
                name=NAME,
                digest=named,
                lock=lock(),
                python="",
                packages=len(PACKAGES),
                bytes=environment.size(path),
                form=environment.BASE,
            )
            return environment.put(path, made)
