"""`quantize.method: auto`: recipes are tried until the gates hold. The walk by itself, and through builds on the fake backend."""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from typing import Any

import jsonschema
import numpy as np
import pytest

from edgebuild import ladder, samples
from edgebuild.backends import fake
from edgebuild.errors import BadInput, Refused, StepFailed
from edgebuild.forecast import ESTIMATED, forecast
from edgebuild.fresh import Fresh
from edgebuild.process import Result, Workers
from edgebuild.project import Project
from edgebuild.run import Builder
from tests.conftest import ROOT, TARGET, Lab, perform_here, write_model
from tests.test_cli import last_run, run

DATA = "calibration: {data: calibration.npz}\nevaluate: {data: data.npz}\n"
HOLDS = "gates: {quality: {min: 0}, flip_rate: {max: 1}}\n"  # whatever the recipe
SECOND = "gates: {quality: {min: 0}, flip_rate: {max: 1}, cosine: {min: 0.99}}\n"  # `coarse` does not, `fine` does
NONE = "gates: {quality: {min: 0}, flip_rate: {max: 1}, snr: {min: 140}}\n"


@pytest.fixture
def data(lab: Lab) -> Lab:
    rng = np.random.default_rng(0)
    np.savez(lab.root / "calibration.npz", x=rng.standard_normal((8, 4)).astype("float32"))
    labels = np.arange(90) % 3
    np.savez(lab.root / "data.npz", x=rng.standard_normal((90, 4)).astype("float32"), labels=labels)
    return lab


def write(lab: Lab, text: str) -> None:
    (lab.root / "targets" / "one.yaml").write_text(TARGET + DATA + text)


def report(lab: Lab) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((lab.root / "build" / "one" / "choose" / "report.json").read_text())
    return found


def evidence(lab: Lab) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((lab.root / "build" / "one" / "evidence.json").read_text())
    jsonschema.validate(found, json.loads((ROOT / "schemas" / "evidence.json").read_text()))
    return found


# -- the walk -------------------------------------------------------------------------------------------------------------
def rung(name: str, *operators: str, convolutions: float = 1.0) -> dict[str, Any]:
    return {"name": name, "operators": list(operators), "convolutions": convolutions}


def made(**values: float | None) -> ladder.Made:
    rows = [
        {"name": name, "value": value, "unit": "ratio", "judged": True, "interval": [0.0, 1.0], "confidence": 0.95, "n": 9}
        for name, value in values.items()
    ]
    return ladder.Made(report={"operators": 3}, measurements=rows, baseline=1000, candidate=300)


def walked(gates: Mapping[str, Any], *rungs: dict[str, Any], **results: ladder.Made | Exception) -> tuple[ladder.Walk, list[str]]:
    tried = []

    def attempt(name: str) -> ladder.Made:
        tried.append(name)
        result = results[name]
        if isinstance(result, Exception):
            raise result
        return result

    limits = {metric: {"min": None, "max": None, **bound} for metric, bound in gates.items()}
    params = {"order": [one["name"] for one in rungs], "rungs": {one["name"]: one for one in rungs}, "gates": limits}
    return ladder.walk(params, {"operators": {"Conv": 3}, "weights": {"Conv": 900, "MatMul": 100}}, attempt), tried


def test_the_first_that_holds_is_taken_by_its_value_alone() -> None:
    """An interval of 0 to 1 decides nothing as a verdict; a choice is none."""
    found, tried = walked(
        {"quality": {"min": 0.98}, "weights_ratio": {"max": 0.35}},
        rung("a"),
        rung("b", "LSTM", "GRU"),
        rung("b2", convolutions=0.85),
        rung("c", "Conv"),
        rung("d"),
        a=made(quality=0.97),
        c=made(quality=0.98),
    )
    assert (found.chosen, tried) == ("c", ["a", "c"])
    assert found.why == "quality 0.98 ≥ 0.98, weights_ratio 0.3 ≤ 0.35"
    assert found.report["operators"] == 3
    assert [(row["name"], row["held"], row["reason"]) for row in found.report["rungs"]] == [
        ("a", False, "quality 0.97 < min 0.98"),
        ("b", None, "not tried: the model has no LSTM or GRU"),
        ("b2", None, "not tried: 90.0 % of the model's weights are of convolutions, which it leaves as they are"),
        ("c", True, found.why),
        ("d", None, "not tried: c holds"),
    ]
    assert found.report["rungs"][0]["values"] == {"quality": 0.97, "weights_ratio": 0.3}


