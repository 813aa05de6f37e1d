"""ONNX as a source: opsets, copies and names of it, its own runtime as the reference, and what its quantizers are held to.

What the backends that take ONNX share. Imported by them alone; the frameworks are imported where they are used, in a worker.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebuild import reference
from edgebuild.backend import ModelFacts, Session
from edgebuild.errors import BadInput, StepFailed, first_line, shown
from edgebuild.step import Action
from edgebuild.units import human

if TYPE_CHECKING:
    from numpy.typing import NDArray

OPSET, OLDEST = 17, 13  # what models older than the second are raised to: per-channel quantization needs 13
BRANCHES = ("If", "Loop", "Scan")  # operators that hold graphs of their own
MAX_PROTOBUF = 1_900_000_000  # bytes; protobuf takes no message of 2 GiB or more
EXTERNAL = "model.data/"  # roles of the files that hold a model's external data
_NUMPY = {"float": "float32", "double": "float64", "float16": "float16", "string": "object"}
THREADS = 1  # one thread: the figures of two runs on a busy machine stay comparable


def refuse(facts: ModelFacts, parameters: Mapping[str, Any], domains: Sequence[str], runtime: str) -> str:
    """Why a runtime that has the operators of these domains cannot take the model, in one sentence, else empty; pure."""
    foreign = sorted(name for name in facts.operators if "." in name and name.rpartition(".")[0] not in domains)
    if foreign:
        return f"it uses the operator {foreign[0]}, which {runtime} has only with a custom library; export it without"
    if "scheme" in parameters and facts.quantized:
        return (
            f"it is quantized already ({facts.quantized}); quantize: {{scheme: none}} takes it as it is, or give the float model"
        )
    return unreachable(facts) if "scheme" in parameters else ""


def unreachable(facts: ModelFacts) -> str:
    """Why no quantizer can do anything for the model, whatever its recipe, else empty."""
    inside = " and ".join(name for name in BRANCHES if name in facts.operators)
    if not inside or any(facts.weights.values()) or not facts.parameters:
        return ""
    return (
        f"all its weights lie inside {inside}, where no quantizer looks: leave this model unquantized (quantize: {{scheme: none}}), "
        f"or give an export without {inside}"
    )


@contextmanager
def converting(facts: ModelFacts) -> Iterator[None]:
    """A conversion that fails of a model that could not be quantized either says both."""
    try:
        yield
    except StepFailed as error:
        if reason := unreachable(facts):
            raise StepFailed(f"{error}; nor could it be quantized: {reason}") from error
        raise


def opsets(facts: ModelFacts) -> dict[str, int]:
    """The source's opset, and the one that it is worked on with; 0 where its header names none."""
    found = facts.opsets.get("", facts.opsets.get("ai.onnx", 0))
    return {"source": found, "model": OPSET if 0 < found < OLDEST else found}


def making(facts: ModelFacts) -> int:
    """Bytes of memory that it takes to copy a model, or to raise its opset: onnx has no way to do either a tensor at a time.

    Measured on 201 MB: 2.7 and 7.7 of them; nothing, where the model is one file and stays as it is, which no header tells.
    """
    found = opsets(facts)
    return (3 if found["model"] == found["source"] else 8) * facts.bytes


def kept(action: Action) -> Mapping[str, str]:
    """A model that is one file and stays as it is, as an outcome's `kept`; empty where it must be written."""
    alone = not any(role.startswith(EXTERNAL) for role in action.inputs) and not action.params.get("shape")
    return {"model/model.onnx": "model"} if alone else {}


def copy(action: Action, facts: ModelFacts, folder: Path) -> None:
    """One file, where protobuf's 2 GiB allow it (ONNX Runtime's quantizer reads no external data); else file for file."""
    external = {role.removeprefix(EXTERNAL): path for role, path in action.inputs.items() if role.startswith(EXTERNAL)}
    if external and facts.bytes < MAX_PROTOBUF:
        import onnx

        onnx.save(onnx.load(action.inputs["model"]), folder / "model.onnx")
        return
    shutil.copyfile(action.inputs["model"], folder / "model.onnx")
    for name, path in external.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)


def raise_opset(source: Path, target: Path) -> None:
    """The model as one file at OPSET. Raises StepFailed where onnx cannot convert it."""
    import onnx
    import onnx.version_converter

    try:
        onnx.save(onnx.version_converter.convert_version(onnx.load(source), OPSET), target)
    except Exception as error:
        raise StepFailed(f"its opset cannot be raised to {OPSET}: {cause(error)}; export it again with opset {OPSET}") from error


def names(model: Path) -> set[str]:
    """Whatever a model's author could name: nodes and values, those of subgraphs too."""
    import onnx

    return set(_names(onnx.load(model, load_external_data=False).graph))


def _names(graph: Any) -> Iterator[str]:
    yield from (value.name for value in (*graph.input, *graph.initializer))
    for node in graph.node:
        yield node.name
        yield from node.output
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
                yield from _names(inner)


