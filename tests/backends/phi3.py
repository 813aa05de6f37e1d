"""The example language model, and what tests of every backend that takes it do with it: copies, edits, comparisons."""

import importlib.util
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgebuild import reference

MODEL = Path(__file__).parents[2] / "targets/models/tiny-phi3"
TOKENS = np.arange(5, 21, dtype=np.int32)
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None and "EDGEBUILD_REFERENCE" not in os.environ,
    reason="needs the extra edgebuild[reference]; .ci/run has it in an environment of its own",
)
needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None and "EDGEBUILD_LLAMACPP" not in os.environ,
    reason="needs llama-cpp-python, which is compiled; .ci/run has it in an environment of its own",
)
needs_openvino_lm = pytest.mark.skipif(
    importlib.util.find_spec("openvino_genai") is None and "EDGEBUILD_OPENVINO_LM" not in os.environ,
    reason="needs optimum-intel, which shares no environment with mlx-lm; .ci/run has it in one of its own",
)
needs_olive = pytest.mark.skipif(
    importlib.util.find_spec("olive") is None and "EDGEBUILD_OLIVE" not in os.environ,
    reason="needs olive-ai, whose packages share no environment; .ci/run has it in one of its own",
)
needs_onnxruntime_lm = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_genai") is None and "EDGEBUILD_ONNXRUNTIME_LM" not in os.environ,
    reason="needs onnxruntime-genai's model builder, so torch; .ci/run has it in an environment of its own",
)


def copied(folder: Path, golden: bool = True) -> Path:
    shutil.copytree(MODEL, folder)
    if not golden:
        (folder / reference.GOLDEN).unlink()
    return folder


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def swap_first_tokens(tokenizer: dict[str, Any]) -> None:
    """In a tokenizer.json: the first two tokens of the golden text change places."""
    vocabulary = tokenizer["model"]["vocab"]
    tokens = golden(MODEL).tokens
    first, second = (next(word for word, index in vocabulary.items() if index == tokens[i]) for i in (0, 1))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def golden(folder: Path) -> reference.Golden:
    found = reference.golden(inputs(folder))
    assert found is not None
    return found


def inputs(folder: Path) -> dict[str, Path]:
    return {f"model/{path.name}": path for path in folder.iterdir()}


def edit_weights(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """As arrays of unsigned integers, whatever they stand for: they are moved and cut, and not reckoned with."""
    from safetensors import deserialize

    path = folder / "model.safetensors"
    stored = deserialize(path.read_bytes())
    assert {one["dtype"] for _, one in stored} == {"BF16"}
    weights = {name: np.frombuffer(one["data"], np.uint16).reshape(one["shape"]) for name, one in stored}
    change(weights)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, one in weights.items():
        header[name] = {"dtype": "BF16", "shape": one.shape, "data_offsets": [len(data), len(data) + one.nbytes]}
        data += one.tobytes()
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)


def narrow(folder: Path, width: int) -> Path:
    """The model with narrower feed-forward layers."""

    def cut(weights: dict[str, Any]) -> None:
        for name in [name for name in weights if ".mlp." in name]:
            weights[name] = weights[name][: 2 * width] if "gate_up" in name else weights[name][:, :width]

    edit(folder / "config.json", lambda config: config.update(intermediate_size=width))
    edit_weights(folder, cut)
    return folder


def divergence(exact: Any, other: Any) -> float:
    """Mean KL divergence in nats a token."""
    p, q = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)) for logits in (exact.astype(float), other.astype(float)))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return found


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) for path in folder.iterdir()}
