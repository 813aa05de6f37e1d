"""The one property of a build system: incremental equals clean, and nothing works twice.

After Mokhov, Mitchell and Peyton Jones, "Build systems à la carte" (correctBuild), and Shake's random builds. Everything
that a key holds is varied. Each guard, taken out, must make the property fail: those are the negative controls below.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgebuild import fresh as fresh_module
from edgebuild import plan, toolchain
from edgebuild.fresh import Fresh
from edgebuild.process import Result, Workers
from edgebuild.project import Project
from edgebuild.run import Builder
from edgebuild.step import VERBS, Step
from tests.conftest import PLATFORM, Lab, make_lab, perform_here, write_model

State = dict[str, Any]
START: State = {
    "text": "a",
    "comment": "",
    "scheme": "int8",
    "group": 32,
    "calibration": 0,
    "data": 0,
    "limit": 0.9,
    "about": "x",
    "platform": "int4",
    "version": "1",
}
EDITS: list[tuple[str, Any]] = [
    *[("text", value) for value in ("a", "b")],
    *[("comment", value) for value in ("", " # why")],
    *[("scheme", value) for value in ("int8", "int4", "platform")],
    *[("group", value) for value in (32, 64)],
    *[("calibration", value) for value in (0, 1, 2)],
    *[("data", value) for value in (0, 1, 2)],
    *[("limit", value) for value in (0.9, 0.8)],
    *[("about", value) for value in ("x", "y")],
    *[("platform", value) for value in ("int4", "int8")],
    *[("version", value) for value in ("1", "2")],
]
DAMAGE = [
    "nothing",
    "touch",
    "wipe build",
    "edit an output",
    "edit the bundle",
    "remove a receipt",
    "wipe the store",
    "same size and time",
]
STEP = st.tuples(st.sampled_from(EDITS), st.sampled_from(DAMAGE))


def write(root: Path, state: State) -> None:
    """The project's files as this state has them."""
    write_model(root / "model.gguf", state["text"] + state["comment"])
    scheme = "" if state["scheme"] == "platform" else f"scheme: {state['scheme']}, "
    target = [
        "edgebuild: 1",
        f"description: about {state['about']}",
        "model: {source: model.gguf, task: image-classification}",
        "platform: fake",
        f"quantize: {{{scheme}group_size: {state['group']}}}",
        f"gates: {{cosine: {{min: {state['limit']}}}}}",
    ]
    for key, kind in (("calibration", "calibration"), ("data", "evaluate")):
        if state[key]:
            rng = np.random.default_rng(state[key])
            arrays = {"x": rng.standard_normal((8, 4)).astype("float32")}
            np.savez(root / f"{key}.npz", **arrays)  # type: ignore[arg-type]
            target.append(f"{kind}: {{data: {key}.npz}}")
    (root / "targets" / "one.yaml").write_text("\n".join(target) + "\n")
    (root / "platforms" / "fake.yaml").write_text(PLATFORM.replace("int8", state["platform"]))


def version_of(state: State) -> Callable[[Any], dict[str, str]]:
    return lambda packages: dict.fromkeys(packages, state["version"])


def damage(root: Path, how: str) -> None:
    if how == "touch":
        os.utime(root / "model.gguf")
    elif how == "wipe build":
        shutil.rmtree(root / "build", ignore_errors=True)
    elif how == "edit an output":
        for path in (root / "build").rglob("payload.json"):
            path.chmod(0o644)
            path.write_text('{"text": "tampered", "scheme": "none"}')
    elif how == "edit the bundle":
        for path in sorted((root / "dist").rglob("*"))[-1:]:
            if path.is_file():
                path.write_bytes(b"tampered")
    elif how == "remove a receipt":
        for path in sorted((root / "build").glob("*/*.json"))[:2]:
            path.unlink()
    elif how == "wipe the store":
        shutil.rmtree(root / ".edgebuild" / "objects", ignore_errors=True)
    elif how == "same size and time":
        before = (root / "model.gguf").stat()
        data = (root / "model.gguf").read_bytes()
        (root / "model.gguf").write_bytes(data[:24] + b"z" + data[25:])
        os.utime(root / "model.gguf", ns=(before.st_atime_ns, before.st_mtime_ns))


