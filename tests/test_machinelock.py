"""A step stands still while a measurement has the machine, and goes on behind it; however either ends, nothing stands still for good."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from edgebuild import machinelock
from edgebuild.files import process_name, user_cache
from edgebuild.fresh import read_receipt
from edgebuild.project import Project
from tests.conftest import TARGET, Lab, ends, write_model
from tests.test_cli import BIN, left_behind, run

STANDS, GOES = (
    f"convert:one                      {machinelock.STANDS}\n",
    f"convert:one                      {machinelock.GOES}\n",
)


@contextmanager
def measurement() -> Iterator[None]:
    """One by another process's worker, which began by sharing the machine."""
    with machinelock.shared(nobody) as handle, machinelock.exclusive(user_cache(), handle, nobody):
        yield


def nobody() -> None:
    """Nobody is told."""


@contextmanager
def slow(lab: Lab, text: str, *options: str) -> Iterator["subprocess.Popen[str]"]:
    """A build whose conversion is under way."""
    write_model(lab.root / "model.gguf", text)
    said = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([str(BIN / "doit"), *options], cwd=lab.root, **said) as process:  # type: ignore[call-overload]
        try:
            ends(lambda: bool(converting(lab)), 60)
            yield process
        finally:
            process.kill()


def converting(lab: Lab) -> list[psutil.Process]:
    """The worker that runs behind `assess`."""
    if not (lab.root / "build/one/assess.json").exists():
        return []
    found = ((process, process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    return [process for process, words in found if "edgebuild.worker" in words and any(str(lab.root) in word for word in words)]


def test_a_step_stands_still_and_its_time_with_it(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    (lab.root / "targets" / "one.yaml").write_text(TARGET + "limits: {time: 8s}\n")
    with slow(lab, "!slow3") as process:
        (worker,) = converting(lab)
        with measurement():
            ends(lambda: worker.status() == psutil.STATUS_STOPPED, 10)
            time.sleep(9)
            assert worker.status() == psutil.STATUS_STOPPED
        said = process.communicate(timeout=60)[0].splitlines(keepends=True)
    assert process.returncode == 0, said
    assert said.index(STANDS) < said.index(GOES)
    steps = json.loads((lab.root / ".edgebuild" / "last-run.json").read_text())["steps"]
    assert next(step["seconds"] for step in steps if step["name"] == "convert:one") >= 9  # as one waited
    monkeypatch.chdir(lab.root)
    project = Project()
    receipt = read_receipt(project.steps["convert:one"].receipt)
    assert receipt
    record = project.store.record(receipt.key)
    assert record
    assert record.seconds < 8  # as it worked


def test_two_measurements_and_it_goes_on_behind_both(lab: Lab) -> None:
    """Both prepare; neither has the machine while the other one does."""
    ready, running, most = threading.Barrier(2), 0, []

    def measure() -> None:
        nonlocal running
        with machinelock.shared(nobody) as handle:
            ready.wait(30)
            with machinelock.exclusive(user_cache(), handle, nobody):
                running += 1
                most.append(running)
                time.sleep(0.3)
                running -= 1

    with slow(lab, "!slow2") as process:
        both = [threading.Thread(target=measure) for _ in range(2)]
        for one in both:
            one.start()
        for one in both:
            one.join(30)
        assert most == [1, 1]
        assert process.wait(60) == 0


def test_a_step_with_a_clock_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it runs nobody stands still yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    waited = threading.Event()
    measured = threading.Event()

    def measure() -> None:
        with machinelock.shared(nobody) as handle, machinelock.exclusive(user_cache(), handle, waited.set):
            measured.set()

    with machinelock.shared(nobody, still=True) as still:
        with machinelock.shared(nobody):
            thread = threading.Thread(target=measure)
            thread.start()
            assert waited.wait(10)
            assert not machinelock.wanted()
        ends(machinelock.wanted)
        assert not measured.is_set()
        machinelock.stand_aside(still)
        assert measured.is_set()
        thread.join(10)
        assert not machinelock.wanted()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("options", [(), ("-n", "2")])
def test_a_build_that_ends_leaves_nothing_that_stands_still(lab: Lab, number: int, options: tuple[str, ...]) -> None:
    """And does not wait for a measurement that is none of its own."""
    with slow(lab, "!slow60", *options) as process, measurement():
        ends(lambda: all(one.status() == psutil.STATUS_STOPPED for one in converting(lab)), 10)
        process.send_signal(number)
        process.wait(20)
        ends(lambda: not left_behind(str(lab.root)), 20)


def test_what_a_dead_worker_had_started_is_ended_though_it_stands_still(lab: Lab) -> None:
    """A process that stands still does not see that its input ended, and its worker may be gone."""
    child = [sys.executable, "-c", "import time; time.sleep(3600) # edgebuild-left-behind"]
    leader = f"import subprocess; print(subprocess.Popen({child}).pid)"
    words = [sys.executable, "-c", leader]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as worker:
        name = process_name(worker.pid)
        assert worker.stdout
        left = psutil.Process(int(worker.stdout.readline()))
    left.suspend()
    (lab.root / ".edgebuild" / "workers").mkdir(parents=True)
    (lab.root / ".edgebuild" / "workers" / f"999999999.1-{name}").touch()
    assert run(lab).returncode == 0
    ends(lambda: not left.is_running() or left.status() == psutil.STATUS_ZOMBIE, 10)
