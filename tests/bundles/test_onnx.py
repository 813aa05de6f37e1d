"""The onnx kind: bytes that do not depend on addresses, ORT format that ONNX Runtime reads, and golden outputs everywhere."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgebuild import bundle
from edgebuild.bundles import onnx
from edgebuild.bundles.ortformat import canonical
from edgebuild.errors import StepFailed
from tests.bundles.packing import ROOT, adding_model, pack, report, self_tested

DIGITS = ROOT / "targets" / "models" / "digits.onnx"
SAVE = "import sys; from pathlib import Path; from edgebuild.bundles import onnx; onnx._save_as_ort(Path(sys.argv[1]), Path(sys.argv[2]))"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model as a bundle; tests change copies of it."""
    place = tmp_path_factory.mktemp("digits")
    (place / "artifact").mkdir()
    shutil.copy(DIGITS, place / "artifact" / "model.onnx")
    return pack("onnx", place)


def run(*command: str, folder: Path) -> tuple[int, list[str]]:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    return done.returncode, done.stdout.splitlines() or done.stderr.splitlines()


def evidence(lines: list[str]) -> dict[str, Any]:
    return self_tested(lines[-1])


def test_level(digits: Path) -> None:
    assert report(digits)["level"] == "L4"


def test_python_loader(digits: Path) -> None:
    status, lines = run(sys.executable, "-B", "loader.py", folder=digits)
    assert status == 0
    assert [line.split()[:2] for line in lines[:2]] == [["PASS", "model.onnx"], ["PASS", "model.ort"]]
    found = evidence(lines)
    assert found["verdict"] == "PASS"
    assert found["bundle"] == "small-onnx"
    assert len(found["measurements"]) == 2


@pytest.mark.parametrize("runtime", ["onnxruntime-node", "onnxruntime-web"])
def test_javascript_loader(
    runtime: str, digits: Path, node: str, node_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """onnxruntime-web runs here as in a browser: WebAssembly, on one thread."""
    folder = node_folder / tmp_path_factory.mktemp("js").name / runtime
    shutil.copytree(digits, folder)
    try:
        status, lines = run(node, "loader.mjs", runtime, folder=folder)
        assert status == 0, lines
        found = evidence(lines)
        assert found["verdict"] == "PASS"
        assert [one["file"] for one in found["measurements"]] == ["model.onnx", "model.ort"]
        spoil(folder / "golden.json")
        status, lines = run(node, "loader.mjs", runtime, folder=folder)
        assert status == 1
        assert evidence(lines)["verdict"] == "FAIL"
        assert lines[-2].startswith("FAIL")
    finally:
        shutil.rmtree(folder.parent)


def spoil(golden: Path) -> None:
    content = json.loads(golden.read_text())
    content["outputs"][0]["data"][3] += 0.01
    golden.write_text(json.dumps(content))


def test_python_loader_tells_a_difference(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "b")
    spoil(tmp_path / "b" / "golden.json")
    status, lines = run(sys.executable, "-B", "loader.py", folder=tmp_path / "b")
    assert status == 1
    assert lines[0].startswith("FAIL model.onnx differs by")
    assert evidence(lines)["verdict"] == "FAIL"
    with pytest.raises(StepFailed, match=r"self-test loader.py fails: FAIL model.onnx differs by .* of the tolerance"):
        bundle.self_test(tmp_path / "b", "loader.py")


def test_an_output_that_is_no_number_fails(digits: Path, tmp_path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    shutil.copytree(digits, tmp_path / "b")
    model = onnx.load(tmp_path / "b" / "model.onnx")
    weights = next(one for one in reversed(model.graph.initializer) if one.data_type == onnx.TensorProto.FLOAT)
    weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights) * np.float32("nan"), weights.name))
    onnx.save(model, tmp_path / "b" / "model.onnx")
    status, lines = run(sys.executable, "-B", "loader.py", "model.onnx", folder=tmp_path / "b")
    assert (status, lines[0]) == (1, "FAIL model.onnx differs by inf of the tolerance")
    assert evidence(lines)["measurements"][0]["value"] is None


def test_javascript_is_valid(digits: Path, node: str) -> None:
    assert run(node, "--check", "loader.mjs", folder=digits) == (0, [])
    package = json.loads((digits / "package.json").read_text())
    assert package["version"] == "1.2.3"
    assert package["peerDependencies"]["onnxruntime-web"] == ">=1.20"


