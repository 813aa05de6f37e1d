"""The package step: the same bytes everywhere, budgets, what is refused, and a manifest that tells every change."""

import json
import os
import re
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from edgebuild import bundle, render, shipped, signing
from edgebuild.bundles import BUNDLES, SIGNED
from edgebuild.comparison import settled_files
from edgebuild.errors import StepFailed
from edgebuild.project import Project
from tests.bundles.packing import (
    FRAMEWORK,
    GOLDEN,
    ROOT,
    Counting,
    Doubling,
    Stub,
    action,
    artifact,
    as_text,
    files,
    own_pair,
    pack,
    report,
    umask,
)
from tests.conftest import Lab

KINDS = sorted(BUNDLES)


@pytest.mark.parametrize("kind", KINDS)
def test_golden_folder(kind: str, tmp_path: Path) -> None:
    """Meant to change? `python -m tests.bundles.rewrite`."""
    expected = {path.relative_to(GOLDEN / kind).as_posix(): path.read_bytes().decode() for path in files(GOLDEN / kind)}
    assert as_text(pack(kind, tmp_path)) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_same_bytes_in_two_places_under_two_umasks(kind: str, tmp_path: Path) -> None:
    made = []
    for place, mask in ((tmp_path / "a", 0o000), (tmp_path / "another, with a longer name", 0o077)):
        with umask(mask):
            folder = pack(kind, place)
        assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_dir()} <= {0o755}
        tree = {path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mode) for path in files(folder)}
        same = settled_files(kind, folder) if kind in SIGNED else {}
        tree |= {place: (digest.encode(), tree[place][1]) for place, digest in same.items()}  # but for signatures
        made.append((tree, *(() if same else ((folder.parent / "archive").read_bytes(), report(folder)))))
    assert made[0] == made[1]


@pytest.mark.parametrize("kind", KINDS)
def test_what_every_bundle_holds(kind: str, tmp_path: Path) -> None:
    folder = pack(kind, tmp_path)
    assert bundle.verify(folder) == []
    manifest = json.loads((folder / "manifest.json").read_text())
    listed = [entry["path"] for entry in manifest["files"]]
    assert listed == sorted(path.relative_to(folder).as_posix() for path in files(folder) if path.name != "manifest.json")
    assert (manifest["name"], manifest["version"], manifest["kind"]) == (f"small-{kind}", "1.2.3", kind)
    assert manifest["isa"]
    assert manifest["framework"] == FRAMEWORK[kind]
    assert manifest["platform"] == "device"
    found = report(folder)
    sizes = sum(path.stat().st_size for path in files(folder))
    assert found["files"] == len(listed) + 1
    assert found["bytes"] == sizes == found["weights_bytes"] + found["shell_bytes"] + found.get("test_bytes", 0)
    assert found["kind"] == kind
    levels = {"android": "L1", "container": "L2", "firmware": "L3", "folder": "L4", "ios": "L1", "onnx": "L4"}
    assert found["level"] == levels[kind]
    assert bool(found["why_not_higher"]) == (found["level"] != "L4")
    assert found["tools"]
    assert found["test_key"] == (kind in ("android", "firmware"))
    jsonschema.validate(found, json.loads((ROOT / "schemas" / "evidence.json").read_text())["properties"]["bundle"])
    for path in files(folder):
        assert bool(path.stat().st_mode & 0o100) == path.read_bytes().startswith(b"#!")
        assert str(tmp_path).encode() not in path.read_bytes(), f"{path.name} names a place on this machine"


@pytest.mark.parametrize("platform", sorted(Path(shipped.PACKAGE, "platforms").iterdir()), ids=lambda path: path.stem)
def test_a_platform_describes_its_device_alone(platform: Path) -> None:
    """Bundles of every kind are "for" it, by their README."""
    assert not re.search("artifact|bundle|folder|;", yaml.safe_load(platform.read_text())["description"])


def test_archive_holds_the_bundle(tmp_path: Path) -> None:
    folder = pack("ios", tmp_path)
    with tarfile.open(folder.parent / "archive") as tar:
        members = tar.getmembers()
        tar.extractall(tmp_path / "there", filter="data")
    assert bundle.verify(tmp_path / "there" / "small-ios") == []
    assert {(one.mtime, one.uid, one.gid, one.uname, one.gname) for one in members} == {(bundle.EPOCH, 0, 0, "", "")}
    assert {one.mode for one in members} <= {0o644, 0o755}
    assert next(one.name for one in members) == "small-ios"


def test_archive_reads_no_file_whole(tmp_path: Path) -> None:
    folder = tmp_path / "big"
    folder.mkdir()
    with (folder / "weights").open("wb") as file:
        file.truncate(64 << 20)
    tracemalloc.start()
    bundle.archive(folder, "big", tmp_path / "big.tar")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20
    assert (tmp_path / "big.tar").stat().st_size > 64 << 20


