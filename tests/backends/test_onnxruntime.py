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
from onnx import TensorProto, helper

from edgebuild import onnxsource
from edgebuild.assess import assess
from edgebuild.backends import onnxruntime
from edgebuild.errors import StepFailed
from edgebuild.step import Action
from tests.backends.magika import MAGIKA, features
from tests.conftest import ROOT, VNNI

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
def nested(path: Path, width: int | str = 64) -> None:
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
        [value("x", TensorProto.FLOAT, ["N", width])],
        [value("y", TensorProto.FLOAT, ["N", 64])],
        [onnx.numpy_helper.from_array(np.zeros((), np.float32), "zero")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.mark.slow
def test_weights_in_subgraphs_are_said_to_be_unquantizable(tmp_path: Path) -> None:
    nested(tmp_path / "nested.onnx")
    np.savez(tmp_path / "calibration.npz", x=np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32))
    target = "model: {source: nested.onnx, task: other}\ncalibration: {data: calibration.npz}\n"
    planned = build(tmp_path, target)  # the scheme is left to edgebuild, which looks at the model's header first
    assert planned.returncode == 3
    assert "all its weights lie inside If, where no quantizer looks" in planned.stderr
    result = build(tmp_path, f"{target}quantize: {{scheme: int8}}\n")
    assert result.returncode == 1
    assert (
        "no recipe keeps cosine: static, static-u8, conv-matmul, dynamic-matmul, sensitive: onnxruntime refuses this model: all its weights lie inside If"
        in result.stderr
    )
    assert "leave this model unquantized (quantize: {scheme: none})" in result.stderr
    assert "Traceback" not in result.stderr
    evidence = json.loads((tmp_path / "build" / "one" / "evidence.json").read_text())
    assert {row["held"] for row in evidence["quantization"]["rungs"]} <= {False, None}
    assert evidence["bundle"]["bytes"] is None
    assert not (tmp_path / "dist").exists() or not list((tmp_path / "dist").iterdir())
    # A size that no branch can take: ONNX Runtime does not load it, and that is not all there is to say.
    nested(tmp_path / "nested.onnx", "M")
    result = build(tmp_path, target.replace("nested.onnx", "nested.onnx, shape: {x: [4, 32]}") + "quantize: {scheme: int8}\n")
    assert "ONNX Runtime does not load model.onnx" in result.stderr
    assert "nor could it be quantized: all its weights lie inside If" in result.stderr


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
        "static": 5, "static-u8": 5, "conv-matmul": 5, "conv": 3, "conv-clipped": 3, "dynamic-matmul": 2, "sensitive": 4,
    }  # fmt: skip
    unsigned = {name for name, graph in models.items() if any(one.data_type == TensorProto.UINT8 for one in graph.initializer)}
    assert unsigned == {"static-u8", "conv-matmul", "conv", "conv-clipped", "sensitive"}
    assert 2 <= len(reports["sensitive"]["float"]) <= 4  # about a quarter of its eleven nodes
    biases = {name for name, graph in models.items() if any(one.data_type == TensorProto.INT32 for one in graph.initializer)}
    assert biases == {"static", "static-u8", "conv", "conv-clipped"}
    assert not any(node.op_type == "Gemm" for name in ("conv-matmul", "sensitive") for node in models[name].node)
    assert any(node.op_type == "Gemm" for node in models["conv"].node)
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
    assert rows["sensitive"]["values"]["cosine"] > (0.999 if VNNI else 0.99)
    assert all(rows[name]["values"]["cosine"] < 0.9 for name in ("static", "static-u8", "conv-matmul", "dynamic-matmul"))
    assert rows["conv"]["held"] is None