def fix_shapes(model: Path, shapes: Mapping[str, Sequence[int]]) -> str:
    """Give the inputs of a model file the sizes that a target names; → what was done. Raises BadInput where it has others."""
    import onnx
    from onnxruntime.tools import onnx_model_utils

    changed = onnx.load(model, load_external_data=False)
    try:
        for name, sizes in shapes.items():
            onnx_model_utils.make_input_shape_fixed(changed.graph, name, list(sizes))
    except ValueError as error:
        raise BadInput(f"model.shape: {cause(error)}") from error
    onnx.save(changed, model)
    return ", ".join(f"{name} {list(sizes)}" for name, sizes in shapes.items())


def hold(candidate: Session, source: Path, facts: ModelFacts) -> dict[str, Any]:
    """Both run on the same seeded inputs; the source without any graph optimisation, as an independent reading of it.

    The report's JSON. Raises StepFailed where their outputs differ.
    """
    from edgebuild import samples

    original = OnnxSession(source, optimised=False)
    feeds = samples.golden(candidate.inputs, count=4)  # whose shapes are those of the source, or fixed
    expected = original.infer(feeds)
    original.close()
    found = candidate.infer(feeds)
    return reference.hold_outputs("the source model in ONNX Runtime without optimisations", expected, found)


def check_quantized(done: int, possible: int, operators: Sequence[str], before: int, after: int) -> None:
    """Tools exit 0 when they have done nothing. Raises StepFailed where no operator was reached, or the files did not shrink."""
    if not possible:
        raise StepFailed(
            f"nothing was quantized: it has no operator that could be ({', '.join(operators)}, …); "
            "leave this model unquantized (quantize: {scheme: none})"
        )
    if not done:
        raise StepFailed(
            f"nothing was quantized: none of its {possible} quantizable operators ({', '.join(operators)}, …) was reached; "
            "leave this model unquantized (quantize: {scheme: none}) or export it without nested subgraphs"
        )
    if after >= before:
        raise StepFailed(
            f"quantizing made it bigger: {human(before)} became {human(after)}; leave this model unquantized (quantize: {{scheme: none}})"
        )


class OnnxSession:
    """An ONNX file in ONNX Runtime's CPU provider, on one thread."""

    def __init__(self, path: Path, optimised: bool = True) -> None:
        import onnxruntime

        onnxruntime.disable_telemetry_events()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = THREADS
        options.log_severity_level = 3
        if not optimised:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            raise StepFailed(f"ONNX Runtime does not load {path.name}: {cause(error)}{EXPORT}") from error
        self.runtime = f"onnxruntime {onnxruntime.__version__}, CPU, {THREADS} thread"
        self.inputs: Sequence[Mapping[str, Any]] = [
            {"name": one.name, "dtype": _numpy_type(one.type), "shape": list(one.shape)} for one in self._session.get_inputs()
        ]
        self._outputs = [one.name for one in self._session.get_outputs()]

    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        try:
            return dict(zip(self._outputs, self._session.run(self._outputs, dict(feeds)), strict=True))
        except Exception as error:
            raise StepFailed(f"ONNX Runtime cannot run the model: {cause(error)}{taken(self.inputs, feeds)}{EXPORT}") from error

    def logits(self, tokens: NDArray[Any]) -> NDArray[Any]:
        raise StepFailed(NO_TOKENS)

    def tokens(self, text: str) -> NDArray[Any]:
        raise StepFailed(NO_TOKENIZER)

    def close(self) -> None:
        del self._session


def taken(inputs: Sequence[Mapping[str, Any]], feeds: Mapping[str, NDArray[Any]]) -> str:
    """With what sizes a model was run that leaves some free behind the first: a model may take a few of them alone, and says so nowhere."""
    free = {str(one["name"]) for one in inputs if not all(isinstance(size, int) for size in one["shape"][1:])}
    if not free:
        return ""
    sizes = ", ".join(f"{name}: {list(feeds[name].shape)}" for name in feeds if name in free)
    return f"; it leaves sizes free and was run with {shown(sizes, 200)}: where it takes others alone, say them by model.shape"


EXPORT = "; export it without what is named here"
NO_TOKENS = "this ONNX model is run with named arrays, not with tokens; language models in ONNX are not supported"
NO_TOKENIZER = "this ONNX model has no tokenizer; give its evaluation data as .npz"


def _numpy_type(text: str) -> str:
    kind = text.removeprefix("tensor(").removesuffix(")")
    return _NUMPY.get(kind, kind)


# How ONNX Runtime begins: its own number of the error, paths of this machine, and the place in its sources with a signature.
_PREAMBLE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from .* failed:|/\S+\.(?:cc|h|cpp):\d+ .*?\) (?=\S)")


def cause(error: Exception) -> str:
    """The first line of what ONNX's tools say, without what is not of the model; the others repeat it."""
    return first_line(_PREAMBLE.sub("", str(error).strip()) or error)
