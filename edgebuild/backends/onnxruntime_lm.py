"""The language models of the backend `onnxruntime`: a Hugging Face folder in, a folder out that onnxruntime-genai loads.

onnxruntime-genai's model builder writes the graph with its key-value cache as inputs and outputs, the tokenizer and
genai_config.json, in float32; MatMulNBits quantizes that graph. It is run by onnxruntime-genai itself, tokenizer included.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebuild import machine, onnxsource, positions, reference
from edgebuild.backend import MAX_WINDOWS, WINDOW, Estimate, ModelFacts
from edgebuild.errors import BadInput, EdgebuildError, StepFailed
from edgebuild.step import Action, Outcome
from edgebuild.units import human

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PACKAGES = (
    "onnxruntime-genai",
    "onnxruntime",
    "onnx",
    "onnx-ir",
    "torch",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "protobuf",
    "ml_dtypes",
    "numpy",
)
CONFIG, MODEL, DATA = "genai_config.json", "model.onnx", "model.onnx.data"
# With a cache as short as a layer's window, a graph runs in no other runtime than onnxruntime-genai's own.
OPTIONS = ("hf_token=false", "hf_remote=false", "windowed_kv_cache=false")
WINDOWED = ("mistral", "phi3")  # model types with one window for all their layers, which their config.json does not name
# What its builder computes of scaled positions, and of architectures for which it reads another kind: all else it passes over, or ends
# at. What is `dynamic` scales nothing within the context.
SCALED = ("linear", "yarn")
SCALED_OF = {
    **dict.fromkeys(("LlamaForCausalLM", "NemotronForCausalLM"), ("llama3", "dynamic")),
    "HunYuanDenseV1ForCausalLM": ("dynamic",),
    "Phi3ForCausalLM": ("longrope",),
}
GRAPH, GRAPH_LAYER = 20_000, 12_000  # bytes of the graph and of its part for a layer
BITS = {"int4": 4, "int8": 8}
# Bytes of memory that converting, quantizing and running take before any weight.
IMPORTED, QUANTIZER, RUNNING = 450_000_000, 100_000_000, 120_000_000


def is_one(model: Path) -> bool:
    return (model / CONFIG).exists()


def refuse(facts: ModelFacts, parameters: Mapping[str, Any]) -> str:
    """Pure. In one sentence, else empty."""
    if facts.quantized:
        return f"it is quantized already ({facts.quantized}); give the float model that it was made from"
    if facts.architecture not in _architectures():
        code = "its config.json names Python code (auto_map), which is never run, and " if facts.custom_code else ""
        return f"{code}onnxruntime-genai's model builder knows no language model {facts.architecture!r}; name another framework"
    who = f"onnxruntime-genai's model builder (of {facts.architecture})"
    if reason := positions.refuse(facts.scaled, SCALED_OF.get(facts.architecture, SCALED), who):
        return reason
    if reason := positions.refuse_yarn(facts.scaled, who, truncates=False):
        return reason
    if "group_size" in parameters and facts.experts:
        return (
            f"the weights of its {facts.experts} experts would stay in float32, as only matrix products are quantized; "
            "write scheme: none, or name another framework"
        )
    if (method := parameters.get("method", "weights")) != "weights":
        return f"method: {method} is for ONNX models; of a language model weights alone are quantized: write method: weights"
    return ""


def estimate(facts: ModelFacts, scheme: str, parameters: Mapping[str, Any]) -> Estimate:
    """All in float32, but, quantized, the matrices that products read: the embedding is looked up, and stays.

    The builder makes one tensor after the other from weights that are mapped; the quantizer maps what it reads too, and holds what it
    made, of the last matrix a few copies; running lays weights out once: on 0.65 billion, with a window's logits, 2.43 GB of 2.60 of
    float32, 0.50 of 0.71 of int4.
    """
    count, matrices = sum(facts.parameters.values()), sum(facts.weights.values())
    embedding = min((facts.vocabulary or 0) * (facts.hidden or 0), matrices)
    if facts.tied_embeddings:
        count, matrices = count + embedding, matrices + embedding  # written twice: looked up, and multiplied by
    whole = 4 * (count + (facts.context or 0) * (facts.hidden or 0) // (facts.heads or 1))  # with a table of rotations
    others = GRAPH + GRAPH_LAYER * (facts.layers or 0) + facts.tokenizer
    made, making = whole, IMPORTED + whole // 8 + 6 * facts.largest
    if scheme != "none" and "group_size" in parameters:
        each = bytes_each(scheme, parameters)
        made -= int((4 - each) * (matrices - embedding))
        making = QUANTIZER + int(each * (matrices - embedding + 4 * facts.largest))
    if facts.experts:
        making = IMPORTED + 2 * whole  # not measured: more than all of it at once
    answers = (4 * MAX_WINDOWS + 24) * WINDOW * (facts.vocabulary or 0)
    return Estimate(artifact=made + others, making=making, running=RUNNING + made + answers)


def bytes_each(scheme: str, parameters: Mapping[str, Any]) -> float:
    """Of an element that MatMulNBits reads: its bits, and of its group's a scale in float32 and, not symmetric, a zero point."""
    size = BITS[scheme] / 8
    return size + (4 if parameters["symmetric"] else 4 + size) / float(parameters["group_size"])


