"""`edgebuild release DIR`: archives and evidence of all default targets under a signed list; `--verify` holds such a folder against it.

The build is the one that `doit package.version=X` runs; what is copied is held against the receipts of that build. DIR is made
under another name beside it, and renamed when it is whole.
"""

import json
import os
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from edgebuild import digest, git, keys, signed
from edgebuild.errors import FAILED, OK, StepFailed, UserError, shown
from edgebuild.files import alive, mine, remove_tree
from edgebuild.fresh import Fresh, read_receipt
from edgebuild.gates import FAIL, INCONCLUSIVE
from edgebuild.noop import SIGN
from edgebuild.project import Project
from edgebuild.step import Step
from edgebuild.store import reflink
from edgebuild.token import SCHEME
from edgebuild.units import SEMVER, human

VERSION = "package.version="
OUTPUTS = ("build", "dist", ".edgebuild")  # what builds write, and rewrite
TEST, NOTICE = "test key: not for release", "NOT-FOR-RELEASE.txt"
SHOWN = 100  # differences printed
_MOVED = "{} is not what was built: it was changed meanwhile; nothing was released: release again"


def takes(parser: ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", type=os.path.abspath, help="a folder that does not exist yet, or is empty")
    parser.add_argument("version", metavar=f"{VERSION}X", nargs="?", default="", help="the release's version (semver.org)")
    which = parser.add_mutually_exclusive_group()
    about = (
        f"the secret key: a file, or pkcs11:URI; its password or PIN from {keys.PASSWORD}. With --verify the public key's file"
    )
    which.add_argument("--key", metavar="KEY", type=_key, help=about)
    which.add_argument("--test-key", action="store_true", help="sign with your test key: to try it out, not for release")
    parser.add_argument("--verify", action="store_true", help="check DIR offline: names each file that is not as it was signed")


def run(options: Namespace, enter: Callable[[], None], build: Callable[[list[str]], int]) -> int:
    """`enter` goes to the project's root, `build` hands words to doit; → exit status."""
    if options.verify:
        return verify(options.folder, options.key, options.version)
    version = _version(options.version)
    if not (options.key or options.test_key):
        raise UserError("a release is signed: --key FILE (edgebuild key new FILE makes one), or --test-key to try it out")
    password = keys.password()
    key = keys.test() if options.test_key else keys.load(options.key, password)
    enter()
    return make(options.folder, version, key, build)


def _key(word: str) -> str:
    return word if word.startswith(SCHEME) else os.path.abspath(word)


def _version(word: str) -> str:
    if not word.startswith(VERSION):
        raise UserError(f"a release has a version: edgebuild release DIR {VERSION}1.2.0 --key FILE")
    version = word.removeprefix(VERSION)
    if not SEMVER.match(version):
        raise UserError(f"{VERSION}{shown(version)}: is no semantic version such as 1.2.0 (semver.org)")
    if version.split("+")[0].split("-")[0] == "0.0.0":
        raise UserError(f"{VERSION}0.0.0: 0.0.0 is what a bundle has that was given no version; a release has another one")
    return version


# -- verify -------------------------------------------------------------------------------------------------------------
def verify(folder: str, key: str | None, version: str) -> int:
    """Prints what differs; → exit status. A version that is asked for must be the one that was signed."""
    if not key:
        raise UserError(
            "name the public key that you trust: edgebuild release --verify DIR --key FILE.pub; a key found in DIR proves nothing"
        )
    expected = _version(version) if version else ""
    if os.path.realpath(key).startswith(os.path.realpath(folder) + os.sep):
        raise UserError(f"{key} lies in {folder} itself: who changed files there could change it too; take it from elsewhere")
    public = keys.read_public(key)
    about, problems = signed.verify(folder, public)
    if about and expected not in ("", about["version"]):
        problems.append(f"{signed.LIST}: is of release {shown(about['version'])}, not {expected}")
    if problems:
        more = [f"and {len(problems) - SHOWN:,} more"] if len(problems) > SHOWN else []
        print("\n".join([*problems[:SHOWN], *more]))
        print(f"{folder}: not as it was signed" if about else f"{folder}: not signed by the key {keys.key_id(public)}")
        return FAILED
    print(_summary(folder, about, keys.key_id(public)))
    return OK


def _summary(folder: str, about: Mapping[str, Any], number: str) -> str:
    size = human(sum(entry["size"] for entry in about["files"]))
    of = f" of commit {about['commit'][:12]}" if about.get("commit") else ""
    test = f"; {TEST}" if about.get("test_key") else ""
    count = len(about["files"])
    return f"{folder}: release {about['version']}{of}, {count} file{'' if count == 1 else 's'}, {size}, signed by the key {number}{test}"


# -- make ---------------------------------------------------------------------------------------------------------------
def make(folder: str, version: str, key: keys.Key, build: Callable[[list[str]], int]) -> int:
    """In the project's root. Raises UserError, StepFailed; then nothing is left behind."""
    _check_folder(folder)
    _collect(folder)
    _check_targets(Project(version=version), key)
    commit = git.commit(".")
    if status := build(["build", f"{VERSION}{version}"]):
        raise Failed(status)
    if git.commit(".") != commit:
        raise StepFailed("another commit was checked out meanwhile; nothing was released: release again")
    project = Project(version=version)
    files = _deliveries(project)
    project.memo.save()
    _check_gates(files)
    with _beside(folder) as making:
        for path in files:
            _copy(path, making / os.path.basename(path))
        if key.test:
            (making / NOTICE).write_text(f"This release is signed with a {TEST}.\n", encoding="utf-8")
            (making / NOTICE).chmod(0o644)
        entries = signed.entries(making)
        _check_copies(files, entries)
        about = {"version": version, "commit": commit, "test_key": key.test}
        signed.write(making, about, entries, key, f"edgebuild release {version}" + (f"; {TEST}" if key.test else ""))
        _publish(making, folder)
    for entry in entries:
        print(f"{entry['sha256']}  {entry['path']}")
    print(_summary(folder, {**about, "files": entries}, key.id))
    if commit is None:
        print("no git repository holds this project, so that the list names no commit")
    print(f"to verify it: edgebuild release --verify {folder} --key {keys.test_public() if key.test else 'FILE.pub'}")
    return OK


class Failed(StepFailed):
    """The build did not pass, and has said why. `status`: its own."""

    def __init__(self, status: int) -> None:
        super().__init__("nothing was released, because the build did not pass")
        self.status = status


def _check_folder(folder: str) -> None:
    if os.path.lexists(folder) and (os.path.islink(folder) or not os.path.isdir(folder) or os.listdir(folder)):
        raise UserError(f"{folder} exists already and is not an empty folder; name another one")
    here = os.path.realpath(folder)
    if any(f"{here}{os.sep}".startswith(os.path.realpath(own) + os.sep) for own in OUTPUTS):
        raise UserError(f"{folder} lies where builds write; name a folder outside {', '.join(OUTPUTS)}")


def _check_targets(project: Project, key: keys.Key) -> None:
    """Raises UserError where a target cannot be released, whatever its build gives."""
    if problems := obstacles(project, test=key.test):
        raise UserError("; ".join(problems))
    steps = [step for step, _ in _archives(project)]
    if not steps and not project.problems:  # of problems the build tells
        raise UserError("there is no default target, so there is nothing to release")
    if not key.test and (found := [step.target for step in steps if _by_test_key(project, step)]):
        raise UserError(
            f"{found[0]}'s bundle is signed with your test key, as {SIGN} says: unset it, or release it with --test-key"
        )


def obstacles(project: Project, *, test: bool = False) -> list[str]:
    """A sentence for each default target that has no release, whatever its build gives; `test`: signed with a test key either."""
    found = []
    for name in project.defaults():
        if name in project.problems:
            continue  # the build tells
        made = [step for step in project.of(name) if "archive" in step.outputs]
        if not made:
            problem = "makes no archive to release: take `package: {archive: false}` out of targets/"
        elif not test and _by_test_key(project, made[0]) and not project.targets[name]["names_key"]:
            problem = "has a bundle that is signed with your test key, not for release: name one by `package: {sign: {key: …}}`"
        else:
            continue
        found.append(f"{name} {problem}, or make it no default target (`default: false`)")
    return found


def _by_test_key(project: Project, step: Step) -> bool:
    return bool(project.recipes[step.recipe]["params"].get("sign", {}).get("test"))


def _archives(project: Project) -> list[tuple[Step, str]]:
    """(step, output) of every archive and evidence of the default targets."""
    wanted = {"package": "archive", "build": "delivered"}
    steps = (step for name in project.defaults() for step in project.of(name))
    return [(step, wanted[step.verb]) for step in steps if wanted.get(step.verb) in step.outputs]


def _deliveries(project: Project) -> dict[str, str]:
    """Path → sha256 of what the build made. Raises StepFailed where anything moved since."""
    fresh, found = Fresh(project, anew=True), {}
    for step, output in _archives(project):
        receipt = read_receipt(step.receipt)
        if receipt is None or not fresh(step):
            raise StepFailed(
                f"{step.name} is not up to date any more: a file was edited meanwhile; release again when files are at rest"
            )
        path, sha256 = receipt.outputs[output]
        found[path] = sha256
    return found


def _check_gates(files: Mapping[str, str]) -> None:
    """Raises StepFailed for each gate that stands in the way, or whose waiver is over."""
    today = datetime.now(UTC).date()
    problems = []
    for path, sha256 in files.items():
        if path.endswith(".evidence.json"):
            data = Path(path).read_bytes()
            if digest.of_bytes(data) != sha256:
                raise StepFailed(_MOVED.format(path))
            evidence = json.loads(data)
            problems += [f"{evidence['target']}: {problem}" for gate in evidence["gates"] if (problem := _stops(gate, today))]
    if problems:
        raise StepFailed("; ".join([*problems, "nothing was released"]))


def _stops(gate: Mapping[str, Any], today: date) -> str:
    verdict, waiver = gate["verdict"], gate["waived"]
    if not (verdict == FAIL or (verdict == INCONCLUSIVE and gate["required"])):
        return ""
    if not waiver:
        return f"gate {gate['name']} {verdict}: {gate['reason']}"
    try:
        until = date.fromisoformat(waiver["until"])
    except ValueError:
        return f"gate {gate['name']} is waived until {waiver['until']}, which is no date"
    return f"gate {gate['name']} {verdict}, and its waiver ended on {until}: {gate['reason']}" if until < today else ""


# -- files --------------------------------------------------------------------------------------------------------------
@contextmanager
def _beside(folder: str) -> Iterator[Path]:
    """An empty folder beside `folder`, which goes in the end."""
    making = Path(f"{_prefix(folder)}{mine()}")
    making.mkdir(parents=True)
    try:
        making.chmod(0o755)
        yield making
    finally:
        remove_tree(str(making))


def _prefix(folder: str) -> str:
    above, name = os.path.split(folder)
    return os.path.join(above, f".{name}.release-")


def _collect(folder: str) -> None:
    """What a crash left beside `folder` goes."""
    above, start = os.path.split(_prefix(folder))
    for old in os.listdir(above) if os.path.isdir(above) else ():
        if old.startswith(start) and not alive(old.removeprefix(start)):
            remove_tree(os.path.join(above, old))


def _copy(path: str, target: Path) -> None:
    """By reflink, else by the kernel: never held in memory."""
    if not reflink(path, str(target)):
        shutil.copyfile(path, target)
    target.chmod(0o644)


def _check_copies(files: Mapping[str, str], entries: Iterable[Mapping[str, Any]]) -> None:
    """Raises StepFailed where a copy is not what was built."""
    found = {entry["path"]: entry["sha256"] for entry in entries}
    for path, sha256 in files.items():
        if found[os.path.basename(path)] != sha256:
            raise StepFailed(_MOVED.format(path))


def _publish(making: Path, folder: str) -> None:
    """Rename what is whole and on the disk. Raises StepFailed where something came to lie at `folder`."""
    for path in (*making.iterdir(), making):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    try:
        os.rename(making, folder)  # takes the place of an empty folder, and of nothing else
    except OSError as error:
        raise StepFailed(f"{folder} cannot be made: {error.strerror}; nothing was released") from error


# -- keys ---------------------------------------------------------------------------------------------------------------
def takes_key(parser: ArgumentParser) -> None:
    parser.add_argument("what", choices=("new", "public"), help="make a pair, FILE and FILE.pub; or print a key's public half")
    parser.add_argument("key", metavar="FILE", type=_key, help="the secret key's file; of `public` also pkcs11:URI")


def key(options: Namespace) -> int:
    """`edgebuild key`."""
    if options.what == "public":
        print(keys.load(options.key, keys.password()).public.decode(), end="")
        return OK
    if options.key.startswith(SCHEME):
        raise UserError("keys in a token are made by the token's own tools; `edgebuild key public` prints their public half")
    password = keys.password()
    made = keys.new(options.key, password)
    how = "encrypted" if password else f"not encrypted (with a password in {keys.PASSWORD} it would be)"
    print(
        f"{options.key}: the secret key {made.id}, {how}: keep it out of the repository\n{options.key}.pub: its public half, to verify with"
    )
    return OK
