"""Builds at once: of several projects on one store, and of one project from two terminals; some killed, some edited.

    python -m tests.sweeps.together [--rounds N] [--seed N] [--without GUARD]

Counted is what was really performed: no key is worked on twice, but where a kill took the work. Afterwards every project
holds what a clean build of its state makes, and so it does in every other state: what the store took in is right.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.conftest import ROOT, TARGET, make_lab, write_model
from tests.sweeps.audit import Contents, contents, leftovers
from tests.sweeps.trust import GUARDS

BIN = Path(sys.executable).parent
KINDS = (
    "two",
    "eight",
    "eight, some killed",
    "two terminals",
    "two terminals, one killed",
    "an edit, and a second terminal",
    "edits under a build",
)
State = tuple[str, int]  # the model's text, the quantization's group size


@dataclass(kw_only=True)
class Report:
    """Rounds by kind, builds started, kills that hit, steps performed, duplicates and what was wrong, a line each."""

    rounds: Counter[str] = field(default_factory=Counter)
    builds: int = 0
    kills: int = 0
    performed: int = 0
    duplicates: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Ground:
    """Projects on one store, and what clean builds of their states make. `guard`: the one that is switched off."""

    def __init__(self, place: Path, guard: str) -> None:
        self.place, self._guard = place, guard
        self._clean: dict[State, tuple[Contents, Mapping[str, str]]] = {}

    def project(self, name: str, state: State) -> Path:
        root = self.place / name
        if not root.exists():
            make_lab(root)
        write(root, state)
        return root

    def start(self, root: Path, store: Path) -> "subprocess.Popen[str]":
        program = [sys.executable, "-m", "tests.sweeps.trust", self._guard] if self._guard else [str(BIN / "doit")]
        environment = {**os.environ, "EDGEBUILD_STORE": str(store), "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            program,
            cwd=root,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def clean(self, state: State) -> tuple[Contents, Mapping[str, str]]:
        """What a build of this state makes in an empty folder on an empty store, and the key of each step."""
        if state not in self._clean:
            lab = make_lab(self.place / f"clean{len(self._clean)}")
            write(lab.root, state)
            home = os.getcwd()
            lab.build()
            os.chdir(home)
            self._clean[state] = contents(lab.root), keys(lab.root)
        return self._clean[state]


def write(root: Path, state: State) -> None:
    """The project's files as this state has them, each replaced whole: no build reads half of one."""
    text, group = state
    write_model(root / ".new", text)
    (root / ".new").replace(root / "model.gguf")
    (root / ".new").write_text(f"{TARGET}quantize: {{group_size: {group}}}\n")
    (root / ".new").replace(root / "targets" / "one.yaml")


def sweep(rounds: int, seed: int, guard: str = "", kinds: tuple[str, ...] = KINDS, first: bool = False) -> Report:
    """`rounds` rounds, of each kind in turn. `first`: end at the first wrong one."""
    rng, report, start = random.Random(seed), Report(), time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        ground = Ground(Path(place), guard)
        for number in range(rounds):
            kind = kinds[number % len(kinds)]
            play = {"edits under a build": _edits, "an edit, and a second terminal": _second}.get(kind, partial(_at_once, kind))
            problems = list(play(ground, number, rng, report))
            report.rounds[kind] += 1
            report.wrong += [f"seed {seed} round {number}, {kind}: {problem}" for problem in problems[:4]]
            shutil.rmtree(ground.place / f"store{number}", ignore_errors=True)
            if problems and first:
                break
    report.seconds = time.monotonic() - start
    return report


def _at_once(kind: str, ground: Ground, number: int, rng: random.Random, report: Report) -> Iterator[str]:
    """Builds of one state, or of two that share steps, started at the same moment."""
    states = [(f"text {number}", 32), (f"text {number}", rng.choice((32, 64)))]
    count, one_project = 2 if "two" in kind else 8, "terminals" in kind
    store = ground.place / f"store{number}"
    chosen = [states[0] if one_project else rng.choice(states) for _ in range(count)]
    roots = [ground.project("both" if one_project else f"p{index}", state) for index, state in enumerate(chosen)]
    builds = [ground.start(root, store) for root in roots]
    killed = set()
    if "killed" in kind:
        for index in range(0, count, 2):
            time.sleep(rng.uniform(0.1, 0.8))
            if builds[index].poll() is None:
                os.killpg(builds[index].pid, signal.SIGKILL)
                killed.add(index)
    said = [build.communicate(timeout=120)[0] for build in builds]
    report.builds, report.kills = report.builds + count, report.kills + len(killed)
    done: Counter[str] = Counter()
    for index, (state, root) in enumerate(zip(chosen, roots, strict=True)):
        done.update(ground.clean(state)[1][name] for name in ran(said[index]))
        if index not in killed:
            yield from _ended_well(builds[index], said[index])
            yield from _differ(root, ground.clean(state)[0])
    report.performed += done.total()
    twice = [key for key, times in done.items() if times > 1]
    report.duplicates += len(twice)
    yield from (f"the work of key {key[:12]} was done {done[key]} times" for key in twice)
    yield from _in_every_state(ground, roots[0], store, dict.fromkeys(chosen))


