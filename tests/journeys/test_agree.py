"""The digits model for browsers and for a server held against each other: ONNX Runtime and OpenVINO, on the same evaluation data."""

import json
from pathlib import Path

import jsonschema
import pytest

from tests.conftest import ROOT
from tests.journeys.test_examples import copy_project, doit, outcomes

pytestmark = pytest.mark.slow


def test_digits_of_two_runtimes(tmp_path: Path) -> None:
    folder = copy_project(tmp_path / "project", "web-digits", "server-digits")
    result = doit(folder, "agree:digits")
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((folder / "build" / "agree" / "digits.json").read_text())
    jsonschema.validate(found, json.loads((ROOT / "schemas" / "agree.json").read_text()))
    runtimes = {row["name"]: row["runtime"].split()[0].lower() for row in found["artifacts"]}
    assert runtimes == {
        "baseline onnxruntime": "onnxruntime",
        "baseline openvino": "openvino",
        "web-digits": "onnxruntime",
        "server-digits": "openvino",
    }
    assert len({row["data"] for row in found["artifacts"]}) == 1
    pairs = {(pair["row"], pair["column"]): pair for pair in found["pairs"]}
    assert len(pairs) == 12
    baselines = pairs["baseline onnxruntime", "baseline openvino"]
    assert baselines["same_top"] == 1
    assert 0 < baselines["max_abs"] < 1e-4  # two runtimes of the same float32 weights: not the same bits
    assert baselines["kl"] < 1e-9
    quantized = pairs["web-digits", "server-digits"]
    assert quantized["n"] == 597
    assert 0.98 <= quantized["same_top"] <= 1
    assert 0.99 < quantized["cosine"] < 1
    assert baselines["max_abs"] < quantized["max_abs"]
    assert baselines["kl"] < quantized["kl"] < 0.1
    assert "KL(row‖column)" in result.stdout
    assert not (folder / "dist").exists()  # it builds what it compares, and nothing else
    assert doit(folder, "agree:digits").returncode == 0
    assert set(outcomes(folder).values()) == {"fresh"}
