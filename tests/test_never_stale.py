"""Each edit runs exactly the steps that depend on it, and `explain` names it. On the fake backend; the real ones: journeys."""

import errno
import hashlib
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from edgebuild import fresh, noop, shipped
from edgebuild.explain import explain
from edgebuild.fresh import Fresh, remember
from edgebuild.memo import MEMO, Memo
from edgebuild.project import Project
from edgebuild.run import Builder
from edgebuild.store import Store
from tests.conftest import PLATFORM, TARGET, Lab, write_model

RUNG = {"quantize.coarse", "evaluate.coarse", "choose"}  # the first recipe holds
FULL = (
    TARGET
    + "calibration: {data: calibration.npz}\nevaluate: {data: data.npz}\ngates: {quality: {min: 0.5}, flip_rate: {max: 0.9}}\n"
)


@pytest.fixture
def built(lab: Lab) -> Lab:
    rng = np.random.default_rng(0)
    np.savez(lab.root / "calibration.npz", x=rng.standard_normal((8, 4)).astype("float32"))
    np.savez(lab.root / "data.npz", x=rng.standard_normal((64, 4)).astype("float32"), labels=np.zeros(64, "int64"))
    (lab.root / "targets" / "one.yaml").write_text(FULL)
    lab.build()
    assert set(lab.build().values()) == {"fresh"}
    return lab


def ran(lab: Lab) -> set[str]:
    return {name.split(":")[0] + name.split(":")[1].removeprefix("one") for name in lab.ran()}


def reasons(lab: Lab) -> str:
    os.chdir(lab.root)
    return "\n".join(f"{state.name} {state.state} {state.reason}" for state in explain(Project(), "one"))


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_model(built: Lab) -> None:
    write_model(built.root / "model.gguf", "another")
    assert "fetch:one stale input model:" in reasons(built)
    assert ran(built) >= {"fetch", "assess", "convert", *RUNG, "evaluate", "evaluate.baseline", "package"}


def test_early_cut_off(built: Lab) -> None:
    write_model(built.root / "model.gguf", "hello # one")
    built.build()
    write_model(built.root / "model.gguf", "hello # two")  # conversion drops comments
    assert ran(built) == {"fetch", "assess", "convert", "evaluate.baseline"}  # the last holds it against its source again


def test_same_size_and_time_with_other_content(built: Lab) -> None:
    path = built.root / "model.gguf"
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "fetch" in ran(built)


def test_calibration_data(built: Lab) -> None:
    np.savez(built.root / "calibration.npz", x=np.ones((8, 4), "float32"))
    assert "quantize:one.coarse stale input calibration:" in reasons(built)
    assert "choose:one stale input calibration:" in reasons(built)
    assert "one.fine" not in reasons(built)  # it has not run: no build need run it
    assert ran(built) >= {*RUNG, "evaluate", "benchmark", "package"}
    assert ran(built) == set()


def test_evaluation_data(built: Lab) -> None:
    np.savez(built.root / "data.npz", x=np.ones((64, 4), "float32"), labels=np.ones(64, "int64"))
    assert "input data:" in reasons(built)
    assert ran(built) == {"evaluate", "evaluate.baseline", "evaluate.coarse", "choose", "gate"}


def test_quantize_parameter_and_back(built: Lab) -> None:
    target = built.root / "targets" / "one.yaml"
    target.write_text(FULL + "quantize: {scheme: int4}\n")
    assert "parameter scheme: int8 → int4" in reasons(built)
    assert ran(built) >= {*RUNG, "evaluate", "package"}
    target.write_text(FULL)
    assert "quantize:one.coarse" in reasons(built)
    assert "restorable" in reasons(built)
    assert ran(built) == set()
    assert set(built.build().values()) == {"fresh"}


def test_platform_default(built: Lab) -> None:
    (built.root / "platforms" / "fake.yaml").write_text(PLATFORM.replace("int8", "int4"))
    assert "parameter scheme: int8 → int4" in reasons(built)
    assert ran(built) >= RUNG


def test_gate_limit(built: Lab) -> None:
    """The choice depends on it and no recipe does: what was measured is looked at again."""
    replace(built.root / "targets" / "one.yaml", "min: 0.5", "min: 0.4")
    assert "choose:one stale parameter gates.quality.min: 0.5 → 0.4" in reasons(built)
    outcomes = built.build()
    assert {name for name, outcome in outcomes.items() if outcome == "ran"} == {"choose:one", "gate:one", "build:one"}
    assert outcomes["quantize:one.coarse"] == outcomes["evaluate:one.coarse"] == "restored"


