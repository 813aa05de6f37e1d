"""What git says of the tree that a release is made from: its commit, and what in it is not of that commit."""

import os
import subprocess

from edgebuild.errors import StepFailed

OWN = ("build/", "dist/", ".edgebuild/", "__pycache__/")  # made by builds: no part of what a release is made from
SHOWN = 5  # files named in a message


def commit(root: str) -> str | None:
    """The commit of a clean tree; None where no git repository holds `root`. Raises StepFailed for a dirty tree, naming its files."""
    if not _in_repository(root):
        return None
    head = _git(root, "rev-parse", "--verify", "HEAD").strip()
    inside = _git(root, "rev-parse", "--show-prefix").rstrip("\n")
    dirty = [path for path in _changed(root) if not path.startswith(tuple(f"{inside}{folder}" for folder in OWN))]
    if dirty:
        more = f" and {len(dirty) - SHOWN} more" if len(dirty) > SHOWN else ""
        raise StepFailed(
            f"the git tree is dirty: {', '.join(map(ascii, dirty[:SHOWN]))}{more}; "
            "a release is made from a commit: commit, ignore or remove what differs"
        )
    return head


def _in_repository(root: str) -> bool:
    place = os.path.abspath(root)
    while not os.path.lexists(os.path.join(place, ".git")):
        above = os.path.dirname(place)
        if above == place:
            return False
        place = above
    return True


def _changed(root: str) -> list[str]:
    """Paths in the repository that are changed, staged, untracked, or tracked and not looked at by git's own leave."""
    found = []
    entries = iter(_git(root, "status", "--porcelain", "-z", "--untracked-files=all", "--ignore-submodules=none").split("\0"))
    for entry in filter(None, entries):
        found.append(entry[3:])
        if "R" in entry[:2] or "C" in entry[:2]:
            next(entries)  # where it was
    top = _git(root, "rev-parse", "--show-toplevel").rstrip("\n")
    for entry in filter(None, _git(top, "ls-files", "-v", "-z").split("\0")):
        unseen = entry[0].islower() or entry[0] == "S"  # --assume-unchanged, --skip-worktree
        if unseen and os.path.lexists(os.path.join(top, entry[2:])):
            found.append(entry[2:])
    return found


def _git(root: str, *words: str) -> str:
    """Its output. Of the environment, nothing that points git elsewhere."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | {"LC_ALL": "C"}
    try:
        result = subprocess.run(
            ["git", "-c", "core.fsmonitor=false", *words], cwd=root, env=environment, capture_output=True, check=False
        )
    except FileNotFoundError as error:
        raise StepFailed("git is needed to say which commit a release is made from, and is not installed: install git") from error
    if result.returncode:
        why = result.stderr.decode(errors="replace").strip().splitlines() or ["it failed"]
        raise StepFailed(f"git cannot say whether the tree is clean: {why[0]}")
    return os.fsdecode(result.stdout)
