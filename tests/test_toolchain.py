"""Toolchains: their environments are whole or not at all, whatever the index or a kill does, and a build uses them by itself."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest

from edgebuild import baseimage, digest, du, environment, equip, gc, toolchain
from edgebuild.errors import UserError
from edgebuild.files import locked
from edgebuild.files import mine as mine_name
from edgebuild.project import Project
from edgebuild.provide import Toolchains, Unwatched
from tests.conftest import ROOT, Lab, ends, make_lab
from tests.wheels import OURS, Index, index, wheel

PARTS = ("tiny", "small", "little")


@pytest.fixture
def packages(tmp_path: Path) -> Iterator[Index]:
    """Three tiny packages, and a lock of them."""
    with index(tmp_path / "edgebuild-copy") as found:
        for name in PARTS:
            found.add(name, "1.0", {f"{name}.py": b"VALUE = 1\n"})
        found.lock("tools", *PARTS, head="# import: tiny small little\n")
        yield found


def imported(environment: Path, code: str) -> str:
    """What the interpreter of an environment prints, with nothing but what is installed there."""
    return subprocess.run(
        [str(environment / "bin" / "python"), "-I", "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


# -- install, list, remove ----------------------------------------------------------------------------------------------
def test_install_list_remove(packages: Index) -> None:
    assert "not installed" in packages.run("toolchain", "list").stdout
    done = packages.run("toolchain", "install", "tools")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith(
        "toolchain:tools                  ran "
    )  # before it, on a busy machine, that it runs
    assert "3 packages, " in done.stdout
    (environment,) = packages.made()
    assert packages.left() == []
    assert imported(environment, "import tiny, small, little; print(tiny.VALUE)") == "1"
    note = json.loads((environment / "edgebuild.json").read_text())
    assert (note["name"], note["digest"], note["packages"]) == ("tools", environment.name, 3)
    asked = packages.loopback.asked.total()
    assert "is there" in packages.run("toolchain", "install", "--all").stdout
    assert packages.loopback.asked.total() == asked
    assert "tools                   3 installed " in packages.run("toolchain", "list").stdout
    assert packages.run("toolchain", "remove", "tools").stdout.startswith("removed tools: ")
    assert packages.made() == packages.left() == []
    assert packages.run("toolchain", "remove", "tools").stdout == "tools is not installed\n"


def test_a_lock_of_wheels_installs_nothing(packages: Index) -> None:
    """They are downloaded as an index has them, by their hashes, and are no environment."""
    packages.lock("image", "tiny", "small", head="# form: wheels\n")
    done = packages.run("toolchain", "install", "image")
    assert done.returncode == 0, done.stdout + done.stderr
    (place,) = packages.made()
    assert sorted(path.name for path in place.iterdir()) == ["edgebuild.json", "wheels"]
    assert json.loads((place / "edgebuild.json").read_text())["form"] == "wheels"
    files = packages.loopback.files
    assert isinstance(files, dict)
    assert {path.name: path.read_bytes() for path in (place / "wheels").iterdir()} == {
        name: files[f"files/{name}"] for name in ("small-1.0-py3-none-any.whl", "tiny-1.0-py3-none-any.whl")
    }
    assert "is there" in packages.run("toolchain", "install", "image").stdout
    packages.add("tiny", "1.1", {"tiny.py": b"VALUE = 2\n"})
    packages.lock("image", "tiny", "small", head="# form: wheels\n")
    files["files/tiny-1.1-py3-none-any.whl"] = b"PK"
    refused = packages.run("toolchain", "install", "image")
    assert refused.returncode == 1
    assert "which are refused" in refused.stdout + refused.stderr
    assert packages.made() == [place]
    assert packages.left() == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["install"], "name a toolchain, or --all; there are: tools, base"),
        (["install", "tols"], 'there is no toolchain "tols"; there are: tools, base. Did you mean "tools"?'),
        (["remove", "tools", "--all"], "give names of toolchains or --all, not both"),
        (["instal", "tools"], "invalid choice"),
    ],
)
def test_wrong_words(packages: Index, words: list[str], message: str) -> None:
    done = packages.run("toolchain", *words)
    assert done.returncode == 3
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_environment_that_does_not_work_is_made_again(packages: Index) -> None:
    packages.run("toolchain", "install", "tools")
    (environment,) = packages.made()
    next(environment.glob("lib/*/site-packages/tiny.py")).unlink()
    done = packages.run("toolchain", "install", "tools")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ran" in done.stdout
    assert imported(environment, "import tiny; print(tiny.VALUE)") == "1"


def test_scripts_of_packages_run(packages: Index) -> None:
    """The environment is made under another name than it has in the end."""
    packages.add("hello", "1.0", {"hello.py": b"def main(): print('hi')\n", **entry_point("hello", "say-hi = hello:main")})
    packages.lock("tools", "hello")
    assert packages.run("toolchain", "install", "tools").returncode == 0
    (environment,) = packages.made()
    assert subprocess.run([str(environment / "bin" / "say-hi")], capture_output=True, text=True, check=True).stdout == "hi\n"


def entry_point(name: str, line: str) -> dict[str, bytes]:
    return {f"{name}-1.0.dist-info/entry_points.txt": f"[console_scripts]\n{line}\n".encode()}


BACKEND = """
import os, zipfile

