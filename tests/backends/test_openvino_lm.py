"""OpenVINO for language models, on the example model: what is converted and quantized, and that a wrong one does not get through.

optimum-intel shares no environment with mlx-lm: .ci/run has it in one of its own. What needs none of it runs everywhere.
"""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgebuild import reference, resources
from edgebuild.assess import assess
from edgebuild.backend import ModelFacts
from edgebuild.backends import openvino, openvino_ir, openvino_lm
from edgebuild.errors import StepFailed
from edgebuild.step import Outcome
from tests.backends import language
from tests.backends.language import PHI3_MINI, TEXT
from tests.backends.phi3 import (
    MODEL,
    contents,
    copied,
    divergence,
    edit,
    golden,
    inputs,
    narrow,
    needs_openvino_lm,
    report,
    swap_first_tokens,
)

convert = partial(language.convert, "openvino")
logits = partial(language.logits, "openvino")
pytestmark = pytest.mark.usefixtures("as_in_a_worker")


def quantize(model: Path, out: Path, scheme: str, calibration: Path | None = None, **given: Any) -> Outcome:
    method = {"method": "weights"} if scheme == "int8" else {}
    return language.quantize("openvino", model, out, scheme, calibration, 4, **method, **given)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("openvino-lm") / "converted"
    convert(MODEL, out, by_torch=True)
    return out


@pytest.fixture(scope="module")
def int4(converted: Path) -> Path:
    out = converted.parent / "int4"
    quantize(converted / "model", out, "int4")
    return out


# -- conversion -----------------------------------------------------------------------------------------------------------
@needs_openvino_lm
def test_generated_names_differ_without_renaming(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_ir, "rename", lambda xml, kept: None)
    for name in "ab":
        quantize(converted / "model", tmp_path / name, "int4")
    first, second = (contents(tmp_path / name / "model") for name in "ab")
    assert {name for name in first if first[name] != second[name]} == {"openvino_model.xml"}


@needs_openvino_lm
def test_the_folder_is_what_openvino_genai_loads(converted: Path) -> None:
    names = {path.name for path in (converted / "model").iterdir()}
    parts = {f"openvino_{part}.{kind}" for part in ("model", "tokenizer", "detokenizer") for kind in ("xml", "bin")}
    own = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names == parts | own
    assert sum(path.stat().st_size for path in (converted / "model").glob("openvino_model.bin")) < 2.1 * 4_196_608  # 16 bits
    assert json.loads((converted / "model/config.json").read_text())["rope_parameters"]["rope_theta"] == 10_000.0
    texts = [path.read_text() for path in (converted / "model").glob("*.json")] + [
        path.read_text() for path in (converted / "model").glob("*.xml")
    ]
    assert not any("staged" in text or str(converted) in text for text in texts)  # nothing of the folder that it was made in


@needs_openvino_lm
def test_it_generates_text_in_its_own_runtime(int4: Path) -> None:
    """In a process that knows nothing of edgebuild; greedy, it says what the session's logits say."""
    code = (
        "import sys, openvino_genai\n"
        "pipe = openvino_genai.LLMPipeline(sys.argv[1], 'CPU', INFERENCE_PRECISION_HINT='f32', KV_CACHE_PRECISION='f32', "
        "DYNAMIC_QUANTIZATION_GROUP_SIZE=0)\n"
        "print(pipe.generate(sys.argv[2], max_new_tokens=8, do_sample=False, apply_chat_template=False))"
    )
    prompt = "The small boat left the harbour at seven"
    done = subprocess.run([sys.executable, "-c", code, str(int4 / "model"), prompt], capture_output=True, text=True, check=True)
    session = openvino_lm.LmSession(int4 / "model")
    start = tokens = session.tokens(prompt)
    for _ in range(8):
        tokens = np.append(tokens, session.logits(tokens)[-1].argmax()).astype(np.int32)
    assert done.stdout.strip()
    assert done.stdout.strip() == session.text(tokens[len(start) :]).strip()


@needs_openvino_lm
@pytest.mark.parametrize("part", ["tokenizer", "detokenizer"])
def test_a_wrong_tokenizer_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """That of another vocabulary in its place, as a wrong conversion would make it."""
    other = copied(tmp_path / "other")
    edit(other / "tokenizer.json", swap_first_tokens)
    (other / "tokenizer.model").unlink()
    reference.lay_out(inputs(other), tmp_path / "staged")
    openvino_lm._export(tmp_path / "staged", tmp_path / "made")
    export = openvino_lm._export

    def wrong(source: Path, out: Path) -> None:
        export(source, out)
        for kind in ("xml", "bin"):
            shutil.copyfile(tmp_path / f"made/openvino_{part}.{kind}", out / f"openvino_{part}.{kind}")

    monkeypatch.setattr(openvino_lm, "_export", wrong)
    says = "the converted tokenizer gives other tokens" if part == "tokenizer" else "the converted detokenizer gives '"
    with pytest.raises(StepFailed, match=says):
        convert(copied(tmp_path / "source", golden=False), tmp_path / "out")


