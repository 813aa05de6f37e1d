"""`edgebuild verify`: a target rebuilt apart is held against what lies there; the store against its own names and keys."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgebuild import digest, fsck
from edgebuild import verify as verification
from edgebuild.files import sealed, unsealed
from edgebuild.fresh import Fresh
from edgebuild.memo import Memo
from edgebuild.noop import NOTE
from edgebuild.process import Workers
from edgebuild.progress import Plain
from edgebuild.project import Project
from edgebuild.run import Builder
from edgebuild.store import Store
from tests.conftest import TARGET, Lab, ends, perform_here, write_model
from tests.test_cli import BIN, left_behind, run


@pytest.fixture
def built(lab: Lab) -> Lab:
    lab.build()
    return lab


def verify(lab: Lab, *words: str) -> "subprocess.CompletedProcess[str]":
    result = run(lab, "verify", *words, program="edgebuild")
    assert "Traceback" not in result.stderr
    assert not (lab.root / ".edgebuild" / "tmp").exists() or not list((lab.root / ".edgebuild" / "tmp").iterdir())
    return result


def verify_here(lab: Lab) -> tuple[bool, str]:
    """As the command does, but in this process, workers too; → whether all is equal, what it would print."""
    os.chdir(lab.root)
    project = Project()
    found = verification.verify(project, "one", Builder(project, Fresh(project), Workers(), perform_here), Plain())
    verification.doubt(project, found)
    project.memo.save()
    return not any(one.differences for one in found), verification.show(found, "one")


def check_here(lab: Lab) -> tuple[str, ...]:
    """What `verify --store` finds damaged."""
    os.chdir(lab.root)
    return fsck.check(Project().store, lambda size: None, lambda: None).damaged


# -- verify TARGET --------------------------------------------------------------------------------------------------------
def test_equal(built: Lab) -> None:
    shutil.rmtree(built.root / ".edgebuild" / "objects")  # nothing is taken from the store
    before = built.outputs()
    result = verify(built, "one")
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[0] for line in lines if line[1] == "rebuilt"] == [
        f"{verb}:one" for verb in ("fetch", "assess", "convert", "quantize", "package")
    ]
    assert [line[1] for line in lines if line[0] == "equal"] == [
        "build/one/fetch/source.json",
        "build/one/assess/facts.json",
        "build/one/convert/model",
        "build/one/quantize/model",
        "dist/one",
        "dist/one.tar",
    ]
    assert "different" not in result.stdout
    assert built.outputs() == before
    assert not (built.root / ".edgebuild" / "objects").exists()


def test_a_source_and_data_outside_the_project(lab: Lab) -> None:
    write_model(lab.root.parent / "outside.gguf", "far")
    (lab.root / "targets" / "one.yaml").write_text(TARGET.replace("model.gguf", "../outside.gguf"))
    lab.build()
    assert verify_here(lab)[0]


def test_a_backend_that_makes_other_bytes_each_time(lab: Lab) -> None:
    write_model(lab.root / "model.gguf", "!random")
    lab.build()
    result = verify(lab, "one")
    assert result.returncode == 1
    assert "equal      build/one/assess/facts.json" in result.stdout
    assert "different  build/one/convert/model" in result.stdout
    assert "  build/one/convert/model/payload.json: sha256 " in result.stdout
    assert "convert:one gives other bytes each time: one cannot be reproduced" in result.stdout
    assert "changed after it was built" not in result.stdout


def edit(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


@pytest.mark.parametrize(
    ("where", "damage", "expected"),
    [
        ("dist/one/manifest.json", edit, "dist/one/manifest.json: sha256 "),
        ("dist/one/manifest.json", Path.unlink, "dist/one/manifest.json: is missing"),
        ("dist/one/manifest.json", lambda path: path.chmod(0o755), "dist/one/manifest.json: is executable, rebuilt it is not"),
        ("dist/one/extra", lambda path: path.write_bytes(b"x"), "dist/one/extra: is not made by a rebuild"),
        ("dist/one/manifest.json", link, "manifest.json is neither a file nor a directory"),
        ("dist/one", shutil.rmtree, "dist/one: is missing"),
        ("dist/one.tar", edit, "dist/one.tar: sha256 "),
        ("build/one/convert/model/payload.json", edit, "build/one/convert/model/payload.json: sha256 "),
    ],
)
def test_what_was_changed_is_found(built: Lab, where: str, damage: Callable[[Path], None], expected: str) -> None:
    before = built.outputs()
    damage(built.root / where)
    equal, text = verify_here(built)
    assert not equal
    assert expected in text
    assert text.count("different") == 1
    assert "edgebuild build:one" in text
    assert "cannot be reproduced" not in text
    built.build()
    assert built.outputs() == before
    assert verify_here(built)[0]


def test_bit_rot_under_an_unmoved_stat_is_found_and_put_right(built: Lab) -> None:
    """The memo and the remembered no-op vouch for the rotten file, as they would where a disk changes a bit by itself."""
    run(built)
    run(built)
    path = built.root / "dist" / "one" / "manifest.json"
    before = path.read_bytes()
    rot(path, built)
    assert "9 up to date" in run(built, program="edgebuild").stdout
    assert verify(built, "one").returncode == 1
    assert not (built.root / NOTE).exists()
    assert "1 restored" in run(built, program="edgebuild").stdout
    assert path.read_bytes() == before


def rot(path: Path, lab: Lab) -> None:
    """Change a byte and let every memo believe that it was always so."""
    os.chdir(lab.root)
    right = digest.of_file(str(path))
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-2] + b"?\n")
    memo = Project().memo
    memo.learn(str(path), right)
    memo.save()
    note = json.loads(unsealed((lab.root / NOTE).read_bytes())) if (lab.root / NOTE).exists() else {"seen": {}}
    for name in note["seen"]:
        if os.path.exists(name) and os.path.samefile(name, path):
            found = os.stat(name)
            note["seen"][name] = [found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino]
    if note["seen"]:
        (lab.root / NOTE).write_bytes(sealed(json.dumps(note).encode()))


@pytest.mark.parametrize("state", ["never built", "edited", "built in part"])
def test_there_must_be_something_to_compare_with(lab: Lab, state: str) -> None:
    if state == "edited":
        lab.build()
        write_model(lab.root / "model.gguf", "another")
    elif state == "built in part":
        run(lab, "quantize:one")
    result = verify(lab, "one")
    assert result.returncode == 3
    step = "package:one has not run" if state == "built in part" else "fetch:one "
    assert step in result.stderr
    assert "first: edgebuild build:one" in result.stderr
    assert "rebuilt" not in result.stdout


def test_a_gate_and_measurements_do_not_matter(built: Lab) -> None:
    """Another limit makes gate and evidence stale; the bundle's bytes are what they were."""
    (built.root / "targets" / "one.yaml").write_text(TARGET + "gates: {cosine: {min: 0.5}}\n")
    assert verify_here(built)[0]


