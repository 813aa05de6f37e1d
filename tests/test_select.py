"""`framework: auto` and `edgebuild recommend`: every row of the guide's matrices is kept, or the reason why not is printed."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jsonschema
import pytest

from edgebuild import load
from edgebuild.accelerators import Accelerators, accelerators
from edgebuild.assessment import look
from edgebuild.backend import Backend, Estimate, ModelFacts, Needs
from edgebuild.backends import BACKENDS, mlx
from edgebuild.fit import Fit, Misfit, Wanted, choose, written
from edgebuild.project import Project
from edgebuild.recommend import DEVICES, Asked, recommend
from edgebuild.select import Choice, Refused
from tests.conftest import ROOT, Lab
from tests.test_cli import BIN
from tests.test_cli import run as run_cli

PHI, DIGITS = str(ROOT / "targets/models/tiny-phi3"), str(ROOT / "targets/models/digits.onnx")
LANGUAGE, OTHER = "text-generation", "image-classification"
PLATFORMS = {
    "ios": "apple",
    "macos": "apple",
    "android": "arm-mobile",
    "web": "browser",
    "intel-server": "intel",
    "nvidia-server": "nvidia",
    "linux-arm64": "any",
    "jetson": "nvidia",
    "embedded-linux": "arm-embedded",
    "generic-cpu": "any",
}


def stand_in(formats: tuple[str, ...], schemes: Mapping[str, tuple[str, ...]], size: int = 1000, refuses: str = "") -> Backend:
    """A backend for what `fit` asks of one; the frameworks themselves have tests of their own."""
    found = SimpleNamespace(
        NEEDS=dict.fromkeys(formats, Needs(lock="", packages=())),
        SCHEMES=schemes,
        parameters=lambda scheme, quantize, calibrated: dict(quantize),
        refuse=lambda facts, parameters: refuses,
        estimate=lambda facts, scheme, parameters, available: Estimate(artifact=size, making=size, running=size),
    )
    return cast(Backend, found)


ALL = {
    "llamacpp": stand_in(("huggingface", "gguf"), {"q4_k_m": (), "q8_0": ()}),
    "openvino": stand_in(("onnx", "huggingface"), {"int8": (), "int4": ("group_size",)}),
    "olive": stand_in(("onnx", "huggingface"), {"int8": (), "int4": ()}),
    "mlx": stand_in(("huggingface",), {"int4": ("group_size",), "int8": ("group_size",)}),
    "onnxruntime": stand_in(("onnx", "huggingface"), {"int8": (), "int4": ()}),
}


def wanted(hardware: str, task: str = LANGUAGE, **other: Any) -> Wanted:
    form = "huggingface" if task == LANGUAGE else "onnx"
    billions = other.pop("billions", 1)
    architecture = "LlamaForCausalLM" if task == LANGUAGE else "Conv×3"
    facts = ModelFacts(format=form, architecture=architecture, parameters={"BF16": int(billions * 10**9)})
    return Wanted(
        **{"framework": "auto", "task": task, "format": form, "facts": facts, "hardware": hardware, "scheme": "auto", **other}
    )


def chosen(asked: Wanted, backends: Mapping[str, Backend] = ALL) -> Fit:
    return choose(asked, load.preferred(), backends)


def refused(choice: Choice, framework: str) -> Refused:
    return next(one for one in choice.refused if one.framework == framework)


# -- the rows, with all five frameworks -----------------------------------------------------------------------------------
# The matrix of hardware platforms: row → first and second framework, and what of that facts contradict.
@pytest.mark.parametrize(
    ("hardware", "primary", "secondary", "contradicted"),
    [
        ("intel", "openvino", "olive", {}),
        ("nvidia", "olive", "openvino", {"openvino": "no device for NVIDIA GPUs"}),
        ("apple", "mlx", "llamacpp", {}),
        ("arm-mobile", "llamacpp", "openvino", {}),
        ("arm-embedded", "llamacpp", "openvino", {}),
        ("edge-tpu", "openvino", "olive", {"openvino": "TensorFlow Lite models", "olive": "no execution provider"}),
    ],
)
def test_the_hardware_matrix(hardware: str, primary: str, secondary: str, contradicted: Mapping[str, str]) -> None:
    if hardware == "edge-tpu":
        with pytest.raises(Misfit) as caught:
            chosen(wanted(hardware))
        for framework, words in contradicted.items():  # so that nothing is left
            assert words in str(caught.value).partition(f"{framework}: ")[2], framework
        return
    choice = chosen(wanted(hardware)).choice
    assert choice.framework == primary
    assert "hardware matrix" in choice.reason
    if secondary in contradicted:
        assert contradicted[secondary] in refused(choice, secondary).reason
    else:
        assert choice.runner_up == secondary


@pytest.mark.parametrize(
    ("hardware", "task", "expected", "row"),
    [
        ("any", LANGUAGE, "llamacpp", "decision tree, cross-platform, language or text"),
        ("any", "automatic-speech-recognition", "openvino", "decision tree, cross-platform, multimodal"),
        ("any", OTHER, "onnxruntime", "mobile deployment, cross-platform"),
        ("browser", OTHER, "onnxruntime", "mobile deployment, cross-platform"),
        ("npu", OTHER, "openvino", "next-generation hardware, NPU"),
        ("quantum", OTHER, "onnxruntime", "for the CPU beside it"),
        ("neuromorphic", LANGUAGE, "llamacpp", "for the CPU beside it"),
        ("optical", LANGUAGE, "llamacpp", "for the CPU beside it"),
    ],
)
def test_the_decision_tree_and_new_hardware(hardware: str, task: str, expected: str, row: str) -> None:
    choice = chosen(wanted(hardware, task)).choice
    assert choice.framework == expected
    assert row in choice.to_json()["reason"]


# The matrix of requirements, and the two orders for prototypes and for enterprises: on hardware that all but MLX run on.
@pytest.mark.parametrize(
    ("prefer", "hardware", "first"),
    [
        ("multiplatform", "any", ["llamacpp", "openvino"]),
        ("integration", "any", ["openvino", "olive"]),
        ("mobile", "arm-mobile", ["llamacpp", "openvino"]),
        ("mobile", "apple", ["mlx", "llamacpp"]),
        ("realtime", "intel", ["openvino", "olive"]),  # all are excellent: the hardware decides
        ("diversity", "any", ["openvino", "olive"]),
        ("simplicity", "any", ["llamacpp", "olive"]),
        ("prototyping", "any", ["llamacpp", "mlx"]),
        ("prototyping", "intel", ["llamacpp", "olive"]),
        ("enterprise", "any", ["olive", "openvino"]),
        ("enterprise", "intel", ["olive", "openvino"]),
    ],
)
def test_the_requirements_matrix(prefer: str, hardware: str, first: list[str]) -> None:
    choice = chosen(wanted(hardware, prefer=prefer)).choice
    assert [choice.framework, choice.runner_up] == first
    assert f"preferred for {prefer}" in choice.reason
    if hardware != "apple" and hardware != "any":
        assert "Apple silicon alone" in refused(choice, "mlx").reason


def test_a_large_model_goes_to_olive_where_nothing_says_otherwise() -> None:
    assert chosen(wanted("any", billions=7)).choice.framework == "llamacpp"
    large = chosen(wanted("any", billions=7.1)).choice
    assert (large.framework, "more than 7 billion" in large.reason) == ("olive", True)
    assert chosen(wanted("apple", billions=70)).choice.framework == "mlx"
    assert chosen(wanted("intel", billions=70)).choice.framework == "openvino"


# Quantization, by the framework chosen; and the deployment configurations, which say the same.
@pytest.mark.parametrize(
    ("hardware", "task", "framework", "scheme"),
    [
        ("apple", LANGUAGE, "mlx", {"scheme": "int4", "group_size": 64}),
        ("intel", OTHER, "openvino", {"scheme": "int8"}),
        ("intel", LANGUAGE, "openvino", {"scheme": "int8"}),
        ("arm-mobile", LANGUAGE, "llamacpp", {"scheme": "q4_k_m"}),
        ("nvidia", LANGUAGE, "olive", {"scheme": "int4"}),
        ("nvidia", OTHER, "olive", {"scheme": "int8"}),
        ("any", OTHER, "onnxruntime", {"scheme": "int8"}),
    ],
)
def test_the_scheme_of_the_framework(hardware: str, task: str, framework: str, scheme: Mapping[str, Any]) -> None:
    fit = chosen(wanted(hardware, task))
    assert fit.choice.framework == framework
    assert {"scheme": fit.scheme, **fit.parameters} == scheme


# -- what facts contradict ------------------------------------------------------------------------------------------------
def test_a_network_for_images_on_llama_cpp() -> None:
    choice = chosen(wanted("arm-mobile", OTHER)).choice
    assert choice.framework == "openvino"
    assert refused(choice, "llamacpp").reason == (
        "llama.cpp runs language models alone, and this one, for image-classification, is Conv×3"
    )


def test_a_refusal_of_the_backend_goes_to_the_next() -> None:
    backends = {**ALL, "openvino": stand_in(("huggingface",), {"int8": ()}, refuses="its operator Foo is not known")}
    choice = chosen(wanted("intel"), backends).choice
    assert choice.framework == "olive"
    assert refused(choice, "openvino").reason == "openvino refuses it: its operator Foo is not known"


def test_what_edgebuild_does_not_have() -> None:
    backends = {name: backend for name, backend in ALL.items() if name in ("mlx", "onnxruntime")}
    choice = chosen(wanted("intel", OTHER), backends).choice
    assert choice.framework == "onnxruntime"
    assert refused(choice, "openvino").reason == "edgebuild has no openvino backend"
    with pytest.raises(
        Misfit, match=r"no framework takes it \(openvino: edgebuild has no openvino backend; .*; name one"
    ) as caught:
        chosen(wanted("intel"), {"mlx": ALL["mlx"]})
    assert caught.value.key == "framework"
    with pytest.raises(Misfit, match=r"\((\w+, )+\w+: has no scheme q4_k_m; it has: int4, int8, none\); name one"):  # said once
        chosen(wanted("intel", OTHER, scheme="q4_k_m"))


def test_constraints_of_the_target() -> None:
    assert chosen(wanted("apple", scheme="q4_k_m")).choice.framework == "llamacpp"
    assert "mlx has no scheme q4_k_m" in refused(chosen(wanted("apple", scheme="q4_k_m")).choice, "mlx").reason
    for_swift = wanted("arm-mobile", kind_refuses=lambda framework: "" if framework == "openvino" else "not for this bundle")
    assert chosen(for_swift).choice.framework == "openvino"
    exact = wanted("intel", quantize={"group_size": 32}, written={"group_size"}, scheme="int4")
    assert chosen(exact).parameters == {"group_size": 32}
    with pytest.raises(Misfit, match="scheme is none, so the other keys have no meaning"):
        chosen(wanted("intel", quantize={"group_size": 32}, written={"group_size"}, scheme="none"))


@pytest.mark.parametrize(
    ("limit", "words"),
    [({"weights": 1000, "copies": 2}, "exceed the limit of 1 kB"), ({"memory": 900}, "device's memory of 900 B")],
)
def test_what_is_too_large_is_taken_last(limit: dict[str, int], words: str) -> None:
    backends = {**ALL, "olive": stand_in(("huggingface",), {"int4": ()}, size=400)}
    choice = chosen(wanted("intel", **limit), backends).choice
    assert choice.framework == "olive"
    assert words in refused(choice, "openvino").reason
    alone = chosen(wanted("intel", **limit)).choice  # none fits: the first, and its reason says so
    assert alone.framework == "openvino"
    assert words in alone.reason


def test_settings_that_a_model_refuses_go_to_the_next() -> None:
    """A hidden size of 96 has no groups of 64."""
    narrow = ModelFacts(
        format="huggingface", architecture="Phi3ForCausalLM", model_type="phi3", hidden=96, parameters={"BF16": 1000}
    )
    fit = chosen(wanted("apple", facts=narrow), {"mlx": mlx})
    assert (fit.scheme, fit.parameters) == ("int4", {"group_size": 32})
    named = chosen(wanted("apple", facts=narrow, framework="mlx"), {"mlx": mlx})
    assert named.parameters == {"group_size": 32}


def test_what_is_quantized_already_stays_as_it_is() -> None:
    done = ModelFacts(format="gguf", architecture="llama", parameters={"Q4_K": 1000}, quantized="Q4_K")
    fit = chosen(wanted("arm-mobile", format="gguf", facts=done))
    assert (fit.choice.framework, fit.scheme, fit.parameters) == ("llamacpp", "none", {})
    with pytest.raises(Misfit, match=r"llamacpp: the model is quantized already \(Q4_K\), so the other keys have no meaning"):
        chosen(wanted("arm-mobile", format="gguf", facts=done, quantize={"group_size": 32}, written={"group_size"}))


def test_what_is_not_here_is_chosen_by_format_and_task() -> None:
    choice = chosen(wanted("apple", facts=None)).choice
    assert choice.framework == "mlx"
    assert "its headers are not here yet" in choice.reason


# -- the data, and the backends that there are ----------------------------------------------------------------------------
def test_the_data_know_what_they_speak_of() -> None:
    found = load.preferred()
    platform = json.loads((ROOT / "schemas/platform.json").read_text())["properties"]
    target = json.loads((ROOT / "schemas/target.json").read_text())["properties"]
    hardware = set(platform["hardware"]["enum"])
    named = {framework for row in found.rows for framework in row.frameworks}
    named |= {framework for groups in found.prefer.values() for group in groups for framework in group}
    assert named <= set(found.frameworks)
    assert set(found.schemes) == set(found.frameworks)
    assert {name for name in BACKENDS if name != "fake"} <= set(found.frameworks)  # a new backend stands in the data
    assert set(found.prefer) == set(target["prefer"]["enum"])
    assert set(found.tasks) <= set(load.tasks())
    for row in found.rows:
        assert set(row.hardware) <= hardware, row
        assert set(row.kinds) <= {"other", *found.tasks.values()}, row
    for facts in found.frameworks.values():
        assert {*facts.runs, *facts.never} <= hardware
    assert set(found.notes) <= hardware


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "fake"])
def test_preferred_schemes_are_those_that_backends_have(name: str) -> None:
    for kind in ("text-generation", "other"):
        settings = load.preferred().settings(name, kind)
        assert any(one["scheme"] in BACKENDS[name].SCHEMES for one in settings) or kind == "text-generation"


@pytest.mark.parametrize(("platform", "hardware"), PLATFORMS.items())
@pytest.mark.parametrize(("model", "task"), [(PHI, LANGUAGE), (DIGITS, OTHER)])
def test_recommend_on_every_platform(platform: str, hardware: str, model: str, task: str) -> None:
    """With the backends that there are: the first framework of the rows, or for each before it the reason why not."""
    text, status = recommend(Asked(model=model, platform=platform, task=task), str(ROOT), as_json=True)
    found = json.loads(text)
    jsonschema.validate(found, json.loads((ROOT / "schemas/recommend.json").read_text()))
    assert load.platform(str(ROOT), platform).hardware == hardware
    order = load.preferred().candidates(hardware, task, "", sum(look(model).parameters.values()))
    if status:
        assert all(f"{one.framework}: " in found["none"] for one in order)
        return
    reasons = {one["framework"]: one["reason"] for one in found["choice"]["refused"]}
    fitting = [one.framework for one in order if one.framework not in reasons]
    assert found["choice"]["framework"] == fitting[0]
    assert found["choice"]["runner_up"] == (fitting[1] if fitting[1:] else "")
    lines, _ = recommend(Asked(model=model, platform=platform, task=task), str(ROOT), as_json=False)
    assert all(reason in lines for reason in reasons.values())


def test_every_platform_builds_or_says_why_not(lab: Lab) -> None:
    """Each built-in platform is a file that loads; a framework that is chosen is one of edgebuild's."""
    names = set(load.platform_names(str(ROOT)))
    assert set(PLATFORMS) <= names
    for name in names:
        (lab.root / "targets" / f"p-{name}.yaml").write_text(
            f"edgebuild: 1\nmodel: {{source: {DIGITS}, task: {OTHER}}}\nplatform: {name}\nevaluate: {{data: {DIGITS}}}\n"
        )
    os.chdir(lab.root)
    project = Project()
    for name in names:
        reasons = ("model.source: ", "platform: cortex-m: emlearn takes chains of Gemm")
        assert f"p-{name}" in project.targets or any(reason in project.problems[f"p-{name}"] for reason in reasons)


