"""OpenVINO: ONNX in, its own IR out (model.xml, model.bin); NNCF makes int8 of weights and activations, or int8 and int4 of weights.

OpenVINO computes in bfloat16 where the processor can, and an unquantized model lost 3 % of its accuracy by that: baseline and
candidate are held to float32. What was quantized is counted in the files as they lie on the disk. Language models from Hugging
Face folders are the matter of `openvino_lm`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebuild import onnxsource, reference
from edgebuild.backend import Estimate, ModelFacts, Needs, Rung, Session
from edgebuild.backends import openvino_ir as ir
from edgebuild.backends import openvino_lm
from edgebuild.errors import StepFailed, did_you_mean
from edgebuild.formats import safetensors
from edgebuild.step import Action, Outcome

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NEEDS: Mapping[str, Needs] = {
    "onnx": Needs(lock="openvino", packages=("openvino", "nncf", "onnxruntime", "onnx", "numpy", "protobuf", "ml_dtypes")),
    "huggingface": Needs(lock="openvino-lm", packages=openvino_lm.PACKAGES),
}
SCHEMES: Mapping[str, Sequence[str]] = {
    "int8": ("method", "symmetric", "exclude", "max_drop"),
    "int4": ("group_size", "symmetric", "ratio", "exclude"),
}
VIEWS: Mapping[str, str] = {"native": "the IR as it is, on the CPU in float32"}
DOMAINS = ("", "ai.onnx", "com.microsoft")
MODEL = "model.xml"
# Throughput is for many requests at once: here one is timed, as a device makes them.
CPU = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
QUANTIZABLE = (*ir.CONVOLUTIONS, "MatMul", *ir.RECURRENT)
# The quickest kernels first. NNCF's own default is `symmetric`. `only`: the operators that are quantized, for models whose
# element-wise ones do not bear it. `within` gives operators back to float; without `activations` weights alone are quantized.
LADDER: Mapping[str, Rung] = {
    "static": Rung(sets={}),
    "symmetric": Rung(sets={"symmetric": True}),
    "dense": Rung(sets={"only": ["Conv", "ConvTranspose", "MatMul"]}, operators=("Conv", "ConvTranspose", "Gemm", "MatMul")),
    "within": Rung(sets={"max_drop": 0.01}),
    "weights": Rung(sets={"activations": False}),
}
REACHED = ("Conv", "ConvTranspose", "MatMul", "Gemm")  # what NNCF takes, by its names in a source's header
IMPORTED, TOOLS = 45_000_000, 40_000_000  # bytes of memory that openvino, and nncf beside it, take before any model; measured


def parameters(scheme: str, quantize: Mapping[str, Any], calibrated: bool) -> Mapping[str, Any]:
    """`method: auto` is static where there are calibration data, else weights; int4 is of weights. Raises ValueError."""
    settings: dict[str, Any] = {"symmetric": quantize.get("symmetric", False), "exclude": sorted(quantize.get("exclude", ()))}
    if scheme == "int4":
        ratio = float(quantize.get("ratio", 1))
        if not ratio:
            raise ValueError("ratio: 0 leaves no layer in int4; write scheme: int8, or a ratio above 0")
        settings |= {"method": "weights", "activations": False, "only": []}
        return {**settings, "group_size": quantize.get("group_size", 64), "ratio": ratio}
    method, drop = quantize.get("method", "auto"), quantize.get("max_drop")
    if method == "auto":
        method = "static" if calibrated else "weights"
    if method not in LADDER:
        raise ValueError(f'method: no recipe "{method}"; there are: auto, {", ".join(LADDER)}.{did_you_mean(method, LADDER)}')
    found = {"method": method, "activations": True, "only": [], "max_drop": None, **settings, **LADDER[method].sets}
    if found["activations"] and not calibrated:
        raise ValueError(f"method: {method} needs calibration.data; give it, or write method: weights")
    if not found["activations"] and drop is not None:
        raise ValueError("max_drop: it is kept on calibration data, so it needs calibration.data and method: static")
    return found if drop is None else {**found, "max_drop": drop}


def refuse(facts: ModelFacts, parameters: Mapping[str, Any]) -> str:
    if facts.format == "huggingface":
        return openvino_lm.refuse(facts, parameters)
    return onnxsource.refuse(facts, parameters, DOMAINS, "OpenVINO")


def estimate(facts: ModelFacts, scheme: str, parameters: Mapping[str, Any], available: int) -> Estimate:
    """Matrices that NNCF reaches take their bits and a scale a channel or group; and XML for each operator.

    Fitted on six models of 0.6 to 25 MB, most within 4 % of what was made, all within 8 %; memory, measured on 0.6 and 210 MB,
    at 0.7 to 1 of it. Which layer is the last, and thus int8 among int4, no header tells.
    """
    if facts.format == "huggingface":
        return openvino_lm.estimate(facts, scheme, parameters)
    data = sum(number * safetensors.BITS.get(dtype, 32) for dtype, number in facts.parameters.items()) // 8
    operators = sum(number for name, number in facts.operators.items() if name != "Constant")
    whole = data + 600 * operators + 2000
    if scheme == "none":
        making = IMPORTED + onnxsource.making(facts)
        return Estimate(artifact=whole, making=making, running=IMPORTED + 6 * whole // 5, holding=6 * whole // 5)
    static, symmetric = parameters["activations"], parameters["symmetric"]
    count, reached = sum(facts.parameters.values()), {*REACHED, "Gather"} - set(parameters["exclude"])
    layers = sum(facts.operators.get(operator, 0) for operator in reached)
    artifact = whole + (4 if static else 3) * (count - sum(facts.weights.values()))
    for operator in reached & set(facts.weights):
        bytes_each = ir.bytes_each(parameters) if scheme == "int4" and operator in ("MatMul", "Gemm") else 1
        artifact -= int(facts.weights[operator] * (data / max(count, 1) - bytes_each))
    artifact += layers * ((3000 if static else 2100 if symmetric else 3400) + (800 if scheme == "int4" else 0))
    artifact += 300 * (operators - layers) if static else 0
    making = IMPORTED + TOOLS + (11 * whole // 5 if static else 3 * whole // 5)
    return Estimate(artifact=artifact, making=making, running=IMPORTED + artifact * (5 if static else 3) // 2)


def convert(action: Action, facts: ModelFacts) -> Outcome:
    """The model as IR with its weights as stored, its opset raised first where it is older than 13."""
    if facts.format == "huggingface":
        return openvino_lm.convert(action, facts)
    source, folder = action.inputs["model"], action.outputs["model"]
    folder.mkdir()
    opsets, raised = onnxsource.opsets(facts), folder.parent / "raised.onnx"
    done = f"opset {opsets['source']}"
    if opsets["model"] != opsets["source"]:
        onnxsource.raise_opset(source, raised)
        done += f" raised to {opsets['model']}"
    readable = raised if raised.exists() else source
    advice = "; export it without what is named here, or name framework: onnxruntime"
    with onnxsource.converting(facts), ir.framework("read this model", advice=advice):
        import openvino
        from openvino._offline_transformations import apply_moc_transformations

        model = openvino.Core().read_model(readable)
        if shapes := action.params.get("shape"):
            model.reshape(dict(shapes))
        apply_moc_transformations(model, cf=False, smart_reshape=True)  # all that openvino.convert_model does, without telemetry
    ir.save(model, folder / MODEL, onnxsource.names(readable))
    del model
    raised.unlink(missing_ok=True)
    action.outputs["report"].write_text(json.dumps({"opset": opsets}, indent=1, sort_keys=True), encoding="utf-8")
    return Outcome(summary=f"{done}, IR")


def hold(session: Session, source: Mapping[str, Path], facts: ModelFacts) -> dict[str, Any]:
    """An ONNX model by its outputs, a language model by its tokens, text and logits."""
    if isinstance(session, openvino_lm.LmSession):
        return openvino_lm.hold(session, source)
    return onnxsource.hold(session, source["model"], facts)


def quantize(action: Action, facts: ModelFacts) -> Outcome:
    """By NNCF, on the IR. Raises StepFailed where nothing was quantized, the files did not shrink, or `max_drop` is not kept."""
    if (action.inputs["model"] / openvino_lm.MODEL).exists():
        return openvino_lm.quantize(action)
    source, folder = action.inputs["model"] / MODEL, action.outputs["model"]
    folder.mkdir()
    model = ir.read(source)
    scope = ir.excluded(model, action.params)
    if action.params["activations"]:
        made, how = _static(model, scope, action)
    else:
        made, how = ir.compress(model, scope, action.params, lambda: _feeds(action, model))
    ir.save(made, folder / MODEL, set(ir.layers(source)))
    del made
    possible = sum(op.get_type_name() in QUANTIZABLE for op in model.get_ops())
    candidates = [op for op in ir.read(folder / MODEL).get_ops() if op.get_type_name() in QUANTIZABLE]
    return ir.counted(action, candidates, possible, "Conv MatMul LSTM", how)


def smoke() -> str:
    """A small matrix product, compiled; and NNCF imported, which takes two seconds."""
    with ir.framework("multiply matrices"):
        import nncf
        import numpy as np
        import openvino
        from openvino import opset13

        ones = np.ones((8, 8), np.float32)
        given = opset13.parameter([8, 8], np.float32, name="a")
        model = openvino.Model([opset13.matmul(given, opset13.constant(ones), False, False)], [given], "smoke")
        session = IrSession(model)
        right = bool((next(iter(session.infer({"a": ones}).values())) == 8).all())
    if not right:
        raise StepFailed("OpenVINO multiplies matrices wrongly on this machine; install another version")
    return f"{session.runtime}, nncf {nncf.__version__}"


def open(model: Path, view: str = "") -> Session:
    """Raises StepFailed where OpenVINO cannot load it."""
    if (model / openvino_lm.MODEL).exists():
        return openvino_lm.LmSession(model)
    return IrSession(ir.read(model / MODEL if model.is_dir() else model))


class IrSession:
    """A model compiled for the CPU, in float32 and on one thread."""

    def __init__(self, model: Any) -> None:
        with ir.framework("compile the model"):
            import openvino

            compiled = openvino.Core().compile_model(model, "CPU", CPU)
            precision, threads = (compiled.get_property(key) for key in ("INFERENCE_PRECISION_HINT", "INFERENCE_NUM_THREADS"))
            self._request = compiled.create_infer_request()
            # Compiling joins values that are equal, and with them their names: the model's own are its source's, and order stays.
            self.inputs: Sequence[Mapping[str, Any]] = [_described(port) for port in model.inputs]
            self._outputs = [_name(port) for port in model.outputs]
        version = openvino.__version__.partition("-")[0]
        self.runtime = f"openvino {version}, CPU, {precision.get_type_name()}, {threads} thread{'' if threads == 1 else 's'}"

    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        try:
            found = self._request.infer([feeds[one["name"]] for one in self.inputs], share_inputs=True)
        except Exception:
            with ir.framework("run the model", advice=f"{onnxsource.taken(self.inputs, feeds)}{reference.MEND}"):
                raise
        return {name: found[index] for index, name in enumerate(self._outputs)}

    def logits(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        raise StepFailed(onnxsource.NO_TOKENS)

    def tokens(self, text: str) -> NDArray[np.int32]:
        raise StepFailed(onnxsource.NO_TOKENIZER)

    def close(self) -> None:
        del self._request


def _described(port: Any) -> dict[str, Any]:
    shape = [one.get_length() if one.is_static else None for one in port.get_partial_shape()]
    return {"name": _name(port), "dtype": port.get_element_type().to_dtype().name, "shape": shape}


def _name(port: Any) -> str:
    return str(port.get_any_name()) if port.get_names() else str(port.get_node().get_friendly_name())


# -- quantizing -----------------------------------------------------------------------------------------------------------
def _static(model: Any, scope: Any, action: Action) -> tuple[Any, dict[str, Any]]:
    """Weights and activations, by the calibration data; MIXED is NNCF's word for activations with a zero point."""
    from edgebuild import samples

    session = IrSession(model)
    feeds = list(samples.calibration(action, session))
    attention = _has_attention(model)
    how: dict[str, Any] = {"samples": len(feeds), "model_type": "transformer" if attention else None}
    with ir.framework("quantize this model", "NNCF"):
        import nncf

        settings = {
            "preset": nncf.QuantizationPreset.PERFORMANCE if action.params["symmetric"] else nncf.QuantizationPreset.MIXED,
            "subset_size": len(feeds),
            "model_type": nncf.ModelType.TRANSFORMER if attention else None,
            "ignored_scope": scope,
        }
        if action.params["max_drop"] is None:
            return nncf.quantize(model, nncf.Dataset(feeds), **settings), how
        made, changed = _within(model, session, feeds, action.params["max_drop"], settings)
        return made, {**how, "max_drop": action.params["max_drop"], "changed": changed}


