"""`edgebuild remeasure`: the measuring step runs again though its record holds, nothing else does in vain, and nothing is lost."""

import fcntl
import json
import os
import subprocess
from pathlib import Path

import psutil
import pytest

from edgebuild.files import locked
from tests.conftest import PLATFORM, TARGET, Lab, write_model
from tests.test_cli import BIN, last_run, run

MEASURED = PLATFORM.replace('benchmark: {not_measured: "a fake device"}\n', "")


@pytest.fixture
def timed(lab: Lab) -> Lab:
    """A project whose platform is timed here, with the smallest model there is."""
    (lab.root / "platforms" / "fake.yaml").write_text(MEASURED)
    return lab


def measurements(lab: Lab) -> bytes:
    return (lab.root / "build" / "one" / "benchmark" / "measurements.json").read_bytes()


def test_only_the_benchmark_and_what_follows_runs(timed: Lab) -> None:
    assert run(timed).returncode == 0
    before = measurements(timed)
    result = run(timed, "remeasure", "one", program="edgebuild")
    assert result.returncode == 0, result.stdout + result.stderr
    outcomes = last_run(timed)
    assert outcomes["benchmark:one"] == "ran"
    assert outcomes["gate:one"] == "ran"  # other measurements, another key
    assert {outcomes[f"{verb}:one"] for verb in ("fetch", "assess", "convert", "quantize", "evaluate", "package")} == {"fresh"}
    assert measurements(timed) != before
    reasons = {
        step["name"]: step["reason"] for step in json.loads((timed.root / ".edgebuild/last-run.json").read_text())["steps"]
    }
    assert reasons["benchmark:one"] == "it was asked to run again"
    evidence = json.loads((timed.root / "dist" / "one.evidence.json").read_text())
    rows = json.loads(measurements(timed))
    assert [row for row in evidence["measurements"] if row["name"] == "latency_p50"] == [
        row for row in rows if row["name"] == "latency_p50"
    ]
    assert "9 up to date" in run(timed).stdout
    assert run(timed, "clean").returncode == 0  # the new one is what the store has
    assert "9 restored" in run(timed).stdout
    assert measurements(timed) == json.dumps(rows, indent=1, ensure_ascii=False).encode() + b"\n"


def test_a_failed_measurement_leaves_the_old_one(timed: Lab) -> None:
    """A benchmark that takes longer than its limit keeps nothing: what was measured before stays, in build/, dist/ and the store."""
    assert run(timed).returncode == 0
    before, dist = measurements(timed), (timed.root / "dist" / "one.evidence.json").read_bytes()
    target = timed.root / "targets" / "one.yaml"
    target.write_text(TARGET + "limits: {time: 1ms}\n")  # no part of a key
    result = run(timed, "remeasure", "one", program="edgebuild")
    assert result.returncode == 1, result.stdout
    assert "took longer than its limit" in result.stderr
    assert measurements(timed) == before
    assert (timed.root / "dist" / "one.evidence.json").read_bytes() == dist
    target.write_text(TARGET)
    assert "9 up to date" in run(timed).stdout


def test_a_platform_that_is_not_measured_here(lab: Lab) -> None:
    assert run(lab).returncode == 0
    result = run(lab, "remeasure", "one", program="edgebuild")
    assert result.returncode == 3
    assert "nothing of one is measured on this machine, so there is nothing to measure again: a fake device" in result.stderr


def test_again_as_a_word_of_doit(lab: Lab, tmp_path: Path) -> None:
    """Any step can be asked for by name; where it makes the same bytes, nothing follows."""
    assert run(lab).returncode == 0
    assert run(lab, "build:one", "again=convert:one,quantize:one").returncode == 0
    assert {name for name, outcome in last_run(lab).items() if outcome == "ran"} == {"convert:one", "quantize:one"}
    mistyped = run(lab, "build:one", "again=convrt:one")
    assert mistyped.returncode == 3
    assert 'Did you mean "convert:one"?' in mistyped.stderr
    write_model(lab.root / "model.gguf", "another")
    assert run(lab).returncode == 0


def test_it_prepares_beside_others_and_measures_alone(timed: Lab) -> None:
    """While another step runs, both artifacts' runtimes are imported and nothing more; while it waits, no other step begins."""
    lock = f"{os.environ['XDG_CACHE_HOME']}/edgebuild/machine"
    with locked(f"{lock}.lock", alone=False):
        process = subprocess.Popen([BIN / "doit"], cwd=timed.root, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        assert any(line.endswith("waits to have the machine to itself\n") for line in process.stdout)
        children = psutil.Process(process.pid).children(recursive=True)
        assert sum("edgebuild.bench" in child.cmdline() for child in children) == 2
        with open(f"{lock}.turn") as turn, pytest.raises(BlockingIOError):
            fcntl.flock(turn, fcntl.LOCK_SH | fcntl.LOCK_NB)
    assert any(line.endswith("has the machine to itself\n") for line in process.stdout)
    with open(f"{lock}.lock") as held, pytest.raises(BlockingIOError):
        fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
    assert any(line.startswith("benchmark:one                    ran ") for line in process.stdout)
    assert process.wait(timeout=60) == 0
    process.stdout.close()
