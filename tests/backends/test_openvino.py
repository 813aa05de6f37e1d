"""OpenVINO and NNCF for real, on the example model and on one that nobody here made: conversions, schemes, refusals, equal bytes."""

import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgebuild import onnxsource, quality, reference
from edgebuild.assess import assess
from edgebuild.backend import ModelFacts
from edgebuild.backends import openvino, openvino_ir
from edgebuild.errors import StepFailed
from edgebuild.source import find
from edgebuild.step import ENVIRONMENT, Action, Outcome
from tests.backends import holding
from tests.backends.magika import MAGIKA, features
from tests.conftest import VNNI

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "targets/models/digits.onnx"
CALIBRATION, EVALUATION = (ROOT / f"targets/data/digits-{name}.npz" for name in ("calibration", "eval"))


def convert(source: Path, out: Path, **files: Path) -> Outcome:
    out.mkdir()
    made = {"model": out / "model", "report": out / "report.json"}
    inputs = {"model": source, **{f"model.data/{path.name}": path for path in files.values()}}
    action = Action(verb="convert", backend="openvino", params={"task": "other"}, inputs=inputs, outputs=made)
    return holding.convert(action, assess(inputs))


def quantize(model: Path, out: Path, scheme: str, calibration: Path | None = None, **given: Any) -> Outcome:
    out.mkdir()
    settings = openvino.parameters(scheme, given, calibration is not None)
    params = {"task": "other", "scheme": scheme, "samples": None, **settings}
    inputs = {"model": model, **({"calibration": calibration} if calibration else {})}
    made = {"model": out / "model", "report": out / "report.json"}
    action = Action(verb="quantize", backend="openvino", params=params, inputs=inputs, outputs=made)
    return openvino.quantize(action, ModelFacts(format="onnx"))


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def tensor(name: str, shape: Sequence[int], seed: int = 0) -> onnx.TensorProto:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return numpy_helper.from_array(values / np.float32(max(shape[0], 1) ** 0.5), name)


def save(path: Path, nodes: Sequence[Any], weights: Sequence[Any], x: Sequence[Any], y: Sequence[Any], opset: int = 17) -> Path:
    """A model from `x` to `y`, both float32."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", x), ("y", y))]
    graph = helper.make_graph(nodes, "small", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def dense(path: Path, *sizes: int, opset: int = 17) -> Path:
    """Dense layers one behind the other, named fc0, fc1, …"""
    count = len(sizes) - 1
    nodes = [
        helper.make_node("MatMul", ["x" if i == 0 else f"h{i}", f"w{i}"], ["y" if i == count - 1 else f"h{i + 1}"], f"fc{i}")
        for i in range(count)
    ]
    weights = [tensor(f"w{i}", sizes[i : i + 2], seed=i) for i in range(count)]
    return save(path, nodes, weights, ["N", sizes[0]], ["N", sizes[-1]], opset)


def npz(path: Path, *shape: int) -> Path:
    np.savez(path, x=np.random.default_rng(1).standard_normal(shape).astype(np.float32))
    return path


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("openvino") / "converted"
    convert(DIGITS, out)
    return out


# -- convert --------------------------------------------------------------------------------------------------------------
def test_the_conversion_agrees_with_onnx_runtime(converted: Path) -> None:
    (held,) = report(converted)["against"]
    assert held["reference"] == "the source model in ONNX Runtime without optimisations"
    assert held["relative_l2"] < 1e-5
    assert report(converted)["verified"] is True
    assert report(converted)["opset"] == {"source": 18, "model": 18}
    assert sorted(contents(converted / "model")) == ["model.bin", "model.xml"]
    assert size(converted / "model") > DIGITS.stat().st_size  # float32 as stored, not float16


def test_precision_and_threads_are_pinned_and_said(converted: Path) -> None:
    session = openvino.open(converted / "model")
    assert session.runtime.endswith(", CPU, f32, 1 thread")
    assert report(converted)["runtime"] == session.runtime
    assert session.inputs == [{"name": "pixels", "dtype": "float32", "shape": [None, 1, 8, 8]}]
    found = session.infer({"pixels": np.zeros((2, 1, 8, 8), np.float32)})
    assert {name: (value.dtype.name, value.shape) for name, value in found.items()} == {"logits": ("float32", (2, 10))}
    with pytest.raises(StepFailed, match="not with tokens"):
        session.logits(np.zeros(1, np.int32))
    with pytest.raises(StepFailed, match="no tokenizer"):
        session.tokens("text")
    with pytest.raises(StepFailed, match="OpenVINO cannot run the model: "):
        session.infer({"pixels": np.zeros((2, 3), np.float32)})
    session.close()


def test_telemetry_is_off_in_a_worker(tmp_path: Path) -> None:
    """Without these variables openvino-telemetry makes a client's id in the home folder, and NNCF sends what it is called with."""
    code = (
        "from edgebuild.backends import openvino; openvino.smoke(); import nncf.telemetry as t; print(type(t.telemetry).__name__)"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), **ENVIRONMENT}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] != "NNCFTelemetry"
    assert list(tmp_path.iterdir()) == []


