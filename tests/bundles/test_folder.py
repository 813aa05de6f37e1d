"""The kind `folder`: a model is used as its README says, in a process that knows nothing of edgebuild."""

import ast
import math
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from edgebuild import render
from edgebuild.bundle import RUNTIMES
from tests.bundles.packing import ROOT, TEMPLATES
from tests.bundles.test_templates import values

MODELS = ROOT / "targets" / "models"
LANGUAGE, TENSORS = "text-generation", "image-classification"
FRAMEWORKS = [
    *((name, LANGUAGE) for name in sorted(RUNTIMES)),
    *((name, TENSORS) for name in ("olive", "onnxruntime", "openvino")),
]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return values("folder", tmp_path_factory.mktemp("folder"))


def use(known: dict[str, Any], framework: str, task: str) -> str:
    """The Python that stands under "Use it"."""
    source = (TEMPLATES / "folder" / "README.md.j2").read_text(encoding="utf-8")
    text = render.render(source, "README.md.j2", {**known, "framework": framework, "task": task})
    (section,) = re.findall(r"^## Use it$(.*?)^## ", text, re.DOTALL | re.MULTILINE)
    (code,) = re.findall(r"^```python$\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    return str(code)


@pytest.mark.parametrize(("framework", "task"), FRAMEWORKS)
def test_every_framework_is_told_in_ten_lines(framework: str, task: str, known: dict[str, Any]) -> None:
    code = use(known, framework, task)
    assert ast.parse(code)
    assert len([line for line in code.splitlines() if line]) <= 10
    assert "model" in code


@pytest.mark.parametrize(("framework", "task"), [("mlx", LANGUAGE), ("onnxruntime", TENSORS), ("openvino", TENSORS)])
def test_it_runs_as_it_stands_there(framework: str, task: str, known: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip(framework)
    model = tmp_path / "model"
    if task == LANGUAGE:
        shutil.copytree(MODELS / "tiny-phi3", model)
    elif framework == "onnxruntime":
        model.mkdir()
        shutil.copy(MODELS / "digits.onnx", model / "model.onnx")
    else:
        import openvino

        openvino.save_model(openvino.convert_model(MODELS / "digits.onnx"), model / "model.xml")
    code = use(known, framework, task).replace('"NAME"', '"pixels"')
    before = "import numpy\narray = numpy.zeros((1, 1, 8, 8), 'float32')\n"
    after = "" if task == LANGUAGE else "print(outputs[0].shape)\n"
    words = [sys.executable, "-I", "-B", "-c", before + code + after]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 10)" if task == TENSORS else len(done.stdout.split()) > 3


SELF_TESTS = [path for path in sorted(TEMPLATES.glob("**/selftest.py")) if "def worst(" in path.read_text()]
IMPORTED = ("llama_cpp", "mlx", "mlx.core", "mlx_lm", "mlx_lm.utils", "onnxruntime", "openvino")


@pytest.mark.parametrize("script", SELF_TESTS, ids=lambda path: path.relative_to(TEMPLATES).as_posix())
def test_what_is_no_number_fails_a_self_test(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in IMPORTED:
        monkeypatch.setitem(sys.modules, name, MagicMock())
    worst, tolerance = runpy.run_path(str(script))["worst"], {"absolute": 0.1, "relative": 0.0}
    assert worst([1.0, 1.05], [1.0, 1.0], tolerance) == pytest.approx(0.5)
    for wrong in (math.nan, math.inf, -math.inf):
        for place in range(3):
            found = [1.0, 1.05, 1.0]
            found[place] = wrong
            assert worst(found, [1.0, 1.0, 1.0], tolerance) == math.inf


def test_every_self_test_is_among_them() -> None:
    assert {path.parent.name for path in SELF_TESTS} == {
        "container",
        *(f"for-{name}" for name in ("llamacpp", "mlx", "onnxruntime-olive", "openvino")),
    }
