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
# As it was measured. By itself OpenVINO computes in bfloat16 where the processor can; a language model's cache, and what goes
# into its compressed matrices, in int8.
PRECISION = {"INFERENCE_PRECISION_HINT": "f32"}
LANGUAGE_MODEL = {**PRECISION, "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}


def worst(found, expected, tolerance):
    """The largest difference, as a share of what is allowed."""
    wanted = numpy.array(expected, dtype="float64")
    allowed = tolerance["absolute"] + tolerance["relative"] * numpy.abs(wanted)
    largest = float((numpy.abs(numpy.array(found, dtype="float64") - wanted) / allowed).max(initial=0.0))
    return largest if largest < float("inf") else float("inf")  # what is no number differs too


def arrays(golden):
    """→ (name, value, unit, number) of each measurement."""
    compiled = openvino.Core().compile_model(HERE / "model" / "model.xml", "CPU", PRECISION)
    found = compiled(
        {one["name"]: numpy.array(one["data"], dtype=one["dtype"]).reshape(one["shape"]) for one in golden["inputs"]}
    )
    shares = [
        worst(found[one["name"]].reshape(-1)[:: one["stride"]], one["data"], golden["tolerance"]) for one in golden["outputs"]
    ]
    return [("golden_error", max(shares), "share of the tolerance", 1)]


def tokens(golden):
    compiled = openvino.Core().compile_model(HERE / "model" / "openvino_model.xml", "CPU", LANGUAGE_MODEL)
    prompt, sure = golden["prompt"], golden["continuation"][: golden["certain"]]
    given = numpy.array([prompt + sure[:-1]], dtype="int64")
    feeds = {
        "input_ids": given,
        "attention_mask": numpy.ones_like(given),
        "position_ids": numpy.arange(given.size, dtype="int64")[None],
        "beam_idx": numpy.zeros(1, dtype="int32"),
    }
    taken = {name for port in compiled.inputs for name in port.get_names()}
    request = compiled.create_infer_request()
    logits = request.infer({name: value for name, value in feeds.items() if name in taken})["logits"][0][len(prompt) - 1 :]
    top = golden["top"]
    share = worst([logits[0][one["token"]] for one in top], [one["logit"] for one in top], golden["tolerance"])
    same = logits.argmax(axis=-1).tolist()[: len(sure)] == sure
    return [
        ("golden_logits", share, "share of the tolerance", len(top)),
        ("golden_tokens", int(same), "1 where all are the same", len(sure)),
    ]


def main():
    golden = json.loads((HERE / "golden.json").read_text(encoding="utf-8"))
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    found = tokens(golden) if "prompt" in golden else arrays(golden)
    passed = found[0][1] <= 1 and all(value for _, value, _, _ in found[1:])
    verdict = "PASS" if passed else "FAIL"
    others = "".join(f", {'all' if value else 'not all'} {number} tokens are the same" for _, value, _, number in found[1:])
    print(verdict, f"differs by {found[0][1]:.3g} of the tolerance{others}")
    about = {
        "phase": "self-test",
        "runtime": f"openvino {openvino.__version__}, Python {platform.python_version()}",
        "machine": f"{platform.system()} {platform.machine()}",
    }
    measurements = [
        {"name": name, "value": value if value < float("inf") else None, "unit": unit, "n": number, **about}
        for name, value, unit, number in found
    ]
    print(
        json.dumps({"bundle": manifest["name"], "version": manifest["version"], "verdict": verdict, "measurements": measurements})
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
