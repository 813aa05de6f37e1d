#!/usr/bin/env python3
"""Runs the golden example on this device. Needs: pip install mlx-lm (on Linux: "mlx[cpu]" mlx-lm)

It prints PASS or FAIL and, last, the evidence as one line of JSON; the exit status is 1 after a FAIL.
"""

import importlib.metadata
import json
import platform
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def worst(found, expected, tolerance):
    """The largest difference, as a share of what is allowed."""
    allowed = (tolerance["absolute"] + tolerance["relative"] * abs(wanted) for wanted in expected)
    shares = (abs(one - wanted) / limit for one, wanted, limit in zip(found, expected, allowed, strict=False))
    return max(
        (share if share < float("inf") else float("inf") for share in shares), default=0.0
    )  # what is no number differs too


def main():
    sys.modules.setdefault("torch", None)  # not needed; transformers, which mlx-lm imports, spends seconds on it where it is
    import mlx.core as mx
    from mlx_lm.utils import load_model

    if sys.platform == "linux":
        mx.disable_compile()  # it fuses kernels by a C++ compiler, which need not be here
    golden = json.loads((HERE / "golden.json").read_text(encoding="utf-8"))
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    model, _ = load_model(HERE / "model")
    prompt, sure = golden["prompt"], golden["continuation"][: golden["certain"]]
    logits = model(mx.array([prompt + sure[:-1]]))[0, len(prompt) - 1 :].astype(mx.float32)
    top = golden["top"]
    share = worst([logits[0, one["token"]].item() for one in top], [one["logit"] for one in top], golden["tolerance"])
    same = mx.argmax(logits, axis=-1).tolist()[: len(sure)] == sure
    verdict = "PASS" if share <= 1 and same else "FAIL"
    print(
        verdict, f"logits differ by {share:.3g} of the tolerance, {'all' if same else 'not all'} {len(sure)} tokens are the same"
    )
    about = {
        "phase": "self-test",
        "runtime": f"mlx {importlib.metadata.version('mlx')}, Python {platform.python_version()}",
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