def test_a_step_that_fails_says_why(built: Lab) -> None:
    (built.root / "targets" / "one.yaml").write_text(TARGET + "limits: {time: 10ms}\n")  # in no key: nothing is stale
    result = verify(built, "one")
    assert result.returncode == 1
    assert "took longer than its limit" in result.stderr
    assert "log: .edgebuild/logs/one/verify.log" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupt(lab: Lab, number: signal.Signals) -> None:
    write_model(lab.root / "model.gguf", "!slow2")
    lab.build()
    process = subprocess.Popen(
        [str(BIN / "edgebuild"), "verify", "one"], cwd=lab.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    while "assess:one" not in process.stdout.readline():
        pass
    time.sleep(0.5)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    ends(lambda: not left_behind(str(lab.root)), 1)  # before the worker ends by itself
    if number != signal.SIGKILL:
        assert process.returncode == 130
        assert "Traceback" not in err
        assert not list((lab.root / ".edgebuild" / "tmp").iterdir())
    assert verify(lab, "one").returncode == 0  # what a crash left behind is collected


def test_words(built: Lab) -> None:
    assert verify(built).returncode == 3
    assert verify(built, "one", "--store").returncode == 3
    wrong = verify(built, "onee")
    assert wrong.returncode == 3
    assert 'Did you mean "one"?' in wrong.stderr
    assert "edgebuild verify --store" in verify(built, "--help").stdout


# -- verify --store -------------------------------------------------------------------------------------------------------
def test_a_store_that_is_right(built: Lab) -> None:
    result = verify(built, "--store")
    assert result.returncode == 0
    objects = sum(1 for path in (built.root / ".edgebuild" / "objects").rglob("*") if path.is_file())
    assert f"{objects} objects, " in result.stdout
    assert "10 records, 0 damaged (" in result.stdout
    assert len(result.stdout.splitlines()) == 1


def of_step(lab: Lab, step: str) -> tuple[Path, Path]:
    """A step's record and the object of its first file."""
    key = json.loads((lab.root / "build" / "one" / f"{step}.json").read_text())["key"]
    record = lab.root / ".edgebuild" / "records" / key[:2] / key[2:]
    made = min(json.loads(record.read_text())["outputs"].items())[1]
    objects = lab.root / ".edgebuild" / "objects"
    tree = objects / made["digest"][:2] / made["digest"][2:]
    sha256 = json.loads(tree.read_text())[0][2] if made["tree"] else made["digest"]
    return record, objects / sha256[:2] / sha256[2:]


def test_a_damaged_object_is_removed_and_made_again(built: Lab) -> None:
    """Through a hard link, what lies in build/ is damaged too; the memo vouches for both."""
    run(built)
    run(built)
    before = built.outputs()
    record, path = of_step(built, "convert")
    lies = built.root / "build" / "one" / "convert" / "model" / "payload.json"
    hard_linked = os.path.samefile(path, lies)
    rot(path, built)
    assert "9 up to date" in run(built, program="edgebuild").stdout  # nobody notices
    result = verify(built, "--store")
    assert result.returncode == 1
    assert f"object {path.parent.name}{path.name}: its content is another one" in result.stdout
    assert (
        f"record {record.parent.name}{record.name} (convert:one): object {path.parent.name}{path.name} is missing"
        in result.stdout
    )
    assert not path.exists()
    assert not record.exists()
    assert verify(built, "--store").returncode == 0
    if hard_linked:
        assert "1 ran, 0 restored, 8 up to date" in run(built, program="edgebuild").stdout
        assert record.exists()
    assert built.outputs() == before


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: path.write_bytes(b"{"), ": cannot be read"),
        (
            lambda path: path.write_text(path.read_text().replace('"scheme":"int8"', '"scheme":"int4"')),
            ": cannot be read",  # its seal is broken
        ),
        (lambda path: path.write_text(path.read_text().replace('"model":"', '"model":"f', 1)), ": cannot be read"),
        (lambda path: path.rename(path.with_name("0" * 62)), "(quantize:one): its key"),
    ],
)
def test_a_damaged_record(built: Lab, damage: Callable[[Path], object], expected: str) -> None:
    record, _ = of_step(built, "quantize")
    record.chmod(0o644)
    damage(record)
    damaged = check_here(built)
    assert len(damaged) == 1
    assert expected in damaged[0]
    assert not record.exists()
    assert check_here(built) == ()
    shutil.rmtree(built.root / "build")
    outcomes = built.build()
    assert outcomes["quantize:one"] == "ran"
    assert outcomes["convert:one"] == "restored"