def test_what_was_not_measured_does_not_decide() -> None:
    found, _ = walked({"quality": {"min": 0.98}, "cosine": {"min": 0.9}}, rung("a"), a=made(quality=None, cosine=0.95))
    assert found.chosen == "a"
    assert found.why == "cosine 0.95 ≥ 0.9"
    assert walked({}, rung("a"), a=made())[0].why == "no gate decides"


def test_where_none_holds_each_is_named_with_its_reason() -> None:
    found, tried = walked(
        {"quality": {"min": 0.98}, "weights_ratio": {"max": 0.35}},
        rung("a"),
        rung("b"),
        rung("c"),
        a=Refused("nothing was quantized"),
        b=Refused("nothing was quantized"),
        c=made(quality=0.51),
    )
    assert tried == ["a", "b", "c"]
    assert found.chosen == ""
    assert found.why == (
        "no recipe keeps all of quality, weights_ratio: a, b: nothing was quantized; c: quality 0.51 < min 0.98; "
        "leave this model unquantized (quantize: {scheme: none})"
    )
    assert found.report["reason"] == found.why


def test_what_to_do_is_said_once() -> None:
    found, _ = walked(
        {}, rung("a"), rung("b"), a=Refused(f"nothing was quantized; {ladder.UNQUANTIZED}"), b=Refused("it crashed")
    )
    assert found.why == f"no recipe works: a: nothing was quantized; {ladder.UNQUANTIZED}; b: it crashed"


def test_another_failure_is_not_a_rung_that_does_not_hold() -> None:
    with pytest.raises(StepFailed, match="the disk is full"):
        walked({}, rung("a"), rung("b"), a=StepFailed("the disk is full"), b=made())


# -- parts of the data ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [2, 3, 16, 90, 1000])
@pytest.mark.parametrize("share", [samples.THIRD, samples.FOURTH])
def test_parts_share_nothing_and_leave_nothing_out(count: int, share: int) -> None:
    choosing, verdict = (samples.part(name, count, share) for name in ("choosing", "verdict"))
    assert choosing is not None
    assert verdict is not None
    assert len(choosing)
    assert len(verdict)
    assert sorted([*choosing, *verdict]) == list(range(count))
    assert abs(len(choosing) - count / share) < 2


@pytest.mark.parametrize("classes", range(2, 12))
def test_classes_that_take_turns_are_in_both_parts_alike(classes: int) -> None:
    labels = np.arange(120 * classes) % classes
    choosing = samples.part("choosing", len(labels), samples.THIRD)
    shares = np.bincount(labels[choosing], minlength=classes) / 120
    assert np.all(np.abs(shares - 1 / 3) < 0.05)


def test_one_sample_is_both_parts() -> None:
    assert samples.part("choosing", 1, 3) is samples.part("verdict", 1, 3) is samples.part("", 9, 3) is None


def test_the_verdict_is_measured_on_what_the_choice_did_not_see(data: Lab) -> None:
    write(data, HOLDS)
    data.build()

    def rows(stem: str) -> dict[tuple[str, str], dict[str, Any]]:
        found = json.loads((data.root / "build" / "one" / stem / "measurements.json").read_text())
        return {(row["name"], row["of"]): row for row in found}

    choosing, verdict = rows("evaluate.coarse"), rows("evaluate")
    assert choosing["quality", "candidate"]["n"] + verdict["quality", "candidate"]["n"] == 90
    assert {row["part"] for row in choosing.values()} == {"choosing"}
    assert {row["part"] for row in verdict.values()} == {"verdict"}
    assert "part" not in rows("evaluate.baseline")["accuracy", "baseline"]  # it answers all
    chosen = samples.part("choosing", 90, samples.THIRD)
    arrays = np.load(data.root / "data.npz")
    session = fake.open(data.root / "build" / "one" / "choose" / "model")
    outputs = session.infer({"x": arrays["x"][chosen]})["y"]
    right = int((outputs.argmax(-1) == arrays["labels"][chosen]).sum())
    assert choosing["accuracy", "candidate"]["value"] == pytest.approx(right / len(outputs))


