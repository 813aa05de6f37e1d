"""One file, many targets: names, what is shared, problems of one and of all, clashes, removal, and the commands."""

import json
import os
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgebuild import document, load, matrix
from edgebuild.files import unsealed
from edgebuild.project import Project
from tests.conftest import PLATFORM, ROOT, TARGET, Lab, make_lab, write_model
from tests.test_cli import last_run, run

HEAD = TARGET.replace("platform: fake\n", "")


def write(lab: Lab, text: str, name: str = "phone") -> Project:
    """The lab with this file and a second fake platform, and without its own target."""
    (lab.root / "targets" / "one.yaml").unlink(missing_ok=True)
    (lab.root / "platforms" / "small.yaml").write_text(PLATFORM.replace("int8", "int4"))
    (lab.root / "targets" / f"{name}.yaml").write_text(text)
    os.chdir(lab.root)
    return Project()


def test_a_target_for_each_combination_named_in_the_order_of_the_keys(lab: Lab) -> None:
    project = write(lab, HEAD + "matrix:\n  quantize.group_size: [32, 64]\n  platform: [fake, small]\n")
    assert list(project.targets) == ["phone-32-fake", "phone-32-small", "phone-64-fake", "phone-64-small"]
    assert project.groups == {"phone": list(project.targets)}
    assert project.problems == {}
    targets = load.Targets(".", ["phone"])
    for name, (size, platform) in zip(project.targets, product((32, 64), ("fake", "small")), strict=True):
        target = targets.target(name)
        assert (target.quantize["group_size"], target.platform.name) == (size, platform)
        assert target.scheme == ("int8" if platform == "fake" else "int4")
        assert target.lines["quantize.group_size"] == target.lines["quantize"] == 5


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("ios", "ios"),
        ("Q4_K_M", "q4_k_m"),
        ("0.50", "0.50"),
        ("true", "true"),
        ("models/Tiny-A.onnx", "tiny-a.onnx"),
        ("models/tiny/", "tiny"),
        ("hf:org/Phi-3@0123456789abcdef0123456789abcdef01234567", "phi-3"),
        ("package:weights/a/b.onnx", "b.onnx"),
    ],
)
def test_the_part_of_a_value_in_a_name(text: str, part: str) -> None:
    assert matrix.part(text) == part


def test_numbers_and_booleans_are_in_names_as_they_are_written(lab: Lab) -> None:
    project = write(lab, HEAD + "platform: fake\nmatrix: {package.archive: [true, false], gates.cosine.min: [0.50, 0.9]}\n")
    assert list(project.targets) == ["phone-true-0.50", "phone-true-0.9", "phone-false-0.50", "phone-false-0.9"]
    assert "dist/phone-false-0.9.tar" not in [path for step in project.steps.values() for path in step.outputs.values()]


def test_a_hundred_targets_of_one_model_work_as_often_as_keys_differ(lab: Lab) -> None:
    versions = ", ".join(f"1.{number}.0" for number in range(50))
    write(lab, HEAD + f"matrix:\n  platform: [fake, small]\n  package.version: [{versions}]\n")
    assert set(lab.build().values()) <= {"ran", "restored"}
    done = [name.split(":")[0] for name, outcome in lab.build().items() if outcome == "fresh"]
    assert len(done) == 1000
    counts = {
        verb: len(list((lab.root / "build").glob(f"*/{verb}.json")))
        for verb in ("fetch", "assess", "convert", "quantize", "evaluate.baseline", "evaluate", "benchmark", "package")
    }
    assert set(counts.values()) == {100}
    # fetch, assess, convert and the baseline once; quantize, evaluate and benchmark by scheme; a bundle for each target
    assert len(lab.performed) == len(set(lab.performed)) == 4 + 3 * 2 + 100


def test_the_work_is_shared_when_two_steps_run_at_once(lab: Lab) -> None:
    write(lab, HEAD + "matrix:\n  platform: [fake, small]\n  package.version: [1.0.0, 2.0.0, 3.0.0]\n")
    assert run(lab, "-n", "2").returncode == 0
    outcomes = last_run(lab)
    ran = dict.fromkeys(("fetch", "assess", "convert", "quantize", "evaluate", "benchmark", "gate", "package"), 0)
    for name, outcome in outcomes.items():
        ran[name.split(":")[0]] += outcome == "ran"
    assert ran == {"fetch": 1, "assess": 1, "convert": 1, "quantize": 2, "evaluate": 3, "benchmark": 2, "gate": 2, "package": 6}


def test_a_source_may_vary(lab: Lab) -> None:
    (lab.root / "models").mkdir()
    for name in ("a.gguf", "b.gguf"):
        write_model(lab.root / "models" / name, name)
    head = "edgebuild: 1\nmodel: {task: image-classification}\nplatform: fake\n"
    project = write(lab, head + "matrix: {model.source: [models/a.gguf, models/b.gguf]}\n")
    assert [step.inputs["model"] for step in project.steps.values() if step.verb == "fetch"] == ["models/a.gguf", "models/b.gguf"]
    assert lab.build()["quantize:phone-b.gguf"] == "ran"