def convert(action: Action, facts: ModelFacts) -> Outcome:
    """Weights in float32; byte for byte the same from any folder."""
    with reference.staged(action.inputs) as source:
        _build(source, action.outputs["model"])
    action.outputs["report"].write_text(json.dumps({"dtypes": "float32"}), encoding="utf-8")
    return Outcome(summary=f"float32, {sum(facts.parameters.values()):,} parameters")


def hold(session: LmSession, source: Mapping[str, Path]) -> dict[str, Any]:
    """Its tokenizer both ways, and its logits."""
    report = reference.hold(session, source)
    # onnxruntime-genai leaves the space that some tokenizers put before a text's first word.
    reference.hold_text(session, source, "onnxruntime-genai's tokenizer", leaves=" ")
    return report


def quantize(action: Action) -> Outcome:
    """Weights of matrix products in blocks of four or eight bits, all else as it is. Raises StepFailed where nothing was, or did not shrink."""
    source, out, params = action.inputs["model"], action.outputs["model"], action.params
    out.mkdir()
    for path in source.iterdir():
        if path.name not in (MODEL, DATA):
            shutil.copyfile(path, out / path.name)
    with _framework("load the converted model", "onnx"):
        model = _mapped(source)
    excluded = _excluded(model.graph.node, params["exclude"])
    possible = [node.name for node in model.graph.node if node.op_type == "MatMul"]
    with _framework("quantize this model", "onnxruntime.quantization"):
        import onnx_ir
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        tool = MatMulNBitsQuantizer(
            model,
            bits=BITS[params["scheme"]],
            block_size=params["group_size"],
            is_symmetric=params["symmetric"],
            nodes_to_exclude=excluded,
        )
        tool.process()
        onnx_ir.save(onnx_ir.from_proto(tool.model.model), out / MODEL, external_data=DATA, size_threshold_bytes=0)
    reference.set_modes(out)
    return _counted(action, possible, source, out)


