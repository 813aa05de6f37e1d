"""Olive for real, on the example models: workflows, its own passes, and what a failed one says. What needs no Olive runs everywhere."""

import errno
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edgebuild.assess import assess
from edgebuild.backend import ModelFacts
from edgebuild.backends import olive, olive_process, olive_workflow
from edgebuild.errors import StepFailed
from edgebuild.step import Action, Outcome
from tests.backends import holding
from tests.backends.phi3 import MODEL, TOKENS, contents, inputs, needs_olive, report
from tests.conftest import ROOT
from tests.journeys.test_examples import copy_project, doit

DIGITS = {"model": ROOT / "targets/models/digits.onnx"}
CALIBRATION = ROOT / "targets/data/digits-calibration.npz"


def run(verb: str, out: Path, files: Mapping[str, Path], facts: ModelFacts, **params: Any) -> Outcome:
    out.mkdir()
    made = {"model": out / "model", "report": out / "report.json"}
    action = Action(verb=verb, backend="olive", params={"task": "other", **params}, inputs=files, outputs=made)
    return (holding.convert if verb == "convert" else olive.quantize)(action, facts)


def quantize(place: Path, scheme: str, calibrated: bool = False, **given: Any) -> Outcome:
    """The digits, converted and quantized below `place`."""
    facts = assess(DIGITS)
    if not (place / "convert").exists():
        run("convert", place / "convert", DIGITS, facts)
    files = {"model": place / "convert/model", **({"calibration": CALIBRATION} if calibrated else {})}
    settings = olive.parameters(scheme, given, calibrated)
    return run("quantize", place / "quantize", files, facts, scheme=scheme, samples=None, **settings)