def _second(ground: Ground, number: int, rng: random.Random, report: Report) -> Iterator[str]:
    """A build, an edit that none of its steps reads any more, and a build of that beside it: the edit holds in the end."""
    states = [(f"text {number}", group) for group in (32, 64)]
    store = ground.place / f"store{number}"
    builds = []
    for state in states:
        root = ground.project("both", state)
        builds.append(ground.start(root, store))
        builds[-1].stdout.readline()  # type: ignore[union-attr]  # its plan is made: a step is done, or it waits
    report.builds += 2
    for build in builds:
        yield from _ended_well(build, build.communicate(timeout=120)[0])
    yield from _differ(root, ground.clean(states[1])[0])
    yield from _in_every_state(ground, root, store, states)


def _edits(ground: Ground, number: int, rng: random.Random, report: Report) -> Iterator[str]:
    """One project whose files are edited, and edited back, while two builds of it run; then it is at rest."""
    states = [(f"{letter}{number}", group) for letter in "xy" for group in (32, 64)]
    store = ground.place / f"store{number}"
    root = ground.project("both", states[0])
    builds = [ground.start(root, store)]
    second = time.monotonic() + rng.uniform(0, 0.5)
    deadline = time.monotonic() + 20
    while any(build.poll() is None for build in builds) and time.monotonic() < deadline:
        time.sleep(rng.uniform(0.02, 0.3))
        write(root, rng.choice(states))
        if len(builds) == 1 and time.monotonic() > second:
            builds.append(ground.start(root, store))
    report.builds += len(builds)
    for build in builds:
        said = build.communicate(timeout=120)[0]
        report.performed += len(ran(said))
        edited = "edited while it ran" in said  # what a build may end with here, and with nothing else
        if "Traceback" in said or "unexpected" in said or build.returncode != edited:
            yield f"ended with {build.returncode}: {said[-300:]}"
    yield from _in_every_state(ground, root, store, states)


def _in_every_state(ground: Ground, root: Path, store: Path, states: "list[State] | dict[State, None]") -> Iterator[str]:
    """Build each state: from what the builds before left in the store. Wrong where that is not what a clean build makes."""
    for state in states:
        write(root, state)
        build = ground.start(root, store)
        yield from _ended_well(build, build.communicate(timeout=120)[0])
        yield from _differ(root, ground.clean(state)[0])
    yield from leftovers(root)
    yield from (f"{path} was left behind" for path in (store / "tmp").glob("*"))


def _ended_well(build: "subprocess.Popen[str]", said: str) -> Iterator[str]:
    if build.returncode != 0 or "Traceback" in said or "unexpected" in said:
        yield f"ended with {build.returncode}: {said[-300:]}"


def _differ(root: Path, clean: Contents) -> Iterator[str]:
    now = contents(root)
    yield from (
        f"{path} is not what a clean build makes"
        for path in sorted(now.keys() | clean.keys())
        if now.get(path) != clean.get(path)
    )


def ran(said: str) -> list[str]:
    """The steps that a build's own lines say were performed, not restored."""
    return [line.split()[0] for line in said.splitlines() if line.split()[1:2] == ["ran"]]


def keys(root: Path) -> Mapping[str, str]:
    """The key of every step of the target `one`, by its receipts."""
    found = {}
    for path in (root / "build" / "one").glob("*.json"):
        if path.name != "evidence.json":
            verb, dot, rest = path.stem.partition(".")
            found[f"{verb}:one{dot}{rest}"] = json.loads(path.read_text())["key"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--without", choices=list(GUARDS), default="", help="a negative control: ends at the first wrong one")
    given = parser.parse_args()
    report = sweep(given.rounds, given.seed, given.without, first=bool(given.without))
    for line in report.wrong:
        print(line)
    print(", ".join(f"{kind}: {times}" for kind, times in report.rounds.items()))
    print(
        f"{report.rounds.total()} rounds, {report.builds} builds, {report.kills} killed, {report.performed} steps performed, "
        f"{report.duplicates} twice, {len(report.wrong)} wrong, {report.seconds:.0f} s"
    )
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
