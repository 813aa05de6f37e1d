"""SIGKILLs of a real build at random moments, with edits and reverts between: what is built next is right.

    python -m tests.sweeps.kills [--count N] [--seed N] [--without GUARD]

The digits target through ONNX Runtime and the real `doit`; nothing is timed, all else is real. After each kill that hit:
no worker lives on, the store is sound; then an edit, a revert or nothing, and a build, which must make what a build in an
empty folder makes. Now and then the store is emptied, so that there is work, and files are edited under the build.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from tests.conftest import ROOT
from tests.sweeps.audit import Contents, contents, leftovers, unsound
from tests.sweeps.trust import GUARDS

BIN = Path(sys.executable).parent
KILLS = ("doit", "doit", "doit", "its worker", "all of them")
PLATFORM = """edgebuild: 1
framework: onnxruntime
quantize: {scheme: int8}
benchmark: {not_measured: "nothing is timed here"}
package: {kind: onnx, limits: {shell: 5MB, weights: 100MB}}
facts: {onnxruntime_web: "1.20"}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What may be edited."""

    method: str
    limit: float  # of the weights' ratio: 0.2 fails, so that nothing is delivered
    model: int
    samples: int  # of the calibration data
    template: str  # of the project's own, a line more; empty: the shipped one


@dataclass(kw_only=True)
class Report:
    """Kills that hit, by whom; those that came after the end; builds, and what was wrong, a line each."""

    hits: Counter[str] = field(default_factory=Counter)
    late: int = 0
    reverts: int = 0
    under: int = 0  # edits under a running build
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


def write(root: Path, state: State) -> None:
    """The project's files as this state has them, each replaced whole where it is another one."""
    model = bytearray((ROOT / "targets/models/digits.onnx").read_bytes())
    if state.model % 2:
        model[len(model) // 2] ^= 1  # a weight's lowest bits
    if state.model > 1:
        model += b"\x32\x01" + bytes([96 + state.model])  # ModelProto.doc_string, field 6
    lines = (ROOT / "targets/web-digits.yaml").read_text().replace("max: 0.35", f"max: {state.limit}")
    data = np.load(ROOT / "targets/data/digits-calibration.npz")
    name = data.files[0]
    calibration = root / "targets/data" / ".new.npz"
    calibration.parent.mkdir(parents=True, exist_ok=True)
    np.savez(calibration, **{name: data[name][: state.samples]})
    _replace(root / "targets/data/digits-calibration.npz", calibration.read_bytes())
    calibration.unlink()
    _replace(root / "targets/data/digits-eval.npz", (ROOT / "targets/data/digits-eval.npz").read_bytes())
    _replace(root / "targets/models/digits.onnx", bytes(model))
    _replace(root / "targets/web-digits.yaml", f"{lines}quantize: {{method: {state.method}}}\n".encode())
    _replace(root / "platforms/web.yaml", PLATFORM.encode())
    _replace(root / "dodo.py", (ROOT / "dodo.py").read_bytes())
    own = root / "templates/onnx/README.md.j2"
    if state.template:
        _replace(own, (ROOT / "templates/onnx/README.md.j2").read_bytes() + f"\n{state.template}\n".encode())
    else:
        shutil.rmtree(root / "templates", ignore_errors=True)


def states(count: int, rng: random.Random) -> list[State]:
    return [
        State(
            method=rng.choice(("static", "dynamic", "auto")),
            limit=rng.choice((0.35, 0.35, 0.3, 0.2)),
            model=rng.randrange(8),
            samples=rng.choice((16, 24, 32)),
            template=rng.choice(("", "more", "and more")),
        )
        for _ in range(count)
    ]


def sweep(count: int, seed: int, guard: str = "", first: bool = False) -> Report:
    """Until `count` kills hit. `guard`: the one that is switched off; `first`: end at the first wrong."""
    rng, report, start = random.Random(seed), Report(), time.monotonic()
    known = states(count // 12 + 4, rng)
    with tempfile.TemporaryDirectory() as place:
        root, clean = Path(place) / "project", Path(place) / "clean"
        made: dict[State, tuple[int, Contents]] = {}
        span, state = _span(clean, known[0], made), known[0]
        stored: set[State] = set()  # much of these is restored, which is soon done
        write(root, state)
        while report.hits.total() < count and not (first and report.wrong):
            if rng.random() < 0.25:
                stored.clear()
                shutil.rmtree(root / ".edgebuild/records", ignore_errors=True)
                shutil.rmtree(root / ".edgebuild/objects", ignore_errors=True)
            before, state = state, rng.choice(known)
            write(root, state)
            who, problems = _killed(root, guard, rng, span * (0.2 if state in stored else 0.7), known, report)
            stored.add(state)
            if not who:
                report.late += 1
                continue
            report.hits[who] += 1
            after = rng.choice((state, before, rng.choice(known)))
            report.reverts += after == before
            write(root, state := after)
            problems += _build(root, guard, *_clean(clean, state, made))
            if report.hits.total() % 10 == 0:
                print(
                    f"{report.hits.total()} kills hit, {len(report.wrong)} wrong, {time.monotonic() - start:.0f} s",
                    file=sys.stderr,
                )
            found = [f"seed {seed} kill {report.hits.total()} of {who}: {problem}" for problem in problems[:4]]
            report.wrong += found
            for line in found:
                print(line, file=sys.stderr)
    report.seconds = time.monotonic() - start
    return report


def _killed(root: Path, guard: str, rng: random.Random, span: float, known: list[State], report: Report) -> tuple[str, list[str]]:
    """A build, and a kill of it at a random moment within `span` seconds. → who was hit (nobody: it had ended), and what was wrong then."""
    build = _start(root, guard)
    wait = rng.uniform(0.05, span)
    if rng.random() < 0.15:
        time.sleep(wait / 2)
        write(root, rng.choice(known))
        report.under += 1
        wait /= 2
    time.sleep(wait)
    workers = _workers(root)
    who = rng.choice(KILLS) if workers else "doit"
    victims = ([] if who == "its worker" else [build.pid]) + ([] if who == "doit" else workers)
    if build.poll() is not None or not victims:
        build.communicate(timeout=120)
        return "", []
    for pid in victims:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    said = build.communicate(timeout=120)[0]
    if build.returncode not in (-signal.SIGKILL, 1) or (who == "its worker" and "killed (SIGKILL)" not in said):
        return "", []
    problems = [f"a traceback: {said[-300:]}"] if "Traceback" in said or "unexpected" in said else []
    return who, [*problems, *_orphans(root), *unsound(root)]


def _orphans(root: Path) -> Iterator[str]:
    """Workers that live a second later."""
    deadline = time.monotonic() + 1
    while _workers(root) and time.monotonic() < deadline:
        time.sleep(0.05)
    yield from (f"the worker {pid} lives on: {_state(pid)}" for pid in _workers(root))


def _state(pid: int) -> str:
    """What it waits for in the kernel, its parent and its age in seconds."""
    try:
        process = psutil.Process(pid)
        age = f"{process.status()}, child of {process.ppid()}, {time.time() - process.create_time():.1f} s old, "
        return age + " < ".join(line.split()[-1] for line in Path(f"/proc/{pid}/stack").read_text().splitlines())
    except (psutil.Error, OSError) as error:
        return str(error)


def _workers(root: Path) -> list[int]:
    """Processes that run a record of this project."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        record = (process.info["cmdline"] or [""])[-1]
        if record.startswith(str(root)) and record.endswith("record.json") and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def _build(root: Path, guard: str, status: int, clean: Contents) -> Iterator[str]:
    build = _start(root, guard)
    said = build.communicate(timeout=300)[0]
    if build.returncode != status or "Traceback" in said or "unexpected" in said:
        yield f"the next build ended with {build.returncode}, not {status}: {said[-400:]}"
    now = _needed(root)
    if "0 ran, 0 restored" not in said:  # a no-op by stats alone collects nothing
        yield from leftovers(root)
    yield from (f"{path} is wrong" for path in sorted(now.keys() | clean.keys()) if now.get(path) != clean.get(path))


def _needed(root: Path) -> Contents:
    """Every file below build/ and dist/, but of recipes that were tried on demand: a choice that is restored needs none of them."""
    tried = re.compile(r"build/[^/]+/(quantize|evaluate)\.(?!baseline)")
    return {path: file for path, file in contents(root).items() if not tried.match(path)}


def _start(root: Path, guard: str = "") -> "subprocess.Popen[str]":
    words = [sys.executable, "-m", "tests.sweeps.trust", guard] if guard else [str(BIN / "doit")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(words, cwd=root, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def _clean(root: Path, state: State, made: dict[State, tuple[int, Contents]]) -> tuple[int, Contents]:
    """What a build of this state makes in an empty folder, and its exit status."""
    if state not in made:
        shutil.rmtree(root, ignore_errors=True)
        write(root, state)
        build = _start(root)
        said = build.communicate(timeout=300)[0]
        if build.returncode not in (0, 1) or (build.returncode == 1) != (state.limit == 0.2):
            raise SystemExit(f"a clean build of {state} ended with {build.returncode}: {said}")
        made[state] = build.returncode, _needed(root)
    return made[state]


def _span(root: Path, state: State, made: dict[State, tuple[int, Contents]]) -> float:
    """The seconds that a whole build takes here and now: kills come within them."""
    start = time.monotonic()
    _clean(root, state, made)
    return time.monotonic() - start


def _replace(path: Path, data: bytes) -> None:
    if path.exists() and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(".new")
    new.write_bytes(data)
    new.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--without", choices=list(GUARDS), default="", help="a negative control: ends at the first wrong one")
    given = parser.parse_args()
    report = sweep(given.count, given.seed, given.without, first=bool(given.without))
    print(
        f"{report.hits.total()} kills hit ({', '.join(f'{who} {times}' for who, times in sorted(report.hits.items()))}), "
        f"{report.late} came too late, {report.reverts} reverts, {report.under} edits under a build, "
        f"{len(report.wrong)} wrong, {report.seconds:.0f} s"
    )
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