def test_an_old_opset_is_raised(tmp_path: Path) -> None:
    outcome = convert(dense(tmp_path / "old.onnx", 8, 4, opset=11), tmp_path / "out")
    assert outcome.summary == "opset 11 raised to 17, IR, same outputs as its source"
    assert report(tmp_path / "out")["opset"] == {"source": 11, "model": 17}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model", "report.json"]


def test_external_data(tmp_path: Path, converted: Path) -> None:
    onnx.save(
        onnx.load(DIGITS), tmp_path / "digits.onnx", save_as_external_data=True, location="weights.bin", size_threshold=1024
    )
    convert(tmp_path / "digits.onnx", tmp_path / "out", data=tmp_path / "weights.bin")
    assert contents(tmp_path / "out/model") == contents(converted / "model")


def test_a_wrong_conversion_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the opset's converter gives is another model: whatever reads it, its outputs are others."""
    source = dense(tmp_path / "old.onnx", 8, 4, opset=11)

    def spoiled(path: Path, target: Path) -> None:
        model = onnx.load(path)
        weights = numpy_helper.to_array(model.graph.initializer[0]).copy()
        weights[3] *= np.float32(1.05)
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights, "w0"))
        onnx.save(model, target)

    monkeypatch.setattr(onnxsource, "raise_opset", spoiled)
    with pytest.raises(StepFailed, match=r"held against the source model in ONNX Runtime .* output y has a relative L2 error"):
        convert(source, tmp_path / "out")


