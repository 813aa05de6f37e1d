"""Images of example models, really built by buildah and run by runc: `pytest -m platform`. As root, minutes each, wheels from the index once.

The language model's runs in the toolchain of llama.cpp, with EDGEBUILD_LLAMACPP=1; EDGEBUILD_LLAMACPP_WHEEL: one that is compiled already.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from edgebuild import baseimage, bundle, environment, toolchain
from edgebuild.backend import Backend
from edgebuild.backends import BACKENDS
from edgebuild.bundles import BUNDLES, container, image
from edgebuild.errors import StepFailed
from edgebuild.install import install
from edgebuild.process import Workers
from edgebuild.step import Action, Image
from tests.bundles.packing import report, self_tested, templates
from tests.conftest import ROOT
from tests.journeys.test_examples import BIN, copy_project, outcomes

pytestmark = pytest.mark.platform

CACHE = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # the user's: before a test has one of its own
CALLERS = Path(__file__).with_name("callers.py")
LOAD = os.environ.get("EDGEBUILD_LOAD", "60")  # seconds
PATHS = {"onnxruntime": "/v2/models/small/infer", "openvino": "/v2/models/small/infer", "llamacpp": "/v1/completions"}


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    missing = [name for name in container.TOOLS if not shutil.which(name)]
    if missing or os.geteuid() != 0:
        reason = f"not installed: {', '.join(missing)}" if missing else "not run as root"
        if "CI" in os.environ:
            pytest.fail(f"CI is set, and images can be neither built nor run: {reason}: edgebuild doctor --apt")
        pytest.skip(f"no image is built: {reason}: edgebuild doctor --apt")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Image]:
    """What an image of a framework's is made of, from the user's cache, or put there."""

    def take(framework: str) -> Image:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", CACHE)
            base = Path(environment.base(baseimage.make(Workers().command, print).digest))
            lock = toolchain.read(container.LOCKS[framework])
            assert lock is not None
            if framework == "llamacpp" and (compiled := os.environ.get("EDGEBUILD_LLAMACPP_WHEEL")):
                return Image(wheels=_beside(Path(compiled), Path(lock.path), tmp_path_factory.mktemp("wheels")), base=base)
            install(lock, Workers().command, print)
            return Image(wheels=Path(environment.wheels(lock.digest)), base=base)

    return take


def _beside(compiled: Path, lock: Path, folder: Path) -> Path:
    """The lock's wheels, that one in the place of llama.cpp's."""
    others = re.sub(r"(?m)^llama-cpp-python==.*\n(?:    --hash.*\n)+", "", lock.read_text())
    (folder / "lock.txt").write_text(others)
    words = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes", "-d", str(folder)]
    subprocess.run([*words, "-r", str(folder / "lock.txt")], check=True)
    shutil.copy(compiled, folder)
    return folder


def packed(framework: str, model: Path, made_of: Image, out: Path, level: str = "L4") -> Path:
    """The package step of this model, with all that it proves."""
    out.mkdir()
    task = "text-generation" if framework == "llamacpp" else "image-classification"
    params = {
        "name": "small",
        "description": "",
        "version": "1.0.0",
        "task": task,
        "scheme": "none",
        "kind": "container",
        "platform": {"name": "generic-cpu", "description": "", "facts": {}},
        "limits": {"shell": None, "weights": None},
        "require_level": level,
    }
    outputs = {name: out / name for name in ("bundle", "report")}
    inputs: Mapping[str, Path] = {"model": model, **templates("container")}
    action = Action(verb="package", backend=framework, params=params, inputs=inputs, outputs=outputs, image=made_of)
    backend: Backend = BACKENDS[framework]
    bundle.run(action, framework, backend, BUNDLES["container"])
    return outputs["bundle"]


def digits(framework: str, folder: Path) -> Path:
    folder.mkdir()
    source = ROOT / "targets/models/digits.onnx"
    if framework == "onnxruntime":
        shutil.copy(source, folder / "model.onnx")
    else:
        import openvino

        openvino.save_model(openvino.convert_model(source), folder / "model.xml", compress_to_fp16=False)
    return folder


def tiny_phi3(folder: Path) -> Path:
    from edgebuild.backends import llamacpp

    folder.mkdir()
    llamacpp._run_converter(ROOT / "targets/models/tiny-phi3", folder / "model.gguf", "bf16")
    return folder


@pytest.mark.parametrize("framework", ["onnxruntime", "openvino", "llamacpp"])
def test_an_image_answers_as_the_reference_and_bears_its_callers(
    framework: str, given: Callable[[str], Image], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Proven to L4, built a second time to the same digest, then asked well and badly, beyond its limits and for a minute."""
    if framework == "llamacpp" and "EDGEBUILD_LLAMACPP" not in os.environ:
        pytest.skip("llama.cpp's toolchain: EDGEBUILD_LLAMACPP=1")
    if framework != "llamacpp":
        pytest.importorskip(framework)
    model = tiny_phi3(tmp_path / "model") if framework == "llamacpp" else digits(framework, tmp_path / "model")
    made_of = given(framework)
    assert made_of.base is not None
    folder = packed(framework, model, made_of, tmp_path / "out")
    assert set(report(folder)["tools"]) >= {"buildah", "runc", "runtime"}
    digests = []
    for name in ("first", "second"):
        scratch = tmp_path / name
        scratch.mkdir()
        digests.append(image.build(folder, made_of.base, scratch))
    assert digests[0] == digests[1]
    (limit,) = re.findall(r"max_request_bytes: (\d+)", (folder / "app/envoy.yaml").read_text())
    request = [sys.executable, "-I", "-B", str(CALLERS), LOAD, limit, str(folder / "request.json"), PATHS[framework]]
    asked = [sys.executable, "-I", "-B", str(folder / "selftest.py")]
    seen = image.run(folder, digests[1], tmp_path / "second", [request, asked], read=[CALLERS.parent])
    assert seen["uid"] >= 10000
    assert self_tested(seen["said"][1].splitlines()[-1])["verdict"] == "PASS"
    found: dict[str, Any] = {"digest": digests[0], **seen, "said": json.loads(seen["said"][0])}
    with capsys.disabled():
        print(f"\n{framework}: {json.dumps(found)}")