def _within(
    model: Any, session: IrSession, feeds: Sequence[Mapping[str, Any]], limit: float, settings: Mapping[str, Any]
) -> tuple[Any, float]:
    """Operators go back to float until at most `limit` of the calibration samples are answered otherwise than without quantizing.

    No label is asked for, and no evaluation data are seen: the unquantized model's own answers are the right ones, and accuracy
    cannot drop further than answers change. → the model and the share that changed. Raises StepFailed.
    """
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedAccuracyRestorerParameters

    items = [(feed, _answers(next(iter(session.infer(feed).values())))) for feed in feeds]

    def same(compiled: Any, chosen: Any) -> tuple[float, list[float]]:
        each = [float((_answers(compiled(feed)[0]) == answers).mean()) for feed, answers in chosen]
        return sum(each) / len(each), each

    made = nncf.quantize_with_accuracy_control(
        model,
        nncf.Dataset(feeds),
        nncf.Dataset(items),
        same,
        max_drop=limit,
        advanced_accuracy_restorer_parameters=AdvancedAccuracyRestorerParameters(num_ranking_workers=1),
        **settings,
    )
    left = IrSession(made)
    changed = 1 - sum(float((_answers(next(iter(left.infer(f).values()))) == a).mean()) for f, a in items) / len(items)
    if changed > limit:
        raise StepFailed(
            f"quantize.max_drop: {changed:.3g} of the {len(items)} calibration samples are answered otherwise, more than {limit:g}, "
            "with as many operators in float as NNCF could leave; raise it, give more samples, or write method: weights"
        )
    return made, changed