@pytest.mark.parametrize(
    ("part", "limit", "message"),
    [
        (
            "weights",
            50,
            r"^weights 69 B exceed package.limits.weights 50 B: choose a smaller scheme or model, or raise the limit$",
        ),
        ("shell", 1000, r"^the files around the weights, [\d.]+ kB, exceed package.limits.shell 1 kB: "),
    ],
)
def test_budgets(part: str, limit: int, message: str, tmp_path: Path) -> None:
    limits = {"shell": None, "weights": None, part: limit}
    artifact("folder", tmp_path / "artifact")
    (tmp_path / "artifact" / "weights.bin").write_bytes(bytes(66))
    with pytest.raises(StepFailed, match=message):
        pack("folder", tmp_path, limits=limits)


def test_budgets_that_look_equal_are_told_in_bytes(tmp_path: Path) -> None:
    artifact("folder", tmp_path / "artifact")
    (tmp_path / "artifact" / "weights.bin").write_bytes(bytes(100_000))
    with pytest.raises(StepFailed, match=r"weights 100,003 bytes exceed package\.limits\.weights 100,002 bytes"):
        pack("folder", tmp_path, limits={"shell": None, "weights": 100_002})


TAMPERED: list[tuple[Callable[[Path], object], list[str]]] = [
    (lambda f: (f / "README.md").unlink(), ["README.md: is missing"]),
    (lambda f: (f / "more").write_text(""), ["more: was added"]),
    (lambda f: (f / ".git").mkdir(), [".git: is an added folder"]),
    (lambda f: (f / "golden.json").write_text("{}"), ["golden.json: was changed"]),
    (lambda f: flip(f / "model" / "payload.json"), ["model/payload.json: was changed"]),
    (lambda f: (f / "golden.json").chmod(0o600), ["golden.json: has the mode 0600, not 0644"]),
    (lambda f: (f / "golden.json").chmod(0o755), ["golden.json: has the mode 0755, not 0644"]),
    (lambda f: (f / "README.md").rename(f / "readme.md"), ["README.md: is missing", "readme.md: was added"]),
    (lambda f: link(f / "README.md"), ["README.md: is a link"]),
    (lambda f: link(f / "manifest.json"), ["manifest.json: is a link"]),
    (lambda f: (f / "manifest.json").unlink(), ["manifest.json: is missing or cannot be read (FileNotFoundError)"]),
    (lambda f: (f / "manifest.json").write_text("[" * 10_000), ["manifest.json: is missing or cannot be read (RecursionError)"]),
    (lambda f: (f / "manifest.json").write_text("[]"), ["manifest.json: is missing or cannot be read (TypeError)"]),
    (lambda f: os.mkfifo(f / "pipe"), ["pipe: was added"]),
]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def link(path: Path) -> None:
    """The same content, behind a link."""
    elsewhere = path.parent.parent / path.name
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize(("tamper", "problems"), TAMPERED, ids=[problems[0] for _, problems in TAMPERED])
def test_tampering_is_told(tamper: Callable[[Path], object], problems: list[str], tmp_path: Path) -> None:
    folder = pack("folder", tmp_path)
    tamper(folder)
    assert bundle.verify(folder) == problems


def test_a_level_that_is_required(tmp_path: Path) -> None:
    pack("folder", tmp_path / "a", require_level="L4")
    with pytest.raises(StepFailed, match=r"^proven to L1, but package\.require_level is L2: no Swift toolchain here"):
        pack("ios", tmp_path / "b", require_level="L2")


def test_links_in_an_artifact_are_refused(tmp_path: Path) -> None:
    artifact("folder", tmp_path / "artifact")
    (tmp_path / "artifact" / "weights").symlink_to("/etc/hostname")
    with pytest.raises(StepFailed, match="weights is a link or no plain file"):
        pack("folder", tmp_path)
    (tmp_path / "artifact" / "weights").unlink()
    (tmp_path / "artifact" / "weights").symlink_to("/etc", target_is_directory=True)
    with pytest.raises(StepFailed, match="weights is a link or no plain file"):
        bundle.lay(tmp_path / "artifact", "model")


@pytest.mark.parametrize(
    "taken", ["manifest.json", "MANIFEST.json", "golden.json", "Model/other", "MODEL", "golden.json/inner", "README.md"]
)
def test_two_files_for_one_place(taken: str, tmp_path: Path) -> None:
    template = tmp_path / "template"
    template.write_text("{}")
    with pytest.raises(StepFailed, match="want the same place in the bundle"):
        run("folder", tmp_path, {f"template/{taken}": template})


@pytest.mark.parametrize("place", ["../outside", "a/../../outside", "/outside", "a//b", "a\\b", "new\nline"])
def test_templates_stay_inside(place: str, tmp_path: Path) -> None:
    template = tmp_path / "template"
    template.write_text("{}")
    with pytest.raises(StepFailed):
        run("folder", tmp_path, {f"template/{place}": template})
    assert not (tmp_path / "out" / "outside").exists()
    assert not (tmp_path / "outside").exists()


def run(kind: str, place: Path, inputs: dict[str, Path]) -> Path:
    made = action(kind, artifact(kind, place / "artifact"), place / "out", inputs)
    session = Counting() if kind == "ios" else Doubling()
    bundle.run(made, FRAMEWORK[kind], Stub(session), BUNDLES[kind])
    return made.outputs["bundle"]


