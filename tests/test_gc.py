"""`edgebuild gc` and `du`: what any project needs stays, the rest goes, and a build beside it neither fails nor loses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest

from edgebuild import fsck, gc, roots
from edgebuild.errors import UserError
from edgebuild.memo import Memo
from edgebuild.project import Project
from edgebuild.store import Store
from tests.conftest import ROOT, TARGET, Lab, make_lab, write_model
from tests.test_cli import run


def collect(lab: Lab, keep_last: int = 0, max_size: int | None = None, dry_run: bool = False) -> gc.Collection:
    os.chdir(lab.root)
    return gc.collect(Project(), keep_last, max_size, dry_run, lambda: None)


def scheme(lab: Lab, name: str, target: str = "one") -> None:
    (lab.root / "targets" / f"{target}.yaml").write_text(TARGET + f"quantize: {{scheme: {name}}}\n")


def stored(lab: Lab, store: Path | None = None) -> dict[str, int]:
    """Every object and record of a store, with its bytes."""
    folder = store or lab.root / ".edgebuild"
    paths = [path for kind in ("objects", "records") for path in (folder / kind).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_size for path in paths}


def whole(store: Path) -> bool:
    return fsck.check(Store(str(store), Memo("")), lambda size: None, lambda: None).damaged == ()


@pytest.fixture
def twice(lab: Lab) -> Lab:
    """Built as int8, then as int4, which is what it is now."""
    lab.build()
    scheme(lab, "int4")
    lab.build()
    return lab


def test_what_no_receipt_needs_goes(twice: Lab) -> None:
    before, outputs = stored(twice), twice.outputs()
    dry = collect(twice, dry_run=True)
    assert stored(twice) == before
    found = collect(twice)
    assert found == dry
    assert set(found.records.values()) == {
        f"{verb}:one" for verb in ("quantize", "evaluate", "benchmark", "gate", "package", "build")
    }
    assert found.freed == sum(before.values()) - sum(stored(twice).values()) > 0
    assert found.needed == sum(stored(twice).values())
    assert whole(twice.root / ".edgebuild")
    assert collect(twice).records == {}
    assert set(twice.build().values()) == {"fresh"}
    shutil.rmtree(twice.root / "build")
    shutil.rmtree(twice.root / "dist")
    found = collect(twice, dry_run=True)
    assert found.needed == 0
    assert set(twice.build().values()) == {"restored"}
    assert twice.outputs() == outputs


def test_what_is_kept_restores_and_what_is_not_runs_again(twice: Lab) -> None:
    collect(twice, keep_last=2)
    scheme(twice, "int8")
    assert twice.ran() == set()
    collect(twice)
    scheme(twice, "int4")
    assert twice.ran() == {f"{verb}:one" for verb in ("quantize", "evaluate", "benchmark", "gate", "package")}


def test_keep_last_counts_what_was_used_last(twice: Lab) -> None:
    """Three schemes; int8 is made first but used again, so that int4 is the oldest."""
    (twice.root / "targets" / "one.yaml").write_text(TARGET + "quantize: {group_size: 64}\n")
    twice.build()
    scheme(twice, "int8")
    assert twice.ran() == set()
    scheme(twice, "int4")
    os.chdir(twice.root)
    found = collect(twice, keep_last=2, dry_run=True)
    store = Project().store
    assert {
        store.record(key).components["recipe"]["params"]["scheme"]
        for key, name in found.records.items()
        if name == "quantize:one"
    } == {"int4"}  # type: ignore[union-attr]


def test_max_size_drops_the_oldest_first(lab: Lab) -> None:
    for text in ("a", "b", "c"):
        write_model(lab.root / "model.gguf", text)
        lab.build()
    total = sum(stored(lab).values())
    assert collect(lab, max_size=total).records == {}
    one_less = collect(lab, max_size=total - 1, dry_run=True)
    assert list(one_less.records.values()) == ["fetch:one"]  # the oldest alone
    needed = one_less.needed
    found = collect(lab, max_size=needed + (total - needed) // 2)
    assert sum(stored(lab).values()) == found.needed + found.spare <= needed + (total - needed) // 2
    assert found.spare > 0
    write_model(lab.root / "model.gguf", "b")
    assert "package:one" not in lab.ran()
    assert whole(lab.root / ".edgebuild")


def test_max_size_below_what_is_needed_is_said(twice: Lab) -> None:
    result = run(twice, "gc", "--max-size", "1kB", program="edgebuild")
    assert result.returncode == 1
    assert "what must stay has" in result.stderr
    assert "more than --max-size 1 kB" in result.stderr
    assert set(twice.build().values()) == {"fresh"}


def test_damaged_records_and_lone_objects_go(lab: Lab) -> None:
    lab.build()
    before = stored(lab)
    store = lab.root / ".edgebuild"
    (store / "records" / "ab").mkdir(exist_ok=True)  # a key of ours may begin so
    (store / "records" / "ab" / ("c" * 62)).write_text("{")
    (store / "objects" / "zz").mkdir()
    (store / "objects" / "zz" / ("0" * 62)).mkdir()
    (store / "objects" / "zz" / ("1" * 62)).write_text("lone")
    found = collect(lab)
    assert found.records == {"ab" + "c" * 62: ""}
    assert len(found.objects) == 2
    assert stored(lab) == before
    assert set(lab.build().values()) == {"fresh"}


def test_unfinished_downloads_and_logs_of_targets_that_are_no_more(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.build()
    state = lab.root / ".edgebuild"
    for path in ("partial/old", "partial/new", "logs/one/convert.log", "logs/gone/convert.log"):
        (state / path).parent.mkdir(parents=True, exist_ok=True)
        (state / path).write_text("x" * 10)
    monkeypatch.setattr(gc, "UNFINISHED", 0.0)
    time.sleep(0.05)
    os.utime(state / "partial" / "new", (time.time() + 1000,) * 2)
    found = collect(lab)
    assert found.rest == {".edgebuild/partial/old": 10, ".edgebuild/logs/gone": 10}
    assert [path.name for path in (state / "partial").iterdir()] == ["new"]
    assert [path.name for path in (state / "logs").iterdir()] == ["one"]


# -- several projects, one store ------------------------------------------------------------------------------------------
@pytest.fixture
def two(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Lab, Lab]:
    """Two projects that share a store, of different models."""
    monkeypatch.setenv("EDGEBUILD_STORE", str(tmp_path / "store"))
    other = make_lab(tmp_path / "other")
    write_model(other.root / "model.gguf", "another, so long that no report is that of the first")
    lab.build()
    other.build()
    return lab, other


def test_what_another_project_needs_stays(two: tuple[Lab, Lab], tmp_path: Path) -> None:
    one, other = two
    outputs = other.outputs()
    assert collect(one).records == {}
    shutil.rmtree(other.root / "build")
    shutil.rmtree(other.root / "dist")
    assert set(other.build().values()) == {"restored"}
    assert other.outputs() == outputs
    shutil.rmtree(other.root)
    found = collect(one)
    assert [root.folder for root in found.gone] == [str(other.root)]
    assert len(found.records) == 10
    assert f"removed   {other.root} from the projects" in gc.show(found, dry_run=False)
    assert len(list((tmp_path / "store" / "projects").iterdir())) == 1
    assert set(one.build().values()) == {"fresh"}


@pytest.mark.parametrize("why", ["another machine's", "another file system's", "a mount point", "a torn file"])
def test_a_project_that_cannot_be_seen_now(two: tuple[Lab, Lab], tmp_path: Path, why: str) -> None:
    """Nothing is removed: it may come back. A way to do without it is named, and works."""
    one, other = two
    scheme(one, "int4")
    one.build()
    before = stored(one, tmp_path / "store")
    note = next(path for path in (tmp_path / "store" / "projects").iterdir() if str(other.root) in path.read_text())
    known = json.loads(note.read_text())
    name = str(other.root)
    if why == "another machine's":  # where another project lies at the same place
        note.write_text(json.dumps(known | {"host": "elsewhere", "inode": 1}))
        name = f"elsewhere:{name}"
    else:
        other.root.rename(tmp_path / "hidden")
    if why == "another file system's":
        note.write_text(json.dumps(known | {"device": known["device"] + 1}))
    elif why == "a mount point":
        other.root.mkdir()
    elif why == "a torn file":
        note.write_bytes(b"")
        name = str(note)
    with pytest.raises(UserError, match="cannot be seen now") as raised:
        collect(one)
    assert f"edgebuild gc --forget {name}" in str(raised.value)
    assert stored(one, tmp_path / "store") == before
    assert name in run(one, "du", program="edgebuild").stdout
    assert run(one, "gc", "--forget", "/nowhere", program="edgebuild").returncode == 3
    assert run(one, "gc", "--forget", str(one.root), program="edgebuild").returncode == 3  # it is here
    result = run(one, "gc", "--forget", "*" if why == "a torn file" else name, program="edgebuild")
    assert result.returncode == 0
    assert result.stdout.startswith("removed   16 records, ")


def test_a_machine_that_has_another_name_now(two: tuple[Lab, Lab], tmp_path: Path) -> None:
    one, _ = two
    for note in (tmp_path / "store" / "projects").iterdir():
        note.write_text(json.dumps(json.loads(note.read_text()) | {"host": "before"}))
    assert collect(one).records == {}


def test_a_store_in_a_project_knows_it_by_that(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moved, copied or kept by a CI, a checkout needs no registration; and who shares its store spares what it needs."""
    lab.build()
    assert not (lab.root / ".edgebuild" / "projects").exists()
    other = make_lab(tmp_path / "other")
    write_model(other.root / "model.gguf", "other")
    monkeypatch.setenv("EDGEBUILD_STORE", str(lab.root / ".edgebuild"))
    other.build()
    assert collect(other).records == {}
    monkeypatch.delenv("EDGEBUILD_STORE")
    assert collect(lab).records == {}
    lab.root.rename(tmp_path / "moved")
    lab.root = tmp_path / "moved"
    shutil.rmtree(other.root)
    assert len(collect(lab).records) == 10
    assert set(lab.build().values()) == {"fresh"}


