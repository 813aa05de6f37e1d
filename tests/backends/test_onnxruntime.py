"""int8 on ONNX models that nobody here made: the ladder of recipes, through real builds of ONNX Runtime."""

import json
import subprocess
import sys
import sysconfig
from importlib.metadata import files
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgebuild.backends import onnxruntime
from tests.conftest import ROOT

BIN = Path(sys.executable).parent
HEAD = "edgebuild: 1\nplatform: generic-cpu\n"
DIGITS = ROOT / "targets" / "models" / "digits.onnx"


def build(folder: Path, text: str, *words: str, framework: str = "onnxruntime") -> "subprocess.CompletedProcess[str]":
    """`targets/one.yaml` with this text, built as far as `words` say."""
    (folder / "targets").mkdir(exist_ok=True)
    (folder / "targets" / "one.yaml").write_text(f"{HEAD}framework: {framework}\n{text}")
    (folder / "dodo.py").write_text((ROOT / "dodo.py").read_text())
    return subprocess.run([str(BIN / "doit"), *words], cwd=folder, capture_output=True, text=True, timeout=600)


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "build" / "one" / "choose" / "report.json").read_text())
    return found


# -- magika: 214 content types, by Google ----------------------------------------------------------------------------------
KINDS = {
    ".py": "python",
    ".pyc": "pythonbytecode",
    ".json": "json",
    ".c": "c",
    ".h": "c",
    ".txt": "txt",
    ".rst": "rst",
    ".so": "elf",
}
MAGIKA = "package:magika/magika/models/standard_v3_3/model.onnx"


def features(data: bytes) -> NDArray[np.int32]:
    """What magika looks at: the first and the last 1,024 bytes without white space, filled up with 256 (its config.min.json)."""
    first, last = data[:4096].lstrip()[:1024], data[-4096:].rstrip()[-1024:]
    row = np.full(2048, 256, np.int32)
    row[: len(first)] = list(first)
    row[2048 - len(last) :] = list(last)
    return row


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of this Python installation and their types by suffix: 30 to calibrate on, and up to 300 to evaluate on."""
    config = next(path for path in files("magika") or () if path.match("standard_v3_3/config.min.json"))
    classes = json.loads(config.read_text())["target_labels_space"]
    found: dict[str, list[Path]] = {}
    for place in (sysconfig.get_paths()["stdlib"], Path(np.__file__).parent, Path(onnx.__file__).parent):
        for path in sorted(Path(place).rglob("*")):
            if path.suffix in KINDS and path.stat().st_size > 64 and len(found.setdefault(KINDS[path.suffix], [])) < 45:
                found[KINDS[path.suffix]].append(path)
    rows = [(features(path.read_bytes()), classes.index(kind)) for kind, paths in found.items() for path in paths]
    assert len({label for _, label in rows}) >= 4
    order = np.random.default_rng(0).permutation(len(rows))
    inputs, labels = np.stack([rows[i][0] for i in order]), np.array([rows[i][1] for i in order])
    folder = tmp_path_factory.mktemp("content")
    np.savez(folder / "calibration.npz", bytes=inputs[:30])
    np.savez(folder / "data.npz", bytes=inputs[30:], labels=labels[30:])
    return folder


@pytest.mark.slow
def test_the_ladder_finds_what_quantizes_magika(content: Path, tmp_path: Path) -> None:
    """The tutorial's recipe crashes in the tool; Conv and MatMul with float biases keep the accuracy at a quarter of the bytes."""
    data = f"calibration: {{data: {content}/calibration.npz}}\nevaluate: {{data: {content}/data.npz}}\n"
    result = build(tmp_path, f"model: {{source: {MAGIKA}, task: text-classification}}\n{data}", "evaluate:one")
    assert result.returncode == 0, result.stdout + result.stderr
    found = report(tmp_path)
    rows = {row["name"]: row for row in found["rungs"]}
    assert not rows["static"]["held"]
    assert "onnxruntime.quantization failed: The truth value of an array" in rows["static"]["reason"]
    assert found["rung"] == "conv-matmul"
    assert rows["conv-matmul"]["values"]["quality"] >= 0.98
    assert found["bytes_after"] < 0.3 * found["bytes_before"]
    assert "not tried" in rows["conv"]["reason"]
    measured = json.loads((tmp_path / "build" / "one" / "evaluate" / "measurements.json").read_text())
    assert next(row["value"] for row in measured if row["name"] == "quality") >= 0.98


# -- models for which no recipe does ---------------------------------------------------------------------------------------
def nested(path: Path) -> None:
    """A matrix product that lies, weights and all, in the branches of an If: no tool reaches it."""
    weights = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)

    def branch(name: str, factor: float) -> onnx.GraphProto:
        constant = helper.make_node("Constant", [], ["w"], value=onnx.numpy_helper.from_array(weights * factor))
        output = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 64])
        return helper.make_graph([constant, helper.make_node("MatMul", ["x", "w"], ["z"])], name, [], [output])

    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["y"], then_branch=branch("a", 1.0), else_branch=branch("b", 0.5)),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "nested",
        [value("x", TensorProto.FLOAT, ["N", 64])],
        [value("y", TensorProto.FLOAT, ["N", 64])],
        [onnx.numpy_helper.from_array(np.zeros((), np.float32), "zero")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.mark.slow
def test_weights_in_subgraphs_are_said_to_be_unquantizable(tmp_path: Path) -> None:
    nested(tmp_path / "nested.onnx")
    np.savez(tmp_path / "calibration.npz", x=np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32))
    result = build(tmp_path, "model: {source: nested.onnx, task: other}\ncalibration: {data: calibration.npz}\n")
    assert result.returncode == 1
    assert "no recipe keeps cosine: static, static-u8" in result.stderr
    assert "nothing was quantized" in result.stderr
    assert "leave this model unquantized (quantize: {scheme: none})" in result.stderr
    assert "Traceback" not in result.stderr
    evidence = json.loads((tmp_path / "build" / "one" / "evidence.json").read_text())
    assert {row["held"] for row in evidence["quantization"]["rungs"]} <= {False, None}
    assert evidence["bundle"]["bytes"] is None
    assert not (tmp_path / "dist").exists() or not list((tmp_path / "dist").iterdir())


