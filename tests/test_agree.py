"""`agree:MODEL`: artifacts of one model held against one another, each run by its own backend on the same inputs."""

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from safetensors.numpy import save_file

from edgebuild import agree
from edgebuild.agreements import model_name
from edgebuild.project import Project
from edgebuild.step import Action
from tests.conftest import ROOT, TARGET, Lab, write_model
from tests.test_cli import last_run, run

TENSORS = {"kind": "tensors", "data": "d", "runtime": "r", "outputs": ["y"]}


def floats(values: Any) -> Any:
    return np.array(values, np.float32)


def ints(values: Any) -> Any:
    return np.array(values, np.int64)


def matrix(lab: Lab, model: str = "model") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((lab.root / "build" / "agree" / f"{model}.json").read_text())
    jsonschema.validate(found, json.loads((ROOT / "schemas" / "agree.json").read_text()))
    return found


def pair(found: dict[str, Any], row: str, column: str) -> dict[str, Any]:
    (one,) = (pair for pair in found["pairs"] if (pair["row"], pair["column"]) == (row, column))
    return dict(one)


def held(tmp_path: Path, first: dict[str, Any], second: dict[str, Any], task: str = "image-classification") -> dict[str, Any]:
    """Two artifacts' answers, each `about` and arrays, held against one another."""
    inputs = {}
    for name, given in (("a", first), ("b", second)):
        arrays = {key: np.asarray(value) for key, value in given.items() if key != "about"}
        save_file(arrays, tmp_path / name, metadata={"about": json.dumps(given["about"])})
        inputs[f"answers/{name}"] = tmp_path / name
    rows = [{"name": name, "of": "candidate", "framework": "fake", "scheme": "int8", "targets": [name]} for name in "ab"]
    params = {"model": "m", "source": "s", "task": task, "rows": rows}
    agree.run(Action(verb="agree", backend="", params=params, inputs=inputs, outputs={"matrix": tmp_path / "m.json"}))
    found: dict[str, Any] = json.loads((tmp_path / "m.json").read_text())
    jsonschema.validate(found, json.loads((ROOT / "schemas" / "agree.json").read_text()))
    return found


def test_by_hand(tmp_path: Path) -> None:
    a = {"about": TENSORS, "output/y": floats([[0.5, 0.5], [1, 0]]), "predicted": ints([0, 0])}
    b = {"about": TENSORS, "output/y": floats([[0.25, 0.75], [1, 0]]), "predicted": ints([1, 0])}
    found = held(tmp_path, a, b)
    forward, back = pair(found, "a", "b"), pair(found, "b", "a")
    assert forward["same_top"] == back["same_top"] == 0.5
    assert forward["cosine"] == pytest.approx((0.5 / (0.5**0.5 * 0.625**0.5) + 1) / 2, abs=1e-6)
    assert forward["max_abs"] == 0.25
    assert forward["kl"] == pytest.approx((0.5 * np.log(2) + 0.5 * np.log(2 / 3)) / 2, abs=1e-6)  # probabilities as they are
    assert back["kl"] == pytest.approx((0.25 * np.log(0.5) + 0.75 * np.log(1.5)) / 2, abs=1e-6)
    assert (forward["n"], forward["unit"], forward["reason"]) == (2, "samples", "")
    shown = agree.show(found)
    assert "2 artifacts on the same inputs (2 samples)" in shown
    assert "50.00 %" in shown
    assert "0.25" in shown


def test_scores_go_through_a_softmax(tmp_path: Path) -> None:
    a = {"about": TENSORS, "output/y": floats([[1, -1]]), "predicted": ints([0])}
    b = {"about": TENSORS, "output/y": floats([[2, 0]]), "predicted": ints([0])}
    assert pair(held(tmp_path, a, b), "a", "b")["kl"] == 0.0
    embeddings = pair(held(tmp_path, a, b, "feature-extraction"), "a", "b")
    assert embeddings["same_top"] is None
    assert embeddings["kl"] is None
    assert embeddings["max_abs"] == 1.0


