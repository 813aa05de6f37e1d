"""ONNX graphs that are chains of Gemm and activations: read as layers, and written as C by emlearn for microcontrollers.

emlearn's converters take scikit-learn's and Keras's objects; what those hand to its C generator are layers, and so does this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebuild.errors import StepFailed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ACTIVATIONS = {"Relu": "relu", "Sigmoid": "logistic", "Tanh": "tanh", "Softmax": "softmax"}  # ONNX's names → emlearn's
PRODUCTS = ("Gemm", "MatMul")
PLAIN = ("Flatten", "Reshape", "Identity", "Dropout")  # compute nothing: the elements and their order stay
OPERATORS = frozenset((*ACTIVATIONS, *PRODUCTS, *PLAIN, "Add", "Constant"))
LEAST_LAYERS = 2  # emlearn's eml_net.h runs no network of fewer
HEADERS = ("eml_common.h", "eml_log.h", "eml_net.h", "eml_net_common.h")
TAKEN = "emlearn takes chains of Gemm and activations (Relu, Sigmoid, Tanh, Softmax)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """`weights` float32 [inputs, outputs], `biases` float32 [outputs], `activation` by emlearn's name."""

    weights: NDArray[np.float32]
    biases: NDArray[np.float32]
    activation: str = "identity"


def foreign(operators: Mapping[str, int]) -> str:
    """Why a graph with so many of each operator is no such chain, in one sentence, else empty."""
    others = {name: count for name, count in operators.items() if name not in OPERATORS}
    if others:
        return f"{TAKEN}, and this model has {', '.join(f'{name}×{count}' for name, count in others.items())}"
    products = sum(operators.get(name, 0) for name in PRODUCTS)
    if products < LEAST_LAYERS:
        return f"{TAKEN} of at least {LEAST_LAYERS} layers, and this model has {products}"
    return ""


def read(path: Path) -> list[Layer]:
    """The layers of the ONNX model at `path`. Raises StepFailed where it is no chain, with the first node that breaks it."""
    import onnx
    from onnx import numpy_helper

    try:
        graph = onnx.load(path).graph
    except Exception as error:  # onnx raises protobuf's errors and its own
        raise StepFailed(f"onnx cannot read the model: {type(error).__name__}: {str(error)[:200]}") from error
    constants = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    inputs = [one for one in graph.input if one.name not in constants]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise StepFailed(f"{TAKEN}: one input and one output, and this model has {len(inputs)} and {len(graph.output)}")
    for one in (inputs[0], graph.output[0]):
        if one.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
            raise StepFailed(f"{TAKEN} in float32, and {one.name} is of another type")
    layers, value = list[Layer](), inputs[0].name
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = _constant(node)
            continue
        if not node.input or node.input[0] != value:
            raise StepFailed(f"{TAKEN}, and in this model {_named(node)} does not take what the node before it made")
        _extend(layers, node, [constants.get(name) for name in node.input[1:]])
        value = node.output[0]
    if value != graph.output[0].name:
        raise StepFailed(f"{TAKEN}, and this model's output {graph.output[0].name} is not what its last node makes")
    if reason := _unlike(layers, inputs[0]):
        raise StepFailed(f"{TAKEN}, and {reason}")
    return layers


def _constant(node: Any) -> NDArray[Any] | None:
    from onnx import numpy_helper

    found = [numpy_helper.to_array(one.t) for one in node.attribute if one.name == "value"]
    return found[0] if found else None


def _named(node: Any) -> str:
    return f"{node.op_type} {node.name or node.output[0]}"


def _extend(layers: list[Layer], node: Any, constants: Sequence[NDArray[Any] | None]) -> None:
    """Add what a node does to the layers. Raises StepFailed."""
    import numpy as np

    kind = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
    last = layers[-1] if layers and layers[-1].activation == "identity" else None
    if kind in PRODUCTS:
        layers.append(_layer(node, constants))
    elif kind == "Add" and last and (added := _row(constants[0], len(last.biases))) is not None:
        layers[-1] = Layer(weights=last.weights, biases=np.asarray(last.biases + added, np.float32))
    elif kind in ACTIVATIONS and last and (kind != "Softmax" or _attributes(node).get("axis", -1) in (-1, 1)):
        layers[-1] = Layer(weights=last.weights, biases=last.biases, activation=ACTIVATIONS[kind])
    elif kind not in PLAIN or (kind == "Flatten" and _attributes(node).get("axis", 1) != 1):
        raise StepFailed(f"{TAKEN}, and this model has {_named(node)}, which is none of that where it stands")


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    return {one.name: helper.get_attribute_value(one) for one in node.attribute}