def test_an_output_that_is_all_but_zero_is_held_by_what_float32_can_tell(tmp_path: Path) -> None:
    """A detector's shut sigmoid: runtimes differ by 2 % of 1e-7 there, and by nothing that matters."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Sub", ["h", "high"], ["low"]),
        helper.make_node("Sigmoid", ["low"], ["y"]),
    ]
    for high, same in ((15.0, True), (6.0, False)):
        out = tmp_path / str(high)
        out.mkdir()
        weights = [tensor("w", [64, 64]), numpy_helper.from_array(np.float32(high), "high")]
        source = save(out / "model.onnx", nodes, weights, ["N", 64], ["N", 64])
        convert(source, out / "out")
        exact = openvino.open(out / "out/model").infer({"x": np.ones((4, 64), np.float32)})
        spoiled = {"y": exact["y"] * np.float32(1.01)}
        if same:
            assert reference.hold_outputs("the source", exact, spoiled)["verified"]
        else:
            with pytest.raises(StepFailed, match=r"relative L2 error of 0\.01"):
                reference.hold_outputs("the source", exact, spoiled)
        with pytest.raises(StepFailed, match="relative L2 error of 1 "):
            reference.hold_outputs("the source", exact, {"y": exact["y"] * 0})


def test_an_output_that_equals_another_value_keeps_its_name(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["aaa"]),
        helper.make_node("Identity", ["aaa"], ["bbb"]),
        helper.make_node("Identity", ["bbb"], ["y"]),
    ]
    convert(save(tmp_path / "same.onnx", nodes, [tensor("w", [4, 4])], ["N", 4], ["N", 4]), tmp_path / "out")
    assert list(openvino.open(tmp_path / "out/model").infer({"x": np.ones((1, 4), np.float32)})) == ["y"]


def test_what_openvino_cannot_read_is_one_sentence(tmp_path: Path) -> None:
    source = save(tmp_path / "no.onnx", [helper.make_node("No\u202eSuch", ["x"], ["y"])], [], ["N", 4], ["N", 4])
    with pytest.raises(StepFailed, match=r"^OpenVINO cannot read this model: .*No\\u202eSuch.* or name framework: onnxruntime$"):
        convert(source, tmp_path / "out")


# -- quantize -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("scheme", "given", "calibrated", "ratio"),
    [
        ("int8", {}, True, 0.32),
        ("int8", {"symmetric": True}, True, 0.32),
        ("int8", {"method": "weights"}, True, 0.32),
        ("int8", {"symmetric": True}, False, 0.32),
        ("int4", {}, False, 0.32),
        ("int4", {"symmetric": True, "group_size": 32}, False, 0.32),
    ],
)
def test_quantize(converted: Path, tmp_path: Path, scheme: str, given: dict[str, Any], calibrated: bool, ratio: float) -> None:
    outcome = quantize(converted / "model", tmp_path / "out", scheme, CALIBRATION if calibrated else None, **given)
    found = report(tmp_path / "out")
    assert found["operators"] == found["quantizable"] == 5
    assert found["method"] == ("static" if calibrated and "method" not in given else "weights")
    assert found["weights"] == ({"int4": 1, "int8": 4} if scheme == "int4" else {"int8": 5})
    assert found["bytes_before"] == size(converted / "model")
    assert found["bytes_after"] == size(tmp_path / "out/model") < ratio * found["bytes_before"]
    assert outcome.summary.startswith(f"{scheme} {found['method']}, 5 of 5 operators, ")
    exact, made = (openvino.open(place / "model") for place in (converted, tmp_path / "out"))
    feeds = {"pixels": np.load(EVALUATION)["pixels"]}
    same = exact.infer(feeds)["logits"].argmax(-1) == made.infer(feeds)["logits"].argmax(-1)
    assert same.mean() > 0.99


def test_the_same_bytes_twice_in_one_process(converted: Path, tmp_path: Path) -> None:
    """OpenVINO numbers what has no name through all that a process makes: without renaming, these would differ."""
    convert(DIGITS, tmp_path / "again")
    assert contents(tmp_path / "again/model") == contents(converted / "model")
    for scheme, data in (("int8", CALIBRATION), ("int8", None), ("int4", None)):
        made = []
        for i in range(2):
            out = tmp_path / f"{scheme}{data is None}{i}"
            quantize(Path(shutil.copytree(converted / "model", tmp_path / f"in{out.name}")), out, scheme, data)
            made.append(contents(out / "model"))
        assert made[0] == made[1]


def test_generated_names_differ_without_renaming(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_ir, "rename", lambda xml, kept: None)
    for name in "ab":
        quantize(converted / "model", tmp_path / name, "int8")
    first, second = (contents(tmp_path / name / "model") for name in "ab")
    assert first["model.bin"] == second["model.bin"]
    assert first["model.xml"] != second["model.xml"]


@pytest.mark.parametrize(
    ("names", "left"),
    [(["Conv"], 2), (["MatMul"], 3), (["Gemm"], 3), (["Convolution", "Gemm"], None), (["no such"], None)],
)
def test_exclude(converted: Path, tmp_path: Path, names: list[str], left: int | None) -> None:
    if left:
        assert (
            f", {left} of 5 operators, "
            in quantize(converted / "model", tmp_path / "out", "int8", CALIBRATION, exclude=names).summary
        )
        return
    unknown = 'quantize.exclude: no node or operator is called "no such"; operators: Add, .*Convolution, MatMul'
    with pytest.raises(StepFailed, match=unknown if names == ["no such"] else "nothing was quantized: none of its 5 quantizable"):
        quantize(converted / "model", tmp_path / "out", "int8", CALIBRATION, exclude=names)


def test_exclude_by_the_names_of_the_source(tmp_path: Path) -> None:
    convert(dense(tmp_path / "model.onnx", 64, 64, 64, 64), tmp_path / "in")
    assert "2 of 3 operators" in quantize(tmp_path / "in/model", tmp_path / "out", "int8", exclude=["fc1"]).summary
    assert report(tmp_path / "out")["not_quantized"] == report(tmp_path / "out")["exclude"] == ["fc1"]


def test_nothing_to_quantize_and_bigger_files_fail(tmp_path: Path) -> None:
    source = save(tmp_path / "add.onnx", [helper.make_node("Add", ["x", "w"], ["y"])], [tensor("w", [64])], ["N", 64], ["N", 64])
    convert(source, tmp_path / "add")
    with pytest.raises(
        StepFailed, match=r"nothing was quantized: it has no operator that could be .* leave this model unquantized"
    ):
        quantize(tmp_path / "add/model", tmp_path / "no", "int8")
    convert(dense(tmp_path / "tiny.onnx", 4, 4), tmp_path / "tiny")
    with pytest.raises(StepFailed, match=r"quantizing made it bigger: .* leave this model unquantized"):
        quantize(tmp_path / "tiny/model", tmp_path / "bigger", "int8")
    with pytest.raises(StepFailed, match=r"nothing became int4: .* write scheme: int8"):
        quantize(convert_dense(tmp_path / "one", 256, 256), tmp_path / "int4", "int4")


def convert_dense(place: Path, *sizes: int) -> Path:
    place.mkdir()
    convert(dense(place / "model.onnx", *sizes), place / "out")
    return place / "out/model"


def test_a_group_size_that_does_not_divide_is_one_message(tmp_path: Path) -> None:
    model = convert_dense(tmp_path / "in", 96, 98, 128, 64)
    with pytest.raises(
        StepFailed,
        match=r"^quantize.group_size: 64 does not divide the 96 inputs of the layer fc0, as have 1 more; leave such layers in float",
    ):
        quantize(model, tmp_path / "no", "int4")
    model = convert_dense(tmp_path / "other", 96, 160, 128)
    with pytest.raises(StepFailed, match=r"the 96 inputs of the layer fc0; 32 or 16 or 8 would fit$"):
        quantize(model, tmp_path / "neither", "int4")
    assert "int4 weights, 2 of 2 operators" in quantize(model, tmp_path / "out", "int4", group_size=32).summary


def test_a_ratio_below_one_leaves_layers_in_int8(tmp_path: Path) -> None:
    model = convert_dense(tmp_path / "in", 128, 128, 128, 128, 128, 128)
    quantize(model, tmp_path / "all", "int4")
    assert report(tmp_path / "all")["weights"] == {"int4": 4, "int8": 1}
    for name, data in (("some", None), ("seen", npz(tmp_path / "x.npz", 20, 128))):
        quantize(model, tmp_path / name, "int4", data, ratio=0.5)
        assert 0 < report(tmp_path / name)["weights"]["int4"] < 4
        assert report(tmp_path / name)["samples"] == (20 if data else 0)


def attention(path: Path) -> Path:
    nodes = [
        *(helper.make_node("MatMul", ["x", f"w{name}"], [name]) for name in "qkv"),
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["shares"]),
        helper.make_node("MatMul", ["shares", "v"], ["mixed"]),
        helper.make_node("MatMul", ["mixed", "wo"], ["y"]),
    ]
    weights = [tensor(f"w{name}", [64, 64], seed) for seed, name in enumerate("qkvo")]
    return save(path, nodes, weights, [1, 16, 64], [1, 16, 64])


def test_attention_is_found_and_told_to_nncf(converted: Path, tmp_path: Path) -> None:
    convert(attention(tmp_path / "attention.onnx"), tmp_path / "in")
    quantize(tmp_path / "in/model", tmp_path / "out", "int8", npz(tmp_path / "x.npz", 20, 1, 16, 64))
    assert report(tmp_path / "out")["model_type"] == "transformer"
    ends = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Softmax", ["h"], ["y"])]
    convert(save(tmp_path / "end.onnx", ends, [tensor("w", [64, 64])], ["N", 64], ["N", 64]), tmp_path / "other")
    quantize(tmp_path / "other/model", tmp_path / "plain", "int8", npz(tmp_path / "y.npz", 20, 64))
    assert report(tmp_path / "plain")["model_type"] is None


def test_recurrent_layers_stay_in_float(tmp_path: Path) -> None:
    """NNCF would quantize them; the files then give one answer for all inputs, which is only seen when they are read again."""
    nodes = [
        helper.make_node("LSTM", ["x", "w", "r"], ["", "h"], "lstm", hidden_size=64),
        helper.make_node("Squeeze", ["h", "axis"], ["s"]),
        helper.make_node("MatMul", ["s", "fc"], ["y"], "fc0"),
    ]
    weights = [
        tensor("w", [1, 256, 64]),
        tensor("r", [1, 256, 64], 1),
        tensor("fc", [64, 64], 2),
        numpy_helper.from_array(np.array([0]), "axis"),
    ]
    convert(save(tmp_path / "model.onnx", nodes, weights, [12, 1, 64], [1, 64]), tmp_path / "in")
    data = npz(tmp_path / "x.npz", 20, 12, 1, 64)
    outcome = quantize(tmp_path / "in/model", tmp_path / "out", "int8", data)
    assert "int8 static, 1 of 2 operators, " in outcome.summary
    exact, made = (openvino.open(tmp_path / name / "model") for name in ("in", "out"))
    pairs = [[one.infer({"x": x})["y"].ravel() for one in (exact, made)] for x in np.load(data)["x"]]
    assert all(np.corrcoef(*pair)[0, 1] > 0.95 for pair in pairs)


@pytest.mark.parametrize("name", list(openvino.LADDER))
def test_every_recipe_works_on_the_example(converted: Path, tmp_path: Path, name: str) -> None:
    quantize(converted / "model", tmp_path / "out", "int8", CALIBRATION, method=name)
    assert report(tmp_path / "out")["operators"] == 5


def test_calibration_of_other_names_or_shapes_is_one_message(converted: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "wrong.npz", pixel=np.zeros((4, 1, 8, 8), np.float32))
    with pytest.raises(StepFailed, match=r'wrong.npz: no array "pixels"'):
        quantize(converted / "model", tmp_path / "out", "int8", tmp_path / "wrong.npz")


def test_parameters() -> None:
    plain = {"symmetric": False, "exclude": [], "only": []}
    assert openvino.parameters("int8", {}, True) == {"method": "static", "activations": True, "max_drop": None, **plain}
    assert openvino.parameters("int8", {"method": "auto"}, False)["method"] == "weights"
    assert openvino.parameters("int4", {}, False) == {
        "method": "weights",
        "activations": False,
        "group_size": 64,
        "ratio": 1.0,
        **plain,
    }
    for scheme, given, calibrated, says in (
        ("int8", {"method": "static"}, False, "method: static needs calibration.data; give it, or write method: weights"),
        (
            "int8",
            {"method": "dynamic"},
            True,
            'method: no recipe "dynamic"; there are: auto, static, symmetric, dense, within, weights',
        ),
        ("int8", {"max_drop": 0.01}, False, "max_drop: it is kept on calibration data, so it needs calibration.data"),
        ("int4", {"ratio": 0}, False, "ratio: 0 leaves no layer in int4; write scheme: int8"),
    ):
        with pytest.raises(ValueError, match=f"^{says}"):
            openvino.parameters(scheme, given, calibrated)


@pytest.mark.parametrize(
    ("facts", "parameters", "reason"),
    [
        ({"operators": {"Conv": 1, "com.microsoft.FusedConv": 1}}, {"scheme": "int8"}, ""),
        ({"operators": {"ai.onnx.ml.TreeEnsembleClassifier": 1}}, {}, "uses the operator ai.onnx.ml.TreeEnsembleClassifier"),
        ({"quantized": "QLinearConv"}, {"scheme": "int8"}, "quantized already (QLinearConv); quantize: {scheme: none}"),
        ({"quantized": "QLinearConv"}, {}, ""),
        ({"operators": {"If": 1, "Conv": 6}, "parameters": {"F32": 9}}, {"scheme": "int8"}, "all its weights lie inside If"),
        ({"operators": {"If": 1, "Conv": 6}, "parameters": {"F32": 9}}, {}, ""),
        ({"operators": {"If": 1}, "parameters": {"F32": 9}, "weights": {"Conv": 9}}, {"scheme": "int8"}, ""),
    ],
)
def test_refuse(facts: dict[str, Any], parameters: dict[str, Any], reason: str) -> None:
    found = openvino.refuse(ModelFacts(format="onnx", **facts), parameters)
    assert reason in found
    assert bool(reason) == bool(found)


@pytest.mark.parametrize(
    ("scheme", "given", "calibrated"),
    [("none", {}, False), ("int8", {}, True), ("int8", {}, False), ("int4", {}, False)],
)
def test_estimates_of_a_real_model(converted: Path, tmp_path: Path, scheme: str, given: dict[str, Any], calibrated: bool) -> None:
    made, settings = converted / "model", {}
    if scheme != "none":
        quantize(made, tmp_path / "out", scheme, CALIBRATION if calibrated else None, **given)
        made, settings = tmp_path / "out/model", dict(openvino.parameters(scheme, given, calibrated))
    expected = openvino.estimate(assess({"model": DIGITS}), scheme, settings, 10**11)
    assert expected.artifact == pytest.approx(size(made), rel=0.05)


# -- a model that nobody here made ----------------------------------------------------------------------------------------
def files_of_many_kinds(count: int) -> NDArray[np.int32]:
    """[count, 2048], of Python's own files and its packages', at most 30 of a suffix."""
    by_suffix: dict[str, list[Path]] = {}
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("include"), Path(onnx.__file__).parents[1]):
        for path in sorted(Path(root).rglob("*")):
            if path.is_file() and 200 < path.stat().st_size < 10**6:
                by_suffix.setdefault(path.suffix, []).append(path)
    found = [path for paths in by_suffix.values() for path in random.Random(1).sample(paths, min(len(paths), 30))]
    return np.stack([features(path.read_bytes()) for path in random.Random(2).sample(found, count)])


@pytest.fixture(scope="module")
def magika(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model converted, 100 files to calibrate by and 300 others to evaluate on, labelled by the float model's own answers."""
    place = tmp_path_factory.mktemp("magika")
    source = Path(find(".", MAGIKA, "t", "").files["model"])
    convert(source, place / "converted")
    rows = files_of_many_kinds(400)
    session = onnxsource.OnnxSession(source)
    labels = np.concatenate([session.infer({"bytes": row[None]})["target_label"].argmax(-1) for row in rows])
    assert len(set(labels.tolist())) > 40
    np.savez(place / "calibration.npz", bytes=rows[:100])
    np.savez(place / "evaluation.npz", bytes=rows[100:], labels=labels[100:])
    return place


