#!/usr/bin/env python3
"""Runs the golden example on this device. Needs: pip install onnxruntime numpy

It prints PASS or FAIL and, last, the evidence as one line of JSON; the exit status is 1 after a FAIL.
"""

import json
import os
import platform
import sys
from pathlib import Path

import numpy

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime reads it when it is imported

import onnxruntime

HERE = Path(__file__).resolve().parent


def worst(found, expected, tolerance):
    """The largest difference, as a share of what is allowed."""
    wanted = numpy.array(expected, dtype="float64")
    allowed = tolerance["absolute"] + tolerance["relative"] * numpy.abs(wanted)
    largest = float((numpy.abs(numpy.array(found, dtype="float64") - wanted) / allowed).max(initial=0.0))
    return largest if largest < float("inf") else float("inf")  # what is no number differs too


def arrays(golden, session):
    """→ (name, value, unit, number) of each measurement."""
    feeds = {one["name"]: numpy.array(one["data"], dtype=one["dtype"]).reshape(one["shape"]) for one in golden["inputs"]}
    found = session.run([one["name"] for one in golden["outputs"]], feeds)
    shares = [
        worst(array.reshape(-1)[:: one["stride"]], one["data"], golden["tolerance"])
        for one, array in zip(golden["outputs"], found, strict=False)
    ]
    return [("golden_error", max(shares), "share of the tolerance", 1)]


def tokens(golden, session):
    """A language model from an empty cache; its continuation is given to it, and it must say the same."""
    prompt, sure = golden["prompt"], golden["continuation"][: golden["certain"]]
    given = numpy.array([prompt + sure[:-1]], dtype="int64")
    known = {"input_ids": given, "attention_mask": numpy.ones_like(given), "position_ids": numpy.arange(given.size)[None]}
    config = json.loads((HERE / "model" / "genai_config.json").read_text(encoding="utf-8"))
    sizes = {"batch_size": 1, "kv_cache_dim": config["model"]["decoder"]["head_size"]}
    feeds = {}
    for one in session.get_inputs():
        kind = "float16" if "float16" in one.type else "float32"
        empty = [size if isinstance(size, int) else sizes.get(size, 0) for size in one.shape]
        feeds[one.name] = known[one.name] if one.name in known else numpy.zeros(empty, kind)
    logits = session.run(["logits"], feeds)[0][0][len(prompt) - 1 :]
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
    session = onnxruntime.InferenceSession(str(HERE / "model" / "model.onnx"), providers=["CPUExecutionProvider"])
    found = (tokens if "prompt" in golden else arrays)(golden, session)
    passed = found[0][1] <= 1 and all(value for _, value, _, _ in found[1:])
    verdict = "PASS" if passed else "FAIL"
    others = "".join(f", {'all' if value else 'not all'} {number} tokens are the same" for _, value, _, number in found[1:])
    print(verdict, f"differs by {found[0][1]:.3g} of the tolerance{others}")
    about = {
        "phase": "self-test",
        "runtime": f"onnxruntime {onnxruntime.__version__}, Python {platform.python_version()}",
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