def _layer(node: Any, constants: Sequence[NDArray[Any] | None]) -> Layer:
    """Gemm is alpha · A · B + beta · C (onnx.ai, "Gemm"), MatMul is A · B."""
    import numpy as np

    given, weights = _attributes(node), constants[0]
    if weights is None or weights.ndim != 2 or weights.dtype != np.float32 or given.get("transA"):
        raise StepFailed(f"{TAKEN} with constant float32 matrices, and {_named(node)} of this model has none")
    if given.get("transB"):
        weights = weights.T
    outputs = weights.shape[1]
    biases = _row(constants[1], outputs) if len(constants) > 1 and node.input[2] else np.zeros(outputs, np.float32)
    if biases is None:
        raise StepFailed(f"{TAKEN} with constant biases, and {_named(node)} of this model has none")
    return Layer(
        weights=np.asarray(weights * np.float32(given.get("alpha", 1.0)), np.float32),
        biases=np.asarray(biases * np.float32(given.get("beta", 1.0)), np.float32),
    )


def _row(array: NDArray[Any] | None, size: int) -> NDArray[Any] | None:
    """What is added to each of `size` outputs, the same to every sample; None where an array is something else."""
    import numpy as np

    if array is None or array.size != (array.shape[-1] if array.ndim else 1) or array.size not in (1, size):
        return None
    return np.broadcast_to(array.reshape(-1), (size,))


def _unlike(layers: Sequence[Layer], given: Any) -> str:
    """Why the layers do not fit one another or the input, else empty."""
    import numpy as np

    sizes = [dimension.dim_value for dimension in given.type.tensor_type.shape.dim[1:]]
    if not sizes or not all(sizes):
        return f"the sizes of its input {given.name} are not fixed beyond the first"
    if len(layers) < LEAST_LAYERS:
        return f"at least {LEAST_LAYERS} of them: this model has {len(layers)}"
    made = math.prod(sizes)
    for number, layer in enumerate(layers):
        if layer.weights.shape[0] != made:
            return f"its matrix {number + 1} takes {layer.weights.shape[0]} values where {made} come"
        made = layer.weights.shape[1]
    if not all(np.isfinite(array).all() for layer in layers for array in (layer.weights, layer.biases)):
        return "this one holds weights that are not finite"
    return ""


# -- C --------------------------------------------------------------------------------------------------------------------
class _Exact(float):
    """A float32 that formats as digits which read back as itself: emlearn asks for six behind the point, whatever its size."""

    def __format__(self, spec: str) -> str:
        return _digits(self)


def _digits(value: float) -> str:
    import numpy as np

    return np.format_float_scientific(np.float32(value))


def _exact(array: NDArray[np.float32]) -> NDArray[Any]:
    import numpy as np

    found = np.empty(array.shape, dtype=object)
    found.reshape(-1)[:] = [_Exact(one) for one in array.reshape(-1)]
    return found


def generator() -> Any:
    """emlearn's C generator of networks. Raises StepFailed where it is not installed.

    Importing emlearn makes numpy raise where it warns, in the whole process (numpy.seterr); that is undone.
    """
    import numpy as np

    try:
        with np.errstate():
            from emlearn import net
    except ImportError as error:
        raise StepFailed(f"emlearn cannot be imported ({error}); pip install 'edgebuild[firmware]'") from error
    return net


def c_source(layers: Sequence[Layer], prefix: str) -> str:
    """emlearn's C of the network: `PREFIX_regress(input, inputs, output, outputs)` → 0 where all is well. Raises StepFailed."""
    net = generator()
    try:
        code = net.c_generate_net_loadable(
            [layer.activation for layer in layers],
            [_exact(layer.weights) for layer in layers],
            [_exact(layer.biases) for layer in layers],
            prefix,
        )
    except Exception as error:  # emlearn raises whatever Python does
        raise StepFailed(f"emlearn cannot convert the model: {type(error).__name__}: {str(error)[:200]}") from error
    return str(code)


def c_array(name: str, array: NDArray[np.float32]) -> str:
    """A constant float array [rows, columns] whose literals read back as these numbers."""
    lines = ["    {" + ", ".join(f"{_digits(value)}f" for value in row) + "},\n" for row in array]
    return f"static const float {name}[{array.shape[0]}][{array.shape[1]}] = {{\n{''.join(lines)}}};\n"