@pytest.mark.slow
def test_every_recipe_is_tried_before_none_is_said_to_hold(tmp_path: Path) -> None:
    """No int8 has 60 dB. Each recipe made what it says: other operators, another file."""
    data = ROOT / "targets" / "data"
    text = (
        f"model: {{source: {DIGITS}, task: image-classification}}\ncalibration: {{data: {data}/digits-calibration.npz, samples: 20}}\n"
        f"evaluate: {{data: {data}/digits-eval.npz}}\ngates: {{snr: {{min: 60}}}}\n"
    )
    result = build(tmp_path, text, "choose:one")
    assert result.returncode == 1
    rows = {row["name"]: row for row in report(tmp_path)["rungs"]}
    assert list(rows) == list(onnxruntime.LADDER)
    assert all(row["held"] is False and row["reason"].startswith("snr ") for row in rows.values()), rows
    assert all(row["values"]["quality"] > 0.9 for row in rows.values())
    models = {name: onnx.load(tmp_path / f"build/one/quantize.{name}/model/model.onnx").graph for name in rows}
    reports = {name: json.loads((tmp_path / f"build/one/quantize.{name}/report.json").read_text()) for name in rows}
    assert {name: one["operators"] for name, one in reports.items()} == {
        "static": 5, "static-u8": 5, "conv-matmul": 5, "conv": 3, "dynamic-matmul": 2, "sensitive": 4,
    }  # fmt: skip
    unsigned = {name for name, graph in models.items() if any(one.data_type == TensorProto.UINT8 for one in graph.initializer)}
    assert unsigned == {"static-u8", "conv-matmul", "conv", "sensitive"}
    assert 2 <= len(reports["sensitive"]["float"]) <= 4  # about a quarter of its eleven nodes
    biases = {name for name, graph in models.items() if any(one.data_type == TensorProto.INT32 for one in graph.initializer)}
    assert biases == {"static", "static-u8", "conv"}
    assert not any(node.op_type == "ConvInteger" for node in models["dynamic-matmul"].node)
    sizes = {name: row["bytes"] for name, row in rows.items()}
    assert sizes["static"] < sizes["dynamic-matmul"]
    assert sizes["conv-matmul"] < sizes["conv"]


# -- a model of which some layers are sensitive ------------------------------------------------------------------------------
def outlier(path: Path) -> None:
    """Eight matrix products, the fourth of which makes one channel 10,000 times larger than the others, and the fifth undoes that.

    As in transformers: an int8 of the whole tensor has no steps left for the other channels.
    """
    rng = np.random.default_rng(0)
    weights = [np.linalg.qr(rng.standard_normal((32, 32)))[0] for _ in range(8)]
    weights[3] = weights[3] @ np.diag([10_000.0, *[1.0] * 31])
    weights[4] = np.diag([1e-4, *[1.0] * 31]) @ weights[4]
    names = ["x", *(f"hidden{i}" for i in range(7)), "y"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(8)]  # nodes without names
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 32]) for name in ("x", "y")]
    tensors = [onnx.numpy_helper.from_array(one.astype(np.float32), f"w{i}") for i, one in enumerate(weights)]
    graph = helper.make_graph(nodes, "outlier", values[:1], values[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.mark.slow
def test_the_layers_that_lose_most_are_found_and_left_in_float(tmp_path: Path) -> None:
    outlier(tmp_path / "outlier.onnx")
    np.savez(tmp_path / "calibration.npz", x=np.random.default_rng(1).standard_normal((32, 32)).astype(np.float32))
    result = build(tmp_path, "model: {source: outlier.onnx, task: other}\ncalibration: {data: calibration.npz}\n", "evaluate:one")
    assert result.returncode == 0, result.stdout + result.stderr
    found = report(tmp_path)
    rows = {row["name"]: row for row in found["rungs"]}
    assert found["rung"] == "sensitive"
    assert found["operators"] == 6
    assert found["float"] == ["MatMul_3", "MatMul_4"]
    assert rows["sensitive"]["values"]["cosine"] > 0.999
    assert all(rows[name]["values"]["cosine"] < 0.9 for name in ("static", "static-u8", "conv-matmul", "dynamic-matmul"))
    assert rows["conv"]["held"] is None


# -- parameters -------------------------------------------------------------------------------------------------------------
def test_each_rung_is_a_method_by_its_name() -> None:
    for name in onnxruntime.LADDER:
        found = onnxruntime.parameters("int8", {"method": name}, calibrated=True)
        assert found["method"] == name
    assert onnxruntime.parameters("int8", {}, calibrated=False)["method"] == "dynamic"
    with pytest.raises(ValueError, match=r'method: no recipe "statik"; there are: auto, static, .*Did you mean "static"'):
        onnxruntime.parameters("int8", {"method": "statik"}, calibrated=True)
    with pytest.raises(ValueError, match=r"method: conv needs calibration.data"):
        onnxruntime.parameters("int8", {"method": "conv"}, calibrated=False)
