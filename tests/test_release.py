"""`edgebuild release`: made, verified offline by edgebuild and by minisign itself, refused after every change; what is not released."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jsonschema
import minisign
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edgebuild import keys, release, signed
from edgebuild.bundles import SIGNED
from edgebuild.errors import StepFailed, UserError
from edgebuild.project import Project
from tests import tokens
from tests.conftest import ROOT, TARGET, Lab, ends, make_lab, write_model
from tests.test_cli import BIN, left_behind
from tests.test_signing import made

VERSION = "package.version=1.2.0"
GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]


def run(lab: Lab, *words: "str | Path", within: Sequence[str] = (), **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [*within, str(BIN / "edgebuild"), *map(str, words)]
    return subprocess.run(
        command, cwd=lab.root, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False
    )


def git(lab: Lab, *words: str) -> str:
    return subprocess.run([*GIT, *words], cwd=lab.root, capture_output=True, text=True, check=True).stdout


def commit(lab: Lab) -> None:
    git(lab, "add", "-A")
    git(lab, "commit", "-q", "-m", "a step")


def under_git(lab: Lab) -> Lab:
    (lab.root / ".gitignore").write_text("build/\ndist/\n.edgebuild/\n")
    git(lab, "init", "-q")
    commit(lab)
    return lab


def needs(program: str) -> None:
    if not shutil.which(program):
        assert not os.environ.get("CI"), f"{program} is missing: apt-get install {program}"
        pytest.skip(f"{program} is not installed")


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return under_git(make_lab(tmp_path / "project"))


@pytest.fixture
def key(tmp_path: Path) -> Path:
    keys.new(str(tmp_path / "release.key"), "")
    return tmp_path / "release.key"


@dataclass(frozen=True)
class Released:
    """A release, made once: `copy` it before it is changed."""

    lab: Lab
    folder: Path
    public: Path

    def copy(self, to: Path) -> Path:
        return shutil.copytree(self.folder, to / "released")

    def verify(self, folder: Path, *more: "str | Path") -> "subprocess.CompletedProcess[str]":
        return run(self.lab, "release", "--verify", folder, "--key", self.public, *more)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    folder = tmp_path_factory.mktemp("release")
    lab = under_git(make_lab(folder / "project"))
    keys.new(str(folder / "release.key"), "")
    result = run(lab, "release", folder / "out", VERSION, "--key", folder / "release.key")
    assert result.returncode == 0, result.stdout + result.stderr
    return Released(lab, folder / "out", folder / "release.key.pub")


# -- made and verified --------------------------------------------------------------------------------------------------
def test_what_lies_in_it(released: Released) -> None:
    listed = json.loads((released.folder / "release.json").read_text())
    jsonschema.validate(listed, json.loads((ROOT / "schemas" / "release.json").read_text()))
    assert [entry["path"] for entry in listed["files"]] == ["one.evidence.json", "one.tar"]
    assert listed["version"] == "1.2.0"
    assert listed["commit"] == git(released.lab, "rev-parse", "HEAD").strip()
    assert json.loads((released.folder / "one.evidence.json").read_text())["version"] == "1.2.0"
    manifest = subprocess.run(
        ["tar", "-xOf", str(released.folder / "one.tar"), "one/manifest.json"], capture_output=True, check=True
    ).stdout
    assert json.loads(manifest)["version"] == "1.2.0"


def test_it_verifies_offline(released: Released, tmp_path: Path) -> None:
    """Without a network, elsewhere, and as a user who may only read it."""
    alone = ["unshare", "-rn"] if subprocess.run(["unshare", "-rn", "true"], check=False).returncode == 0 else []
    result = run(released.lab, "release", "--verify", released.copy(tmp_path), "--key", released.public, within=alone)
    assert (result.returncode, result.stderr) == (0, "")
    assert "release 1.2.0 of commit" in result.stdout
    assert "2 files" in result.stdout


def test_minisign_itself_verifies_it(released: Released, key: Path) -> None:
    needs("minisign")
    command = ["minisign", "-Vm", str(released.folder / "release.json"), "-p"]
    result = subprocess.run([*command, str(released.public)], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert "Trusted comment: edgebuild release 1.2.0\n" in result.stdout
    assert subprocess.run([*command, f"{key}.pub"], capture_output=True, check=False).returncode == 1


def test_a_key_that_minisign_made_signs_it(lab: Lab, tmp_path: Path) -> None:
    needs("minisign")
    public, secret, out = (str(tmp_path / name) for name in ("m.pub", "m.key", "out"))
    subprocess.run(["minisign", "-G", "-W", "-p", public, "-s", secret], capture_output=True, check=True)
    assert run(lab, "release", out, VERSION, "--key", secret).returncode == 0
    assert subprocess.run(["minisign", "-Vm", f"{out}/release.json", "-p", public], check=False).returncode == 0
    assert run(lab, "key", "public", secret).stdout == Path(public).read_text()


def test_twice_the_same_bytes_whatever_was_built_between(lab: Lab, key: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        assert run(lab, "release", "--key", key, tmp_path / name, VERSION).returncode == 0
        assert run(lab).returncode == 0  # dist/ is of version 0.0.0 again
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("first", "second"))
    assert first == second
    assert len(first) == 4


def test_the_test_key(lab: Lab, tmp_path: Path) -> None:
    made = run(lab, "release", tmp_path / "out", VERSION, "--test-key")
    assert made.returncode == 0, made.stderr
    assert "test key: not for release" in made.stdout
    assert "not for release" in (tmp_path / "out" / "NOT-FOR-RELEASE.txt").read_text()
    assert json.loads((tmp_path / "out" / "release.json").read_text())["test_key"] is True
    assert b"test key" in (tmp_path / "out" / "release.json.minisig").read_bytes()
    place = Path(os.environ["XDG_CACHE_HOME"], "edgebuild", "keys", "release-test.key")
    assert place.stat().st_mode & 0o777 == 0o600
    verified = run(lab, "release", "--verify", tmp_path / "out", "--key", f"{place}.pub")
    assert verified.returncode == 0
    assert "test key: not for release" in verified.stdout
    (tmp_path / "out" / "NOT-FOR-RELEASE.txt").unlink()
    assert run(lab, "release", "--verify", tmp_path / "out", "--key", f"{place}.pub").returncode == 1
    as_another = run(lab, "release", tmp_path / "other", VERSION, "--key", shutil.copy(place, tmp_path / "copied.key"))
    assert as_another.returncode == 3
    assert "--test-key" in as_another.stderr


# -- changed ------------------------------------------------------------------------------------------------------------
def flip(path: Path, at: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def replace_by_link(path: Path) -> None:
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


def sign_again(folder: Path, number: "bytes | None" = None) -> None:
    """By another key (of the same number, where it is given), whose public half comes to lie beside it."""
    pair = minisign.KeyPair.generate()
    secret = bytearray(base64.b64decode(pair.secret_key.to_base64()))
    secret[54:62] = number or secret[54:62]
    attacker = minisign.SecretKey.from_base64(base64.b64encode(secret))
    data = (folder / "release.json").read_bytes().replace(b"1.2.0", b"6.6.6")
    (folder / "release.json").write_bytes(data)
    signature = attacker.sign(data, untrusted_comment=keys.COMMENT, trusted_comment="edgebuild release 6.6.6")
    (folder / "release.json.minisig").write_bytes(bytes(signature) + b"\n")
    (folder / "release.key.pub").write_bytes(bytes(attacker.get_public_key()) + b"\n")


CHANGES: dict[str, tuple[Callable[[Path], object], Sequence[str]]] = {
    "one byte of an archive": (lambda out: flip(out / "one.tar", 700), ["one.tar: was changed"]),
    "one byte of evidence": (lambda out: flip(out / "one.evidence.json", 20), ["one.evidence.json: was changed"]),
    "longer": (lambda out: (out / "one.tar").open("ab").write(b"x"), ["one.tar: was changed: 10,241 bytes, listed are 10,240"]),
    "empty": (lambda out: (out / "one.tar").write_bytes(b""), ["one.tar: was changed"]),
    "removed": (lambda out: (out / "one.tar").unlink(), ["one.tar: is missing"]),
    "added": (lambda out: (out / "two.tar").write_bytes(b""), ["two.tar: was added"]),
    "hidden": (lambda out: (out / ".gitignore").write_bytes(b""), [".gitignore: was added"]),
    "a folder": (lambda out: (out / "more").mkdir(), ["more: was added"]),
    "a name of a terminal's commands": (lambda out: (out / "\x1b[2J").mkdir(), ["\\u001b[2J: was added"]),
    "renamed": (lambda out: (out / "one.tar").rename(out / "two.tar"), ["one.tar: is missing", "two.tar: was added"]),
    "a link to the same bytes": (lambda out: replace_by_link(out / "one.tar"), ["one.tar: is a link"]),
    "a hard link": (lambda out: os.link(out / "one.tar", out.parent / "x"), ["one.tar: is a hard link"]),
    "a pipe": (
        lambda out: ((out / "one.tar").unlink(), os.mkfifo(out / "one.tar")),
        ["one.tar: is no plain file"],
    ),
    "a folder in its place": (lambda out: ((out / "one.tar").unlink(), (out / "one.tar").mkdir()), ["one.tar: is no plain file"]),
    "executable": (lambda out: (out / "one.tar").chmod(0o755), ["one.tar: was made executable"]),
    "executable for others": (lambda out: (out / "one.tar").chmod(0o645), ["one.tar: was made executable"]),
    "two of them": (
        lambda out: (flip(out / "one.tar"), (out / "one.tar").chmod(0o755), (out / "one.evidence.json").unlink()),
        ["one.evidence.json: is missing", "one.tar: was changed; was made executable"],
    ),
    "the list is a link": (lambda out: replace_by_link(out / "release.json"), ["release.json: is a link"]),
    "the list is executable": (lambda out: (out / "release.json").chmod(0o755), ["release.json: was made executable"]),
    "no list": (lambda out: (out / "release.json").unlink(), ["release.json: is missing"]),
    "no signature": (lambda out: (out / "release.json.minisig").unlink(), ["release.json.minisig: is missing"]),
    "an empty signature": (lambda out: (out / "release.json.minisig").write_bytes(b""), ["release.json: is not signed by"]),
    "an endless list": (
        lambda out: os.truncate(out / "release.json", 1 << 40),
        ["release.json: was changed: it has more than 16,777,216 bytes"],
    ),
    "signed again": (sign_again, ["release.json: is not signed by the key"]),
    "signed again by a key of the same number": (
        lambda out: sign_again(out, base64.b64decode((out / "release.json.minisig").read_bytes().splitlines()[1])[2:10]),
        ["release.json: is not signed by the key"],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_refused_and_named(change: str, released: Released, tmp_path: Path) -> None:
    out = released.copy(tmp_path)
    alter, sentences = CHANGES[change]
    alter(out)
    result = released.verify(out)
    assert (result.returncode, result.stderr) == (1, ""), result.stderr
    for sentence in sentences:
        assert sentence in result.stdout
    assert len(result.stdout.splitlines()) == len(sentences) + 1  # and nothing else is blamed


def test_an_executable_file_that_is_none_any_more(tmp_path: Path, key: Path) -> None:
    """Releases have no executable files today; the list can have them."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "tool").write_bytes(b"#!")
    (folder / "tool").chmod(0o755)
    made = keys.load(str(key), "")
    (entry,) = signed.entries(folder)
    assert entry["executable"]
    signed.write(folder, {"version": "1.0.0", "commit": None, "test_key": False}, [entry], made, "x")
    public = keys.parsed(made.public)
    assert signed.verify(str(folder), public)[1] == []
    (folder / "tool").chmod(0o644)
    assert signed.verify(str(folder), public)[1] == ["tool: is not executable any more"]


