"""What every backend promises, tried on each of them: pure words beforehand, equal bytes, a session that runs what was made."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgebuild import shipped
from edgebuild.assess import assess
from edgebuild.backends import BACKENDS
from edgebuild.errors import StepFailed
from edgebuild.step import Action
from tests.backends import holding
from tests.backends.phi3 import needs_llama, needs_olive
from tests.conftest import ROOT, write_model

NAMES = sorted(BACKENDS)
REAL = [name for name in NAMES if name != "fake"]
# llama-cpp-python is compiled, and Olive shares no environment: .ci/run has each in one of its own.
MARKS = {"llamacpp": [needs_llama], "olive": [needs_olive]}
RUN = [pytest.param(name, marks=MARKS.get(name, [])) for name in NAMES]
RUN_REAL = [pytest.param(name, marks=MARKS.get(name, [])) for name in REAL]
DATA = ROOT / "targets" / "data"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model that a backend takes, one scheme, and where its data lie."""

    scheme: str
    given: Mapping[str, Any] = field(default_factory=dict)
    calibration: Path | None = None
    shrinks: bool = True


CASES = {
    "fake": Case(scheme="int8", shrinks=False),
    "llamacpp": Case(scheme="q4_k_m"),
    "mlx": Case(scheme="int4"),
    "olive": Case(scheme="int8", calibration=DATA / "digits-calibration.npz"),
    "onnxruntime": Case(scheme="int8", calibration=DATA / "digits-calibration.npz"),
    "openvino": Case(scheme="int8", calibration=DATA / "digits-calibration.npz"),
}


def source(name: str, folder: Path) -> dict[str, Path]:
    if name == "fake":
        write_model(folder / "model.gguf", "hello")
        return {"model": folder / "model.gguf"}
    models = ROOT / "targets" / "models"
    if "onnx" in BACKENDS[name].NEEDS:
        return {"model": models / "digits.onnx"}
    return {f"model/{path.name}": path for path in (models / "tiny-phi3").iterdir()}


def make(name: str, place: Path) -> Path:
    """Convert and quantize below `place`; → the folder that holds the steps' outputs."""
    case, backend, files = CASES[name], BACKENDS[name], source(name, place)
    facts = assess(files)
    for verb, inputs in (("convert", files), ("quantize", {"model": place / "convert/model"})):
        (place / verb).mkdir()
        params: dict[str, Any] = {"task": "other"}
        if verb == "quantize":
            settings = backend.parameters(case.scheme, case.given, case.calibration is not None)
            params = {"task": "other", "scheme": case.scheme, "samples": None, **settings}
            inputs = {**inputs, **({"calibration": case.calibration} if case.calibration else {})}
        assert backend.refuse(facts, params) == ""
        outputs = {"model": place / verb / "model", "report": place / verb / "report.json"}
        action = Action(verb=verb, backend=name, params=params, inputs=inputs, outputs=outputs)
        outcome = (holding.convert if verb == "convert" else backend.quantize)(action, facts)
        assert outcome.summary
        assert "\n" not in outcome.summary
        assert isinstance(json.loads(outputs["report"].read_text(encoding="utf-8")), dict)
        assert sorted(path.name for path in (place / verb).iterdir()) == ["model", "report.json"]
    return place


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module", params=RUN)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, make(request.param, tmp_path_factory.mktemp(request.param))


def test_every_backend_has_a_case() -> None:
    assert sorted(CASES) == NAMES


def test_the_conversion_is_held(made: tuple[str, Path]) -> None:
    report = json.loads((made[1] / "convert/report.json").read_text(encoding="utf-8"))
    assert report["verified"] is True


def test_twice_the_same_bytes(made: tuple[str, Path], tmp_path: Path) -> None:
    name, first = made
    again = tmp_path / "a longer name"
    again.mkdir()
    make(name, again)
    for verb in ("convert", "quantize"):
        assert contents(first / verb) == contents(again / verb)


def test_quantizing_is_worth_it_and_said(made: tuple[str, Path]) -> None:
    name, place = made
    sizes = [sum(map(len, contents(place / verb / "model").values())) for verb in ("convert", "quantize")]
    if CASES[name].shrinks:
        report = json.loads((place / "quantize/report.json").read_text(encoding="utf-8"))
        assert report["bytes_after"] < report["bytes_before"]
        assert sizes[1] < 0.5 * sizes[0]


def test_every_view_runs_what_was_made(made: tuple[str, Path]) -> None:
    name, place = made
    backend = BACKENDS[name]
    for view in backend.VIEWS:
        session = backend.open(place / "quantize/model", view)
        assert session.runtime
        if session.inputs:
            feeds = {
                one["name"]: np.zeros([n if isinstance(n, int) else 2 for n in one["shape"]], one["dtype"])
                for one in session.inputs
            }
            outputs = session.infer(feeds)
            assert all(np.isfinite(value).all() for value in outputs.values())
            with pytest.raises(StepFailed):
                session.logits(np.zeros(4, np.int32))
        else:
            assert np.isfinite(session.logits(session.tokens("The small boat left the harbour."))).all()
            with pytest.raises(StepFailed):
                session.infer({})
        session.close()


@pytest.mark.parametrize("name", RUN_REAL)
def test_what_is_no_model_is_one_message(name: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for file in ("model.onnx", "model.xml", "config.json"):
        (tmp_path / "model" / file).write_text("nothing", encoding="utf-8")
    with pytest.raises(StepFailed) as caught:
        BACKENDS[name].open(tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_estimates_grow_with_the_model(name: str, tmp_path: Path) -> None:
    backend, case = BACKENDS[name], CASES[name]
    facts = assess(source(name, tmp_path))
    settings = backend.parameters(case.scheme, case.given, case.calibration is not None)
    none, quantized = backend.estimate(facts, "none", {}, 10**10), backend.estimate(facts, case.scheme, settings, 10**10)
    for one in (none, quantized):
        assert 0 < one.artifact < one.running
        assert one.making > 0
    if case.shrinks:
        assert quantized.artifact < none.artifact


@pytest.mark.parametrize("name", REAL)
def test_packages_are_pinned_by_the_lock_and_named_in_the_readme(name: str) -> None:
    for needs in BACKENDS[name].NEEDS.values():
        lock = (Path(shipped.PACKAGE) / "locks" / f"{needs.lock}.txt").read_text(encoding="utf-8")
        locked = set(re.findall(r"^([a-z0-9._-]+)==", lock, re.MULTILINE))
        assert {package.replace("_", "-") for package in needs.packages} <= locked
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if line.startswith(f"| `{name}` |")]
    assert any(all(scheme in row for scheme in BACKENDS[name].SCHEMES) for row in rows)


@pytest.mark.parametrize("name", RUN_REAL)
def test_smoke(name: str) -> None:
    first = next(iter(BACKENDS[name].NEEDS.values())).packages[0]
    assert first.partition("-")[0] in BACKENDS[name].smoke()