def _answers(scores: NDArray[Any]) -> NDArray[Any]:
    """The class of each sample of a feed. Raises StepFailed where these are no rows of scores."""
    if scores.ndim < 1 or scores.shape[-1] < 2 or scores.ndim > 2:
        raise StepFailed(
            f"quantize.max_drop counts changed answers of classifiers, but the first output has the shape {list(scores.shape)}; "
            "leave it out, and let gates judge"
        )
    classes: NDArray[Any] = scores.argmax(-1)
    return classes


def _feeds(action: Action, model: Any) -> list[Mapping[str, NDArray[Any]]]:
    from edgebuild import samples

    return list(samples.calibration(action, IrSession(model))) if "calibration" in action.inputs else []


def _has_attention(model: Any) -> bool:
    """Whether a softmax is multiplied by something computed: NNCF has a preset for such models, and they need it."""
    for op in model.get_ops():
        if op.get_type_name() == "ScaledDotProductAttention":
            return True
        if op.get_type_name() == "Softmax" and any(_multiplied(reader.get_node()) for reader in op.output(0).get_target_inputs()):
            return True
    return False


def _multiplied(op: Any, depth: int = 4) -> bool:
    if op.get_type_name() == "MatMul":
        return not any(ir.weight_bits(op, index) or _is_constant(op, index) for index in range(2))
    passes = depth and op.get_type_name() in ir.ACTIVATION_PATH
    return bool(passes) and any(_multiplied(reader.get_node(), depth - 1) for reader in op.output(0).get_target_inputs())


def _is_constant(op: Any, index: int) -> bool:
    return bool(op.input_value(index).get_node().get_type_name() == "Constant")
