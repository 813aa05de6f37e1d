"""One pipeline in edgebuild, DVC, Snakemake and Make, side by side: times, and what each takes for up to date.

    python tests/benchmarks/peers.py [--variants 20] [--runs 3] [--environments DIR] [--without olive]

The pipeline: convert models/digits.onnx once, then quantize (int8, static), evaluate and package it in N variants that
differ in how many samples calibrate. The peers run `pipelines/step.py`, a process a step, with the functions that
edgebuild's own backend calls; all run one step at a time, in the same Python. edgebuild does more, in the same time: it
assesses the source, runs the converted model against it, evaluates the baseline too, judges gates, renders a bundle with golden
outputs and loads it once more, writes evidence and receipts, and fsyncs what its store keeps. Nobody times inference here.

First Olive's static quantization beside edgebuild's, for the same job. Then times: medians of interleaved runs, each in a
new project with an empty cache. The second checkout is a `git clone` that shares the tool's cache: EDGEBUILD_STORE; DVC's
cache folder (`dvc checkout`, then `dvc repro`); Snakemake's where it is asked for (`--cache`, a column of its own); Make
has none. Last the states: a project with one variant, one change, the command again, and its outputs held against those
of a clean build.

Environments of the peers are made once, by pip, from `pipelines/*.txt`, in DIR. Telemetry is off. It needs git and make.
"""

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipelines import quantizers
from pipelines.tools import EXAMPLE, HERE, Project, Tool, checked, environment, tools

# Numbers of calibration samples that give different models; those between them give the same bytes.
SAMPLES = (5, 6, 7, 8, 10, 11, 12, 13, 16, 19, 24, 30, 40, 50, 60, 100, 110, 130, 150, 1, 2, 3)
EDITED = 200
PHASES = ("first build", "no-op", "one setting edited", "edit reverted", "second checkout")