def test_gate_limit_of_one_recipe(built: Lab) -> None:
    target = built.root / "targets" / "one.yaml"
    target.write_text(FULL + "quantize: {method: fine}\n")
    built.build(remembers=True)  # what is no more is swept
    assert not (built.root / "build" / "one" / "choose").exists()
    assert not (built.root / "build" / "one" / "quantize.coarse.json").exists()
    replace(target, "min: 0.5", "min: 0.4")
    assert "gate:one stale parameter gates.quality.min: 0.5 → 0.4" in reasons(built)
    assert ran(built) == {"gate"}


def test_a_gate_that_does_not_decide(built: Lab) -> None:
    """A time is measured for the chosen recipe alone, and a waived gate packs whatever it says."""
    replace(built.root / "targets" / "one.yaml", "gates: {", "gates: {latency_ratio: {max: 9}, ")
    assert ran(built) == {"gate"}
    replace(
        built.root / "targets" / "one.yaml",
        "flip_rate: {max: 0.9}",
        'flip_rate: {max: 0, waive: {reason: x, until: "2099-01-01"}}',
    )
    assert ran(built) == {"choose", "gate"}


def test_template(built: Lab) -> None:
    shutil.copytree(Path(shipped.folder("templates")) / "folder", built.root / "templates" / "folder")
    assert ran(built) == set()  # the same text in another place
    template = next(
        path
        for path in sorted((built.root / "templates" / "folder").rglob("*"))
        if path.suffix == ".j2" and "README" in path.name
    )
    template.write_text(template.read_text() + "\nmore\n")
    assert "input template/" in reasons(built)
    assert ran(built) == {"package"}


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("quality.py", {"evaluate", "evaluate.baseline", "evaluate.coarse", "choose"}),
        ("ladder.py", {"choose"}),
        ("backends/fake.py", {"convert", *RUNG, "evaluate", "evaluate.baseline", "benchmark", "package"}),
        ("bundles/folder.py", {"package"}),
        ("gates.py", {"choose", "gate"}),
        ("cli.py", set()),
        ("tasks.py", set()),
        ("explain.py", set()),
    ],
)
def test_code(built: Lab, module: str, expected: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the package with one more comment, which only `project` reads: what is imported stays."""
    copy = built.root.parent / "package" / "edgebuild"
    shutil.copytree(shipped.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    folders = {name: shipped.folder(name) for name in ("schemas", "templates")}
    for name, folder in folders.items():
        if not (copy / name).exists():
            shutil.copytree(folder, copy / name)
    monkeypatch.setattr(shipped, "PACKAGE", str(copy))
    assert ran(built) == set()
    with (copy / module).open("a") as file:
        file.write("\n# a comment\n")
    assert ran(built) == expected


def test_version_of_a_package(built: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution on the path, as pip would install it; then another version of it."""
    site = built.root.parent / "site"
    info = site / "edgebuild_fake_framework-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edgebuild-fake-framework\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(site))
    (built.root / ".edgebuild" / "plan.json").unlink(missing_ok=True)  # the path itself is another one now
    assert "version of edgebuild-fake-framework: missing → 1.0" in reasons(built)
    assert "convert" in ran(built)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edgebuild-fake-framework\nVersion: 2.0\n")
    assert "version of edgebuild-fake-framework: 1.0 → 2.0" in reasons(built)
    assert ran(built) >= {"convert", *RUNG, "evaluate"}


def test_what_changes_nothing(built: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    os.utime(built.root / "model.gguf")
    (built.root / "targets" / "one.yaml").write_text("# a comment\n" + "\n".join(reversed(FULL.splitlines())) + "\n")
    monkeypatch.setenv("PATH", "/nowhere:" + os.environ["PATH"])
    assert set(built.build().values()) == {"fresh"}


def test_a_moved_and_a_copied_checkout(built: Lab) -> None:
    moved = built.root.parent / "elsewhere"
    built.root.rename(moved)
    built.root = moved
    assert set(built.build().values()) == {"fresh"}
    shutil.copytree(moved, moved.parent / "copy")
    built.root = moved.parent / "copy"
    assert set(built.build().values()) == {"fresh"}


@pytest.mark.parametrize("removed", [True, False])
def test_what_is_delivered_before_its_first_receipt_is_listed(lab: Lab, monkeypatch: pytest.MonkeyPatch, removed: bool) -> None:
    """A build that ends between a bundle and its receipt leaves the receipt beside its place; the next one reads it there."""

    def killed(path: str, target: str) -> None:
        if path == "build/one/package.begun":
            raise KeyboardInterrupt
        os.replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr("edgebuild.run.rename_over", killed)
        with pytest.raises(KeyboardInterrupt):
            lab.build()
    begun = lab.root / "build/one/package.begun"
    assert begun.exists()
    assert (lab.root / "dist/one").exists()
    if removed:
        (lab.root / "targets/one.yaml").unlink()
    outcomes = lab.build(remembers=True)
    assert not begun.exists()
    assert (lab.root / "dist/one").exists() is not removed
    if not removed:
        assert outcomes["package:one"] == "restored"
        assert set(lab.build().values()) == {"fresh"}


def test_removed_build(built: Lab) -> None:
    shutil.rmtree(built.root / "build")
    assert set(built.build().values()) == {"restored"}


@pytest.mark.parametrize(
    "where", ["build/one/choose/model/payload.json", "dist/one/manifest.json", "dist/one.tar", "dist/one.evidence.json"]
)
def test_a_tampered_output_is_put_right(built: Lab, where: str) -> None:
    path = built.root / where
    before = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(before[:-1] + b"?")
    built.build()
    assert path.read_bytes() == before
    path.chmod(0o644)
    path.unlink()
    built.build()
    assert path.read_bytes() == before


def test_a_foreign_file_in_a_bundle_goes(built: Lab) -> None:
    (built.root / "dist" / "one" / "extra").write_text("x")
    built.build()
    assert not (built.root / "dist" / "one" / "extra").exists()


def test_an_edit_while_the_step_runs(built: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run of quantize sees the calibration data change under it: its result is never kept."""
    from edgebuild.backends import fake

    quantize, edited = fake.quantize, []

    def edits(action, facts):  # type: ignore[no-untyped-def]
        if not edited:
            edited.append(1)
            outcome = quantize(action, facts)
            np.savez(built.root / "calibration.npz", x=np.full((8, 4), 3, "float32"))
            return outcome
        return quantize(action, facts)

    monkeypatch.setattr(fake, "quantize", edits)
    np.savez(built.root / "calibration.npz", x=np.full((8, 4), 2, "float32"))
    built.build()
    incremental = built.outputs()
    shutil.rmtree(built.root / "build")
    shutil.rmtree(built.root / ".edgebuild")
    built.build()
    assert built.outputs() == incremental


@pytest.mark.parametrize("after", ["the plan", "the steps"])
def test_an_edit_of_a_target_while_it_is_built(lab: Lab, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The build ends with what it planned; the next one is of the new text, and no verdict of before hides that."""
    text = lab.root / "targets" / "one.yaml"
    edit: list[None] = [None]

    def edited() -> None:
        if edit:
            edit.pop()
            text.write_text(TARGET + "quantize: {group_size: 64}\n")

    place, name = (Builder, "run") if after == "the plan" else (fresh, "remember")
    before = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *words: (edited(), before(*words))[1])
    if after == "the steps":
        monkeypatch.setattr("tests.conftest.remember", fresh.remember)
    lab.build(remembers=True)
    assert not edit
    time.sleep(0.05)
    assert noop.recall(noop.identity()) is None
    assert lab.build(remembers=True)["quantize:one"] == "ran"
    assert noop.recall(noop.identity()) is not None


def test_what_a_build_adds_beside_what_it_reads_makes_no_new_plan(built: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation data in the project's own folder, where `build/` and `dist/` appear: that the data are there is what a plan asks."""
    for name in ("build", "dist", ".edgebuild"):
        shutil.rmtree(built.root / name)
    time.sleep(0.05)
    built.build(remembers=True)
    assert noop.recall(noop.identity()) is not None
    monkeypatch.setattr(Project, "_make", lambda project: pytest.fail("planned anew"))
    assert Project().current()
    data = built.root / "data.npz"
    data.rename("elsewhere")
    assert noop.recall(noop.identity()) is None
    os.rename("elsewhere", data)
    data.write_bytes(data.read_bytes()[:-1])
    assert noop.recall(noop.identity()) is None
    assert not Fresh(Project())(Project().steps["evaluate:one"])


def test_archive_switched_off_and_on(built: Lab) -> None:
    target = built.root / "targets" / "one.yaml"
    target.write_text(FULL + "package: {archive: false}\n")
    built.build()
    assert not (built.root / "dist" / "one.tar").exists()
    target.write_text(FULL)
    built.build()
    assert (built.root / "dist" / "one.tar").exists()


def test_a_copy_is_known_and_an_edit_of_it_at_once_is_seen(lab: Lab) -> None:
    """What we copied is not hashed again; but a write in the same tick of the file system's clock does not pass for it."""
    os.chdir(lab.root)
    memo = Memo(MEMO)
    store = Store(".edgebuild", memo)
    with store.scratch() as scratch:
        Path(scratch, "made").write_bytes(b"right")
        artifact = store.publish(f"{scratch}/made")
    for _ in range(50):
        store.materialise(artifact, "dist/copy", link=False)
        assert memo.known(os.stat("dist/copy")) == artifact.digest
        with open("dist/copy", "r+b") as file:
            file.write(b"wrong")
        assert memo.look("dist/copy") != artifact.digest


def test_what_is_large_is_on_the_disk_before_it_is_in_the_store(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is synced while it is hashed; a disk that does not take it is no less of an error then."""
    os.chdir(lab.root)
    store, synced, fsync = Store(".edgebuild", Memo(MEMO)), list[int](), os.fsync
    monkeypatch.setattr("edgebuild.store.LARGE", 1000)
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_size), fsync(handle)))
    with store.scratch() as scratch:
        folder = Path(scratch, "made")
        (folder / "deep").mkdir(parents=True)
        (folder / "deep/large").write_bytes(bytes(1000))
        (folder / "small").write_bytes(bytes(999))
        store.publish(str(folder))
    assert synced.count(1000) == 2  # and once more when it has its mode
    assert synced.count(999) == 1

    def full(handle: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with store.scratch() as scratch:
        made = Path(scratch, "made")
        made.write_bytes(b"x" * 1000)
        with pytest.raises(OSError, match="No space left"):
            store.publish(str(made))
    assert not any(name == hashlib.sha256(b"x" * 1000).hexdigest() for name, _ in store.names("objects"))


def test_a_copy_of_an_object_that_is_written_to_meanwhile_is_not_taken_as_known(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.chdir(lab.root)
    memo = Memo(MEMO)
    store = Store(".edgebuild", memo)
    with store.scratch() as scratch:
        Path(scratch, "made").write_bytes(b"right")
        artifact = store.publish(f"{scratch}/made")
    copy = shutil.copyfile

    def meddle(source: str, target: str) -> None:
        os.chmod(source, 0o644)
        Path(source).write_bytes(b"wrong")
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", meddle)
    store.materialise(artifact, "dist/copy", link=False)
    assert memo.look("dist/copy") != artifact.digest


def test_a_touched_model_makes_no_new_plan_and_a_changed_one_does(built: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    time.sleep(0.05)
    built.build()  # the plan is kept when nothing of it is racy
    plans = []
    make = Project._make
    monkeypatch.setattr(Project, "_make", lambda project: plans.append(make(project)))
    os.utime(built.root / "model.gguf")
    assert set(built.build().values()) == {"fresh"}
    assert not plans
    write_model(built.root / "model.gguf", "another")
    assert "ran" in built.build().values()
    assert not plans
    (built.root / "model.gguf").write_bytes(b"\x80\x04N.")
    built.build()
    assert plans
    assert "pickle" in Project().problems["one"]


def test_what_was_touched_and_holds_what_it_held_is_no_work(built: Lab) -> None:
    """`edgebuild` reads the files that were touched, and plans nothing where they are what they were."""
    os.chdir(built.root)

    def again() -> bool:
        memo = Memo(MEMO)
        steps = noop.recall(noop.identity(), memo.holds)
        memo.save()
        return steps is not None

    def settled() -> None:
        time.sleep(0.05)
        assert set(built.build().values()) <= {"fresh", "ran", "restored"}
        time.sleep(0.05)
        project = Project()
        remember(project, Fresh(project))
        project.memo.save()
        assert noop.recall(noop.identity()) is not None

    settled()
    output, model = Path("dist/one.tar"), Path("model.gguf")
    for path in (output, model):
        os.utime(path)
    time.sleep(0.05)
    assert noop.recall(noop.identity()) is None
    assert again()
    assert noop.recall(noop.identity()) is not None  # the note knows them as they are now

    inside = next(path for path in Path("build/one").rglob("payload.json") if path.is_file())
    os.chmod(inside, inside.stat().st_mode | 0o111)  # a folder's digest holds who may run what lies in it
    assert not again()
    settled()
    data = model.read_bytes()
    model.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert not again()
    settled()
    os.rename(output, "elsewhere")
    os.symlink(Path("elsewhere").resolve(), output)
    assert not again()
    output.unlink()
    assert not again()
    os.rename("elsewhere", output)
    settled()
    Path("targets/one.yaml").touch()
    time.sleep(0.05)
    assert again()


def at_rest(lab: Lab) -> None:
    """Build until the plan is kept: what was just edited may yet change unseen."""
    lab.build()
    time.sleep(0.05)
    lab.build()


def plans_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    real = Project._make

    def counted(self: Project) -> None:
        made.append(1)
        real(self)

    monkeypatch.setattr(Project, "_make", counted)
    return made


def test_an_edit_undone_has_its_plan_of_before(built: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    at_rest(built)
    before = built.outputs()
    target, platform = built.root / "targets" / "one.yaml", built.root / "platforms" / "fake.yaml"
    target.write_text(FULL + "quantize: {group_size: 64}\n")
    at_rest(built)
    (built.root / "targets" / "two.yaml").write_text(TARGET)
    platform.write_text(PLATFORM.replace("int8", "int4"))
    at_rest(built)
    made = plans_made(monkeypatch)
    target.write_text(FULL)
    (built.root / "targets" / "two.yaml").unlink()
    platform.unlink()  # as an editor or git writes: another file, in a folder that moved
    platform.write_text(PLATFORM)
    assert built.ran() == set()
    assert (made, built.outputs()) == ([], before)
    os.chdir(built.root)
    assert Project().recipes  # they came with it
    assert not made
    time.sleep(0.05)
    assert set(built.build().values()) == {"fresh"}
    assert not made


def test_a_plan_of_before_holds_only_for_what_it_was_made_of(built: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    at_rest(built)
    target = built.root / "targets" / "one.yaml"
    target.write_text(FULL + "quantize: {group_size: 64}\n")
    at_rest(built)
    made = plans_made(monkeypatch)
    template = built.root / "templates" / "folder" / "README.md.j2"
    template.parent.mkdir(parents=True)
    template.write_text("another")  # no text of a plan's name
    target.write_text(FULL)
    assert "package" in ran(built)
    assert made
    at_rest(built)
    os.chdir(built.root)
    made.clear()
    for version, known in (("9.9.9", True), (None, False), ("9.9.9", True)):
        assert ("9.9.9" in str(Project(version=version).recipes)) is known
    assert len(made) == 1, "each version has a plan of its own"


def test_a_text_that_changes_while_it_is_planned_leaves_no_plan(built: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgebuild.load import Targets

    at_rest(built)
    target, real = built.root / "targets" / "one.yaml", Targets.target

    def edited(self: Targets, name: str, version: str | None = None) -> object:
        found = real(self, name, version)
        target.write_text(FULL)  # back, behind the reader's back
        return found

    target.write_text(FULL.replace("a fake deliverable", "edited"))
    time.sleep(0.05)
    os.chdir(built.root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Targets, "target", edited)
        assert Project().targets["one"]["description"] == "edited"
    time.sleep(0.05)
    assert Project().targets["one"]["description"] == "a fake deliverable"


def test_an_edit_while_a_plan_is_looked_for_is_not_taken_for_the_text_before_it(built: Lab) -> None:
    """A text is read, no plan is kept of it, and another one takes its place before a plan is made: of which text is that?"""
    target, make = built.root / "targets" / "one.yaml", Project._make
    first, second = (FULL.replace("a fake", f"the {name}") for name in ("first", "second"))

    def edited(project: Project) -> None:
        target.write_text(second)
        time.sleep(0.05)
        make(project)

    os.chdir(built.root)
    target.write_text(first)
    time.sleep(0.05)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Project, "_make", edited)
        assert Project().targets["one"]["description"] == "the second deliverable"
    for text, name in ((FULL, "a fake"), (first, "the first"), (second, "the second")):
        target.write_text(text)
        time.sleep(0.05)
        assert Project().targets["one"]["description"] == f"{name} deliverable"


def test_of_plans_of_before_a_few_are_kept(built: Lab) -> None:
    from edgebuild.project import BEFORE, KEPT

    for number in range(KEPT + 3):
        (built.root / "targets" / "one.yaml").write_text(FULL.replace("a fake", f"the {number}."))
        time.sleep(0.03)
        os.chdir(built.root)
        Project()
        time.sleep(0.03)
    kept = list((built.root / BEFORE).iterdir())
    assert len(kept) == KEPT
    assert all({file.name for file in folder.iterdir()} == {"plan.json", "recipes.json"} for folder in kept)
