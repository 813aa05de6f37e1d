"""One job, static int8 of the digits model with 200 samples: edgebuild, the bare functions, and `olive run`."""

import json
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from pipelines.tools import EXAMPLE, HERE, Project, Tool, checked, environment

SAMPLES = 200
ROWS = ("edgebuild quantize:v01", "… its step quantize", "… again", "step.py quantize", "olive run", "… its pass", "… again")


def compare(edgebuild: Tool, olive: Path, folder: Path, runs: int) -> None:
    """Prints seconds (medians of interleaved runs), bytes and accuracy of what each made."""
    rows: list[list[float]] = [[] for _ in ROWS]
    made: dict[str, Path] = {}
    for _ in range(runs):
        place = Path(tempfile.mkdtemp(dir=folder))
        made = {"edgebuild": _edgebuild(edgebuild, place / "edgebuild", rows)}
        made["olive"] = _olive(olive, place / "olive", rows)
    print(f"\nStatic int8 quantization alone, {SAMPLES} samples, medians of {runs}: seconds\n")
    for title, seconds in zip(ROWS, rows, strict=True):
        print(f"{title:<26}{statistics.median(seconds):>8.2f}")
    for name, path in made.items():
        report = path.parent / "evaluation.json"
        step = ["python", str(HERE / "step.py"), "evaluate", str(path), str(EXAMPLE / "data/digits-eval.npz"), str(report)]
        path.parent.chmod(0o755)
        checked(step, folder, environment(folder))
        print(f"{name}: {path.stat().st_size:,} bytes, accuracy {json.loads(report.read_text())['accuracy']:.2%}")


def _edgebuild(tool: Tool, place: Path, rows: list[list[float]]) -> Path:
    """From a new project: it reads, assesses and converts before it quantizes; then the same functions in one process."""
    project = Project(tool, place, {"v01": SAMPLES})
    rows[0].append(project.build("quantize:v01")[0])
    rows[1].append(project.seconds("quantize:v01"))
    rows[2].append(project.build("quantize:v01")[0])
    source, data = str(EXAMPLE / "models/digits.onnx"), str(EXAMPLE / "data/digits-calibration.npz")
    start = time.perf_counter()
    checked(["python", str(HERE / "step.py"), "quantize", source, data, str(SAMPLES), "model.onnx"], place, environment(place))
    rows[3].append(time.perf_counter() - start)
    return project.models()[0]


def _olive(environment_folder: Path, place: Path, rows: list[list[float]]) -> Path:
    place.mkdir()
    for name in ("olive.json", "olive_data.py"):
        shutil.copyfile(HERE / name, place / name)
    shutil.copyfile(EXAMPLE / "models/digits.onnx", place / "digits.onnx")
    shutil.copyfile(EXAMPLE / "data/digits-calibration.npz", place / "calibration.npz")
    command = [str(environment_folder / "bin/olive"), "run", "--config", "olive.json"]
    for number in (4, 6):
        start = time.perf_counter()
        said = checked(command, place, environment(place))
        rows[number].append(time.perf_counter() - start)
        if number == 4:
            found = re.search(r"finished in ([\d.]+) seconds", said)
            if not found:
                sys.exit(f"olive run: no pass ran\n{said[-2000:]}")
            rows[5].append(float(found[1]))
    return place / "output/model.onnx"