def build_wheel(folder, settings=None, metadata=None):
    files = {
        "built.py": "FLAGS = %r" % os.environ.get("BUILT_FLAGS"),
        "built-1.0.dist-info/METADATA": "Metadata-Version: 2.1\\nName: built\\nVersion: 1.0\\n",
        "built-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\\nGenerator: tests\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    }
    files["built-1.0.dist-info/RECORD"] = "".join(f"{name},,\\n" for name in [*files, "built-1.0.dist-info/RECORD"])
    with zipfile.ZipFile(os.path.join(folder, "built-1.0-py3-none-any.whl"), "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return "built-1.0-py3-none-any.whl"
"""


def source() -> bytes:
    """A source distribution whose wheel holds a variable of the build's environment."""
    files = {
        "pyproject.toml": "[build-system]\nrequires = []\nbuild-backend = 'backend'\nbackend-path = ['.']\n",
        "backend.py": BACKEND,
        "PKG-INFO": "Metadata-Version: 2.1\nName: built\nVersion: 1.0\n",
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"built-1.0/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    return buffer.getvalue()


def test_a_package_is_built_from_source_where_its_lock_says_so(packages: Index) -> None:
    """Though there is a wheel, and with the variables that the lock names."""
    packages.add("built", "1.0", {"built.py": b"FLAGS = 'of a wheel'"})
    content = source()
    assert isinstance(packages.loopback.files, dict)
    packages.loopback.files["files/built-1.0.tar.gz"] = content
    packages.loopback.files["simple/built/"] += b'<a href="/files/built-1.0.tar.gz">built-1.0.tar.gz</a>\n'
    packages.lines["built"] = packages.lines["built"].rstrip() + f" \\\n    --hash=sha256:{digest.of_bytes(content)}\n"
    packages.lock("tools", "built", head="# build: BUILT_FLAGS=-DX=ON -DY=1\n# import: built\n--no-binary built\n")
    done = packages.run("toolchain", "install", "tools")
    assert done.returncode == 0, done.stdout + done.stderr
    assert imported(packages.made()[0], "import built; print(built.FLAGS)") == "-DX=ON -DY=1"


def test_uv_installs_where_there_is_no_pip(packages: Index, tmp_path: Path) -> None:
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if uv is None:
        pytest.skip("uv is not installed here")
    hidden = "import importlib.util as util; found = util.find_spec\nutil.find_spec = lambda name, *rest: None if name == 'pip' else found(name, *rest)"
    settings = {"UV_INDEX_URL": f"{packages.address}/simple", "UV_NO_CACHE": "1", "UV_NO_CONFIG": "1"}
    settings |= {"PATH": f"{Path(uv).parent}:/usr/bin:/bin", "UV_HTTP_TIMEOUT": "5"}
    assert isinstance(packages.loopback.files, dict)
    right = packages.loopback.files["files/small-1.0-py3-none-any.whl"]
    packages.loopback.files["files/small-1.0-py3-none-any.whl"] = wheel("small", "1.0", {"small.py": b"VALUE = 'evil'"})[1]
    refused = packages.start("toolchain", "install", "tools", code=hidden, **settings)
    _, errors = refused.communicate(timeout=120)
    assert refused.returncode == 1, errors
    assert "the package index gives other bytes of" in errors
    assert packages.made() == []
    packages.loopback.files["files/small-1.0-py3-none-any.whl"] = right
    done = packages.start("toolchain", "install", "tools", code=hidden, **settings)
    output, errors = done.communicate(timeout=120)
    assert done.returncode == 0, output + errors
    assert imported(packages.made()[0], "import tiny; print(tiny.VALUE)") == "1"


def test_without_an_installer_it_says_so(packages: Index) -> None:
    hidden = "import importlib.util as util; found = util.find_spec\nutil.find_spec = lambda name, *rest: None if name == 'pip' else found(name, *rest)"
    done = packages.start("toolchain", "install", "tools", code=hidden, PATH="/nowhere")
    _, errors = done.communicate(timeout=120)
    assert done.returncode == 1
    assert "neither pip nor uv is here to install packages" in errors


# -- what an index does ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("wrong", "the package index gives other bytes of small==1.0 (sha256 "),
        ("404", "the package index answers with HTTP status 404"),
        ("403", "the package index answers with HTTP status 403"),
        ("cut", "the package index "),
        ("silent", "the package index does not answer (127.0.0.1:"),
    ],
)
def test_an_index_that_misbehaves_is_one_message(packages: Index, fault: str, message: str) -> None:
    packages.loopback.faults["small-1.0-py3-none-any.whl"] = fault
    done = packages.run("toolchain", "install", "tools", PIP_DEFAULT_TIMEOUT="1", PIP_RETRIES="0")
    assert done.returncode == 1
    told = done.stderr.strip().splitlines()
    assert told[0].strip().startswith(f"toolchain:tools: {message}"), done.stderr
    assert all(line.strip().startswith(("log: ", "| ")) for line in told[1:]), done.stderr
    assert "    |" in done.stderr
    assert packages.made() == packages.left() == []
    packages.loopback.faults.clear()
    assert packages.run("toolchain", "install", "tools").returncode == 0


def test_an_index_that_is_not_there(packages: Index) -> None:
    done = packages.run("toolchain", "install", "tools", PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="1")
    assert done.returncode == 1
    assert "the package index does not answer (127.0.0.1:9)" in done.stderr, done.stderr
    assert "PIP_INDEX_URL" in done.stderr
    assert packages.made() == packages.left() == []


def test_an_index_that_is_slow_is_waited_for(packages: Index) -> None:
    for name in PARTS:
        packages.loopback.faults[f"{name}-1.0-py3-none-any.whl"] = "slow"
    assert packages.run("toolchain", "install", "tools", PIP_DEFAULT_TIMEOUT="5").returncode == 0


def test_a_version_that_the_index_does_not_have(packages: Index) -> None:
    packages.lines["tiny"] = packages.lines["tiny"].replace("1.0", "2.0")
    packages.lock("tools", *PARTS)
    done = packages.run("toolchain", "install", "tools")
    assert done.returncode == 1
    assert "the package index has no tiny==2.0 for CPython" in done.stderr


def test_a_package_that_cannot_be_imported_is_not_kept(packages: Index) -> None:
    packages.add("tiny", "1.1", {"tiny.py": b"import libcuda_of_another_machine\n"})
    packages.lock("tools", *PARTS, head="# import: tiny\n")
    done = packages.run("toolchain", "install", "tools")
    assert done.returncode == 1
    assert "cannot be imported here: ModuleNotFoundError: No module named 'libcuda_of_another_machine'" in done.stderr
    assert packages.made() == packages.left() == []


def test_what_is_tried_sends_nothing(packages: Index) -> None:
    """ONNX Runtime makes an id of the user's, and a file of what it will send, when it is imported without this variable."""
    packages.add("tiny", "1.1", {"tiny.py": b"import os\nassert os.environ['ORT_DISABLE_TELEMETRY'] == '1'\n"})
    packages.lock("tools", *PARTS, head="# import: tiny\n")
    done = packages.run("toolchain", "install", "tools", ORT_DISABLE_TELEMETRY="0")
    assert done.returncode == 0, done.stdout + done.stderr


def test_offline_says_what_is_missing(packages: Index) -> None:
    install = ["toolchain", "install", "tools"]
    for words in ([*install, "--offline"], ["--offline", *install], ["toolchain", "install", "--offline", "tools"], install):
        done = packages.run(*words, EDGEBUILD_OFFLINE="" if "--offline" in words else "1")
        assert done.returncode == 1
        assert "and the toolchain tools (tiny 1.0, small 1.0, little 1.0) is not in " in done.stderr
        assert "with a network: edgebuild toolchain install tools" in done.stderr
    assert packages.loopback.asked.total() == 0
    packages.run("toolchain", "install", "tools")
    assert packages.run("toolchain", "install", "tools", EDGEBUILD_OFFLINE="1").returncode == 0


def test_a_full_disk(packages: Index, tmp_path: Path) -> None:
    """A file system of half a megabyte, where root may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        packages.add("large", "1.0", {"large.bin": os.urandom(1_000_000)})
        packages.lock("tools", *PARTS, "large")
        done = packages.run("toolchain", "install", "tools", XDG_CACHE_HOME=str(disk))
        assert done.returncode == 1
        assert f"the disk of {disk}/edgebuild/toolchains is full; nothing was kept" in done.stderr
        assert "Traceback" not in done.stderr
        assert [path for path in (disk / "edgebuild" / "toolchains").iterdir() if path.is_dir()] == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# -- kills ----------------------------------------------------------------------------------------------------------------
MOMENTS: dict[str, Callable[[Index], bool]] = {
    "begun": lambda packages: bool(packages.left()),
    "an interpreter is there": lambda packages: any((path / "bin" / "python").exists() for path in packages.left()),
    "the index is asked": lambda packages: packages.loopback.asked.total() > 0,
    "a wheel comes": lambda packages: any("small-1.0" in asked for asked in list(packages.loopback.asked)),
    "a package is installed": lambda packages: any(any(path.glob("lib/*/site-packages/*.py")) for path in packages.left()),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_installation_is_never_used(packages: Index, moment: str) -> None:
    packages.loopback.faults["small-1.0-py3-none-any.whl"] = "slow"
    process = packages.start("toolchain", "install", "tools")
    deadline = time.monotonic() + 60
    while not MOMENTS[moment](packages):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
    process.kill()
    process.communicate()
    assert packages.made() == []
    ends(lambda: not processes(packages))
    assert "not installed" in packages.run("toolchain", "list").stdout  # which sweeps
    assert packages.left() == []
    done = packages.run("toolchain", "install", "tools")
    assert done.returncode == 0, done.stderr
    assert imported(packages.made()[0], "import tiny, small, little; print(tiny.VALUE)") == "1"


LATE = {
    "before the marker": "import os, signal; os.sync = lambda: os.kill(os.getpid(), signal.SIGKILL)",
    "before the rename": "import os, signal; os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)",
    "after the rename": "import os, signal; rename = os.rename; os.rename = lambda *_: (rename(*_), os.kill(os.getpid(), signal.SIGKILL))",
}


@pytest.mark.parametrize("moment", LATE)
def test_killed_at_the_end(packages: Index, moment: str) -> None:
    process = packages.start("toolchain", "install", "tools", code=LATE[moment])
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert bool(packages.made()) == (moment == "after the rename")
    done = packages.run("toolchain", "install", "tools")
    assert ("is there" in done.stdout) == (moment == "after the rename"), done.stdout + done.stderr
    assert packages.left() == []
    assert imported(packages.made()[0], "import tiny, small, little; print(tiny.VALUE)") == "1"


def test_an_interrupted_installation_leaves_nothing(packages: Index) -> None:
    packages.loopback.faults["small-1.0-py3-none-any.whl"] = "silent"
    process = packages.start("toolchain", "install", "tools")
    ends(lambda: MOMENTS["a wheel comes"](packages))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert packages.made() == packages.left() == []
    ends(lambda: not processes(packages))


def test_two_at_once_make_one(packages: Index) -> None:
    both = [packages.start("toolchain", "install", "tools") for _ in range(2)]
    for process in both:
        assert process.communicate(timeout=60) is not None
        assert process.returncode == 0
    assert len(packages.made()) == 1
    assert packages.loopback.asked["GET /files/tiny-1.0-py3-none-any.whl"] == 1


def processes(packages: Index) -> list[str]:
    """Those that still work on an environment of this test."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if str(packages.toolchains) in line:
            found.append(line)
    return found


# -- a build uses them ------------------------------------------------------------------------------------------------------
@pytest.fixture
def fake(packages: Index, tmp_path: Path) -> Lab:
    """A project on the fake backend, whose package is only in the index; what else a worker needs comes from here by a link."""
    release(packages, "1.0")
    packages.lock("other", "tiny")
    return make_lab(tmp_path / "project")


def release(packages: Index, version: str, *others: str) -> None:
    packages.add("edgebuild_fake_framework", version, {"fake_framework.py": b"", "ours.pth": OURS.encode()})
    packages.lock("fake", "edgebuild-fake-framework", *others, head="# import: fake_framework numpy\n")


def outcomes(lab: Lab) -> dict[str, str]:
    steps = json.loads((lab.root / ".edgebuild" / "last-run.json").read_text())["steps"]
    return {step["name"]: step["outcome"] for step in steps}


def payload(lab: Lab) -> Any:
    return json.loads((lab.root / "build" / "one" / "quantize" / "model" / "payload.json").read_text())


def test_a_build_makes_its_toolchain_and_runs_in_it(packages: Index, fake: Lab) -> None:
    first = packages.run(cwd=fake.root)
    assert first.returncode == 0, first.stdout + first.stderr
    lines = [line.split()[:2] for line in first.stdout.splitlines()]
    assert ["toolchain:fake", "ran"] in lines
    assert lines.index(["assess:one", "ran"]) < lines.index(["toolchain:fake", "ran"]) < lines.index(["convert:one", "ran"])
    assert outcomes(fake)["toolchain:fake"] == "ran"
    assert first.stdout.splitlines()[-1].startswith("edgebuild: 10 ran, 0 restored, 0 up to date, 0 failed (")
    assert payload(fake)["version"] == "1.0"  # which is installed in the environment alone
    evidence = json.loads((fake.root / "dist" / "one.evidence.json").read_text())
    assert evidence["toolchain"]["edgebuild-fake-framework"] == "1.0"
    assert evidence["toolchain"]["lock"].startswith("fake ")
    second = packages.run(cwd=fake.root)
    assert second.stdout.splitlines()[-1].startswith("edgebuild: 0 ran, 0 restored, 9 up to date, 0 failed (")
    assert len(packages.made()) == 1


def test_what_is_there_already_needs_no_toolchain(packages: Index, fake: Lab) -> None:
    """Without the environment everything is fresh; without its outputs too it is restored: nothing is installed for that."""
    packages.run(cwd=fake.root)
    packages.run("toolchain", "remove", "fake")
    assert set(outcomes_of(packages, fake).values()) == {"fresh"}
    shutil.rmtree(fake.root / "build")
    assert set(outcomes_of(packages, fake, EDGEBUILD_OFFLINE="1").values()) == {"restored"}
    assert packages.made() == []


def outcomes_of(packages: Index, lab: Lab, *words: str, **more: str) -> dict[str, str]:
    done = packages.run(*words, cwd=lab.root, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return outcomes(lab)


def test_another_lock_of_a_backend_reruns_its_steps_and_no_others(packages: Index, fake: Lab) -> None:
    packages.run(cwd=fake.root)
    packages.add("tiny", "1.1", {"tiny.py": b"VALUE = 2\n"})
    packages.lock("other", "tiny")
    assert set(outcomes_of(packages, fake).values()) == {"fresh"}
    release(packages, "1.1")
    explained = packages.run("explain", "one", cwd=fake.root).stdout
    assert "version of edgebuild-fake-framework: 1.0 → 1.1" in explained
    again = outcomes_of(packages, fake)
    assert {name for name, outcome in again.items() if outcome == "fresh"} == {"fetch:one", "assess:one"}
    assert {"toolchain:fake", "convert:one", "quantize:one", "evaluate:one", "benchmark:one", "package:one"} <= {
        name for name, outcome in again.items() if outcome == "ran"
    }
    assert payload(fake)["version"] == "1.1"
    release(packages, "1.1", "little")  # a package that the backend does not name
    assert "version of lock: fake " in packages.run("explain", "one", cwd=fake.root).stdout
    assert outcomes_of(packages, fake)["convert:one"] == "ran"
    assert len(packages.made()) == 3


def test_a_lock_is_in_the_keys_of_its_own_backend_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the repository's own targets: of four backends, one gets another version of a package that a second has too."""
    shutil.copytree(ROOT / "targets", tmp_path / "targets")
    shutil.copytree(toolchain.FOLDER, tmp_path / "locks")
    lock = tmp_path / "locks" / "onnxruntime.txt"
    os.chdir(tmp_path)

    def recipes() -> dict[str, str]:
        project = Project()
        assert not project.problems
        return {step.name: step.recipe for step in project.steps.values()}

    before = recipes()
    lock.write_text(re.sub(r"(?m)^onnx==\S+", "onnx==99.0", lock.read_text()))
    monkeypatch.setattr(toolchain, "FOLDER", str(lock.parent))
    shutil.rmtree(tmp_path / ".edgebuild")  # the plan that was kept is of locks elsewhere
    after = recipes()
    changed = {name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys()
    answers = {name for name in changed if name.startswith("answer:")}  # of its artifact, for `agree:digits`
    assert answers == {"answer:digits.candidate.web-digits"}
    assert {name.split(":")[1].split(".")[0] for name in changed - answers} == {
        *("web-digits", "android-digits", "board-digits", "container-digits", "mcu-digits")
    }
    assert "package:mcu-digits" not in changed  # it has a toolchain of its own
    assert {"convert:web-digits", "evaluate:web-digits", "package:web-digits"} <= changed
    assert changed.isdisjoint({"fetch:web-digits", "assess:web-digits", "gate:web-digits"})


def test_a_lock_changed_in_its_words_alone_reruns_nothing(packages: Index, fake: Lab) -> None:
    packages.run(cwd=fake.root)
    path = packages.root / "edgebuild" / "locks" / "fake.txt"
    path.write_text("# another comment\n" + path.read_text() + f"    --hash=sha256:{'0' * 64}\n")
    assert set(outcomes_of(packages, fake).values()) == {"fresh"}


def test_a_toolchain_that_cannot_be_made_fails_its_steps_once(packages: Index, fake: Lab) -> None:
    from tests.conftest import write_model

    write_model(fake.root / "other.gguf", "another")
    one, two = (fake.root / "targets" / f"{name}.yaml" for name in ("one", "two"))
    two.write_text(one.read_text().replace("model.gguf", "other.gguf"))
    done = packages.run(cwd=fake.root, EDGEBUILD_OFFLINE="1")
    assert done.returncode == 1
    assert done.stderr.count("and the toolchain fake (edgebuild-fake-framework 1.0) is not in ") <= 1
    found = outcomes(fake)
    assert found["toolchain:fake"] == "failed"
    assert found["convert:one"] == found["convert:two"] == "failed"
    assert "its toolchain could not be made: toolchain:fake failed" in done.stderr
    assert "Traceback" not in done.stderr
    assert packages.loopback.asked.total() == 0


def test_an_environment_in_use_is_not_removed(packages: Index, fake: Lab) -> None:
    from tests.conftest import write_model

    write_model(fake.root / "model.gguf", "!hang")
    process = packages.start(cwd=fake.root)
    ends(lambda: any("edgebuild.worker" in line for line in processes(packages)))
    done = packages.run("toolchain", "remove", "fake")
    assert done.returncode == 1
    assert "the toolchain fake is in use by a build" in done.stderr
    assert packages.made()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert packages.run("toolchain", "remove", "fake").returncode == 0


def test_a_build_that_is_killed_as_it_makes_its_toolchain(packages: Index, fake: Lab) -> None:
    packages.loopback.faults["edgebuild_fake_framework-1.0-py3-none-any.whl"] = "slow"
    process = packages.start(cwd=fake.root)
    ends(lambda: bool(packages.left()))
    process.kill()
    process.communicate()
    assert packages.made() == []
    ends(lambda: not processes(packages))
    assert outcomes_of(packages, fake)["toolchain:fake"] == "ran"
    assert packages.left() == []


def test_gc_removes_toolchains_of_other_locks_and_du_counts_them(packages: Index, fake: Lab) -> None:
    packages.run(cwd=fake.root)
    (old,) = packages.made()

    def used() -> Any:
        found = json.loads(packages.run("du", "--json", cwd=fake.root).stdout)
        jsonschema.validate(found, json.loads((ROOT / "schemas" / "du.json").read_text()))
        return {one["digest"]: one["current"] for one in found["toolchains"]}

    assert used() == {old.name: True}
    assert "toolchain" not in packages.run("gc", cwd=fake.root).stdout
    release(packages, "1.1")
    packages.run(cwd=fake.root)
    assert used() == {one.name: one != old for one in packages.made()}
    assert "would go  the toolchain fake of another lock: " in packages.run("gc", "--dry-run", cwd=fake.root).stdout
    assert old in packages.made()
    with environment_lock(old):
        assert "toolchain" not in packages.run("gc", cwd=fake.root).stdout  # in use
    assert "removed   the toolchain fake of another lock: " in packages.run("gc", cwd=fake.root).stdout
    assert old not in packages.made()
    assert len(packages.made()) == 1
    assert set(outcomes_of(packages, fake).values()) == {"fresh"}


def put(name: str, lock: str, file: str, form: str) -> Path:
    """What was made of a lock of this text, one file of five bytes."""
    named = digest.of_bytes(f"{name} {lock}".encode())
    with environment.lock(named, lambda: None, alone=True), environment.beside(named) as path:
        Path(path, file).parent.mkdir(parents=True)
        Path(path, file).write_bytes(b"12345")
        python = "CPython 3.11.4"
        made = environment.Environment(name=name, digest=named, lock=lock, python=python, packages=1, bytes=5, form=form)
        return Path(environment.place(environment.put(path, made).digest))


def make_base() -> str:
    """As a build makes it; → its path."""

    def mmdebstrap(words: Sequence[str], environment: Mapping[str, str], told: Callable[[str], None]) -> int:
        Path(words[-1]).write_bytes(b"tar")
        return 0

    with Toolchains(mmdebstrap, Unwatched(), lambda name: nullcontext()).base() as (path, missing):
        assert (missing, Path(path).read_bytes()) == ("", b"tar")
    return path


def test_wheels_and_base_images_are_kept_as_toolchains_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another lock, or damaged, they go with `gc`, unless a build uses them; what is shipped, and half-made by who lives, stays."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("EDGEBUILD_OFFLINE")
    monkeypatch.setattr(baseimage, "why_not", lambda: "")
    lock = toolchain.read("container-onnxruntime")
    assert lock is not None
    mine, old = (put(lock.name, text, "wheels/a.whl", "wheels") for text in (lock.text, "another"))
    with monkeypatch.context() as patch:
        patch.setattr(baseimage, "SUITE", "bullseye")
        old_base = Path(make_base()).parent
    base = Path(make_base()).parent
    damaged = put("tools", "any", "bin/python", "toolchain")
    (damaged / environment.MARKER).unlink()
    half, dead = (damaged.with_name(f".tmp-{who}-x") for who in (mine_name(), "1.1"))
    half.mkdir()
    dead.mkdir()
    os.chdir(make_lab(tmp_path / "project").root)
    found = {one.digest: (one.form, one.name, one.current) for one in du.usage(Project()).toolchains}
    assert found == {
        mine.name: ("wheels", "container-onnxruntime", True),
        old.name: ("wheels", "container-onnxruntime", False),
        base.name: ("base image", "base", True),
        old_base.name: ("base image", "base", False),
        damaged.name: ("toolchain", "(damaged)", False),
    }
    rows = [line.split() for line in equip.show()]
    assert ["base", "4", "installed", "3", "B"] in [row[:5] for row in rows]
    assert [row[2:5] for row in rows if row[0] == "container-onnxruntime" and row[2] != "not"] == [
        ["of", "another", "lock"],
        ["of", "CPython", "3.11.4"],
    ]

    def collected() -> str:
        return gc.show(gc.collect(Project(), 0, None, False, lambda: None), False)

    with environment_lock(old), environment_lock(old_base):
        assert "the wheels" not in (said := collected())
        assert "the base image" not in said
        assert "removed   the toolchain (damaged) of another lock: 5 B" in said
    assert not damaged.exists()
    said = collected()
    assert "removed   the wheels container-onnxruntime of another lock: 5 B" in said
    assert "removed   the base image base of another lock: 3 B" in said
    assert {path.name for path in base.parent.iterdir() if path.is_dir()} == {mine.name, base.name, half.name}
    assert equip.drop(["base", "tools"]) == ["removed base: 3 B", "tools is not installed"]
    assert not base.exists()


def test_a_base_that_cannot_be_made_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(baseimage, "why_not", lambda: "")
    toolchains = Toolchains(lambda words, environment, told: 1, Unwatched(), lambda name: nullcontext())
    with toolchains.base() as (path, missing):
        assert (path, missing) == ("", "offline")
    monkeypatch.delenv("EDGEBUILD_OFFLINE")
    with toolchains.base() as (path, missing):
        assert (path, missing) == ("", "mmdebstrap cannot make a base image of Debian bookworm: it says nothing")
    assert [path.name for path in tmp_path.rglob("*") if path.suffix != ".lock"] == ["edgebuild", "toolchains"]


def test_the_base_is_installed_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what mmdebstrap says where it fails, and why it is not asked; not by --all, which takes what needs no root."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(toolchain, "names", list[str])
    program = tmp_path / "bin" / "mmdebstrap"
    program.parent.mkdir()
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    def typed(*words: str, script: str = "") -> tuple[int, str]:
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        parser = ArgumentParser()
        equip.takes(parser)
        return equip.run(parser.parse_args(words)), "".join(capsys.readouterr())

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "the base image cannot be made here: not run as root; it takes root, a" in typed("install", "base")[1]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "the base image cannot be made here: offline; " in typed("install", "base")[1]
    monkeypatch.delenv("EDGEBUILD_OFFLINE")
    status, said = typed("install", "base", script="echo E: no mirror; exit 1")
    assert (status, "mmdebstrap cannot make a base image of Debian bookworm: E: no mirror" in said) == (1, True)
    assert typed("install", "--all", script="exit 1") == (0, "")
    assert [line.split() for line in typed("list")[1].splitlines()[1:]] == [["base", "4", "not", "installed"]]
    status, said = typed("install", "base", script='for last; do :; done; printf tar >"$last"')
    assert (status, " ran " in said, "4 packages, 3 B" in said) == (0, True, True)
    assert " is there " in typed("install", "base", script="exit 1")[1]
    assert typed("list")[1].splitlines()[1].split()[:5] == ["base", "4", "installed", "3", "B"]
    assert typed("remove", "base") == (0, "removed base: 3 B\n")
    assert typed("remove", "base") == (0, "base is not installed\n")


def environment_lock(place: Path) -> AbstractContextManager[None]:
    """Held as by a build that works there."""
    return locked(f"{place}.lock", alone=False)


def test_plan_says_when_a_toolchain_is_made(packages: Index, fake: Lab) -> None:
    def planned(status: int = 0, **more: str) -> Any:
        done = packages.run("plan", "one", "--json", cwd=fake.root, **more)
        assert done.returncode == status, done.stdout + done.stderr
        found = json.loads(done.stdout)
        jsonschema.validate(found, json.loads((ROOT / "schemas" / "plan.json").read_text()))
        return found

    expected = {"name": "fake", "installed": False, "packages": 1, "will": "run"}
    assert planned()["toolchains"] == [expected]
    offline = planned(status=1, EDGEBUILD_OFFLINE="1")
    assert [finding["subject"] for finding in offline["findings"]] == ["toolchain:fake"]
    assert "toolchain:fake                   run" in packages.run("plan", "one", cwd=fake.root).stdout
    packages.run(cwd=fake.root)
    assert planned()["toolchains"] == [{**expected, "installed": True, "will": "nothing"}]
    packages.run("toolchain", "remove", "fake")
    assert planned()["toolchains"] == [{**expected, "will": "nothing"}]  # all is fresh
    shutil.rmtree(fake.root / "build")
    assert planned()["toolchains"] == [{**expected, "will": "nothing"}]  # all is restored
    assert packages.made() == []


def test_doctor_tries_a_toolchain(packages: Index, tmp_path: Path) -> None:
    """A lock that this Python does not match, then its environment, then one that is broken."""
    packages.add(
        "onnxruntime", "99.0", {"onnxruntime.py": b"raise ImportError('libonnx is missing')\n", "ours.pth": OURS.encode()}
    )
    packages.lock("onnxruntime", "onnxruntime")

    def row(status: int) -> Any:
        done = packages.run("doctor", "--json", cwd=tmp_path)
        assert done.returncode == status, done.stdout + done.stderr
        return next(one for one in json.loads(done.stdout)["backends"] if one["name"] == "onnxruntime")

    before = row(0)
    assert before["state"] == "not installed"
    assert "instead of 99.0" in before["message"]
    assert "edgebuild toolchain install onnxruntime" in before["message"]
    assert packages.run("toolchain", "install", "onnxruntime").returncode == 0
    after = row(1)
    assert after["state"] == "broken"
    assert after["python"] == str(packages.made()[0] / "bin" / "python")
    assert "libonnx is missing" in after["message"]
    assert ", in its own toolchain " in after["message"]


# -- what a lock says ---------------------------------------------------------------------------------------------------
def write(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    monkeypatch.setattr(toolchain, "FOLDER", str(folder))
    (folder / "some.txt").write_text(text)


def test_a_lock_is_read_for_this_interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (
        "# import: some.module other\n# build: CMAKE_ARGS=-DX=ON -DY=OFF\n--extra-index-url https://127.0.0.1/simple\n"
        "Some_Package==1.0 ; python_full_version < '3' \\\n    --hash=sha256:aa\n"
        "Some_Package==2.0 ; python_full_version >= '3' \\\n    --hash=sha256:bb\n"
        "torch==2.13.0 \\\n    --hash=sha256:cc\n"
    )
    write(monkeypatch, tmp_path, text)
    lock = toolchain.read("some")
    assert lock is not None
    assert lock.pins == {"some-package": "2.0", "torch": "2.13.0"}
    assert lock.imports == ("some.module", "other")
    assert lock.build == {"CMAKE_ARGS": "-DX=ON -DY=OFF"}
    assert lock.differences({"python": "x", "some.package": "2.0", "torch": "2.13.0+cpu", "unnamed": "5"}) == []
    assert lock.differences({"some_package": "1.0", "torch": "missing"}) == [
        "some_package 1.0 instead of 2.0",
        "torch missing instead of 2.13.0",
    ]
    for changed, content, place in (
        (text.replace("sha256:cc", "sha256:dd"), True, False),
        (text.replace("2.13.0", "2.13.1"), False, False),
        (text.replace("=OFF", "=ON"), False, False),
        (text + "# a comment\n", True, True),
        (text.replace("127.0.0.1", "127.0.0.2"), False, False),
    ):
        write(monkeypatch, tmp_path, changed)
        other = toolchain.read("some")
        assert other is not None
        assert (other.content == lock.content, other.digest == lock.digest) == (content, place), changed
    assert toolchain.read("none") is None


@pytest.mark.parametrize("line", ["tiny>=1.0", "tiny", "<<<<<<< HEAD", "tiny @ https://127.0.0.1/tiny.whl"])
def test_a_line_that_pins_nothing_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str) -> None:
    write(monkeypatch, tmp_path, f"# fine\n{line}\n")
    with pytest.raises(UserError, match=r"some\.txt:2: .* is no pinned package"):
        toolchain.read("some")


def test_what_a_ci_restores_is_taken_where_its_interpreter_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links and all; what came in part, or of another digest, or of a Python that is gone, is no environment."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name, interpreter = "a" * 64, tmp_path / "python3"
    shutil.copy("/bin/sh", interpreter)
    made = tmp_path / "made"
    (made / "bin").mkdir(parents=True)
    (made / "bin" / "python").symlink_to(interpreter)
    about = environment.Environment(name="tools", digest=name, lock="", python="", packages=1, bytes=1)
    (made / environment.MARKER).write_text(json.dumps(asdict(about)))

    def restored(digest: str) -> bool:
        shutil.copytree(made, environment.place(digest), symlinks=True)
        return environment.whole(digest)

    assert restored(name)
    assert not restored("b" * 64)
    Path(environment.place(name), environment.MARKER).write_text('{"name":')
    assert not environment.whole(name)
    shutil.rmtree(environment.place(name))
    interpreter.unlink()
    assert not restored(name)


def test_environments_are_named_by_a_digest(packages: Index) -> None:
    packages.run("toolchain", "install", "tools")
    assert len(packages.made()[0].name) == len(digest.of_bytes(b""))
