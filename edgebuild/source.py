"""Where a model comes from, and the `fetch` step: which files it has, of what format, and which are refused."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from edgebuild import formats
from edgebuild.errors import StepFailed
from edgebuild.formats import onnx
from edgebuild.step import Action, Outcome

MAX_FILES = 20_000
SKIPPED = (".py", ".pyc")  # model code is never run: it is no part of the source


def files(root: str, source: str) -> dict[str, str]:
    """role → path of every file that the source is made of: `model` for a file, `model/NAME` in a folder.

    ONNX external data are files of the model: role `model.data/NAME`. Hidden files and Python code are left out.
    Raises ValueError with one sentence where the source is missing or cannot be listed.
    """
    whole = os.path.join(root, source)
    if not os.path.exists(whole):
        raise ValueError(f'there is no file or folder "{source}"; paths are relative to the project\'s root')
    if os.path.isdir(whole):
        return _folder(root, source)
    if not os.path.isfile(whole):
        raise ValueError(f'"{source}" is neither a file nor a folder')
    found = {"model": source}
    if onnx.looks_like(whole):
        folder = os.path.dirname(source)
        found |= {f"model.data/{name}": os.path.join(folder, name) for name in onnx.external_files(whole)}
    return found


def run(action: Action) -> Outcome:
    """`fetch`: list the source's files by content, refuse those that carry code. Output `source`: JSON.

    Raises StepFailed where the source cannot be built from.
    """
    listed, found = [], set()
    for role, path in sorted(action.inputs.items()):
        try:
            kind = formats.detect(str(path))
        except OSError as error:
            raise StepFailed(f"{path}: cannot be read: {error.strerror or error}") from error
        name = role.removeprefix("model/") if role != "model" else path.name
        if reason := refusal(name, kind, lone=role == "model"):
            raise StepFailed(reason)
        found.add(kind)
        listed.append({"path": name, "format": kind, "size": path.stat().st_size})
    layout = _layout(action.inputs, found)
    action.outputs["source"].write_text(json.dumps({"format": layout, "files": listed}, indent=1), encoding="utf-8")
    total = sum(int(str(entry["size"])) for entry in listed)
    return Outcome(summary=f"{len(listed)} file{'s' if len(listed) > 1 else ''}, {total:,} bytes, {layout}")


def _folder(root: str, source: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for folder, folders, names in os.walk(os.path.join(root, source)):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted(names):
            if name.startswith(".") or name.endswith(SKIPPED):
                continue
            inside = os.path.relpath(os.path.join(folder, name), os.path.join(root, source))
            found[f"model/{inside}"] = os.path.join(source, inside)
            if len(found) > MAX_FILES:
                raise ValueError(f'the folder "{source}" holds more than {MAX_FILES} files; give the model\'s own folder')
    if not found:
        raise ValueError(f'the folder "{source}" holds no files')
    return found


def refusal(name: str, kind: str, lone: bool) -> str:
    """Why a file of this kind is not built from, else empty. In a folder, files of kinds that do no harm are left alone."""
    if kind == "pickle":
        return f"{name} is a pickle (by its content, whatever its name): {formats.CONVERT_PICKLE}"
    if kind == "hdf5" and (lone or name.endswith((".h5", ".hdf5", ".keras"))):
        return f"{name} is HDF5 (Keras), which may carry code; export the model to ONNX (tf2onnx) and give that file"
    if kind == "empty" and (lone or name.endswith((".safetensors", ".onnx", ".gguf", ".json"))):
        return f"{name} is empty; copy or download it again"
    if lone and kind not in formats.READERS:
        return (
            f"{name} is of no known model format (its content looks like: {kind}); "
            "edgebuild takes ONNX and GGUF files and Hugging Face folders with config.json and *.safetensors"
        )
    return ""


def _layout(inputs: Mapping[str, Path], found: set[str]) -> str:
    """Raises StepFailed where a folder is no model."""
    if "model" in inputs:
        return formats.detect(str(inputs["model"]))
    if "model/config.json" in inputs and "safetensors" in found:
        index = inputs.get("model/model.safetensors.index.json")
        if index is not None:
            _check_shards(index, inputs)
        return "huggingface"
    models = [role for role, path in inputs.items() if formats.detect(str(path)) == "onnx"]
    if len(models) == 1:
        name = models[0].removeprefix("model/")
        raise StepFailed(f"the folder holds one ONNX model; give the file itself as model.source: …/{name}")
    missing = "config.json" if "model/config.json" not in inputs else "*.safetensors"
    raise StepFailed(
        f"the folder is no Hugging Face model: {missing} is missing; it needs config.json, *.safetensors and a tokenizer"
    )


def _check_shards(index: Path, inputs: Mapping[str, Path]) -> None:
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise StepFailed("model.safetensors.index.json is no valid index; copy or download it again") from error
    if missing := sorted(name for name in named if f"model/{name}" not in inputs):
        raise StepFailed(f"model.safetensors.index.json names {missing[0]}, which is not there; copy or download it again")