@pytest.mark.parametrize("name", ["release.json", "release.json.minisig"])
def test_every_bit_of_the_list_and_its_signature_counts(name: str, released: Released, tmp_path: Path) -> None:
    """Of the signature file those too that minisign does not look at: its untrusted comment."""
    out = released.copy(tmp_path)
    public = keys.read_public(str(released.public))
    whole = (out / name).read_bytes()
    for at in range(len(whole)):
        for bit in (1, 32, 128):
            (out / name).write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            assert signed.verify(str(out), public)[1], f"byte {at} of {name}"
    for other in (whole[:-1], whole + b"\n", whole.replace(b"\n", b"\r\n")):
        (out / name).write_bytes(other)
        assert signed.verify(str(out), public)[1]


@pytest.mark.parametrize(
    "entry",
    [
        '{"path": "../x", "size": 1, "sha256": "", "executable": false}',
        '{"path": "/etc/passwd", "size": 1, "sha256": "", "executable": false}',
        '{"path": "release.json", "size": 1, "sha256": "", "executable": false}',
        '{"path": "x", "size": true, "sha256": "", "executable": false}',
        '{"path": "x", "size": 1, "sha256": "", "executable": 0}',
        '{"path": "x"}',
        "1",
        '{"path": "x", "size": 1, "sha256": "", "executable": false}, {"path": "x", "size": 1, "sha256": "", "executable": false}',
    ],
)
def test_a_list_of_another_form_is_not_followed(entry: str, tmp_path: Path, key: Path) -> None:
    """Though it is signed: it may be of an edgebuild to come, or of somebody who has the key and no business elsewhere on the disk."""
    made = keys.load(str(key), "")
    data = f'{{"edgebuild": 1, "version": "1.0.0", "files": [{entry}]}}'.encode()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "release.json").write_bytes(data)
    (tmp_path / "out" / "release.json.minisig").write_bytes(made.sign(data, "x"))
    about, problems = signed.verify(str(tmp_path / "out"), keys.parsed(made.public))
    assert about == {}
    assert "of a form" in problems[0]


