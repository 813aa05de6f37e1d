"""Where a model comes from, and the `fetch` step: which files it has, of what format, and which are refused.

What lies on this machine is listed when the plan is made. What comes from elsewhere is a place that `fetch` fills, known
beforehand: a file of the store for https, links into the Hugging Face cache for hf.
"""

import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edgebuild import formats
from edgebuild.errors import StepFailed, shown
from edgebuild.formats import onnx
from edgebuild.step import SOURCES, Action, Outcome
from edgebuild.target import COMMIT, Source, parse_source

MAX_FILES = 20_000
SKIPPED = (".py", ".pyc")  # model code is never run: it is no part of the source
SUFFIXES = {".onnx": "onnx", ".gguf": "gguf"}  # what a lone file from elsewhere is, before its content is here


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A source as a plan needs it: role → path of its files, and their format.

    `fetch` is empty where they lie here already; else the parameters of the step that brings them, to `files["model"]` or
    `files["model/"]`, and `url` is where from.
    """

    files: Mapping[str, str]
    format: str
    fetch: Mapping[str, Any] = field(default_factory=dict)
    url: str = ""


def find(root: str, text: str, target: str, sha256: str) -> Found:
    """What `model.source` names, without asking any network. Raises ValueError with one sentence."""
    source = parse_source(text)
    if source.kind == "hf":
        return _repository(source)
    if source.kind == "https":
        kind = _by_suffix(urlsplit(source.path).path)
        return Found(
            files={"model": f"build/{target}/fetch/model"},
            format=kind,
            fetch={"sha256": sha256, "format": kind},
            url=source.path,
        )
    path = installed(source) if source.kind == "package" else source.path
    found = files(root, path)
    if "model" not in found:
        return Found(files=found, format="huggingface")
    kind = formats.detect(os.path.join(root, path))
    if reason := refusal(os.path.basename(path), kind, lone=True):
        raise ValueError(reason)
    return Found(files=found, format=kind)


def _repository(source: Source) -> Found:
    if not COMMIT.match(source.commit):
        from edgebuild import hub

        raise ValueError(
            f'"{shown(source.commit)}" is a branch, a tag or a short commit, which may move; give the whole commit: '
            f"{hub.commit_now(source.name, source.commit)}"
        )
    place = f"{SOURCES}/hf/{source.name}/{source.commit}"
    fetch = {"repository": source.name, "commit": source.commit}
    if not source.path:
        return Found(files={"model/": place}, format="huggingface", fetch={**fetch, "format": "huggingface"})
    kind = _by_suffix(source.path)
    return Found(
        files={"model": f"{place}.files/{source.path}"}, format=kind, fetch={**fetch, "path": source.path, "format": kind}
    )


def _by_suffix(path: str) -> str:
    kind = SUFFIXES.get(os.path.splitext(path)[1].lower())
    if kind is None:
        raise ValueError(
            f"a single file from elsewhere must be named .onnx or .gguf, so that its format is known before it is fetched, not "
            f'"{shown(os.path.basename(path))}"; a language model in safetensors is a folder: hf:ORG/REPO@COMMIT'
        )
    return kind


def installed(source: Source) -> str:
    """The path of a file or folder inside an installed distribution. Raises ValueError where there is none."""
    try:
        distribution = importlib.metadata.distribution(source.name)
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"no distribution {source.name} is installed here; run: pip install {source.name}") from error
    names = [str(file) for file in distribution.files or ()]
    if source.path not in names and not any(name.startswith(source.path + "/") for name in names):
        models = [name for name in names if os.path.splitext(name)[1] in (*SUFFIXES, ".safetensors")]
        holds = f"its models: {', '.join(models[:5])}" if models else "it holds no model that edgebuild reads"
        raise ValueError(f"the distribution {source.name} has no {source.path}; {holds}")
    return str(distribution.locate_file(source.path))


def files(root: str, source: str) -> dict[str, str]:
    """role → path of every file that the source is made of: `model` for a file, `model/NAME` in a folder.

    ONNX external data are files of the model: role `model.data/NAME`. Hidden files and Python code are left out.
    Raises ValueError with one sentence where the source is missing or cannot be listed.
    """
    whole = os.path.join(root, source)
    if not os.path.exists(whole):
        raise ValueError(f'there is no file or folder "{shown(source)}"; paths are relative to the project\'s root')
    if os.path.isdir(whole):
        return _folder(root, source)
    if not os.path.isfile(whole):
        raise ValueError(f'"{shown(source)}" is neither a file nor a folder')
    found = {"model": source}
    if onnx.looks_like(whole):
        folder = os.path.dirname(source)
        found |= {f"model.data/{name}": os.path.join(folder, name) for name in onnx.external_files(whole)}
    return found


def run(action: Action) -> Outcome:
    """`fetch`: list the source's files by content, refuse those that carry code. Output `source`: JSON.

    From elsewhere it brings them first: outputs `model`, and of a repository `licences`, a folder with copies.
    Raises StepFailed where the source cannot be had or cannot be built from.
    """
    inputs = _bring(action) if action.params else action.inputs
    listed, found = [], set()
    for role, path in sorted(inputs.items()):
        try:
            kind = formats.detect(str(path))
        except OSError as error:
            raise StepFailed(f"{path}: cannot be read: {error.strerror or error}") from error
        name = role.removeprefix("model/") if role != "model" else "the file" if action.params else path.name
        if reason := refusal(name, kind, lone=role == "model"):
            raise StepFailed(reason)
        found.add(kind)
        listed.append({"path": name, "format": kind, "size": path.stat().st_size})
    layout = _layout(inputs, found)
    if layout != action.params.get("format", layout):
        raise StepFailed(f"it is named as {action.params['format']}, but its content is {layout}; check model.source")
    action.outputs["source"].write_text(json.dumps({"format": layout, "files": listed}, indent=1), encoding="utf-8")
    total = sum(int(str(entry["size"])) for entry in listed)
    return Outcome(summary=f"{len(listed)} file{'s' if len(listed) > 1 else ''}, {total:,} bytes, {layout}")


def _bring(action: Action) -> dict[str, Path]:
    """Download; → role → path of what is here now."""
    params, out = action.params, action.outputs["model"]
    if action.download is None:
        raise StepFailed("this record says nothing of a download")
    if "repository" not in params:
        from edgebuild.download import download

        download(action.download, params["sha256"], out)
        return {"model": out}
    from edgebuild import hub

    hub.fetch(params["repository"], params["commit"], params.get("path", ""), action.download, out)
    if "path" in params:
        if params["format"] == "onnx" and onnx.external_files(str(out)):
            raise StepFailed("its weights lie in files of their own beside it, which edgebuild does not fetch; give a local copy")
        return {"model": out}
    licences = action.outputs["licences"]
    licences.mkdir()
    for file in sorted(out.iterdir()):
        if is_licence(file.name):
            shutil.copyfile(file, licences / file.name)
    return {f"model/{file.name}": file for file in sorted(out.iterdir())}


def is_licence(name: str) -> bool:
    return name.lower().split(".")[0] in ("license", "licence", "notice", "copying")


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
                raise ValueError(f'the folder "{shown(source)}" holds more than {MAX_FILES} files; give the model\'s own folder')
    if not found:
        raise ValueError(f'the folder "{shown(source)}" holds no files')
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
        named = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise StepFailed("model.safetensors.index.json is no valid index; copy or download it again") from error
    if missing := sorted(name for name in named if f"model/{name}" not in inputs):
        raise StepFailed(f"model.safetensors.index.json names {shown(missing[0])}, which is not there; copy or download it again")
