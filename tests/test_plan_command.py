"""`edgebuild plan`: what it says a build would do is what a build then does; amounts; and what cannot pass, before any work."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edgebuild import environment, feasible, toolchain
from edgebuild.assess import assess
from edgebuild.backend import ModelFacts
from edgebuild.backends import BACKENDS, mlx, onnxruntime
from edgebuild.bundle import Copies
from edgebuild.feasible import Disk, Finding, Room
from edgebuild.forecast import Amount, Forecast, Prospect, forecast
from edgebuild.project import Project
from edgebuild.resources import Memory, memory
from tests.conftest import PLATFORM, ROOT, TARGET, Lab, write_model
from tests.test_cli import run

ROOMY = Room(memory=Memory(total=10**12, available=10**12, cgroup_limit=None), disks=(Disk(path="/", writes=0, free=10**12),))


def planned(lab: Lab, status: int = 0) -> dict[str, Any]:
    result = run(lab, "plan", "one", "--json", program="edgebuild")
    assert result.returncode == status, result.stdout + result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    jsonschema.validate(found, json.loads((ROOT / "schemas" / "plan.json").read_text()))
    return found


def wills(found: dict[str, Any]) -> dict[str, str]:
    return {step["name"]: step["will"] for step in found["steps"]}


def forecast_of(lab: Lab, target: str = TARGET) -> Forecast:
    (lab.root / "targets" / "one.yaml").write_text(target)
    os.chdir(lab.root)
    return forecast(Project(), "one")


def found(lab: Lab, target: str, here: Room = ROOMY) -> dict[str, Finding]:
    return {finding.subject: finding for finding in feasible.findings(forecast_of(lab, target), here)}


def test_what_is_planned_is_what_happens(lab: Lab) -> None:
    """Before anything ran, after an edit, after `clean`, and when all is done."""
    first = planned(lab)
    assert set(wills(first).values()) == {"run", "depends"}
    assert wills(first)["fetch:one"] == "run"
    assert not (lab.root / "build").exists()
    assert not (lab.root / "dist").exists()
    assert not (lab.root / ".edgebuild" / "objects").exists()
    assert set(lab.build().values()) == {"ran"}
    assert set(wills(planned(lab)).values()) == {"nothing"}
    write_model(lab.root / "model.gguf", "another")
    shown = run(lab, "plan", "one", program="edgebuild").stdout.splitlines()
    assert shown[1].split()[:2] == ["fetch:one", "run"]
    assert shown[5].split()[:2] == ["quantize:one", "run?"]
    edited = wills(planned(lab))
    assert edited["fetch:one"] == "run"
    assert {name for name, will in edited.items() if will == "run"} == {"fetch:one", "assess:one"}
    lab.build()
    assert run(lab, "clean").returncode == 0
    assert set(wills(planned(lab)).values()) == {"restore"}
    assert set(lab.build().values()) == {"restored"}


def test_what_can_be_known_behind_a_restored_step(lab: Lab) -> None:
    """A changed parameter of a late step: the early ones are restored, that one runs, and its followers depend on it."""
    lab.build()
    run(lab, "clean")
    (lab.root / "targets" / "one.yaml").write_text(TARGET + "package: {version: 2.0.0}\n")
    expected = wills(planned(lab))
    assert expected["gate:one"] == "restore"
    assert expected["package:one"] == "run"
    assert expected["build:one"] == "depends"
    outcomes = lab.build()
    assert {name for name, outcome in outcomes.items() if outcome == "ran"} == {"package:one", "build:one"}


def test_what_was_measured_under_the_same_key_is_said(lab: Lab) -> None:
    assert {step["makes"]["basis"] for step in planned(lab)["steps"]} == {"estimated", "unknown"}
    run(lab)
    run(lab, "clean")
    after = {step["name"]: step for step in planned(lab)["steps"]}
    size = sum(path.stat().st_size for path in (lab.root / ".edgebuild" / "objects").rglob("*") if path.is_file())
    assert after["quantize:one"]["makes"]["basis"] == "measured"
    assert 0 < after["quantize:one"]["makes"]["bytes"] < size
    assert after["convert:one"]["memory"]["basis"] == "measured"
    assert after["gate:one"]["memory"] == {"bytes": None, "basis": "unknown", "reason": "headers and small files only"}


def test_a_source_that_is_not_here_is_not_guessed_at(lab: Lab) -> None:
    remote = forecast_of(
        lab, TARGET.replace("{source: model.gguf", f'{{source: "https://127.0.0.1:1/m.gguf", sha256: "{"0" * 64}"')
    )
    assert remote.unknown == "known after fetch:one"
    assert remote.facts is None
    assert not remote.refused
    amounts = {one.name: one.makes for one in remote.prospects}
    assert amounts["convert:one"].bytes is None
    assert amounts["convert:one"].reason == "known after fetch:one"
    assert feasible.findings(remote, ROOMY) == []
    assert feasible.largest(remote, ROOMY) is None
    assert "sizes and memory: known after fetch:one" in run(lab, "plan", "one", program="edgebuild").stdout


def test_a_refused_source(lab: Lab) -> None:
    os.chdir(lab.root)
    project = Project()
    (lab.root / "model.gguf").write_bytes(b"GGUF" + bytes(4))
    damaged = forecast(project, "one")
    assert damaged.refused
    assert [finding.subject for finding in feasible.findings(damaged, ROOMY)] == ["model.source"]


def test_a_gate_that_failed_on_these_very_measurements(lab: Lab) -> None:
    (lab.root / "targets" / "one.yaml").write_text(TARGET + "gates: {snr: {min: 900}}\n")
    assert planned(lab)["passes"]
    assert run(lab).returncode == 1
    again = planned(lab, status=1)
    assert wills(again)["gate:one"] == "restore"
    assert wills(again)["package:one"] == "blocked"
    assert [finding["subject"] for finding in again["findings"]] == ["gate:one"]
    assert "gate snr FAIL" in again["findings"][0]["message"]


@pytest.mark.parametrize(
    ("gate", "certain", "words"),
    [
        ("cosine: {min: 2}", True, "at most 1"),
        ("consistency: {max: 0.5}", True, "at least 1"),
        ("latency_ratio: {max: 1}", False, "INCONCLUSIVE"),
        ("latency_ratio: {max: 1, required: true}", True, "required"),
        ("weights_ratio: {max: 0.5}", True, "choose a smaller scheme"),
        ("weights_ratio: {min: 4}", True, "choose a larger scheme"),
    ],
)
def test_gates_that_cannot_pass(lab: Lab, gate: str, certain: bool, words: str) -> None:
    write_model(lab.root / "model.gguf", "x" * 5000)
    (subject,) = gate.split(":")[:1]
    finding = found(lab, TARGET + f"gates: {{{gate}}}\n")[f"gates.{subject}"]
    assert finding.certain == certain
    assert words in finding.message


def test_a_waived_gate_and_one_that_may_pass_are_not_spoken_of(lab: Lab) -> None:
    gates = 'cosine: {min: 2, waive: {reason: "known", until: "2099-01-01"}}, weights_ratio: {max: 1.2}'
    write_model(lab.root / "model.gguf", "x" * 5000)
    assert found(lab, TARGET + f"gates: {{{gates}}}\n") == {}


def test_a_gate_on_memory_below_the_weights(lab: Lab) -> None:
    (lab.root / "platforms" / "fake.yaml").write_text(PLATFORM.replace('benchmark: {not_measured: "a fake device"}\n', ""))
    write_model(lab.root / "model.gguf", "x" * 5000)
    finding = found(lab, TARGET + "gates: {peak_memory: {max: 1000}}\n")["gates.peak_memory"]
    assert finding.certain
    assert "1 kB is below the weights alone, about 5.1" in finding.message


def test_a_weights_limit(lab: Lab) -> None:
    write_model(lab.root / "model.gguf", "x" * 5000)
    limits = "package: {limits: {weights: %s}}\n"
    assert found(lab, TARGET + limits % "6kB") == {}
    finding = found(lab, TARGET + limits % "4kB")["package.limits.weights"]
    assert finding.certain
    assert finding.message == (
        "the weights in the bundle, about 5.11 kB, against a limit of 4 kB: no scheme of fake fits; or raise the limit"
    )
    assert not found(lab, TARGET + limits % "5kB")["package.limits.weights"].certain  # within the margin


def test_memory_and_disk(lab: Lab) -> None:
    (lab.root / "model.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16) + b"y" * 20_000_000)
    little = Memory(total=10**9, available=20_000_000, cgroup_limit=None)
    full = Room(memory=little, disks=(Disk(path="/full", writes=40_000_000, free=30_000_000),))
    findings = found(lab, TARGET + "limits: {memory: 500MB}\n", full)
    assert findings["memory available"].certain
    assert findings["disk"].certain
    assert not findings["limits.memory"].certain  # within estimate × 1.15 + 0.5 GB
    assert "free space" in findings["disk"].message
    assert "against 500 MB: raise limits.memory" in findings["limits.memory"].message
    assert found(lab, TARGET + "limits: {memory: 5GB}\n") == {}


DIGITS = (
    f"edgebuild: 1\nmodel: {{source: {ROOT / 'targets' / 'models' / 'digits.onnx'}, task: image-classification}}\n"
    "platform: generic-cpu\nframework: onnxruntime\nquantize: {scheme: none}\n"
)
PACKED = {  # what a target says of its package → copies that are made, and those that are gone afterwards
    "kind: folder": (2, 0),
    "kind: onnx": (4, 0),
    "kind: android": (4, 0),  # once more in the archive, when the unsigned APK is gone
    "kind: android, archive: false": (2, 1),
    "kind: firmware": (6, 0),
    "kind: firmware, archive: false": (3, 2),
}


@pytest.mark.parametrize(("packed", "copies"), PACKED.items())
def test_disk_for_all_that_packing_makes(lab: Lab, packed: str, copies: tuple[int, int]) -> None:
    """The APK for tests, images and archives: by what the kind says of itself."""
    expected = forecast_of(lab, DIGITS + f"package: {{{packed}}}\n")
    weights = expected.candidate.bytes
    assert weights
    package = next(step for step in expected.prospects if step.verb == "package")
    assert (package.makes.bytes, package.scratch.bytes) == tuple(weights * count for count in copies)
    makes, scratch = copies
    (disk,) = feasible.room(Project(), expected).disks
    assert disk.writes == weights * (1 + max(2 * makes, makes + scratch))  # the artifact; then in the store and in dist/


def test_disk_for_wheels_and_images(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a container: its wheels once they are here, and while it is tried an image of gigabytes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def packing() -> Prospect:
        expected = forecast_of(lab, DIGITS + "package: {kind: container, archive: false}\n")
        return next(step for step in expected.prospects if step.verb == "package")

    package = packing()
    lock = toolchain.read("container-onnxruntime")
    assert lock is not None
    with environment.beside(lock.digest) as path:
        os.makedirs(f"{path}/wheels")
        made = environment.Environment(
            name=lock.name, digest=lock.digest, lock=lock.text, python="", packages=1, bytes=10**8, form="wheels"
        )
        environment.put(path, made)
    then = packing()
    assert then.makes.bytes == (package.makes.bytes or 0) + 10**8
    assert then.scratch.bytes == package.scratch.bytes
    assert (package.scratch.bytes or 0) > 10**9


def test_disks_apart() -> None:
    """Two file systems: what is made lies in the store, copies of it in the project; each at its fullest."""

    def step(verb: str, will: str, makes: int, scratch: int) -> Prospect:
        amounts = {name: Amount(bytes=size, basis="estimated") for name, size in (("makes", makes), ("scratch", scratch))}
        unknown = Amount(bytes=None, basis="unknown")
        return Prospect(name=f"{verb}:t", verb=verb, state="", will=will, ran=False, reason="", memory=unknown, **amounts)

    steps = [step("convert", "restore", 5, 0), step("quantize", "run", 10, 50), step("package", "depends", 20, 25)]
    assert feasible.writes(steps, 1, 2) == {1: 60, 2: 35}  # quantizing, the store is at its fullest
    assert feasible.writes(steps, 1, 1) == {1: 60}
    assert feasible.writes([*steps, step("build", "run", 15, 0)], 1, 1) == {1: 65}


def test_the_largest_model_that_fits_does_fit_and_twice_it_does_not() -> None:
    facts = ModelFacts(
        format="huggingface",
        parameters={"BF16": 3_821_079_552},
        weights={"": 3_820_000_000},
        largest=98_500_000,
        vocabulary=32064,
    )
    fits = feasible.largest(forecast_with(facts, choice_of()), ROOMY)
    assert fits is not None
    parameters, binds = fits
    assert binds == "package.limits.weights 2.5 GB"
    weight = mlx.estimate(facts, "int4", {"group_size": 64}, 10**11).artifact / sum(facts.parameters.values())
    assert parameters * weight == pytest.approx(2.5e9, rel=1e-3)

    def within(available: int) -> tuple[int, str] | None:
        little = Memory(total=25 * 10**9, available=available, cgroup_limit=None)
        return feasible.largest(forecast_with(facts, choice_of(available)), replace(ROOMY, memory=little))

    tight = within(6 * 10**9)
    assert tight is not None
    assert tight[1] == "6 GB of memory available"
    assert 2 * tight[0] * 1.15 < 5.5e9  # bfloat16, as converted: float32 weights are not kept where there is no room
    assert tight[0] < parameters
    assert within(10**8) is None


def choice_of(available: int = 10**12) -> Any:
    from edgebuild.forecast import Choice

    return Choice(
        framework="mlx",
        backend=BACKENDS["mlx"],
        scheme="int4",
        parameters={"group_size": 64},
        calibrated=False,
        copies=Copies(),
        archived=True,
        gates={},
        not_measured="",
        weights_limit=2_500_000_000,
        memory_limit=None,
        available=available,
    )


def forecast_with(facts: ModelFacts, choice: Any) -> Forecast:
    from edgebuild.forecast import Amount

    baseline, candidate = (Amount(bytes=one.artifact, basis="estimated") for one in choice.estimates(facts))
    return Forecast(
        target="t",
        choice=choice,
        facts=facts,
        unknown="",
        refused=False,
        prospects=[],
        toolchains=[],
        baseline=baseline,
        candidate=candidate,
    )


def test_a_limit_that_another_scheme_meets() -> None:
    """7.2 billion parameters in int4 are 4.05 GB; of what fits 2.5 GB, int2 in groups of 64 is the largest."""
    facts = ModelFacts(format="huggingface", parameters={"BF16": 7_200_000_000}, weights={"": 7_200_000_000}, largest=10**8)
    (finding,) = feasible.findings(forecast_with(facts, choice_of()), ROOMY)
    assert finding.certain
    assert "about 4.05 GB, against a limit of 2.5 GB" in finding.message
    assert "quantize: {scheme: int2, group_size: 64} would fit (about 2.25 GB)" in finding.message
    assert "a model of about 4.44 billion parameters" in finding.message


# -- estimates against what was really made -----------------------------------------------------------------------------
def test_estimates_of_the_published_conversion() -> None:
    """A Phi-3 of 3,821,079,552 parameters: 4 bits in groups of 64 made 2.150 GB, 8 bits 4.061 GB, bfloat16 7.643 GB; 0.32 to 1.02 GB of memory at most."""
    matrices = 2 * 32064 * 3072 + 32 * (3 * 3072 * 3072 + 3072 * 3072 + 3 * 8192 * 3072)
    total = matrices + 65 * 3072
    assert total == 3_821_079_552
    facts = ModelFacts(
        format="huggingface", parameters={"BF16": total}, weights={"": matrices}, largest=98_500_608, vocabulary=32064
    )
    for scheme, size in {"int4": 2.150e9, "int8": 4.061e9, "none": 7.643e9}.items():
        assert mlx.estimate(facts, scheme, {"group_size": 64}, 10**11).artifact == pytest.approx(size, rel=0.01)
    for scheme, used in {"int2": 1.021e9, "int4": 0.707e9, "int8": 0.555e9, "none": 0.322e9}.items():  # none: cast to float16
        assert used <= mlx.estimate(facts, scheme, {"group_size": 64}, 10**11).making <= used * feasible.OVER
    assert mlx.estimate(facts, "int4", {"group_size": 64}, 10**11).running > 4 * total
    assert mlx.estimate(facts, "int4", {"group_size": 64}, 20 * 10**9).running < 3.5e9  # a layer at a time


def test_a_mixture_of_experts_is_stacked_by_layers() -> None:
    """As Qwen3-30B-A3B, whose largest tensor is its embedding: no more than what a layer has is ever one tensor."""
    count = 30_532_122_624
    facts = ModelFacts(
        format="huggingface", parameters={"BF16": count}, weights={"": count}, largest=151_936 * 2048, layers=48, experts=128
    )
    layer = 128 * 768 * 2048  # elements of what one layer's experts have of one kind
    for scheme, each in (("none", 2 + 2), ("int4", 2 + 0.5625)):
        making = mlx.estimate(facts, scheme, {"group_size": 64}, 10**11).making
        assert layer * each < making < count / 48 * each * 1.5


@pytest.mark.slow
def test_estimates_of_real_conversions(tmp_path: Path) -> None:
    """The examples, through the real frameworks: sizes within 5 %."""
    from tests.backends import test_mlx

    folder = ROOT / "targets" / "models" / "tiny-phi3"
    facts = assess({f"model/{path.name}": path for path in folder.iterdir()})
    test_mlx.convert(folder, tmp_path / "convert")
    converted = tmp_path / "convert" / "model"
    sizes = {"none": size_of(converted)}
    for scheme in ("int3", "int4", "int8"):
        test_mlx.quantize(converted, tmp_path / scheme, scheme=scheme)
        sizes[scheme] = size_of(tmp_path / scheme / "model")
    for scheme, size in sizes.items():
        assert mlx.estimate(facts, scheme, {"group_size": 64}, 10**11).artifact == pytest.approx(size, rel=0.05), scheme


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_estimates_of_a_real_onnx_model(tmp_path: Path, method: str) -> None:
    from edgebuild.step import Action

    model = ROOT / "targets" / "models" / "digits.onnx"
    facts = assess({"model": model})
    assert facts.weights == {"Conv": 55_584, "Gemm": 102_144}  # of 158,284 elements; the rest are biases and a shape
    (tmp_path / "in").mkdir()
    shutil.copy(model, tmp_path / "in" / "model.onnx")
    parameters = onnxruntime.parameters("int8", {"method": method}, calibrated=True)
    inputs = {"model": tmp_path / "in", "calibration": ROOT / "targets" / "data" / "digits-calibration.npz"}
    outputs = {"model": tmp_path / "model", "report": tmp_path / "report.json"}
    onnxruntime.quantize(
        Action(
            verb="quantize",
            backend="onnxruntime",
            params={"scheme": "int8", **parameters, "samples": 20},
            inputs=inputs,
            outputs=outputs,
        ),
        facts,
    )
    assert onnxruntime.estimate(facts, "int8", parameters, 10**11).artifact == pytest.approx(
        size_of(tmp_path / "model"), rel=0.05
    )


def test_weights_in_constants_are_weights_too(tmp_path: Path) -> None:
    """Some exporters write no initialisers."""
    import onnx
    from onnx import helper

    model = onnx.load(ROOT / "targets" / "models" / "digits.onnx")
    constants = [helper.make_node("Constant", [], [one.name], value=one) for one in model.graph.initializer]
    nodes = [*constants, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, tmp_path / "model.onnx")
    facts, before = assess({"model": tmp_path / "model.onnx"}), assess({"model": ROOT / "targets" / "models" / "digits.onnx"})
    assert (facts.weights, facts.largest, facts.parameters) == (before.weights, before.largest, before.parameters)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# -- resources ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", [1, 2])
def test_a_cgroup_limit_is_found_in_any_folder_above(tmp_path: Path, version: int) -> None:
    line, root = ("0::/a/b", tmp_path / "fs") if version == 2 else ("4:memory:/a/b", tmp_path / "fs" / "memory")
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / names[0]).write_text("300000000\n")
    (root / "a" / names[1]).write_text("100000000\n")
    (root / "a" / "b" / names[0]).write_text("max\n" if version == 2 else f"{2**63 - 4096}\n")
    (root / "a" / "b" / names[1]).write_text("5\n")
    (tmp_path / "cgroup").write_text(f"9:cpu:/\n{line}\n")
    found = memory(tmp_path / "cgroup", tmp_path / "fs")
    assert found.cgroup_limit == 300_000_000
    assert found.available == 200_000_000
    assert memory(tmp_path / "none", tmp_path / "fs").cgroup_limit is None