def test_ort_format_has_one_order(tmp_path: Path) -> None:
    """Two processes have two address spaces, and with them two orders of ONNX Runtime's hash tables."""
    made = set()
    for index in range(3):
        target = tmp_path / f"{index}.ort"
        subprocess.run([sys.executable, "-c", SAVE, str(DIGITS), str(target)], check=True, cwd=ROOT, timeout=120)
        made.add(canonical(target.read_bytes()))
    assert len(made) == 1
    data, operators = made.pop()
    assert canonical(data)[0] == data, "a canonical file is its own canonical form"
    assert str(tmp_path).encode() not in data
    assert b"digits" not in data
    assert operators.splitlines()[1:] == [
        "ai.onnx;12;MaxPool",
        "ai.onnx;13;Gemm",
        "ai.onnx;14;Reshape",
        "com.microsoft;1;FusedConv,FusedGemm",
    ]


def test_operators_are_what_onnxruntime_itself_lists(digits: Path, tmp_path: Path) -> None:
    from onnxruntime.tools.ort_format_model import create_config_from_models

    create_config_from_models([digits / "model.ort"], tmp_path / "config", False)
    theirs = [line for line in (tmp_path / "config").read_text().splitlines() if not line.startswith("#")]
    ours = [line for line in (digits / "required_operators.config").read_text().splitlines() if not line.startswith("#")]
    assert ours == theirs


def test_ort_format_of_a_model_with_subgraphs_and_text(tmp_path: Path) -> None:
    """If with two branches, an attribute of each kind, an output that is a sequence; and the same answers afterwards."""
    import numpy as np
    import onnxruntime

    branching_model(tmp_path / "model.onnx")
    onnx._save_as_ort(tmp_path / "model.onnx", tmp_path / "raw.ort")
    data, operators = canonical((tmp_path / "raw.ort").read_bytes())
    (tmp_path / "model.ort").write_bytes(data)
    assert "If" in operators
    assert "Mul" in operators
    assert "SplitToSequence" in operators
    for flag in (True, False):
        feeds = {"flag": np.array(flag), "x": np.arange(4, dtype=np.float32)}
        answers = [onnxruntime.InferenceSession(str(tmp_path / name)).run(None, feeds) for name in ("model.onnx", "model.ort")]
        assert all(np.array_equal(one, other) for one, other in zip(*answers, strict=True))


def branching_model(path: Path) -> None:
    import onnx as library
    from onnx import TensorProto, helper

    def branch(operator: str) -> Any:
        three = helper.make_tensor(f"three_{operator}", TensorProto.FLOAT, [1], [3.0])
        node = helper.make_node(operator, ["x", f"three_{operator}"], [f"y_{operator}"])
        output = helper.make_tensor_value_info(f"y_{operator}", TensorProto.FLOAT, [4])
        return helper.make_graph([node], operator, [], [output], [three])

    nodes = [
        helper.make_node("If", ["flag"], ["y"], then_branch=branch("Mul"), else_branch=branch("Sub")),
        helper.make_node("SplitToSequence", ["y"], ["parts"], axis=0, keepdims=1),
    ]
    inputs = [
        helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [4]),
    ]
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [4]),
        helper.make_tensor_sequence_value_info("parts", TensorProto.FLOAT, [1]),
    ]
    graph = helper.make_graph(nodes, "branching", inputs, outputs)
    library.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.mark.parametrize("data", [b"", b"ORTM", b"\x08\0\0\0ABCD" + bytes(40)])
def test_what_is_no_ort_format(data: bytes) -> None:
    with pytest.raises(ValueError, match="identifier is missing"):
        canonical(data)


def test_external_data_keeps_its_name(tmp_path: Path) -> None:
    import onnx as library

    (tmp_path / "artifact").mkdir()
    library.save(
        library.load(DIGITS),
        tmp_path / "artifact" / "model.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=1024,
    )
    folder = pack("onnx", tmp_path)
    assert (folder / "weights.bin").stat().st_size > 100_000
    assert report(folder)["level"] == "L4"
    assert report(folder)["weights_bytes"] == sum(
        (folder / name).stat().st_size for name in ("model.onnx", "model.ort", "weights.bin")
    )


@pytest.mark.parametrize("name", ["x\ny", "x\0", "\u202ex"])
def test_names_inside_a_model_are_values_too(name: str, tmp_path: Path) -> None:
    (tmp_path / "artifact").mkdir()
    adding_model(tmp_path / "artifact" / "model.onnx", name)
    with pytest.raises(StepFailed, match=r"inputs\[0\].name"):
        pack("onnx", tmp_path)


def test_a_platform_that_promises_no_version(tmp_path: Path) -> None:
    platform = {"name": "p", "description": "", "facts": {"onnxruntime_web": "1.20 || rm"}}
    with pytest.raises(StepFailed, match=r"facts.onnxruntime_web: '1.20 \|\| rm' is no version"):
        pack("onnx", tmp_path, platform=platform)
