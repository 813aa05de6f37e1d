"""Cases run in child processes, a batch each: a crash or a hang is a violation of one case, and the sweep goes on behind it.

A sweep is a module with `make(seed, number) -> Case`, `open_sweep(folder) -> examine(case, number) -> Finding` and `GUARDS`:
name → the kind of case that must find out, and what switches the guard off.
"""

import argparse
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

BATCH = 250
HANG = 60.0  # seconds of silence after which a child is ended
MEMORY = 6 * 2**30  # bytes of address space a child may take: what spares the machine, not what is measured


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one case came to: `kind` of case, how it ended, what it broke (nothing), seconds, bytes."""

    kind: str
    outcome: str
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0
    memory: int = 0


@dataclass(kw_only=True)
class Tally:
    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0  # of the slowest case
    memory: int = 0  # bytes, of the largest case

    def add(self, number: int, finding: Finding) -> None:
        self.cases += 1
        self.outcomes[finding.outcome] += 1
        self.kinds[finding.kind] += 1
        self.violations += [f"case {number} ({finding.kind}): {violation}" for violation in finding.violations]
        self.seconds = max(self.seconds, finding.seconds)
        self.memory = max(self.memory, finding.memory)


def sweep(module: str, count: int, seed: int, without: str = "", batch: int = BATCH, jobs: int = 2) -> Tally:
    """Run `count` cases of a sweep, `without` a guard those that must find out; the same seed gives the same cases."""
    tally = Tally()
    ranges = [(first, min(first + batch, count)) for first in range(0, count, batch)]
    with ThreadPoolExecutor(jobs) as pool:
        for found in pool.map(lambda bounds: list(_batch(module, *bounds, seed, without)), ranges):
            for number, finding in found:
                tally.add(number, finding)
    return tally


def _batch(module: str, first: int, last: int, seed: int, without: str) -> Iterator[tuple[int, Finding]]:
    while first < last:
        said, kind, status = first - 1, "?", 0
        for line, code in _child(module, first, last, seed, without):
            status = code
            if line.startswith("{"):
                said += 1
                yield said, Finding(**json.loads(line))
                kind = "?"
            elif line:
                kind = line
        if said + 1 >= last and status == 0:
            return
        how = f"its process died of {signal.Signals(-status).name}" if status else "its process ended early"
        yield said + 1, Finding(kind=kind, outcome="crashed", violations=[how])
        first = said + 2


def _child(module: str, first: int, last: int, seed: int, without: str) -> Iterator[tuple[str, int]]:
    """The lines that a child prints, then an empty one with its status."""
    words = [sys.executable, "-m", module, "--child", str(first), str(last), "--seed", str(seed)]
    words += ["--without", without] if without else []
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        heard = [time.monotonic()]
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.5):
                if time.monotonic() - heard[0] > HANG:
                    process.kill()

        threading.Thread(target=watch, daemon=True).start()
        for line in process.stdout or ():
            heard[0] = time.monotonic()
            yield line.rstrip("\n"), 0
        code = process.wait()
        done.set()
        if code > 0:
            errors.seek(0)
            raise RuntimeError(f"the sweep itself failed: {errors.read()[-2000:]}")
        yield "", code


def main(module: str, count: int, bounds: str) -> int:
    """The command: `python -m MODULE [--count N] [--seed N] [--without GUARD]`; → 1 where anything was broken."""
    guards = sorted(importlib.import_module(module).GUARDS)
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--without", choices=guards, default="", help="switch this guard off: the sweep must fail")
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _serve(module, *options.child, options.seed, options.without)
        return 0
    start = time.monotonic()
    tally = sweep(module, options.count, options.seed, options.without)
    for violation in tally.violations[:40]:
        print(violation)
    print("kinds: " + ", ".join(f"{kind} {number:,}" for kind, number in sorted(tally.kinds.items())))
    outcomes = ", ".join(f"{number:,} {outcome}" for outcome, number in sorted(tally.outcomes.items()))
    print(
        f"{module.rpartition('.')[2]}: {tally.cases:,} cases: {outcomes}; {len(tally.violations)} violations; "
        f"slowest {tally.seconds:.2f} s, largest {tally.memory / 2**20:.0f} MiB ({bounds}); {time.monotonic() - start:.0f} s"
    )
    return 1 if tally.violations else 0


def _serve(module: str, first: int, last: int, seed: int, without: str) -> None:
    """In a child: examine cases, and print a line before each and one after."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else prints does not mix with the lines
    imported = importlib.import_module(module)
    only, switch_off = imported.GUARDS[without] if without else ("", lambda: None)
    switch_off()
    with tempfile.TemporaryDirectory() as folder:
        examine: Callable[[Any, int], Finding] = imported.open_sweep(folder)
        for number in range(first, last):
            case = imported.make(seed, number)
            print(case.kind, file=told, flush=True)
            wanted = only in ("", case.kind)
            finding = examine(case, number) if wanted else Finding(kind=case.kind, outcome="left out")
            print(json.dumps(asdict(finding)), file=told, flush=True)
        os.chdir("/")
