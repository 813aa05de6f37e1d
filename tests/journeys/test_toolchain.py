"""A user who has edgebuild and no framework: the first build installs ONNX Runtime's toolchain from the package index, and runs in it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with edgebuild as a wheel would install it, its own dependencies, and an onnxruntime that is none."""
    folder = tmp_path_factory.mktemp("bare")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv*", "build", "dist", ".edgebuild", "*_cache"))
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    pip = [str(folder / "venv" / "bin" / "python"), "-m", "pip", "install", "-q", str(source)]
    subprocess.run(pip, check=True, env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
    shutil.rmtree(source)
    packages = next((folder / "venv").glob("lib/*/site-packages"))
    (packages / "onnxruntime.py").write_text("raise ImportError('of the wrong environment')\n")
    return folder / "venv" / "bin"


def test_the_first_build_makes_the_toolchain(bare: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "EDGEBUILD_OFFLINE")}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")

    def run(*words: str, program: str = "edgebuild", **more: str) -> "subprocess.CompletedProcess[str]":
        place = tmp_path / "digits" if (tmp_path / "digits").exists() else tmp_path
        return subprocess.run(
            [str(bare / program), *words], cwd=place, env={**environment, **more}, capture_output=True, text=True, timeout=900
        )

    assert run("init", "digits").returncode == 0
    refused = run("--offline")
    assert refused.returncode == 1
    assert "and the toolchain onnxruntime (onnxruntime 1." in refused.stderr
    assert refused.stderr.count("EDGEBUILD_OFFLINE=1") == 1
    assert "toolchain:onnxruntime            run" in run("plan", "web-digits").stdout
    done = run(program="doit")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "toolchain:onnxruntime" in done.stdout
    evidence = json.loads((tmp_path / "digits" / "dist" / "web-digits.evidence.json").read_text())
    assert evidence["toolchain"]["lock"].startswith("onnxruntime ")
    assert all(gate["verdict"] == "PASS" for gate in evidence["gates"])
    assert {name for name, version in evidence["toolchain"].items() if version == "missing"} == set()
    again = run("--offline")
    assert again.returncode == 0
    assert "edgebuild: 0 ran, 0 restored, 9 up to date, 0 failed" in again.stdout
    told = json.loads(run("doctor", "--json").stdout)["backends"]
    row = next(one for one in told if one["name"] == "onnxruntime")
    assert row["state"] == "works", row
    assert row["python"].startswith(str(tmp_path / "cache"))
    listed = run("toolchain", "list").stdout
    assert "installed" in next(line for line in listed.splitlines() if line.startswith("onnxruntime"))
