"""What edgebuild itself costs a step: on a first build, when it restores, and when an edit is undone.

    python tests/benchmarks/steps.py [--runs 5] [--targets 20]

A first build of `--targets` targets of nine steps, each step in a worker process, is timed from the start of `doit` to
its end, and so is one of a single target; what a worker takes from its start to its exit and what the file system takes
to fsync is subtracted, and the difference of the two is what a step costs. Exits 1 where a step costs more than 6 ms, 500
restored steps more than 1 s, or an edit undone (5 steps restored) more than 0.4 s.

Nothing is deleted between two runs, only moved aside: for minutes after, ext4 looks at every inode that was freed before it
makes a file, which then takes ten times as long (0.02 and 0.3 ms, measured).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from measuring import STEPS, Cost, Figures, build, command, cost, median, middle, project, settle


def inside(note: str) -> int:
    """Run doit in this process; write the seconds spent in workers and in fsync, and how many there were."""
    import doit.doit_cmd

    spent = {"worker": 0.0, "workers": 0.0, "fsync": 0.0, "fsyncs": 0.0}
    real_fsync, real_popen = os.fsync, subprocess.Popen

    def fsync(handle: int) -> None:
        start = time.perf_counter()
        real_fsync(handle)
        spent["fsync"] += time.perf_counter() - start
        spent["fsyncs"] += 1

    class Timed(real_popen):  # type: ignore[type-arg,misc]
        """From before its start until the kernel says that it has ended, whenever edgebuild looks."""

        def __init__(self, *words: Any, **options: Any) -> None:
            start = time.perf_counter()
            super().__init__(*words, **options)
            self.watcher = threading.Thread(target=self._watch, args=(start,))
            self.watcher.start()

        def _watch(self, start: float) -> None:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            spent["worker"] += time.perf_counter() - start
            spent["workers"] += 1

        def wait(self, timeout: float | None = None) -> int:
            self.watcher.join(timeout)  # first: once waited for, the process is gone
            return int(super().wait(timeout))

    os.fsync, subprocess.Popen = fsync, Timed  # type: ignore[misc]
    try:
        return int(doit.doit_cmd.DoitMain().run([]) or 0)
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        spent["processor"] = time.process_time()
        Path(note).write_text(json.dumps(spent))


def first_build(folder: Path, targets: int) -> dict[str, float]:
    """Seconds of a first build: the whole, in workers, in fsyncs, and what is left."""
    root = Path(tempfile.mkdtemp(prefix=f"first-{targets}-", dir=folder)) / "project"
    project(root, targets, models=True)
    whole = cost([sys.executable, __file__, "--inside", str(folder / "note.json")], root).seconds
    spent: dict[str, float] = json.loads((folder / "note.json").read_text())
    return {**spent, "whole": whole, "own": whole - spent["worker"] - spent["fsync"]}


def made_a_file(folder: Path) -> float:
    """Seconds that the file system takes to make an empty file: 0.01 ms on tmpfs, a hundredfold on some virtual disks."""
    (folder / "made").mkdir()
    start = time.perf_counter()
    for number in range(200):
        (folder / "made" / str(number)).touch()
    return (time.perf_counter() - start) / 200


def first_builds(figures: Figures, folder: Path, targets: int, runs: int) -> None:
    own, processor, worker, fsync = [], [], [], []
    for _ in range(runs):
        small, large = first_build(folder, 1), first_build(folder, targets)
        own.append((large["own"] - small["own"]) / (STEPS * (targets - 1)))
        processor.append((large["processor"] - small["processor"]) / (STEPS * (targets - 1)))
        worker.append(large["worker"] / large["workers"])
        fsync.append(large["fsync"] / (STEPS * targets))
    figures.state("a worker: its start, action and exit", median(worker) * 1000, "ms")
    figures.state("fsyncs of a step", median(fsync) * 1000, "ms")
    figures.state("to make a file on this disk (a step makes some)", made_a_file(folder) * 1000, "ms")
    figures.state(
        "edgebuild's own cost of a step, first build",
        median(own) * 1000,
        "ms",
        6,
        f"{median(processor) * 1000:.1f} ms of processor",
    )


def restores(figures: Figures, folder: Path, runs: int) -> None:
    targets = 500 // STEPS + 1
    root = folder / "restore"
    build(project(root, targets))
    costs = []
    for number in range(runs):
        (root / "build").rename(folder / f"build-{number}")
        (root / "dist").rename(folder / f"dist-{number}")
        costs.append(cost(command("doit"), root))
        settle(root)
    found = middle(costs)
    figures.state(f"{targets * STEPS} restored steps, from `doit` to its end", found.seconds, "s", 1, str(found))


def reverts(figures: Figures, folder: Path, runs: int) -> None:
    root = folder / "revert"
    project(root, 1)
    settle(root)
    target = root / "targets" / "one.yaml"
    text = target.read_text()
    costs: dict[str, list[Cost]] = {"edgebuild": [], "doit": []}
    for _ in range(runs):
        for name, found in costs.items():
            target.write_text(text + "quantize: {group_size: 64}\n")
            settle(root)
            target.write_text(text)
            found.append(cost(command(name), root))
            said = json.loads((root / ".edgebuild" / "last-run.json").read_text())["steps"]
            assert sum(step["outcome"] == "restored" for step in said) == 5, said
            settle(root)
    for name, found in costs.items():
        whole = middle(found)
        figures.state(f"an edit undone, 5 steps restored, `{name}`", whole.seconds, "s", 0.4, str(whole))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--targets", type=int, default=20)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        sys.argv = sys.argv[:1]
        return inside(options.inside)
    figures = Figures()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"  # the machine lock of others is none of ours
        reverts(figures, Path(folder), options.runs)
        restores(figures, Path(folder), options.runs)
        first_builds(figures, Path(folder), options.targets, options.runs)
    return figures.status


if __name__ == "__main__":
    sys.exit(main())
