"""ONNX Runtime: ONNX in, ONNX out; int8 static (QDQ, calibrated) and dynamic, or the first recipe of a ladder that holds; int4 and int8 of weights.

What is quantized is counted afterwards: on many real models the tools exit 0 and have done nothing.
"""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebuild import onnxsource
from edgebuild.backend import Estimate, ModelFacts, Needs, Rung, Session
from edgebuild.backends import onnxruntime_lm
from edgebuild.errors import BadInput, StepFailed, did_you_mean
from edgebuild.onnxsource import OnnxSession
from edgebuild.step import Action, Outcome
from edgebuild.units import human

if TYPE_CHECKING:
    from numpy.typing import NDArray

NEEDS: Mapping[str, Needs] = {
    "onnx": Needs(lock="onnxruntime", packages=("onnxruntime", "onnx", "onnx-ir", "numpy", "protobuf", "ml_dtypes")),
    "huggingface": Needs(lock="onnxruntime-lm", packages=onnxruntime_lm.PACKAGES),
}
SCHEMES: Mapping[str, Sequence[str]] = {
    "int8": ("method", "group_size", "symmetric", "exclude"),
    "int4": ("group_size", "symmetric", "exclude"),
}
GROUPS = (16, 32, 64, 128, 256)  # elements that share a scale: the block sizes of the operator MatMulNBits
PRODUCTS = ("MatMul", "Gemm")  # whose weights are quantized in groups
_MATRICES = ("MatMul", "Gemm", "LSTM", "Attention", "EmbedLayerNormalization")
# From the quickest to the most careful. `quantized`: what is, all that the tool knows if empty. `activations`: S8S8 or
# U8S8 is better by instruction set and operator. A quantized `bias` is what some Gemm of real models lose their accuracy, or
# the tool its way, by. `clip`: the per cent of an activation's values that lie outside its range, for those that a few loud
# ones would stretch (spectra). `float`: the share of nodes that is left as it is, those that lose most. Dynamic quantization is three to five times slower than float on a convolution, so it is for matrices.
LADDER: Mapping[str, Rung] = {
    "static": Rung(sets={}),
    "static-u8": Rung(sets={"activations": "uint8"}),
    "conv-matmul": Rung(
        sets={"activations": "uint8", "quantized": ["Conv", "Gemm", "MatMul"], "bias": False},
        operators=("Conv", "Gemm", "MatMul"),
    ),
    "conv": Rung(sets={"activations": "uint8", "quantized": ["Conv"]}, operators=("Conv",)),
    "conv-clipped": Rung(sets={"activations": "uint8", "quantized": ["Conv"], "clip": 0.1}, operators=("Conv",)),
    "dynamic-matmul": Rung(
        sets={"dynamic": True, "quantized": [*_MATRICES, "Gather"]},
        operators=_MATRICES,
        convolutions=0.9,  # else nearly all of the model would stay as it is
    ),
    "sensitive": Rung(
        sets={"activations": "uint8", "quantized": ["Conv", "ConvTranspose", "Gemm", "MatMul"], "bias": False, "float": 0.25}
    ),
}
CLIPPING = 256_000_000  # bytes of calibration that are held at once where ranges are clipped
LOOKS = 4  # calibration samples that tell which nodes lose most; every tensor of the model is held for each of them
VIEWS: Mapping[str, str] = {"native": "the file as it is, on the CPU provider"}
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
QUANTIZABLE = ("Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "Attention", "EmbedLayerNormalization")
METHODS: Mapping[str, Mapping[str, Any]] = {**{name: rung.sets for name, rung in LADDER.items()}, "dynamic": {"dynamic": True}}
PROTOBUF = 1_900_000_000  # bytes; a file of protobuf ends at 2 GiB, so that weights go beside it
_DYNAMIC = {
    "MatMulInteger": 1,
    "ConvInteger": 1,
    "DynamicQuantizeLSTM": 1,
    "DynamicQuantizeMatMul": 1,
    "MatMulIntegerToFloat": 1,
    "QAttention": 1,
    "MatMulNBits": 1,
}
# Bytes of memory that onnxruntime, onnx beside it, and what its tool for int4 imports take before any model; measured.
IMPORTED, TOOLS, SYMBOLS = 42_000_000, 10_000_000, 48_000_000


def parameters(scheme: str, quantize: Mapping[str, Any], calibrated: bool) -> Mapping[str, Any]:
    """int8 `auto` is static where there are calibration data, else dynamic; `weights`, and int4, are of weights alone.

    Raises ValueError for what there is not.
    """
    given = {"symmetric": quantize.get("symmetric", False), "exclude": sorted(quantize.get("exclude", ()))}
    method = quantize.get("method", "auto")
    if scheme == "int4" or method == "weights":
        group = quantize.get("group_size", 64)
        if group not in GROUPS:
            raise ValueError(
                f"group_size: ONNX Runtime has kernels for {', '.join(map(str, GROUPS))}, not for {group}; take one of these"
            )
        return {**given, "group_size": group, **({"method": method} if scheme == "int8" else {})}
    if "group_size" in quantize:
        raise ValueError("group_size: weights alone are quantized in groups; write method: weights, or leave group_size out")
    if method == "auto":
        method = "static" if calibrated else "dynamic"
    if method not in METHODS:
        raise ValueError(
            f'method: no recipe "{method}"; there are: auto, {", ".join(METHODS)}, weights.{did_you_mean(method, METHODS)}'
        )
    found = {"dynamic": False, "activations": "int8", "quantized": [], "bias": True, "float": 0.0, "clip": 0.0, **METHODS[method]}
    if not found["dynamic"] and not calibrated:
        raise ValueError(f"method: {method} needs calibration.data; give it, or write method: dynamic")
    return {"method": method, **given, **found}


def refuse(facts: ModelFacts, parameters: Mapping[str, Any]) -> str:
    if facts.format == "huggingface":
        return onnxruntime_lm.refuse(facts, parameters)
    if reason := onnxsource.refuse(facts, parameters, DOMAINS, "ONNX Runtime"):
        return reason
    if "group_size" in parameters and not any(facts.weights.get(operator) for operator in PRODUCTS):
        wanted, other = ("method: weights", "method: dynamic") if "method" in parameters else ("int4", "scheme: int8")
        return f"{wanted} is for the weights of matrix products (MatMul, Gemm), and this model has none; write {other}, or none"
    return ""


def estimate(facts: ModelFacts, scheme: str, parameters: Mapping[str, Any], available: int) -> Estimate:
    """Matrices that quantizable operators read take a byte an element, all else stays; activations are not counted.

    Fitted on models of 0.6, 50 and 201 MB (sizes within 1 %): nodes of quantization take 400 bytes an operator, and static
    ones 13 bytes a channel, of which there is one an element of a bias; memory was measured at 0.6 to 1 of it.
    """
    if facts.format == "huggingface":
        return onnxruntime_lm.estimate(facts, scheme, parameters)
    whole = facts.bytes
    if scheme == "none":
        making = IMPORTED + onnxsource.making(facts)
        return Estimate(artifact=whole, making=making, running=IMPORTED + 2 * whole, holding=whole)
    if "group_size" in parameters:
        matrices = sum(facts.weights.get(operator, 0) for operator in set(PRODUCTS) - set(parameters["exclude"]))
        each = onnxruntime_lm.bytes_each(scheme, parameters)
        artifact = round(whole - (4 - each) * matrices)
        return Estimate(artifact=artifact, making=IMPORTED + TOOLS + SYMBOLS + 3 * whole, running=IMPORTED + 2 * artifact)
    reached = set(parameters.get("quantized") or (*QUANTIZABLE, "Gather")) - set(parameters.get("exclude", ()))
    matrices = sum(count for operator, count in facts.weights.items() if operator in reached)
    channels = sum(facts.parameters.values()) - sum(facts.weights.values()) if not parameters.get("dynamic") else 0
    artifact = whole - 3 * matrices + 13 * channels + 400 * sum(facts.operators.values()) if matrices else whole
    making = IMPORTED + TOOLS + 5 * whole + (CLIPPING if parameters.get("clip") else 0)
    return Estimate(artifact=artifact, making=making, running=IMPORTED + 2 * artifact)


def convert(action: Action, facts: ModelFacts) -> Outcome:
    """The model as a folder with `model.onnx`, its opset raised where it is older than 13."""
    if facts.format == "huggingface":
        return onnxruntime_lm.convert(action, facts)
    folder = action.outputs["model"]
    folder.mkdir()
    opsets, kept = onnxsource.opsets(facts), onnxsource.kept(action)
    done = f"opset {opsets['source']}"
    if opsets["model"] != opsets["source"]:
        kept = {}
        onnxsource.raise_opset(action.inputs["model"], folder / "model.onnx")
        done += f" raised to {opsets['model']}"
    elif not kept:
        onnxsource.copy(action, facts, folder)
    if shapes := action.params.get("shape"):
        done += f", made for {onnxsource.fix_shapes(folder / 'model.onnx', shapes)}"
    action.outputs["report"].write_text(json.dumps({"opset": opsets}, indent=1, sort_keys=True), encoding="utf-8")
    return Outcome(summary=done, kept=kept)


def hold(session: Session, source: Mapping[str, Path], facts: ModelFacts) -> dict[str, Any]:
    """An ONNX model by its outputs, a language model by its tokens, text and logits."""
    if isinstance(session, onnxruntime_lm.LmSession):
        return onnxruntime_lm.hold(session, source)
    return onnxsource.hold(session, source["model"], facts)


def quantize(action: Action, facts: ModelFacts) -> Outcome:
    """By onnxruntime.quantization. Raises StepFailed where nothing was quantized or the file did not shrink."""
    if onnxruntime_lm.is_one(action.inputs["model"]):
        return onnxruntime_lm.quantize(action)
    source, folder = action.inputs["model"] / "model.onnx", action.outputs["model"]
    folder.mkdir()
    if "group_size" in action.params:
        return _in_groups(action, source, folder)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        prepared = _prepare(source, Path(scratch, "prepared.onnx"))
        excluded = _excluded(prepared, action.params["exclude"])
        try:
            if not action.params["bias"]:
                prepared = _split(prepared, Path(scratch, "split.onnx"), excluded)
            if action.params["float"]:
                prepared = _named(prepared, Path(scratch, "named.onnx"))
                excluded += _sensitive(action, prepared, excluded, Path(scratch))
            _quantize(action, prepared, folder / "model.onnx", excluded)
        except (StepFailed, OSError, MemoryError):
            raise
        except Exception as error:  # whatever the tool raises is its refusal of this model
            raise StepFailed(f"onnxruntime.quantization failed: {onnxsource.cause(error)}") from error
    return _counted(action, source, folder, excluded)


def _quantize(action: Action, prepared: Path, made: Path, excluded: Sequence[str]) -> None:
    """The recipe that the parameters say, by the tool. Raises whatever it raises."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_dynamic, quantize_static

    params = action.params
    shared = {"weight_type": QuantType.QInt8, "nodes_to_exclude": excluded, "op_types_to_quantize": params["quantized"] or None}
    if params["dynamic"]:
        quantize_dynamic(prepared, made, **shared)
        return
    quantize_static(
        prepared,
        made,
        _Reader(prepared, action, _held(action, prepared, made.parent) if params["clip"] else None),
        calibrate_method=CalibrationMethod.Percentile if params["clip"] else CalibrationMethod.MinMax,
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8 if params["activations"] == "uint8" else QuantType.QInt8,
        extra_options={
            "ActivationSymmetric": params["symmetric"],
            "QuantizeBias": params["bias"],
            "CalibPercentile": 100 - params["clip"],
            "QDQDisableWeightAdjustForInt32Bias": not params["bias"],  # crashes on a bias [1, N], as real models have it
        },
        **shared,
    )


def _held(action: Action, prepared: Path, folder: Path) -> int:
    """How many samples the tool may keep every tensor of, which it does where it clips; at least LOOKS."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        tensors = _tensors(prepared, Path(scratch), action, prepared).values()
    each = sum(one.nbytes for found in tensors for one in found) / max((len(found) for found in tensors), default=1)
    return max(LOOKS, int(CLIPPING / max(each, 1)))


def _in_groups(action: Action, source: Path, folder: Path) -> Outcome:
    """Weights of matrix products in blocks of four or eight bits (operator MatMulNBits of com.microsoft), all else as it is."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    params, model = action.params, onnx.load(source)
    _name(model.graph)
    excluded = _matching(model.graph.node, params["exclude"])
    _gemm_to_matmul(model.graph, excluded)
    try:
        tool = MatMulNBitsQuantizer(
            model,
            bits=onnxruntime_lm.BITS[params["scheme"]],
            block_size=params["group_size"],
            is_symmetric=params["symmetric"],
            nodes_to_exclude=excluded,
        )
        tool.process()
        large = _bytes(source.parent) > PROTOBUF
        tool.model.save_model_to_file(str(folder / "model.onnx"), use_external_data_format=large)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever the tool raises is its refusal of this model
        raise StepFailed(f"onnxruntime.quantization failed: {onnxsource.cause(error)}") from error
    return _counted(action, source, folder, excluded)


def _gemm_to_matmul(graph: Any, excluded: Sequence[str]) -> None:
    """A Gemm of constant weights (y = x·w + b, as linear layers are exported) as MatMul and Add: the tool knows no other."""
    import numpy as np
    from onnx import helper, numpy_helper

    constants = {one.name: one for one in graph.initializer}
    nodes = []
    for node in graph.node:
        attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        plain = attributes.get("alpha", 1) == 1 and attributes.get("beta", 1) == 1 and not attributes.get("transA")
        if node.op_type != "Gemm" or not plain or node.name in excluded or node.input[1] not in constants:
            nodes.append(node)
            continue
        matrix, biased = node.input[1], len(node.input) > 2 and node.input[2]
        if attributes.get("transB"):
            turned = np.ascontiguousarray(numpy_helper.to_array(constants[matrix]).T)
            matrix = f"{node.name}/{matrix}/transposed"
            graph.initializer.append(numpy_helper.from_array(turned, matrix))
        product = f"{node.output[0]}/product" if biased else node.output[0]
        nodes.append(helper.make_node("MatMul", [node.input[0], matrix], [product], name=node.name))
        if biased:
            nodes.append(helper.make_node("Add", [product, node.input[2]], [node.output[0]], name=f"{node.name}/bias"))
    del graph.node[:]
    graph.node.extend(nodes)
    if not _has_subgraphs(nodes):
        read = {name for node in nodes for name in node.input} | {one.name for one in graph.output}
        for index in reversed([index for index, one in enumerate(graph.initializer) if one.name not in read]):
            del graph.initializer[index]


def _has_subgraphs(nodes: Sequence[Any]) -> bool:
    """They may read what no node of the graph itself does."""
    return any(attribute.HasField("g") or attribute.graphs for node in nodes for attribute in node.attribute)


def _split(source: Path, target: Path, excluded: Sequence[str]) -> Path:
    """The model without Gemm: with a float bias it has no int8 kernel, and would have its weights made float again at each call."""
    import onnx

    model = onnx.load(source)
    if not any(node.op_type == "Gemm" for node in model.graph.node):
        return source
    _name(model.graph)
    _gemm_to_matmul(model.graph, excluded)
    onnx.save(model, target)
    return target


def _named(source: Path, target: Path) -> Path:
    """The model with a name for each of its nodes, as they are left out by name."""
    import onnx

    model = onnx.load(source)
    _name(model.graph)
    onnx.save(model, target)
    return target


def _name(graph: Any) -> None:
    for index, node in enumerate(graph.node):
        node.name = node.name or f"{node.op_type}_{index}"


def _sensitive(action: Action, prepared: Path, excluded: Sequence[str], folder: Path) -> list[str]:
    """The nodes that lose most by int8, with those that make their inputs, about the share of them that is to stay float.

    A first try of the recipe and the model run on a few calibration samples. Each tensor's noise in the one, relative to its
    energy in the other, less that of the node's inputs, is what the node adds: a channel much larger than the others costs
    its tensor little and the next node everything, so that a tensor before and after its own quantization tells nothing.
    """
    import onnx

    tried = folder / "tried.onnx"
    _quantize(action, prepared, tried, excluded)
    before, after = (_tensors(path, folder, action, prepared) for path in (prepared, tried))
    noise = {name: _noise(before[name], after[name]) for name in before.keys() & after.keys()}
    nodes = onnx.load(prepared, load_external_data=False).graph.node
    makers = {output: node.name for node in nodes for output in node.output}
    ranked = []
    for node in nodes:
        if node.name not in excluded and (found := [noise[name] for name in node.output if name in noise]):
            ranked.append((max(found) - max((noise.get(name, 0.0) for name in node.input), default=0.0), node))
    kept: dict[str, None] = {}
    for _, node in sorted(ranked, key=lambda one: (-one[0], one[1].name)):
        if len(kept) >= action.params["float"] * len(ranked):
            break
        kept |= dict.fromkeys((node.name, *(makers[one] for one in node.input if one in makers)))
    return list(kept)


def _tensors(model: Path, folder: Path, action: Action, prepared: Path) -> Mapping[str, Sequence[NDArray[Any]]]:
    """Every tensor of a model by name, for the first calibration samples."""
    import onnxruntime
    from onnxruntime.quantization import qdq_loss_debug

    opened = folder / "opened.onnx"
    qdq_loss_debug.modify_model_output_intermediate_tensors(model, opened)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = onnxsource.THREADS
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    seen = itertools.islice(_Reader(prepared, action).feeds, LOOKS)
    found: Mapping[str, Sequence[NDArray[Any]]] = qdq_loss_debug.collect_activations(str(opened), seen, options)
    return found


def _noise(before: Sequence[NDArray[Any]], after: Sequence[NDArray[Any]]) -> float:
    """Energy of what differs over that of the tensor, at most 1: more than all of it cannot be lost."""
    import numpy as np

    signal = sum(float(np.square(one, dtype=np.float64).sum()) for one in before)
    noise = sum(float(np.square(np.subtract(a, b, dtype=np.float64)).sum()) for a, b in zip(before, after, strict=True))
    return min(noise / signal, 1.0) if math.isfinite(noise) and signal else float(noise != 0)


def smoke() -> str:
    """A small matrix product, made with onnx, as a session of its own."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper

    shape = [8, 8]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("a", "b", "c")]
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "smoke", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", onnxsource.OPSET)], ir_version=8)
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, f"{folder}/model.onnx")
        session = OnnxSession(Path(folder, "model.onnx"))
        ones = np.ones(shape, np.float32)
        right = bool((session.infer({"a": ones, "b": ones})["c"] == 8).all())
    if not right:
        raise StepFailed("ONNX Runtime multiplies matrices wrongly on this machine; install another version")
    return f"{session.runtime}, onnx {onnx.__version__}"


