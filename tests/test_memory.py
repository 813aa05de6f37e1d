"""Heavy steps: refused where they cannot fit, one after the other where they do not fit together, and told of when killed for it."""

import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from edgebuild import reserve
from edgebuild.files import locked
from edgebuild.process import _machine_memory
from edgebuild.reserve import NoRoom, reserved
from edgebuild.resources import memory
from tests.conftest import TARGET, Lab, ends, make_lab, write_model
from tests.test_cli import BIN, last_run, run
from tests.test_remeasure import MEASURED

GB = 10**9


def nobody() -> None:
    raise AssertionError("nobody is waited for")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != reserve.TURN)


def test_alone_the_least_is_enough_and_less_is_refused(tmp_path: Path) -> None:
    with reserved(str(tmp_path), 4 * GB, 9 * GB, lambda: 5 * GB, nobody):
        assert len(names(tmp_path)) == 1
    assert names(tmp_path) == []
    with pytest.raises(NoRoom) as error, reserved(str(tmp_path), 6 * GB, 9 * GB, lambda: 5 * GB, nobody):
        pass
    assert error.value.available == 5 * GB
    assert names(tmp_path) == []


def test_what_others_took_already_is_not_counted_twice(tmp_path: Path) -> None:
    """Of 10 GB one takes 6: beside it 4 more fit, whether it has taken its own yet or not; nothing more of another program's."""
    free = 10 * GB

    def here() -> int:
        return free

    with reserved(str(tmp_path), 6 * GB, 6 * GB, here, nobody):
        for now in (10 * GB, 7 * GB, 4 * GB):
            free = now
            with reserved(str(tmp_path), 4 * GB, 4 * GB, here, nobody):
                pass
        free = 3 * GB
        waited: list[bool] = []

        def waits() -> None:
            nonlocal free
            waited.append(True)
            free = 4 * GB

        with reserved(str(tmp_path), 4 * GB, 4 * GB, here, waits):
            assert waited == [True]
        with pytest.raises(NoRoom), reserved(str(tmp_path), 11 * GB, 11 * GB, here, nobody):
            pass  # though the other one ends


def test_three_that_do_not_fit_together(tmp_path: Path) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal running, most
        with reserved(str(tmp_path), 4 * GB, 4 * GB, lambda: 10 * GB, lambda: None):
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.3)
            with lock:
                running -= 1

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert most == 2
    assert names(tmp_path) == []


def hold(folder: str, held: "multiprocessing.connection.Connection") -> None:
    with reserved(folder, 6 * GB, 6 * GB, lambda: 10 * GB, nobody):
        held.send(True)
        time.sleep(60)


def test_who_is_killed_holds_nothing(tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(str(tmp_path), theirs))
    process.start()
    assert ours.recv()
    begun = time.monotonic()
    threading.Timer(0.5, process.kill).start()
    waited: list[bool] = []
    with reserved(str(tmp_path), 6 * GB, 6 * GB, lambda: 10 * GB, lambda: waited.append(True)):
        assert waited == [True]
        assert 0.3 < time.monotonic() - begun < 20
        assert len(names(tmp_path)) == 1
    process.join()


def give(lab: Lab, target: str, text: str, estimates: str) -> None:
    write_model(lab.root / f"{target}.gguf", text)
    written = TARGET.replace("model.gguf", f"{target}.gguf") + f"limits: {{estimates: {{{estimates}}}}}\n"
    (lab.root / "targets" / f"{target}.yaml").write_text(written)


def seconds(lab: Lab) -> list[float]:
    """Of both conversions, with what they waited; the shorter one first."""
    steps = json.loads((lab.root / ".edgebuild" / "last-run.json").read_text())["steps"]
    return sorted(step["seconds"] for step in steps if step["name"].startswith("convert:"))


def test_two_heavy_steps_run_one_after_the_other(lab: Lab) -> None:
    most = memory().available // 10**6 * 6 // 10
    for number, target in enumerate(("one", "two")):
        give(lab, target, f"!slow1.{number * '0'}", f"convert: {most}MB")
    result = run(lab, "-n", "2", "convert:one", "convert:two")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("waits for memory that other steps hold") == 1
    first, second = seconds(lab)
    assert second > first + 0.8