def test_language_models(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((600, 50))
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    about = {"kind": "text", "data": "d", "runtime": "r", "outputs": []}
    a = {"about": about, "logprobs": logprobs.astype(np.float16), "windows": np.arange(600, dtype=np.int32)}
    swapped = logprobs.copy()
    swapped[:60] = swapped[:60, ::-1]
    one = pair(held(tmp_path, a, {**a, "logprobs": swapped.astype(np.float16)}, "text-generation"), "a", "b")
    assert one["n"] == 600  # more than are looked at at once
    changed = int((logprobs[:60].argmax(-1) != swapped[:60].argmax(-1)).sum())
    assert one["same_top"] == pytest.approx(1 - changed / 600, abs=1e-6)
    expected = (np.exp(logprobs) * (logprobs - swapped)).sum(-1).mean()
    assert one["kl"] == pytest.approx(expected, rel=1e-2)
    assert one["of"] == "log-probabilities"
    tokens = pair(held(tmp_path, a, {**a, "windows": a["windows"] + 1}, "text-generation"), "a", "b")
    assert tokens["reason"] == "their tokenizers make other tokens of the same text"
    assert tokens["kl"] is None
    shown = agree.show(held(tmp_path, a, {**a, "windows": a["windows"] + 1}, "text-generation"))
    assert "a and b: their tokenizers make other tokens" in shown


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"about": {**TENSORS, "data": "e"}, "output/y": floats([[1, 2]])}, "they answered other inputs"),
        ({"about": TENSORS, "output/y": floats([[1, 2, 3]])}, "the output y has the shapes [2] and [3] for a sample"),
        (
            {"about": {**TENSORS, "outputs": ["u", "v"]}, "output/u": floats([[1]]), "output/v": floats([[1]])},
            "their outputs have other names (y; u, v)",
        ),
    ],
)
def test_what_cannot_be_compared(tmp_path: Path, other: dict[str, Any], reason: str) -> None:
    one = pair(held(tmp_path, {"about": TENSORS, "output/y": floats([[1, 2]])}, other), "a", "b")
    assert one["reason"] == reason
    assert one["cosine"] is None


def test_names_of_models() -> None:
    assert model_name("targets/models/digits.onnx") == "digits"
    assert model_name("../Tiny Phi_3/") == "tiny-phi-3"
    assert model_name("models/v1.5") == "v1-5"
    assert model_name("hf:microsoft/Phi-3-mini-4k-instruct@" + "0" * 40) == "phi-3-mini-4k-instruct"
    assert model_name("hf:org/all-minilm@" + "0" * 40 + "/onnx/model.onnx") == "all-minilm"
    assert model_name("hf:org/repo@" + "0" * 40 + "/onnx/small.onnx") == "repo-small"
    assert model_name("https://example.org/a/b.onnx?x=1") == "b"
    assert model_name("package:silero-vad/silero_vad/data/silero_vad.onnx") == "silero-vad"


def two(lab: Lab) -> None:
    (lab.root / "targets" / "two.yaml").write_text(TARGET + "quantize: {scheme: int4}\ndefault: false\n")


def test_as_typed(lab: Lab) -> None:
    """The baseline is run once, whatever target it is of; each artifact in a step of its own; then all is cached."""
    two(lab)
    (lab.root / "targets" / "three.yaml").write_text(TARGET + "default: false\npackage: {version: 3.0.0}\n")
    assert run(lab).returncode == 0  # no build runs or waits for any of it
    assert not (lab.root / "build" / "agree").exists()
    result = run(lab, "agree:model")
    assert result.returncode == 0, result.stderr
    ran = {name for name, outcome in last_run(lab).items() if outcome == "ran"}
    assert {name for name in ran if not name.endswith((":two", ":three"))} == {
        "answer:model.candidate.one",
        "answer:model.candidate.two",
        "agree:model",
    }
    assert not any(name.startswith(("gate:", "package:", "benchmark:")) for name in last_run(lab))
    found = matrix(lab)
    assert [(row["name"], row["of"], row["targets"]) for row in found["artifacts"]] == [
        ("baseline fake", "baseline", []),
        ("one", "candidate", ["one", "three"]),
        ("two", "candidate", ["two"]),
    ]
    assert len(found["pairs"]) == 6
    assert all(pair["cosine"] > 0.99 and not pair["reason"] for pair in found["pairs"])
    table = [line.split() for line in result.stdout.splitlines()]
    assert ["baseline", "fake"] in [line[:2] for line in table]
    assert result.stdout.splitlines()[-1].startswith("edgebuild: ")
    again = run(lab, "agree:model", program="edgebuild")
    assert set(last_run(lab).values()) == {"fresh"}
    assert again.stdout.splitlines()[:-1] == result.stdout.splitlines()[-len(again.stdout.splitlines()) : -1]
    assert run(lab, "clean", "agree:model").returncode == 0
    assert not (lab.root / "build" / "agree" / "model.json").exists()
    assert run(lab, "agree:model").returncode == 0
    assert last_run(lab)["agree:model"] == "restored"


