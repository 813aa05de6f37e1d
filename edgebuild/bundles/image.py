"""Images: buildah, which builds them, and runc, which runs them; both in a sandbox without a network.

A build is repeatable: OCI format (Docker's holds the builder's host name), one time for every file, no compiled Python in it.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgebuild import sandbox
from edgebuild.bundle import EPOCH
from edgebuild.bundles.dockerfile import FIRST_USER, last, number
from edgebuild.errors import StepFailed

BASE_PYTHON = "3.11"  # of Debian 12, on which images are tried here
BUILD_TIME, RUN_TIME = 900, 600  # seconds
BASE_IMAGE, IMAGE = "localhost/edgebuild-base", "localhost/edgebuild-image"
REPEATABLE = ("--isolation", "chroot", "--format", "oci", "--timestamp", str(EPOCH), "--no-cache")
DRIVERS = ("vfs", "overlay")
RUNNING = Path(__file__).with_name("running.py")


def build(context: Path, base: Path, scratch: Path) -> str:
    """Build a bundle's image on the base root file system `base`; → the image's digest. Raises StepFailed.

    Where the disk of `scratch` bears no overlay, as in a container, layers are copies.
    """
    read = [context, base.parent]
    if not any((scratch / driver).exists() for driver in DRIVERS):
        recipe = scratch / "base.Dockerfile"
        recipe.write_text(f'FROM scratch\nADD {base.name} /\nENV PATH="/usr/bin:/bin"\n', encoding="utf-8")
        words = ["bud", *REPEATABLE, "-t", BASE_IMAGE, "-f", str(recipe), str(base.parent)]
        (scratch / DRIVERS[1]).mkdir()
        try:
            _buildah(scratch, read, *words)
        except StepFailed as error:
            if DRIVERS[1] not in str(error):
                raise
            (scratch / DRIVERS[0]).mkdir()
            _buildah(scratch, read, *words)
    arguments = ["--build-arg", f"BASE={BASE_IMAGE}", "--pull-never", "-t", IMAGE]
    _buildah(scratch, read, "bud", *REPEATABLE, *arguments, str(context))
    found = json.loads(_buildah(scratch, read, "inspect", "--type", "image", IMAGE))
    return str(found["FromImageDigest"])


def no_sandbox(scratch: Path) -> str:
    """Why this root may not do here what building and running takes, else empty."""
    done = sandbox.run(["mount", "-t", "tmpfs", "trial", str(scratch)], scratch=scratch, timeout=60, machine_root=True)
    return last(done.stderr) if done.returncode else ""


def _buildah(scratch: Path, read: Sequence[Path], *words: str) -> bytes:
    done = sandbox.run(
        [*buildah(scratch), *words],
        scratch=scratch,
        read=read,
        environment=_surroundings(scratch),
        timeout=BUILD_TIME,
        machine_root=True,
    )
    if done.returncode:
        raise StepFailed(f"buildah {words[0]} fails: {last(done.stderr)}")
    return done.stdout


def buildah(scratch: Path) -> list[str]:
    """The program, its images in a folder that is called as what they are stored by."""
    driver = next(driver for driver in DRIVERS if (scratch / driver).exists())
    return ["buildah", "--root", str(scratch / driver), "--runroot", str(scratch / "run"), "--storage-driver", driver]


def _surroundings(scratch: Path) -> dict[str, str]:
    (scratch / "tmp").mkdir(exist_ok=True)
    return {"HOME": str(scratch), "TMPDIR": str(scratch / "tmp")}


def run(context: Path, digest: str, scratch: Path, callers: Sequence[Sequence[str]], read: Sequence[Path] = ()) -> dict[str, Any]:
    """Run the image built last, and each of these programs beside it, which may `read` more, until one fails; → what was seen of it.

    Raises StepFailed where it does not start, is not what the Dockerfile promises, or a program fails.
    """
    spec = {
        "buildah": buildah(scratch),
        "image": IMAGE,
        "callers": [list(words) for words in callers],
        "seen": str(scratch / "seen.json"),
        "first_user": FIRST_USER,
    }
    (scratch / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    words = [sys.executable, "-I", "-B", str(RUNNING), str(scratch / "spec.json")]
    shown = [context, RUNNING.parent, Path(sys.prefix), Path(sys.base_prefix), *read]
    done = sandbox.run(
        words, scratch=scratch, read=shown, environment=_surroundings(scratch), timeout=RUN_TIME, machine_root=True
    )
    if done.returncode:
        raise StepFailed(f"the image {digest[:19]} does not do what it should: {last(done.stdout + done.stderr)}")
    seen: dict[str, Any] = json.loads((scratch / "seen.json").read_text(encoding="utf-8"))
    return seen


def versions() -> dict[str, str]:
    found = {}
    for program in ("buildah", "runc"):
        said = subprocess.run([program, "--version"], capture_output=True, timeout=60, check=False).stdout
        found[program] = number(said.decode("utf-8", "replace"))
    return found