def open(model: Path, view: str = "") -> Session:
    if onnxruntime_lm.is_one(model):
        return onnxruntime_lm.LmSession(model)
    return OnnxSession(model / "model.onnx" if model.is_dir() else model)


class _Reader:
    """Calibration samples, one at a time, in the form that onnxruntime.quantization asks for; of sequences each step."""

    def __init__(self, model: Path, action: Action, most: int | None = None) -> None:
        from edgebuild import samples

        self.feeds: Iterator[Mapping[str, NDArray[Any]]] = itertools.islice(samples.calibration(action, OnnxSession(model)), most)

    def get_next(self) -> Mapping[str, NDArray[Any]] | None:
        return next(self.feeds, None)


def _prepare(source: Path, target: Path) -> Path:
    """Shapes inferred and constants folded, where the tool manages; quantization goes on without it where it does not."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    try:
        quant_pre_process(str(source), str(target), skip_symbolic_shape=True)
        return target
    except Exception:  # noqa: BLE001 - fails on many real models, with exceptions of every kind
        target.unlink(missing_ok=True)
        return source


def _excluded(model: Path, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    import onnx

    return _matching(onnx.load(model, load_external_data=False).graph.node, names)


def _matching(nodes: Sequence[Any], names: Sequence[str]) -> list[str]:
    """`exclude` holds node names or operator types. Raises BadInput for one that matches nothing."""
    found = [node.name for node in nodes if node.name in names or node.op_type in names]
    known = {node.name for node in nodes} | {node.op_type for node in nodes}
    if unknown := sorted(set(names) - known):
        raise BadInput(
            f'quantize.exclude: no node or operator is called "{unknown[0]}"; operators: {", ".join(sorted({n.op_type for n in nodes}))}'
        )
    return found


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _counted(action: Action, source: Path, folder: Path, excluded: Sequence[str]) -> Outcome:
    import onnx

    before, after = _bytes(source.parent), _bytes(folder)
    original = onnx.load(source, load_external_data=False).graph
    params = action.params
    how = {key: params[key] for key in ("method", "group_size") if key in params}
    kinds = PRODUCTS if "group_size" in how else QUANTIZABLE
    possible = sum(node.op_type in kinds for node in original.node)
    made = onnx.load(folder / "model.onnx", load_external_data=False).graph
    dequantized = {name for node in made.node if node.op_type == "DequantizeLinear" for name in node.output}
    done = sum(node.op_type in _DYNAMIC for node in made.node)
    done += sum(node.op_type in QUANTIZABLE and set(node.input[:2]) <= dequantized for node in made.node)
    onnxsource.check_quantized(done, possible, kinds[:4], before, after)
    report = {
        **how,
        "operators": done,
        "quantizable": possible,
        "float": sorted(excluded),
        "bytes_before": before,
        "bytes_after": after,
    }
    action.outputs["report"].write_text(json.dumps(report, indent=1, sort_keys=True), encoding="utf-8")
    recipe = f"group size {how['group_size']}" if "group_size" in how else how["method"]
    return Outcome(summary=f"{params['scheme']} {recipe}, {done} of {possible} operators, {human(before)} → {human(after)}")