class LmSession:
    """A model and its tokenizer in onnxruntime-genai, on the CPU."""

    inputs: Sequence[Mapping[str, Any]] = ()

    def __init__(self, folder: Path) -> None:
        with _framework("load the model"):
            import onnxruntime
            import onnxruntime_genai as genai

            onnxruntime.disable_telemetry_events()
            genai.disable_telemetry_events()
            self._threads = machine.threads(_weights(folder))
            config = genai.Config(str(folder))
            options: dict[str, Any] = {"intra_op_num_threads": self._threads, "inter_op_num_threads": 1, "log_severity_level": 3}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            self._model: Any = genai.Model(config)
            self._tokenizer: Any = genai.Tokenizer(self._model)
            self._tokenizer.update_options(add_special_tokens="false", skip_special_tokens="false")
            self._vocabulary = int(json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model"]["vocab_size"])
        threads = f"{self._threads} thread{'s' * (self._threads > 1)}"
        self.runtime = f"onnxruntime-genai {genai.__version__}, onnxruntime {onnxruntime.__version__}, CPU, {threads}"

    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        raise StepFailed("a language model takes tokens, not named arrays; give it as ONNX, or name another framework")

    def logits(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """One pass, from an empty cache."""
        import numpy as np

        reference.within(self._vocabulary, tokens)
        with _framework("run the model"):
            import onnxruntime_genai as genai

            options = genai.GeneratorParams(self._model)
            # The seed: no token is drawn, and without one each generator asks the system for 624 random numbers, which took 13 ms on an EPYC.
            options.set_search_options(max_length=len(tokens), batch_size=1, random_seed=0)
            generator = genai.Generator(self._model, options)
            generator.append_tokens(tokens.astype(np.int32))
            found: NDArray[np.float32] = np.array(generator.get_output("logits")[0], np.float32)
        return found

    def tokens(self, text: str) -> NDArray[np.int32]:
        import numpy as np

        with _framework("take a text", "the model's tokenizer"):
            return np.array(self._tokenizer.encode(text), np.int32).reshape(-1)

    def text(self, tokens: NDArray[np.int32]) -> str:
        with _framework("give a text", "the model's tokenizer"):
            return str(self._tokenizer.decode(tokens))

    def close(self) -> None:
        self._tokenizer = self._model = None


# -- conversion -----------------------------------------------------------------------------------------------------------
def _build(source: Path, out: Path) -> None:
    """Raises StepFailed where a part is missing."""
    scratch = out.parent / "cache"
    config = reference.without_code(source / "config.json")
    (source / "config.json").write_text(json.dumps(_spelt_out(config), indent=2), encoding="utf-8")
    with _framework("convert this model", "onnxruntime-genai's model builder"):
        from onnxruntime_genai.models.builder import create_model, parse_extra_options

        words = ("", str(source), str(out), "fp32", "cpu", str(scratch))
        options = parse_extra_options(*words, list(OPTIONS))
        with _unfilled():
            create_model(*words, **options)
    shutil.rmtree(scratch, ignore_errors=True)
    if missing := [name for name in (MODEL, DATA, CONFIG, "tokenizer_config.json") if not (out / name).is_file()]:
        raise StepFailed(f"onnxruntime-genai's model builder made no {missing[0]}; see the log, or name another framework")
    reference.set_modes(out)


@contextmanager
def _unfilled() -> Iterator[None]:
    """Layers are not filled with random numbers when they are made: the builder gives each its weights, and that took a tenth of its time."""
    import torch

    fill = torch.nn.Linear.reset_parameters
    torch.nn.Linear.reset_parameters = lambda layer: None
    try:
        yield
    finally:
        torch.nn.Linear.reset_parameters = fill


def _spelt_out(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what the builder reads and transformers 5 does not write.

    Without the types of their layers it makes models whose layers all have a window that attend to the whole text.
    """
    new = positions.with_old_names(config)
    if config.get("sliding_window") and config.get("model_type") in WINDOWED:
        new["layer_types"] = config.get("layer_types") or ["sliding_attention"] * int(config.get("num_hidden_layers") or 0)
    if config.get("model_type") == "phi3" and not positions.of_config(config):
        new["original_max_position_embeddings"] = config.get("max_position_embeddings")  # another one means a longrope to it
    return new


@cache
def _architectures() -> frozenset[str]:
    """The language models that the lock's model builder makes by code of transformers' own: the same wherever it is asked."""
    return frozenset(Path(__file__).with_name("onnxruntime_architectures.txt").read_text(encoding="ascii").split())


# -- quantizing -----------------------------------------------------------------------------------------------------------
def _mapped(folder: Path) -> Any:
    """The graph, with the place of its weights: onnx_ir, by which they are quantized and saved, maps what it reads, one after the other.

    The place is absolute, and no folder's: in a folder it takes no file that has two names, as links into the store have.
    """
    import onnx

    model = onnx.load(folder / MODEL, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = str((folder / DATA).absolute())
    return model


def _excluded(nodes: Sequence[Any], names: Sequence[str]) -> list[str]:
    """`exclude` holds node names or operator types. Raises BadInput for one that matches nothing."""
    kinds = {node.op_type for node in nodes}
    if unknown := sorted(set(names) - kinds - {node.name for node in nodes}):
        message = f'no node or operator is called "{unknown[0]}"; operators: {", ".join(sorted(kinds))}'
        raise BadInput(f"quantize.exclude: {message}")
    return [node.name for node in nodes if node.name in names or node.op_type in names]


def _counted(action: Action, possible: Sequence[str], source: Path, out: Path) -> Outcome:
    """By the files as they lie on the disk."""
    import onnx

    nodes = onnx.load(out / MODEL, load_external_data=False).graph.node
    left = sorted(node.name for node in nodes if node.op_type == "MatMul" and node.name in possible)
    done = sum(node.op_type == "MatMulNBits" for node in nodes)
    before, after = _weights(source), _weights(out)
    onnxsource.check_quantized(done, len(possible), ("MatMul",), before, after)
    group = action.params["group_size"]
    report = {
        "group_size": group,
        "operators": done,
        "quantizable": len(possible),
        "not_quantized": left,
        "bytes_before": before,
        "bytes_after": after,
    }
    action.outputs["report"].write_text(json.dumps(report, indent=1, sort_keys=True), encoding="utf-8")
    sizes = f"{human(before)} → {human(after)}"
    return Outcome(summary=f"{action.params['scheme']} in groups of {group}, {done} of {len(possible)} matrix products, {sizes}")


def _weights(folder: Path) -> int:
    return sum(path.stat().st_size for name in (MODEL, DATA) if (path := folder / name).exists())


@contextmanager
def _framework(doing: str, who: str = "onnxruntime-genai") -> Iterator[None]:
    """A framework's exception as one sentence of ours."""
    try:
        yield
    except (EdgebuildError, MemoryError):
        raise
    except Exception as error:
        raise StepFailed(f"{who} cannot {doing}: {onnxsource.cause(error)}{reference.MEND}") from error