def test_golden_inputs_are_split_too(lab: Lab) -> None:
    np.savez(lab.root / "calibration.npz", x=np.ones((8, 4), "float32"))
    (lab.root / "targets" / "one.yaml").write_text(TARGET + "calibration: {data: calibration.npz}\n")
    lab.build()
    counts = [
        next(
            row["n"]
            for row in json.loads((lab.root / f"build/one/{stem}/measurements.json").read_text())
            if row["name"] == "cosine"
        )
        for stem in ("evaluate.coarse", "evaluate")
    ]
    assert sum(counts) == 32
    assert min(counts) > 0


# -- builds ---------------------------------------------------------------------------------------------------------------
def test_no_key_of_a_recipe_holds_a_limit_or_evaluation_data(data: Lab) -> None:
    write(data, SECOND)
    os.chdir(data.root)
    project = Project()
    rungs = [step for step in project.steps.values() if step.verb == "quantize"]
    assert [step.name for step in rungs] == ["quantize:one.coarse", "quantize:one.recurrent", "quantize:one.fine"]
    for step in rungs:
        assert set(step.inputs) == {"model", "facts", "calibration"}
        assert "gates" not in json.dumps(project.recipes[step.recipe]["params"])
        assert step.on_demand
    needed = [step for step in project.steps.values() if not step.on_demand]
    assert not {name for step in needed for name in step.after} & {step.name for step in project.steps.values() if step.on_demand}


def test_the_second_recipe_holds(data: Lab) -> None:
    write(data, SECOND)
    outcomes = data.build()
    assert outcomes["quantize:one.coarse"] == outcomes["quantize:one.fine"] == outcomes["choose:one"] == "ran"
    assert "quantize:one.recurrent" not in outcomes
    assert report(data)["rung"] == "fine"
    chosen, fine = (data.root / "build" / "one" / stem / "model" / "payload.json" for stem in ("choose", "quantize.fine"))
    assert chosen.read_bytes() == fine.read_bytes()
    assert chosen.stat().st_ino == fine.stat().st_ino  # linked, not copied
    quantization = evidence(data)["quantization"]
    assert [(row["name"], row["held"]) for row in quantization["rungs"]] == [
        ("coarse", False),
        ("recurrent", None),
        ("fine", True),
    ]
    assert quantization["rungs"][0]["reason"].startswith("cosine 0.")
    assert set(data.build().values()) == {"fresh"}
    write(data, HOLDS)  # then the first one does
    outcomes = data.build()
    assert outcomes["quantize:one.coarse"] == "restored"
    assert report(data)["rung"] == "coarse"
    assert outcomes["benchmark:one"] == "ran"
    write(data, SECOND)
    assert "ran" not in data.build().values()
    assert report(data)["rung"] == "fine"


def test_a_recipe_that_the_framework_refuses_is_passed_over(data: Lab) -> None:
    write_model(data.root / "model.gguf", "!refuse-coarse")
    write(data, HOLDS)
    outcomes = data.build()
    assert outcomes["quantize:one.coarse"] == "refused"
    assert outcomes["choose:one"] == "ran"
    rows = {row["name"]: row for row in report(data)["rungs"]}
    assert rows["coarse"]["reason"] == "the framework does not take this model with coarse"
    assert rows["fine"]["held"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (BadInput("calibration.npz: holds 0 samples"), "quantize:one.coarse failed: calibration.npz: holds 0 samples"),
        (StepFailed("took longer than its limit"), "quantize:one.coarse failed: took longer"),
    ],
)
def test_what_is_no_fault_of_the_recipe_fails_the_choice(data: Lab, error: Exception, message: str) -> None:
    """And nothing is kept: as soon as there is room, the first recipe is what it was."""
    write(data, HOLDS)
    os.chdir(data.root)

    def perform(record: Mapping[str, Any], *rest: Any) -> Result:
        if record["name"] == "quantize:one.coarse":
            raise error
        return perform_here(record, *rest)

    project = Project()
    builder = Builder(project, Fresh(project), Workers(), perform)
    for name in ("fetch:one", "assess:one", "convert:one", "evaluate:one.baseline"):
        builder.run(project.steps[name])
    with pytest.raises(StepFailed, match=message):
        builder.run(project.steps["choose:one"])
    assert not (data.root / "build" / "one" / "choose.json").exists()
    assert data.build()["choose:one"] == "ran"
    assert report(data)["rung"] == "coarse"


