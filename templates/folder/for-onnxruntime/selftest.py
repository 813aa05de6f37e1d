#!/usr/bin/env python3
"""Runs the golden example on this device. Needs: pip install onnxruntime numpy

It prints PASS or FAIL and, last, the evidence as one line of JSON; the exit status is 1 after a FAIL.
"""

import json
import platform
import sys
from pathlib import Path

import numpy
import onnxruntime

HERE = Path(__file__).resolve().parent


def main():
    golden = json.loads((HERE / "golden.json").read_text(encoding="utf-8"))
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    session = onnxruntime.InferenceSession(str(HERE / "model" / "model.onnx"), providers=["CPUExecutionProvider"])
    feeds = {one["name"]: numpy.array(one["data"], dtype=one["dtype"]).reshape(one["shape"]) for one in golden["inputs"]}
    found = session.run([one["name"] for one in golden["outputs"]], feeds)
    shares = []
    for one, array in zip(golden["outputs"], found, strict=False):
        expected = numpy.array(one["data"], dtype="float64")
        allowed = golden["tolerance"]["absolute"] + golden["tolerance"]["relative"] * numpy.abs(expected)
        difference = numpy.abs(array.reshape(-1)[:: one["stride"]].astype("float64") - expected)
        shares.append(float((difference / allowed).max(initial=0.0)))
    worst = max(shares)
    verdict = "PASS" if worst <= 1 else "FAIL"
    print(verdict, f"differs by {worst:.3g} of the tolerance")
    measurement = {
        "name": "golden_error",
        "phase": "self-test",
        "value": worst,
        "unit": "share of the tolerance",
        "n": 1,
        "runtime": f"onnxruntime {onnxruntime.__version__}, Python {platform.python_version()}",
        "machine": f"{platform.system()} {platform.machine()}",
    }
    print(
        json.dumps(
            {"bundle": manifest["name"], "version": manifest["version"], "verdict": verdict, "measurements": [measurement]}
        )
    )
    return 0 if verdict == "PASS" else 1


if __name__ == "__main__":
    sys.exit(main())