# -- without Olive --------------------------------------------------------------------------------------------------------
def test_parameters() -> None:
    assert olive.parameters("int8", {}, True)["method"] == "static"
    assert olive.parameters("int8", {}, False)["method"] == "dynamic"
    assert olive.parameters("int8", {"passes": "auto"}, False) == {"method": "passes", "passes": "auto"}
    named = olive.parameters("int8", {"passes": ["OnnxPeepholeOptimizer", {"type": "OnnxQuantization"}]}, True)["passes"]
    assert named == [{"type": "OnnxPeepholeOptimizer"}, {"type": "OnnxQuantization"}]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"method": "statik"}, 'method: no recipe "statik"; there are: auto, static, .* Did you mean "static"'),
        ({"method": "dense"}, "method: dense needs calibration.data"),
        ({"passes": ["OnnxStaticQuantisation"]}, 'passes: no pass "OnnxStaticQuantisation" here; .* Did you mean "OnnxStaticQ'),
        ({"passes": [{"precision": "int8"}]}, 'passes: no pass "nothing" here'),
        ({"passes": ["OnnxStaticQuantization"]}, "passes: a static pass needs calibration.data"),
        ({"passes": [{"type": "GraphSurgeries", "user_script": "x.py"}]}, "user_script would read what is in no key"),
        ({"passes": "auto", "symmetric": True}, "symmetric: has no meaning beside passes"),
    ],
)
def test_parameters_that_cannot_be(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        olive.parameters("int8", given, False)


@pytest.mark.parametrize("group", [7, 8, 100, 512])
def test_groups_that_olive_does_not_have_are_told_before_it_runs(group: int) -> None:
    with pytest.raises(
        ValueError, match=f"^group_size: Olive quantizes in groups of 16, 32, 64, 128, 256, not of {group}; take one"
    ):
        olive.parameters("int4", {"group_size": group}, False)


@pytest.mark.parametrize(
    ("facts", "parameters", "reason"),
    [
        ({"format": "onnx"}, {}, ""),
        ({"format": "onnx", "operators": {"acme.Fold": 1}}, {}, "it uses the operator acme.Fold"),
        (
            {"format": "onnx", "weights": {"Conv": 9, "Gemm": 9}},
            {"scheme": "int4", "group_size": 32},
            "its int4 is for the weights of",
        ),
        ({"format": "onnx", "weights": {"Conv": 9, "MatMul": 9}}, {"scheme": "int4", "group_size": 32}, ""),
        ({"format": "onnx", "weights": {"Conv": 9}}, {"scheme": "int8"}, ""),
        ({"architecture": "Phi3ForCausalLM"}, {"scheme": "int4", "passes": []}, ""),
        ({"architecture": "BertModel"}, {}, "Olive's ModelBuilder knows no language model 'BertModel'"),
        *(({"architecture": f"{name}ForCausalLM"}, {}, f"'{name}ForCausalLM'") for name in ("Gemma3", "Olmo", "SmolLM3")),
        ({"architecture": "Phi3ForCausalLM", "quantized": "awq"}, {}, "it is quantized already (awq)"),
        (
            {"architecture": "Phi3ForCausalLM"},
            {"activations": "int8", "dynamic": False},
            "static int8 is calibrated on named arrays",
        ),
        ({"architecture": "Phi3ForCausalLM"}, {"passes": [{"type": "OnnxStaticQuantization"}]}, "a pass that calibrates takes"),
        ({"architecture": "Phi3ForCausalLM"}, {"passes": "auto"}, ""),
        ({"architecture": "LlamaForCausalLM", "scaled": [{"rope_type": "llama3"}]}, {}, ""),
        ({"architecture": "Qwen2ForCausalLM", "scaled": [{"rope_type": "yarn"}]}, {}, "Olive's ModelBuilder never rounds"),
        (
            {"architecture": "HunYuanDenseV1ForCausalLM", "scaled": [{"rope_type": "linear"}]},
            {},
            "positions are scaled by linear",
        ),
    ],
)
def test_refuse(facts: dict[str, Any], parameters: dict[str, Any], reason: str) -> None:
    found = olive.refuse(ModelFacts(**{"format": "huggingface", **facts}), parameters)
    assert reason in found
    assert bool(reason) == bool(found)


def test_a_workflow_that_dies_or_says_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, (code, problem) in enumerate(
        [("import os; os.kill(os.getpid(), 11)", "died of signal 11"), ("print('a last word')", "status 0; .*: a last word$")]
    ):
        (tmp_path / "fails.py").write_text(f"def main(path):\n    {code}\n")
        monkeypatch.setattr(olive_workflow, "__name__", "fails")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        (tmp_path / str(number)).mkdir()
        with pytest.raises(StepFailed, match=f"^Olive made no model: its process .*{problem}"):
            olive_process.run(tmp_path / str(number), {"type": "ONNXModel"}, [])


def test_a_disk_that_is_full_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(order: object, heard: object) -> dict[str, Any]:
        raise RuntimeError("a pass failed") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(olive_workflow, "_run", full)
    monkeypatch.setattr(olive_workflow.tether, "end_with_input", lambda: None)
    monkeypatch.setattr(olive_workflow.tether, "leave", sys.exit)
    (tmp_path / "order.json").write_text(json.dumps({"answer": str(tmp_path / "answer.json")}))
    with pytest.raises(SystemExit, match=f"^{errno.ENOSPC}$"):
        olive_workflow.main(str(tmp_path / "order.json"))
    (tmp_path / "fails.py").write_text(f"import os\ndef main(path):\n    os._exit({errno.ENOSPC})\n")
    monkeypatch.setattr(olive_workflow, "__name__", "fails")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(OSError, match="No space left on device"):
        olive_process.run(tmp_path, {"type": "ONNXModel"}, [])


# -- with Olive -----------------------------------------------------------------------------------------------------------
@needs_olive
def test_weights_in_other_files_are_read_as_they_lie_in_a_store_and_stay_there(tmp_path: Path) -> None:
    import onnx

    facts, model = assess(DIGITS), tmp_path / "convert/model"
    run("convert", tmp_path / "convert", DIGITS, facts)
    whole = onnx.load(model / "model.onnx")
    (model / "parts").mkdir()
    onnx.save(whole, model / "model.onnx", save_as_external_data=True, location="parts/weights", size_threshold=0)
    os.link(model / "parts/weights", tmp_path / "object")
    (model / "notes.json").write_text("{}")
    quantize(tmp_path, "int8")
    made = report(tmp_path / "quantize")
    assert sorted(path.name for path in (tmp_path / "quantize/model").iterdir()) == ["model.onnx", "notes.json"]
    assert made["bytes_before"] > 600_000 > made["bytes_after"]


@needs_olive
def test_named_passes_and_nothing_is_written_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    for folder, name in ((home, "HOME"), (home, "XDG_CACHE_HOME")):
        folder.mkdir(exist_ok=True)
        monkeypatch.setenv(name, str(folder))
    here.mkdir()
    monkeypatch.chdir(here)
    static = {"type": "OnnxStaticQuantization", "calibrate_method": "Entropy", "per_channel": True}
    (tmp_path / "out").mkdir()
    outcome = quantize(tmp_path / "out", "int8", True, passes=["OnnxPeepholeOptimizer", static])
    assert outcome.summary.startswith("int8 passes, OnnxPeepholeOptimizer → OnnxStaticQuantization: 5 of 5 operators, 636 kB → ")
    assert [one["type"] for one in report(tmp_path / "out/quantize")["passes"]] == [
        "OnnxPeepholeOptimizer",
        "OnnxStaticQuantization",
    ]
    assert list(here.iterdir()) == []
    assert not [path for path in home.rglob("*") if path.is_file() and "onnxruntime" not in path.as_posix()]  # its own device id


@needs_olive
def test_olives_own_auto(tmp_path: Path) -> None:
    quantize(tmp_path, "int8", passes="auto")
    found = report(tmp_path / "quantize")
    assert "OnnxDynamicQuantization" in [one["type"] for one in found["passes"]]
    assert found["operators"] == 5


@needs_olive
@pytest.mark.parametrize(
    ("scheme", "passes", "problem"),
    [
        (
            "int8",
            [{"type": "OnnxDynamicQuantization", "persision": "int8"}],
            'OnnxDynamicQuantization has no option "persision"; it has: ',
        ),
        (
            "int8",
            [{"type": "OnnxDynamicQuantization", "precision": "int4"}],
            "Olive made no model: RuntimeError: Quantized weights for",
        ),
        ("int8", ["OnnxPeepholeOptimizer"], "^nothing was quantized"),
        ("int4", ["OnnxBlockWiseRtnQuantization"], "^nothing was quantized"),
    ],
)
def test_what_fails_is_one_sentence(tmp_path: Path, scheme: str, passes: list[Any], problem: str) -> None:
    with pytest.raises(StepFailed, match=re.compile(problem)) as caught:
        quantize(tmp_path, scheme, passes=passes)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "quantize").iterdir()) == ["model"]  # no cache stays


