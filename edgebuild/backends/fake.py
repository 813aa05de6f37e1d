"""A backend without a framework, for tests of everything that is not about one: it works on small text payloads.

What it makes depends on everything that its keys hold (source, scheme, calibration, version), and on nothing else.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebuild.backend import Estimate, ModelFacts, Needs, Rung, Session
from edgebuild.errors import StepFailed
from edgebuild.step import Action, Outcome

if TYPE_CHECKING:
    from numpy.typing import NDArray

NEEDS: Mapping[str, Needs] = {"gguf": Needs(lock="fake", packages=("edgebuild-fake-framework",))}
SCHEMES: Mapping[str, Sequence[str]] = {"int8": ("group_size", "method"), "int4": ("group_size", "method")}
LADDER: Mapping[str, Rung] = {
    "coarse": Rung(sets={"noise": 0.5}),
    "recurrent": Rung(sets={"noise": 0.1}, operators=("LSTM",)),  # of which no model of this backend has one
    "fine": Rung(sets={"noise": 1e-3}),
}
VIEWS: Mapping[str, str] = {"native": "as stored"}


def parameters(scheme: str, quantize: Mapping[str, Any], calibrated: bool) -> Mapping[str, Any]:
    rung = LADDER.get(quantize.get("method", ""))
    return {"group_size": 32, **quantize, **(rung.sets if rung else {})}


def refuse(facts: ModelFacts, parameters: Mapping[str, Any]) -> str:
    return ""


def estimate(facts: ModelFacts, scheme: str, parameters: Mapping[str, Any], available: int) -> Estimate:
    """Its payload's text, which no scheme makes smaller, and the settings beside it."""
    artifact = facts.bytes - 24 + (50 if scheme == "none" else 105)
    return Estimate(artifact=artifact, making=10_000_000 + 3 * facts.bytes, running=40_000_000 + artifact)


def convert(action: Action, facts: ModelFacts) -> Outcome:
    """The payload behind the 24 bytes of a GGUF header, without its comments (so that equal bytes can come of an edit)."""
    text = action.inputs["model"].read_bytes()[24:].decode("utf-8", "replace").split("#")[0].strip()
    _misbehave(text, action)
    text += os.urandom(8).hex() if text == "!random" else ""
    _write(action, {"text": text, "version": _version(), "scheme": "none"})
    action.outputs["report"].write_text("{}", encoding="utf-8")
    return Outcome(summary=f"{len(text)} characters", kept={"model/source.gguf": "model"} if text.startswith("!kept") else {})


def hold(session: Session, source: Mapping[str, Path], facts: ModelFacts) -> dict[str, Any]:
    return {"verified": True, "against": []}


def quantize(action: Action, facts: ModelFacts) -> Outcome:
    payload = json.loads((action.inputs["model"] / "payload.json").read_text(encoding="utf-8"))
    calibration = action.inputs.get("calibration")
    seen = hashlib.sha256(calibration.read_bytes()).hexdigest() if calibration else ""
    if payload["text"] == f"!refuse-{action.params.get('method')}":
        print("what the framework prints", flush=True)
        raise StepFailed(f"the framework does not take this model with {action.params['method']}")
    settings = {key: action.params[key] for key in ("scheme", "group_size", "samples", "noise") if key in action.params}
    _write(action, {**payload, **settings, "calibration": seen, "version": _version()})
    action.outputs["report"].write_text("{}", encoding="utf-8")
    return Outcome(summary=str(action.params["scheme"]))


def smoke() -> str:
    return "nothing to start"


def open(model: Path, view: str = "") -> FakeSession:
    payload = json.loads((model / "payload.json").read_text(encoding="utf-8"))
    if payload["text"] == "!elsewhere-later" and payload["scheme"] != "none":
        _spill(model.parents[1] / "quantize")
    return FakeSession(payload)


class FakeSession:
    """A linear map whose weights come of the payload's text, and a little of how it was quantized."""

    runtime = "fake"
    inputs: Sequence[Mapping[str, Any]] = ({"name": "x", "dtype": "float32", "shape": ["N", 4]},)

    def __init__(self, payload: Mapping[str, Any]) -> None:
        import numpy as np

        base = np.random.default_rng(_seed(payload["text"])).standard_normal((4, 3))
        noise = np.random.default_rng(_seed(json.dumps(payload, sort_keys=True))).standard_normal((4, 3))
        self._weights = (base + (0 if payload["scheme"] == "none" else payload.get("noise", 1e-3)) * noise).astype("float32")

    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        return {"y": feeds["x"] @ self._weights}

    def logits(self, tokens: NDArray[Any]) -> NDArray[Any]:
        raise StepFailed("the fake backend runs no language model")

    def tokens(self, text: str) -> NDArray[Any]:
        raise StepFailed("the fake backend has no tokenizer")

    def close(self) -> None:
        pass


def _write(action: Action, payload: Mapping[str, Any]) -> None:
    action.outputs["model"].mkdir()
    (action.outputs["model"] / "payload.json").write_text(json.dumps(payload, sort_keys=True), encoding="utf-8")


def _misbehave(text: str, action: Action) -> None:
    """What real frameworks do now and then, on demand: a text of `!word` asks for it."""
    if text == "!hang":
        time.sleep(3600)
    elif text == "!memory":
        hoard = [bytearray(b"x") * 50_000_000 for _ in range(200)]
        time.sleep(len(hoard))
    elif text == "!killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif text == "!abort":
        os.abort()
    elif text == "!bad_alloc":
        print("terminate called after throwing an instance of 'std::bad_alloc'", flush=True)
        os._exit(127)
    elif text == "!MemoryError":
        raise MemoryError
    elif text == "!exit":
        os._exit(0)
    elif text == "!nothing":
        action.outputs["report"].unlink(missing_ok=True)
        raise SystemExit(0)
    elif text == "!refused":
        print("what the framework prints", flush=True)
        raise StepFailed("the framework does not take this model")
    elif text == "!fault":
        raise RuntimeError("a fault in the framework")
    elif text == "!full":
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    elif text == "!child":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600) # edgebuild-left-behind"])
    elif text == "!elsewhere":
        project = action.inputs["facts"].parents[3]
        _spill(*(project / place for place in ("build", "dist", ".edgebuild/objects")))
    elif text.startswith("!slow"):
        time.sleep(float(text.removeprefix("!slow")))


def _spill(*folders: Path) -> None:
    """Write over whatever lies there, as a framework that takes a path for its own would."""
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                path.chmod(0o644)
                path.write_bytes(b"spilled")


def _version() -> str:
    try:
        return importlib.metadata.version(NEEDS["gguf"].packages[0])
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