# -- times ----------------------------------------------------------------------------------------------------------------
def timed(tool: Tool, folder: Path, variants: Mapping[str, int]) -> list[tuple[float, int]]:
    """Seconds and steps run, by phase. Ends the program where a tool's revert or clone does not bring back what was built."""
    project = Project(tool, folder, variants)
    first = project.build()
    built = project.outputs()
    if len({built[str(path.relative_to(project.root))] for path in project.models()}) != len(variants):
        sys.exit(f"{tool.name}: the variants' models do not differ")
    again = [project.build() for _ in range(3)]
    name = sorted(variants)[len(variants) // 2]
    project.set({**variants, name: EDITED})
    edited = project.build()
    if project.outputs() == built:
        sys.exit(f"{tool.name}: the edit changed nothing")
    project.set(variants)
    reverted = project.build()
    same = project.outputs() == built
    restoring = project.clone()
    seconds, ran = project.build()
    second = (restoring + seconds, ran)
    if not same or project.outputs() != built:
        sys.exit(f"{tool.name}: {'the second checkout' if same else 'the revert'} is not what was built first")
    return [first, (statistics.median(seconds for seconds, _ in again), again[-1][1]), edited, reverted, second]


def compare(chosen: Sequence[Tool], folder: Path, count: int, runs: int) -> None:
    variants = {f"v{number + 1:02}": samples for number, samples in enumerate(SAMPLES[:count])}
    results: dict[str, list[list[tuple[float, int]]]] = {tool.name: [] for tool in chosen}
    for run in range(runs):
        for tool in chosen:
            place = Path(tempfile.mkdtemp(dir=folder))
            results[tool.name].append(timed(tool, place, variants))
            shutil.rmtree(place)
            shown = "  ".join(f"{seconds:.2f}" for seconds, _ in results[tool.name][-1])
            print(f"  run {run + 1}  {tool.name:<18}{shown}  (load {os.getloadavg()[0]:.1f})", flush=True)
    print(f"\n{count} variants, medians of {runs}: seconds, × edgebuild, steps that ran\n")
    print(f"{'':<20}" + "".join(f"{tool.name:>26}" for tool in chosen))
    for phase, title in enumerate(PHASES):
        medians = {name: statistics.median(run[phase][0] for run in all_runs) for name, all_runs in results.items()}
        cells = [
            f"{medians[name]:>10.2f}  ×{medians[name] / medians[chosen[0].name]:<6.2f} {all_runs[-1][phase][1]:>4}  "
            for name, all_runs in results.items()
        ]
        print(f"{title:<20}" + "".join(cells))


# -- states ---------------------------------------------------------------------------------------------------------------
def edit_output(project: Project, keep_time: bool) -> None:
    path = project.models()[0]
    before = path.stat()
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.seek(before.st_size // 2)
        file.write(b"edited")
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def older_input(project: Project) -> None:
    """Other calibration data, older than what was built: out of an archive, or by `cp -p`."""
    path = project.root / "data/calibration.npz"
    shutil.copyfile(EXAMPLE / "data/digits-eval.npz", path)
    os.utime(path, (time.time() - 86400,) * 2)


def touch_settings(project: Project) -> None:
    for file in ("targets/v01.yaml", "params.yaml", "config.yaml", "settings/v01.txt"):
        if (project.root / file).exists():
            os.utime(project.root / file)


STATES: Mapping[str, Callable[[Project], object]] = {
    "nothing changed": lambda project: None,
    "setting edited": lambda project: project.set({"v01": EDITED}),
    "… and reverted": lambda project: project.set({"v01": SAMPLES[0]}),
    "settings touched": touch_settings,
    "model touched": lambda project: os.utime(project.root / "models/digits.onnx"),
    "new clone": Project.clone,
    "output edited": lambda project: edit_output(project, keep_time=False),
    "output edited, time kept": lambda project: edit_output(project, keep_time=True),
    "output deleted": lambda project: project.models()[0].unlink(),
    "older input put there": older_input,
}


def observe(tool: Tool, folder: Path) -> list[str]:
    """By state: how many steps ran, and `right` (the outputs of a clean build), `missing` (a part of them) or `WRONG`."""
    cells = []
    project = built(tool, folder)
    clean = project.outputs()
    for title, change in STATES.items():
        expected = clean
        if title in ("setting edited", "older input put there"):
            expected = built(tool, folder, change).outputs()
        change(project)
        ran = project.build()[1]
        outputs = project.outputs()
        verdict = "right" if outputs == expected else "missing" if outputs.items() < expected.items() else "WRONG"
        cells.append(f"{ran} {verdict}")
        if verdict != "right":
            project = built(tool, folder)
    return cells


def built(tool: Tool, folder: Path, change: Callable[[Project], object] = lambda project: None) -> Project:
    project = Project(tool, Path(tempfile.mkdtemp(dir=folder)), {"v01": SAMPLES[0]})
    change(project)
    project.build()
    return project


def states(chosen: Sequence[Tool], folder: Path) -> None:
    columns = [observe(tool, folder) for tool in chosen]
    print("\nOne variant, one change, the command again: steps that ran, and whether the outputs are those of a clean build\n")
    print(f"{'':<26}" + "".join(f"{tool.name:>20}" for tool in chosen))
    for number, title in enumerate(STATES):
        print(f"{title:<26}" + "".join(f"{column[number]:>20}" for column in columns))


# -- environments ---------------------------------------------------------------------------------------------------------
def make_environment(folder: Path, name: str) -> None:
    """A virtual environment with what `pipelines/NAME.txt` pins, where it is not there yet."""
    wanted, have = HERE / f"{name}.txt", folder / name / "installed.txt"
    if have.exists() and have.read_text() == wanted.read_text():
        return
    print(f"installing {name} into {folder / name} …", flush=True)
    shutil.rmtree(folder / name, ignore_errors=True)
    checked([sys.executable, "-m", "venv", str(folder / name)], HERE, os.environ)
    checked([str(folder / name / "bin/pip"), "install", "-q", "-r", str(wanted)], HERE, os.environ)
    shutil.copyfile(wanted, have)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgebuild-peers"
    parser.add_argument("--variants", type=int, default=20, choices=range(1, len(SAMPLES) + 1), metavar="N")
    parser.add_argument("--runs", type=int, default=3, help="0: the states alone")
    parser.add_argument("--environments", type=Path, default=cache, metavar="DIR")
    parser.add_argument("--without", nargs="*", default=[], choices=["dvc", "snakemake", "make", "olive"])
    options = parser.parse_args()
    environments = options.environments.resolve()
    for name in ("dvc", "snakemake", "olive"):
        if name not in options.without:
            make_environment(environments, name)
    chosen = [tool for tool in tools(environments) if tool.name.split()[0].lower() not in options.without]
    with tempfile.TemporaryDirectory() as folder:
        for tool in chosen:
            print(f"{tool.name} {checked(tool.version, HERE, environment(Path(folder))).splitlines()[0]}")
        print(f"{platform.platform()}, {os.cpu_count()} CPUs, Python {platform.python_version()}")
        if "olive" not in options.without and options.runs:
            quantizers.compare(chosen[0], environments / "olive", Path(folder), options.runs)
        if options.runs:
            compare(chosen, Path(folder), options.variants, options.runs)
        states(chosen, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
