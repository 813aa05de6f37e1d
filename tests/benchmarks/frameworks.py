"""Steps of real frameworks against the same calls in a script: what edgebuild adds to ONNX Runtime and MLX.

    python tests/benchmarks/frameworks.py [--runs 5] [--megabytes 200]

The repository's two models, and an ONNX model of `--megabytes` made on the fly. Each convert and quantize step is run by
edgebuild, from its key to its receipt, and its action by a script in a process of its own, in turn. Both start an interpreter
and import the framework; what a worker's start takes, edgebuild's fsyncs, and one sha256 of what the step made, by which the store
knows it, are stated apart. Exits 1 where the steps of the large model take more than 1.05 × the script, fsyncs aside and that
sha256 counted. The small ones show the fixed cost.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measuring import Cost, Figures, cost, median, middle

from edgebuild.fresh import Fresh, key_now
from edgebuild.process import Workers
from edgebuild.project import Project
from edgebuild.run import Builder
from edgebuild.step import ENVIRONMENT, Step

ROOT = Path(__file__).resolve().parents[2]
LARGE = """edgebuild: 1
model: {source: large.onnx, task: feature-extraction}
platform: generic-cpu
framework: onnxruntime
quantize: {scheme: int8, method: dynamic}
package: {kind: folder, archive: false}
"""
SCRIPT = """import json, pathlib, shutil, sys
from edgebuild.worker import perform
record = json.load(open(sys.argv[1]))
outcome = perform(record)
for place, role in outcome.kept.items():
    shutil.copyfile(record["inputs"][role], pathlib.Path(record["outputs"]["report"]).parent / place)
print(outcome.summary)
"""


def large(path: Path, size: int) -> None:
    """A chain of matrix products, `size` bytes of random weights."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    width = 2048
    count = max(1, size // (4 * width * width))
    random = np.random.default_rng(0)
    nodes, weights = [], []
    for number in range(count):
        matrix = (random.standard_normal((width, width)) / width**0.5).astype("float32")
        weights.append(numpy_helper.from_array(matrix, f"w{number}"))
        nodes.append(helper.make_node("MatMul", [f"x{number}", f"w{number}"], [f"x{number + 1}"]))
    shown = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", width]) for name in ("x0", f"x{count}")]
    graph = helper.make_graph(nodes, "large", shown[:1], shown[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


@contextmanager
def fsyncs() -> Iterator[list[float]]:
    """Seconds of every fsync of this process."""
    spent: list[float] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        start = time.perf_counter()
        real(handle)
        spent.append(time.perf_counter() - start)

    os.fsync = fsync
    try:
        yield spent
    finally:
        os.fsync = real


def hashing(paths: Iterable[str]) -> float:
    """Seconds of one sha256 of all files at and below these paths."""
    start = time.perf_counter()
    for path in map(Path, paths):
        for file in (path, *path.rglob("*")):
            if file.is_file():
                with file.open("rb") as opened:
                    hashlib.file_digest(opened, "sha256")
    return time.perf_counter() - start


class Bench:
    """The project, in this process."""

    def __init__(self) -> None:
        self.project = Project()
        self.builder = Builder(self.project, Fresh(self.project), Workers())

    def step(self, step: Step) -> tuple[Cost, float, float]:
        """What a step costs which the store does not know, fsyncs aside; the seconds in fsync, and of one sha256 of what it made."""
        key = key_now(self.project, step)
        Path(f".edgebuild/records/{key[:2]}/{key[2:]}").unlink(missing_ok=True)
        shutil.rmtree(".edgebuild/objects", ignore_errors=True)  # else it would find its output there and delete its own
        before = os.times()
        with fsyncs() as spent:
            done = self.builder.run(step)
        assert done.outcome == "ran", done
        spending = Cost(seconds=done.seconds - sum(spent), processor=sum(os.times()[:4]) - sum(before[:4]))
        return spending, sum(spent), hashing(step.outputs.values())

    def script(self, step: Step) -> Cost:
        """What its action costs in a process that knows nothing of edgebuild's store."""
        with tempfile.TemporaryDirectory(dir=".edgebuild/tmp") as folder:
            components: dict[str, Any] = self.project.recipes[step.recipe]
            record = {
                "verb": step.verb,
                "backend": components["backend"],
                "params": components["params"],
                "toolchain": components["toolchain"],
                "root": os.getcwd(),
                "inputs": dict(step.inputs),
                "outputs": {name: os.path.abspath(f"{folder}/{name}") for name in step.outputs},
            }
            Path(folder, "record.json").write_text(json.dumps(record))
            return cost([sys.executable, "-c", SCRIPT, f"{folder}/record.json"], Path())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("targets", nargs="*", help="web-digits, ios-phi3, large; all by default")
    options = parser.parse_args()
    home, figures = os.getcwd(), Figures()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {**ENVIRONMENT, "XDG_CACHE_HOME": f"{folder}/cache", "PYTHONPATH": str(ROOT)}
        root = Path(folder) / "project"
        shutil.copytree(ROOT / "targets", root / "targets")
        large(root / "large.onnx", options.megabytes * 1_000_000)
        (root / "targets" / "large.yaml").write_text(LARGE)
        os.chdir(root)
        starts = [cost([sys.executable, "-c", "import edgebuild.worker"], root).seconds for _ in range(options.runs)]
        figures.state("a worker's start: interpreter and imports", median(starts), "s")
        bench = Bench()
        for target in options.targets or ("web-digits", "ios-phi3", "large"):
            for step in bench.project.of(target):
                recipe = not step.on_demand or step.stem == "quantize.static"  # one of those that are tried
                if step.verb in ("fetch", "assess", "convert", "quantize") and recipe:
                    compare(figures, bench, step, options.runs)
        os.chdir(home)
    return figures.status


def compare(figures: Figures, bench: Bench, step: Step, runs: int) -> None:
    bench.step(step)
    if step.verb in ("fetch", "assess"):
        return
    steps, syncs, hashes, scripts = [], [], [], []
    for _ in range(runs):
        found, synced, hashed = bench.step(step)
        steps.append(found)
        syncs.append(synced)
        hashes.append(hashed)
        scripts.append(bench.script(step))
    ours, plain, digest = middle(steps), middle(scripts), median(hashes)
    beside = f"{ours.seconds:.2f} : {plain.seconds:.2f} s, and {median(syncs):.2f} s in fsync; "
    beside += f"of processors {ours.processor:.2f} : {plain.processor:.2f} s, × {ours.processor / plain.processor:.3f}; "
    beside += f"beyond one sha256, {digest:.2f} s, × {(ours.seconds - digest) / plain.seconds:.3f}"
    figures.state(f"{step.name} : script", ours.seconds / plain.seconds, "×", 1.05 if step.target == "large" else None, beside)


if __name__ == "__main__":
    sys.exit(main())
