"""Gigabytes: packed for the first time, restored to build/ and to dist/, and touched without being changed.

    python tests/benchmarks/restore.py [--runs 3] [--mebibytes 1536]

A target on the fake backend whose quantized model holds a file that big. How much edgebuild hashes is counted. Exits 1
where a first build hashes more than each file once that a step made; where a step is restored to build/ in more than 0.3 s
beyond the sha256 of what other hands touched, or hashes anything else; where dist/ takes more than 1.2 × `cp`, or is hashed
after it was written; or where touching a source of 1 GiB costs more than 1.1 × one sha256 and one no-op of the same command.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measuring import Cost, Figures, command, cost, median, middle, project, settle, sha256

from edgebuild import digest
from edgebuild.fresh import Fresh, remember
from edgebuild.process import Result, Workers
from edgebuild.project import Project
from edgebuild.run import Builder, Done
from tests.conftest import perform_here

WEIGHTS = "build/one/quantize/model/weights.bin"
SMALL = 1 << 20  # bytes of a project's small files, hashed now and then


class Big:
    """A project with one big file, built in this process. `hashed` counts the bytes that edgebuild itself hashes."""

    def __init__(self, root: Path, size: int) -> None:
        self.size, self.hashed, self._counting = size, 0, True
        project(root, 1)
        os.chdir(root)
        real = digest.of_file

        def of_file(path: str) -> str:
            self.hashed += os.path.getsize(path) * self._counting
            return real(path)

        digest.of_file = of_file

    def build(self) -> dict[str, Done]:
        """→ what ran or was restored. `hashed` counts anew."""
        self.hashed = 0
        plan = Project()
        fresh = Fresh(plan)
        builder = Builder(plan, fresh, Workers(), self._perform)
        done = {step.name: builder.run(step) for step in plan.steps.values() if not fresh(step)}
        remember(plan, fresh)
        plan.memo.save()
        return done

    def _perform(self, record: Mapping[str, Any], *rest: Any) -> Result:
        self._counting = False
        result = perform_here(record, *rest)
        if record["verb"] == "quantize":
            with open(f"{record['outputs']['model']}/weights.bin", "wb") as file:
                for _ in range(self.size >> 20):
                    file.write(os.urandom(1 << 20))
        self._counting = True
        return result


def restored(done: Mapping[str, Done], name: str) -> float:
    """Seconds that restoring a step took. Raises AssertionError where it ran instead."""
    assert done[name].outcome == "restored", done[name]
    return done[name].seconds


def stores(figures: Figures, root: Path, size: int, runs: int) -> None:
    big = Big(root, size)
    big.build()
    made = 3 * size  # the quantized model, the bundle and its archive
    figures.state("first build: hashed beside its steps", big.hashed / made, "×", 1 + SMALL / made, "of what its steps made")
    shas, ours, others, dist, cp = [], [], [], [], []
    for _ in range(runs):
        assert not big.build()
        figures.state("no-op: hashed", big.hashed, "B", SMALL)
        shas.append(sha256(Path(WEIGHTS)).seconds)
        plan = Project()
        plan.store.remove("build/one/quantize/model")
        plan.memo.save()
        ours.append(restored(big.build(), "quantize:one"))
        figures.state("restored, touched by nobody: hashed", big.hashed, "B", SMALL)
        shutil.rmtree("build")
        others.append(restored(big.build(), "quantize:one"))
        figures.state("restored, touched by other hands: hashed", big.hashed / size, "×", 1 + SMALL / size)
        os.sync()
        cp.append(copied())
        shutil.rmtree("dist")
        os.sync()
        dist.append(restored(big.build(), "package:one"))
        figures.state("restored to dist/, and no-op: hashed", big.hashed, "B", SMALL)
    figures.state("one sha256", median(shas), "s")
    figures.state("restored to build/, touched by nobody", median(ours), "s", 0.3)
    beyond = median([seconds - sha for seconds, sha in zip(others, shas, strict=True)])
    figures.state("restored to build/ beyond one sha256", beyond, "s", 0.3)
    figures.state("cp of dist/", median(cp), "s")
    figures.state("restored to dist/", median(dist) / median(cp), "×", 1.2, f"{median(dist):.2f} s")


def copied() -> float:
    """Seconds that `cp` takes for what dist/ holds."""
    seconds = cost(["cp", "-r", "dist", "copy"], Path()).seconds
    shutil.rmtree("copy")
    return seconds


def touches(figures: Figures, root: Path, runs: int) -> None:
    project(root, 1)
    source = root / "model.gguf"
    source.write_bytes(source.read_bytes() + b"#")
    os.truncate(source, 1 << 30)
    settle(root)
    costs: dict[str, tuple[list[Cost], list[Cost], list[Cost]]] = {"edgebuild": ([], [], []), "doit": ([], [], [])}
    for _ in range(runs):
        for name, (touched, noop, sha) in costs.items():
            noop.append(cost(command(name), root))
            sha.append(sha256(source))
            os.utime(source)
            time.sleep(0.05)  # what is younger than a tick of the kernel's clock is hashed again later
            touched.append(cost(command(name), root))
            settle(root)
    for name, found in costs.items():
        touched, noop, sha = map(middle, found)
        clock, processor = (
            (touched.seconds, noop.seconds + sha.seconds),
            (touched.processor, noop.processor + sha.processor),
        )
        beside = f"{clock[0]:.2f} : {clock[1]:.2f} s; of a processor {processor[0]:.2f} : {processor[1]:.2f} s"
        figures.state(f"1 GiB touched, `{name}`", clock[0] / clock[1], "×", 1.1, beside)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--mebibytes", type=int, default=1536)
    options = parser.parse_args()
    home, figures = os.getcwd(), Figures()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"  # the machine lock of others is none of ours
        touches(figures, Path(folder) / "touch", 2 * options.runs)  # seconds each, and they vary more
        stores(figures, Path(folder) / "store", options.mebibytes << 20, options.runs)
        os.chdir(home)
    return figures.status


if __name__ == "__main__":
    sys.exit(main())
