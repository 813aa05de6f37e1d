"""No-op of N whole targets, nine steps each: `edgebuild` and `doit`, median of interleaved runs.

    python tests/benchmarks/noop.py [--targets 100] [--runs 21]

Makes a project on the fake backend in a temporary folder, builds it once, then times `doit --version`, the two commands,
and doit alone on as many tasks that are up to date. Exits 1 where `edgebuild` takes more than 0.9 times, or `doit` more than
2.5 times `doit --version` (100 targets or fewer); where `edgebuild` takes more than 0.5 s for 10,000 steps, or as much for
each further 10,000; or where 10,000 steps or fewer take more than 60 MB in `edgebuild`, or 130 MB in `doit`.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from measuring import STEPS, Cost, Figures, build, command, cost, memory, middle, project

ALONE = """DOIT_CONFIG = {"backend": "sqlite3", "dep_file": ":memory:"}

def task_trivial():
    for number in range(%d):
        yield {"name": str(number), "actions": [], "uptodate": [True]}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, default=100)
    parser.add_argument("--runs", type=int, default=21)
    options = parser.parse_args()
    steps, figures = options.targets * STEPS, Figures()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        lab = project(Path(folder) / "project", options.targets)
        start = time.perf_counter()
        build(lab)
        print(f"{options.targets} targets, {steps} steps; built in {time.perf_counter() - start:.0f} s")
        alone = Path(folder) / "alone"
        alone.mkdir()
        (alone / "dodo.py").write_text(ALONE % steps)
        runs = {"doit --version": lab.root, "edgebuild": lab.root, "doit": lab.root, "doit trivial": alone}
        costs: dict[str, list[Cost]] = {name: [] for name in runs}
        for _ in range(options.runs):
            for name, place in runs.items():
                costs[name].append(cost(command(name), place))
        peaks = {name: memory(command(name), place) for name, place in runs.items()}
        plan = lab.root / "targets" / "one.yaml"
        plan.write_text(plan.read_text() + "# an edit that changes nothing\n")
        edited = cost(command("doit"), lab.root)
    report(figures, steps, {name: middle(found) for name, found in costs.items()}, peaks, edited)
    return figures.status


def report(figures: Figures, steps: int, costs: dict[str, Cost], peaks: dict[str, float], edited: Cost) -> None:
    most = 0.5 * max(steps, 10_000) / 10_000
    small, few = steps <= 10_000, steps <= 100 * STEPS
    figures.state("no-op, `edgebuild`", costs["edgebuild"].seconds, "s", most, str(costs["edgebuild"]))
    figures.state("no-op, `doit`", costs["doit"].seconds, "s", None, str(costs["doit"]))
    figures.state("`doit` on as many tasks of no content", costs["doit trivial"].seconds, "s", None, str(costs["doit trivial"]))
    floor = costs["doit --version"].seconds
    figures.state("`edgebuild` : `doit --version`", costs["edgebuild"].seconds / floor, "×", 0.9 if few else None)
    figures.state("`doit` : `doit --version`", costs["doit"].seconds / floor, "×", 2.5 if few else None)
    figures.state("memory of `edgebuild`", peaks["edgebuild"], "MB", 60 if small else None)
    figures.state("memory of `doit`", peaks["doit"], "MB", 130 if small else None)
    figures.state("memory of `doit` on tasks of no content", peaks["doit trivial"], "MB")
    figures.state("`doit` after an edit of one target file", edited.seconds, "s", None, str(edited))


if __name__ == "__main__":
    sys.exit(main())
