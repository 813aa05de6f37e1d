"""Node.js with ONNX Runtime, installed once per user and version, outside the repository."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from edgebuild.files import locked

VERSION = "1.30.0"  # of onnxruntime-node and onnxruntime-web: the newest that npm has


@pytest.fixture(scope="session")
def node_folder() -> Path:
    """A folder whose `node_modules` hold onnxruntime-node and onnxruntime-web: what lies below it can import them."""
    if not shutil.which("node") or not shutil.which("npm"):
        if "CI" in os.environ:
            pytest.fail("CI is set, so node and npm must be installed: the onnx bundle is proven by onnxruntime-node")
        pytest.skip("node and npm are not installed: the JavaScript loader is not run")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or tempfile.gettempdir())
    folder = cache / f"edgebuild-tests-onnxruntime-js-{VERSION}"
    with locked(f"{folder}.lock"):  # one of those that run at once installs it
        if not (folder / "complete").exists():
            folder.mkdir(parents=True, exist_ok=True)
            packages = [f"{name}@{VERSION}" for name in ("onnxruntime-node", "onnxruntime-web")]
            subprocess.run(
                [
                    "npm",
                    "install",
                    "--no-save",
                    "--no-audit",
                    "--no-fund",
                    "--ignore-scripts",
                    "--prefix",
                    str(folder),
                    *packages,
                ],
                env={**os.environ, "ONNXRUNTIME_NODE_INSTALL": "skip"},  # its script would fetch CUDA
                cwd=folder,
                check=True,
                timeout=600,
            )
            (folder / "complete").touch()
    return folder


@pytest.fixture(scope="session")
def node() -> str:
    """The path of Node.js."""
    found = shutil.which("node")
    if found is None:
        if "CI" in os.environ:
            pytest.fail("CI is set, so node must be installed")
        pytest.skip("node is not installed: no JavaScript is read back")
    return found
