"""Builds as typed on a disk that is full or read-only at every step, and with a framework that does what it must not.

    python -m tests.sweeps.faults [--case WORD]… [--tenth SEED] [--jobs N] [--without GUARD]

Each ends with one message and leaves a sound store and no process; once the fault is mended the next build makes what a
clean one makes.
"""

import argparse
import ctypes
import functools
import multiprocessing
import multiprocessing.util
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.conftest import TARGET, make_lab, write_model
from tests.sweeps.audit import Contents, contents, leftovers, unsound
from tests.sweeps.guards import GUARDS

CLONE_NEWNS = 0x20000  # linux/sched.h
STEPS = ("fetch:one", "assess:one", "convert:one", "quantize:one", "evaluate:one", "benchmark:one", "gate:one", "package:one")
PLACES = (
    "",
    "build",
    "build/one",
    "build/one/convert",
    "dist",
    ".edgebuild",
    *(f".edgebuild/{name}" for name in ("objects", "records", "tmp", "locks", "logs/one")),
)
MISBEHAVIOUR = {
    "!memory": "over its limit of 400 MB",
    "!hang": "took longer than its limit of 1 s",
    "!exit": "status 0 and no result",
    "!nothing": "no result",
    "!killed": "killed (SIGKILL)",
    "!abort": "died of SIGABRT",
    "!fault": "unexpected RuntimeError",
    "!child": "",  # ends well
    "!elsewhere": "is not what assess:one made",
    "!elsewhere-later": "is not what quantize:one made",
}
BIN = Path(sys.executable).parent
COMMAND = "import sys; from tests.sweeps.guards import GUARDS; from edgebuild.cli import main; GUARDS[sys.argv[1]](); sys.exit(main(sys.argv[2:]))"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A kind of fault, and how much of it or where."""

    kind: str  # `bytes`, `inodes`, `read-only`, `closed`, `worker`
    value: str

    def __str__(self) -> str:
        return f"{self.kind} {self.value}"


CASES = [
    *(Case(kind="bytes", value=str(number)) for number in range(0, 400_000, 8192)),
    *(Case(kind="inodes", value=str(number)) for number in range(0, 160, 4)),
    *(Case(kind="read-only", value=step) for step in STEPS),
    *(Case(kind="closed", value=place) for place in PLACES),
    *(Case(kind="worker", value=word) for word in MISBEHAVIOUR),
]


class Place:
    """A project on a file system of its own, in a mount namespace that ends with this process."""

    def __init__(self, guard: str = "") -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS) != 0:
            raise PermissionError(ctypes.get_errno(), "a mount namespace needs root")
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        self.guard = guard
        self.folder = Path(tempfile.mkdtemp(prefix="edgebuild-faults-"))
        self.root = self.folder / "project"
        self.clean: dict[str, Contents] = {}
        for text in ("hello", "world"):
            make_lab(self.root)
            self.edit(text)
            self.run()
            self.clean[text] = contents(self.root)
            shutil.copytree(self.root, self.folder / text)
            shutil.rmtree(self.root)
        self.root.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", str(self.root)], check=True)

    def close(self) -> None:
        subprocess.run(["umount", str(self.root)], check=True)
        shutil.rmtree(self.folder)

    def edit(self, text: str) -> None:
        write_model(self.root / "model.gguf", text)
        seconds = "1s" if text == "!hang" else "60s"
        more = f"limits: {{memory: 400MB, time: {seconds}}}\n" if text.startswith("!") else ""
        (self.root / "targets" / "one.yaml").write_text(TARGET + more)

    def run(self, *words: str, before: tuple[str, ...] = (), program: str = "edgebuild") -> "subprocess.CompletedProcess[str]":
        command = [str(BIN / program), *words]
        if self.guard:
            command = [sys.executable, "-c", COMMAND, self.guard, *words]
        environment = {**os.environ, "XDG_CACHE_HOME": str(self.folder / "cache"), "PYTHONPATH": os.getcwd()}
        return subprocess.run([*before, *command], cwd=self.root, capture_output=True, text=True, timeout=120, env=environment)

    def mount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.root)], check=True)

    def problems(self, case: Case) -> list[str]:
        """What did not hold: a project built as `hello` is edited to `world`, built under the fault, mended, built."""
        for path in self.root.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        subprocess.run(["cp", "-a", f"{self.folder}/hello/.", str(self.root)], check=True)
        self.edit("world")
        found = list(getattr(self, f"_{case.kind.replace('-', '_')}")(case.value))
        damage = case.value.startswith("!elsewhere")  # what it wrote over is a miss, and stays until it is wanted again
        found += [] if damage else unsound(self.root)
        for text in ("world", "hello"):
            self.edit(text)
            ended = self.run()
            if ended.returncode or ended.stderr:
                found.append(f"not recovered: {ended.returncode} {ended.stderr}")
            elif contents(self.root) != self.clean[text]:
                found.append("wrong")
        return [*found, *([] if damage else unsound(self.root)), *leftovers(self.root)]

    # -- the kinds of fault ----------------------------------------------------------------------------------------------
    def _bytes(self, value: str) -> Iterator[str]:
        found = os.statvfs(self.root)
        self.mount(f"size={(found.f_blocks - found.f_bfree) * found.f_frsize + int(value) + 1}")
        yield from self._told(self.run(), "the disk is full")
        self.mount("size=64m")

    def _inodes(self, value: str) -> Iterator[str]:
        found = os.statvfs(self.root)
        self.mount(f"nr_inodes={found.f_files - found.f_ffree + int(value) + 1}")
        yield from self._told(self.run(), "the disk is full")
        self.mount("nr_inodes=100000")

    def _read_only(self, step: str) -> Iterator[str]:
        if step != STEPS[0]:
            self.run(STEPS[STEPS.index(step) - 1])
        self.mount("ro")
        yield from self._told(self.run(program="doit"), "cannot be written")
        self.mount("rw")

    def _closed(self, place: str) -> Iterator[str]:
        """root ignores modes: what lets it is taken away from the build."""
        folder = self.root / place
        folder.mkdir(parents=True, exist_ok=True)
        mode = folder.stat().st_mode & 0o777
        folder.chmod(0o555)
        drop = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all")
        yield from self._told(self.run(before=drop if os.geteuid() == 0 else ()), "cannot be written")
        folder.chmod(mode)

    def _worker(self, text: str) -> Iterator[str]:
        self.edit(text)
        ended = self.run()
        if text == "!child":
            if ended.returncode or ended.stderr:
                yield f"ended with {ended.returncode}: {ended.stderr}"
        else:
            yield from self._told(ended, MISBEHAVIOUR[text], may_succeed=False)
        time.sleep(1)
        for process in _processes(self.root):
            yield f"process {process.pid} still runs"
            process.kill()

    def _told(self, ended: "subprocess.CompletedProcess[str]", message: str, may_succeed: bool = True) -> Iterator[str]:
        """One message and status 1; or 0, where there was room enough or only a cache was lost, and all is right."""
        if ended.returncode == 0 and may_succeed:
            if contents(self.root) != self.clean["world"]:
                yield "ended with 0 and is wrong"
            return
        about = ("  log: ", "    | ", ".edgebuild/last-run.json ")
        lines = [line for line in ended.stderr.splitlines() if not line.startswith(about)]
        each = {line.partition(": ")[0] for line in lines}  # steps that do not wait for one another may all be told
        if ended.returncode != 1 or not lines or len(each) != len(lines) or not all(message in line for line in lines):
            yield f"not one message a step with status 1: {ended.returncode} {ended.stderr}"


def _processes(root: Path) -> Iterator[psutil.Process]:
    """Those that a worker of this project started: its home is there."""
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get("HOME", "").startswith(f"{root}/"):
            yield process


@functools.cache
def _place(guard: str) -> Place:
    """This process's own; gone when the process ends."""
    place = Place(guard)
    multiprocessing.util.Finalize(place, place.close, exitpriority=1)
    return place


def _check(case: Case, guard: str) -> list[str]:
    return _place(guard).problems(case)


def sweep(cases: list[Case], jobs: int, guard: str = "") -> Iterator[tuple[Case, list[str]]]:
    """Build under each of these faults, some at a time; → each with what did not hold."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        found = [(case, pool.submit(_check, case, guard)) for case in cases]
        for case, problems in found:
            yield case, problems.result()


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sweeps.faults", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--case", action="append", help="those whose name has this word alone")
    parser.add_argument("--tenth", metavar="SEED", type=int, help="a tenth of them, drawn by this seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--without", choices=[*GUARDS], default="", help="with this guard switched off, to see that it is missed")
    chosen = parser.parse_args(words)
    start = time.monotonic()
    cases = [case for case in CASES if not chosen.case or any(word in str(case) for word in chosen.case)]
    if chosen.tenth is not None:
        cases = random.Random(chosen.tenth).sample(cases, max(1, len(cases) // 10))
    bad = 0
    for case, problems in sweep(cases, chosen.jobs, chosen.without):
        bad += bool(problems)
        if problems:
            print(f"{case}: {'; '.join(problems)}", flush=True)
    print(f"{len(cases)} faults: {bad} bad ({time.monotonic() - start:.0f} s)")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