def test_what_is_trusted(released: Released, tmp_path: Path, key: Path) -> None:
    out = released.copy(tmp_path)
    bare = run(released.lab, "release", "--verify", out)
    assert bare.returncode == 3
    assert "--key" in bare.stderr
    assert run(released.lab, "release", "--verify", out, "--test-key").returncode == 3
    inside = run(released.lab, "release", "--verify", out, "--key", shutil.copy(released.public, out / "release.key.pub"))
    assert inside.returncode == 3
    assert "lies in" in inside.stderr
    (out / "release.key.pub").unlink()
    assert "1.2.0, not 1.3.0" in released.verify(out, "package.version=1.3.0").stdout
    assert released.verify(out, VERSION).returncode == 0
    for wrong, message in ((key, "no public key"), (ROOT / "README.md", "no public key"), (tmp_path / "x", "cannot be read")):
        result = run(released.lab, "release", "--verify", out, "--key", wrong)
        assert result.returncode == 3
        assert message in result.stderr
        assert "Traceback" not in result.stderr
    (tmp_path / "linked").symlink_to(out)
    assert released.verify(tmp_path / "linked").returncode == 3
    assert released.verify(tmp_path / "nothing").returncode == 3


# -- refused ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out"], "a release has a version"),
        (["out", "package.version=0.0.0"], "0.0.0"),
        (["out", "package.version=0.0.0-rc.1+x"], "0.0.0"),
        (["out", "package.version=1.2"], "no semantic version"),
        (["out", "package.version=1.2.0;id"], "no semantic version"),
        (["out", "version=1.2.0"], "a release has a version"),
        (["targets", VERSION], "not an empty folder"),
        (["dodo.py", VERSION], "not an empty folder"),
        (["dist/out", VERSION], "lies where builds write"),
        (["build", VERSION], "lies where builds write"),
    ],
)
def test_wrong_words(words: list[str], message: str, lab: Lab, key: Path) -> None:
    result = run(lab, "release", *words, "--key", key)
    assert result.returncode == 3
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (lab.root / "build").exists()  # nothing was begun