def evaluate(model: Path, data: Path, out: Path, baseline: Path | None = None) -> dict[str, float | None]:
    """The step `evaluate`; → its measurements by name."""
    out.mkdir(exist_ok=True)
    inputs = {"model": model, "data": data, **({"baseline": baseline / "answers"} if baseline else {})}
    outputs = {"measurements": out / "measurements.json", **({} if baseline else {"answers": out / "answers"})}
    params = {"task": "other-classification", "role": "candidate" if baseline else "baseline"}
    quality.run(Action(verb="evaluate", backend="openvino", params=params, inputs=inputs, outputs=outputs), openvino)
    return {row["name"]: row["value"] for row in json.loads((out / "measurements.json").read_text(encoding="utf-8"))}


@pytest.mark.slow
def test_magika_keeps_its_answers_by_all_recipes_but_the_plain_one(magika: Path, tmp_path: Path) -> None:
    evaluate(magika / "converted/model", magika / "evaluation.npz", tmp_path / "baseline")
    kept = {}
    for name in ("static", "dense", "weights"):
        quantize(magika / "converted/model", tmp_path / name, "int8", magika / "calibration.npz", method=name)
        kept[name] = evaluate(tmp_path / name / "model", magika / "evaluation.npz", tmp_path / name, tmp_path / "baseline")[
            "quality"
        ]
    assert kept["static"] < 0.9  # what a gate is for: no tool said a word
    assert kept["dense"] > 0.95
    assert kept["weights"] > 0.97


