"""One language model as eight targets, two schemes on each of four backends, beside the same eight built one by one.

    python tests/benchmarks/sharing.py [--runs 3] [--model DIR] [--timed]

For a phone (MLX), an Intel server (OpenVINO), an NVIDIA box (Olive) and a board (llama.cpp): this machine times those for Intel
alone, as its processor says nothing of the others. `--timed`: all eight for any computer, each timed.

The eight in one project share what they share: the source is read, looked at and run once, and converted and measured once a
backend. They are built by `doit`, a step at a time, and again by `doit -n` with a step a core, which is what one types who has
eight; benchmarks run alone in any case. Both stand between the first four and the last four of the eight one by one. Of these, each
is built in a project of its own with an empty store, as eight commands that know nothing of each other. The model is as published
ones are, without golden logits. Toolchains are made before, where they are not there yet (`edgebuild toolchain install --all`), and
are in neither time. The seconds of each kind of step are printed for both. All ways the same bundles must come out, byte for byte.
Exits 1 where the eight by `doit -n` take more than half the sum.

A step at a time, two targets a backend can never take half the sum unless all that a target has for itself (quantize, evaluate,
benchmark, package) takes less than three quarters of what all of them share (fetch, assess, reference): what the two targets of a
backend share is by itself half of its sum. A benchmark takes 12 s of timing alone, whatever else is shared.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from measuring import Figures, command, median

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 0.5
SCHEMES = {  # backend → platform, schemes
    "mlx": ("ios", ("int4", "int8")),
    "openvino": ("intel-server", ("int4", "int8")),
    "olive": ("nvidia-server", ("int4", "int8")),
    "llamacpp": ("embedded-linux", ("q4_k_m", "q8_0")),
}
TARGET = """edgebuild: 1
model: {{source: model, task: text-generation}}
platform: {platform}
framework: {backend}
quantize: {{scheme: {scheme}{more}}}
evaluate: {{data: eval.txt}}
package: {{kind: folder, version: 1.0.0}}
"""


def project(folder: Path, model: Path, names: list[str], timed: bool) -> Path:
    """With these of the eight targets; nothing is built yet."""
    folder.mkdir()
    shutil.copytree(model, folder / "model", ignore=shutil.ignore_patterns("golden.safetensors"))
    shutil.copyfile(ROOT / "targets/data/eval.txt", folder / "eval.txt")
    shutil.copyfile(ROOT / "dodo.py", folder / "dodo.py")
    (folder / "targets").mkdir()
    for name in names:
        backend, _, scheme = name.partition("-")
        scheme = scheme.replace("-", "_")
        more = ", group_size: 32" if scheme == "int4" else ", method: dynamic" if backend == "olive" else ""
        platform = "generic-cpu" if timed else SCHEMES[backend][0]
        text = TARGET.format(platform=platform, backend=backend, scheme=scheme, more=more)
        (folder / f"targets/{name}.yaml").write_text(text)
    return folder


def built(root: Path, *words: str) -> float:
    """Seconds of a first build. Ends the program where it fails."""
    start = time.monotonic()
    done = subprocess.run(
        [*command("doit"), *words], cwd=root, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}")
    return time.monotonic() - start


def by_verb(*roots: Path) -> Counter[str]:
    """Seconds of the steps that ran, by what they do."""
    spent: Counter[str] = Counter()
    for root in roots:
        for step in json.loads((root / ".edgebuild/last-run.json").read_text())["steps"]:
            spent[step["name"].partition(":")[0]] += step["seconds"] or 0
    return spent


def bundles(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "dist").glob("*.tar")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--model", type=Path, default=ROOT / "targets/models/tiny-phi3", help="a Hugging Face folder")
    parser.add_argument("--timed", action="store_true", help="all eight for a platform that this machine is")
    options = parser.parse_args()
    names = [f"{backend}-{scheme.replace('_', '-')}" for backend, (_, schemes) in SCHEMES.items() for scheme in schemes]
    cores = len(os.sched_getaffinity(0))
    figures, ratios, at_once = Figures(), [], []
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory() as folder:
            alone, made = 0.0, {}
            for number, name in enumerate(names):
                if number == len(names) // 2:  # in the middle, so that a machine that becomes slower or faster favours neither
                    together = project(Path(folder, "together"), options.model, names, options.timed)
                    shared = built(together)
                    beside = project(Path(folder, "beside"), options.model, names, options.timed)
                    quick = built(beside, "-n", str(cores))
                one = project(Path(folder, name), options.model, [name], options.timed)
                seconds = built(one)
                print(f"  {name:<20} {seconds:6.1f} s", flush=True)
                alone += seconds
                made |= bundles(one)
            if not made == bundles(together) == bundles(beside):
                sys.exit("the bundles are not the same")
            apart, whole = by_verb(*(Path(folder, name) for name in names)), by_verb(together)
            for verb, seconds in apart.most_common():
                print(f"  {verb:<20} {whole[verb]:6.1f} s, one by one {seconds:6.1f} s")
        print(f"  together {shared:.1f} s, by doit -n {cores} {quick:.1f} s, one by one {alone:.1f} s", flush=True)
        ratios.append(shared / alone)
        at_once.append(quick / alone)
    figures.state("eight targets by `doit` : one by one", median(ratios), "×")
    figures.state(f"eight targets by `doit -n {cores}` : one by one", median(at_once), "×", LIMIT)
    return figures.status


if __name__ == "__main__":
    sys.exit(main())