@needs_openvino_lm
def test_a_tokenizer_that_was_not_converted_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino_tokenizers

    def fail(*words: Any, **more: Any) -> None:
        raise RuntimeError("not this one")

    monkeypatch.setattr(openvino_tokenizers, "convert_tokenizer", fail)
    with pytest.raises(StepFailed, match=r"cannot convert the tokenizer: it made no openvino_tokenizer.xml; see the log"):
        convert(copied(tmp_path / "source"), tmp_path / "out")


@needs_openvino_lm
def test_a_source_that_memory_has_no_room_for_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "memory", lambda: resources.Memory(total=10**9, available=300_000_000, cgroup_limit=None))
    outcome = convert(copied(tmp_path / "source", golden=False), tmp_path / "out", by_torch=True)
    assert outcome.summary.endswith(", its conversion unverified")
    assert report(tmp_path / "out")["reason"].startswith("conversion unverified: running the source by transformers takes about")


# -- quantizing -----------------------------------------------------------------------------------------------------------
@needs_openvino_lm
@pytest.mark.parametrize(
    ("scheme", "given", "weights", "bytes_each", "divergence_most"),
    [
        ("int8", {}, {"int8": 18}, 1.1, 0.001),
        ("int8", {"symmetric": True}, {"int8": 18}, 1.1, 0.001),
        ("int4", {}, {"int4": 16, "int8": 2}, 0.75, 0.05),
        ("int4", {"symmetric": True, "group_size": 128}, {"int4": 16, "int8": 2}, 0.75, 0.05),
        ("int4", {"group_size": 32, "ratio": 0.5}, None, 0.95, 0.05),
    ],
)
def test_quantize(
    converted: Path,
    tmp_path: Path,
    scheme: str,
    given: dict[str, Any],
    weights: dict[str, int] | None,
    bytes_each: float,
    divergence_most: float,
) -> None:
    outcome = quantize(converted / "model", tmp_path / "out", scheme, **given)
    found = report(tmp_path / "out")
    assert (found["operators"], found["quantizable"], found["not_quantized"]) == (18, 18, [])
    if weights:
        assert found["weights"] == weights
    else:
        assert 0 < found["weights"]["int4"] < 16
    assert (tmp_path / "out/model/openvino_model.bin").stat().st_size < 4_196_608 * bytes_each
    assert found["bytes_after"] < found["bytes_before"]
    assert outcome.summary.startswith(f"{scheme} weights, 18 of 18 operators, ")
    tokens = golden(MODEL).tokens
    assert 0 < divergence(logits(converted, tokens), logits(tmp_path / "out", tokens)) < divergence_most


@needs_openvino_lm
def test_the_layers_that_stay_in_int8_are_chosen_by_a_text(converted: Path, tmp_path: Path) -> None:
    for name, text in (("seen", TEXT), ("again", TEXT), ("unseen", None)):
        quantize(converted / "model", tmp_path / name, "int4", text, ratio=0.5)
    assert (report(tmp_path / "seen")["samples"], report(tmp_path / "unseen")["samples"]) == (4, 0)
    assert contents(tmp_path / "seen/model") == contents(tmp_path / "again/model")


@needs_openvino_lm
def test_exclude(converted: Path, tmp_path: Path) -> None:
    names = [name for name in openvino_ir.layers(converted / "model/openvino_model.xml") if "layers.3" in name]
    down = next(name for name in names if name.endswith("down_proj/ov_ext::linear/MatMul"))
    assert "17 of 18 operators" in quantize(converted / "model", tmp_path / "out", "int4", exclude=[down]).summary
    assert report(tmp_path / "out")["not_quantized"] == [down]
    with pytest.raises(StepFailed, match=r'quantize.exclude: no node or operator is called "no such"; operators: Add, '):
        quantize(converted / "model", tmp_path / "no", "int4", exclude=["no such"])


@needs_openvino_lm
def test_a_group_size_that_does_not_divide_a_layer_is_one_message(tmp_path: Path) -> None:
    convert(narrow(copied(tmp_path / "source", golden=False), 96), tmp_path / "in")
    with pytest.raises(
        StepFailed, match=r"^quantize.group_size: 64 does not divide the 96 inputs of the layer .*down_proj.*, as"
    ):
        quantize(tmp_path / "in/model", tmp_path / "no", "int4")
    assert "int4 weights, 18 of 18" in quantize(tmp_path / "in/model", tmp_path / "out", "int4", group_size=32).summary


# -- running --------------------------------------------------------------------------------------------------------------
@needs_openvino_lm
def test_what_a_session_runs_in(converted: Path) -> None:
    session = openvino.open(converted / "model")
    assert session.runtime.startswith("openvino ")
    assert session.runtime.endswith(", CPU, f32, 1 thread")
    assert len(session.tokens("word " * 5000)) > 2048  # which is the tokenizer's own limit
    session.close()


