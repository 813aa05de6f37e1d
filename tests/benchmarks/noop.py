"""No-op of N whole targets: `edgebuild` and `doit` against `doit --version`, median of interleaved runs.

    python tests/benchmarks/noop.py [--targets 100] [--runs 21]

Makes a project on the fake backend in a temporary folder, builds it once, then times the three commands in turn. Prints
medians and ratios, and exits 1 where `edgebuild` takes more than 0.9 times, or `doit` more than 2.5 times `doit --version`.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.conftest import TARGET, make_lab

BIN = Path(sys.executable).parent


def timed(command: list[str], folder: Path) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, default=100)
    parser.add_argument("--runs", type=int, default=21)
    options = parser.parse_args()
    home = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        lab = make_lab(Path(folder) / "project")
        for number in range(1, options.targets):
            (lab.root / "targets" / f"t{number}.yaml").write_text(TARGET + f"package: {{version: 1.0.{number}}}\n")
        start = time.perf_counter()
        lab.build()
        os.chdir(home)
        print(f"first build of {options.targets} targets, in one process: {time.perf_counter() - start:.1f} s")
        commands = {
            "doit --version": [str(BIN / "doit"), "--version"],
            "edgebuild": [str(BIN / "edgebuild")],
            "doit": [str(BIN / "doit")],
        }
        for _ in range(3):  # the plan cache and the verdict are written when nothing is racy any more
            print(subprocess.run(commands["doit"], cwd=lab.root, capture_output=True, text=True).stdout.strip())
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(options.runs):
            for name, command in commands.items():
                times[name].append(timed(command, lab.root))
    floor = statistics.median(times["doit --version"])
    failed = False
    for name, limit in (("doit --version", 1.0), ("edgebuild", 0.9), ("doit", 2.5)):
        median = statistics.median(times[name])
        ratio = median / floor
        print(f"{name:<16} {median * 1000:7.1f} ms   {ratio:.2f} × doit --version (limit {limit})")
        failed |= ratio > limit
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