def check(steps: list[tuple[tuple[str, Any], str]], patch: pytest.MonkeyPatch) -> None:
    """Edit, damage, build; after each the project's outputs are what a clean build makes, and no key ran twice."""
    folder = Path(tempfile.mkdtemp())
    clean: dict[str, tuple[dict[str, str], dict[str, str]]] = {}
    try:
        lab, state = make_lab(folder / "project"), dict(START)
        known: set[str] = set()
        for (key, value), how in [(("text", "a"), "nothing"), *steps]:
            state[key] = value
            write(lab.root, state)
            damage(lab.root, how)
            model = (lab.root / "model.gguf").read_bytes()
            patch.setattr(toolchain, "versions", version_of(state))
            patch.setattr("edgebuild.backends.fake._version", lambda state=state: state["version"])
            (lab.root / ".edgebuild" / "plan.json").unlink(missing_ok=True)  # versions move no file here
            lab.performed.clear()
            outcomes = lab.build()
            assert set(outcomes.values()) <= {"fresh", "ran", "restored"}, outcomes
            if how in ("wipe the store", "edit an output"):  # these take objects away, so that work must be done again
                known.clear()
            assert known.isdisjoint(lab.performed), "worked twice"
            assert len(set(lab.performed)) == len(lab.performed)
            known |= set(lab.performed)
            name = f"{sorted(state.items())} {model!r}"
            if name not in clean:
                other = make_lab(folder / f"clean{len(clean)}")
                write(other.root, state)
                (other.root / "model.gguf").write_bytes(model)
                other.build()
                clean[name] = other.outputs(), other.rungs()
            outputs, rungs = clean[name]
            assert lab.outputs() == outputs
            assert all(rungs.get(path, digest) == digest for path, digest in lab.rungs().items())
            lab.performed.clear()
            assert set(lab.build().values()) == {"fresh"}
            assert lab.performed == []
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@settings(max_examples=int(os.environ.get("EDGEBUILD_EXAMPLES", "12")), deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(STEP, min_size=1, max_size=5))
def test_incremental_equals_clean(steps: list[tuple[tuple[str, Any], str]]) -> None:
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir("."):  # left in a folder that is gone, hypothesis draws no more
        check(steps, patch)


# -- negative controls: each guard left out, and the edits that must find it ---------------------------------------------
def without(part: str, verbs: tuple[str, ...], patch: pytest.MonkeyPatch) -> None:
    """Leave one component out of these verbs' recipes."""
    tagged = plan.digest.tagged

    def lacking(kind: str, value: Any) -> str:
        if kind == "recipe" and value["verb"] in verbs:
            value = {key: component for key, component in value.items() if key != part}
        return tagged(kind, value)

    patch.setattr(plan.digest, "tagged", lacking)


def without_parameters(patch: pytest.MonkeyPatch) -> None:
    without("params", ("quantize",), patch)


def without_limits(patch: pytest.MonkeyPatch) -> None:
    without("params", ("choose",), patch)


def without_versions(patch: pytest.MonkeyPatch) -> None:
    without("toolchain", VERBS, patch)


def without_inputs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Step, "key", lambda self, inputs: plan.digest.tagged("key", [self.recipe, sorted(inputs)]))


def without_output_check(patch: pytest.MonkeyPatch) -> None:
    def judge(self: fresh_module.Fresh, step: Step) -> bool:
        receipt = fresh_module.read_receipt(step.receipt)
        project = self._project
        before = all(self(project.steps[name]) for name in step.after)
        return before and receipt is not None and receipt.key == fresh_module.key_now(project, step)

    patch.setattr(fresh_module.Fresh, "_judge", judge)


@pytest.mark.parametrize(
    ("guard", "steps"),
    [
        (without_parameters, [(("group", 64), "nothing")]),
        (without_inputs, [(("text", "b"), "nothing")]),
        (without_limits, [(("calibration", 2), "nothing"), (("limit", 0.8), "nothing")]),
        (without_versions, [(("version", "2"), "nothing")]),
        (without_output_check, [(("text", "a"), "edit the bundle")]),
    ],
)
def test_the_property_fails_without(
    guard: Callable[[pytest.MonkeyPatch], None], steps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as clean:
        check(steps, clean)  # it holds with the guard
    guard(monkeypatch)
    with pytest.raises(AssertionError):
        check(steps, monkeypatch)


def test_a_lab_is_what_it_says(lab: Lab) -> None:
    assert set(lab.build().values()) == {"ran"}
    assert set(lab.build().values()) == {"fresh"}


def test_an_edit_that_is_undone_while_a_step_runs_is_seen(tmp_path: Path) -> None:
    """Its input's digest is as before, and what it read was another file: nothing of that may be kept under this key."""
    lab = make_lab(tmp_path / "project")
    edits = []

    def perform(record: Mapping[str, Any], *rest: Any) -> Result:
        if record["verb"] != "convert" or edits:
            return perform_here(record, *rest)
        edits.append(record["name"])
        write_model(lab.root / "model.gguf", "another")
        result = perform_here(record, *rest)
        write_model(lab.root / "model.gguf", "hello")
        return result

    os.chdir(lab.root)
    project = Project()
    builder = Builder(project, Fresh(project), Workers(), perform)
    for name in ("fetch:one", "assess:one", "convert:one"):
        builder.run(project.steps[name])
    assert edits
    made = (lab.root / "build/one/convert/model/payload.json").read_bytes()
    clean = make_lab(tmp_path / "clean")
    clean.build()
    assert made == (clean.root / "build/one/convert/model/payload.json").read_bytes()
