"""The kind `container` without building an image: what it refuses, what it promises, and how far it says that it is proven."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgebuild.bundles import container, dockerfile, image
from edgebuild.errors import StepFailed
from tests.bundles.hostile import WRITTEN
from tests.bundles.packing import Doubling, Stub, pack, report
from tests.bundles.test_templates import survives

BASE = "docker.io/library/python@sha256:" + "0" * 64


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack("container", tmp_path_factory.mktemp("container"))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("Dockerfile", "USER 10001:10001", "USER 0:0", r"USER 0:0: must be one number of 10000 or more"),
        ("Dockerfile", "USER 10001:10001", "USER 09999:10001", "must be one number of 10000 or more"),
        ("Dockerfile", "USER 10001:10001\n", "", r"USER \(none\)"),
        ("Dockerfile", "USER 10001:10001", "USER 10001:10001\nUSER root", "USER 10001:10001 root"),
        ("Dockerfile", "ARG BASE", "ARG BASE=python:3.11", "must begin with ARG BASE, an image by its digest"),
        ("Dockerfile", "FROM ${BASE}\n", "FROM python:3.11\n", r"FROM python:3.11: every stage begins with \$\{BASE\}"),
        ("Dockerfile", "--require-hashes", "", "pip must be told --no-index and --require-hashes"),
        ("Dockerfile", "--no-index", "", "pip must be told"),
        ("Dockerfile", "COPY app /app", "COPY ap /app", "COPY ap: there is no such file in the bundle"),
        ("Dockerfile", "COPY app /app", "COPY ../app /app", r"COPY \.\./app: there is no such file"),
        ("Dockerfile", "COPY app /app", "ADD https://example.org/app /app", "nothing may come from a network"),
        ("Dockerfile", "COPY app /app", "RUN apt-get update", "nothing may come from a network"),
        ("Dockerfile", '["/opt/app/bin/python", "/app/entry.py"]', "python /app/entry.py", "must be a list in JSON"),
        ("compose.yaml", "cap_drop", "capdrop", "capdrop: unknown key; .*Did you mean"),
        ("compose.yaml", "read_only: true", "read_only: false", "read_only: .*true"),
        ("compose.yaml", '    user: "10001:10001"\n', "", "user: missing"),
        ("compose.yaml", '    user: "10001:10001"', '    user: "0:0"', "user: .*10000 or more"),
        (
            "compose.yaml",
            '    user: "10001:10001"',
            '    user: "10002:10001"',
            "runs as 10002:10001, and the image as 10001:10001",
        ),
        ("compose.yaml", "    read_only", "    privileged: true\n    read_only", "privileged: unknown key"),
        ("compose.yaml", "${LISTEN:-127.0.0.1}", "0.0.0.0", "ports.0: .*127"),
        ("compose.yaml", ":8080:8080", ":8080:8081", "publishes port 8081, and the image serves 8080"),
        ("compose.yaml", "network: none", "network: host", "network: .*none"),
        ("compose.yaml", "test: [CMD,", "test: [CMD-SHELL,", "test.0: .*CMD"),
        ("compose.yaml", "/opt/app/bin/python, /app", "/usr/bin/python3, /app", "which is not what the image runs by"),
        ("compose.yaml", "${BASE:?name a base image by its digest, as README.md says}", "python:3.11", "BASE: .*digest"),
        ("compose.yaml", "name:", "name: &a", "anchors|alias"),
    ],
)
def test_what_is_not_as_promised_is_refused(packed: Path, tmp_path: Path, file: str, old: str, new: str, message: str) -> None:
    tampered = tmp_path / "tampered"
    shutil.copytree(packed, tampered)
    text = (tampered / file).read_text()
    assert old in text
    (tampered / file).write_text(text.replace(old, new, 1) if file == "compose.yaml" else new.join(text.rsplit(old, 1)))
    container.verify(packed)
    with pytest.raises(StepFailed, match=message):
        container.verify(tampered)


@pytest.mark.parametrize("value", [value for value in WRITTEN if survives(value)])
def test_a_hostile_description_adds_no_instruction(packed: Path, tmp_path: Path, value: str) -> None:
    """Nor breaks what is checked: one label differs, and nothing else."""
    made = pack("container", tmp_path, description=value)
    plain, hostile = (dockerfile.instructions((folder / "Dockerfile").read_text()) for folder in (packed, made))
    label = "org.opencontainers.image.description="
    assert [one for one in hostile if not one[1].startswith(label)] == [one for one in plain if not one[1].startswith(label)]
    assert len(hostile) == len(plain)
    assert (made / "compose.yaml").read_bytes() == (packed / "compose.yaml").read_bytes()


def test_a_platform_names_its_base_by_digest(tmp_path: Path) -> None:
    def with_base(base: str, place: str) -> Path:
        return pack("container", tmp_path / place, platform={"name": "p", "description": "", "facts": {"base": base}})

    made = with_base(BASE, "a")
    assert dockerfile.instructions((made / "Dockerfile").read_text())[0] == ("ARG", f"BASE={BASE}")
    assert f"${{BASE:-{BASE}}}" in (made / "compose.yaml").read_text()
    for number, wrong in enumerate(("python:3.11", BASE[:-1], f"{BASE} x", f"{BASE}\n", "$(id)@sha256:" + "0" * 64)):
        with pytest.raises(StepFailed, match=r"facts\.base: .* is no image by its digest, such as docker"):
            with_base(wrong, f"wrong{number}")


@pytest.mark.parametrize(
    ("framework", "task", "reason"),
    [
        ("llamacpp", "text-generation", ""),
        ("onnxruntime", "image-classification", ""),
        ("openvino", "image-classification", ""),
        ("onnxruntime", "text-generation", "a language model is served by llama.cpp; name framework: llamacpp"),
        ("openvino", "text-generation", "a language model is served by llama.cpp"),
        ("mlx", "text-generation", "runs models of llamacpp, onnxruntime, openvino, but the framework is mlx"),
    ],
)
def test_what_it_serves(framework: str, task: str, reason: str) -> None:
    assert reason in container.refuse(framework, task)
    assert bool(container.refuse(framework, task)) == bool(reason)


def test_requests_and_requirements(packed: Path) -> None:
    request, golden = (json.loads((packed / name).read_text()) for name in ("request.json", "golden.json"))
    assert request["inputs"][0]["data"] == golden["inputs"][0]["data"]
    assert request["inputs"][0]["datatype"] == "FP32"
    listed = [line.partition("==")[0] for line in (packed / "requirements.txt").read_text().splitlines() if "==" in line]
    assert listed == ["first", "second"]
    manifest = {one["path"]: one["sha256"] for one in json.loads((packed / "manifest.json").read_text())["files"]}
    for path, digest in manifest.items():
        assert not path.endswith(".whl") or f"--hash=sha256:{digest}\n" in (packed / "requirements.txt").read_text()


def test_inputs_that_json_does_not_carry(tmp_path: Path) -> None:
    class Half(Doubling):
        inputs = ({"name": "x", "dtype": "float16", "shape": ["N", 4]},)

    with pytest.raises(StepFailed, match="its input x is float16, which no request in JSON holds"):
        pack("container", tmp_path, Stub(Half()))


def test_a_wheel_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.bundles import packing

    def broken(folder: Path) -> Path:
        folder.mkdir()
        (folder / "first-1.0-py3-none-any.whl").write_bytes(b"PK")
        return folder

    monkeypatch.setattr(packing, "wheels", broken)
    with pytest.raises(StepFailed, match=r"first-1\.0-py3-none-any\.whl is no wheel .*; remove .* and build again"):
        pack("container", tmp_path)


def test_it_says_why_it_is_not_proven_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(place: str) -> str:
        found: dict[str, Any] = report(pack("container", tmp_path / place))
        assert found["level"] == "L2"
        return str(found["why_not_higher"])

    here = {name: f"/usr/bin/{name}" for name in container.TOOLS}
    monkeypatch.setattr(shutil, "which", lambda name, **_: here.get(name))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert reason("a") == "images are built and run as root alone: build again as root"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "no base image to try it on (none in a test): mend that" in reason("b")
    base = tmp_path / "base.tar"
    proving = SimpleNamespace(values={"name": "x"}, image=None, scratch=tmp_path)
    monkeypatch.setattr(image, "BASE_PYTHON", container.python())
    monkeypatch.setattr(image, "no_sandbox", lambda scratch: "Operation not permitted")
    assert "no sandbox can be made here, as in a container without privileges (Operation not" in container._why_not(proving, base)
    monkeypatch.setattr(image, "BASE_PYTHON", "3.5")
    assert "and the base image that it would be tried on has 3.5" in container._why_not(proving, base)
    del here["runc"], here["bwrap"]
    assert reason("c") == "bwrap, runc not installed: run what edgebuild doctor --apt prints, and build again"
