#!/usr/bin/env python3
"""Asks the running server the golden example: python selftest.py [http://127.0.0.1:8080]. Standard library alone.

It prints PASS or FAIL and, last, the evidence as one line of JSON; the exit status is 1 after a FAIL.
"""

import json
import platform
import sys
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def read(name):
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def ask(url, request=None):
    data = None if request is None else json.dumps(request).encode()
    with DIRECT.open(urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=300) as answer:
        return json.loads(answer.read())


def worst(found, expected, tolerance):
    """The largest difference, as a share of what is allowed."""
    allowed = (tolerance["absolute"] + tolerance["relative"] * abs(wanted) for wanted in expected)
    shares = (abs(one - wanted) / limit for one, wanted, limit in zip(found, expected, allowed, strict=False))
    return max(
        (share if share < float("inf") else float("inf") for share in shares), default=0.0
    )  # what is no number differs too


def tensors(url, name, golden):
    answer = ask(f"{url}/v2/models/{name}/infer", read("request.json"))
    found = {one["name"]: one for one in answer["outputs"]}
    shares = []
    for one in golden["outputs"]:
        got = found.get(one["name"], {"shape": None, "data": []})
        same = list(one["shape"]) == got["shape"] and len(got["data"][:: one["stride"]]) == len(one["data"])
        shares.append(worst(got["data"][:: one["stride"]], one["data"], golden["tolerance"]) if same else float("inf"))
    share = max(shares)
    return share <= 1, f"differs by {share:.3g} of the tolerance", ("golden_error", share, "share of the tolerance", 1)


def completion(url, name, golden):
    request, expected = read("request.json"), read("answer.json")["text"]
    said = ask(f"{url}/v1/completions", {"model": name, **request})["choices"][0]["text"]
    same = said == expected
    return (
        same,
        f"answers {said!r}, expected {expected!r}",
        ("golden_text", int(same), "1 where it is the same", request["max_tokens"]),
    )


def main(url):
    manifest, golden = read("manifest.json"), read("golden.json")
    start = time.monotonic()
    passed, text, (measured, value, unit, number) = (completion if "prompt" in golden else tensors)(url, manifest["name"], golden)
    verdict = "PASS" if passed else "FAIL"
    print(verdict, text)
    measurement = {
        "name": measured,
        "value": value if value != float("inf") else None,
        "unit": unit,
        "n": number,
        "phase": "self-test",
        "runtime": f"{url}, {manifest['framework']}, answered in {time.monotonic() - start:.3f} s",
        "machine": f"{platform.system()} {platform.machine()}",
    }
    print(
        json.dumps(
            {"bundle": manifest["name"], "version": manifest["version"], "verdict": verdict, "measurements": [measurement]}
        )
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main((sys.argv[1:] or ["http://127.0.0.1:8080"])[0].rstrip("/")))