def test_wrong_keys(lab: Lab, key: Path, tmp_path: Path) -> None:
    def refused(*words: "str | Path", **environment: str) -> str:
        result = run(lab, "release", tmp_path / "out", VERSION, *words, **environment)
        assert result.returncode == 3
        assert not (tmp_path / "out").exists()
        assert not (lab.root / "build").exists()
        return result.stderr

    assert "a release is signed" in refused()
    assert "edgebuild key new" in refused("--key", tmp_path / "none")
    (tmp_path / "text").write_text("no key")
    (tmp_path / "text").chmod(0o600)
    assert "no secret key" in refused("--key", tmp_path / "text")
    assert "not allowed with" in refused("--key", key, "--test-key")
    assert "names no library" in refused("--key", "pkcs11:token=x")
    key.chmod(0o640)
    assert f"chmod 600 {key}" in refused("--key", key)
    keys.new(str(tmp_path / "locked.key"), "a password")
    assert keys.PASSWORD in refused("--key", tmp_path / "locked.key")
    assert "wrong password" in refused("--key", tmp_path / "locked.key", **{keys.PASSWORD: "another"})


def gate(lab: Lab, text: str) -> None:
    (lab.root / "targets" / "one.yaml").write_text(f"{TARGET}gates: {text}\n")
    commit(lab)