# -- the command ----------------------------------------------------------------------------------------------------------
def run(*words: str, status: int = 0, folder: Path = ROOT) -> str:
    done = subprocess.run([str(BIN / "edgebuild"), "recommend", *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_settings_are_told_as_a_target_says_them() -> None:
    backend = BACKENDS["mlx"]
    layers = backend.parameters("int4", {"layers": {"lm_head": "int8"}}, False)
    assert written(backend, "int4", layers) == "int4, group_size 64, layers {lm_head: int8}"
    backend = BACKENDS["openvino"]
    ratio = backend.parameters("int4", {"ratio": 0.5, "symmetric": True, "exclude": ["Conv"]}, False)
    assert written(backend, "int4", ratio) == "int4, group_size 64, symmetric, ratio 0.5, exclude [Conv]"
    assert written(backend, "none", {}) == "none"


def test_the_command(tmp_path: Path) -> None:
    lines = run(PHI, "--platform", "macos", folder=tmp_path).splitlines()
    assert lines[0] == "for text-generation on macos (apple)"
    assert lines[1] == "choice      mlx: Metal and unified memory (hardware matrix, Apple silicon)"
    assert lines[2] == "quantize    int4, group_size 64"
    assert "operators that fall back: not asked: no such device here" in "\n".join(lines)
    plain = run(DIGITS, "--platform", "web", "--task", OTHER, folder=tmp_path).splitlines()
    assert plain[2] == "quantize    int8, method dynamic"  # a backend's own settings are in no target
    named = run(PHI, "--platform", "ios", folder=tmp_path)
    assert "ios names mlx" in named


def test_it_recommends_nothing_that_the_platforms_bundle_refuses() -> None:
    """On `cortex-m` chains of Gemm alone: what a target that says `framework: auto` is told too."""
    mlp = str(ROOT / "targets/models/digits-mlp.onnx")
    text, status = recommend(Asked(model=mlp, platform="cortex-m", task=OTHER), str(ROOT), as_json=True)
    found = json.loads(text)
    assert (status, found["choice"]["framework"], found["quantize"]) == (0, "onnxruntime", {"scheme": "none"})
    refused = {one["framework"]: one["reason"] for one in found["choice"]["refused"]}
    assert "the framework is openvino; name framework: onnxruntime" in refused["openvino"]
    text, status = recommend(Asked(model=DIGITS, platform="cortex-m", task=OTHER), str(ROOT), as_json=False)
    assert status == 1
    assert (
        "onnxruntime: emlearn takes chains of Gemm and activations (Relu, Sigmoid, Tanh, Softmax), and this model has Conv"
        in text
    )


def test_auto_takes_what_the_device_takes(lab: Lab) -> None:
    target = "edgebuild: 1\nmodel: {{source: {}, task: " + OTHER + "}}\nplatform: cortex-m\nframework: auto\n"
    for name, model in (("chain", ROOT / "targets/models/digits-mlp.onnx"), ("other", DIGITS)):
        (lab.root / "targets" / f"{name}.yaml").write_text(target.format(model))
    os.chdir(lab.root)
    project = Project()
    assert project.recipes[project.steps["convert:chain"].recipe]["backend"] == "onnxruntime"
    assert "onnxruntime: cortex-m: emlearn takes chains of Gemm" in project.problems["other"]


@pytest.mark.parametrize(
    ("found", "unavailable", "says"),
    [
        (("H100, 80 GB",), "", "not asked: edgebuild has no backend that runs on H100, 80 GB"),
        ((), "no nvidia-smi here", "not asked: no such device here (no nvidia-smi here)"),
    ],
)
def test_operators_that_fall_back(found: tuple[str, ...], unavailable: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Accelerators(kind="NVIDIA GPU", found=found, unavailable=unavailable)
    monkeypatch.setattr("edgebuild.recommend.accelerators", lambda: [gpu])
    text, _ = recommend(Asked(model=DIGITS, platform="nvidia-server", task=OTHER), str(ROOT), as_json=True)
    assert json.loads(text)["fallback"] == says
    text, _ = recommend(Asked(model=DIGITS, platform="generic-cpu", task=OTHER), str(ROOT), as_json=True)
    assert json.loads(text)["fallback"] == ""


def test_kinds_of_accelerators_are_those_that_are_looked_for() -> None:
    assert {one.kind for one in accelerators()} >= set(DEVICES.values())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--platform", "androi"], 'Did you mean "android"?'),
        (["--platform", "android", "--task", "text-genration"], 'Did you mean "text-generation"?'),
        (["--platform", "android", "--prefer", "enterprice"], 'Did you mean "enterprise"?'),
        ([], "--platform"),
    ],
)
def test_wrong_words(words: list[str], says: str) -> None:
    assert says in run(DIGITS, *words, status=3)


def test_no_framework(tmp_path: Path) -> None:
    (tmp_path / "targets").mkdir()
    (tmp_path / "dodo.py").touch()
    (tmp_path / "platforms").mkdir()
    coral = "edgebuild: 1\nhardware: edge-tpu\nframework: auto\nquantize: {scheme: auto}\npackage: {kind: folder}\n"
    (tmp_path / "platforms/coral.yaml").write_text(coral)
    text = run(DIGITS, "--platform", "coral", folder=tmp_path, status=1)
    assert text.startswith("none: no framework takes it (openvino: OpenVINO's devices are CPU, GPU and NPU; an Edge TPU runs")
    found = json.loads(run(DIGITS, "--platform", "coral", "--json", folder=tmp_path, status=1))
    jsonschema.validate(found, json.loads((ROOT / "schemas/recommend.json").read_text()))


# -- targets --------------------------------------------------------------------------------------------------------------
AUTO = f"edgebuild: 1\nmodel: {{source: m.onnx, task: {OTHER}}}\nplatform: generic-cpu\n"


def project(lab: Lab, text: str = AUTO) -> Project:
    (lab.root / "targets/one.yaml").write_text(text)
    os.chdir(lab.root)
    return Project()


def recipe(found: Project, step: str) -> dict[str, Any]:
    assert not found.problems, found.problems
    return found.recipes[found.steps[step].recipe]


def test_the_choice_is_in_the_evidence(lab: Lab) -> None:
    (lab.root / "m.onnx").write_bytes(Path(DIGITS).read_bytes())
    (lab.root / "targets/one.yaml").write_text(AUTO)
    result = run_cli(lab, "build:one")
    assert result.returncode == 0, result.stdout + result.stderr
    evidence = json.loads((lab.root / "dist/one.evidence.json").read_text())
    jsonschema.validate(evidence, json.loads((ROOT / "schemas/evidence.json").read_text()))
    assert evidence["choice"]["framework"] == "onnxruntime"
    assert "mobile deployment, cross-platform" in evidence["choice"]["reason"]
    shown, _ = recommend(Asked(model=DIGITS, platform="generic-cpu", task=OTHER), str(lab.root), as_json=True)
    assert evidence["choice"]["refused"] == json.loads(shown)["choice"]["refused"]


def test_scheme_auto_is_the_scheme_that_it_stands_for(lab: Lab) -> None:
    (lab.root / "m.onnx").write_bytes(Path(DIGITS).read_bytes())
    auto = recipe(project(lab), "quantize:one")["params"]
    assert auto["scheme"] == "int8"
    named = recipe(project(lab, AUTO + "framework: onnxruntime\nquantize: {scheme: int8}\n"), "quantize:one")["params"]
    assert auto == named


def test_the_choice_follows_the_model(lab: Lab) -> None:
    """A plan is made anew where a header changed that had a say in it, and not where other bytes did."""
    folder = lab.root / "phi"
    folder.mkdir()
    for path in Path(PHI).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    text = AUTO.replace("m.onnx", "phi").replace(OTHER, LANGUAGE).replace("generic-cpu", "macos")
    assert recipe(project(lab, text), "convert:one")["backend"] == "mlx"
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"model_type": "phi3"', '"model_type": "unheard-of"'))
    changed = Project()
    said = changed.problems.get("one") or str(recipe(changed, "build:one")["params"]["choice"]["refused"])
    assert "mlx-lm knows no model type" in said
    (folder / "config.json").write_text("{")
    damaged = recipe(Project(), "build:one")["params"]["choice"]  # fetch will say so
    assert "its headers are not here yet" in damaged["reason"]
    (folder / "config.json").write_text(config)
    assert not Project().problems


def test_a_lone_graph_that_changes(lab: Lab) -> None:
    """The cached plan holds while its headers say the same; a model that is damaged and mended is planned both times."""
    path, right = lab.root / "m.onnx", Path(DIGITS).read_bytes()
    path.write_bytes(right)
    before = recipe(project(lab), "build:one")["params"]["choice"]
    path.write_bytes(right[:-10] + bytes(10))
    assert recipe(Project(), "build:one")["params"]["choice"] == before
    path.write_bytes(right[:5000])
    assert "truncated or damaged" in Project().problems["one"]
    path.write_bytes(right)
    assert recipe(Project(), "build:one")["params"]["choice"] == before


def test_memory_of_a_platform(lab: Lab) -> None:
    (lab.root / "m.onnx").write_bytes(Path(DIGITS).read_bytes())
    small = "edgebuild: 1\nframework: auto\nquantize: {scheme: auto}\npackage: {kind: folder}\nfacts: {memory: %s}\n"
    (lab.root / "platforms/small.yaml").write_text(small % "100kB")
    found = recipe(project(lab, AUTO.replace("generic-cpu", "small")), "build:one")["params"]["choice"]
    assert "exceed the device's memory of 100 kB" in found["reason"]
    (lab.root / "platforms/small.yaml").write_text(small % "much")
    assert "platforms/small.yaml:5: facts.memory: must be a size above 0" in Project().problems["one"]


def test_the_choice_is_the_same_whatever_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = recommend(Asked(model=PHI, platform="macos"), str(ROOT), as_json=True)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "missing")
    monkeypatch.setitem(__import__("sys").modules, "mlx_lm", None)
    monkeypatch.setitem(__import__("sys").modules, "mlx", None)
    assert recommend(Asked(model=PHI, platform="macos"), str(ROOT), as_json=True) == before