@needs_olive
def test_new_weights_beside_an_old_graph_give_a_new_model(tmp_path: Path) -> None:
    """Olive's cache looks at the graph's file alone: with one cache for both the second model would be the first."""
    import onnx

    made = []
    for number, factor in enumerate((1.0, 0.5)):
        place = tmp_path / "same place"
        (place / "convert/model").mkdir(parents=True)
        model = onnx.load(DIGITS["model"])
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * factor, tensor.name))
        onnx.save(
            model, place / "convert/model/model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0
        )
        os.link(
            place / "convert/model/model.onnx.data", tmp_path / f"object {number}"
        )  # as a store does; onnx refuses to read such
        quantize(place, "int8")
        made.append(contents(place / "quantize/model"))
        place.rename(tmp_path / str(number))
    assert (tmp_path / "0/convert/model/model.onnx").read_bytes() == (tmp_path / "1/convert/model/model.onnx").read_bytes()
    assert made[0] != made[1]


@needs_olive
def test_a_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held against the golden logits; int4 is near it, and onnxruntime-genai generates what the session says."""
    import numpy as np
    import onnx
    import onnxruntime_genai as genai

    files, facts = inputs(MODEL), assess(inputs(MODEL))
    run("convert", tmp_path / "convert", files, facts)
    (held,) = report(tmp_path / "convert")["against"]
    assert held["kl_mean"] < 1e-4
    source, settings = {"model": tmp_path / "convert/model"}, olive.parameters("int4", {}, False)
    monkeypatch.setattr(onnx, "save", None)  # its outputs have their names when Olive saves it: gigabytes are not written again
    run("quantize", tmp_path / "quantize", source, facts, scheme="int4", samples=None, **settings)
    assert report(tmp_path / "quantize")["operators"] > 20
    session = olive.open(tmp_path / "quantize/model")
    wanted = session.logits(TOKENS).argmax(-1)[-1]
    generator_parameters = genai.GeneratorParams(model := genai.Model(str(tmp_path / "quantize/model")))
    generator = genai.Generator(model, generator_parameters)
    generator.append_tokens(np.asarray(TOKENS))
    generator.generate_next_token()
    assert generator.get_next_tokens()[0] == wanted
    session.close()


@needs_olive
def test_weights_that_stay_mapped_are_quantized_as_olive_does_alone(tmp_path: Path) -> None:
    """Also those that nothing quantizes lie in the model that was made."""
    import onnx
    from olive.model import ONNXModelHandler
    from olive.passes.olive_pass import create_pass_from_dict
    from olive.passes.onnx.rtn_quantization import OnnxBlockWiseRtnQuantization

    files, facts = inputs(MODEL), assess(inputs(MODEL))
    run("convert", tmp_path / "convert", files, facts)
    source = tmp_path / "convert/model"
    assert (source / "model.onnx.data").is_file()
    left = next(
        one.name for one in onnx.load(source / "model.onnx", load_external_data=False).graph.node if one.op_type == "MatMul"
    )
    settings = olive.parameters("int4", {"exclude": [left]}, False)
    options = {"bits": 4, "block_size": 32, "is_symmetric": False, "nodes_to_exclude": [left]}
    alone = create_pass_from_dict(OnnxBlockWiseRtnQuantization, options, disable_search=True)
    alone.run(ONNXModelHandler(str(source / "model.onnx")), str(tmp_path / "alone"))
    os.link(source / "model.onnx.data", tmp_path / "object")  # as a store has it, which Olive alone does not read
    run("quantize", tmp_path / "quantize", {"model": source}, facts, scheme="int4", samples=None, **settings)
    made, expected = (
        onnx.load(path, load_external_data=False).graph
        for path in (tmp_path / "quantize/model/model.onnx", tmp_path / "alone/model.onnx")
    )
    weights = [one.SerializeToString(deterministic=True) for one in made.initializer]
    assert weights == [one.SerializeToString(deterministic=True) for one in expected.initializer]
    assert not any(one.data_location == onnx.TensorProto.EXTERNAL for one in made.initializer)


@needs_olive
@pytest.mark.slow
@pytest.mark.parametrize(("target", "operators"), [("desktop-digits", 5), ("desktop-phi3", 22)])
def test_the_example(tmp_path: Path, target: str, operators: int) -> None:
    folder = copy_project(tmp_path / "project", target)
    done = doit(folder, f"build:{target}")
    assert done.returncode == 0, done.stdout + done.stderr
    evidence = json.loads((folder / f"dist/{target}.evidence.json").read_text())
    assert evidence["bundle"]["level"] == "L4"
    assert "selftest.py" in evidence["bundle"]["tools"]
    assert evidence["quantization"]["operators"] == operators
