"""The sandbox: what a program in it sees, writes and reaches."""

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from edgebuild import bundle, sandbox
from edgebuild.errors import StepFailed


@pytest.fixture(autouse=True)
def bubblewrap() -> None:
    if reason := sandbox.closed():
        if "CI" in os.environ:
            pytest.fail(f"CI is set, so there must be a sandbox: {reason}")
        pytest.skip(reason)


def shell(script: str, scratch: Path, root: Path | None = None, **more: str) -> "subprocess.CompletedProcess[bytes]":
    return sandbox.run(["sh", "-c", script], scratch=scratch, root=root, environment=more)


def test_it_writes_in_its_scratch_alone(tmp_path: Path) -> None:
    scratch, beside = tmp_path / "scratch", tmp_path / "beside"
    scratch.mkdir()
    done = shell(f"echo a > made; echo b > {beside}; echo c > /usr/c; echo d > /etc/d; echo e > {Path.home()}/e", scratch)
    assert done.returncode != 0
    assert (scratch / "made").read_text() == "a\n"
    assert not beside.exists()
    assert not Path("/usr/c").exists()
    assert not Path("/etc/d").exists()
    assert not (Path.home() / "e").exists()


def test_with_a_root_of_its_own_absolute_paths_lie_in_that(tmp_path: Path) -> None:
    scratch, root = tmp_path / "scratch", tmp_path / "root"
    for folder in (scratch, root):
        folder.mkdir()
    done = shell("mkdir -p /opt/x && echo a > /opt/x/y && id -u && ls / && test ! -e /home", scratch, root)
    assert done.returncode == 0, done.stderr
    assert (root / "opt/x/y").read_text() == "a\n"
    assert not Path("/opt/x").exists()
    assert done.stdout.split()[0] == str(os.getuid()).encode()


def test_it_reaches_nobody_and_sees_no_other_process(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
        words = [shutil.which("python3") or "python3", "-c", connect]
        done = sandbox.run(words, scratch=tmp_path)
    assert b"ConnectionRefusedError" in done.stderr
    assert int(shell("ls -d /proc/[0-9]* | wc -l", tmp_path).stdout) < 6


def test_its_environment_is_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    assert shell("echo $SECRET $GIVEN", tmp_path, GIVEN="y").stdout == b"y\n"


def test_it_ends_in_time(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match="sleep took longer than 1 s"):
        sandbox.run(["sleep", "60"], scratch=tmp_path, timeout=1)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "bwrap is not installed: apt-get install bubblewrap"),
        ("echo bwrap: No permissions to create new namespace >&2; exit 1", "bwrap makes no sandbox here: bwrap: No permissions"),
    ],
)
def test_why_there_is_none(script: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundles are then proven less far, and say why."""
    if script:
        (tmp_path / "bwrap").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + (os.pathsep + "/bin" if script else ""))
    sandbox.closed.cache_clear()
    try:
        assert sandbox.closed().startswith(message)
    finally:
        sandbox.closed.cache_clear()


def test_without_bubblewrap_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "PROGRAM", "no-such-program")
    with pytest.raises(StepFailed, match="no-such-program is not installed; Debian's package is bubblewrap"):
        sandbox.run(["true"], scratch=tmp_path)


def test_a_bundles_own_self_test_changes_nothing_and_sees_nobody(tmp_path: Path) -> None:
    """With what this interpreter imports, wherever that lies."""
    script = tmp_path / "bundle" / "selftest.py"
    script.parent.mkdir()
    script.write_text(
        "import json, os, numpy\n"
        "from pathlib import Path\n"
        "for path in (Path(__file__).with_name('made'), Path.home() / 'made', Path('/usr/made')):\n"
        "    try:\n        path.write_text('')\n    except OSError:\n        pass\n"
        "print(json.dumps({'parent': os.getppid()}))\n"
    )
    evidence = bundle.self_test(script.parent, script.name)
    assert os.listdir(script.parent) == ["selftest.py"]
    assert not (Path.home() / "made").exists()
    assert not Path("/usr/made").exists()
    assert evidence["parent"] == 1


def test_where_there_is_no_sandbox_it_runs_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "selftest.py"
    script.write_text("import numpy\nprint('{}')\n")
    monkeypatch.setattr(sandbox, "closed", lambda: "none here")
    assert bundle.self_test(tmp_path, script.name) == {}
    script.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(bundle, "TIMEOUT", 1)
    with pytest.raises(StepFailed, match=r"selftest\.py took longer than 1 s"):
        bundle.self_test(tmp_path, script.name)