def test_what_cannot_be_built_fails_alone_and_says_which(lab: Lab) -> None:
    project = write(lab, HEAD + "matrix:\n  platform: [fake, ios, small]\n")
    assert list(project.targets) == ["phone-fake", "phone-small"]
    (problem,) = project.problems.items()
    assert problem[0] == "phone-ios"
    assert problem[1].startswith("targets/phone.yaml:3: model.source: mlx takes a source of format huggingface")
    assert problem[1].endswith(" (target phone-ios)")
    result = run(lab)
    assert result.returncode == 3
    assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in (lab.root / "dist").glob("*.tar")) == ["phone-fake.tar", "phone-small.tar"]


def test_what_holds_for_all_is_said_once(lab: Lab) -> None:
    write(lab, HEAD.replace("model.gguf", "missing.gguf") + "matrix:\n  platform: [fake, small]\n")
    result = run(lab)
    assert result.returncode == 3
    assert result.stderr == (
        'targets/phone.yaml:3: model.source: there is no file or folder "missing.gguf"; paths are relative to the project\'s root\n'
    )


def test_an_unknown_platform_is_a_problem_on_its_own_line(lab: Lab) -> None:
    project = write(lab, HEAD + "matrix:\n  platform:\n  - fake\n  - smal\n")
    assert project.problems["phone-smal"].startswith('targets/phone.yaml:7: platform: no platform "smal"')
    assert 'Did you mean "small"?' in project.problems["phone-smal"]


@pytest.mark.parametrize("other", [TARGET, HEAD + "matrix: {platform: [fake]}\n"])
def test_a_name_that_another_file_has(lab: Lab, other: str) -> None:
    (lab.root / "targets" / "phone-fake.yaml").write_text(other)
    project = write(lab, HEAD + "matrix: {platform: [fake]}\n")
    assert list(project.problems) == ["phone"]
    assert project.problems["phone"].startswith("targets/phone.yaml:4: matrix: its target phone-fake ")
    assert "targets/phone-fake.yaml" in project.problems["phone"]


def test_a_name_that_another_file_gives(lab: Lab) -> None:
    (lab.root / "targets" / "phone-fake.yaml").write_text(HEAD + "platform: fake\nmatrix: {package.kind: [folder]}\n")
    project = write(lab, HEAD + "matrix: {platform: [fake], package.kind: [folder]}\n")
    assert list(project.problems) == ["phone"]
    assert project.problems["phone"].startswith("targets/phone.yaml:4: matrix: its target phone-fake-folder ")
    assert "targets/phone-fake.yaml" in project.problems["phone"]
    assert list(project.targets) == ["phone-fake-folder"]


def test_a_shorter_list_takes_its_targets_away(lab: Lab) -> None:
    write(lab, HEAD + "matrix: {platform: [fake, small]}\n")
    assert run(lab).returncode == 0
    assert (lab.root / "dist" / "phone-small.tar").exists()
    write(lab, HEAD + "matrix: {platform: [fake]}\n")
    assert run(lab).returncode == 0
    assert sorted(path.name for path in (lab.root / "dist").iterdir()) == [
        "phone-fake",
        "phone-fake.evidence.json",
        "phone-fake.tar",
    ]
    assert [path.name for path in (lab.root / "build").iterdir()] == ["phone-fake"]


def test_a_file_that_cannot_be_read_keeps_what_its_targets_had_made(lab: Lab) -> None:
    good = HEAD + "matrix: {platform: [fake, small]}\n"
    write(lab, good)
    assert run(lab).returncode == 0
    before = sorted(path.name for path in (lab.root / "dist").iterdir())
    write(lab, good.replace("fake,", "fake,,"))
    assert run(lab).returncode == 3
    assert sorted(path.name for path in (lab.root / "dist").iterdir()) == before
    write(lab, good)
    assert run(lab).stdout.splitlines()[-1].startswith("edgebuild: 0 ran, 0 restored, 18 up to date, 0 failed (")