def day(days: int) -> str:
    return (datetime.now(UTC) + timedelta(days=days)).date().isoformat()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{cosine: {min: 2}}", "gate cosine FAIL"),
        ("{latency_ratio: {max: 2, required: true}}", "gate latency_ratio INCONCLUSIVE, and it is required"),
        ("{latency_ratio: {max: 2}}", ""),
        (f'{{cosine: {{min: 2, waive: {{reason: known, until: "{day(1)}"}}}}}}', ""),
        (
            f'{{cosine: {{min: 2, waive: {{reason: known, until: "{day(-2)}"}}}}}}',
            f"one: gate cosine FAIL, and its waiver ended on {day(-2)}",
        ),
        ('{cosine: {min: 2, waive: {reason: known, until: "2099-02-31"}}}', "2099-02-31, which is no date"),
        (f'{{cosine: {{min: 0.5, waive: {{reason: not needed, until: "{day(-2)}"}}}}}}', ""),
        (
            f'{{latency_ratio: {{max: 2, required: true, waive: {{reason: known, until: "{day(-2)}"}}}}}}',
            "gate latency_ratio INCONCLUSIVE, and its waiver ended",
        ),
        (f'{{latency_ratio: {{max: 2, required: true, waive: {{reason: known, until: "{day(1)}"}}}}}}', ""),
    ],
    ids=[
        "fails",
        "required",
        "open",
        "waived",
        "waiver over",
        "no date",
        "waiver not needed",
        "required, over",
        "required, waived",
    ],
)
def test_gates(text: str, message: str, lab: Lab, key: Path, tmp_path: Path) -> None:
    gate(lab, text)
    result = run(lab, "release", tmp_path / "out", VERSION, "--key", key)
    assert message in result.stderr
    assert result.returncode == (1 if message else 0), result.stderr
    assert (tmp_path / "out").exists() is not bool(message)


def test_a_waiver_holds_through_its_last_day() -> None:
    failed = {"name": "cosine", "verdict": "FAIL", "required": False, "reason": "x", "waived": {"until": "2026-11-30"}}
    assert release._stops(failed, datetime(2026, 11, 30, tzinfo=UTC).date()) == ""
    assert "ended on 2026-11-30" in release._stops(failed, datetime(2026, 12, 1, tzinfo=UTC).date())


DIRT: dict[str, Callable[[Lab], object]] = {
    "changed": lambda lab: (lab.root / "platforms" / "fake.yaml").open("a").write("# x\n"),
    "untracked": lambda lab: (lab.root / "targets" / "it's new.txt").write_text("x"),
    "staged": lambda lab: ((lab.root / "b").write_text("x"), git(lab, "add", "b")),
    "removed": lambda lab: (lab.root / ".gitignore").unlink(),
    "renamed": lambda lab: git(lab, "mv", "model.gguf", "other.gguf"),
    "executable": lambda lab: (lab.root / "model.gguf").chmod(0o755),
    "changed, and git told to look away": lambda lab: (
        git(lab, "update-index", "--assume-unchanged", "model.gguf"),
        write_model(lab.root / "model.gguf", "other"),
    ),
    "changed, and git told to skip it": lambda lab: (
        git(lab, "update-index", "--skip-worktree", "model.gguf"),
        write_model(lab.root / "model.gguf", "other"),
    ),
    "untracked, and git told not to show it": lambda lab: (
        git(lab, "config", "status.showUntrackedFiles", "no"),
        (lab.root / "b").write_text("x"),
    ),
}