def test_a_refused_recipe_shows_where_its_log_lies_and_the_report_does_not(data: Lab) -> None:
    write_model(data.root / "model.gguf", "!refuse-coarse")
    write(data, HOLDS)
    done = run(data)
    assert done.returncode == 0
    assert "with coarse\n  log: .edgebuild/logs/one/quantize.coarse.log" in done.stdout
    assert "what the framework prints" in (data.root / ".edgebuild/logs/one/quantize.coarse.log").read_text()
    (row,) = (row for row in report(data)["rungs"] if row["name"] == "coarse")
    assert row["reason"] == "the framework does not take this model with coarse"


def test_why_a_recipe_failed_is_printed_once(data: Lab) -> None:
    """By its own step; the choice that ran it names that one. last-run.json has the reason of both."""
    write(data, HOLDS)
    log = data.root / ".edgebuild" / "logs" / "one" / "quantize.coarse.log"
    log.mkdir(parents=True)
    done = run(data)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"  quantize:one.coarse: {log}: Is a directory; nothing was kept",
        "  choose:one: quantize:one.coarse failed",
    ]
    assert last_run(data)["choose:one"] == last_run(data)["quantize:one.coarse"] == "failed"
    steps = json.loads((data.root / ".edgebuild" / "last-run.json").read_text())["steps"]
    (reason,) = (step["reason"] for step in steps if step["name"] == "choose:one")
    assert reason.startswith("quantize:one.coarse failed: ")
    assert reason.endswith("Is a directory; nothing was kept")


def test_where_none_holds_the_build_says_so_and_delivers_nothing(data: Lab) -> None:
    write(data, HOLDS)
    data.build()
    assert (data.root / "dist" / "one.tar").exists()
    write(data, NONE)
    outcomes = data.build()
    assert outcomes["choose:one"] == "failed"
    assert outcomes["evaluate:one"] == outcomes["build:one"] == "blocked"
    assert not list((data.root / "dist").iterdir())
    assert not (data.root / "build" / "one" / "gate" / "verdicts.json").exists()  # an earlier build's
    found = evidence(data)
    assert "leave this model unquantized" in found["bundle"]["reason"]
    os.chdir(data.root)
    planned = forecast(Project(), "one")
    assert planned.candidate.basis == ESTIMATED  # nothing was made, which is not a model of no bytes
    assert [row["held"] for row in found["quantization"]["rungs"]] == [False, None, False]
    assert all("snr" in row["values"] for row in found["quantization"]["rungs"] if row["held"] is False)
    assert found["gates"] == []  # those of an earlier build are not this one's
    assert {row["of"] for row in found["measurements"]} == {"baseline"}
    assert {step["name"] for step in found["steps"]} == {
        "fetch:one", "assess:one", "convert:one", "evaluate:one.baseline", "choose:one",
    }  # fmt: skip
    before = list(data.performed)
    assert data.build()["choose:one"] == "failed"  # the record says it again, and nothing runs for that
    assert data.performed == before
    write(data, HOLDS)
    assert "failed" not in data.build().values()
    assert (data.root / "dist" / "one.tar").exists()


def test_what_a_recipe_made_of_other_data_does_not_stay(data: Lab) -> None:
    write(data, SECOND)
    data.build()
    np.savez(data.root / "calibration.npz", x=np.ones((8, 4), "float32"))
    write(data, HOLDS)  # `fine` is not tried again
    data.build()
    assert (data.root / "build" / "one" / "quantize.coarse.json").exists()
    assert not (data.root / "build" / "one" / "quantize.fine.json").exists()
    assert not (data.root / "build" / "one" / "quantize.fine").exists()
    assert data.rungs()


