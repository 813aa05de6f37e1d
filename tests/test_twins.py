"""Steps of several targets that are one work: done once, and where it fails not tried again for each."""

import json
import os

import pytest

from edgebuild.project import Project
from edgebuild.twins import twins
from tests.conftest import TARGET, Lab, write_model
from tests.test_cli import last_run, run
from tests.test_ladder import HOLDS, NONE, data, write  # noqa: F401 - a fixture


def second(lab: Lab, more: str = "") -> None:
    """Another target of the same model: the same but for its version."""
    (lab.root / "targets" / "two.yaml").write_text(f"{TARGET}package: {{version: 2.0.0}}\n{more}")


def found(lab: Lab) -> dict[str, str]:
    os.chdir(lab.root)
    project = Project()
    assert all(
        list(project.steps).index(name) < number for number, step in enumerate(project.steps.values()) for name in step.after
    )
    return twins(project, project.steps.keys())


def test_which_are_one_work(lab: Lab) -> None:
    assert found(lab) == {}
    second(lab)
    shared = ("fetch:{}", "assess:{}", "convert:{}", "evaluate:{}.baseline", "quantize:{}", "evaluate:{}", "benchmark:{}")
    for name in shared:
        assert found(lab)[name.format("two")] == name.format("one")
    assert set(found(lab)) == {name.format("two") for name in shared} & set(Project().steps)  # neither gate nor package
    second(lab, "quantize: {scheme: int4}\n")
    assert {name.split(":")[0] for name in found(lab)} == {"fetch", "assess", "convert", "evaluate"}
    second(lab, "limits: {time: 1s}\n")
    assert not found(lab)
    second(lab)
    write_model(lab.root / "other.gguf", "another")
    two = lab.root / "targets" / "two.yaml"
    two.write_text(two.read_text().replace("model.gguf", "other.gguf"))
    assert not found(lab)


def test_only_those_that_are_asked_for(lab: Lab) -> None:
    second(lab)
    os.chdir(lab.root)
    project = Project()
    assert not twins(project, [step.name for step in project.of("two")])
    assert run(lab, "build:two").returncode == 0
    assert not (lab.root / "build" / "one").exists()


def test_two_threads_do_not_both_wait_for_one_work(lab: Lab) -> None:
    """While one converts for two targets, the other does something else."""
    write_model(lab.root / "model.gguf", "!slow2")
    second(lab)
    write_model(lab.root / "other.gguf", "!slow1")
    (lab.root / "targets" / "ypsilon.yaml").write_text(TARGET.replace("model.gguf", "other.gguf"))
    result = run(lab, "-n", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    seconds = {step["name"]: step["seconds"] for step in json.loads((lab.root / ".edgebuild/last-run.json").read_text())["steps"]}
    assert sorted(last_run(lab)[f"convert:{name}"] for name in ("one", "two", "ypsilon")) == ["ran", "ran", "restored"]
    assert min(seconds["convert:one"], seconds["convert:two"]) < 1  # it did not begin before the other was done


@pytest.mark.parametrize("words", [(), ("-n", "2"), ("build:two", "build:one")])
def test_a_work_that_fails_is_not_tried_for_each(lab: Lab, words: tuple[str, ...]) -> None:
    """The other target says whose failure is its own; what has nothing to do with it is built."""
    write_model(lab.root / "model.gguf", "!refused")
    second(lab)
    result = run(lab, *words)
    assert result.returncode == 1
    assert result.stderr.count("convert:one: ") == 1
    assert "convert:two: " not in result.stderr
    assert "convert:two                      blocked " in result.stdout
    assert "the same work as convert:one, which failed" in result.stdout
    assert "1 failed" in result.stdout
    assert last_run(lab)["convert:two"] == last_run(lab)["quantize:two"] == last_run(lab)["quantize:one"] == "blocked"
    write_model(lab.root / "model.gguf", "better")
    assert run(lab).returncode == 0


def test_what_fails_for_one_target_alone_is_tried_by_itself_as_the_message_says(lab: Lab) -> None:
    second(lab)
    (lab.root / ".edgebuild" / "logs" / "one" / "convert.log").mkdir(parents=True)
    result = run(lab)
    assert result.returncode == 1
    assert "the same work as convert:one, which failed; `doit convert:two` tries it by itself" in result.stdout
    assert run(lab, "convert:two").returncode == 0
    assert run(lab, "build:two").returncode == 0
    assert last_run(lab)["convert:two"] == "fresh"


def test_a_limit_of_its_own_is_a_try_of_its_own(lab: Lab) -> None:
    write_model(lab.root / "model.gguf", "!slow1")
    (lab.root / "targets" / "one.yaml").write_text(f"{TARGET}limits: {{time: 900ms}}\n")
    second(lab)
    assert run(lab).returncode == 1
    assert last_run(lab)["convert:one"] == "failed"
    assert last_run(lab)["package:two"] == "ran"


def test_a_gate_that_fails_and_a_ladder_without_a_rung_stop_each_target(data: Lab) -> None:  # noqa: F811 - the fixture
    """What an earlier build had delivered goes, of every target, and its evidence says why."""
    one, two = (data.root / "targets" / f"{name}.yaml" for name in ("one", "two"))
    for gates in (HOLDS, NONE):
        write(data, gates)
        two.write_text(one.read_text())
        result = run(data)
    assert result.returncode == 1
    assert last_run(data)["choose:one"] == last_run(data)["choose:two"] == "failed"
    assert result.stderr.count("leave this model unquantized") == 2
    assert not list((data.root / "dist").iterdir())
    for name in ("one", "two"):
        evidence = json.loads((data.root / "build" / name / "evidence.json").read_text())
        assert "leave this model unquantized" in evidence["bundle"]["reason"]