@needs_openvino_lm
def test_smoke() -> None:
    assert openvino.smoke().startswith("openvino ")


@needs_openvino_lm
@pytest.mark.slow
def test_the_example_for_a_server(tmp_path: Path) -> None:
    evidence = language.example(tmp_path / "project", "server-phi3")
    assert evidence["toolchain"]["optimum-intel"] == "2.2.0"
    assert {"latency_p50", "peak_memory", "artifact_bytes", "kl_mean", "same_top"} <= language.measured(evidence)


# -- without any of it ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("facts", "parameters", "reason"),
    [
        ({"model_type": "phi3"}, {"scheme": "int4", "group_size": 64}, ""),
        (
            {"model_type": "bert"},
            {},
            "optimum-intel exports no language model of type 'bert'; name another framework",
        ),
        ({"model_type": "gemma2"}, {}, "optimum-intel exports no language model of type 'gemma2'"),  # of the lock's transformers
        ({"model_type": "gpt2", "architecture": "GPT2LMHeadModel"}, {}, ""),
        ({"model_type": "bart", "architecture": "BartForCausalLM"}, {}, ""),
        ({"model_type": "bart", "architecture": "BartForConditionalGeneration"}, {}, "is no decoder with a head for language"),
        ({"model_type": "phi3", "architecture": "Phi3ForSequenceClassification"}, {}, "is no decoder with a head for language"),
        (
            {"model_type": "own", "custom_code": True},
            {},
            "names Python code (auto_map), which is never run, and optimum-intel exports no",
        ),
        ({"model_type": "phi3", "quantized": "awq"}, {}, "quantized already (awq); give the float model"),
        (
            {"model_type": "phi3", "hidden": 96},
            {"scheme": "int4", "group_size": 64},
            "its hidden size 96 is no multiple of group_size 64; 32 or 16 or 8 would fit",
        ),
        (
            {"model_type": "phi3"},
            {"scheme": "int8", "method": "static", "activations": True},
            "method: static quantizes activations, which is for ONNX models; of a language model it is weights alone: write method:",
        ),
    ],
)
def test_refuse(facts: dict[str, Any], parameters: dict[str, Any], reason: str) -> None:
    found = openvino.refuse(ModelFacts(**{"format": "huggingface", **facts}), parameters)
    assert reason in found
    assert bool(reason) == bool(found)


@needs_openvino_lm
def test_an_estimate_is_about_right(converted: Path, int4: Path) -> None:
    facts = assess(inputs(MODEL))
    for made, scheme, settings in ((converted, "none", {}), (int4, "int4", openvino.parameters("int4", {}, False))):
        size = sum(path.stat().st_size for path in (made / "model").iterdir())
        assert openvino.estimate(facts, scheme, settings, 10**11).artifact == pytest.approx(size, rel=0.05)


def test_estimates_of_phi3_mini_are_as_measured() -> None:
    """3,821,079,552 parameters: 7.643 GB in 16 bits, int4_sym in groups of 64 2.125 GB; at most 2.61 GB of memory to make them."""
    none = openvino.estimate(PHI3_MINI, "none", {}, 10**11)
    int4 = openvino.estimate(PHI3_MINI, "int4", openvino.parameters("int4", {"symmetric": True}, False), 10**11)
    assert none.artifact == pytest.approx(7.643e9, rel=0.03)
    assert int4.artifact == pytest.approx(2.125e9, rel=0.03)
    assert 2.61e9 < max(none.making, int4.making) < 1.25 * 2.61e9


@needs_openvino_lm
def test_the_model_types_are_those_of_optimum() -> None:
    """`EDGEBUILD_REWRITE=1 pytest tests/backends/test_openvino_lm.py` writes the list anew, when the lock names another optimum-intel.

    Each was exported with random weights, and computes what its source does; but afmoe, which is far off, and left out.
    """
    import optimum.exporters.openvino.model_configs  # noqa: F401 - it fills the list
    import transformers
    from optimum.exporters.openvino.utils import ONNX_SUPPORTED_ARCHITECTURES
    from optimum.exporters.tasks import TasksManager
    from packaging.version import Version
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    here, found = Version(transformers.__version__), set()
    for kind in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - {*ONNX_SUPPORTED_ARCHITECTURES, "afmoe"}:
        try:
            tasks = TasksManager.get_supported_tasks_for_model_type(kind, "openvino", library_name="transformers")
        except KeyError:
            continue
        if (make := tasks.get(openvino_lm.TASK)) is None:
            continue
        limits = [Version(str(getattr(make.func, f"{end}_TRANSFORMERS_VERSION", None) or here)) for end in ("MIN", "MAX")]
        if limits[0] <= here <= limits[1]:
            found.add(kind)
    assert language.shipped(openvino_lm, "openvino_types.txt", found) == openvino_lm._model_types() == found