@pytest.mark.parametrize("kind", ["tree", "file"])
@pytest.mark.parametrize("damage", ["remove", "folder", "empty"])
def test_an_object_that_is_missing_or_something_else(built: Lab, kind: str, damage: str) -> None:
    record, path = of_step(built, "quantize")
    if kind == "tree":
        sha256 = json.loads(record.read_text())["outputs"]["model"]["digest"]
        path = built.root / ".edgebuild" / "objects" / sha256[:2] / sha256[2:]
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "empty":
        path.touch()
    damaged = "\n".join(check_here(built))
    assert "(quantize:one): object " in damaged
    assert ("its content is another one" in damaged) == (damage != "remove")
    assert not record.exists()
    assert not path.exists()
    assert check_here(built) == ()


def test_what_was_put_right_meanwhile_stays(built: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build publishes the object anew between the first look and the second."""
    _, path = of_step(built, "convert")
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(b"damaged")
    store = Store(str(built.root / ".edgebuild"), Memo(""))
    held = store.held

    def mends(**words):  # type: ignore[no-untyped-def]
        path.write_bytes(content)
        return held(**words)

    monkeypatch.setattr(store, "held", mends)
    assert fsck.check(store, lambda size: None, lambda: None).damaged == ()
    assert path.read_bytes() == content