# -- a few loud values -------------------------------------------------------------------------------------------------------
def spectrum(path: Path) -> None:
    """Two convolutions, for an input in which one value of thousands is much larger than the others."""
    rng, value = np.random.default_rng(0), helper.make_tensor_value_info
    weights = [rng.standard_normal(shape).astype(np.float32) / 8 for shape in ((256, 8, 1), (4, 256, 1))]
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["hidden"]),
        helper.make_node("Tanh", ["hidden"], ["bounded"]),
        helper.make_node("Conv", ["bounded", "b"], ["y"]),
    ]
    tensors = [onnx.numpy_helper.from_array(one, name) for one, name in zip(weights, "ab", strict=True)]
    shapes = [value("x", TensorProto.FLOAT, ["N", 8, 64]), value("y", TensorProto.FLOAT, ["N", 4, 64])]
    graph = helper.make_graph(nodes, "spectrum", shapes[:1], shapes[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def test_ranges_are_clipped_where_a_few_values_stretch_them(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    spectrum(tmp_path / "source" / "model.onnx")
    x = np.random.default_rng(1).standard_normal((90, 8, 64)).astype(np.float32)
    x[0, 0, 0] = 1_000  # one value in 15,360 that the calibration sees
    np.savez(tmp_path / "calibration.npz", x=x[:30])
    before = onnxruntime.open(tmp_path / "source").infer({"x": x[30:]})["y"]
    kept = {}
    for method in ("conv", "conv-clipped"):
        place = tmp_path / method
        place.mkdir()
        params = {"scheme": "int8", "samples": None, **onnxruntime.parameters("int8", {"method": method}, True)}
        inputs = {"model": tmp_path / "source", "calibration": tmp_path / "calibration.npz"}
        outputs = {"model": place / "model", "report": place / "report.json"}
        action = Action(verb="quantize", backend="onnxruntime", params=params, inputs=inputs, outputs=outputs)
        onnxruntime.quantize(action, assess({"model": tmp_path / "source" / "model.onnx"}))
        after = onnxruntime.open(place / "model").infer({"x": x[30:]})["y"]
        kept[method] = float((before * after).sum() / np.sqrt(np.square(before).sum() * np.square(after).sum()))
        assert [path.name for path in (place / "model").iterdir()] == ["model.onnx"]
    assert kept["conv"] < 0.8 < 0.95 < kept["conv-clipped"], kept


# -- int4 of weights ---------------------------------------------------------------------------------------------------------
def products(path: Path, width: int = 128) -> None:
    """A matrix product, linear layers as Gemm with and without a transposed weight, and one whose weight is an input's."""
    rng, value = np.random.default_rng(0), helper.make_tensor_value_info
    weights = {name: rng.standard_normal((width, width)).astype(np.float32) / 10 for name in ("a", "b", "c")}
    weights["bias"] = rng.standard_normal(width).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["xa"]),
        helper.make_node("Gemm", ["xa", "b", "bias"], ["xb"], transB=1),
        helper.make_node("Relu", ["xb"], ["r"]),
        helper.make_node("Gemm", ["r", "c"], ["xc"], name="last"),
        helper.make_node("Gemm", ["xc", "other"], ["y"]),
    ]
    values = [value("x", TensorProto.FLOAT, ["N", width]), value("other", TensorProto.FLOAT, [width, 4])]
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "products", values, [value("y", TensorProto.FLOAT, ["N", 4])], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def in_groups(source: Path, out: Path, scheme: str = "int4", **settings: Any) -> tuple[dict[str, Any], onnx.GraphProto]:
    """→ the report, and the graph that was made."""
    out.mkdir()
    params = {"scheme": scheme, **onnxruntime.parameters(scheme, settings, calibrated=False)}
    outputs = {"model": out / "model", "report": out / "report.json"}
    source.parent.mkdir(exist_ok=True)
    action = Action(verb="quantize", backend="onnxruntime", params=params, inputs={"model": source.parent}, outputs=outputs)
    onnxruntime.quantize(action, assess({"model": source}))
    return json.loads(outputs["report"].read_text()), onnx.load(outputs["model"] / "model.onnx").graph


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    products(tmp_path / "source" / "model.onnx")
    return tmp_path / "source" / "model.onnx"


@pytest.mark.parametrize(
    ("scheme", "symmetric", "group", "same"), [("int4", False, 64, 0.95), ("int4", True, 32, 0.95), ("int8", False, 64, 0.9999)]
)
def test_every_product_with_constant_weights_is_reached(
    linear: Path, tmp_path: Path, scheme: str, symmetric: bool, group: int, same: float
) -> None:
    """Also a Gemm, which the tool itself does not know; the one without constant weights stays, and so does what is computed."""
    given = {"symmetric": symmetric, "group_size": group, **({"method": "weights"} if scheme == "int8" else {})}
    found, graph = in_groups(linear, tmp_path / "made", scheme, **given)
    assert (found["operators"], found["quantizable"], found["group_size"]) == (3, 4, group)
    blocks = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert [node.op_type for node in graph.node].count("Gemm") == 1
    assert [{one.name: one.i for one in node.attribute}["block_size"] for node in blocks] == [group] * 3
    assert [len(node.input) for node in blocks] == [3 if symmetric else 4] * 3
    rng = np.random.default_rng(1)
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in (("x", (32, 128)), ("other", (128, 4)))}
    before, after = (onnxruntime.open(path).infer(feeds)["y"] for path in (linear, tmp_path / "made" / "model"))
    assert same < float((before * after).sum() / np.linalg.norm(before) / np.linalg.norm(after)) < 0.999999
    facts, settings = assess({"model": linear}), onnxruntime.parameters(scheme, given, False)
    assert onnxruntime.estimate(facts, scheme, settings, 0).artifact == pytest.approx(found["bytes_after"], rel=0.1)
    again = tmp_path / "again"
    in_groups(linear, again, scheme, **given)
    assert (again / "model" / "model.onnx").read_bytes() == (tmp_path / "made" / "model" / "model.onnx").read_bytes()


