"""OpenVINO's IR, whatever it was made of: saved under names that are always the same, weights compressed by NNCF, and counted.

What the two halves of the backend `openvino` share, ONNX and language models. The frameworks are imported in a worker alone.
"""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgebuild import onnxsource, reference
from edgebuild.errors import BadInput, EdgebuildError, StepFailed, said
from edgebuild.step import Action, Outcome
from edgebuild.units import human

CONVOLUTIONS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData")
RECURRENT = ("LSTMSequence", "GRUSequence", "RNNSequence", "LSTMCell", "GRUCell", "RNNCell")
BITS = {"i4": 4, "u4": 4, "i8": 8, "u8": 8}
# What people know by ONNX's names: `exclude` takes both.
ONNX_NAMES: Mapping[str, Sequence[str]] = {
    "Conv": CONVOLUTIONS[:2],
    "ConvTranspose": CONVOLUTIONS[2:],
    "Gemm": ("MatMul",),
    "LSTM": ("LSTMSequence",),
    "GRU": ("GRUSequence",),
    "Mul": ("Multiply",),
}
# What stands between a weight and its reader, and between an activation's quantizer and the operator.
_WEIGHT_PATH = ("Convert", "Subtract", "Multiply", "Reshape", "Transpose", "Squeeze", "Unsqueeze")
ACTIVATION_PATH = ("Convert", "Reshape", "Transpose", "Squeeze", "Unsqueeze")
_GENERATED = re.compile(
    r"[A-Z]\w*_\d+(\.\d+)?\Z"
)  # what OpenVINO calls an operator without a name: its type and a running number
_LAYER = re.compile(r'(<layer id="\d+" name=")([^"]*)(")')
GROUPS = (128, 64, 32, 16, 8)  # group sizes to suggest


# -- weights alone --------------------------------------------------------------------------------------------------------
def compress(
    model: Any, scope: Any, params: Mapping[str, Any], feeds: Callable[[], Sequence[Mapping[str, Any]]]
) -> tuple[Any, dict[str, Any]]:
    """Weights alone, by NNCF; with `ratio` below 1 the layers that bear it worst get int8, by `feeds` where there are some.

    → the model and what to report. Raises StepFailed.
    """
    kind = f"{params['scheme'].upper()}_{'SYM' if params['symmetric'] else 'ASYM'}"
    with framework("quantize this model", "NNCF"):
        import nncf
        from nncf.quantization.advanced_parameters import AdvancedCompressionParameters, GroupSizeFallbackMode

        if params["scheme"] == "int8":
            return nncf.compress_weights(model, mode=nncf.CompressWeightsMode[kind], ignored_scope=scope), {}
        seen = feeds() if params["ratio"] < 1 else []
        try:
            made = nncf.compress_weights(
                model,
                mode=nncf.CompressWeightsMode[kind],
                ratio=params["ratio"],
                group_size=params["group_size"],
                dataset=nncf.Dataset(seen) if seen else None,
                ignored_scope=scope,
                advanced_parameters=AdvancedCompressionParameters(group_size_fallback_mode=GroupSizeFallbackMode.ERROR),
            )
        except nncf.InvalidGroupSizeError as error:
            raise StepFailed(_no_multiple(params["group_size"], str(error))) from error
    return made, {"group_size": params["group_size"], "ratio": params["ratio"], "samples": len(seen)}


def bytes_each(parameters: Mapping[str, Any]) -> float:
    """Of a weight in int4: 4 bits with a 16-bit scale a group, and a zero point of 4 bits where there is one; the rest in int8."""
    in_groups = 0.5 + (2 if parameters["symmetric"] else 2.5) / parameters["group_size"]
    return float(parameters["ratio"] * in_groups + 1 - parameters["ratio"])


def _no_multiple(size: int, said: str) -> str:
    """NNCF's list of layers whose inputs the group size does not divide, as one sentence."""
    found = re.findall(r'"([^"]+)" \(channel size: (\d+)\)', said)
    if not found:
        return f"quantize.group_size: {size} does not divide the inputs of every layer ({' '.join(said.split())[:200]})"
    advice = fitting([int(number) for _, number in found])
    name, number = found[0]
    more = f", as have {len(found) - 1} more" if len(found) > 1 else ""
    return f"quantize.group_size: {size} does not divide the {number} inputs of the layer {name}{more}; {advice}"


def fitting(inputs: Sequence[int]) -> str:
    """Which group sizes divide all of these, as advice."""
    found = [str(size) for size in GROUPS if not any(number % size for number in inputs)]
    return f"{' or '.join(found)} would fit" if found else "leave such layers in float by quantize.exclude"


