"""The kind `onnx`: model.onnx, the same in ORT format, loaders for Python and JavaScript. For ONNX Runtime, also on the web."""

import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgebuild import bundle
from edgebuild.bundle import Copies, Making, Payload, Proof, Proving
from edgebuild.bundles.ortformat import canonical
from edgebuild.errors import StepFailed, WrongFact

CODE: Sequence[str] = ("bundles.onnx", "bundles.ortformat")
COPIES = Copies(bundle=2, converted=1)
TOOLS: Mapping[str, str] = {}
LOCKS: Mapping[str, str] = {}
MODEL, ORT, OPERATORS = "model.onnx", "model.ort", "required_operators.config"


def refuse(framework: str, task: str) -> str:
    if framework == "onnxruntime" and task == "text-generation":
        return "its loaders take named arrays, not text; name package.kind: folder for a language model"
    if framework == "onnxruntime":
        return ""
    return f"it holds a model for ONNX Runtime, but the framework is {framework}; name framework: onnxruntime, or package.kind: folder"


def stated(device: Mapping[str, Any]) -> Mapping[str, Any]:
    """`runtime_floor`: the oldest ONNX Runtime that the platform promises."""
    floor = str(device.get("onnxruntime_web", "1.20"))
    if not re.fullmatch(r"\d+(\.\d+){0,2}", floor):
        raise WrongFact("onnxruntime_web", f"{floor!r} is no version such as 1.20")
    return {"runtime_floor": floor}


def payload(model: Path, module: str) -> Payload:
    """model.onnx at the top, external data beside it, under the names that the model calls them by."""
    found = bundle.lay(model, MODEL)
    files = {place.removeprefix(f"{MODEL}/"): path for place, path in found.items()}
    if MODEL not in files:
        raise StepFailed(f"the artifact holds no {MODEL}; this is a fault of the backend")
    return Payload(files=files, model=MODEL, golden="golden.json")


def values(common: Mapping[str, Any]) -> Mapping[str, Any]:
    return stated(common["facts"])


def make(making: Making) -> Mapping[str, bool]:
    """The ORT format and the list of its operators."""
    out = making.out
    _save_as_ort(out / MODEL, out / ORT)
    try:
        data, operators = canonical((out / ORT).read_bytes())
    except ValueError as error:
        raise StepFailed(f"the ORT format that ONNX Runtime wrote: {error}") from error
    (out / ORT).write_bytes(data)
    (out / OPERATORS).write_text(operators, encoding="utf-8")
    return {ORT: True, OPERATORS: False}


def assemble(making: Making) -> Mapping[str, bool]:
    return {}


def _save_as_ort(source: Path, target: Path) -> None:
    """Optimised as far as every CPU follows ("extended"): layouts that suit this processor alone stay out."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.add_session_config_entry("session.qdqisint8allowed", "0")  # else x86 and ARM would save different graphs
    try:
        onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions share no base class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise StepFailed(f"ONNX Runtime cannot save it in ORT format: {reason}; package.kind: folder does without") from error


def verify(out: Path) -> Mapping[str, str]:
    return {}


def consume(proving: Proving) -> Proof:
    """L4: the bundle's own Python loader runs both files on the golden example."""
    evidence = bundle.self_test(proving.out, "loader.py")
    return Proof(
        level="L4",
        tools={"loader.py": f"Python {platform.python_version()}", "runtime": str(evidence["measurements"][0]["runtime"])},
    )