def test_what_is_excluded_stays_float(linear: Path, tmp_path: Path) -> None:
    """By a node's name, by an operator; all of them: nothing is left to do, and that is said."""
    assert in_groups(linear, tmp_path / "a", exclude=["last"])[0]["operators"] == 2
    found, graph = in_groups(linear, tmp_path / "b", exclude=["Gemm"])
    assert found["operators"] == 1
    assert [node.op_type for node in graph.node].count("Gemm") == 3
    with pytest.raises(StepFailed, match="nothing was quantized"):
        in_groups(linear, tmp_path / "c", exclude=["Gemm", "MatMul"])


def test_what_is_in_groups_is_refused_where_it_means_nothing(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    kernel = onnx.numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w")
    image = [value("x", TensorProto.FLOAT, [1, 3, 8, 8])], [value("y", TensorProto.FLOAT, [1, 4, 6, 6])]
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "conv", *image, [kernel])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "conv.onnx")
    facts, settings = assess({"model": tmp_path / "conv.onnx"}), onnxruntime.parameters("int4", {}, calibrated=False)
    assert "this model has none; write scheme: int8" in onnxruntime.refuse(facts, {"scheme": "int4", **settings})
    with pytest.raises(ValueError, match="group_size: ONNX Runtime has kernels for 16, 32, 64, 128, 256, not for 48"):
        onnxruntime.parameters("int4", {"group_size": 48}, calibrated=False)
    settings = onnxruntime.parameters("int8", {"method": "weights"}, calibrated=False)
    assert "this model has none; write method: dynamic" in onnxruntime.refuse(facts, {"scheme": "int8", **settings})
    with pytest.raises(ValueError, match="group_size: weights alone are quantized in groups; write method: weights"):
        onnxruntime.parameters("int8", {"group_size": 64}, calibrated=False)


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


def test_what_the_runtime_does_not_load_is_told_without_paths_and_with_what_to_do(tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "new", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 99)]), tmp_path / "new.onnx")
    with pytest.raises(StepFailed) as caught:
        onnxsource.OnnxSession(tmp_path / "new.onnx")
    assert str(caught.value).startswith("ONNX Runtime does not load new.onnx: ONNX Runtime only ")
    assert "Opset 99" in str(caught.value)
    assert str(caught.value).endswith("; export it without what is named here")


@pytest.mark.parametrize("framework", ["onnxruntime", "openvino"])
def test_a_model_that_takes_a_few_of_the_sizes_it_leaves_free(tmp_path: Path, framework: str) -> None:
    """As exports of speech models do, which pad and fold a window of one length. Who runs it says with what it was run."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "samples"]) for name in "xy"]
    nodes = [helper.make_node("Reshape", ["x", "rows"], ["rows_of_x"]), helper.make_node("Relu", ["rows_of_x"], ["y"])]
    rows = onnx.numpy_helper.from_array(np.array([-1, 576], np.int64), "rows")
    graph = helper.make_graph(nodes, "speech", values[:1], values[1:], [rows])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "speech.onnx")
    text = "model: {source: speech.onnx, task: audio-classification}\nquantize: {scheme: none}\npackage: {kind: folder}\n"
    done = build(tmp_path, text, framework=framework)
    assert "it leaves sizes free and was run with x: [4, 16]: where it takes others alone, say them by model.shape" in done.stderr
    done = build(tmp_path, text.replace("speech.onnx,", "speech.onnx, shape: {x: [1, 576]},"), framework=framework)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_has_nothing_to_quantize_is_told_as_that() -> None:
    with pytest.raises(StepFailed, match=r"^nothing was quantized: it has no operator that could be \(Conv, …\); leave"):
        onnxsource.check_quantized(0, 0, ("Conv",), 10, 10)
    with pytest.raises(StepFailed, match="none of its 3 quantizable operators"):
        onnxsource.check_quantized(0, 3, ("Conv",), 10, 10)