def excluded(model: Any, params: Mapping[str, Any]) -> Any:
    """`exclude` holds names of nodes or operators, ONNX's or OpenVINO's. Raises BadInput for one that matches nothing.

    Recurrent layers stay in float: NNCF 3.4 makes of them a model that is right in memory and, saved, gives one answer for all.
    """
    import nncf

    operators = {op.get_friendly_name(): op.get_type_name() for op in model.get_ops() if op.get_type_name() != "Constant"}
    found = {name for name, kind in operators.items() if kind in RECURRENT}
    if only := {kind for name in params["only"] for kind in ONNX_NAMES.get(name, (name,))}:
        found |= {name for name, kind in operators.items() if kind not in only}
    for name in params["exclude"]:
        kinds = ONNX_NAMES.get(name, (name,))
        # A node with a bias becomes two operators: NODE, and NODE/WithoutBiases before it.
        matched = {one for one, kind in operators.items() if kind in kinds or one == name or one.startswith(f"{name}/")}
        if not matched:
            raise BadInput(
                f'quantize.exclude: no node or operator is called "{name}"; operators: {", ".join(sorted(set(operators.values())))}'
            )
        found |= matched
    return nncf.IgnoredScope(names=sorted(found), validate=False)


# -- counting -------------------------------------------------------------------------------------------------------------
def counted(action: Action, candidates: Sequence[Any], possible: int, operators: str, how: Mapping[str, Any]) -> Outcome:
    """The report of what was made, `candidates` being what could be quantized in the files as they lie there, of `possible`.

    Raises StepFailed where nothing was quantized, or not as named, or the files did not shrink. `operators` are what NNCF takes.
    """
    before, after = (
        sum(path.stat().st_size for path in place.iterdir()) for place in (action.inputs["model"], action.outputs["model"])
    )
    reached = [op for op in candidates if is_quantized(op)]
    onnxsource.check_quantized(len(reached), possible, operators.split(), before, after)
    bits = Counter(f"int{number}" for op in reached if (number := _bits(op)))
    scheme, method = str(action.params["scheme"]), str(action.params["method"])
    if scheme == "int4" and not bits["int4"]:
        raise StepFailed(
            "nothing became int4: NNCF takes MatMul and Gemm alone, but for the last one, and this model has no other; "
            "write scheme: int8, or name another framework"
        )
    report = {
        "method": method,
        "symmetric": action.params["symmetric"],
        "operators": len(reached),
        "quantizable": possible,
        "weights": dict(sorted(bits.items())),
        "not_quantized": sorted(op.get_friendly_name() for op in candidates if not is_quantized(op)),
        "bytes_before": before,
        "bytes_after": after,
        **{key: action.params[key] for key in ("exclude", "only") if action.params[key]},
        **how,
    }
    action.outputs["report"].write_text(json.dumps(report, indent=1, sort_keys=True), encoding="utf-8")
    return Outcome(summary=f"{scheme} {method}, {len(reached)} of {possible} operators, {human(before)} → {human(after)}")


def is_quantized(op: Any) -> bool:
    return bool(_bits(op)) or any(_has_quantizer(op, index) for index in range(op.get_input_size()))


def _bits(op: Any) -> int:
    """The fewest bits of an operator's weights, 0 where all are floats."""
    return min(filter(None, (weight_bits(op, index) for index in range(op.get_input_size()))), default=0)


def weight_bits(op: Any, index: int) -> int:
    """Bits of the stored weight behind an input, 0 where there is none or a float."""
    weight = stored(op, index)
    return BITS.get(weight.get_element_type().get_type_name(), 0) if weight else 0


def stored(op: Any, index: int) -> Any:
    """The constant behind an input, None where it is computed."""
    node = op.input_value(index).get_node()
    while node.get_type_name() in _WEIGHT_PATH:
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


def _has_quantizer(op: Any, index: int) -> bool:
    node = op.input_value(index).get_node()
    while node.get_type_name() in ACTIVATION_PATH:
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "FakeQuantize")


# -- files ----------------------------------------------------------------------------------------------------------------
def read(xml: Path) -> Any:
    """Its weights are mapped. Raises StepFailed."""
    with framework(f"load {xml.name}"):
        import openvino

        return openvino.Core().read_model(xml)


def save(model: Any, xml: Path, kept: set[str]) -> None:
    with framework("save the model"):
        import openvino

        openvino.save_model(model, xml, compress_to_fp16=False)
    rename(xml, kept)


def layers(xml: Path) -> list[str]:
    return [html.unescape(name) for _, name, _ in _LAYER.findall(xml.read_text(encoding="utf-8"))]


def rename(xml: Path, kept: set[str]) -> None:
    """Generated names hold a number that counts all that the process made before: renumber them, in the order of the file.

    Layers are joined by their ids, so a name means nothing to OpenVINO. `kept` are the names that somebody gave.
    """
    numbers: Counter[str] = Counter()

    def renamed(match: re.Match[str]) -> str:
        if html.unescape(match[2]) in kept or not _GENERATED.match(match[2]):
            return match[0]
        kind = match[2].rpartition("_")[0]
        numbers[kind] += 1
        return f"{match[1]}{kind}.{numbers[kind]}{match[3]}"

    xml.write_text(_LAYER.sub(renamed, xml.read_text(encoding="utf-8")), encoding="utf-8")


@contextmanager
def framework(doing: str, who: str = "OpenVINO", advice: str = reference.MEND) -> Iterator[None]:
    """A framework's exception as one sentence of ours."""
    try:
        yield
    except EdgebuildError:
        raise
    except Exception as error:
        words = re.sub(r"Exception from \S+:\d+:|Check '[^']*' failed at \S+:\d+:", "", str(error))
        raise StepFailed(f"{who} cannot {doing}: {said(words or error)}{advice}") from error
