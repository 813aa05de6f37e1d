"""Workers end with whoever started them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from edgebuild.errors import INTERRUPTED

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
    from edgebuild import process

    parent = subprocess.Popen(["true"])
    parent.wait()
    words = [str(parent.pid) if word == str(os.getpid()) else word for word in process._dying_with_us()]
    assert subprocess.run([*words, "touch", tmp_path / "made"], check=False).returncode != 0
    assert not (tmp_path / "made").exists()
    assert subprocess.run([*process._dying_with_us(), "touch", tmp_path / "made"], check=False).returncode == 0
    assert (tmp_path / "made").exists()


def test_a_setpriv_that_cannot_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgebuild import process

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


def test_the_allocator_is_left_alone_where_a_measurement_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgebuild import process

    seen: list[dict[str, str]] = []

    def begin(self: object, words: object, *, env: dict[str, str], **how: object) -> None:
        seen.append(env)

    monkeypatch.setattr(process.Workers, "_begin", begin)
    for verb in ("convert", "benchmark"):
        process.Workers()._start({"verb": verb}, "record.json", str(tmp_path), None, sys.executable)
    assert process.ALLOCATOR.items() <= seen[0].items()
    assert not process.ALLOCATOR.keys() & seen[1].keys()
