"""The `assess` step: what a model is, from its headers; no weight is loaded and no framework imported."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from edgebuild import formats, positions
from edgebuild.backend import ModelFacts
from edgebuild.errors import StepFailed, shown
from edgebuild.formats import gguf, onnx, safetensors
from edgebuild.step import Action, Outcome

MAX_CONFIG = 10_000_000  # bytes
TOKENIZERS = ("model/tokenizer.json", "model/tokenizer.model")
CARD, LICENCE = 65_536, 4_096  # bytes of a model card and of a licence that are looked at
_QUANTIZERS = {"QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "MatMulInteger", "ConvInteger"}


def run(action: Action) -> Outcome:
    """Output `facts`: ModelFacts as JSON. Raises StepFailed where a header is wrong."""
    facts = assess(action.inputs)
    action.outputs["facts"].write_text(json.dumps(facts.to_json(), indent=1, sort_keys=True), encoding="utf-8")
    total = sum(facts.parameters.values())
    kinds = ", ".join(sorted(kind for kind, count in facts.parameters.items() if count > total / 100))
    counted = f"{total:,} parameters ({kinds})" if total else "no parameters"
    return Outcome(summary=f"{facts.architecture}, {counted}")


def assess(files: Mapping[str, Path]) -> ModelFacts:
    """ModelFacts of a source, by role as `source.files` gives them. Raises StepFailed."""
    if "model" not in files:
        return _huggingface(files)
    path = files["model"]
    kind = formats.detect(str(path))
    try:
        if kind == "onnx":
            return _onnx(path, sum(other.stat().st_size for other in files.values()))
        if kind == "gguf":
            return _gguf(path)
        if kind == "safetensors":
            header = safetensors.read(str(path))
            return ModelFacts(format=kind, bytes=path.stat().st_size, **_counted(header.tensors.values()))
    except ValueError as error:
        raise StepFailed(f"{path.name}: {error}") from error
    raise StepFailed(f"{path.name} is no model: its content looks like {kind}")


def _onnx(path: Path, total: int) -> ModelFacts:
    header = onnx.read(str(path))
    quantized = sorted(_QUANTIZERS & set(header.operators))
    return ModelFacts(
        format="onnx",
        architecture=", ".join(f"{shown(name)}×{count}" for name, count in header.operators.most_common(4)),
        parameters=dict(sorted(header.parameters.items())),
        bytes=total,
        opsets=header.opsets,
        operators=dict(sorted(header.operators.items())),
        inputs=[{"name": one.name, "dtype": one.dtype, "shape": list(one.shape)} for one in header.inputs],
        outputs=[{"name": one.name, "dtype": one.dtype, "shape": list(one.shape)} for one in header.outputs],
        quantized=", ".join(quantized),
        weights=dict(sorted(header.weights.items())),
        largest=max(header.sizes.values(), default=0),
    )


def _gguf(path: Path) -> ModelFacts:
    """Keys by docs/gguf.md, "Standardized key-value pairs". Raises ValueError."""
    header = gguf.read(str(path))
    architecture = header.values.get("general.architecture", "")
    parts = header.values.get("split.count", 1)
    if type(parts) is int and parts > 1:
        raise ValueError(f"it is one of {parts} parts of a model; merge them first: llama-gguf-split --merge")

    def number(key: str) -> int | None:
        return _number(header.values, f"{architecture}.{key}")

    return ModelFacts(
        format="gguf",
        architecture=shown(str(architecture)) or "unknown",
        model_type=shown(str(architecture)),
        bytes=path.stat().st_size,
        layers=number("block_count"),
        heads=number("attention.head_count"),
        context=number("context_length"),
        hidden=number("embedding_length"),
        vocabulary=header.lengths.get("tokenizer.ggml.tokens", number("vocab_size")),
        experts=number("expert_count"),
        tied_embeddings="output.weight" not in header.tensors if "token_embd.weight" in header.tensors else None,
        quantized=", ".join(header.quantized),
        licence=shown(str(header.values.get("general.license", ""))),
        **_counted(header.tensors.values()),
    )


def _huggingface(files: Mapping[str, Path]) -> ModelFacts:
    config = read_config(files["model/config.json"])
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    total = 0
    for role, path in sorted(files.items()):
        if formats.detect(str(path)) != "safetensors" or not _is_weights(role):
            continue
        try:
            tensors |= safetensors.read(str(path)).tensors
        except ValueError as error:
            raise StepFailed(f"{path.name}: {error}") from error
        total += path.stat().st_size
    if not tensors:
        raise StepFailed("the folder's *.safetensors hold no tensors; copy or download them again")
    architectures = config.get("architectures")
    inner = config.get("text_config")
    shape = {**inner, **config} if isinstance(inner, dict) else config  # of a model that sees or hears: its language part
    return ModelFacts(
        format="huggingface",
        architecture=shown(str(architectures[0])) if isinstance(architectures, list) and architectures else "unknown",
        model_type=shown(str(config.get("model_type", ""))),
        custom_code="auto_map" in config,
        bytes=total,
        layers=_number(shape, "num_hidden_layers"),
        heads=_number(shape, "num_attention_heads"),
        context=_number(shape, "max_position_embeddings"),
        hidden=_number(shape, "hidden_size"),
        vocabulary=_number(shape, "vocab_size"),
        experts=_number(shape, "num_local_experts") or _number(shape, "num_experts"),
        tied_embeddings=bool(config["tie_word_embeddings"]) if "tie_word_embeddings" in config else None,
        scaled=positions.of_config(shape),
        quantized=_quantized(config, tensors),
        tokenizer=next((files[role].stat().st_size for role in TOKENIZERS if role in files), 0),
        licence=_licence(files),
        **_counted(tensors.values()),
    )


def _quantized(config: Mapping[str, Any], tensors: Iterable[str]) -> str:
    """By its configuration, else by the names that GPTQ and AWQ give to packed weights, of which older tools wrote no more than those."""
    quantization = config.get("quantization_config") or config.get("quantization")
    if isinstance(quantization, dict):
        return shown(str(quantization.get("quant_method", "yes")))
    return "packed, as .qweight says" if any(name.endswith(".qweight") for name in tensors) else ""


def _counted(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    """`parameters`, `weights` and `largest` of ModelFacts, from (dtype, shape) of every tensor."""
    parameters: Counter[str] = Counter()
    matrices = largest = 0
    for dtype, shape in tensors:
        count = prod(shape)
        parameters[dtype] += count
        matrices += count if len(shape) > 1 else 0
        largest = max(largest, count)
    return {"parameters": dict(sorted(parameters.items())), "weights": {"": matrices}, "largest": largest}


def _licence(files: Mapping[str, Path]) -> str:
    """What the model card's front matter says (huggingface.co/docs/hub/model-cards), else how the licence file begins."""
    if card := files.get("model/README.md"):
        with card.open("rb") as file:
            text = file.read(CARD).decode("utf-8", "replace")
        head = text.split("\n---", 1)[0] if text.startswith("---") else ""
        if found := re.search(r"^license:[ \t]*([\w.+-]+)[ \t\r]*$", head, re.MULTILINE | re.ASCII):
            return found[1][:100]
    for role, path in sorted(files.items()):
        if role.count("/") == 1 and role.rsplit("/", 1)[-1].lower().split(".")[0] in ("license", "licence", "copying"):
            with path.open("rb") as file:
                lines = file.read(LICENCE).decode("utf-8", "replace").splitlines()
            return shown(next((line.strip() for line in lines if line.strip()), ""))
    return ""


def read_config(path: Path) -> dict[str, Any]:
    """A Hugging Face config.json. Raises StepFailed where it is too large, no JSON or no map."""
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise StepFailed(f"config.json is larger than {MAX_CONFIG:,} bytes; that is no model's configuration")
        config = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise StepFailed(f"config.json is not UTF-8 text (byte {error.start}); copy or download it again") from error
    except (ValueError, RecursionError) as error:
        raise StepFailed(f"config.json is no valid JSON ({str(error)[:80]}); copy or download it again") from error
    if not isinstance(config, dict):
        raise StepFailed("config.json holds no map of keys; copy or download it again")
    return config


def _is_weights(role: str) -> bool:
    name = role.rsplit("/", 1)[-1]
    return name.startswith(("model", "weights", "pytorch_model", "consolidated"))


def _number(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