@pytest.mark.parametrize("dirt", DIRT)
def test_a_dirty_tree(dirt: str, lab: Lab, key: Path, tmp_path: Path) -> None:
    DIRT[dirt](lab)
    result = run(lab, "release", tmp_path / "out", VERSION, "--key", key)
    assert result.returncode == 1
    assert "the git tree is dirty: '" in result.stderr or 'the git tree is dirty: "' in result.stderr
    assert not (lab.root / "build").exists()
    assert not (tmp_path / "out").exists()


def test_a_project_inside_a_repository(tmp_path: Path, key: Path) -> None:
    """Of its tree all counts, but for what builds make, ignored or not."""
    lab = make_lab(tmp_path / "repository" / "project")
    whole = Lab(tmp_path / "repository")
    git(whole, "init", "-q")
    assert "git cannot say" in run(lab, "release", tmp_path / "out", VERSION, "--key", key).stderr  # there is no commit yet
    commit(whole)
    assert run(lab).returncode == 0
    assert "build" in git(whole, "status", "--porcelain", "-uall")
    result = run(lab, "release", tmp_path / "out", VERSION, "--key", key)
    assert result.returncode == 0, result.stderr
    (whole.root / "build").write_text("not a build's")
    assert "'build'" in run(lab, "release", tmp_path / "again", VERSION, "--key", key).stderr


def test_into_a_folder_of_the_repository(lab: Lab, key: Path) -> None:
    """Where it is not ignored, it makes the tree dirty for the next one: that says so."""
    assert run(lab, "release", "out", VERSION, "--key", key).returncode == 0
    again = run(lab, "release", "again", VERSION, "--key", key)
    assert again.returncode == 1
    assert "'out/one.evidence.json', 'out/one.tar'" in again.stderr
    assert not (lab.root / "again").exists()


def test_without_git(tmp_path: Path, key: Path) -> None:
    lab = make_lab(tmp_path / "project")
    result = run(lab, "release", tmp_path / "out", VERSION, "--key", key)
    assert result.returncode == 0
    assert "no git repository" in result.stdout
    assert json.loads((tmp_path / "out" / "release.json").read_text())["commit"] is None
    under_git(lab)
    missing = run(lab, "release", tmp_path / "other", VERSION, "--key", key, PATH=str(tmp_path))
    assert missing.returncode == 1
    assert "install git" in missing.stderr


def test_targets_that_cannot_be_released(lab: Lab, key: Path, tmp_path: Path) -> None:
    target = lab.root / "targets" / "one.yaml"
    for text, status, message in (
        (TARGET + "package: {archive: false}\n", 3, "one makes no archive"),
        (TARGET + "default: false\n", 3, "no default target"),
        ("nonsense: 1\n", 3, "unknown key"),
    ):
        target.write_text(text)
        commit(lab)
        result = run(lab, "release", tmp_path / "out", VERSION, "--key", key)
        assert (result.returncode, message in result.stderr) == (status, True), result.stderr
    target.write_text(TARGET)
    write_model(lab.root / "model.gguf", "!abort")
    commit(lab)
    result = run(lab, "release", tmp_path / "out", VERSION, "--key", key)
    assert result.returncode == 1
    assert "nothing was released" in result.stderr
    assert not (tmp_path / "out").exists()


def test_only_default_targets_all_of_them(lab: Lab, key: Path, tmp_path: Path) -> None:
    (lab.root / "targets" / "two.yaml").write_text(TARGET)
    (lab.root / "targets" / "three.yaml").write_text(TARGET + "default: false\n")
    commit(lab)
    assert run(lab, "release", tmp_path / "out", VERSION, "--key", key).returncode == 0
    names = {path.name for path in (tmp_path / "out").iterdir()} - {"release.json", "release.json.minisig"}
    assert names == {"one.tar", "one.evidence.json", "two.tar", "two.evidence.json"}