def test_a_choice_needs_no_record_of_what_is_fresh(data: Lab) -> None:
    write(data, SECOND)
    data.build()
    for kind in ("records", "objects"):
        shutil.rmtree(data.root / ".edgebuild" / kind)
    write(data, HOLDS)
    outcomes = data.build()
    assert outcomes["convert:one"] == "fresh"
    assert outcomes["choose:one"] == outcomes["build:one"] == "ran"
    assert report(data)["rung"] == "coarse"


def test_two_targets_share_their_recipes(data: Lab) -> None:
    write(data, SECOND)
    (data.root / "targets" / "two.yaml").write_text(TARGET + DATA + HOLDS + "package: {version: 2.0.0}\n")
    (data.root / "targets" / "three.yaml").write_text(TARGET + DATA + HOLDS + "quantize: {method: fine}\n")
    outcomes = data.build()
    assert sorted(name for name, outcome in outcomes.items() if outcome == "ran" and name.startswith("quantize")) in (
        ["quantize:one.coarse", "quantize:one.fine"],
        ["quantize:one.coarse", "quantize:three"],  # a recipe by name is the same work
    )


# -- as typed -------------------------------------------------------------------------------------------------------------
def test_as_typed(data: Lab) -> None:
    write(data, SECOND)
    result = run(data, "quantize:one")  # as far as that goes: the choice
    assert result.returncode == 0, result.stdout + result.stderr
    assert "choose:one                       ran" in result.stdout
    assert "fine holds, 1 before it did not: cosine 1" in result.stdout
    assert {name for name, outcome in last_run(data).items() if outcome == "ran"} == {
        "fetch:one", "assess:one", "convert:one", "evaluate:one.baseline", "quantize:one.coarse", "evaluate:one.coarse",
        "quantize:one.fine", "evaluate:one.fine", "choose:one",
    }  # fmt: skip
    assert run(data).returncode == 0
    assert "9 up to date" in run(data).stdout
    shutil.rmtree(data.root / "build" / "one" / "quantize.coarse")
    assert "9 up to date" in run(data).stdout  # nobody needs it
    explained = run(data, "explain", "one", program="edgebuild").stdout
    assert "recurrent" not in explained
    assert run(data, "quantize:one.recurrent").returncode == 0  # by name, any
    assert last_run(data)["quantize:one.recurrent"] == "ran"
    assert "9 up to date" in run(data).stdout
    planned = json.loads(run(data, "plan", "one", "--json", program="edgebuild").stdout)
    jsonschema.validate(planned, json.loads((ROOT / "schemas" / "plan.json").read_text()))
    assert {step["name"]: step["will"] for step in planned["steps"]}["choose:one"] == "nothing"
    verified = run(data, "verify", "one", program="edgebuild")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "equal      build/one/choose/model" in verified.stdout


def test_none_holds_as_typed(data: Lab) -> None:
    write_model(data.root / "model.gguf", "!refuse-coarse")
    write(data, NONE)
    result = run(data)
    assert result.returncode == 1
    message = (
        "no recipe keeps all of flip_rate, quality, snr: coarse: the framework does not take this model with coarse; fine: snr "
    )
    assert message in result.stderr
    assert "leave this model unquantized" in result.stderr
    outcomes = last_run(data)
    assert outcomes["quantize:one.coarse"] == "refused"
    assert outcomes["quantize:one.fine"] == "ran"
    assert outcomes["choose:one"] == "failed"
    assert outcomes["gate:one"] == "blocked"
    assert "1 failed" in result.stdout
    shown = run(data, "plan", "one", program="edgebuild")
    assert shown.returncode == 1
    assert "by the first of coarse, recurrent, fine that holds" in shown.stdout


def test_a_target_that_is_no_default_is_not_remembered_to_be_fresh(data: Lab) -> None:
    """What is remembered speaks of default targets: an edit of what another one alone reads is seen."""
    (data.root / "targets" / "two.yaml").write_text(TARGET + DATA + HOLDS + "default: false\n")
    assert run(data, "build:one", "build:two").returncode == 0
    for _ in range(3):
        assert run(data).returncode == 0
    np.savez(data.root / "calibration.npz", x=np.ones((8, 4), "float32"))
    assert "9 up to date" in run(data).stdout
    assert run(data, "build:two").returncode == 0
    assert last_run(data)["choose:two"] == "ran"
