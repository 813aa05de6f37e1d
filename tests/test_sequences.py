"""Models that are fed their own state: samples are sequences, in evaluation and in calibration."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgebuild import quality, tensors
from edgebuild.errors import StepFailed
from edgebuild.project import Project
from edgebuild.step import Action
from tests.backends.test_onnxruntime import build, report
from tests.conftest import TARGET, VNNI, Lab

STATE = {"state": "stateN"}


class Latch:
    """The probability that any step so far was above 0: only whoever feeds the state back gets it right. `noise` falsifies it."""

    runtime = "latch"
    inputs = (
        {"name": "x", "dtype": "float32", "shape": ["batch", 2]},
        {"name": "state", "dtype": "float32", "shape": [1, "batch", 1]},
        {"name": "rate", "dtype": "int64", "shape": []},
    )

    def __init__(self, model: Path, view: str = "") -> None:
        self._noise = float(model.read_text())

    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        assert {name: (value.shape, value.dtype.name) for name, value in feeds.items()} == {
            "x": ((1, 2), "float32"), "state": ((1, 1, 1), "float32"), "rate": ((), "int64"),
        }  # fmt: skip
        assert feeds["rate"] == 16_000
        seen = np.maximum(feeds["state"], feeds["x"].max() > 0).astype(np.float32)
        return {"y": np.abs(seen[0] - self._noise), "stateN": seen}

    def close(self) -> None: ...


def evaluate(folder: Path, data: Path, noise: float, state: Mapping[str, str] = STATE, **params: Any) -> dict[str, Any]:
    """The rows of a candidate that is so far from the baseline, by name."""
    backend = cast("Any", SimpleNamespace(VIEWS={"native": ""}, open=Latch))
    rows: list[dict[str, Any]] = []
    for role, value in (("baseline", 0.0), ("candidate", noise)):
        (folder / role).write_text(str(value))
        answers = {"answers": folder / "answers.safetensors"}
        inputs = {"model": folder / role, "data": data, **({"baseline": answers["answers"]} if role == "candidate" else {})}
        outputs = {"measurements": folder / "rows.json", **(answers if role == "baseline" else {})}
        given = {"task": "voice-activity-detection", "role": role, "state": state, **(params if role == "candidate" else {})}
        quality.run(Action(verb="evaluate", backend="t", params=given, inputs=inputs, outputs=outputs), backend)
        rows += json.loads((folder / "rows.json").read_text())
    return {f"{row['of']} {row['name']}": row for row in rows}


def sequences(path: Path, **changed: Any) -> Path:
    """Six sequences of five steps, in each of which the sound begins at another step."""
    x = np.full((6, 5, 2), -1, np.float32)
    for index in range(6):
        x[index, index:, 1] = 1 if index % 2 else -1
        x[index, index : index + 1, 0] = 1
    labels = np.maximum.accumulate(x.max(-1) > 0, axis=1).astype(np.int64)
    np.savez(path, **{"x": x, "rate": np.full(6, 16_000), "labels": labels, **changed})
    return path


def test_the_state_is_fed_back_and_begins_at_zero(tmp_path: Path) -> None:
    found = evaluate(tmp_path, sequences(tmp_path / "data.npz"), noise=0.0)
    assert found["baseline accuracy"]["value"] == 1.0  # every step of every sequence, the quiet ones before the sound too
    assert found["baseline accuracy"]["n"] == 30
    assert found["candidate quality"]["value"] == 1.0
    assert found["candidate flip_rate"]["value"] == 0.0
    assert found["candidate cosine"]["n"] == 6  # a sequence's outputs together; the state itself is not compared
    assert found["candidate cosine"]["value"] == pytest.approx(1.0)


def test_a_candidate_that_loses_it(tmp_path: Path) -> None:
    found = evaluate(tmp_path, sequences(tmp_path / "data.npz"), noise=0.9)
    assert found["candidate flip_rate"]["value"] == 1.0
    assert found["candidate quality"]["value"] == 0.0
    assert found["candidate accuracy"]["value"] == 0.0


def test_steps_of_a_sequence_are_not_independent(tmp_path: Path) -> None:
    """One wrong sequence of twenty: the interval is that of twenty units, not of a hundred steps."""
    flips = np.zeros((20, 5), bool)
    flips[0] = True
    clustered, single = tensors._share(flips), tensors._share(flips.reshape(-1))
    assert clustered is not None
    assert single is not None
    assert clustered[1] > single[1] * 1.2
    assert clustered[0] < single[0]


def test_a_class_for_a_whole_sequence_is_what_is_said_at_its_end(tmp_path: Path) -> None:
    path = sequences(tmp_path / "data.npz", labels=np.array([1, 1, 1, 1, 1, 0]))
    found = evaluate(tmp_path, path, noise=0.0)
    assert found["baseline accuracy"]["value"] == 1.0
    assert found["baseline accuracy"]["n"] == 6


def test_parts_are_whole_sequences(tmp_path: Path) -> None:
    path = sequences(tmp_path / "data.npz")
    counts = [evaluate(tmp_path, path, 0.0, part=part)["candidate accuracy"]["n"] for part in ("choosing", "verdict")]
    assert sum(counts) == 30
    assert all(count and count % 5 == 0 for count in counts)


@pytest.mark.parametrize(
    ("changed", "state", "message"),
    [
        ({}, {"stat": "stateN"}, "model.state: the model has no input stat; its inputs: x, state, rate"),
        ({}, {"state": "stateX"}, "model.state: the model has no output stateX; its outputs: y, stateN"),
        ({"x": np.zeros((6, 2), np.float32)}, STATE, r"x has the shape \[6, 2\], but sequences of it are \[samples, steps, 2\]"),
        ({"x": np.zeros((6, 0, 2), np.float32)}, STATE, r"every array is \[samples, steps, …\], but here: x \[6, 0, 2\]"),
        ({"x": np.zeros((6, 5, 3), np.float32)}, STATE, "but the model takes"),
        ({"rate": np.full((6, 4), 16_000)}, STATE, r"but here: x \[6, 5, 2\], rate \[6, 4\]"),
        ({"labels": np.zeros((6, 4), np.int64)}, STATE, r"classes are whole numbers \[6, 5\]"),
    ],
)
def test_what_does_not_fit_is_one_message(tmp_path: Path, changed: Any, state: dict[str, str], message: str) -> None:
    path = sequences(tmp_path / "data.npz", **changed)
    with pytest.raises(StepFailed, match=message):
        evaluate(tmp_path, path, 0.0, state=state)


# -- fixed sizes ----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("framework", ["onnxruntime", "openvino"])
def test_a_model_is_made_for_the_sizes_that_it_needs(tmp_path: Path, framework: str) -> None:
    """As speech models do, it reflects 64 values: made-up inputs of 16 are too short for it."""
    value = helper.make_tensor_value_info
    pads = onnx.numpy_helper.from_array(np.array([0, 0, 0, 64]), "pads")
    nodes = [helper.make_node("Pad", ["x", "pads"], ["y"], mode="reflect")]
    free = [value(name, TensorProto.FLOAT, ["batch", f"{name}_length"]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "reflects", free[:1], free[1:], [pads])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "model.onnx")

    def made_for(shape: str) -> "subprocess.CompletedProcess[str]":
        text = f"model: {{source: model.onnx, task: other{shape}}}\nquantize: {{scheme: none}}\n"
        return build(tmp_path, text, "evaluate:one.baseline", framework=framework)

    assert made_for("").returncode == 1
    made = made_for(", shape: {x: [1, 576]}")
    assert made.returncode == 0, made.stdout + made.stderr
    wrong = made_for(", shape: {x: [1, 2, 3]}")
    assert wrong.returncode == 1
    assert "Traceback" not in wrong.stderr
    if framework == "onnxruntime":
        assert "made for x [1, 576]" in made.stdout
        assert "model.shape: Rank mismatch" in wrong.stderr


def test_only_inputs_with_names_have_a_state_or_a_shape(lab: Lab) -> None:
    for key, message in (
        ("state: {h: hn}", "model.state: is for ONNX models"),
        ("shape: {h: [1]}", "model.shape: is for ONNX models"),
    ):
        (lab.root / "targets" / "one.yaml").write_text(TARGET.replace("task:", f"{key}, task:"))
        os.chdir(lab.root)
        assert message in Project().problems["one"]


# -- through the frameworks -------------------------------------------------------------------------------------------------
def recurrent(path: Path) -> tuple[NDArray[np.float32], ...]:
    """state' = tanh(x·W + state·U), y = softmax(state'·V); → W, U, V."""
    rng = np.random.default_rng(0)
    shapes = {"w": (24, 64), "u": (64, 64), "v": (64, 4)}
    weights = {name: (rng.standard_normal(shape) / 8).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["state", "u"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("Tanh", ["c"], ["stateN"]),
        helper.make_node("MatMul", ["stateN", "v"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    shapes_in = [value("x", TensorProto.FLOAT, [1, 24]), value("state", TensorProto.FLOAT, [1, 64])]
    shapes_out = [value("y", TensorProto.FLOAT, [1, 4]), value("stateN", TensorProto.FLOAT, [1, 64])]
    tensors = [onnx.numpy_helper.from_array(one, name) for name, one in weights.items()]
    graph = helper.make_graph(nodes, "recurrent", shapes_in, shapes_out, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return tuple(weights.values())


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["onnxruntime", "openvino"])
def test_a_recurrent_model_is_calibrated_and_judged_in_the_loop(tmp_path: Path, framework: str) -> None:
    w, u, v = recurrent(tmp_path / "model.onnx")
    rng = np.random.default_rng(1)
    x = rng.standard_normal((60, 12, 24)).astype(np.float32)
    state, labels = np.zeros((60, 64), np.float32), []
    for step in range(12):
        state = np.tanh(x[:, step] @ w + state @ u)
        labels.append((state @ v).argmax(-1))
    np.savez(tmp_path / "data.npz", x=x[10:], labels=np.stack(labels, 1)[10:])
    np.savez(tmp_path / "calibration.npz", x=x[:10])
    text = (
        "model: {source: model.onnx, task: audio-classification, state: {state: stateN}}\n"
        "calibration: {data: calibration.npz}\nevaluate: {data: data.npz}\n"
        "gates: {quality: {min: 0.9}, flip_rate: {max: 0.1}}\n"
    )
    result = build(tmp_path, text, "evaluate:one", framework=framework)
    assert result.returncode == 0, result.stdout + result.stderr
    if framework == "onnxruntime" or VNNI:  # without, OpenVINO's int8 was seen to lose more, and another recipe was taken
        assert report(tmp_path)["rung"] == "static"
    baseline = json.loads((tmp_path / "build/one/evaluate.baseline/measurements.json").read_text())[0]
    assert (baseline["name"], baseline["n"]) == ("accuracy", 600)
    assert baseline["value"] > 0.999  # what numpy says in a loop of its own
    rows = {row["name"]: row for row in json.loads((tmp_path / "build/one/evaluate/measurements.json").read_text())}
    assert 0.9 < rows["quality"]["value"] < 1.001
    assert rows["cosine"]["n"] * 12 == rows["quality"]["n"]
    if framework != "onnxruntime":
        return
    ranges = onnx.load(tmp_path / "build/one/choose/model/model.onnx").graph.initializer
    scale = next(onnx.numpy_helper.to_array(one) for one in ranges if one.name == "state_scale")
    assert 0.5 < float(scale) * 255 < 2.5  # the states of real steps, which tanh keeps within ±1
