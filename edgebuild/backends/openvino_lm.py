"""The language models of the backend `openvino`: a Hugging Face folder in, a folder out that openvino_genai.LLMPipeline loads.

optimum-intel writes the model, with its key-value cache as state, and the tokenizer as IR too. Of what it does by itself it
is kept: weights beyond a billion would become int8 unasked, code in the folder could run, and a tokenizer that it cannot
convert it leaves out with a warning.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebuild import machine, reference
from edgebuild.backend import MAX_WINDOWS, WINDOW, Estimate, ModelFacts
from edgebuild.backends import openvino_ir as ir
from edgebuild.errors import StepFailed
from edgebuild.formats import safetensors
from edgebuild.step import Action, Outcome

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PACKAGES = (
    "openvino",
    "openvino-genai",
    "openvino-tokenizers",
    "nncf",
    "optimum",
    "optimum-intel",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
)
# What openvino-genai looks for.
MODEL, TOKENIZER, DETOKENIZER = "openvino_model.xml", "openvino_tokenizer.xml", "openvino_detokenizer.xml"
TASK = "text-generation-with-past"
# As the classes of what it exports end: of an encoder-decoder, or of a classifier, it makes a decoder with random weights for what is missing.
HEADS = ("ForCausalLM", "LMHeadModel")
# Float32 throughout: by itself the CPU takes bfloat16 where it can, int8 for activations before compressed weights and for the cache.
CPU = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    "NUM_STREAMS": 1,
    "PERFORMANCE_HINT": "LATENCY",
}
CALIBRATION = 128  # windows of text, where a target names no number
FED = {"input_ids", "attention_mask", "position_ids", "beam_idx"}
XML, XML_LAYER, XML_QUANTIZED = 40_000, 85_000, 15_000  # bytes of XML: of all three, and of a layer, more where it is quantized
CONVERTING, QUANTIZING, RUNNING = (
    490_000_000,
    210_000_000,
    60_000_000,
)  # bytes of memory that each takes before any weight; measured
READERS = ("MatMul", "Gather")  # the operators that read a language model's matrices


def refuse(facts: ModelFacts, parameters: Mapping[str, Any]) -> str:
    """Pure. In one sentence, else empty."""
    if facts.quantized:
        return f"it is quantized already ({facts.quantized}); give the float model that it was made from"
    if facts.model_type not in _model_types():
        code = "its config.json names Python code (auto_map), which is never run, and " if facts.custom_code else ""
        return f"{code}optimum-intel exports no language model of type {facts.model_type!r}; name another framework"
    if facts.architecture != "unknown" and not facts.architecture.endswith(HEADS):
        return f"{facts.architecture} is no decoder with a head for language; give one (…ForCausalLM), or name another framework"
    if parameters.get("activations"):
        method = parameters.get("method")
        return f"method: {method} quantizes activations, which is for ONNX models; of a language model it is weights alone: write method: weights"
    size, hidden = parameters.get("group_size"), facts.hidden
    if size and hidden and hidden % size:
        return f"its hidden size {hidden} is no multiple of group_size {size}; {ir.fitting([hidden])}"
    return ""


def estimate(facts: ModelFacts, scheme: str, parameters: Mapping[str, Any]) -> Estimate:
    """Matrices by the scheme's bits, but embedding and head in int8; the tokenizer as it came, and as IR.

    Memory: converting maps weights and holds a tensor at a time; fitted on Phi-3 of 0.004 to 3.8 billion parameters. Running keeps
    weights as they are stored, laid out anew: on 0.65 billion, with a window's logits, 1.41 GB of 1.3 of bfloat16, 0.70 of 0.44 of int4.
    """
    count = sum(facts.parameters.values())
    data = sum(number * safetensors.BITS.get(dtype, 16) for dtype, number in facts.parameters.items()) // 8
    others = XML + XML_LAYER * (facts.layers or 0) + 17 * facts.tokenizer // 10
    made = data
    if scheme != "none":
        others += XML_QUANTIZED * (facts.layers or 0)
        matrices = sum(facts.weights.values())
        outer = min((facts.vocabulary or 0) * (facts.hidden or 0) * (1 if facts.tied_embeddings else 2), matrices)
        each = ir.bytes_each(parameters) if scheme == "int4" else 1
        made = int((matrices - outer) * each + outer + (count - matrices) * data / max(count, 1))
    making = CONVERTING + 10 * facts.largest if scheme == "none" else QUANTIZING + made + 4 * facts.largest
    answers = (4 * MAX_WINDOWS + 24) * WINDOW * (facts.vocabulary or 0)
    running = RUNNING + 5 * made // 4 + answers
    return Estimate(artifact=made + others, making=making, running=running)


def convert(action: Action, facts: ModelFacts) -> Outcome:
    """Weights as stored; byte for byte the same from any folder."""
    with reference.staged(action.inputs) as source:
        _export(source, action.outputs["model"])
    kinds = ", ".join(sorted(kind.lower() for kind in facts.parameters))
    action.outputs["report"].write_text(json.dumps({"dtypes": kinds}), encoding="utf-8")
    return Outcome(summary=f"{kinds}, {sum(facts.parameters.values()):,} parameters")


def hold(session: LmSession, source: Mapping[str, Path]) -> dict[str, Any]:
    """Its tokenizer and detokenizer, and its logits."""
    report = reference.hold(session, source)
    reference.hold_text(session, source, "the converted detokenizer")
    return report


def quantize(action: Action) -> Outcome:
    """Weights alone, by NNCF. Raises StepFailed where nothing was quantized or the files did not shrink."""
    source, out = action.inputs["model"], action.outputs["model"]
    out.mkdir()
    for path in source.iterdir():
        if path.stem != Path(MODEL).stem:
            shutil.copyfile(path, out / path.name)
    model = ir.read(source / MODEL)
    scope = ir.excluded(model, action.params)
    made, how = ir.compress(model, scope, action.params, lambda: _feeds(action))
    ir.save(made, out / MODEL, set(ir.layers(source / MODEL)))
    del made
    reference.set_modes(out)
    candidates = [op for op in ir.read(out / MODEL).get_ops() if _reads_a_matrix(op)]
    return ir.counted(action, candidates, sum(map(_reads_a_matrix, model.get_ops())), " ".join(READERS), how)


class LmSession:
    """A model with its cache as state, compiled for the CPU in float32, and its own tokenizer.

    `later`: compiled when it is first run, so that it is not in memory beside the source.
    """

    inputs: Sequence[Mapping[str, Any]] = ()

    def __init__(self, folder: Path, later: bool = False) -> None:
        with ir.framework("load the model's tokenizer", "openvino-genai"):
            import openvino
            import openvino_genai

            self._tokenizer = openvino_genai.Tokenizer(str(folder))
        self._model: Any = ir.read(folder / MODEL)
        self._request: Any = None
        self._inputs = {name for port in self._model.inputs for name in port.get_names()}
        if unknown := sorted(self._inputs - FED):
            raise StepFailed(f"the model takes an input {unknown[0]}, which is not known here; name another framework")
        vocabulary = self._model.output("logits").get_partial_shape()[-1]
        self._vocabulary = vocabulary.get_length() if vocabulary.is_static else None
        self._threads = machine.threads((folder / MODEL).with_suffix(".bin").stat().st_size)
        version = openvino.__version__.partition("-")[0]
        self.runtime = f"openvino {version}, CPU, f32, {self._threads} thread{'s' * (self._threads > 1)}"
        if not later:
            self._compile()

    def _compile(self) -> None:
        with ir.framework("compile the model"):
            import openvino

            options = {**CPU, "INFERENCE_NUM_THREADS": self._threads}
            self._request = openvino.Core().compile_model(self._model, "CPU", options).create_infer_request()
        self._model = None

    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        raise StepFailed("a language model takes tokens, not named arrays; give it as ONNX, or name another framework")

    def logits(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """One pass, with nothing left in the state of what was run before."""
        import numpy as np

        reference.within(self._vocabulary, tokens)
        if self._request is None:
            self._compile()
        with ir.framework("run the model"):
            self._request.reset_state()
            found: NDArray[np.float32] = np.array(self._request.infer(self.feed(tokens))["logits"][0], np.float32)
        return found

    def feed(self, tokens: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
        """What the model takes for one text from its begin."""
        import numpy as np

        length = len(tokens)
        known: dict[str, NDArray[Any]] = {
            "input_ids": tokens[None].astype(np.int64),
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(length, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        return {name: value for name, value in known.items() if name in self._inputs}

    def tokens(self, text: str) -> NDArray[np.int32]:
        import numpy as np

        with ir.framework("take a text", "the model's tokenizer"):
            return np.array(self._tokenizer.encode(text, add_special_tokens=False).input_ids.data, np.int32).reshape(-1)

    def text(self, tokens: NDArray[np.int32]) -> str:
        with ir.framework("give a text", "the model's detokenizer"):
            return str(self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False))

    def close(self) -> None:
        self._request = self._model = None


# -- conversion -----------------------------------------------------------------------------------------------------------
def _export(source: Path, out: Path) -> None:
    """Raises StepFailed where a part is missing."""
    with ir.framework("convert this model", "optimum-intel"):
        from optimum.exporters.openvino import main_export
        from optimum.intel import OVConfig

        main_export(
            str(source),
            out,
            task=TASK,
            library_name="transformers",
            local_files_only=True,
            trust_remote_code=False,
            convert_tokenizer=True,
            ov_config=OVConfig(),  # without one it makes int8 of what is large
        )
    if missing := [name for name in (MODEL, TOKENIZER, DETOKENIZER) if not (out / name).is_file()]:
        part = "model" if missing[0] == MODEL else "tokenizer"
        raise StepFailed(
            f"optimum-intel cannot convert the {part}: it made no {missing[0]}; see the log, or name another framework"
        )
    for name in (MODEL, TOKENIZER, DETOKENIZER):
        _rename(out / name)
    reference.set_modes(out)


def _rename(xml: Path) -> None:
    """The numbers that a process gives by itself to models, inputs and outputs, and to layers, counted in the order of the file."""
    found: dict[str, str] = {}

    def renamed(match: re.Match[str]) -> str:
        return found.setdefault(match[0], f"{match[1]}.{1 + sum(name.startswith(match[1]) for name in found)}")

    text = re.sub(r'<net name="Model\d+"', '<net name="Model"', xml.read_text(encoding="utf-8"))
    xml.write_text(re.sub(r'(?<=[",])(Parameter|Result)_\d+(?=[",])', renamed, text), encoding="utf-8")
    ir.rename(xml, set())


@cache
def _model_types() -> frozenset[str]:
    """The model types that the optimum-intel of the lock exports by code of transformers' own: the same wherever it is asked."""
    return frozenset(Path(__file__).with_name("openvino_types.txt").read_text(encoding="ascii").split())


# -- quantizing -----------------------------------------------------------------------------------------------------------
def _feeds(action: Action) -> list[Mapping[str, NDArray[Any]]]:
    """Windows of the calibration text."""
    from edgebuild import samples

    if "calibration" not in action.inputs:
        return []
    session = LmSession(action.inputs["model"], later=True)
    windows = samples.windows(action.inputs["calibration"], session, action.params["samples"] or CALIBRATION)
    return [session.feed(window) for window in windows]


def _reads_a_matrix(op: Any) -> bool:
    return op.get_type_name() in READERS and any(_is_matrix(ir.stored(op, index)) for index in range(op.get_input_size()))


def _is_matrix(constant: Any) -> bool:
    return constant is not None and sum(length > 1 for length in constant.get_output_shape(0)) > 1
