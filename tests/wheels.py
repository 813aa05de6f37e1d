"""A package index of tiny wheels on 127.0.0.1, made as they are asked for, and edgebuild with locks of its own. For tests."""

import base64
import contextlib
import hashlib
import io
import os
import shutil
import site
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import ROOT
from tests.loopback import Loopback, serve

# What the other interpreter finds of ours: edgebuild's own dependencies, which are not the point here.
OURS = "".join(f"import site; site.addsitedir({folder!r})\n" for folder in site.getsitepackages())


def wheel(name: str, version: str, files: Mapping[str, bytes]) -> tuple[str, bytes]:
    """→ (file name, content) of a pure Python wheel, the same bytes each time."""
    folder = f"{name}-{version}.dist-info"
    content = {
        **files,
        f"{folder}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{folder}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},sha256={_hash(data)},{len(data)}\n" for path, data in content.items())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, data in {**content, f"{folder}/RECORD": f"{record}{folder}/RECORD,,\n".encode()}.items():
            archive.writestr(zipfile.ZipInfo(path), data)
    return f"{name}-{version}-py3-none-any.whl", buffer.getvalue()


def _hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


@dataclass
class Index:
    """Packages that a loopback serves, and a copy of edgebuild in `root` whose locks name them."""

    root: Path
    loopback: Loopback
    address: str
    lines: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, version: str, files: Mapping[str, bytes]) -> None:
        """A package, as `lock` knows it from then on; other versions of it stay in the index."""
        assert isinstance(self.loopback.files, dict)
        file, content = wheel(name, version, files)
        project = name.replace("_", "-")
        sha256 = hashlib.sha256(content).hexdigest()
        page = self.loopback.files.get(f"simple/{project}/", b"")
        self.loopback.files[f"files/{file}"] = content
        self.loopback.files[f"simple/{project}/"] = page + f'<a href="/files/{file}">{file}</a>\n'.encode()
        self.lines[project] = f"{project}=={version} \\\n    --hash=sha256:{sha256}\n"

    def lock(self, name: str, *packages: str, head: str = "") -> None:
        """Ship a lock of these packages, as they were added last."""
        path = self.root / "edgebuild" / "locks" / f"{name}.txt"
        path.write_text(head + "".join(self.lines[package] for package in packages))

    def environment(self, **more: str) -> dict[str, str]:
        """Of a process that uses this edgebuild and this index, and neither the user's settings nor their cache of wheels."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "EDGEBUILD_", "UV_"))}
        ours = {
            "PYTHONPATH": str(self.root),
            "XDG_CACHE_HOME": str(self.root / "cache"),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": f"{self.address}/simple",
            "PIP_NO_CACHE_DIR": "1",
        }
        return {**kept, **ours, **more}

    def start(self, *words: str, cwd: Path | None = None, code: str = "", **more: str) -> "subprocess.Popen[str]":
        """`edgebuild WORD…`, after `code`."""
        program = f"import sys\n{code}\nfrom edgebuild.cli import main\nsys.exit(main(sys.argv[1:]))"
        return subprocess.Popen(
            [sys.executable, "-c", program, *words],
            cwd=cwd or self.root,
            env=self.environment(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, cwd: Path | None = None, **more: str) -> "subprocess.CompletedProcess[str]":
        process = self.start(*words, cwd=cwd, **more)
        output, errors = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    @property
    def toolchains(self) -> Path:
        return self.root / "cache" / "edgebuild" / "toolchains"

    def made(self) -> list[Path]:
        """The environments that have their names: whole ones, if edgebuild is right."""
        return sorted(path for path in self.toolchains.glob("*") if len(path.name) == 64)

    def left(self) -> list[Path]:
        """What was begun and not ended."""
        return sorted(self.toolchains.glob(".tmp-*"))


@contextlib.contextmanager
def index(root: Path) -> Iterator[Index]:
    """An index without packages, and an edgebuild without locks."""
    shutil.copytree(ROOT / "edgebuild", root / "edgebuild", ignore=shutil.ignore_patterns("__pycache__", "locks"))
    (root / "edgebuild" / "locks").mkdir()
    for name in ("schemas", "templates"):
        shutil.copytree(ROOT / name, root / name)
    with serve({}, hub=False) as (loopback, address):
        yield Index(root, loopback, address)
