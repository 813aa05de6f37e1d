"""The kind `container`: what an image of a model's server is built from, without a network; served by KServe or llama.cpp, behind Envoy."""

import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from email.parser import BytesHeaderParser
from pathlib import Path
from typing import Any

from edgebuild import bundle, digest
from edgebuild.bundle import Copies, Making, Payload, Proof, Proving
from edgebuild.bundles import compose, dockerfile, image
from edgebuild.errors import StepFailed, WrongFact
from edgebuild.render import Token

CODE: Sequence[str] = (
    "bundles.container",
    "bundles.compose",
    "bundles.dockerfile",
    "bundles.image",
    "bundles.running",
    "document",
    "matrix",
)
# Beside the bundle a container as it is built, its layer as it is copied, and the image: by how buildah keeps images with overlay.
# `room`: of base and wheels, unpacked as often; measured on an image of ONNX Runtime, whose model is small.
COPIES = Copies(scratch=3, room=2_500_000_000)
TOOLS: Mapping[str, str] = {
    "bwrap": "bubblewrap",
    "buildah": "buildah",
    "mmdebstrap": "mmdebstrap",
    "runc": "runc",
}
LOCKS: Mapping[str, str] = {
    "llamacpp": "container-llamacpp",
    "onnxruntime": "container-onnxruntime",
    "openvino": "container-openvino",
}
REQUEST, ANSWER, REQUIREMENTS = "request.json", "answer.json", "requirements.txt"
CONTEXT = 2048  # tokens of a request and its answer
LAST_WORDS = 5  # of the golden prompt, after which an answer is looked for
BASE = re.compile(r"[a-z0-9][a-z0-9._/:-]{0,200}@sha256:[0-9a-f]{64}")
# The protocol's names for numpy's types (kserve/open-inference-protocol, "Tensor Data Types").
TYPES = {
    **{f"{sign}int{bits}": f"{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "bool": "BOOL",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
}


def refuse(framework: str, task: str) -> str:
    if framework not in LOCKS:
        known = ", ".join(sorted(LOCKS))
        return f"its server runs models of {known}, but the framework is {framework}; name one of them, or package.kind: folder"
    if framework != "llamacpp" and task == "text-generation":
        return "a language model is served by llama.cpp; name framework: llamacpp, or package.kind: folder"
    return ""


def stated(device: Mapping[str, Any]) -> Mapping[str, Any]:
    """`base`: the platform's image, by its digest, or nothing."""
    base = str(device.get("base", ""))
    if base and not BASE.fullmatch(base):
        raise WrongFact("base", f"{base!r} is no image by its digest, such as docker.io/library/python@sha256:…")
    return {"base": Token(base)}


def payload(model: Path, module: str) -> Payload:
    return Payload(files=bundle.lay(model, "model"), model="model", golden="golden.json")


def values(common: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        **stated(common["facts"]),
        "context": CONTEXT,
        "project": re.sub(r"[^a-z0-9_-]", "-", common["name"]),  # compose takes no dots
        "tag": common["version"].replace("+", "_"),  # nor a registry a plus
    }


def python() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


# -- what is made ---------------------------------------------------------------------------------------------------------
def make(making: Making) -> Mapping[str, bool]:
    """The wheels, the list that pip holds them against, and the golden example as a request."""
    if making.image is None:
        raise StepFailed("no wheels were given to make an image of; this is a fault of edgebuild")
    wheels = sorted(making.image.wheels.glob("*.whl"), key=lambda path: path.name)
    if not wheels:
        raise StepFailed(f"the folder of wheels {making.image.wheels} is empty; remove it, and build again")
    (making.out / "wheels").mkdir()
    (making.out / "wheels").chmod(0o755)
    made = {f"wheels/{path.name}": path for path in wheels}
    for place, path in made.items():
        shutil.copyfile(path, making.out / place)
    texts = {REQUIREMENTS: "".join(_requirements(wheels)), **_requests(making)}
    for place, text in texts.items():
        (making.out / place).write_text(text, encoding="utf-8")
    return dict.fromkeys((*made, *texts), False)


def _requirements(wheels: Sequence[Path]) -> Iterator[str]:
    """pip's format: every wheel by its digest, below the licence that it states."""
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    for path in wheels:
        try:
            name, version, _, _ = parse_wheel_filename(path.name)
            yield f"# {_licence(path)}\n{name}=={version} --hash=sha256:{digest.of_file(str(path))}\n"
        except (InvalidWheelFilename, OSError, zipfile.BadZipFile, StopIteration) as error:
            raise StepFailed(f"{path.name} is no wheel ({error}); remove {path.parent}, and build again") from error


def _licence(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as opened:
        place = next(name for name in opened.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        found = BytesHeaderParser().parsebytes(opened.read(place))
    classified = [line.rpartition(":: ")[2] for line in found.get_all("Classifier", ()) if line.startswith("License ::")]
    stated = found["License-Expression"] or "; ".join(classified) or str(found["License"] or "").strip().partition("\n")[0]
    return f"{' '.join(stated.split())[:100] or 'not stated'}, see {place.removesuffix('METADATA')} in the wheel"


def _requests(making: Making) -> dict[str, str]:
    if "prompt" in making.example:
        request, answer = _completion(making.out / making.payload.model, making.example)
        return {REQUEST: _line(request), ANSWER: _line(answer)}
    inputs = []
    for one in making.example["inputs"]:
        if one["dtype"] not in TYPES or one["dtype"] == "float16":  # which the protocol's JSON does not carry
            raise StepFailed(
                f"its input {one['name']} is {one['dtype']}, which no request in JSON holds; name package.kind: folder"
            )
        inputs.append({"name": one["name"], "datatype": TYPES[one["dtype"]], "shape": one["shape"], "data": one["data"]})
    return {REQUEST: _line({"inputs": inputs})}


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def _completion(model: Path, example: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The golden prompt as text, and what llama.cpp says to it, as far as the first token is clear of the second.

    The server turns text into tokens by itself, where the golden example has tokens: so the prompt ends with a word, with the one
    of its last whose answer is clear for longest.
    """
    import llama_cpp

    from edgebuild import golden

    llama = llama_cpp.Llama(str(model / "model.gguf"), n_ctx=CONTEXT, n_threads=1, n_threads_batch=1, verbose=False)
    text = llama.detokenize(example["prompt"]).decode("utf-8", "ignore").strip()
    best: tuple[str, list[int]] = ("", [])
    for _ in range(LAST_WORDS):
        text = text.rpartition(" ")[0] or text
        said = _said(llama, text, example)
        best = max(best, (text, said), key=lambda one: len(one[1]))
        if len(said) >= golden.ENOUGH:
            break
    prompt, said = best
    answer = llama.detokenize(said, prev_tokens=example["prompt"]).decode("utf-8", "ignore")
    llama.close()
    if not said:
        raise StepFailed(
            "no clear token answers its golden prompt, so that no request can be held against it; name package.kind: folder"
        )
    return {"prompt": prompt, "max_tokens": len(said), "temperature": 0}, {"text": answer}


def _said(llama: Any, text: str, example: Mapping[str, Any]) -> list[int]:
    """The likeliest tokens after a text, up to the first that another one comes near, or that ends it."""
    import numpy as np

    tolerance, said = example["tolerance"], list[int]()
    llama.reset()
    llama.eval(llama.tokenize(text.encode(), add_bos=llama._model.add_bos_token(), special=True))
    while len(said) < len(example["continuation"]):
        logits = np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(llama.n_vocab(),))
        second, first = np.sort(logits)[-2:]
        token = int(logits.argmax())
        if first - second <= tolerance["absolute"] + tolerance["relative"] * abs(first) or token == llama.token_eos():
            break
        said.append(token)
        llama.eval([token])
    return said


def assemble(making: Making) -> Mapping[str, bool]:
    return {}


# -- how far it is proven -------------------------------------------------------------------------------------------------
def verify(out: Path) -> Mapping[str, str]:
    """Dockerfile and compose file held against what this kind promises of them; by hadolint too, where that is installed."""
    dockerfile.check(out)
    compose.check(out)
    return {"own checks of Dockerfile and compose file": "1", **dockerfile.lint(out)}


def consume(proving: Proving) -> Proof:
    """L4: built without a network, run without a network, as another user and with a read-only root, it answers as the example says."""
    base = proving.image.base if proving.image else None
    if reason := _why_not(proving, base):
        return Proof(level="L2", tools=proving.tools, why_not_higher=reason)
    assert base is not None
    runtime = proving.runs()
    built = image.build(proving.out, base, proving.scratch)
    image.run(proving.out, built, proving.scratch, [[sys.executable, "-I", "-B", str(proving.out / "selftest.py")]])
    return Proof(level="L4", tools={**proving.tools, **image.versions(), "runtime": runtime})


def _why_not(proving: Proving, base: Path | None) -> str:
    missing = [name for name in ("bwrap", "buildah", "runc") if not shutil.which(name)]
    if missing:
        return f"{', '.join(missing)} not installed: run what edgebuild doctor --apt prints, and build again"
    if sys.platform != "linux" or os.geteuid() != 0:
        return "images are built and run as root alone: build again as root"
    if base is None:
        name, reason = proving.values["name"], proving.image.no_base if proving.image else "none was given"
        return f"no base image to try it on ({reason}): mend that, then doit again=package:{name} build:{name}"
    if python() != image.BASE_PYTHON:
        return f"its wheels are for Python {python()}, and the base image that it would be tried on has {image.BASE_PYTHON}"
    if reason := image.no_sandbox(proving.scratch):
        return f"no sandbox can be made here, as in a container without privileges ({reason}): build again where root may mount"
    return ""
