"""Small artifacts and backends of known answers, to pack bundles from without a framework; and how a bundle looks as text."""

import atexit
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from numpy.typing import NDArray

from edgebuild import bundle, signing
from edgebuild.backend import Backend, Needs, Session
from edgebuild.bundles import BUNDLES, PARTICULAR, SIGNED, apk, firmware_linux, programs
from edgebuild.step import Action, Image, Outcome
from tests.wheels import wheel

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "templates"
GOLDEN = Path(__file__).parent / "golden"
FACTS: Mapping[str, Mapping[str, Any]] = {
    "android": {"min_sdk": 26},
    "ios": {"ios": "17.0", "macos": "14.0", "swift_tools": "6.2"},
    "onnx": {"onnxruntime_web": "1.20"},
    "folder": {},
    "container": {},
    "firmware": {},
}
FRAMEWORK = {
    "android": "llamacpp",
    "container": "onnxruntime",
    "firmware": "fake",
    "folder": "fake",
    "ios": "mlx",
    "onnx": "onnxruntime",
}
WEIGHTS = (".onnx", ".ort", ".safetensors", ".gguf", ".apk", ".whl")  # what is no text
LANGUAGE = ("android", "ios")  # kinds whose small model is a language model
# What differs by the tools' versions and the test key, or is another project's: whole files, and places in some.
LEFT_OUT = (*WEIGHTS, ".swu", ".raucb", ".bin", ".pem", "src/model.c", "src/emlearn/")
BLANKED = {"swupdate/sw-description": r'(?<=sha256 = ")\w+', "README.md": r"(?<=\| )[\d.]+ (?:k?B|KiB at most)(?= \|)"}