# -- max_drop -------------------------------------------------------------------------------------------------------------
def with_an_outlier(path: Path) -> Path:
    """Three dense layers; one value behind the first is thousands of times the others, and matters as little as each of them."""
    weights = [np.random.default_rng(seed).standard_normal((64, 64)).astype(np.float32) / 8 for seed in range(3)]
    weights[0][:, 0] *= 5000
    weights[1][0] /= 5000
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["h0"], "fc0"),
        helper.make_node("Relu", ["h0"], ["r0"]),
        helper.make_node("MatMul", ["r0", "w1"], ["h1"], "fc1"),
        helper.make_node("Relu", ["h1"], ["r1"]),
        helper.make_node("MatMul", ["r1", "w2"], ["y"], "fc2"),
    ]
    return save(path, nodes, [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)], ["N", 64], ["N", 64])


def test_max_drop_gives_sensitive_operators_back(tmp_path: Path) -> None:
    convert(with_an_outlier(tmp_path / "model.onnx"), tmp_path / "in")
    data = npz(tmp_path / "x.npz", 100, 64)
    session = openvino.open(tmp_path / "in/model")
    x = np.load(data)["x"]

    def changed(out: Path) -> float:
        pair = (session, openvino.open(out / "model"))
        return float(np.not_equal(*(one.infer({"x": x})["y"].argmax(-1) for one in pair)).mean())

    quantize(tmp_path / "in/model", tmp_path / "plain", "int8", data)
    assert report(tmp_path / "plain")["operators"] == 3
    assert changed(tmp_path / "plain") > 0.5
    limit = 0.1 if VNNI else 0.2  # 0.11 is the least that was seen on a processor without
    quantize(tmp_path / "in/model", tmp_path / "out", "int8", data, max_drop=limit)
    found = report(tmp_path / "out")
    assert 0 < found["operators"] < 3
    assert changed(tmp_path / "out") == pytest.approx(found["changed"])
    assert found["changed"] <= found["max_drop"] == limit


