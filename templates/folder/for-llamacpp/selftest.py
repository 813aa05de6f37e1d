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


def main():
    golden = json.loads((HERE / "golden.json").read_text(encoding="utf-8"))
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    model = llama_cpp.Llama(str(HERE / "model" / "model.gguf"), n_ctx=256, logits_all=True, verbose=False)
    prompt, sure = golden["prompt"], golden["continuation"][: golden["certain"]]
    tokens = prompt + sure[:-1]
    model.eval(tokens)
    logits = model.scores[len(prompt) - 1 : len(tokens)]
    allowed = golden["tolerance"]
    worst = max(
        float(abs(logits[0][one["token"]] - one["logit"])) / (allowed["absolute"] + allowed["relative"] * abs(one["logit"]))
        for one in golden["top"]
    )
    same = logits.argmax(axis=-1).tolist()[: len(sure)] == sure
    verdict = "PASS" if worst <= 1 and same else "FAIL"
    print(
        verdict, f"logits differ by {worst:.3g} of the tolerance, {'all' if same else 'not all'} {len(sure)} tokens are the same"
    )
    about = {
        "phase": "self-test",
        "runtime": f"llama-cpp-python {llama_cpp.__version__}, Python {platform.python_version()}",
        "machine": f"{platform.system()} {platform.machine()}",
    }
    measurements = [
        {"name": "golden_logits", "value": worst, "unit": "share of the tolerance", "n": len(golden["top"]), **about},
        {"name": "golden_tokens", "value": int(same), "unit": "1 where all are the same", "n": len(sure), **about},
    ]
    print(
        json.dumps({"bundle": manifest["name"], "version": manifest["version"], "verdict": verdict, "measurements": measurements})
    )
    return 0 if verdict == "PASS" else 1


if __name__ == "__main__":
    sys.exit(main())
