"""Olive: ONNX in, ONNX out, by a workflow of its passes: edgebuild's recipes, those that a target names, or what Olive's own auto-opt takes.

Hugging Face language models become ONNX by its ModelBuilder (onnxruntime-genai's), with genai_config.json and tokenizer. Olive
ends with status 0 where a pass failed and serves old models from its cache: every workflow has an empty cache, and what came out
is looked at.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgebuild import onnxsource, positions, reference
from edgebuild.backend import Estimate, ModelFacts, Needs, Rung, Session
from edgebuild.backends import olive_process
from edgebuild.backends.olive_text import CONFIG, FILE, TextSession
from edgebuild.errors import BadInput, StepFailed, did_you_mean, shown
from edgebuild.formats.onnx import external_files
from edgebuild.onnxsource import OnnxSession
from edgebuild.step import Action, Outcome
from edgebuild.units import human

NEEDS: Mapping[str, Needs] = dict.fromkeys(
    ("onnx", "huggingface"),
    Needs(
        lock="olive",
        packages=(
            *("olive-ai", "pydantic", "requests", "onnxruntime", "onnxruntime-genai", "onnx", "onnxscript", "onnx-ir", "torch"),
            *("transformers", "tokenizers", "sentencepiece", "protobuf", "ml_dtypes", "numpy"),
        ),
    ),
)
SCHEMES: Mapping[str, Sequence[str]] = {
    "int8": ("method", "symmetric", "exclude", "passes"),
    "int4": ("group_size", "symmetric", "exclude", "passes"),
}
VIEWS: Mapping[str, str] = {"native": "the file as it is, in ONNX Runtime on the CPU provider"}
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
# The quickest kernels first, as in ONNX Runtime's own ladder. Each rung starts Olive, which takes seconds, so that there are few.
LADDER: Mapping[str, Rung] = {
    "static": Rung(sets={}),
    "static-u8": Rung(sets={"activations": "uint8"}),
    "dense": Rung(sets={"activations": "uint8", "quantized": ["Conv", "Gemm", "MatMul"]}, operators=("Conv", "Gemm", "MatMul")),
    "dynamic": Rung(sets={"dynamic": True}),
}
AUTO = "auto"  # `passes: auto`: those that `olive auto-opt` takes
# Olive's passes that make ONNX of ONNX on any machine, with what the lock holds and nothing to download.
PASSES = (
    *("DynamicToFixedShape", "GraphSurgeries", "MatMulNBitsToQDQ", "OnnxBlockWiseRtnQuantization", "OnnxDynamicQuantization"),
    *("OnnxHqqQuantization", "OnnxKQuantQuantization", "OnnxOpVersionConversion", "OnnxPeepholeOptimizer", "OnnxQuantization"),
    *("OnnxQuantizationPreprocess", "OnnxScriptFusion", "OnnxStaticQuantization", "OrtTransformersOptimization"),
)
CALIBRATED = ("OnnxQuantization", "OnnxStaticQuantization")
# Options that would read files which are in no key, or run code.
REFUSED = ("data_config", "evaluator", "external_data_name", "host", "script_dir", "user_script")
QUANTIZABLE = ("Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "Attention", "EmbedLayerNormalization", "Gather")
# What quantized operators are called, by the bits of their weights; those of MatMulNBits say it themselves.
_INT8 = ("MatMulInteger", "ConvInteger", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QAttention")
_NBITS = ("MatMulNBits", "GatherBlockQuantized", "QMoE")
# The plain language models that the lock's builder has, of those that transformers has code for; others it has are of several inputs,
# or keep a state of their own. Tried and left out: Gemma3 and SmolLM3 end in an error, Olmo is computed otherwise than its source (KL 0.1).
ARCHITECTURES = (
    *("Ernie4_5ForCausalLM", "Gemma2ForCausalLM", "GemmaForCausalLM", "GraniteForCausalLM", "HunYuanDenseV1ForCausalLM"),
    *("LlamaForCausalLM", "MistralForCausalLM", "NemotronForCausalLM", "Phi3ForCausalLM", "PhiForCausalLM", "PhiMoEForCausalLM"),
    *("Qwen2ForCausalLM", "Qwen3ForCausalLM"),
)
# What its ModelBuilder computes of scaled positions; what is `dynamic` scales nothing within the context.
SCALED = ("linear", "dynamic", "llama3", "longrope", "yarn")
IMPORTED, OLIVE = (
    42_000_000,
    330_000_000,
)  # bytes of memory that onnxruntime takes before any model, and Olive with all that it imports
GROUP = 32
GROUPS = (16, 32, 64, 128, 256)  # elements that share a scale: the block sizes that its passes and ONNX Runtime both take
READ = ("MatMul", "Gather")  # whose weights are quantized in groups


def parameters(scheme: str, quantize: Mapping[str, Any], calibrated: bool) -> Mapping[str, Any]:
    """`method: auto` is static where there are calibration data, else dynamic. Raises ValueError for what cannot be used."""
    given = {"symmetric": quantize.get("symmetric", False), "exclude": sorted(quantize.get("exclude", ()))}
    if "passes" in quantize:
        if others := sorted(quantize.keys() - {"passes"}):
            raise ValueError(f"{others[0]}: has no meaning beside passes, whose options say it; remove one of the two")
        return {"method": "passes", "passes": _named(quantize["passes"], calibrated)}
    if scheme == "int4":
        group = quantize.get("group_size", GROUP)
        if group not in GROUPS:
            raise ValueError(
                f"group_size: Olive quantizes in groups of {', '.join(map(str, GROUPS))}, not of {group}; take one of these"
            )
        return {"method": "weights", "passes": [], **given, "group_size": group}
    method = quantize.get("method", AUTO)
    if method == AUTO:
        method = "static" if calibrated else "dynamic"
    if method not in LADDER:
        raise ValueError(f'method: no recipe "{method}"; there are: auto, {", ".join(LADDER)}.{did_you_mean(method, LADDER)}')
    found = {"dynamic": False, "activations": "int8", "quantized": [], **LADDER[method].sets}
    if not found["dynamic"] and not calibrated:
        raise ValueError(f"method: {method} needs calibration.data; give it, or write method: dynamic")
    return {"method": method, "passes": [], **given, **found}


def refuse(facts: ModelFacts, parameters: Mapping[str, Any]) -> str:
    if facts.format == "onnx":
        if reason := onnxsource.refuse(facts, parameters, DOMAINS, "ONNX Runtime"):
            return reason
        if "group_size" in parameters and not any(facts.weights.get(operator) for operator in READ):
            return f"its int4 is for the weights of {' and '.join(READ)}, and this model has none; write scheme: int8, or none"
        return ""
    if facts.quantized:
        return f"it is quantized already ({facts.quantized}); give the float model that it was made from"
    if facts.architecture not in ARCHITECTURES:
        code = "its config.json names Python code (auto_map), which is never run, and " if facts.custom_code else ""
        return f"{code}Olive's ModelBuilder knows no language model {facts.architecture!r}; name another framework"
    if reason := _refuse_positions(facts):
        return reason
    if parameters.get("activations") and not parameters.get("dynamic"):
        return (
            "static int8 is calibrated on named arrays, and a language model takes text; write method: dynamic, or scheme: int4"
        )
    if _calibrates(parameters.get("passes", ())):
        return "a pass that calibrates takes named arrays, and a language model takes text; name another pass"
    return ""


def _refuse_positions(facts: ModelFacts) -> str:
    who = "Olive's ModelBuilder"
    kinds = ("dynamic",) if facts.architecture == "HunYuanDenseV1ForCausalLM" else SCALED
    return positions.refuse(facts.scaled, kinds, who) or positions.refuse_yarn(facts.scaled, who, truncates=False)


def estimate(facts: ModelFacts, scheme: str, parameters: Mapping[str, Any], available: int) -> Estimate:
    """Matrices that are reached take their bits and scales, all else stays; of a language model everything was made float32 first.

    Named passes are counted as the scheme's own recipe: what they do, no header tells.
    """
    language = facts.format == "huggingface"
    whole = 4 * sum(facts.parameters.values()) if language else facts.bytes
    if language and facts.tied_embeddings:
        whole += 4 * (facts.vocabulary or 0) * (facts.hidden or 0)
    whole += facts.tokenizer
    running = IMPORTED + (3 if language else 2) * whole
    if scheme == "none":
        making = OLIVE + 3 * whole if language else IMPORTED + onnxsource.making(facts)
        return Estimate(artifact=whole, making=making, running=running, holding=0 if language else whole)
    embedded = 4 * (facts.vocabulary or 0) * (facts.hidden or 0)
    if scheme == "int4":
        matrices = sum(facts.weights.get(name, 0) for name in (*READ, ""))
        matrices += (facts.vocabulary or 0) * (facts.hidden or 0) if language and facts.tied_embeddings else 0
        group = parameters.get("group_size", GROUP)
        artifact = int(whole - matrices * (4 - 0.5 - (4 if parameters.get("symmetric") else 4.5) / group))
    else:
        reached = set(parameters.get("quantized") or QUANTIZABLE) - set(parameters.get("exclude", ()))
        matrices = sum(count for name, count in facts.weights.items() if name in reached)
        if language:
            matrices = max(sum(facts.weights.values()) - embedded // 4, 0)
        channels = 0 if language or parameters.get("dynamic") else sum(facts.parameters.values()) - sum(facts.weights.values())
        artifact = whole - 3 * matrices + 13 * channels + 400 * sum(facts.operators.values()) if matrices else whole
    return Estimate(artifact=artifact, making=OLIVE + 5 * whole, running=IMPORTED + (3 if language else 2) * artifact)


# -- conversion -----------------------------------------------------------------------------------------------------------
def convert(action: Action, facts: ModelFacts) -> Outcome:
    """A folder with `model.onnx`: of ONNX a copy, its opset raised where it is old; else by ModelBuilder."""
    folder = action.outputs["model"]
    folder.mkdir()
    if facts.format == "onnx":
        report, done = _copied(action, facts, folder)
    else:
        report = _built(action, facts, folder)
        done = f"float32, {sum(facts.parameters.values()):,} parameters"
    action.outputs["report"].write_text(json.dumps(report, indent=1, sort_keys=True), encoding="utf-8")
    return Outcome(summary=done)


def _copied(action: Action, facts: ModelFacts, folder: Path) -> tuple[dict[str, Any], str]:
    """(the report, what was done). No pass is needed for that."""
    opsets = onnxsource.opsets(facts)
    done = f"opset {opsets['source']}"
    if opsets["model"] != opsets["source"]:
        onnxsource.raise_opset(action.inputs["model"], folder / FILE)
        done += f" raised to {opsets['model']}"
    else:
        onnxsource.copy(action, facts, folder)
    if shapes := action.params.get("shape"):
        done += f", made for {onnxsource.fix_shapes(folder / FILE, shapes)}"
    return {"opset": opsets}, done


def _built(action: Action, facts: ModelFacts, folder: Path) -> dict[str, Any]:
    """Raises StepFailed where ModelBuilder cannot."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", facts.model_type).strip("-") or "model"
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, reference.staged(action.inputs, name) as model:
        config = positions.with_old_names(reference.without_code(model / "config.json"))
        (model / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        source = {
            "type": "HfModel",
            "model_path": str(model),
            "task": "text-generation",
            "load_kwargs": {"trust_remote_code": False},
        }
        answer = olive_process.run(Path(scratch), source, [{"type": "ModelBuilder", "precision": "fp32"}])
        olive_process.take(answer, folder)
    return {"passes": answer["passes"]}


def hold(session: Session, source: Mapping[str, Path], facts: ModelFacts) -> dict[str, Any]:
    """An ONNX model by its outputs, a language model by its tokens and logits."""
    if facts.format == "onnx":
        return onnxsource.hold(session, source["model"], facts)
    return reference.hold(session, source)


# -- quantizing -----------------------------------------------------------------------------------------------------------
def quantize(action: Action, facts: ModelFacts) -> Outcome:
    """By Olive's passes. Raises StepFailed where nothing was quantized as the scheme says, or the files did not shrink."""
    source, folder = action.inputs["model"], action.outputs["model"]
    folder.mkdir()
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        chosen = action.params["passes"]
        passes = [] if chosen == AUTO else chosen or _recipe(action, source / FILE)
        feeds = _feeds(action, source / FILE, Path(scratch, "feeds.npz")) if _calibrates(passes) else None
        passes = [{**one, "data_config": olive_process.DATA} if _calibrates([one]) else one for one in passes]
        model = {"type": "ONNXModel", "model_path": str(Path(scratch, "source")), "onnx_file_name": FILE}
        answer = olive_process.run(
            Path(scratch), model, passes, feeds, action.params["scheme"] if chosen == AUTO else "", copied=source
        )
        olive_process.take(answer, folder)
    weights = (FILE, *external_files(str(source / FILE)))
    for path in source.iterdir():  # configuration and tokenizer of a language model
        if path.is_file() and path.name not in weights and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    return _counted(action, answer["passes"], source, folder)


def _recipe(action: Action, model: Path) -> list[dict[str, Any]]:
    """The pass that edgebuild's own parameters come to."""
    params = action.params
    operators, nodes = _excluded(model, params["exclude"])
    if params["scheme"] == "int4":
        settings = {"bits": 4, "block_size": params["group_size"], "is_symmetric": params["symmetric"]}
        return [{"type": "OnnxBlockWiseRtnQuantization", **settings, "nodes_to_exclude": nodes}]
    shared: dict[str, Any] = {"precision": "int8", "nodes_to_exclude": nodes}
    if not params["quantized"]:  # which takes precedence
        shared["op_types_to_exclude"] = operators
    if params["dynamic"]:
        return [{"type": "OnnxDynamicQuantization", **shared}]
    settings = {"quant_format": "QDQ", "per_channel": True, "activation_symmetric": params["symmetric"]}
    settings |= {"activation_type": params["activations"]}
    if params["quantized"]:
        settings |= {"op_types_to_quantize": [one for one in params["quantized"] if one not in operators]}
    return [{"type": "OnnxStaticQuantization", **shared, **settings}]


def _excluded(model: Path, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """`exclude` holds operator types or node names: (the types, the names of nodes, those of such types too). Raises BadInput."""
    if not names:
        return [], []
    import onnx

    nodes = onnx.load(model, load_external_data=False).graph.node
    types = sorted({node.op_type for node in nodes})
    if unknown := sorted(set(names) - set(types) - {node.name for node in nodes}):
        raise BadInput(f'quantize.exclude: no node or operator is called "{shown(unknown[0])}"; operators: {", ".join(types)}')
    found = [node.name for node in nodes if node.name and (node.name in names or node.op_type in names)]
    return [one for one in types if one in names], found


def _feeds(action: Action, model: Path, path: Path) -> Path:
    """The calibration samples in a file that the workflow reads, a whole feed each. Raises BadInput."""
    import numpy as np

    from edgebuild import samples

    session = OnnxSession(model)
    names = [str(one["name"]) for one in session.inputs]
    arrays: dict[str, Any] = {}
    count = 0
    for feed in samples.calibration(action, session):
        arrays |= {f"{count}.{at}": np.asarray(feed[name]) for at, name in enumerate(names)}
        count += 1
    np.savez(path, names=np.array(names), count=np.array(count), **arrays)
    return path


def _named(passes: Any, calibrated: bool) -> Any:
    """What a target names, as maps with `type` and options. Raises ValueError."""
    if passes == AUTO:
        return AUTO
    found = [{"type": one} if isinstance(one, str) else dict(one) for one in passes]
    for one in found:
        name = one.get("type")
        if name not in PASSES:
            word = shown(str(name)) if name else "nothing"
            raise ValueError(f'passes: no pass "{word}" here; there are: {", ".join(PASSES)}.{did_you_mean(word, PASSES)}')
        if options := sorted(set(one) & set(REFUSED)):
            raise ValueError(
                f"passes: {name}: {options[0]} would read what is in no key; calibration data are given in calibration.data"
            )
    if _calibrates(found) and not calibrated:
        raise ValueError("passes: a static pass needs calibration.data; give it, or name OnnxDynamicQuantization")
    return found


def _calibrates(passes: Any) -> bool:
    """Whether one of them asks for calibration data."""
    return passes != AUTO and any(one["type"] in CALIBRATED and one.get("quant_mode") != "dynamic" for one in passes)


def _keep_names(original: Any, made: Any) -> bool:
    """Outputs that a pass gave other names (`logits_Q4`) get their own again, as who runs the model knows no other; → whether there were."""
    wanted, found = ([one.name for one in graph.output] for graph in (original, made))
    renamed = {new: old for new, old in zip(found, wanted, strict=False) if new != old}
    if not renamed or len(found) != len(wanted) or set(wanted) & set(found) & set(renamed.values()):
        return False
    for node in made.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    for value in (*made.output, *made.value_info):
        value.name = renamed.get(value.name, value.name)
    return True


# -- what came out --------------------------------------------------------------------------------------------------------
def _counted(action: Action, passes: Sequence[Mapping[str, Any]], source: Path, folder: Path) -> Outcome:
    """What was quantized, in the report. Loads both models once: in one file they may have gigabytes. Raises StepFailed as `quantize`."""
    import onnx

    original = onnx.load(source / FILE, load_external_data=False).graph
    made = onnx.load(folder / FILE, load_external_data=False)
    if _keep_names(original, made.graph):
        onnx.save(made, folder / FILE)
    before, after = _bytes(source), _bytes(folder)
    possible = sum(node.op_type in QUANTIZABLE for node in original.node)
    done = _quantized(made.graph)
    scheme, method = action.params["scheme"], action.params["method"]
    onnxsource.check_quantized(done[scheme], possible, QUANTIZABLE[:4], before, after)
    report = {
        "method": method,
        "passes": passes,
        "operators": done[scheme],
        "others": {name: count for name, count in done.items() if name != scheme and count},
        "quantizable": possible,
        "bytes_before": before,
        "bytes_after": after,
    }
    action.outputs["report"].write_text(json.dumps(report, indent=1, sort_keys=True), encoding="utf-8")
    named = " → ".join(str(one["type"]) for one in passes)
    return Outcome(
        summary=f"{scheme} {method}, {named}: {done[scheme]} of {possible} operators, {human(before)} → {human(after)}"
    )


def _quantized(graph: Any) -> dict[str, int]:
    """Operators that compute on weights of 8 and of 4 bits, by scheme."""
    import onnx

    four = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    types = {one.name: one.data_type for one in graph.initializer}
    dequantized = {node.output[0]: types.get(node.input[0]) for node in graph.node if node.op_type == "DequantizeLinear"}
    found = {"int8": 0, "int4": 0}
    for node in graph.node:
        if node.op_type in _NBITS:
            bits = next((one.i for one in node.attribute if one.name in ("bits", "expert_weight_bits")), 4)
            found["int4" if bits <= 4 else "int8"] += 1
        elif node.op_type in _INT8:
            found["int8"] += 1
        elif node.op_type in QUANTIZABLE and set(node.input[:2]) <= dequantized.keys():
            found["int4" if any(dequantized[one] in four for one in node.input[:2]) else "int8"] += 1
    return found


def _bytes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in (FILE, *external_files(str(folder / FILE))))


# -- running --------------------------------------------------------------------------------------------------------------
def open(model: Path, view: str = "") -> Session:
    """Raises StepFailed where ONNX Runtime cannot load it."""
    if (model / CONFIG).is_file():
        return TextSession(model)
    return OnnxSession(model / FILE if model.is_dir() else model)


def smoke() -> str:
    """A small matrix product, quantized by a workflow."""
    import importlib.metadata

    import numpy as np
    import onnx
    from onnx import TensorProto, helper

    weights = np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 64]) for name in ("a", "c")]
    node, stored = helper.make_node("MatMul", ["a", "b"], ["c"], "product"), onnx.numpy_helper.from_array(weights, "b")
    graph = helper.make_graph([node], "smoke", values[:1], values[1:], [stored])
    opset = helper.make_opsetid("", onnxsource.OPSET)
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "source"), Path(folder, "made")
        source.mkdir()
        made.mkdir()
        onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), source / FILE)
        model = {"type": "ONNXModel", "model_path": str(source), "onnx_file_name": FILE}
        answer = olive_process.run(Path(folder), model, [{"type": "OnnxDynamicQuantization", "precision": "int8"}])
        olive_process.take(answer, made)
        session, feed = open(made), {"a": weights[:1]}
        exact, found = weights[:1] @ weights, session.infer(feed)["c"]
    if not np.linalg.norm(found - exact) < 0.1 * np.linalg.norm(exact):
        raise StepFailed("what Olive quantized computes wrongly on this machine; install another version of onnxruntime")
    return f"olive-ai {importlib.metadata.version('olive-ai')}, {session.runtime}"