def test_a_project_that_cannot_be_seen_comes_back(two: tuple[Lab, Lab], tmp_path: Path) -> None:
    one, other = two
    other.root.rename(tmp_path / "hidden")
    other.root.mkdir()  # where it is mounted
    with pytest.raises(UserError):
        collect(one)
    other.root.rmdir()
    (tmp_path / "hidden").rename(other.root)
    assert collect(one).records == {}
    shutil.rmtree(other.root / "build")
    assert set(other.build().values()) == {"restored"}


def test_a_project_is_known_before_it_publishes(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEBUILD_STORE", str(tmp_path / "store"))
    keep, seen = Store.keep, []

    def watched(self: Store, record):  # type: ignore[no-untyped-def]
        seen.append([root.folder for root in map(roots._root, map(str, (tmp_path / "store" / "projects").iterdir()))])
        keep(self, record)

    monkeypatch.setattr(Store, "keep", watched)
    lab.build()
    assert seen[0] == [str(lab.root)]


# -- beside builds --------------------------------------------------------------------------------------------------------
BUILDS = """
import sys
from pathlib import Path
from tests.conftest import Lab, write_model
root, rounds, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
lab, clean, known = Lab(root), {}, set()
for number in range(rounds):
    text = "abc"[(number * 7 + seed * number // 3) % 3]
    write_model(root / "model.gguf", text)
    outcomes = lab.build()
    assert set(outcomes.values()) <= {"fresh", "ran", "restored"}, outcomes
    outputs = lab.outputs()
    assert clean.setdefault(text, outputs) == outputs, (text, outputs)
    assert "missing" not in outputs.values()
    assert set(lab.build().values()) == {"fresh"}
    print(*lab.performed, flush=True)
    lab.performed.clear()
"""
GC = """
import os, sys, time
from edgebuild import gc
from edgebuild.project import Project
os.chdir(sys.argv[1])
while True:
    found = gc.collect(Project(), int(sys.argv[2]), None, False, lambda: None)
    print(len(found.records), flush=True)
    time.sleep(0.01)
"""


def start(code: str, *words: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("keep_last", [0, 100])
def test_builds_beside_collections(two: tuple[Lab, Lab], tmp_path: Path, keep_last: int) -> None:
    """Two projects edit, revert and build; a collector runs all the time and is killed again and again."""
    rounds = int(os.environ.get("EDGEBUILD_ROUNDS", "12"))
    builds = [start(BUILDS, lab.root, rounds, seed) for seed, lab in enumerate(two, 1)]
    deadline, removed, killed = time.monotonic() + 300, 0, 0
    while any(build.poll() is None for build in builds):
        assert time.monotonic() < deadline
        with start(GC, two[killed % 2].root, keep_last) as collector:
            assert collector.stdout
            assert collector.stderr
            out = collector.stdout.readline()  # one collection at least, however slow the machine
            time.sleep(0.5)
            collector.send_signal(signal.SIGKILL)
            out += collector.stdout.read()
            err = collector.stderr.read()
        assert "Error" not in err, err
        removed += sum(map(int, out.split()))
        killed += 1
    results = [build.communicate() for build in builds]
    assert [build.returncode for build in builds] == [0, 0], results
    performed = [word for out, _ in results for word in out.split()]
    if keep_last:
        assert len(set(performed)) == len(performed), "worked twice"
    else:
        assert removed > 0
    assert whole(tmp_path / "store")
    for lab in two:
        outputs = lab.outputs()
        collect(lab)
        shutil.rmtree(lab.root / "build")
        assert set(lab.build().values()) == {"restored"}
        assert lab.outputs() == outputs


def test_a_collection_that_is_cut_off_leaves_no_record_without_its_objects(twice: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before each removal in turn."""
    unlink, count = os.unlink, [0]

    def stops(path: str) -> None:
        if count[0] == 0:
            raise KeyboardInterrupt
        count[0] -= 1
        unlink(path)

    outputs = twice.outputs()
    for number in range(1000):
        count[0] = number % 2  # one removal, then none, then one …
        with monkeypatch.context() as patch:  # that undoes nothing else: no test collects the user's own toolchains
            patch.setattr(gc.os, "unlink", stops)
            try:
                collect(twice)
                break
            except KeyboardInterrupt:
                pass
        assert whole(twice.root / ".edgebuild")
    assert number > 20
    assert twice.outputs() == outputs
    assert set(twice.build().values()) == {"fresh"}


def test_a_build_waits_for_a_collection_and_says_so(lab: Lab) -> None:
    store = Store(str(lab.root / ".edgebuild"), Memo(""))
    with store.held(alone=True):
        process = subprocess.Popen([str(Path(sys.executable).parent / "doit")], cwd=lab.root, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        assert "fetch:one                        waits for edgebuild gc" in process.stdout.readline()
        assert not (lab.root / "build").exists()
    assert process.wait(timeout=60) == 0
    process.stdout.close()


def test_the_store_is_not_held_while_an_action_runs(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgebuild.backends import fake

    convert, collected = fake.convert, []

    def collects(action, facts):  # type: ignore[no-untyped-def]
        with Store(str(lab.root / ".edgebuild"), Memo("")).held(alone=True, waits=lambda: pytest.fail("the store is held")):
            collected.append(1)
        return convert(action, facts)

    monkeypatch.setattr(fake, "convert", collects)
    assert lab.build()["convert:one"] == "ran"
    assert collected


# -- the commands ---------------------------------------------------------------------------------------------------------
def test_gc_says_what_went_and_what_stayed(twice: Lab) -> None:
    dry = run(twice, "gc", "--dry-run", program="edgebuild").stdout
    assert dry.startswith("would go  6 records, ")
    result = run(twice, "gc", program="edgebuild")
    assert result.returncode == 0
    assert result.stdout == dry.replace("would go", "removed ")
    assert "            quantize:one\n" in result.stdout
    assert "kept      " in result.stdout
    assert "--max-size 20GB" in run(twice, "gc", "--help", program="edgebuild").stdout


@pytest.mark.parametrize("words", [("--max-size", "20"), ("--max-size", "0GB"), ("--keep-last=-1",), ("--keep-last", "x")])
def test_wrong_words(lab: Lab, words: tuple[str, ...]) -> None:
    result = run(lab, "gc", *words, program="edgebuild")
    assert result.returncode == 3
    assert "must be a" in result.stderr


def test_du(two: tuple[Lab, Lab], tmp_path: Path) -> None:
    """`one` of the first project and `two` share what comes before quantization; `three` is in no build yet."""
    lab, _ = two
    scheme(lab, "int4", "two")
    (lab.root / "targets" / "three.yaml").write_text(TARGET + "default: false\n")
    lab.build(["one", "two"])
    result = run(lab, "du", "--json", program="edgebuild")
    found = json.loads(result.stdout)
    jsonschema.validate(found, json.loads((ROOT / "schemas" / "du.json").read_text()))
    one, three, second = found["targets"]
    assert [share["name"] for share in found["targets"]] == ["one", "three", "two"]
    assert three == {"name": "three", "own": 0, "shared": 0, "total": 0}
    assert one["own"] + one["shared"] == one["total"] > 0
    assert one["shared"] == second["shared"] > 0
    assert found["sum"] == one["own"] + second["own"] + one["shared"]
    total = sum(stored(lab, tmp_path / "store").values())
    assert found["store"] == {"bytes": total, "needed": total, "freed": 0}
    assert total > found["sum"]  # the other project's
    (lab.root / "targets" / "two.yaml").unlink()
    assert run(lab).returncode == 0  # what it had made goes
    found = json.loads(run(lab, "du", "--json", program="edgebuild").stdout)
    assert found["store"]["freed"] >= second["own"]
    assert collect(lab).freed == found["store"]["freed"]
    text = run(lab, "du", program="edgebuild").stdout
    assert "all targets, shared counted once" in text
    assert "edgebuild gc would free 0 B" in text