def test_a_row_has_the_name_of_a_default_target(lab: Lab) -> None:
    two(lab)
    (lab.root / "targets" / "a-first.yaml").write_text(TARGET + "default: false\n")
    os.chdir(lab.root)
    project = Project()
    rows = project.recipes[project.steps["agree:model"].recipe]["params"]["rows"]
    assert [(row["name"], row["targets"]) for row in rows] == [
        ("baseline fake", []),
        ("one", ["a-first", "one"]),
        ("two", ["two"]),
    ]


def test_what_an_edit_reaches(lab: Lab) -> None:
    two(lab)
    assert run(lab, "agree:model").returncode == 0
    before = matrix(lab)
    (lab.root / "targets" / "two.yaml").write_text(TARGET + "quantize: {scheme: int4, group_size: 64}\ndefault: false\n")
    assert run(lab, "agree:model").returncode == 0
    ran = {name for name, outcome in last_run(lab).items() if outcome == "ran"}
    assert ran == {"quantize:two", "answer:model.candidate.two", "agree:model"}
    assert pair(matrix(lab), "one", "baseline fake") == pair(before, "one", "baseline fake")
    assert pair(matrix(lab), "two", "baseline fake") != pair(before, "two", "baseline fake")
    write_model(lab.root / "model.gguf", "another")
    assert run(lab, "agree:model").returncode == 0
    assert last_run(lab)["answer:model.candidate.one"] == "ran"
    assert pair(matrix(lab), "one", "baseline fake") != pair(before, "one", "baseline fake")
    (lab.root / "targets" / "one.yaml").rename(lab.root / "targets" / "uno.yaml")
    assert run(lab, "agree:model").returncode == 0
    assert [row["name"] for row in matrix(lab)["artifacts"]] == ["baseline fake", "two", "uno"]
    assert not (lab.root / "build" / "agree" / "answer.model.candidate.one.json").exists()  # what is no more went
    (lab.root / "model.gguf").rename(lab.root / "renamed.gguf")
    for path in (lab.root / "targets").iterdir():
        path.write_text(path.read_text().replace("model.gguf", "renamed.gguf"))
    assert run(lab).returncode == 0
    assert list((lab.root / "build" / "agree").glob("*.json")) == []
    assert run(lab, "agree:model").returncode == 3


def test_models_of_one_name_are_told_apart(lab: Lab) -> None:
    (lab.root / "other").mkdir()
    write_model(lab.root / "other" / "model.gguf", "other")
    two(lab)
    path = lab.root / "targets" / "two.yaml"
    path.write_text(path.read_text().replace("model.gguf", "other/model.gguf"))
    os.chdir(lab.root)
    names = sorted(name for name in Project().steps if name.startswith("agree:"))
    assert len(names) == 2
    assert all(name.startswith("agree:model-") for name in names)


def test_what_quantizes_nothing_has_nothing_to_agree_with(lab: Lab) -> None:
    (lab.root / "targets" / "one.yaml").write_text(TARGET + "quantize: {scheme: none}\n")
    result = run(lab, "agree:model")
    assert result.returncode == 3
    assert 'there is no "agree:model"' in result.stderr


def test_no_target_is_called_so(lab: Lab) -> None:
    (lab.root / "targets" / "agree.yaml").write_text(TARGET)
    result = run(lab)
    assert result.returncode == 3
    assert "agree is where agree:MODEL writes; rename it" in result.stderr
