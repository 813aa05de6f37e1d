"""A project on the fake backend in a temporary folder, and a builder that runs actions in this process."""

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from edgebuild import digest, machine, worker
from edgebuild.backends import fake
from edgebuild.errors import StepFailed
from edgebuild.fresh import Fresh, remember
from edgebuild.memo import Memo
from edgebuild.process import Result, Workers
from edgebuild.project import Project
from edgebuild.run import Builder, Done, sweep
from edgebuild.step import Step

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as behind `&` in a script: what tests start would take no interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)

VNNI = "vnni" in machine.isa()  # its sums of int8 are exact
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # of tests and benchmarks that import ONNX Runtime themselves
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of processes start: what one has compiled, the next ones load
ROOT = Path(__file__).resolve().parent.parent
PLATFORM = """edgebuild: 1
framework: fake
quantize: {scheme: int8}
benchmark: {not_measured: "a fake device"}
package: {kind: folder}
"""
TARGET = """edgebuild: 1
description: a fake deliverable
model: {source: model.gguf, task: image-classification}
platform: fake
"""


def write_model(path: Path, text: str) -> None:
    """A file that passes for GGUF: magic, version 3, no tensors, no keys; then the fake backend's text."""
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16) + text.encode())


def perform_here(
    record: Mapping[str, Any],
    scratch: str,
    log: str,
    memory: int | None,
    seconds: float,
    python: str = sys.executable,
    still: int | None = None,
) -> Result:
    assert python == sys.executable, "a step of another interpreter cannot run in this process"
    start = time.monotonic()
    outcome = worker.perform(record)
    return Result(
        summary=outcome.summary,
        refused=outcome.refused,
        network="none",
        seconds=time.monotonic() - start,
        peak_memory=None,
        kept=outcome.kept,
    )


class Lab:
    """The project in `root`, built step by step in this process; `performed` says by content what was really worked on."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.performed: list[str] = []

    def build(self, names: list[str] | None = None, remembers: bool = False) -> dict[str, str]:
        """Build as doit would, one after another; → step → outcome (`fresh`, `ran`, `restored`, `failed`, `blocked`).

        `remembers`: a verdict that all is fresh is kept, and what is no more is swept, as the real command does.
        """
        os.chdir(self.root)
        project = Project()
        fresh = Fresh(project)
        outcomes: dict[str, str] = {}

        def within(step: Step, run: Callable[[Step], Done]) -> Done:
            outcomes[step.name] = "refused"
            done = run(step)
            outcomes[step.name] = done.outcome
            return done

        builder = Builder(project, fresh, Workers(), self._counted, within=within)
        for step in project.steps.values():
            if step.on_demand or (names and step.target not in names):
                continue
            if any(outcomes.get(name) in ("failed", "blocked") for name in step.after):
                outcomes[step.name] = "blocked"
            elif fresh(step):
                outcomes[step.name] = "fresh"
            else:
                try:
                    outcomes[step.name] = builder.run(step).outcome
                except StepFailed:
                    outcomes[step.name] = "failed"
        if remembers:
            sweep(project)
            remember(project, fresh)
        project.memo.save()
        return outcomes

    def ran(self) -> set[str]:
        """Build, and tell which steps really ran."""
        return {name for name, outcome in self.build().items() if outcome == "ran" and not name.startswith("build:")}

    def outputs(self) -> dict[str, str]:
        """The digest of everything that the project's targets need, by path."""
        os.chdir(self.root)
        project = Project()
        found = {}
        for step in project.steps.values():
            for path in step.outputs.values() if not step.on_demand else ():
                found[path] = project.memo.look(path) if os.path.exists(path) else "missing"
        return found

    def rungs(self) -> dict[str, str]:
        """The same of what was made on demand and lies here; all of it must be true of today's inputs."""
        os.chdir(self.root)
        project = Project()
        fresh, found = Fresh(project), {}
        for step in project.steps.values():
            if step.on_demand and os.path.exists(step.receipt):
                assert fresh(step), f"{step.name} was left behind"
                found |= {path: project.memo.look(path) for path in step.outputs.values()}
        return found

    def _counted(self, record: Mapping[str, Any], *rest: Any) -> Result:
        memo = Memo("")
        inputs = {role: memo.look(path) for role, path in record["inputs"].items()}
        self.performed.append(digest.tagged("work", [record["verb"], record["params"], inputs, fake._version()]))
        return perform_here(record, *rest)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One a core that this process may use; at most four, as each runs frameworks that have threads of their own."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(cores, 4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with journeys first, then those of many tests, so that at the end no process waits long for another one's."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in long, -tests[item.path]))


@pytest.fixture(autouse=True)
def _stay_home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests change directory; and no test writes into the user's cache or store."""
    home = os.getcwd()
    monkeypatch.setenv("XDG_CACHE_HOME", os.environ.get("EDGEBUILD_TEST_CACHE", str(tmp_path_factory.getbasetemp() / "cache")))
    monkeypatch.delenv("EDGEBUILD_STORE", raising=False)
    monkeypatch.setenv("EDGEBUILD_OFFLINE", "1")  # nor installs a toolchain, unless it is about that
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # no test asks a hub that is not its own
    yield
    os.chdir(home)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return make_lab(tmp_path / "project")


def make_lab(root: Path) -> Lab:
    (root / "targets").mkdir(parents=True)
    (root / "platforms").mkdir()
    (root / "platforms" / "fake.yaml").write_text(PLATFORM)
    (root / "targets" / "one.yaml").write_text(TARGET)
    (root / "dodo.py").write_text((ROOT / "dodo.py").read_text())
    write_model(root / "model.gguf", "hello")
    return Lab(root)


def ends(holds: Callable[[], object], seconds: float = 60) -> None:
    """Wait for what comes by itself, however busy the machine is."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


MakeLab = Callable[[Path], Lab]