def test_doit_brings_what_an_image_takes(given: Callable[[str], Image], tmp_path: Path) -> None:
    """The example target as a user builds it: wheels and base come from outside the worker, which has no network."""
    given("onnxruntime")
    folder = copy_project(tmp_path / "project", "container-digits")
    around = {**os.environ, "XDG_CACHE_HOME": CACHE, "EDGEBUILD_OFFLINE": ""}
    words = [str(BIN / "doit"), "build:container-digits"]
    for outcome in ("ran", "fresh"):
        done = subprocess.run(words, cwd=folder, env=around, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stdout + done.stderr
        assert outcomes(folder)["package:container-digits"] == outcome
    evidence = json.loads((folder / "dist" / "container-digits.evidence.json").read_text())
    assert evidence["bundle"]["level"] == "L4"
    assert set(evidence["bundle"]["tools"]) >= {"buildah", "runc", "runtime"}


def test_an_image_that_answers_otherwise_is_refused(given: Callable[[str], Image], tmp_path: Path) -> None:
    """Other weights than its golden example is of: it builds, runs, answers, and is not proven."""
    import onnx
    from onnx import numpy_helper

    made_of = given("onnxruntime")
    assert made_of.base is not None
    unproven = Image(wheels=made_of.wheels, base=None)
    folder = packed("onnxruntime", digits("onnxruntime", tmp_path / "model"), unproven, tmp_path / "out", level="L2")
    model = onnx.load(folder / "model/model.onnx")
    weights = next(one for one in reversed(model.graph.initializer) if one.data_type == onnx.TensorProto.FLOAT)
    weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights) * 2, weights.name))
    onnx.save(model, folder / "model/model.onnx")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    asked = [sys.executable, "-I", "-B", str(folder / "selftest.py")]
    with pytest.raises(StepFailed, match=r'does not do what it should: .*"verdict": "FAIL"'):
        image.run(folder, image.build(folder, made_of.base, scratch), scratch, [asked])