def test_max_drop_is_for_classifiers(tmp_path: Path) -> None:
    convert(attention(tmp_path / "attention.onnx"), tmp_path / "in")
    with pytest.raises(StepFailed, match=r"quantize.max_drop counts changed answers of classifiers, but .* \[1, 16, 64\]"):
        quantize(tmp_path / "in/model", tmp_path / "out", "int8", npz(tmp_path / "x.npz", 20, 1, 16, 64), max_drop=0.01)


def test_max_drop_that_cannot_be_kept_fails(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """NNCF ends without a word where no operator is left to give back; then the answers are counted all the same."""
    import nncf

    def gives_up(model: Any, *rest: Any, **given: Any) -> Any:
        return nncf.quantize(
            model, rest[0], preset=given["preset"], subset_size=given["subset_size"], ignored_scope=given["ignored_scope"]
        )

    answers: Callable[[Any], Any] = openvino._answers
    seen: list[int] = []

    def drifting(scores: Any) -> Any:
        seen.append(1)
        return answers(scores) + (len(seen) > 200)  # the samples' answers, as from another model

    monkeypatch.setattr(nncf, "quantize_with_accuracy_control", gives_up)
    monkeypatch.setattr(openvino, "_answers", drifting)
    with pytest.raises(
        StepFailed, match=r"quantize.max_drop: 1 of the 200 calibration samples are answered otherwise, more than 0"
    ):
        quantize(converted / "model", tmp_path / "out", "int8", CALIBRATION, max_drop=0)
