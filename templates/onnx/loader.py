#!/usr/bin/env python3
"""Loads this bundle's model with ONNX Runtime. Run as a program it runs the golden example.

It prints PASS or FAIL for each model file and, last, the evidence as one line of JSON; the exit status is 1 after a FAIL.
Needs: pip install onnxruntime numpy
"""

import hashlib
import json
import os
import platform
import sys
from pathlib import Path

import numpy

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime reads it when it is imported

import onnxruntime

HERE = Path(__file__).resolve().parent
MODELS = ("model.onnx", "model.ort")


def load(path, threads=1):
    """An onnxruntime.InferenceSession on the CPU: session.run(None, {input name: array}) → list of arrays."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def worst(session, golden):
    """The largest difference from the golden outputs, as a share of the tolerance: above 1 is a failure."""
    feeds = {one["name"]: numpy.array(one["data"], dtype=one["dtype"]).reshape(one["shape"]) for one in golden["inputs"]}
    found = session.run([one["name"] for one in golden["outputs"]], feeds)
    share = 0.0
    for one, array in zip(golden["outputs"], found, strict=False):
        if list(array.shape) != one["shape"]:
            return float("inf")
        expected = numpy.array(one["data"], dtype="float64")
        difference = numpy.abs(array.reshape(-1)[:: one["stride"]].astype("float64") - expected)
        allowed = golden["tolerance"]["absolute"] + golden["tolerance"]["relative"] * numpy.abs(expected)
        largest = float((difference / allowed).max(initial=0.0))
        share = max(share, largest if largest < float("inf") else float("inf"))  # what is no number differs too
    return share


def self_test(models):
    text = (HERE / "golden.json").read_bytes()
    golden = json.loads(text)
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    measurements = []
    for model in models:
        share = worst(load(HERE / model), golden)
        print("PASS" if share <= 1 else "FAIL", model, f"differs by {share:.3g} of the tolerance", flush=True)
        measurements.append(
            {
                "name": "golden_error",
                "phase": "self-test",
                "value": share if share < float("inf") else None,
                "unit": "share of the tolerance",
                "n": 1,
                "data": hashlib.sha256(text).hexdigest(),
                "file": model,
                "runtime": f"onnxruntime {onnxruntime.__version__}, Python {platform.python_version()}",
                "machine": f"{platform.system()} {platform.machine()}",
            }
        )
    passed = all(one["value"] is not None and one["value"] <= 1 for one in measurements)
    about = {"bundle": manifest["name"], "version": manifest["version"], "verdict": "PASS" if passed else "FAIL"}
    print(json.dumps({**about, "measurements": measurements}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(self_test(sys.argv[1:] or MODELS))
