"""Workers end with whoever started them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from edgebuild import process
from edgebuild.errors import INTERRUPTED
from tests.conftest import Lab
from tests.test_cli import run

PARENT = """
import os, signal, subprocess, sys
from edgebuild import process
child = subprocess.Popen([*process._dying_with_us(), "sleep", "60"], start_new_session=True)
print(child.pid, flush=True)
while os.readlink(f"/proc/{child.pid}/exe") != sys.argv[1]: pass
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="setpriv is of Linux")
def test_one_that_has_not_started_yet_ends_with_its_parent() -> None:
    """Before it hears of anything: `sleep` asks for nothing itself."""
    sleep = os.path.realpath(shutil.which("sleep") or "")
    parent = subprocess.run([sys.executable, "-c", PARENT, sleep], capture_output=True, text=True, timeout=60, check=False)
    assert parent.returncode == -signal.SIGKILL, parent.stderr
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int(parent.stdout)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not psutil.pid_exists(int(parent.stdout))


@pytest.mark.skipif(sys.platform != "linux", reason="setpriv is of Linux")
def test_one_whose_parent_was_gone_before_the_kernel_was_asked_is_not_started(tmp_path: Path) -> None:
    parent = subprocess.Popen(["true"])
    parent.wait()
    words = [str(parent.pid) if word == str(os.getpid()) else word for word in process._dying_with_us()]
    assert subprocess.run([*words, "touch", tmp_path / "made"], check=False).returncode != 0
    assert not (tmp_path / "made").exists()
    assert subprocess.run([*process._dying_with_us(), "touch", tmp_path / "made"], check=False).returncode == 0
    assert (tmp_path / "made").exists()


def test_a_setpriv_that_cannot_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    process._setpriv.cache_clear()
    monkeypatch.setattr("shutil.which", lambda name: "/bin/false" if name == "setpriv" else None)
    assert process._dying_with_us() == []
    process._setpriv.cache_clear()


def test_one_whose_parent_is_gone_at_its_start_does_nothing(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    record.write_text("no record: it is not read")
    words = [sys.executable, "-m", "edgebuild.worker", str(record)]
    worker = subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    assert worker.stdin
    assert worker.stderr
    worker.stdin.close()
    assert (worker.stderr.read(), worker.wait(timeout=60)) == (b"", INTERRUPTED)
    worker.stderr.close()


@pytest.mark.skipif(sys.platform != "linux", reason="setpriv is of Linux")
def test_threads_that_wait_sleep_where_steps_run_beside_one_another(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under `doit -n`, but for a benchmark; a step at a time, libraries do as they like."""
    wrapper, seen = tmp_path / "bin" / "setpriv", tmp_path / "seen"
    wrapper.parent.mkdir()
    verb = """sed -n 's/.*"verb": "\\([a-z]*\\)".*/\\1/p' "$last" 2>/dev/null"""
    wrapper.write_text(f'#!/bin/sh\nfor last; do :; done\nenv >> "{seen}/$({verb}).env"\nexec {shutil.which("setpriv")} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", str(wrapper.parent), prepend=os.pathsep)

    def told(*words: str) -> dict[str, set[str]]:
        seen.mkdir()
        assert run(lab, *words).returncode == 0
        found = {path.stem: set(path.read_text().splitlines()) for path in seen.iterdir()}
        shutil.rmtree(seen)
        return found

    wanted = {f"{name}={value}" for name, value in process.SLEEPING.items()}
    alone = told("evaluate:one")
    assert "evaluate" in alone
    assert not any(wanted & lines for lines in alone.values())
    verbs = told("-n", "2", "again=evaluate:one", "build:one")
    assert {"evaluate", "benchmark"} <= verbs.keys()
    assert wanted <= verbs["evaluate"]
    assert not wanted & verbs["benchmark"]


ENDING = """
import atexit, ctypes, os, runpy, sys, threading, time
from edgebuild import gates

class Heavy:
    def __del__(self):
        print("taken apart", file=sys.stderr, flush=True)

def run(action):
    gates.heavy = Heavy()
    atexit.register(print, "its own end", flush=True)
    ctypes.CDLL(None).puts(b"held back by C")
    threading.Thread(target=lambda: (time.sleep(0.2), print("its thread"))).start()
    raise gates.StepFailed("as it should")

gates.run = run
sys.argv = ["worker", sys.argv[1]]
runpy.run_module("edgebuild.worker", run_name="__main__")
"""


def test_one_that_has_done_its_work_is_not_taken_apart(tmp_path: Path) -> None:
    """Its threads and its frameworks' own ends are waited for, and nothing printed is lost."""
    record = tmp_path / "record.json"
    record.write_text(
        json.dumps({"root": "/", "verb": "gate", "backend": "", "params": {}, "toolchain": {}, "inputs": {}, "outputs": {}})
    )
    done = subprocess.run([sys.executable, "-c", ENDING, record], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == ["held back by C", "its own end", "its thread"]
    assert json.loads((tmp_path / "result.json").read_text())["error"] == "as it should"
    record.write_text("no record")
    done = subprocess.run([sys.executable, "-c", ENDING, record], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1][:15]) == (1, "json.decoder.JS")


def test_one_whose_parent_is_gone_does_nothing_more() -> None:
    """Not even while no other thread gets its turn, as where a framework is imported."""
    script = "import sys; from edgebuild import tether; sys.setswitchinterval(60); tether.end_with_input(); print('it lives', flush=True)"
    done = subprocess.run([sys.executable, "-c", script], input=b"", capture_output=True, start_new_session=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"")


@pytest.mark.parametrize(
    ("verb", "toolchain", "found"),
    [
        ("evaluate", {"torch": "2.13.0"}, "False"),
        ("package", {}, "False"),
        ("convert", {"torch": "2.13.0"}, "True"),
        ("convert", {"mlx": "0.32.4"}, "False"),
        ("smoke", {"torch": "missing"}, "True"),
    ],
)
def test_torch_is_there_for_what_may_run_it(tmp_path: Path, verb: str, toolchain: dict[str, str], found: str) -> None:
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"verb": verb, "toolchain": toolchain}))
    look = "worker.perform = lambda record: worker.Outcome(summary=str('torch' not in sys.modules))"
    script = f"import sys; from edgebuild import worker; {look}; sys.exit(worker.main(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", script, record], stdin=subprocess.PIPE, timeout=60, check=True)
    assert json.loads((tmp_path / "result.json").read_text())["summary"] == found


def test_waiting_for_the_machine_is_no_time_of_its_own() -> None:
    """What a worker waits for others counts neither to its limit nor to what it took."""
    looks = iter([1] * 8)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.2)"], stdin=subprocess.PIPE) as child:
        watched = process._watch(child, 10**12, 0.9, lambda since: since * next(looks, 0))
    assert (watched.ended, watched.waited >= 0.5) == ("", True)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        watched = process._watch(child, 10**12, 0.3, lambda since: 0.0)
        child.kill()
    assert (watched.ended, watched.waited) == ("time", 0.0)
