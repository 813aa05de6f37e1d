"""`edgebuild doctor`, with the frameworks that are here, without one, and with one that is broken; and accelerators of all kinds."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from edgebuild import toolchain
from edgebuild.accelerators import accelerators
from edgebuild.doctor import BROKEN, NOT_INSTALLED, WORKS, examine
from tests.conftest import ROOT
from tests.test_cli import BIN


def test_outside_a_project_it_tries_every_backend(tmp_path: Path) -> None:
    done = subprocess.run([str(BIN / "edgebuild"), "doctor", "--json"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    jsonschema.validate(found, json.loads((ROOT / "schemas" / "doctor.json").read_text()))
    states = {backend["name"]: backend["state"] for backend in found["backends"]}
    for name in ("llamacpp", "olive", "onnxruntime-lm", "openvino-lm"):
        assert states.pop(name) in (NOT_INSTALLED, WORKS)  # not everywhere: it is compiled, or shares no environment with others
    assert states == dict.fromkeys(("mlx", "onnxruntime", "openvino"), WORKS)
    assert found["store"]["path"] == str(tmp_path / ".edgebuild")
    assert found["memory"]["available"] <= found["memory"]["total"]
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_a_broken_backend_is_told_from_one_that_is_not_installed(tmp_path: Path) -> None:
    """A module that is found before the framework's own, and fails: status 1, and the reason in one line."""
    shutil.copytree(ROOT / "edgebuild", tmp_path / "edgebuild", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libonnxruntime.so: undefined symbol')\n")
    code = "import sys; from edgebuild.cli import main; sys.exit(main(['doctor', '--json']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    states = {backend["name"]: backend for backend in json.loads(done.stdout)["backends"]}
    assert states["onnxruntime"]["state"] == BROKEN
    assert "undefined symbol" in states["onnxruntime"]["message"]
    assert "pip install --force-reinstall 'edgebuild[onnxruntime]'" in states["onnxruntime"]["message"]
    assert states["mlx"]["state"] == WORKS


def test_what_is_missing_or_of_another_version(tmp_path: Path) -> None:
    def versions(packages: tuple[str, ...]) -> dict[str, str]:
        found = toolchain.versions(packages)
        return {**found, "mlx-lm": "missing", **({"onnx": "1.0.0"} if "onnx" in found else {})}

    found = {backend.name: backend for backend in examine(str(tmp_path / "store"), versions=versions).backends}
    assert found["mlx"].state == NOT_INSTALLED
    assert found["mlx"].message == (
        "mlx-lm missing; the first build that needs it makes its toolchain, "
        "or run: edgebuild toolchain install mlx (or: pip install 'edgebuild[mlx]')"
    )
    assert found["onnxruntime"].state == NOT_INSTALLED
    assert found["onnxruntime"].message.startswith("onnx 1.0.0 instead of 1.23.2; the first build")
    assert found["onnxruntime"].python == ""


def test_accelerators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Device nodes as the kernel shows them, and an nvidia-smi that answers, fails, and is not there."""
    for folder, node, vendor, driver in (("dri", "renderD128", "0x1002", "amdgpu"), ("accel", "accel0", "0x8086", "intel_vpu")):
        (tmp_path / "dev" / folder).mkdir(parents=True)
        (tmp_path / "dev" / folder / node).write_bytes(b"")
        device = tmp_path / "class" / ("drm" if folder == "dri" else folder) / node / "device"
        device.mkdir(parents=True)
        (device / "vendor").write_text(vendor + "\n")
        (tmp_path / "drivers" / driver).mkdir(parents=True)
        (device / "driver").symlink_to(tmp_path / "drivers" / driver)
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559 MiB, 570.1, 9.0'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    nvidia, dri, accel, metal = accelerators(tmp_path / "dev", tmp_path / "class")
    assert nvidia.found == ("NVIDIA H100 80GB HBM3, 81559 MiB, driver 570.1, compute capability 9.0",)
    assert dri.found == (f"{tmp_path}/dev/dri/renderD128: AMD, driver amdgpu",)
    assert accel.found == (f"{tmp_path}/dev/accel/accel0: Intel, driver intel_vpu",)
    assert bool(metal.found) != bool(metal.unavailable)
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML' >&2; exit 9\n")
    assert accelerators(tmp_path / "none", tmp_path / "none")[0].unavailable == "nvidia-smi says: Failed to initialize NVML"
    program.write_text("#!/bin/sh\nexit 9\n")
    assert accelerators(tmp_path / "none", tmp_path / "none")[0].unavailable == "nvidia-smi says: nothing, status 9"
    program.write_text("#!/bin/sh\necho 'a name, with a comma, 1 MiB, 1, 9.0'\n")
    assert accelerators(tmp_path / "none", tmp_path / "none")[0].found == (
        "a name, with a comma, 1 MiB, driver 1, compute capability 9.0",
    )
    assert accelerators(tmp_path / "none", tmp_path / "none")[1].unavailable == f"no {tmp_path}/none/dri here"