def test_light_ones_take_no_part(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number, target in enumerate(("one", "two")):
        give(lab, target, f"!slow1.{number * '0'}", "convert: 499MB")
    result = run(lab, "-n", "2", "convert:one", "convert:two")
    assert result.returncode == 0, result.stderr
    assert "waits" not in result.stdout
    assert not (tmp_path / "cache" / "edgebuild" / "memory").exists()


def test_a_measurement_and_who_waits_for_its_memory_do_not_wait_for_each_other(
    lab: Lab, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """One prepares, holds memory and waits for the machine; the other waits for that memory, and holds no machine meanwhile."""
    other = make_lab(tmp_path / "other")
    most = memory().available // 10**6 * 6 // 10
    (lab.root / "platforms" / "fake.yaml").write_text(MEASURED)
    give(lab, "one", "a model", f"benchmark: {most}MB")
    give(other, "one", "a model", f"convert: {most}MB")
    assert run(lab, "evaluate:one").returncode == run(other, "assess:one").returncode == 0
    said = {"stdout": subprocess.PIPE, "text": True}
    with locked(f"{os.environ['XDG_CACHE_HOME']}/edgebuild/machine.lock", alone=False):
        measures = subprocess.Popen([str(BIN / "doit"), "benchmark:one"], cwd=lab.root, **said)
        request.addfinalizer(measures.kill)
        assert measures.stdout
        assert any("waits to have the machine to itself" in line for line in measures.stdout)
        waits = subprocess.Popen([str(BIN / "doit"), "convert:one"], cwd=other.root, **said)
        request.addfinalizer(waits.kill)
        assert waits.stdout
        assert any("waits for memory that other steps hold" in line for line in waits.stdout)
    assert "0 failed" in measures.communicate(timeout=120)[0]
    assert "0 failed" in waits.communicate(timeout=120)[0]


@pytest.mark.parametrize("killed", [False, True])
def test_builds_of_two_projects(lab: Lab, tmp_path: Path, killed: bool) -> None:
    """The second waits for the first, which ends or is killed."""
    other = make_lab(tmp_path / "other")
    most = memory().available // 10**6 * 6 // 10
    give(lab, "one", "!slow60" if killed else "!slow5", f"convert: {most}MB")
    give(other, "one", "!slow0", f"convert: {most}MB")
    assert run(other, "assess:one").returncode == 0
    begin = [str(BIN / "doit"), "convert:one"]
    first = subprocess.Popen(begin, cwd=lab.root, stdout=subprocess.DEVNULL)
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "edgebuild" / "memory"
    ends(lambda: folder.exists() and names(folder))
    second = subprocess.Popen(begin, cwd=other.root, stdout=subprocess.PIPE, text=True)
    assert second.stdout
    assert any("waits for memory that other steps hold" in line for line in second.stdout)
    assert first.poll() is None
    if killed:
        first.kill()
    assert "convert:one" in second.stdout.read()
    assert second.wait(60) == 0
    assert first.wait(60) == (-signal.SIGKILL if killed else 0)
    assert names(folder) == []


def test_a_step_that_can_never_fit_is_refused(lab: Lab) -> None:
    give(lab, "one", "hello", "quantize: 900TB")
    plan = run(lab, "plan", "one", program="edgebuild")
    assert plan.returncode == 1
    assert "cannot pass: memory available: quantize:one needs 900 TB at its peak, against" in plan.stdout
    assert "900 TB " in next(line for line in plan.stdout.splitlines() if line.startswith("quantize:one"))
    result = run(lab, "quantize:one")
    assert result.returncode == 1
    assert "quantize:one needs 900 TB at its peak, against" in result.stderr
    assert "available: free memory, take a smaller model, or build on a larger machine" in result.stderr
    assert not (lab.root / ".edgebuild" / "logs" / "one" / "quantize.log").exists()  # it never began
    assert (lab.root / "build" / "one" / "convert").exists()
    give(lab, "one", "hello", "quantize: 900MB")
    assert run(lab, "quantize:one").returncode == 0
    assert last_run(lab)["convert:one"] == "fresh"


def test_an_estimate_over_the_limit_is_refused(lab: Lab) -> None:
    """The fake backend takes three times its source and 10 MB; by name the target says that it takes less."""
    (lab.root / "model.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16) + b"y" * 50_000_000)
    target = lab.root / "targets" / "one.yaml"
    target.write_text(TARGET + "limits: {memory: 100MB}\n")
    result = run(lab)
    assert result.returncode == 1
    assert (
        "convert:one needs about 160 MB at its peak (with a margin 684 MB), against 100 MB: raise limits.memory" in result.stderr
    )
    assert "where the estimate is wrong, limits.estimates: {convert: SIZE} says better" in result.stderr
    assert run(lab, "plan", "one", program="edgebuild").returncode == 1
    target.write_text(
        TARGET + "limits: {memory: 100MB, estimates: {convert: 50MB, quantize: 50MB, evaluate: 50MB, package: 50MB}}\n"
    )
    assert run(lab, "plan", "one", program="edgebuild").returncode == 0


@pytest.mark.parametrize("text", ["estimates: {convert: 0MB}", "estimates: {fetch: 1GB}", "estimates: {convert: 5}"])
def test_bad_estimates(lab: Lab, text: str) -> None:
    (lab.root / "targets" / "one.yaml").write_text(TARGET + f"limits: {{{text}}}\n")
    result = run(lab)
    assert result.returncode == 3
    assert "targets/one.yaml:5: limits.estimates" in result.stderr


@pytest.mark.parametrize(
    ("text", "limits", "words"),
    [
        ("!memory", "memory: 400MB", ("over its limit of 400 MB", "raise limits.memory, or take a smaller model")),
        ("!killed", "time: 60s", ("(SIGKILL)", "build with -n 1", "limits.estimates: {convert: SIZE}")),
        ("!bad_alloc", "time: 60s", ("for want of memory", "limits.estimates: {convert: SIZE}")),
        ("!MemoryError", "memory: 400MB", ("it got no more memory", "raise limits.memory")),
    ],
)
def test_a_worker_killed_for_memory(lab: Lab, text: str, limits: str, words: tuple[str, ...]) -> None:
    write_model(lab.root / "model.gguf", text)
    (lab.root / "targets" / "one.yaml").write_text(TARGET + f"limits: {{{limits}}}\n")
    result = run(lab, "convert:one")
    assert result.returncode == 1
    assert "10 MB were expected, and" in result.stderr
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.stderr


def test_the_machine_is_the_limit_where_there_is_no_other() -> None:
    here = memory()
    assert 0.9 * min(here.total, here.cgroup_limit or here.total) < _machine_memory()
    assert _machine_memory() <= 0.95 * min(here.total, here.cgroup_limit or here.total)