class Doubling:
    """y = 2 · x, which is exact everywhere."""

    runtime = "doubling 1"
    inputs: Sequence[Mapping[str, Any]] = ({"name": "x", "dtype": "float32", "shape": ["N", 4]},)

    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        return {"y": 2 * feeds["x"]}

    def logits(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        raise NotImplementedError

    def tokens(self, text: str) -> NDArray[np.int32]:
        raise NotImplementedError

    def close(self) -> None: ...


class Counting(Doubling):
    """A language model of 64 tokens that always says the next number, with logits that leave no doubt."""

    runtime = "counting 1"
    inputs = ()
    step = 1

    def logits(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        logits = np.zeros((len(tokens), 64), np.float32)
        logits[np.arange(len(tokens)), (tokens + self.step) % 64] = 8
        return logits

    def tokens(self, text: str) -> NDArray[np.int32]:
        return (np.arange(80) % 64).astype(np.int32)


class Stub:
    """A backend whose artifacts all open as one session."""

    NEEDS: Mapping[str, Needs] = {}
    SCHEMES: Mapping[str, Sequence[str]] = {}
    VIEWS: Mapping[str, str] = {"native": "as it is"}

    def __init__(self, session: Session) -> None:
        self.session = session
        self.opened: list[Path] = []

    def open(self, model: Path, view: str = "") -> Session:
        assert model.exists()
        self.opened.append(model)
        return self.session

    def parameters(self, scheme: str, quantize: Mapping[str, Any], calibrated: bool) -> Mapping[str, Any]:
        return {}

    def refuse(self, facts: Any, parameters: Mapping[str, Any]) -> str:
        return ""

    def convert(self, action: Action, facts: Any) -> Outcome:
        raise NotImplementedError

    quantize = convert


def backend(kind: str) -> Backend:
    if kind == "onnx":
        from edgebuild.backends import onnxruntime

        return onnxruntime
    return Stub(Counting() if kind in LANGUAGE else Doubling())


def artifact(kind: str, folder: Path) -> Path:
    """A small model of this kind."""
    folder.mkdir(parents=True)
    if kind == "onnx":
        adding_model(folder / "model.onnx")
    elif kind == "ios":
        (folder / "config.json").write_text('{"model_type": "counting"}\n')
        (folder / "model.safetensors").write_bytes(bytes(range(64)))
        (folder / "tokenizer.json").write_text("{}\n")
    elif kind == "android":
        (folder / "model.gguf").write_bytes(b"GGUF" + bytes(range(256)) * 32)  # as compressible as it can be
    else:
        (folder / "payload.json").write_text("{}\n")
    return folder


def adding_model(path: Path, name: str = "x") -> None:
    """y = x + 1 as ONNX: exact in every runtime."""
    import onnx
    from onnx import TensorProto, helper

    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    graph = helper.make_graph(
        [helper.make_node("Add", [name, "one"], ["y"])],
        "adding",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        [one],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def templates(kind: str) -> dict[str, Path]:
    return {f"template/{path.relative_to(TEMPLATES / kind).as_posix()}": path for path in files(TEMPLATES / kind)}


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def action(kind: str, model: Path, out: Path, inputs: Mapping[str, Path] | None = None, **changes: Any) -> Action:
    """The package step of a small target; `changes` replace parameters. Skipped where a tool of its kind is missing, failed in CI."""
    require(MADE_WITH.get(kind, {}))
    out.mkdir(parents=True)
    params = {
        "name": f"small-{kind}",
        "description": "A small model",
        "version": "1.2.3",
        "task": "text-generation" if kind in LANGUAGE else "image-classification",
        "scheme": "int4",
        "kind": kind,
        "platform": {"name": "device", "description": "Some device", "facts": FACTS[kind]},
        "limits": {"shell": 50_000_000, "weights": 2_500_000_000},
    }
    outputs = {name: out / name for name in ("bundle", "archive", "report")}
    read = {"model": model, **templates(kind), **(inputs or {})}
    given: dict[str, Any] = {"params": {**params, **changes}, "inputs": read, "outputs": outputs}
    given["key"] = own_pair(SIGNED[kind].signs(given["params"]["platform"]["facts"])) if kind in SIGNED else None
    if kind == "container":
        given["image"] = Image(wheels=wheels(out / "wheels"), base=None, no_base="none in a test")
    return Action(verb="package", backend=FRAMEWORK[kind], **given)


def wheels(folder: Path) -> Path:
    """Two that hold nothing, the same bytes each time."""
    folder.mkdir()
    for name in ("first", "second"):
        file, content = wheel(name, "1.0", {})
        (folder / file).write_bytes(content)
    return folder


@cache
def keys() -> str:
    """A cache of users' keys for this process, apart from the user's, whatever a test or a fixture has as its cache."""
    folder = tempfile.mkdtemp(prefix="edgebuild-tests-key-")
    atexit.register(shutil.rmtree, folder)
    return folder


def own_pair(takes: signing.Takes = firmware_linux.TAKES) -> signing.Pair:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", keys())
        return signing.users_pair(takes)


# Programs → Debian's packages.
MADE_WITH: Mapping[str, Mapping[str, str]] = {"android": apk.TOOLS, "firmware": firmware_linux.TOOLS}


def require(tools: Mapping[str, str]) -> None:
    """Skip the test where programs are missing; fail it where CI says that they are there."""
    if lacking := programs.absent(tools):
        if "CI" in os.environ:
            pytest.fail(f"CI is set, so all must be there: {programs.missing(lacking, tools)}")
        pytest.skip(programs.missing(lacking, tools))


def pack(kind: str, place: Path, with_backend: Backend | None = None, **changes: Any) -> Path:
    """Pack a small bundle below `place`; → its folder. The report lies beside it."""
    model = place / "artifact"
    made = action(kind, model if model.exists() else artifact(kind, model), place / "out", **changes)
    bundle.run(made, FRAMEWORK[kind], with_backend or backend(kind), BUNDLES[kind])
    return made.outputs["bundle"]


def report(packed: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((packed.parent / "report").read_text())
    return content


def self_tested(line: str) -> dict[str, Any]:
    """What a self-test printed last, held against its schema."""
    found: dict[str, Any] = json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    jsonschema.validate(found, json.loads((ROOT / "schemas" / "selftest.json").read_text()))
    return found


def as_text(folder: Path) -> dict[str, str]:
    """A bundle's text files by path; in its manifest the instruction set, and what is left out or blanked here, are blanked."""
    found, blank = {}, set()
    signed = json.loads((folder / bundle.MANIFEST).read_text())["kind"] in PARTICULAR
    for path in files(folder):
        place = path.relative_to(folder).as_posix()
        if place.endswith(LEFT_OUT) or "src/emlearn/" in place:
            blank.add(place)
            continue
        text = path.read_bytes().decode()
        if signed and place in BLANKED:
            text = re.sub(BLANKED[place], "BLANK", text)
            blank.add(place)
        found[place] = text
    text = re.sub(r'"isa": "[^"]*"', '"isa": "ISA"', found[bundle.MANIFEST])
    places = "|".join(map(re.escape, blank))
    entry = rf'("path": "(?:{places})", "sha256": )"[^"]*", "size": \d+'
    return {**found, bundle.MANIFEST: re.sub(entry, r'\1"SHA256", "size": 0', text)}


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