# -- nothing half made, nothing told ------------------------------------------------------------------------------------
def test_what_moves_meanwhile_is_not_released(lab: Lab, tmp_path: Path, key: Path) -> None:
    """Between the build and the copy: an archive edited by hand, an input edited, another commit."""
    os.chdir(lab.root)
    made = keys.load(str(key), "")

    def build(then: Callable[[], object]) -> Callable[[list[str]], int]:
        def run_then(words: list[str]) -> int:
            status = subprocess.run([str(BIN / "doit"), *words], capture_output=True, check=False).returncode
            then()
            return status

        return run_then

    edits: list[Callable[[], object]] = [
        lambda: ((lab.root / "dist/one.tar").chmod(0o644), flip(lab.root / "dist/one.tar", 600)),
        lambda: flip(lab.root / "dist/one.evidence.json", 600),
        lambda: write_model(lab.root / "model.gguf", "another"),
        lambda: ((lab.root / "new").write_text("x"), commit(lab)),
    ]
    for edit in edits:
        with pytest.raises(StepFailed):
            release.make(str(tmp_path / "out"), "1.2.0", made, build(edit))
        assert not (tmp_path / "out").exists()
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]
        git(lab, "checkout", "-q", ".")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(number: signal.Signals, lab: Lab, key: Path, tmp_path: Path) -> None:
    write_model(lab.root / "model.gguf", "!slow30")
    commit(lab)
    command = [str(BIN / "edgebuild"), "release", str(tmp_path / "out"), VERSION, "--key", str(key)]
    process = subprocess.Popen(command, cwd=lab.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ends(lambda: (lab.root / "build/one/assess.json").exists())
    time.sleep(0.3)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    ends(lambda: not left_behind(str(lab.root)))
    assert not (tmp_path / "out").exists()


def test_what_a_crash_left_goes(lab: Lab, key: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.release-999999999.1").mkdir()
    (tmp_path / ".out.release-999999999.1" / "one.tar").write_bytes(b"half")
    (tmp_path / "out").mkdir()  # empty: it may be there
    assert run(lab, "release", tmp_path / "out", VERSION, "--key", key).returncode == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_a_secret_is_nowhere_but_in_its_file(lab: Lab, tmp_path: Path) -> None:
    password = "correct-horse-battery-staple"
    assert run(lab, "key", "new", tmp_path / "one.key", **{keys.PASSWORD: password}).returncode == 0
    opened = minisign.SecretKey.from_file(tmp_path / "one.key")
    assert opened.is_encrypted()
    opened.decrypt(password)
    bare = base64.b64decode(opened.to_base64())[62:94]
    made = run(lab, "release", tmp_path / "out", VERSION, "--key", tmp_path / "one.key", **{keys.PASSWORD: password})
    assert made.returncode == 0, made.stderr
    secrets = [password.encode(), bare, base64.b64encode(bare)[:40], (tmp_path / "one.key").read_bytes().splitlines()[1]]
    read = [
        path for folder in (lab.root, tmp_path / "out") for path in folder.rglob("*") if path.is_file() and not path.is_symlink()
    ]
    assert len(read) > 40
    for path in read:
        assert not any(secret in path.read_bytes() for secret in secrets), path
    assert not any(secret.decode(errors="replace") in made.stdout + made.stderr for secret in secrets)


def test_no_process_that_a_release_starts_inherits_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(keys.PASSWORD, "x")
    assert keys.password() == "x"
    assert keys.PASSWORD not in os.environ


def test_a_pair_of_keys(lab: Lab, tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        assert run(lab, "key", "new", tmp_path / "a.key").returncode == 0
    finally:
        os.umask(old)
    assert (tmp_path / "a.key").stat().st_mode & 0o777 == 0o600
    before = (tmp_path / "a.key").read_bytes()
    assert run(lab, "key", "new", tmp_path / "a.key").returncode == 3
    (tmp_path / "b.key.pub").write_text("mine")
    taken = run(lab, "key", "new", tmp_path / "b.key")
    assert taken.returncode == 3
    assert "exists already" in taken.stderr
    assert not (tmp_path / "b.key").exists()
    assert (tmp_path / "a.key").read_bytes() == before
    assert run(lab, "key", "public", tmp_path / "a.key").stdout == (tmp_path / "a.key.pub").read_text()


def test_an_encrypted_key_is_minisigns_too(tmp_path: Path) -> None:
    needs("minisign")
    keys.new(str(tmp_path / "a.key"), "a password")
    (tmp_path / "file").write_text("x")
    command = ["minisign", "-Sm", str(tmp_path / "file"), "-s", str(tmp_path / "a.key")]
    result = subprocess.run(command, input="a password\n", capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    command = ["minisign", "-Vm", str(tmp_path / "file"), "-p", str(tmp_path / "a.key.pub")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_key_in_a_token(lab: Lab, tmp_path: Path) -> None:
    """SoftHSM: what it signs is what minisign verifies."""
    token = tokens.make(tmp_path / "hsm")
    token.take(1, made(tmp_path, "models", key=Ed25519PrivateKey.generate()), "models")
    uri, given = token.uri("models"), {**token.environment, keys.PASSWORD: tokens.PIN}
    (tmp_path / "t.pub").write_text(run(lab, "key", "public", uri, **given).stdout)
    for name in ("first", "second"):
        result = run(lab, "release", tmp_path / name, VERSION, "--key", uri, **given)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "first/release.json.minisig").read_bytes() == (tmp_path / "second/release.json.minisig").read_bytes()
    assert run(lab, "release", "--verify", tmp_path / "first", "--key", tmp_path / "t.pub").returncode == 0
    command = ["minisign", "-Vm", str(tmp_path / "first/release.json"), "-p", str(tmp_path / "t.pub")]
    assert shutil.which("minisign") is None or subprocess.run(command, capture_output=True, check=False).returncode == 0
    for other, pin, message in (
        (uri, "4321", "PinIncorrect"),
        (uri, "", keys.PASSWORD),
        (uri.replace("models", "none"), tokens.PIN, "no Ed25519"),
        (uri.replace("token=t", "token=u"), tokens.PIN, "No token"),
        (uri.replace("hsm2.so", "hsm3.so"), tokens.PIN, "libsofthsm3"),
        (f"{uri}&pin-value={tokens.PIN}", "", "pin-value has no place"),
    ):
        result = run(lab, "release", tmp_path / "third", VERSION, "--key", other, **{**given, keys.PASSWORD: pin})
        assert (result.returncode, message in result.stderr) == (3, True), result.stderr
        assert result.stderr.count("\n") == 1
        assert tokens.PIN not in result.stdout + result.stderr


def test_a_large_archive_is_never_in_memory(tmp_path: Path, key: Path) -> None:
    """Copied, listed and verified by a process that may not have as much memory as the file has bytes."""
    size = 1 << 30
    with (tmp_path / "large.tar").open("wb") as file:
        file.truncate(size)
    (tmp_path / "out").mkdir()
    script = f"""
import resource
from pathlib import Path
from edgebuild import keys, release, signed
key = keys.load({str(key)!r}, "")
resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
release._copy("large.tar", Path("out/large.tar"))
signed.write(Path("out"), {{"version": "1.0.0", "commit": None, "test_key": False}}, signed.entries(Path("out")), key, "x")
assert signed.verify("out", keys.parsed(key.public))[1] == []
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


def test_a_bundle_signed_with_the_test_key(lab: Lab, monkeypatch: pytest.MonkeyPatch, key: Path) -> None:
    """Of a kind that is signed, in a target that names no key: for a test release alone."""
    monkeypatch.setitem(SIGNED, "folder", SIGNED["firmware"])
    os.chdir(lab.root)
    own, project = keys.load(str(key), ""), Project(version="1.2.0")
    assert not project.problems
    with pytest.raises(UserError, match="one has a bundle that is signed with your test key"):
        release._check_targets(project, own)
    release._check_targets(project, replace(own, test=True))
