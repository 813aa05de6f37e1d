"""Steps across targets: what several artifacts of one model answer to the same inputs, and how far they agree."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from edgebuild import digest
from edgebuild.plan import Maker, Plan
from edgebuild.step import ACROSS, Step
from edgebuild.target import Target, parse_source

WEIGHTS = (".onnx", ".gguf", ".safetensors")  # of a model's file, which its name is without


def add(plan: Plan) -> None:
    """For every model of which there are several artifacts: what each of them answers to the same inputs, and how far they agree."""
    models: dict[str, list[Maker]] = {}
    for make in plan.makers:
        target = make.target
        same = [target.source, target.task, sorted(target.state.items()), sorted(target.shape.items())]
        models.setdefault(digest.tagged("model", same), []).append(make)
    names = {key: model_name(makers[0].target.source) for key, makers in models.items()}
    taken = Counter(names.values())
    for key, makers in models.items():
        steps = _agreement(names[key] if taken[names[key]] == 1 else f"{names[key]}-{key[:8]}", makers)
        plan.steps.update((step.name, step) for step in steps)


def _agreement(model: str, makers: Sequence[Maker]) -> list[Step]:
    """Baselines first, one for each way to convert it, then the targets' artifacts; what several targets make alike is one row.

    It has the name of the first of them, of a default target where one is among them.
    """
    data = next((make.target.evaluation for make in makers if make.target.evaluation), "")
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    answers: dict[tuple[str, ...], Step] = {}  # of each row
    namesakes: dict[tuple[str, ...], Target] = {}
    for role in ("baseline", "candidate"):
        for make in makers:
            target, planned = make.target, make.plan.steps
            convert = planned[f"convert:{target.name}"]
            made = planned.get(f"choose:{target.name}") or planned.get(f"quantize:{target.name}") or convert
            if role == "baseline":
                made = convert
            same: tuple[str, ...] = (convert.recipe,)
            if made is not convert:
                same += made.recipe, target.calibration, target.evaluation if made.verb == "choose" else ""
            if same not in rows or (target.default and not namesakes[same].default):
                targets = rows[same]["targets"] if same in rows else []
                rows[same] = {"name": target.name, "of": role, "framework": make.choice.framework, "targets": targets}
                rows[same]["scheme"] = "none" if made is convert else target.scheme
                answered = role == "baseline" and target.evaluation == data
                own = planned[f"evaluate:{target.name}.baseline"]
                answers[same] = own if answered else _answer(make, model, role, made, data)
                namesakes[same] = target
            if role == "candidate":
                rows[same]["targets"].append(target.name)
    frameworks = Counter(row["framework"] for row in rows.values() if row["of"] == "baseline")
    for row in rows.values():
        if row["of"] == "baseline":  # a space is in no target's name
            which = f" ({row['name']})" if frameworks[row["framework"]] > 1 else ""
            row["name"] = f"baseline {row['framework']}{which}"
    if len(rows) < 2:
        return []
    target = makers[0].target
    inputs = {
        f"answers/{row['name']}": step.outputs["answers"] for row, step in zip(rows.values(), answers.values(), strict=True)
    }
    source = target.source.partition("?")[0]  # what stands behind it in an address may be a token
    params = {"model": model, "source": source, "task": target.task, "rows": list(rows.values())}
    matrix = {"matrix": f"build/{ACROSS}/{model}.json"}
    agree = _across(makers[0], "agree", model, inputs, matrix, params, tuple(step.name for step in answers.values()))
    return [*(step for step in answers.values() if step.target == ACROSS), agree]


def _answer(make: Maker, model: str, role: str, made: Step, data: str) -> Step:
    """What an artifact answers, written as the evaluation of a baseline writes it."""
    return _across(
        make,
        "answer",
        f"{model}.{role}.{make.target.name}",
        {"model": made.outputs["model"], **({"data": data} if data else {})},
        {"answers": "answers.safetensors"},
        {"task": make.target.task, "role": "baseline", **(make.state if data else {})},
        (made.name,),
    )


def _across(
    make: Maker,
    verb: str,
    name: str,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
    params: Mapping[str, Any],
    after: tuple[str, ...],
) -> Step:
    """A step of a model, on demand: no target needs it."""
    return Step(
        name=f"{verb}:{name}",
        verb=verb,
        target=ACROSS,
        recipe=make.recipe(verb, params, runs=verb == "answer"),
        inputs=inputs,
        outputs={key: path if "/" in path else f"build/{ACROSS}/{verb}.{name}/{path}" for key, path in outputs.items()},
        after=after,
        on_demand=True,
    )


def model_name(source: str) -> str:
    """What `agree:` calls a model: its file's or folder's name, of a repository its own, in small letters, digits and dashes."""
    named = parse_source(source)
    last = PurePosixPath(urlsplit(named.path).path if named.kind == "https" else named.path or named.name)
    words = [last.stem if last.suffix in WEIGHTS else last.name]
    if named.kind == "hf":
        words = [named.name.rpartition("/")[2], *(words if named.path and words != ["model"] else [])]
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")[:50].strip("-") or "model"
