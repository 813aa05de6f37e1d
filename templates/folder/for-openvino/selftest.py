#!/usr/bin/env python3
"""Runs the golden example on this device. Needs: pip install openvino numpy

It prints PASS or FAIL and, last, the evidence as one line of JSON; the exit status is 1 after a FAIL.
"""

import json
import platform
import sys
from pathlib import Path

import numpy
import openvino

HERE = Path(__file__).resolve().parent


def main():
    golden = json.loads((HERE / "golden.json").read_text(encoding="utf-8"))
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    feeds = {one["name"]: numpy.array(one["data"], dtype=one["dtype"]).reshape(one["shape"]) for one in golden["inputs"]}
    # As it was measured; by itself OpenVINO computes in bfloat16 where the processor can.
    compiled = openvino.Core().compile_model(HERE / "model" / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled(feeds)
    shares = []
    for one in golden["outputs"]:
        array = found[one["name"]]
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
        "runtime": f"openvino {openvino.__version__}, Python {platform.python_version()}",
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