def test_the_plan_cache_knows_the_group_and_sees_edits(lab: Lab) -> None:
    text = HEAD + "matrix: {platform: [fake, small]}\n"
    first = write(lab, text)
    for _ in range(50):  # a plan is kept once the clock has passed the files' times
        if (lab.root / ".edgebuild" / "plan.json").exists():
            break
        first = Project()
    cached = json.loads(unsealed((lab.root / ".edgebuild" / "plan.json").read_bytes()))
    assert cached["groups"] == {"phone": ["phone-fake", "phone-small"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Project, "_make", lambda self: pytest.fail("the plan was made anew"))
        again = Project()
    assert (again.groups, again.targets, list(again.steps)) == (first.groups, first.targets, list(first.steps))
    assert "phone-ios" in write(lab, text.replace("small", "ios")).problems
    (lab.root / "platforms" / "fake.yaml").write_text(PLATFORM.replace("int8", "int3"))
    assert "phone-fake" in Project().problems


def test_commands(lab: Lab) -> None:
    write(lab, HEAD + "default: false\nmatrix: {platform: [fake, small]}\n")
    listed = run(lab, "list").stdout
    assert "build:phone-fake    a fake deliverable" in listed
    assert "build:phone         the 2 of targets/phone.yaml" in listed
    assert run(lab).stdout.startswith("edgebuild: 0 ran")
    assert run(lab, "build:phone-f*", "package.version=3.0.0").returncode == 0
    assert json.loads((lab.root / "dist" / "phone-fake" / "manifest.json").read_text())["version"] == "3.0.0"
    assert not (lab.root / "dist" / "phone-small").exists()
    assert run(lab, "build:phone").returncode == 0
    assert (lab.root / "dist" / "phone-small").exists()
    assert 'Did you mean "build:phone-small"?' in run(lab, "build:phone-smal").stderr
    assert "doit build:phone" in run(lab, "phone").stderr
    explained = run(lab, "explain", "phone-small", program="edgebuild")
    assert "quantize:phone-small             fresh" in explained.stdout
    several = run(lab, "explain", "phone", program="edgebuild")
    assert several.returncode == 3
    assert "phone-fake, phone-small" in several.stderr


def test_the_schema_lets_every_single_value_vary_but_these() -> None:
    schema = json.loads((ROOT / "schemas" / "target.json").read_text())

    def leaves(node: dict[str, object], above: str = "") -> "set[str]":
        while "$ref" in node:
            found: object = schema
            for key in str(node["$ref"]).removeprefix("#/").split("/"):
                found = found[key]  # type: ignore[index]
            node = found  # type: ignore[assignment]
        if "properties" not in node:
            return {above}
        properties: dict[str, dict[str, object]] = node["properties"]  # type: ignore[assignment]
        return {leaf for key, inner in properties.items() for leaf in leaves(inner, f"{above}.{key}" if above else key)}

    varying = set(schema["properties"]["matrix"]["properties"])
    del schema["properties"]["matrix"]
    fixed = {
        "edgebuild",
        "description",
        "default",
        "model.sha256",
        "model.state",
        "model.shape",
        "quantize.exclude",
        "quantize.layers",
        "quantize.passes",
        "package.sign.key",
        "package.sign.cert",
        "package.sign.pin_env",
    }
    assert leaves(schema) - varying == fixed | {leaf for leaf in leaves(schema) if ".waive." in leaf or ".estimates." in leaf}
    assert varying <= leaves(schema)


VALUES = st.lists(st.from_regex(r"[a-z0-9]{1,4}", fullmatch=True), min_size=1, max_size=4, unique=True)


@settings(max_examples=40, deadline=None)
@given(platforms=VALUES, kinds=VALUES, sizes=st.lists(st.integers(1, 99), min_size=1, max_size=3, unique=True))
def test_each_variant_is_the_file_with_its_values_written_out(
    tmp_path_factory: pytest.TempPathFactory, platforms: list[str], kinds: list[str], sizes: list[int]
) -> None:
    """A matrix is short for files: every target equals the one that a file of its own gives."""
    lab = make_lab(tmp_path_factory.mktemp("matrix") / "project")
    platforms = [f"x{name}" for name in platforms]
    for name in platforms:
        (lab.root / "platforms" / f"{name}.yaml").write_text(PLATFORM)
    lists = f"platform: [{', '.join(platforms)}], package.kind: [{', '.join(f'k{kind}' for kind in kinds)}]"
    text = HEAD + f"matrix: {{{lists}, quantize.group_size: {sizes}}}\n"
    (lab.root / "targets" / "many.yaml").write_text(text)
    many = load.Targets(str(lab.root), ["many"])
    assert many.problems == {}
    assert len(many.files["many"]) == len(platforms) * len(kinds) * len(sizes)
    for platform, kind, size in product(platforms, kinds, sizes):
        name = f"many-{platform}-k{kind}-{size}"
        alone = HEAD + f"platform: {platform}\npackage: {{kind: k{kind}}}\nquantize: {{group_size: {size}}}\n"
        (lab.root / "targets" / f"{name}.yaml").write_text(alone)
        expected = load.Targets(str(lab.root), [name]).target(name)
        found = many.target(name)
        assert {field: getattr(found, field) for field in found.__slots__ if field not in ("file", "lines")} == {
            field: getattr(expected, field) for field in expected.__slots__ if field not in ("file", "lines")
        }


def test_a_thousand_targets_of_one_file_read_it_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = ", ".join(f"1.{number}.0" for number in range(500))
    write(lab, HEAD + f"matrix:\n  platform: [fake, small]\n  package.version: [{versions}]\n")
    opened: list[str] = []
    text = document._text
    monkeypatch.setattr(document, "_text", lambda path, file: opened.append(file) or text(path, file))
    targets = load.Targets(".", ["phone"])
    assert len([targets.target(name) for name in targets.files["phone"]]) == 1000
    assert sorted(set(opened) - {"gates.yaml"}) == ["platforms/fake.yaml", "platforms/small.yaml", "targets/phone.yaml"]
    assert len(opened) <= 4
