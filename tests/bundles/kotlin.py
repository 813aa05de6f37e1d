"""JetBrains' Kotlin compiler, of npm, installed once per user and version outside the repository; and what stands in for Android.

`android_host/` has as much of Android, ONNX Runtime and Google Play's libraries as the bundles name: Context, AssetManager and
PackageManager read a package and a folder of this machine, the others are declarations alone. org.json is Android's own (Debian).
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from edgebuild.files import locked

VERSION = "2.4.20"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or tempfile.gettempdir())  # as it is before a test has one of its own
HOST = sorted((Path(__file__).parent / "android_host").rglob("*.java"))
JSON = Path("/usr/share/java/com.android.json.jar")
NEEDED = {"npm": "npm", "javac": "default-jdk-headless", "java": "default-jdk-headless", str(JSON): "libandroid-json-java"}


def needed() -> None:
    """Skip where a tool is missing, or fail in CI."""
    missing = sorted({package for name, package in NEEDED.items() if not (Path(name).is_file() or shutil.which(name))})
    if missing:
        said = f"Kotlin is not compiled: apt-get install {' '.join(missing)}"
        if "CI" in os.environ:
            pytest.fail(f"CI is set: {said}")
        pytest.skip(said)


def jars() -> Path:
    """The folder of the compiler's jars."""
    folder = CACHE / f"edgebuild-tests-kotlin-{VERSION}"
    with locked(f"{folder}.lock"):
        if not (folder / "complete").exists():
            folder.mkdir(parents=True, exist_ok=True)
            words = ["npm", "install", "--no-save", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder)]
            subprocess.run([*words, f"kotlin-compiler@{VERSION}"], cwd=folder, check=True, timeout=600)
            (folder / "complete").touch()
    return folder / "node_modules" / "kotlin-compiler" / "lib"


def compile(sources: Sequence[Path], folder: Path) -> str:
    """Kotlin and Java to classes in `folder`; → the class path to run them with. Warnings are errors."""
    lib = jars()
    path = os.pathsep.join(map(str, (folder, JSON, lib / "kotlin-stdlib.jar")))
    folder.mkdir()
    subprocess.run(["javac", "-nowarn", "-d", folder, *HOST], check=True, timeout=300)
    own = os.pathsep.join(
        str(lib / name) for name in ("kotlin-compiler.jar", "kotlin-stdlib.jar", "kotlinx-coroutines-core-jvm.jar")
    )
    words = ["java", "-Xmx1500m", "-cp", own, "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler", "-no-reflect", "-Werror"]
    done = subprocess.run(
        [*words, "-cp", path, "-d", str(folder), *map(str, sources)], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return path
