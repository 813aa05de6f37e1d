"""The Kotlin of the android kind, compiled by Kotlin's own compiler; and hostile values, as Kotlin itself reads them."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edgebuild import bundle, render
from edgebuild.bundles import android
from tests.bundles import kotlin
from tests.bundles.hostile import WRITTEN
from tests.bundles.packing import Counting, Doubling, Stub, action
from tests.bundles.test_templates import survives

pytestmark = [pytest.mark.slow, pytest.mark.platform]
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "one": ("llamacpp", {}),
    "two": ("llamacpp", {"delivery": "on-demand"}),
    "three": ("onnxruntime", {}),
    "four": ("onnxruntime", {"delivery": "fast-follow", "pack": "ai-pack"}),
}
TELL = """
fun main() {
    println(org.json.JSONArray(listOf({{ values | join(", ") }})))
}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Every form of the modules, and hostile values, compiled at once; → the class path."""
    kotlin.needed()
    folder = tmp_path_factory.mktemp("kotlin")
    sources = [folder / "Tell.kt"]
    token = render.finalize(".kt")
    values = ", ".join(token(value) for value in WRITTEN if survives(value))
    sources[0].write_text(TELL.replace('{{ values | join(", ") }}', values), encoding="utf-8")
    for name, (framework, facts) in FORMS.items():
        model = folder / name / "artifact"
        model.mkdir(parents=True)
        (model / android.MODELS[framework]).write_bytes(b"model")
        language = framework == "llamacpp"
        made = action(
            "android",
            model,
            folder / name / "out",
            name=f"form-{name}",
            description='a "value" $(x) ${y} \\ ',
            task="text-generation" if language else "image-classification",
            platform={"name": "device", "description": "", "facts": facts},
        )
        bundle.run(made, framework, Stub(Counting() if language else Doubling()), android)
        sources += sorted(made.outputs["bundle"].glob("library/src/main/kotlin/*.kt"))
    assert len(sources) == 1 + 5 + 5 + 3 + 3
    return kotlin.compile(sources, folder / "classes")


def test_every_form_compiles(compiled: str) -> None:
    classes = Path(compiled.split(":")[0])
    for name in FORMS:
        assert (classes / f"edgebuild/form{name}model/Form{name.capitalize()}Model.class").is_file()
    native = subprocess.run(
        ["javap", "-p", "-s", "-cp", compiled, "edgebuild.formonemodel.Native"], capture_output=True, text=True, check=True
    ).stdout
    for name, signature in (("open", "([BII)J"), ("evaluate", "(J[I)[F"), ("tokens", "(J[B)[I"), ("ends", "(JI)Z")):
        assert f" {name}(" in native
        assert f"descriptor: {signature}\n" in native


def test_kotlin_reads_hostile_values_back(compiled: str) -> None:
    done = subprocess.run(
        ["java", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-cp", compiled, "TellKt"], capture_output=True, check=True
    )
    assert json.loads(done.stdout) == [value for value in WRITTEN if survives(value)]
