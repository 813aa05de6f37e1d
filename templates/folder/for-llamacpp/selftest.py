#!/usr/bin/env python3
"""Runs the golden example on this device. Needs: pip install llama-cpp-python (which compiles llama.cpp)

It prints PASS or FAIL and, last, the evidence as one line of JSON; the exit status is 1 after a FAIL.
"""

import json
import platform
import sys
from pathlib import Path

import llama_cpp

HERE = Path(__file__).resolve().parent


def worst(found, expected, tolerance):
    """The largest difference, as a share of what is allowed."""
    allowed = (tolerance["absolute"] + tolerance["relative"] * abs(wanted) for wanted in expected)
    shares = (abs(one - wanted) / limit for one, wanted, limit in zip(found, expected, allowed, strict=False))
    return max(
        (share if share < float("inf") else float("inf") for share in shares), default=0.0
    )  # what is no number differs too


def main():
    golden = json.loads((HERE / "golden.json").read_text(encoding="utf-8"))
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    model = llama_cpp.Llama(str(HERE / "model" / "model.gguf"), n_ctx=256, logits_all=True, verbose=False)
    prompt, sure = golden["prompt"], golden["continuation"][: golden["certain"]]
    tokens = prompt + sure[:-1]
    model.eval(tokens)
    logits = model.scores[len(prompt) - 1 : len(tokens)]
    top = golden["top"]
    share = worst([float(logits[0][one["token"]]) for one in top], [one["logit"] for one in top], golden["tolerance"])
    same = logits.argmax(axis=-1).tolist()[: len(sure)] == sure
    verdict = "PASS" if share <= 1 and same else "FAIL"
    print(
        verdict, f"logits differ by {share:.3g} of the tolerance, {'all' if same else 'not all'} {len(sure)} tokens are the same"
    )
    about = {
        "phase": "self-test",
        "runtime": f"llama-cpp-python {llama_cpp.__version__}, Python {platform.python_version()}",
        "machine": f"{platform.system()} {platform.machine()}",
    }
    measurements = [
        {
            "name": "golden_logits",
            "value": share if share < float("inf") else None,
            "unit": "share of the tolerance",
            "n": len(top),
            **about,
        },
        {"name": "golden_tokens", "value": int(same), "unit": "1 where all are the same", "n": len(sure), **about},
    ]
    print(
        json.dumps({"bundle": manifest["name"], "version": manifest["version"], "verdict": verdict, "measurements": measurements})
    )
    return 0 if verdict == "PASS" else 1


if __name__ == "__main__":
    sys.exit(main())