def test_licences_are_carried_and_named(tmp_path: Path) -> None:
    licence = tmp_path / "LICENSE"
    licence.write_text("Do as you like.\n")
    folder = run("ios", tmp_path, {"licence/LICENSE": licence})
    assert (folder / "licences" / "LICENSE").read_text() == "Do as you like.\n"
    assert "- LICENSE" in (folder / "NOTICE.md").read_text()


def test_framework_folders_of_templates(tmp_path: Path) -> None:
    for name in ("mine", "other"):
        (tmp_path / name).write_text(name)
    inputs = {"template/for-fake/which.txt": tmp_path / "mine", "template/for-mlx/which.txt": tmp_path / "other"}
    assert (run("folder", tmp_path, inputs) / "which.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../x"}, "names no bundle"),
        ({"version": "1.0"}, "is no semantic version"),
        ({"scheme": "int4;"}, "scheme: 'int4;' may hold"),
        ({"description": "two\nlines"}, "'description' holds U\\+000A"),
        ({"description": "nul\0"}, "'description' holds U\\+0000"),
        ({"description": "\u202egnp"}, "'description' holds U\\+202E .RIGHT-TO-LEFT OVERRIDE"),
        ({"platform": {"name": "p", "description": "", "facts": {"a": "\x1b[2J"}}}, "'facts.a' holds U\\+001B"),
        ({"platform": {"name": "p", "description": "\u2028", "facts": {}}}, "'platform_description' holds U\\+2028"),
    ],
)
def test_values_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match=message):
        pack("folder", tmp_path, **changes)
    assert not (tmp_path / "out" / "bundle").exists()


def test_a_model_that_answers_otherwise_from_the_bundle(tmp_path: Path) -> None:
    class Fickle(Doubling):
        calls = 0

        def infer(self, feeds):  # type: ignore[no-untyped-def]
            Fickle.calls += 1
            return {"y": (2 if Fickle.calls == 1 else 2.1) * feeds["x"]}

    with pytest.raises(StepFailed, match="misses its golden output y, by"):
        pack("folder", tmp_path, Stub(Fickle()))


@pytest.mark.parametrize(
    ("name", "module"),
    [("ios-phi3", "IosPhi3Model"), ("3d.net", "M3dNetModel"), ("a_b-c.d", "ABCDModel"), ("class", "ClassModel")],
)
def test_identifiers(name: str, module: str) -> None:
    assert render.identifier(name) == module
    assert module.isidentifier()


@pytest.mark.parametrize("kind", KINDS)
def test_frameworks_that_a_kind_takes(kind: str) -> None:
    taken = {name for name in ("mlx", "onnxruntime", "fake") if not BUNDLES[kind].refuse(name, "text-generation")}
    anything, nothing = {"mlx", "onnxruntime", "fake"}, set[str]()
    others = {"ios": {"mlx"}, "folder": anything, "firmware": anything}
    assert taken == others.get(kind, nothing)
    assert "text-generation" not in BUNDLES[kind].refuse("mlx", "image-classification") or kind == "ios"


def test_a_key_that_was_exchanged_after_the_plan_signs_nothing(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match=r"^package\.sign: the key was exchanged while this was built; build again$"):
        pack("android", tmp_path, sign={"public": "0" * 64, "test": True})
    pack("android", tmp_path / "same", sign={"public": signing.public(own_pair()), "test": True})


@pytest.mark.parametrize(
    ("kind", "facts", "said"),
    [
        ("android", ["min_sdk: 5"], "7: facts.min_sdk: '5' is not an SDK level of 24 or more, such as 26; correct it"),
        ("container", ["base: python"], "7: facts.base: 'python' is no image by its digest, such as docker.io/library/"),
        ("firmware", ["other: 1", "slot_a: /tmp"], "8: facts.slot_a: '/tmp' is no device of its own such as /dev/disk/"),
        ("firmware", ["bootloader: mcuboot", "cpu: z80"], "8: facts.cpu: 'z80' is none of cortex-m3, cortex-m4, "),
        ("folder", ['note: "a\\nb"'], "6: facts: 'facts.note' holds U+000A (a control character), which text for templates"),
        ("ios", ["macos: 14"], "7: facts.macos: '14' is no version such as 14.0; correct it"),
        ("onnx", ["onnxruntime_web: new"], "7: facts.onnxruntime_web: 'new' is no version such as 1.20; correct it"),
    ],
)
def test_a_plan_refuses_what_a_bundle_cannot_state(
    kind: str, facts: list[str], said: str, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its own kind alone: what another kind states may be anything."""
    monkeypatch.chdir(lab.root)
    platform = lab.root / "platforms" / "fake.yaml"
    platform.write_text("".join([platform.read_text(), "facts:\n", *(f"  {line}\n" for line in facts)]))
    before = Project().problems
    platform.write_text(platform.read_text().replace("kind: folder", f"kind: {kind}"))
    assert Project().problems["one"].startswith(f"platforms/fake.yaml:{said}")
    assert (before == {}) == (kind != "folder")
